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
import math
import os
import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from decimal import ROUND_CEILING, Decimal
from pathlib import Path

import numpy as np
import pandas as pd
from jinja2 import Environment, StrictUndefined
from PIL import Image

from fx import caption_search, checkpoints, command, datasets, kernel, results, settings, tables, verdict
from fx.extraction import Extract, extracted_pictures, extraction_sets
from fx.finetune import TrainingItem
from fx.label_free import SCALES, Signs, choose_scale, signs_of_scales
from fx.leads import Leads, Lookup, gathered
from fx.models import model_folder
from fx.paths import NOTEBOOKS
from fx.publishing import Published, published
from fx.refine import Contrastive
from fx.sampling import Generate, generated_pictures
from fx.settings import Settings
from fx.similarity import descriptor_path
from fx.tuned import Checkpoint
from fx.witnesses import Contrast, Recovery, Resemblance, Witness, scores

NOTEBOOK = NOTEBOOKS / "13-audit.ipynb"
TEMPLATE = Path(__file__).with_suffix(".html.jinja")
LARGEST = 256  # pixels of a side of a picture in the report, which is shown at less
STRONG, SOME = 0.01, 0.05  # p-values of the whole set
RATE = 0.05  # the share of wrong names among those named
FORMS = {"dreambooth": "parts", "lora": "diffusers"}  # of a model that is made for a trial
QUESTIONS = {  # whose error rates fx.error_rates measures: what they are in the report, and the right answer
    "half trained on": ("half of the suspects were trained on; controls of the same kind", "evidence"),
    "half, other controls": ("half of the suspects were trained on; controls of another kind", "evidence"),
    "none trained on": ("others of their kind were trained on, but no suspect; controls of the same kind", "none"),
    "none, other controls": ("others of their kind were trained on, but no suspect; controls of another kind", "none"),
    "another's model": ("images of another kind were trained on; controls of the suspects' kind", "none"),
}
WITNESSES = {
    "loss": "how much better the fine-tuned model denoises the image than its base does",
    "recovery": "how well the difference of the two models restores the image's missing half (CGI-DM)",
    "extraction": "how much more like it the best image extracted from the model is than the best one from its base",
}


@dataclass(frozen=True)
class Audit:
    """What is asked.

    checkpoint: a file, a folder or a Hub id; bases: base models to choose from; caption: None for what the checkpoint says,
    or else what a search of its weights finds, "" for none; suspects, controls: folders of images, "" for none.
    n_training: 0 for what the file says, or an estimate. n_generated: N; recovery_steps: of CGI-DM; refining_steps: of
    fx.refine.Contrastive for each extracted image, 0 for none. scale: w', 0 for the one that fx.label_free.choose_scale
    takes, for which N images are generated with each of its SCALES. trial: how many of the controls a model is fine-tuned on
    here, to see whether such an audit would find them; 0 for none, else at least 2, with as many controls left.
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
    scale: float = 0.0
    trial: int = 0

    def __post_init__(self):
        if not self.checkpoint or not self.bases:
            raise ValueError("name a checkpoint and at least one base model")
        if self.n_generated < 6 or self.recovery_steps < 1 or min(self.n_training, self.refining_steps, self.scale) < 0:
            raise ValueError(
                f"n_generated {self.n_generated} must be at least 6, recovery_steps {self.recovery_steps} at least 1, "
                f"n_training {self.n_training}, refining_steps {self.refining_steps} and scale {self.scale} at least 0"
            )
        if self.n_training > self.n_generated:
            raise ValueError(f"n_training {self.n_training} is more than the {self.n_generated} images to be generated")
        if self.controls and not self.suspects:
            raise ValueError("controls are there to be compared with suspects: name a folder of these too")
        if self.trial and (self.trial < 2 or not self.controls):
            raise ValueError(f"a trial with {self.trial} controls: name a folder of controls, and two of them or more")


@dataclass
class Findings:
    """What was found.

    images: a row per suspect: file, each witness's score and p-value, `p`, and whether it is `named`; p: of the whole set,
    None without controls; auc: of each witness, suspects over controls. extracted: a row per extracted image: its number,
    its clique's size, the mean similarity in it; n_training_by: who says how many there are; scale: w'; scale_by: who says
    so; left_out: a line for each image that could not be used; trial: what an audit finds of a model fine-tuned here on some
    of the controls, None without such a trial.
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
    scale: float = 0.0
    scale_by: str = ""
    trial: "Findings | None" = None
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
    if asked.trial and len(controls) < 2 * asked.trial:
        raise ValueError(f"a trial with {asked.trial} of {len(controls)} controls: at most half of them")
    if asked.trial and (choices := math.comb(len(controls), asked.trial)) < 1 / SOME:
        raise ValueError(
            f"a trial with {asked.trial} of {len(controls)} controls could find nothing, since p is 1/{choices} or more: "
            "name more controls"
        )
    return suspects, controls, lines


# the investigation


@dataclass(frozen=True)
class Prepared:
    """What an audit knows before anything is sampled: the question, what the files say, the model, the images."""

    asked: Audit
    known: Leads
    own: Settings
    model: Checkpoint
    suspects: list[Path]
    controls: list[Path]
    left_out: list[str]

    @property
    def arm(self) -> str:
        """FineXtract; without a caption, model guidance alone."""
        return "finextract" if self.model.caption else "model_guidance"

    def generate(self, own: Settings) -> Generate:
        """N images of the model with the w' of these settings, by direct sampling if that is 1."""
        arm = "direct" if own.finextract_scale == 1 else self.arm
        return own.generate(self.model, arm, self.asked.n_generated, caption=self.model.caption)

    def null(self, n_training: int) -> Extract:
        """The extraction from the base model alone, from the same latents."""
        base = Checkpoint(str(model_folder(self.known.base)), self.known.base, self.model.caption)
        plain = self.own.generate(base, "direct", self.asked.n_generated, caption=self.model.caption)
        return self.own.extract(plain, n_training)

    def witnesses(self, extract: Extract, null: Extract) -> dict[str, Witness]:
        """What is asked about suspects and controls, by witness; "base" is to be taken from "extraction"."""
        images = tuple(map(str, [*self.suspects, *self.controls]))
        caption, steps = self.model.caption, self.asked.recovery_steps
        return {
            "loss": Contrast(self.model, images, caption),
            "recovery": Recovery(self.model, images, caption, steps, judge=self.own.judge),
            "extraction": Resemblance(extract, images),
            "base": Resemblance(null, images),
        }


def prepared(asked: Audit) -> Prepared:
    """Everything that is known before anything is sampled; raises what loading a checkpoint and reading images raises."""
    suspects, controls, lines = suspects_and_controls(asked) if asked.suspects else ([], [], [])
    chosen = settings.load(asked.settings, asked.change)
    known = gathered(Lookup(asked.checkpoint, asked.bases, guess=asked.caption or ""))
    if asked.caption is not None:
        known = replace(known, caption=asked.caption, caption_by="whoever asked")
    elif not known.caption:
        known = read_caption(known)
    if asked.trial and not known.caption:
        raise ValueError("a trial needs a caption to train with, and none is known of the checkpoint: name one")
    return Prepared(asked, known, chosen[known.method], known.checkpoint(), suspects, controls, lines)


def read_caption(known: Leads) -> Leads:
    """The same with the caption that a search of the weights finds, which may be wrong (notebook 07), or why it has none."""
    try:
        searches = caption_search.twice(known.checkpoint())
        results.run(searches, description="caption")
    except RuntimeError as error:  # of the step, whose reason is a ValueError: a change that carries no caption
        if not isinstance(error.__cause__, ValueError):
            raise
        return replace(known, caption_by=f"nobody: {error.__cause__}")
    caption, _ = caption_search.best_of(searches)
    return replace(known, caption=caption, caption_by="a search of its weights, which may be wrong")


def investigate(asked: Audit) -> Findings:
    """Everything that the report says. Each step is kept, so an interrupted audit goes on where it stopped.

    Raises what loading the checkpoint raises, before anything is sampled, and ValueError for images that cannot be used.
    """
    return investigate_all([asked])[0]


def investigate_all(several: Sequence[Audit]) -> list[Findings]:
    """`investigate` for each of several audits, whose steps are done together, on the machines there are."""
    all_ready = [prepared(asked) for asked in several]
    numbers = how_many(all_ready)
    if tried := [spec for ready, (n, _) in zip(all_ready, numbers, strict=True) for spec in scales_to_try(ready, n)]:
        results.run(tried, description="choosing w'")
    scales = [chosen_scale(ready, n) for ready, (n, _) in zip(all_ready, numbers, strict=True)]
    pairs = [
        (extraction(ready, own, n), ready.null(n))
        for ready, own, (n, _) in zip(all_ready, [own for own, _ in scales], numbers, strict=True)
    ]
    results.run([spec for pair in pairs for spec in pair], description="extraction")
    asked_of = [ready.witnesses(*pair) if ready.suspects else {} for ready, pair in zip(all_ready, pairs, strict=True)]
    results.run([spec for witnesses in asked_of for spec in witnesses.values()], description="witnesses")
    found = [_found(*parts) for parts in zip(all_ready, numbers, scales, pairs, asked_of, strict=True)]
    if of_trials := {number: trial_of(ready) for number, ready in enumerate(all_ready) if ready.asked.trial}:
        for number, trial in zip(of_trials, investigate_all(list(of_trials.values())), strict=True):
            found[number].trial = trial
    return found


def trial_of(ready: Prepared) -> Audit:
    """An audit of a model that is fine-tuned now, on some of the controls: would it find what we know is there?

    On the same base with the caption of the audit, whole or by LoRA as the checkpoint, with the settings' rank and steps.
    Every second control is taken, up to `trial`; the others are the controls. It is an easier case than the audit: all its
    suspects were trained on, and caption and number are right.
    """
    asked, taken = ready.asked, ready.controls[: 2 * ready.asked.trial : 2]
    files = {"suspects": taken, "controls": [path for path in ready.controls if path not in taken]}
    named = "".join(f"{path.name} {pixels(path)} " for path in [*taken, *files["controls"]])
    root = results.RUNS / "audit/trials" / hashlib.sha256(named.encode(errors="surrogateescape")).hexdigest()[:16]
    places = {kind: laid_out(root / kind, paths) for kind, paths in files.items()}
    item = TrainingItem(str(places["suspects"]), ready.known.caption)
    model = Published(ready.own.fine_tune(item, base=ready.known.base), FORMS[ready.known.method])
    results.run([model], description="a trial")
    return replace(
        asked,
        checkpoint=str(published(model)),
        bases=(ready.known.base,),
        caption=ready.known.caption,
        suspects=str(places["suspects"]),
        controls=str(places["controls"]),
        n_training=min(len(taken), asked.n_generated),
        trial=0,
    )


def laid_out(place: Path, files: Sequence[Path]) -> Path:
    """The folder `place` with copies of these files and nothing else, made now unless it is that already.

    Of several files of one name the later ones have a number behind it.
    """
    wanted: dict[str, bytes] = {}
    for path in files:
        name, number = path.name, 1
        while name in wanted:
            number += 1
            name = f"{path.stem}-{number}{path.suffix}"
        wanted[name] = path.read_bytes()
    if place.is_dir() and {path.name: path.read_bytes() for path in place.iterdir()} == wanted:
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".", dir=place.parent))
    for name, content in wanted.items():
        (beside / name).write_bytes(content)
    shutil.rmtree(place, ignore_errors=True)
    beside.rename(place)
    return place


def how_many(all_ready: Sequence[Prepared]) -> list[tuple[int, str]]:
    """N0 and who says so, for each: whoever asked, the file, or an estimate from images generated with the usual w'."""
    unknown = {}
    for number, ready in enumerate(all_ready):
        told, most = ready.known.n_training, ready.asked.n_generated
        if not ready.asked.n_training and (told is None or not 1 <= told <= most):
            unknown[number] = ready.own.extract(ready.generate(ready.own), None)
    rows = results.run(unknown.values(), description="how many") if unknown else pd.DataFrame()
    estimates = dict(zip(unknown, rows.n_estimated, strict=True)) if unknown else {}
    found = []
    for number, ready in enumerate(all_ready):
        told, most = ready.known.n_training, ready.asked.n_generated
        if number in estimates:
            doubt = "" if told is None else f" (its header says {told}, {most} images were generated)"
            found.append((max(1, int(estimates[number])), f"an estimate{doubt}"))
        elif ready.asked.n_training:
            found.append((ready.asked.n_training, "whoever asked"))
        else:
            found.append((told, ready.known.n_training_by))
    return found


def scales_to_try(ready: Prepared, n_training: int) -> list[Signs]:
    """What `chosen_scale` is decided by; nothing where whoever asked has named w'."""
    if ready.asked.scale:
        return []
    arm, caption = ready.arm, ready.model.caption
    return list(
        signs_of_scales(ready.own, ready.model, n_training, ready.asked.n_generated, arm=arm, caption=caption).values()
    )


def chosen_scale(ready: Prepared, n_training: int) -> tuple[Settings, str]:
    """The settings with the w' of the extraction, and who says so: whoever asked, or the models (fx.label_free)."""
    if ready.asked.scale:
        return replace(ready.own, finextract_scale=ready.asked.scale), "whoever asked"
    arm, caption = ready.arm, ready.model.caption
    own, rows = choose_scale(ready.own, ready.model, n_training, ready.asked.n_generated, arm=arm, caption=caption)
    return own, f"what the two models say of the images extracted with {', '.join(f'{w:g}' for w in rows.w)}"


def extraction(ready: Prepared, own: Settings, n_training: int) -> Extract:
    """The extraction from the model with these settings, refined.

    Refining goes down what the two models say differently, so of the base alone it would change nothing.
    """
    how = Contrastive(ready.asked.refining_steps) if ready.asked.refining_steps else None
    return replace(own.extract(ready.generate(own), n_training), refine=how)


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


def _found(
    ready: Prepared,
    number: tuple[int, str],
    scale: tuple[Settings, str],
    pair: tuple[Extract, Extract],
    witnesses: dict[str, Witness],
) -> Findings:
    """What the finished steps of an audit say."""
    extract, null = pair
    (n_training, by), (own, scale_by) = number, scale
    found = Findings(
        ready.asked, ready.known, n_training, *_extracted(extract), n_training_by=by, left_out=ready.left_out
    )
    found.scale, found.scale_by = own.finextract_scale, scale_by
    found.of_the_base = generated_pictures(null.generate, found.extracted.image.tolist())
    if witnesses:
        _compare(found, ready, witnesses)
    found.hashes = {"checkpoint": results.sha256_of(checkpoints.find(ready.asked.checkpoint))}
    found.hashes |= {"base model": results.sha256_of(model_folder(ready.known.base))}
    found.hashes |= {path.name: results.sha256_of(path) for path in ready.suspects}
    found.hashes |= {f"control {path.name}": results.sha256_of(path) for path in ready.controls}
    return found


def _compare(found: Findings, ready: Prepared, witnesses: dict[str, Witness]) -> None:
    """What the witnesses say about suspects and controls, weighed."""
    said = {name: scores(spec) for name, spec in witnesses.items()}
    said["extraction"] = said["extraction"] - said.pop("base")
    n = len(ready.suspects)
    found.images = pd.DataFrame({"file": [path.name for path in ready.suspects]} | {w: said[w][:n] for w in WITNESSES})
    found.controls = pd.DataFrame(
        {"file": [path.name for path in ready.controls]} | {w: said[w][n:] for w in WITNESSES}
    )
    nearest = np.load(results.folder(witnesses["extraction"]) / "nearest.npy")[:n]
    shown = dict(zip(found.extracted.image, found.pictures, strict=True))
    found.nearest = np.stack([shown[number] for number in nearest.tolist()])
    if ready.controls:
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
        return answer + "That is no evidence that it was not." + _of_the_trial(found)
    if named:
        return answer + f"{named} of them are named, of which about {RATE:.0%} may be wrong."
    share = verdict.smallest_set(RATE, m)
    why = (
        f"with {m} controls no single image can be, however clear it is"
        if share > 100
        else f"with {m} controls at least {share}% of them would have to stand out"
    )
    return answer + f"Which of them, cannot be said: {why}."


def _of_the_trial(found: Findings) -> str:
    """What a trial says of finding nothing; "" without one."""
    if found.trial is None:
        return ""
    n, word, p = len(found.trial.images), evidence(found.trial), rounded_up(found.trial.p)
    asked = f" A model trained here on {n} of the controls was audited for comparison, an easier case: "
    if word == "none":
        return asked + f"no evidence was found that it was trained on these (p = {p}), so this audit may be too weak."
    return asked + f"{word} evidence was found that it was trained on these (p = {p})."


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
        "scale": f"{found.scale:g}",
        "scale_by": found.scale_by,
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
        "rates": measured_rates(),
        "can_be_tried": trial_for(len(found.controls)),
        "trial": found.trial
        and {
            "n": len(found.trial.images),
            "controls": len(found.trial.controls),
            "p": rounded_up(found.trial.p),
            "evidence": evidence(found.trial),
            "auc": found.trial.auc,
        },
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "figures": in_figures,
    }


def measured_rates() -> list[dict[str, object]]:
    """The error rates that notebook 15 measured, a row per question; none where its complete run is not there.

    Those of DreamBooth with the usual steps, one model for each item, so that the audits of a row are independent.
    """
    table = tables.complete("nb15-rates")
    if isinstance(table, str):
        return []
    rows = table[(table.method == "dreambooth") & (table.length == 1)].set_index("question").loc[list(QUESTIONS)]
    told = zip(rows.reset_index().to_dict("records"), QUESTIONS.values(), strict=True)
    return [row | {"words": words, "right": right} for row, (words, right) in told]


def trial_for(controls: int) -> int:
    """With how many of so many controls a trial can be made, five at most; 0 if with none."""
    possible = [k for k in range(2, 6) if controls >= 2 * k and math.comb(controls, k) >= 1 / SOME]
    return max(possible, default=0)


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
    parser.add_argument(
        "--caption",
        help='what it was trained with; "" for none; without: what the checkpoint says, or else what a search of its '
        "weights finds (some minutes)",
    )
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
        "--scale",
        type=float,
        default=0,
        metavar="W",
        help="w' of the extraction (default: one of "
        f"{', '.join(f'{w:g}' for w in SCALES)}, by what the two models say of the images extracted with each)",
    )
    parser.add_argument(
        "--trial",
        type=int,
        default=0,
        metavar="K",
        help="fine-tune a model on K of the controls and audit it too, to see whether anything could be found "
        "(default 0: none; more than twice the time; copies of the controls and that model stay in the work area)",
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
    import papermill  # seconds that notebooks which import this module do not need

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
        "guidance_scale": given.scale,
        "trial": given.trial,
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
        given.scale,
        given.trial,
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
