"""What an evaluator adds who has the training images: the scores of Sec. 3.2 beside controls, and quality (App. I)."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from fx import checkpoints, metrics, quality, results
from fx.datasets import Item, load_images, load_item, open_image, to_uint8
from fx.extraction import Extract
from fx.finetune import FineTune, TrainingItem, load_training
from fx.models import ModelPair, load_pipeline
from fx.sampling import Generate, generated_pictures, picture_file, prompt, sample
from fx.similarity import copy_thresholds, describe, load_descriptor
from fx.tuned import Checkpoint, load_tuned, own_training


@dataclass(frozen=True)
class Score:
    """How to score what was extracted.

    training: the images to score against; () for those that the model is known to be fine-tuned on (of a Checkpoint none
    are known: name them). controls: a folder of images of the same kind that were never trained on; "" for those that
    the training items bring along. strict, loose: the thresholds tau of A-ESR; None for the descriptor's own.
    """

    VERSION: ClassVar[int] = 1

    extract: Extract
    training: tuple[TrainingItem, ...] = ()
    controls: str = ""
    strict: float | None = None
    loose: float | None = None

    def __post_init__(self):
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


def scored_images(spec: Score) -> tuple[list[Path], list[Path]]:
    """The training images and the controls of a Score; ValueError where no training images are known."""
    items = known_items(spec.training, spec.extract.generate.model)
    training = [path for item in items for path in item.training]
    if spec.controls:
        return training, list(load_item(spec.controls, "controls").training)
    return training, [path for item in items for path in item.controls]


def known_items(training: tuple[TrainingItem, ...], model: FineTune | Checkpoint) -> list[Item]:
    """The items to compare with, those named or else those a model was fine-tuned on; ValueError if there are none."""
    parts = training or own_training(model)
    if not parts:
        raise ValueError(f"what {model} was trained on is not known: name the training items to compare with")
    return [load_training(part) for part in parts]


def thresholds(spec: Score) -> tuple[float, float]:
    """The loose and the strict threshold tau of A-ESR."""
    loose, strict = spec.loose, spec.strict
    if loose is None or strict is None:
        known = copy_thresholds(spec.extract.descriptor)
        loose, strict = (known[0] if loose is None else loose), (known[1] if strict is None else strict)
    return loose, strict


@results.inputs.register
def _(spec: Score) -> dict[str, str]:
    training, controls = scored_images(spec)
    thresholds(spec)
    named = {f"image {number}": results.sha256_of(path) for number, path in enumerate(training)}
    return named | {f"control {number}": results.sha256_of(path) for number, path in enumerate(controls)}


@results.perform.register
def _(spec: Score, folder: Path) -> None:
    """Write scores.json and matches.json.

    scores.json: those of the extraction; of Eq. 1 and 2; AS_one_to_one, where each extracted image counts for one training
    image only; AS_all, as if every generated image were extracted, which no rule can surpass; AS_controls, the AS of
    images of the same kind that were never trained on, if there are any. matches.json: per training image its match among
    the extracted images, as the number of a generated image, and the similarity of the two.
    """
    loose, strict = thresholds(spec)
    extracted_in = results.complete(spec.extract)
    generated, centres = np.load(extracted_in / "descriptors.npy"), extraction_sets(extracted_in)["centres"]
    side = image_side(spec)
    network = load_descriptor(spec.extract.descriptor, spec.extract.preset)
    training, controls = (describe(network, paths, side) if paths else None for paths in scored_images(spec))
    extracted = generated[centres]
    best = metrics.best_match(training, extracted)
    scores = json.loads((extracted_in / results.SCORES).read_text()) | {
        "AS": metrics.average_similarity(training, extracted),
        "A-ESR_strict": metrics.extraction_success_rate(training, extracted, strict),
        "A-ESR_loose": metrics.extraction_success_rate(training, extracted, loose),
        "AS_one_to_one": metrics.average_similarity(training, extracted, one_to_one=True),
        "AS_all": metrics.average_similarity(training, generated),
        "AS_controls": None if controls is None else metrics.average_similarity(controls, extracted),
        "n_scored": len(training),
    }
    chosen = np.array(centres)[(training @ extracted.T).argmax(axis=1)]
    (folder / results.SCORES).write_text(json.dumps(scores))
    (folder / "matches.json").write_text(json.dumps({"match": chosen.tolist(), "similarity": best.tolist()}))


@results.inputs.register
def _(spec: Quality) -> dict[str, str]:
    training = [path for item in known_items(spec.training, spec.generate.model) for path in item.training]
    judges = {
        name: results.sha256_of(checkpoints.find(getattr(spec, name))) for name in ("iqa_judge", "fidelity_judge")
    }
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


def extraction_sets(folder: Path) -> dict[str, list]:
    """The cliques and centres in the folder of a finished Extract, as numbers of generated images."""
    return json.loads((folder / "extraction.json").read_text())


def read_matches(spec: Score) -> dict[str, np.ndarray]:
    """Of a finished Score: the match of each training image (a number of a generated image) and their similarity."""
    return {
        name: np.array(values)
        for name, values in json.loads((results.folder(spec) / "matches.json").read_text()).items()
    }


def image_side(spec: Score) -> int:
    """The side in pixels of the images that a finished Score is about."""
    return open_image(picture_file(results.folder(spec.extract.generate), 0)).width


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
