"""Extraction of one item by one arm, and its scores: generated images -> cliques -> centres -> AS, A-ESR (Sec. 4.3)."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fx import metrics, results
from fx.cliques import RULES, extract
from fx.datasets import from_uint8, load_images, load_item, to_uint8
from fx.finetune import FineTune
from fx.models import ModelPair, load_pair, load_pipeline
from fx.sampling import Generate, sample
from fx.similarity import (
    PRESETS,
    copy_thresholds,
    descriptor_path,
    descriptors,
    load_descriptor,
    similarity_matrix,
)

# The code of an extraction as it was imported, file -> SHA-256: with another code it is another extraction.
MODULES = ("extraction", "cliques", "clique_search", "datasets", "metrics", "similarity")
CODE = {f"{name}.py": results.sha256_of(Path(__file__).with_name(f"{name}.py")) for name in MODULES}


@dataclass(frozen=True)
class Extract:
    """What to extract from generated images and how to score it.

    descriptor, preset: the copy-detection network and how images enter it (fx.similarity.load_descriptor); strict,
    loose: the thresholds tau of A-ESR (fx.similarity.copy_thresholds); rule: how the extracted set is chosen (fx.cliques).
    """

    generate: Generate
    strict: float
    loose: float
    descriptor: str = "mini-sscd"
    preset: str = "sscd"
    rule: str = "paper"

    def __post_init__(self):
        for name, known in (("preset", PRESETS), ("rule", RULES)):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: choose one of {', '.join(known)}")


@results.inputs.register
def _(spec: Extract) -> dict[str, str]:
    item = load_item(spec.generate.finetune.item, spec.generate.finetune.caption)
    if (n := spec.generate.images_per_training * item.n_training) < 2:
        raise ValueError(f"{item.name}: {n} generated image has no similarities to cluster; generate at least 2")
    controls = {f"control {number}": results.sha256_of(path) for number, path in enumerate(item.controls)}
    descriptor = results.sha256_of(descriptor_path(spec.descriptor)[0])
    return {"descriptor": descriptor, **controls, **CODE}


@results.perform.register
def _(spec: Extract, folder: Path) -> None:
    """Write scores.json and matches.json.

    scores.json: the scores of Eq. 1 and 2; AS_one_to_one, where each extracted image counts for one training image only;
    AS_all, as if every generated image were extracted, which no rule can surpass; AS_controls, the AS of images of the same
    artist or class that were never trained on, if the item has any. matches.json holds image numbers: the cliques, their
    centres and, per training image, its match among the centres with the similarity of the two.
    """
    finetune = spec.generate.finetune
    item = load_item(finetune.item, finetune.caption)
    generated = np.load(results.complete(spec.generate) / "images.npy")
    network = load_descriptor(spec.descriptor, spec.preset)
    found = descriptors(network, from_uint8(generated))
    training = descriptors(network, load_images(item.training, generated.shape[1]))
    extraction = extract(similarity_matrix(found), item.n_training, rule=spec.rule)
    centres = np.array(extraction.centres)
    extracted = found[centres]
    controls = None
    if item.controls:
        unseen = descriptors(network, load_images(item.controls, generated.shape[1]))
        controls = metrics.average_similarity(unseen, extracted)
    scores = {
        "AS": metrics.average_similarity(training, extracted),
        "A-ESR_strict": metrics.extraction_success_rate(training, extracted, spec.strict),
        "A-ESR_loose": metrics.extraction_success_rate(training, extracted, spec.loose),
        "AS_one_to_one": metrics.average_similarity(training, extracted, one_to_one=True),
        "AS_all": metrics.average_similarity(training, found),
        "AS_controls": controls,
        "n_training": item.n_training,
        "n_generated": len(generated),
        "n_extracted": extraction.n_extracted,
        "n_unproven": extraction.n_unproven,
        "phi": extraction.threshold,
    }
    best = (training @ extracted.T).argmax(axis=1)
    matches = {
        "cliques": [list(clique) for clique in extraction.cliques],
        "centres": centres.tolist(),
        "match": centres[best].tolist(),
        "similarity": metrics.best_match(training, extracted).tolist(),
    }
    (folder / results.SCORES).write_text(json.dumps(scores))
    (folder / "matches.json").write_text(json.dumps(matches))


def three_arms(
    finetune: FineTune,
    images_per_training: int,
    cfg_scale: float,
    finextract_scale: float,
    correction_scale: float,
    steps: int = 25,
    seed: int = 0,
    descriptor: str = "mini-sscd",
    **options,
) -> list[Extract]:
    """The paper's comparison for one fine-tuned model: direct, CFG and FineXtract; `options` go to Extract."""
    loose, strict = copy_thresholds(descriptor)
    arms = (("direct", 1.0, 0.0), ("cfg", cfg_scale, 0.0), ("finextract", finextract_scale, correction_scale))
    options |= {"strict": strict, "loose": loose, "descriptor": descriptor}
    return [Extract(Generate(finetune, arm, w, k, images_per_training, steps, seed), **options) for arm, w, k in arms]


def method_pictures(spec: Extract, n: int = 4) -> dict[str, np.ndarray]:
    """What plots.method_drawing needs of a finished extraction, uint8 [n, h, w, 3] each, and float [n] similarities.

    base: samples of theta without the caption; tuned: of theta' with it; generated; extracted: the extracted images that
    are most similar to a training image, best first; training: that training image; similarity: of the two; clique:
    images of the clique that the first of them stands for.
    """
    finetune = spec.generate.finetune
    item = load_item(finetune.item, finetune.caption)
    pair = load_pair(finetune.base, results.complete(finetune))
    generated = np.load(results.complete(spec.generate) / "images.npy")
    matches = json.loads((results.complete(spec) / "matches.json").read_text())
    network = load_descriptor(spec.descriptor, spec.preset)
    training = load_images(item.training, generated.shape[1])
    alike = (descriptors(network, from_uint8(generated[matches["centres"]])) @ descriptors(network, training).T).clip(
        0, 1
    )
    best = (np.argsort(-alike.max(axis=1), kind="stable").tolist() * n)[:n]
    common = {"n": n, "w": 1.0, "steps": spec.generate.steps, "seed": spec.generate.seed}
    base = load_pipeline(finetune.base)
    return {
        "base": sample(ModelPair(base, base), "", arm="direct", **common),
        "tuned": sample(pair, item.caption, arm="direct", **common),
        "generated": generated[:n],
        "clique": generated[(matches["cliques"][best[0]] * n)[:n]],
        "extracted": generated[np.array(matches["centres"])[best]],
        "training": to_uint8(training)[alike[best].argmax(axis=1)],
        "similarity": alike[best].max(axis=1),
    }
