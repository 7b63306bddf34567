"""What an evaluator adds who has the training images: the scores of Sec. 3.2 beside controls, and quality (App. I)."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from torch import nn

from fx import metrics, quality, results
from fx.datasets import Item, from_uint8, load_images, load_item, open_image, to_uint8
from fx.extraction import Extract, extracted_descriptors, extracted_pictures, extraction_sets
from fx.families import image_size, round_trip
from fx.finetune import TrainingItem, load_training
from fx.models import ModelPair, load_pipeline, model_folder
from fx.sampling import Generate, generated_pictures, picture_file, prompt, sample
from fx.similarity import copy_thresholds, describe, descriptor_path, descriptors, load_descriptor
from fx.tuned import Tuned, load_tuned, own_training


@dataclass(frozen=True)
class Score:
    """How to score what was extracted.

    training: the images to score against; () for those that the model is known to be fine-tuned on (of a Checkpoint none
    are known: name them). controls: a folder of images of the same kind that were never trained on; "" for those that
    the training items bring along. strict, loose: the thresholds tau of A-ESR; None for the descriptor's own. judge: a
    second network that measures AS, since the descriptor has chosen what is scored (fx.quality.load_judge); "" for none.
    """

    VERSION: ClassVar[int] = 3

    extract: Extract
    training: tuple[TrainingItem, ...] = ()
    controls: str = ""
    strict: float | None = None
    loose: float | None = None
    judge: str = "mini-clip"

    def __post_init__(self):
        for threshold in (self.strict, self.loose):
            if threshold is not None:
                metrics.check_threshold(threshold)


REFERENCES = ("controls", "round trip")


@dataclass(frozen=True)
class Reference:
    """What the scores of a Score are worth: the same for images that no attack has extracted.

    of: "controls", never-trained images of the same kind in the place of the extracted ones, as many as there are training
    images or as there are: what a score says where nothing was learned. "round trip", the training images after the
    autoencoder of `base`: the highest that extraction can reach, since every generated image comes out of it. The other
    fields are those of Extract and Score.
    """

    VERSION: ClassVar[int] = 1

    of: str
    training: tuple[TrainingItem, ...]
    base: str = "mini-sd"
    descriptor: str = "mini-sscd"
    preset: str = "sscd"
    controls: str = ""
    strict: float | None = None
    loose: float | None = None
    judge: str = "mini-clip"

    def __post_init__(self):
        if self.of not in REFERENCES:
            raise ValueError(f"unknown reference {self.of!r}: choose from {', '.join(REFERENCES)}")
        if not self.training:
            raise ValueError("training is empty: name the training items to compare with")
        for threshold in (self.strict, self.loose):
            if threshold is not None:
                metrics.check_threshold(threshold)


@dataclass(frozen=True)
class Quality:
    """How good generated images are, and how much like the training images (Tables 8 to 10).

    training: as in Score. iqa_judge, fidelity_judge: the networks for CLIP-IQA and for fidelity (fx.quality.load_judge).
    """

    VERSION: ClassVar[int] = 1

    generate: Generate
    training: tuple[TrainingItem, ...] = ()
    iqa_judge: str = "mini-clip"
    fidelity_judge: str = "mini-clip"


def scored_images(spec: Score | Reference) -> tuple[list[Path], list[Path]]:
    """The training images and the controls of a Score or a Reference; ValueError where no training images are known."""
    items = (
        [load_training(part) for part in spec.training]
        if isinstance(spec, Reference)
        else known_items(spec.training, spec.extract.generate.model)
    )
    training = [path for item in items for path in item.training]
    if spec.controls:
        return training, list(load_item(spec.controls, "controls").training)
    return training, [path for item in items for path in item.controls]


def known_items(training: tuple[TrainingItem, ...], model: Tuned) -> list[Item]:
    """The items to compare with, those named or else those a model was fine-tuned on; ValueError if there are none."""
    parts = training or own_training(model)
    if not parts:
        raise ValueError(f"what {model} was trained on is not known: name the training items to compare with")
    return [load_training(part) for part in parts]


def thresholds(spec: Score | Reference) -> tuple[float, float]:
    """The loose and the strict threshold tau of A-ESR."""
    loose, strict = spec.loose, spec.strict
    if loose is None or strict is None:
        known = copy_thresholds(spec.descriptor if isinstance(spec, Reference) else spec.extract.descriptor)
        loose, strict = (known[0] if loose is None else loose), (known[1] if strict is None else strict)
    return loose, strict


def _images_and_judge(spec: Score | Reference) -> dict[str, str]:
    training, controls = scored_images(spec)
    thresholds(spec)
    named = {f"image {number}": results.sha256_of(path) for number, path in enumerate(training)}
    named |= {f"control {number}": results.sha256_of(path) for number, path in enumerate(controls)}
    return named | ({"judge": results.sha256_of(quality.checked(spec.judge))} if spec.judge else {})


@results.inputs.register
def _(spec: Score) -> dict[str, str]:
    return _images_and_judge(spec)


@results.inputs.register
def _(spec: Reference) -> dict[str, str]:
    named = _images_and_judge(spec)
    if spec.of == "controls" and not any(name.startswith("control") for name in named):
        raise ValueError(f"{spec.training} bring no controls along: name a folder of never-trained images as controls")
    files = {
        "descriptor": descriptor_path(spec.descriptor)[0],
        "base": model_folder(spec.base),
    }  # the base has the size
    return named | {name: results.sha256_of(path) for name, path in files.items()}


@results.perform.register
def _(spec: Score, folder: Path) -> None:
    """Write scores.json and matches.json.

    scores.json: those of the extraction and of `compare`; AS_all, as if every generated image were extracted, which no rule
    can surpass without refining; AS_random, the AS to be expected if as many images were drawn at random. matches.json: per
    training image its match among the extracted images, as the number of the generated image that it is or was made of; and
    per training image and per control the similarity to its match.
    """
    extracted_in = results.complete(spec.extract)
    generated, centres = np.load(extracted_in / "descriptors.npy"), extraction_sets(extracted_in)["centres"]
    side = image_side(spec)
    network = load_descriptor(spec.extract.descriptor, spec.extract.preset)
    found = View(extracted_pictures(spec.extract), extracted_descriptors(spec.extract))
    training, controls = (View.of(paths, side, network) if paths else None for paths in scored_images(spec))
    scores = json.loads((extracted_in / results.SCORES).read_text()) | compare(spec, training, found, controls)
    scores |= {
        "AS_all": metrics.average_similarity(training.described, generated),
        "AS_random": metrics.random_choice_similarity(training.described, generated, len(centres)),
        "n_scored": len(training.pictures),
    }
    chosen = np.array(centres)[(training.described @ found.described.T).argmax(axis=1)]
    matches = {"match": chosen.tolist(), "similarity": metrics.best_match(training.described, found.described).tolist()}
    if controls is not None:
        matches["control_similarity"] = metrics.best_match(controls.described, found.described).tolist()
    (folder / results.SCORES).write_text(json.dumps(scores))
    (folder / "matches.json").write_text(json.dumps(matches))


@results.perform.register
def _(spec: Reference, folder: Path) -> None:
    """Write scores.json: those of `compare`, and how many images stand in the place of the extracted ones."""
    base = load_pipeline(spec.base)
    side = image_size(base)
    network = load_descriptor(spec.descriptor, spec.preset)
    paths, controls = scored_images(spec)
    training = View.of(paths, side, network)
    if spec.of == "controls":
        instead = View.of(controls[: len(paths)], side, network)
    else:
        images = round_trip(base.vae, from_uint8(training.pictures))
        instead = View(to_uint8(images), descriptors(network, images))
    scores = {name: value for name, value in compare(spec, training, instead, None).items() if "controls" not in name}
    scores |= {"n_scored": len(training.pictures), "n_extracted": len(instead.pictures)}
    (folder / results.SCORES).write_text(json.dumps(scores))


@dataclass(frozen=True)
class View:
    """Images as two measures see them: pictures uint8 [n, h, w, 3] and copy-detection descriptors [n, d]."""

    pictures: np.ndarray
    described: np.ndarray

    @classmethod
    def of(cls, paths: list[Path], side: int, network: nn.Module, batch_size: int = 64) -> "View":
        """Image files as squares of `side` pixels."""
        parts = [tuple(paths[first : first + batch_size]) for first in range(0, len(paths), batch_size)]
        pictures = np.concatenate([to_uint8(load_images(part, side)) for part in parts])
        return cls(pictures, describe(network, paths, side))


def compare(spec: Score | Reference, training: View, extracted: View, controls: View | None) -> dict[str, float | None]:
    """The scores of Eq. 1 and 2 with what they have to be held against.

    AS, A-ESR_strict, A-ESR_loose; the same `_one_to_one`, where each extracted image counts for one training image only;
    `_controls`, where images of the same kind that were never trained on stand for the training images (None without any).
    And measures that did not choose: "AS (judge)", by the judge's features, and PSNR, the mean over training images of the
    highest with an extracted image in dB; both `_controls` too.
    """
    loose, strict = thresholds(spec)
    scores: dict[str, float | None] = {}
    for suffix, view, once in (("", training, False), ("_one_to_one", training, True), ("_controls", controls, False)):
        pair = None if view is None else (view.described, extracted.described)
        scores[f"AS{suffix}"] = pair and metrics.average_similarity(*pair, one_to_one=once)
        for name, tau in (("strict", strict), ("loose", loose)):
            scores[f"A-ESR_{name}{suffix}"] = pair and metrics.extraction_success_rate(*pair, tau, one_to_one=once)
    judge = quality.load_judge(spec.judge) if spec.judge else None
    seen = judge and quality.features(judge, extracted.pictures)
    for suffix, view in (("", training), ("_controls", controls)):
        scores[f"PSNR{suffix}"] = view and float(metrics.psnr(view.pictures, extracted.pictures).max(axis=1).mean())
        if judge:
            name = quality.column("AS", spec.judge).replace("AS", f"AS{suffix}", 1)
            scores[name] = view and metrics.average_similarity(quality.features(judge, view.pictures), seen)
    return scores


@results.inputs.register
def _(spec: Quality) -> dict[str, str]:
    training = [path for item in known_items(spec.training, spec.generate.model) for path in item.training]
    judges = {name: results.sha256_of(quality.checked(getattr(spec, name))) for name in ("iqa_judge", "fidelity_judge")}
    return judges | {f"image {number}": results.sha256_of(path) for number, path in enumerate(training)}


@results.perform.register
def _(spec: Quality, folder: Path, chunk: int = 256) -> None:
    """Write scores.json and clip-iqa.npy, the CLIP-IQA of each generated image, float32 [N].

    scores.json, each column with the name of its judge: the mean CLIP-IQA of generated and of training images, and the
    fidelity, the mean cosine of generated to training images (App. I).
    """
    n, generated = spec.generate.n_generated, results.complete(spec.generate)
    side = open_image(picture_file(generated, 0)).width
    paths = [path for item in known_items(spec.training, spec.generate.model) for path in item.training]
    training = load_images(tuple(paths), side)
    judge, other = quality.load_judge(spec.iqa_judge), quality.load_judge(spec.fidelity_judge)
    scores, likeness = [], 0.0
    for first in range(0, n, chunk):
        images = generated_pictures(spec.generate, range(first, min(first + chunk, n)))
        scores.append(quality.clip_iqa(judge, images))
        likeness += quality.fidelity(other, images, training) * len(images) / n
    iqa = quality.column("CLIP-IQA", spec.iqa_judge)
    columns = {
        iqa: float(np.concatenate(scores).mean()),
        f"{iqa} of training images": float(quality.clip_iqa(judge, training).mean()),
        quality.column("fidelity", spec.fidelity_judge): float(likeness),
    }
    np.save(folder / "clip-iqa.npy", np.concatenate(scores))
    (folder / results.SCORES).write_text(json.dumps(columns))


def read_matches(spec: Score) -> dict[str, np.ndarray]:
    """Of a finished Score: "match" of each training image (a number of a generated image), their "similarity", and
    "control_similarity" of each control to the extracted image most like it, where there are controls.
    """
    return {
        name: np.array(values)
        for name, values in json.loads((results.folder(spec) / "matches.json").read_text()).items()
    }


def image_side(spec: Score) -> int:
    """The side in pixels of the images that a finished Score is about."""
    return open_image(picture_file(results.complete(spec.extract.generate), 0)).width


def method_pictures(spec: Score, n: int = 4) -> dict[str, np.ndarray]:
    """What plots.method_drawing needs of a finished Score, uint8 [n, h, w, 3] each, and float [n] similarities.

    base: samples of theta without the caption; tuned: of theta' with it; generated; extracted: the extracted images that
    are most similar to a training image, best first; training: that training image; similarity: of the two; clique:
    images of the clique that the first of them stands for.
    """
    generate = spec.extract.generate
    sets = extraction_sets(results.complete(spec.extract))
    training = load_images(tuple(scored_images(spec)[0]), image_side(spec))
    network = load_descriptor(spec.extract.descriptor, spec.extract.preset)
    known = describe(network, scored_images(spec)[0], image_side(spec))
    found = np.load(results.folder(spec.extract) / "descriptors.npy")[sets["centres"]]
    alike = (found @ known.T).clip(0, 1)
    best = (np.argsort(-alike.max(axis=1), kind="stable").tolist() * n)[:n]
    common = {"n": n, "w": 1.0, "steps": generate.steps, "seed": generate.seed, "sampler": generate.sampler}
    base = load_pipeline(generate.model.base)
    return {
        "base": sample(ModelPair(base, base), "", arm="direct", **common),
        "tuned": sample(load_tuned(generate.model), prompt(generate), arm="direct", **common),
        "generated": generated_pictures(generate, range(n)),
        "clique": generated_pictures(generate, (sets["cliques"][best[0]] * n)[:n]),
        "extracted": generated_pictures(generate, np.array(sets["centres"])[best]),
        "training": to_uint8(training)[alike[best].argmax(axis=1)],
        "similarity": alike[best].max(axis=1),
    }
