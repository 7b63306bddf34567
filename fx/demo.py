"""The extraction demo: fine-tune on an item, extract it with three arms, print the scores, save a picture.

A typical artist and a typical object of the shipped sets, one of them by LoRA instead, or any folder of images. For a folder
FineXtract's w' is chosen as an attacker could, without the training images (fx.label_free, notebook 14):

    python -m fx.demo
    python -m fx.demo object/rooster --method lora
    python -m fx.demo ~/photos/dog --caption "a dog"
"""

import argparse
import hashlib
import shlex
from pathlib import Path

from fx import command, plots, results, settings, tables
from fx.datasets import load_images, load_item, to_uint8
from fx.evaluation import Score, image_side, read_matches, scored_images, thresholds
from fx.finetune import METHODS, TrainingItem, load_training
from fx.label_free import NEAREST, choose_scale
from fx.paths import COMPLETE, FIGURES
from fx.sampling import generated_pictures

# of Table 1's artists and objects, each the one whose gain in AS by FineXtract over CFG is the median (DreamBooth)
TYPICAL = ("style/marko-j-kolehmainen", "object/elephant")


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; unknown words are refused by argparse."""
    parser = argparse.ArgumentParser("python -m fx.demo", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "items",
        nargs="*",
        metavar="ITEM",
        default=list(TYPICAL),
        help=f"a shipped item or a folder of images, one or several (default {' '.join(TYPICAL)})",
    )
    parser.add_argument("--caption", help="training caption of the one item; a folder needs one")
    parser.add_argument("--method", choices=METHODS, default="dreambooth", help="how to fine-tune")
    parser.add_argument("--images", type=int, default=10, help="generated images per training image (default 10)")
    parser.add_argument(
        "--change",
        default="",
        help="other settings than N (--images) and the seed, of fx/settings.yaml: 'sampling_steps=25 lora.rank=16'",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of fine-tuning and sampling (default 0)")
    parser.add_argument(
        "--write-figure",
        action="store_true",
        help="renew what README.md shows: the picture in figures/, the scores in data/results/mini",
    )
    options = parser.parse_args(words)
    if options.images < 1 or options.seed < 0:
        parser.error(f"--images {options.images} must be at least 1, --seed {options.seed} at least 0")
    try:
        words = shlex.split(options.change)
    except ValueError as error:
        parser.error(f"--change {options.change!r}: {error}")
    if own := {word.partition("=")[0].rpartition(".")[2] for word in words} & {"images_per_training", "seed"}:
        parser.error(f"--change cannot set {' and '.join(sorted(own))}: use --images and --seed")
    if options.caption and len(options.items) != 1:
        parser.error(f"--caption is for one item, not for {len(options.items)}: run the demo once for each")
    if options.write_figure and options != parser.parse_args(["--write-figure"]):
        parser.error("--write-figure is for the demo as it comes: leave out the item and every other option")
    return options


def is_to_be_chosen(options: argparse.Namespace, item: str) -> bool:
    """Whether w' is chosen for an item: for a folder, which the settings' was not chosen for, unless --change names one."""
    named = {word.partition("=")[0].rpartition(".")[2] for word in shlex.split(options.change)}
    return Path(item).is_dir() and "finextract_scale" not in named


def specs(options: argparse.Namespace) -> list[list[Score]]:
    """The three extractions of each item with their scores, w' of a folder's chosen first, and said."""
    change = f"{options.change} images_per_training={options.images} seed={options.seed}"
    chosen, asked = settings.load(change=change)[options.method], []
    for item in options.items:
        training = TrainingItem(item, options.caption)
        own, model = chosen, chosen.fine_tune(training)
        n = load_training(training).n_training
        if is_to_be_chosen(options, item) and options.images * n > NEAREST:
            own, rows = choose_scale(chosen, model, n, options.images * n)
            signs = ", ".join(f"{w:g}: {sign:.3f}" for w, sign in zip(rows.w, rows.log_ratio, strict=True))
            print(
                f"{item}: w' = {own.finextract_scale:g} is chosen without the training images, by log L_theta / L_theta'"
            )
            print(f"  {signs}")
        asked.append(own.three_arms(model))
    return asked


def main(words: list[str] | None = None) -> None:
    """Run the demo and say what came out."""
    options = arguments(words)
    items = [load_item(item, options.caption or "") for item in options.items]
    print(results.environment_summary())
    for item in items:
        print(f"{item.name}: {item.n_training} training images, caption {item.caption!r}, {options.method}")
    asked = specs(options)
    rows = results.run([spec for arms in asked for spec in arms], description="demo")
    rows["item"] = [item.name for item in items for _ in asked[0]]
    loose, strict = thresholds(asked[0][0])
    print(f"\nA-ESR thresholds of {asked[0][0].extract.descriptor}: strict {strict:.3f}, loose {loose:.3f}\n")
    columns = ["item", "arm", "AS", "AS_controls", "A-ESR_strict", "A-ESR_loose", "n_extracted", "n_generated"]
    shown = rows[columns].astype({"AS_controls": float})
    print(shown.to_string(index=False, float_format="{:.3f}".format, na_rep="-"))
    if options.write_figure:
        tables.save(shown, "demo", COMPLETE)
    print("\nEvery training image, above the extracted image of each arm that is most like it:")
    for item, arms in zip(options.items, asked, strict=True):
        path = picture_path(options, item)
        path.parent.mkdir(parents=True, exist_ok=True)
        comparison(arms).savefig(path)
        print(path)


def picture_path(options: argparse.Namespace, item: str) -> Path:
    """The work area, or with --write-figure the picture that README.md shows."""
    if options.write_figure:
        return FIGURES / f"demo-{item.replace('/', '-')}-mini.png"
    folder = Path(item).is_dir()
    told = [Path(item).name if folder else item.replace("/", "-"), options.method]
    told += [f"N{options.images}", f"seed{options.seed}"]
    if folder or options.caption or options.change:  # which no name of a file can hold
        known = [str(Path(item).resolve()) if folder else item, options.caption or "", options.change]
        told.append(hashlib.sha256("\n".join(known).encode(errors="surrogateescape")).hexdigest()[:8])
    return results.RUNS / "demo" / f"{'-'.join(told)}.png"


def comparison(asked: list[Score]) -> plots.Figure:
    """Training images and, per arm, the extracted image that is most like each of them, with their similarity."""
    training = load_images(tuple(scored_images(asked[0])[0]), image_side(asked[0]))
    rows, notes = {"training": to_uint8(training)}, {}
    for spec in asked:
        found, generate = read_matches(spec), spec.extract.generate
        label = plots.ARM_LABELS[generate.arm]
        rows[label] = generated_pictures(generate, found["match"])
        notes[label] = plots.marked(found["similarity"], *thresholds(spec))
    names = ", ".join(part.item for part in asked[0].extract.generate.model.training)
    return plots.picture_rows(
        rows, f"{names}: best matches (* above the loose, ** above the strict threshold)", notes=notes
    )


if __name__ == "__main__":
    command.run("fx.demo", main)
