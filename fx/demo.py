"""The extraction demo: fine-tune on one item, extract it with three arms, print the scores, save a picture.

One artist of the shipped style set, by LoRA instead, or any folder of images:

    python -m fx.demo
    python -m fx.demo object/rooster --method lora
    python -m fx.demo ~/photos/dog --caption "a dog"
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from fx import plots, results
from fx.datasets import load_images, load_item, to_uint8
from fx.extraction import Extract, three_arms
from fx.finetune import METHODS, FineTune
from fx.paths import FIGURES
from fx.similarity import copy_thresholds

# The defaults of notebook 03, per fine-tuning method.
CHOSEN = {
    "dreambooth": {"learning_rate": 1.0e-5, "cfg_scale": 2.0, "finextract_scale": 5.0, "correction_scale": 0.0},
    "lora": {"learning_rate": 2.5e-4, "cfg_scale": 3.0, "finextract_scale": 3.0, "correction_scale": 0.0},
}


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; unknown words are refused by argparse."""
    parser = argparse.ArgumentParser("python -m fx.demo", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "item", nargs="?", default="style/jonathan-dietrich", help="a shipped item or a folder of images"
    )
    parser.add_argument("--caption", default="", help="training caption; a folder needs one")
    parser.add_argument("--method", choices=METHODS, default="dreambooth", help="how to fine-tune")
    parser.add_argument("--images", type=int, default=10, help="generated images per training image (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="seed of fine-tuning and sampling (default 0)")
    parser.add_argument("--write-figure", action="store_true", help="the picture into figures/, as README.md shows it")
    options = parser.parse_args(words)
    if options.images < 1 or options.seed < 0:
        parser.error(f"--images {options.images} must be at least 1, --seed {options.seed} at least 0")
    if options.write_figure and options != parser.parse_args(["--write-figure"]):
        parser.error("--write-figure is for the demo as it comes: leave out the item and every other option")
    return options


def specs(options: argparse.Namespace) -> list[Extract]:
    """The three extractions of the demo."""
    chosen = CHOSEN[options.method]
    rank = 64 if options.method == "lora" else 0
    finetune = FineTune(
        options.item,
        caption=options.caption,
        method=options.method,
        learning_rate=chosen["learning_rate"],
        rank=rank,
        alpha=rank,
        seed=options.seed,
    )
    scales = {name: chosen[name] for name in ("cfg_scale", "finextract_scale", "correction_scale")}
    return three_arms(finetune, options.images, seed=options.seed, **scales)


def main(words: list[str] | None = None) -> None:
    """Run the demo and say what came out."""
    options = arguments(words)
    item = load_item(options.item, options.caption)
    print(results.environment_summary())
    print(f"{item.name}: {item.n_training} training images, caption {item.caption!r}, {options.method}")
    asked = specs(options)
    rows = results.run(asked, description="demo")
    loose, strict = copy_thresholds("mini-sscd")
    print(f"\nA-ESR thresholds of mini-sscd: strict {strict:.3f}, loose {loose:.3f}\n")
    columns = ["arm", "AS", "A-ESR_strict", "A-ESR_loose", "n_extracted", "n_generated"]
    print(rows[columns].to_string(index=False, float_format="{:.3f}".format))
    path = picture_path(options)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(asked, item).savefig(path)
    print(f"\nEvery training image, above the extracted image of each arm that is most like it: {path}")


def picture_path(options: argparse.Namespace) -> Path:
    """The work area, or with --write-figure the picture that README.md shows."""
    if options.write_figure:
        return FIGURES / f"demo-{options.item.replace('/', '-')}-mini.png"
    name = f"{Path(options.item).name}-{options.method}-N{options.images}-seed{options.seed}.png"
    return results.RUNS / "demo" / name


def picture(asked: list[Extract], item) -> plots.Figure:
    """Training images and, per arm, the extracted image that is most like each of them, with their similarity."""
    size = np.load(results.folder(asked[0].generate) / "images.npy", mmap_mode="r").shape[1]
    rows, notes = {"training": to_uint8(load_images(item.training, size))}, {}
    for spec in asked:
        images = np.load(results.folder(spec.generate) / "images.npy", mmap_mode="r")
        matches = json.loads((results.folder(spec) / "matches.json").read_text())
        label = plots.ARM_LABELS[spec.generate.arm]
        rows[label] = images[matches["match"]]
        notes[label] = plots.marked(np.array(matches["similarity"]), spec.loose, spec.strict)
    title = f"{item.name}: best matches (* above the loose, ** above the strict threshold)"
    return plots.picture_rows(rows, title, notes=notes)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"fx.demo: {error}")
