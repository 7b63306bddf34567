"""Was this model trained on these images? One checkpoint in, an evidence report out (notebook 13).

    asked = Audit("downloads/artist.safetensors", suspects="my/works", controls="my/unpublished")
    found = investigate(asked)
    print(sentence(found))
    write_report(found, "report.html")

    python -m fx.audit downloads/artist.safetensors --base owner/name --suspects my/works --controls my/unpublished

What an answer means is in docs/auditors.md: evidence with stated error rates, never proof, and never proof of the contrary.
"""

import argparse
import base64
import builtins
import hashlib
import io
import json
import os
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from decimal import ROUND_CEILING, Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import papermill
from jinja2 import Environment, StrictUndefined
from PIL import Image

from fx import checkpoints, command, datasets, kernel, results, settings, verdict
from fx.extraction import Extract, extracted_pictures, extraction_sets
from fx.leads import Leads, Lookup, gathered
from fx.models import model_folder
from fx.paths import NOTEBOOKS
from fx.refine import Contrastive
from fx.sampling import generated_pictures
from fx.settings import Settings
from fx.similarity import descriptor_path
from fx.tuned import Checkpoint
from fx.witnesses import Contrast, Recovery, Resemblance, scores

NOTEBOOK = NOTEBOOKS / "13-audit.ipynb"
TEMPLATE = Path(__file__).with_suffix(".html.jinja")
LARGEST = 256  # pixels of a side of a picture in the report, which is shown at less
STRONG, SOME = 0.01, 0.05  # p-values of the whole set
RATE = 0.05  # the share of wrong names among those named
WITNESSES = {
    "loss": "how much better the fine-tuned model denoises the image than its base does",
    "recovery": "how well the difference of the two models restores the image's missing half (CGI-DM)",
    "extraction": "how much more like it the best image extracted from the model is than the best one from its base",
}


@dataclass(frozen=True)
class Audit:
    """What is asked.

    checkpoint: a file, a folder or a Hub id; bases: base models to choose from; caption: None for what the checkpoint says,
    "" for none; suspects, controls: folders of images, "" for none. n_training: 0 for what the file says, or an estimate.
    n_generated: N; recovery_steps: of CGI-DM; refining_steps: of fx.refine.Contrastive for each extracted image, 0 for none.
    """

    checkpoint: str
    bases: tuple[str, ...] = ("mini-sd",)
    caption: str | None = None
    suspects: str = ""
    controls: str = ""
    n_training: int = 0
    n_generated: int = 100
    recovery_steps: int = 100
    refining_steps: int = 50
    settings: str = "mini-sd"
    change: str = ""

    def __post_init__(self):
        if not self.checkpoint or not self.bases:
            raise ValueError("name a checkpoint and at least one base model")
        if self.n_generated < 6 or self.recovery_steps < 1 or min(self.n_training, self.refining_steps) < 0:
            raise ValueError(
                f"n_generated {self.n_generated} must be at least 6, recovery_steps {self.recovery_steps} at least 1, "
                f"n_training {self.n_training} and refining_steps {self.refining_steps} at least 0"
            )
        if self.n_training > self.n_generated:
            raise ValueError(f"n_training {self.n_training} is more than the {self.n_generated} images to be generated")
        if self.controls and not self.suspects:
            raise ValueError("controls are there to be compared with suspects: name a folder of these too")


@dataclass
class Findings:
    """What was found.

    images: a row per suspect: file, each witness's score and p-value, `p`, and whether it is `named`; p: of the whole set,
    None without controls; auc: of each witness, suspects over controls. extracted: a row per extracted image: its number,
    its clique's size, the mean similarity in it; n_training_by: who says how many there are; left_out: a line for each image
    that could not be used.
    """

    asked: Audit
    known: Leads
    n_training: int
    extracted: pd.DataFrame
    pictures: np.ndarray
    of_the_base: np.ndarray
    images: pd.DataFrame = field(default_factory=pd.DataFrame)
    controls: pd.DataFrame = field(default_factory=pd.DataFrame)
    p: float | None = None
    auc: dict[str, float] = field(default_factory=dict)
    nearest: np.ndarray | None = None
    n_training_by: str = ""
    left_out: list[str] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)


# images


def usable(folder: str) -> tuple[list[Path], list[str]]:
    """The images in a folder that can be used, by name, and a line for each picture that cannot and why.

    Two files with the same pixels count once. FileNotFoundError for no folder, ValueError if nothing in it can be used.
    """
    place = expanded(folder)
    if not place.is_dir():
        raise FileNotFoundError(f"no folder {folder}: name one that holds images")
    found, lines, seen = [], [], {}
    for path in sorted(path for path in place.iterdir() if not path.name.startswith(".")):
        if path.is_dir():
            if any(file.suffix.lower() in datasets.SUFFIXES for file in path.rglob("*")):
                lines.append(f"{path.name}/ is left out: images in folders of the folder are not looked at")
        elif reason := datasets.unusable(path):
            lines.append(f"{path.name} is left out: it {reason}")
        elif path.suffix.lower() in datasets.SUFFIXES:
            try:
                key = pixels(path)
            except ValueError as error:
                lines.append(f"{path.name} is left out: {error}")
                continue
            if key in seen:
                lines.append(f"{path.name} is left out: the same picture as {seen[key]}")
            else:
                seen[key] = path.name
                found.append(path)
    if not found:
        raise ValueError("\n".join([f"no image in {folder} can be used", *lines]))
    return found, lines


def pixels(path: Path) -> str:
    """The SHA-256 of an image's pixels, whatever its file format; ValueError if it cannot be read."""
    image = datasets.open_image(path)
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


def suspects_and_controls(asked: Audit) -> tuple[list[Path], list[Path], list[str]]:
    """The usable suspects and controls; a control that is also a suspect is left out. ValueError if no control is left."""
    suspects, lines = usable(asked.suspects)
    if not asked.controls:
        return suspects, [], lines
    controls, more = usable(asked.controls)
    known = {pixels(path) for path in suspects}
    double = [path for path in controls if pixels(path) in known]
    lines += more + [f"{path.name} among the controls is left out: it is also a suspect" for path in double]
    controls = [path for path in controls if path not in double]
    if not controls:
        raise ValueError("every control is also a suspect: controls must be images that were certainly not trained on")
    return suspects, controls, lines


# the investigation


def investigate(asked: Audit) -> Findings:
    """Everything that the report says. Each step is kept, so an interrupted audit goes on where it stopped.

    Raises what loading the checkpoint raises, before anything is sampled, and ValueError for images that cannot be used.
    """
    suspects, controls, lines = suspects_and_controls(asked) if asked.suspects else ([], [], [])
    chosen = settings.load(asked.settings, asked.change)
    known = gathered(Lookup(asked.checkpoint, asked.bases, guess=asked.caption or ""))
    own = chosen[known.method]
    model = Checkpoint(asked.checkpoint, known.base, known.caption if asked.caption is None else asked.caption)
    extract, null, n_training, by = extractions(asked, own, model, known)
    found = Findings(asked, known, n_training, *_extracted(extract), n_training_by=by, left_out=lines)
    found.of_the_base = generated_pictures(null.generate, found.extracted.image.tolist())
    if suspects:
        _compare(found, own, model, extract, null, suspects, controls)
    found.hashes = {"checkpoint": results.sha256_of(checkpoints.find(asked.checkpoint))}
    found.hashes |= {"base model": results.sha256_of(model_folder(known.base))}
    found.hashes |= {path.name: results.sha256_of(path) for path in suspects}
    found.hashes |= {f"control {path.name}": results.sha256_of(path) for path in controls}
    return found


def extractions(asked: Audit, own: Settings, model: Checkpoint, known: Leads) -> tuple[Extract, Extract, int, str]:
    """The extraction from the model, refined; that from its base alone and from the same latents, N0, and who says so.

    Refining goes down what the two models say differently, so of the base alone it would change nothing.
    """
    arm = "finextract" if model.caption else "model_guidance"
    generate = own.generate(model, arm, asked.n_generated, caption=model.caption)
    n_training, by = asked.n_training, "whoever asked"
    if not n_training and known.n_training is not None and 1 <= known.n_training <= asked.n_generated:
        n_training, by = known.n_training, known.n_training_by
    elif not n_training:
        row = results.run([own.extract(generate, None)], description="how many").iloc[0]
        n_training, by = max(1, int(row.n_estimated)), "an estimate"
        if known.n_training is not None:
            by += f" (its header says {known.n_training}, {asked.n_generated} images were generated)"
    base = Checkpoint(str(model_folder(known.base)), known.base, model.caption)
    plain = own.generate(base, "direct", asked.n_generated, caption=model.caption)
    how = Contrastive(asked.refining_steps) if asked.refining_steps else None
    specs = [replace(own.extract(generate, n_training), refine=how), own.extract(plain, n_training)]
    results.run(specs, description="extraction")
    return *specs, n_training, by


def _extracted(extract: Extract) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """Extracted images, those of the largest and tightest cliques first, and their pictures (twice, to be replaced)."""
    folder = results.folder(extract)
    sets, found = extraction_sets(folder), np.load(folder / "descriptors.npy")
    rows = []
    for clique, centre in zip(sets["cliques"], sets["centres"], strict=True):
        others = [image for image in clique if image != centre]
        tight = float((found[others] @ found[centre]).mean()) if others else np.nan
        rows.append({"image": centre, "clique": len(clique), "similarity": tight})
    table = pd.DataFrame(rows).sort_values(["clique", "similarity"], ascending=False)
    pictures = extracted_pictures(extract)[table.index]
    return table.reset_index(drop=True), pictures, pictures


def _compare(
    found: Findings,
    own: Settings,
    model: Checkpoint,
    extract: Extract,
    null: Extract,
    suspects: list[Path],
    controls: list[Path],
) -> None:
    """Ask the witnesses about suspects and controls, and weigh what they say."""
    images = tuple(map(str, [*suspects, *controls]))
    asked = {
        "loss": Contrast(model, images, model.caption),
        "recovery": Recovery(model, images, model.caption, found.asked.recovery_steps, judge=own.judge),
        "extraction": Resemblance(extract, images),
        "base": Resemblance(null, images),
    }
    results.run(asked.values(), description="witnesses")
    said = {name: scores(spec) for name, spec in asked.items()}
    said["extraction"] = said["extraction"] - said.pop("base")
    n = len(suspects)
    found.images = pd.DataFrame({"file": [path.name for path in suspects]} | {w: said[w][:n] for w in WITNESSES})
    found.controls = pd.DataFrame({"file": [path.name for path in controls]} | {w: said[w][n:] for w in WITNESSES})
    nearest = np.load(results.folder(asked["extraction"]) / "nearest.npy")[:n]
    shown = dict(zip(found.extracted.image, found.pictures, strict=True))
    found.nearest = np.stack([shown[number] for number in nearest.tolist()])
    if controls:
        weigh(found)


def weigh(found: Findings) -> None:
    """p-values of every suspect and of the set, from the scores of suspects and controls."""
    ours, theirs = (table[list(WITNESSES)].to_numpy() for table in (found.images, found.controls))
    for column, name in enumerate(WITNESSES):
        found.images[f"p ({name})"] = verdict.p_values(ours[:, column], theirs[:, column])
        found.auc[name] = verdict.auc(ours[:, column], theirs[:, column])
    found.images["p"] = verdict.combined(ours, theirs)
    found.p = verdict.of_the_set(ours, theirs)
    found.images["named"] = (found.p <= SOME) & verdict.discoveries(found.images.p.to_numpy(), RATE)


# what it says


def evidence(found: Findings) -> str:
    """In a word: "strong", "some", "none", or "not tested" without suspects or without controls."""
    if found.p is None:
        return "not tested"
    return "strong" if found.p <= STRONG else "some" if found.p <= SOME else "none"


def sentence(found: Findings) -> str:
    """The answer in one or two sentences, which never says more than the tests do."""
    n, m = len(found.images), len(found.controls)
    if not n:
        return (
            f"{len(found.extracted)} images were extracted from the model. Whether it was trained on any particular image "
            "was not asked: no images were named."
        )
    if found.p is None:
        return (
            f"No error rate can be stated for the {n} images, since there are no controls: images of the same kind that "
            "were certainly not trained on. The scores below cannot tell images that were trained on from images that are "
            "merely alike."
        )
    kind = {"strong": "There is strong evidence", "some": "There is some evidence", "none": "No evidence was found"}
    answer = (
        f"{kind[evidence(found)]} that the model was trained on some of the {n} images (p = {rounded_up(found.p)}: a set "
        f"that it was not trained on gives a value as low in at most {rounded_up(100 * found.p)}% of cases). "
    )
    named = int(found.images.named.sum())
    if evidence(found) == "none":
        return answer + "That is no evidence that it was not."
    if named:
        return answer + f"{named} of them are named, of which about {RATE:.0%} may be wrong."
    share = verdict.smallest_set(RATE, m)
    why = (
        f"with {m} controls no single image can be, however clear it is"
        if share > 100
        else f"with {m} controls at least {share}% of them would have to stand out"
    )
    return answer + f"Which of them, cannot be said: {why}."


def in_figures(value: float) -> str:
    """A number with two significant figures, without an exponent."""
    return np.format_float_positional(value, precision=2, fractional=False, trim="-")


def rounded_up(value: float) -> str:
    """The same, never below the number: of a rate that something is to be at most."""
    exact = Decimal(f"{value:.12g}")
    unit = Decimal(1).scaleb(exact.adjusted() - 1)
    return in_figures(float(exact.quantize(unit, ROUND_CEILING))) if exact else "0"


def as_png(picture: np.ndarray) -> str:
    """A picture uint8 [h, w, 3] as a data URL, no side longer than LARGEST."""
    image = Image.fromarray(picture)
    image.thumbnail((LARGEST, LARGEST))
    image.save(file := io.BytesIO(), "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def write_report(found: Findings, path: str | Path) -> Path:
    """The report as one HTML page with its pictures inside, which asks nothing of the network."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text("utf-8"))
    page = template.render(contents(found))
    Path(path).write_text(page, encoding="utf-8", errors="replace")  # a file's name may be no text
    return Path(path)


def contents(found: Findings, most: int = 24) -> Mapping[str, object]:
    """What the page shows: texts, tables as lists of rows, pictures as data URLs; of extracted images `most` at most."""
    suspects = {path.name: path for path in usable(found.asked.suspects)[0]} if found.asked.suspects else {}
    side = found.pictures.shape[1]
    rows = []
    for number, row in enumerate(found.images.to_dict("records")):
        own = datasets.to_uint8(datasets.load_images((suspects[row["file"]],), side))[0]
        rows.append(row | {"picture": as_png(own), "nearest": as_png(found.nearest[number])})
    order = sorted(rows, key=lambda row: row.get("p", 0))
    extracted = [
        row | {"picture": as_png(picture), "base": as_png(base)}
        for row, picture, base in zip(
            found.extracted.to_dict("records"), found.pictures, found.of_the_base, strict=True
        )
    ]
    return {
        "sentence": sentence(found),
        "evidence": evidence(found),
        "known": found.known,
        "asked": found.asked,
        "n_training": found.n_training,
        "n_training_by": found.n_training_by,
        "witnesses": WITNESSES,
        "suspects": order,
        "n_controls": len(found.controls),
        "auc": found.auc,
        "floor": in_figures(1 / (len(found.controls) + 1)) if len(found.controls) else "",
        "extracted": extracted[:most],
        "more": max(0, len(extracted) - most),
        "left_out": found.left_out,
        "hashes": found.hashes,
        "versions": results.environment_summary(),
        "strips": {name: strip(found, name) for name in WITNESSES} if found.p is not None else {},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "figures": in_figures,
    }


def strip(found: Findings, witness: str, width: int = 560) -> dict[str, list[float]]:
    """Where suspects and controls lie on a line of `width`, from the lowest to the highest score of a witness."""
    ours, theirs = found.images[witness].to_numpy(), found.controls[witness].to_numpy()
    low, high = min(ours.min(), theirs.min()), max(ours.max(), theirs.max())
    unit = width / max(high - low, 1e-12)
    return {
        name: ((values - low) * unit).round(1).tolist() for name, values in (("suspects", ours), ("controls", theirs))
    }


# the command

SUFFIXES = (".html", ".json", ".ipynb")  # of what an audit leaves: the page, the answer for scripts, the notebook
FOUND = 10  # the exit code where there is evidence


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("python -m fx.audit", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "checkpoint", nargs="?", default="", help="a file, a folder or a Hub id; without it: an example"
    )
    parser.add_argument(
        "--base",
        nargs="+",
        default=["mini-sd"],
        metavar="MODEL",
        help="base models to choose from (default mini-sd, this repository's small model of drawings)",
    )
    parser.add_argument("--caption", help='what it was trained with; "" for none; without: what the checkpoint says')
    parser.add_argument("--suspects", default="", metavar="FOLDER", help="images that it may have been trained on")
    parser.add_argument(
        "--controls", default="", metavar="FOLDER", help="images of the same kind that it was not trained on"
    )
    parser.add_argument("--n-training", type=int, default=0, metavar="N0", help="training images, if you know how many")
    parser.add_argument("--images", type=int, default=60, metavar="N", help="images to generate (default 60)")
    parser.add_argument("--recovery-steps", type=int, default=40, help="of CGI-DM (default 40; its authors: 1,000)")
    parser.add_argument(
        "--refining-steps",
        type=int,
        default=50,
        help="that make an extracted image more like what it is a copy of (default 50, as many evaluations as 15 images "
        "generated in ten steps; 0 for none; notebook 14)",
    )
    parser.add_argument(
        "--settings",
        default="mini-sd",
        help="a section of fx/settings.yaml (default mini-sd, for small models; for real ones paper, paper-sdxl, paper-alt)",
    )
    parser.add_argument(
        "--change",
        default="",
        help="settings to change: 'sampling_steps=25 precision=bfloat16' (of sampling: witnesses compute in float32)",
    )
    parser.add_argument(
        "--report", default="audit.html", metavar="FILE", help="where the report goes (default audit.html)"
    )
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    """Run notebook 13 on what was named; 0, or FOUND where there is evidence that images were trained on."""
    given = arguments(words)
    check(given)
    report = expanded(given.report).absolute()
    part = report.parent / f".{report.stem}.part"  # until all of it is there
    part.mkdir(exist_ok=True)
    values = {
        "checkpoint": str(absolute(given.checkpoint)),
        "bases": shlex.join(str(absolute(base)) for base in given.base),
        "caption": "?" if given.caption is None else given.caption,
        "suspects": str(absolute(given.suspects)),
        "controls": str(absolute(given.controls)),
        "n_training": given.n_training,
        "n_generated": given.images,
        "recovery_steps": given.recovery_steps,
        "refining_steps": given.refining_steps,
        "settings_name": given.settings,
        "change": given.change,
        "report": str(part / report.name),
    }
    executed = part / f"{report.stem}.ipynb"
    try:
        with kernel.own():
            papermill.execute_notebook(
                NOTEBOOK, executed, values, cwd=str(NOTEBOOKS), log_output=False, **kernel.OPTIONS
            )
    except papermill.exceptions.PapermillExecutionError as error:
        known = vars(builtins) | {"JSONDecodeError": json.JSONDecodeError}
        if issubclass(known.get(error.ename, object), (ValueError, OSError)):  # wrong input, said in one line
            shutil.rmtree(part)
            raise ValueError(error.evalue) from None
        raise
    for suffix in reversed(SUFFIXES):
        os.replace(part / f"{report.stem}{suffix}", report.with_suffix(suffix))
    shutil.rmtree(part)
    answer = json.loads(report.with_suffix(".json").read_text("utf-8"))
    print("\n".join([answer["sentence"], f"report: {report}", f"notebook: {report.with_suffix('.ipynb')}"]))
    return FOUND if answer["evidence"] in ("some", "strong") else 0


def check(given: argparse.Namespace) -> None:
    """What can be said against the input before anything is loaded: ValueError or FileNotFoundError."""
    check_report(given.report)
    for own in settings.load(given.settings, given.change).values():
        descriptor_path(own.descriptor)
    for base in given.base:
        model_folder(base)
    if not given.checkpoint:
        if given.suspects or given.controls:
            raise ValueError("suspects and controls belong to a checkpoint: name it too")
        return
    asked = Audit(
        given.checkpoint,
        tuple(given.base),
        given.caption,
        given.suspects,
        given.controls,
        given.n_training,
        given.images,
        given.recovery_steps,
        given.refining_steps,
        given.settings,
        given.change,
    )
    checkpoints.kind_of(checkpoints.find(asked.checkpoint))
    if asked.suspects:
        suspects_and_controls(asked)


def check_report(name: str) -> None:
    """ValueError or FileNotFoundError for a report that could not be written, or would take another's place."""
    path = expanded(name).absolute()
    if path.suffix != ".html":
        raise ValueError(
            f"--report {name} must end in .html: the notebook and the answer for scripts are written beside it"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {expanded(name).parent} for the report: make it first")
    for other in map(path.with_suffix, SUFFIXES):
        if other.exists():
            raise ValueError(f"{other} is there already and is not overwritten: move it, or name another by --report")


def expanded(name: str) -> Path:
    """A path with the home folder for ~; a name as it stands where there is no such home."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def absolute(name: str) -> str | Path:
    """A path as it is from anywhere; what is no path, a Hub id or a shipped name, as it stands."""
    path = expanded(name)
    return path.absolute() if name and path.exists() else name


if __name__ == "__main__":
    command.run("fx.audit", main)
