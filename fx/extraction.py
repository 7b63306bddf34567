"""The attacker's last step: generated images -> descriptors -> cliques -> centres (Sec. 4.3), and nothing else.

This is the threat model's line: an `Extract` knows generated images, and N0 if somebody names it. It never sees a training
image; what an evaluator does with the extracted images is in `fx.evaluation`.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image
from torch import Tensor

from fx import results
from fx.cliques import RULES, estimate_n_training, extract, extract_distinct
from fx.datasets import from_uint8, to_uint8
from fx.losses import to_latents
from fx.models import PRECISIONS
from fx.refine import Consensus, Contrastive, check_refinement, evaluations, refined
from fx.sampling import Generate, generated_pictures, picture_file, save_picture
from fx.similarity import (
    PRESETS,
    copy_thresholds,
    describe,
    descriptor_path,
    descriptors,
    load_descriptor,
    similarity_matrix,
)
from fx.tuned import load_tuned

FEWEST = 6  # generated images from which on N0 can be estimated (fx.cliques.estimate_n_training)


@dataclass(frozen=True)
class Extract:
    """What to extract from generated images.

    n_training: N0, the number of images to extract; None if nobody knows it, then it is estimated
    (fx.cliques.estimate_n_training at the descriptor's loose threshold). descriptor, preset: the copy-detection network
    and how images enter it (fx.similarity.load_descriptor); rule: how the extracted set is chosen, phi: a fixed threshold
    instead of the rule's own (fx.cliques.extract); distinct: whether copies of one another, by the descriptor's strict
    threshold, are passed over for further cliques (fx.cliques.extract_distinct). refine: None, or how the extracted images
    are made more like what they are copies of, by the two models (fx.refine).
    """

    VERSION: ClassVar[int] = 1

    generate: Generate
    n_training: int | None
    descriptor: str = "mini-sscd"
    preset: str = "sscd"
    rule: str = "paper"
    phi: float | None = None
    distinct: bool = field(default=False, metadata={"absent": False})
    refine: Consensus | Contrastive | None = field(default=None, metadata={"absent": None})

    def __post_init__(self):
        for name, known in (("preset", PRESETS), ("rule", RULES)):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: choose one of {', '.join(known)}")
        n = self.generate.n_generated
        if n < 2:
            raise ValueError(f"{n} generated image has no similarities to cluster: generate at least 2")
        if self.n_training is None and n < FEWEST:
            raise ValueError(f"{n} generated images are too few to estimate n_training: generate at least {FEWEST}")
        if self.n_training is not None and not 1 <= self.n_training <= n:
            raise ValueError(
                f"n_training {self.n_training} must lie between 1 and the {n} generated images, or be None"
            )
        if self.refine:
            check_refinement(self.refine, self.generate)


@results.inputs.register
def _(spec: Extract) -> dict[str, str]:
    if spec.n_training is None or spec.distinct:
        copy_thresholds(spec.descriptor)  # ValueError now for one without, not after the images are generated
    return {"descriptor": results.sha256_of(descriptor_path(spec.descriptor)[0])}


@results.perform.register
def _(spec: Extract, folder: Path) -> None:
    """Write scores.json, extraction.json and descriptors.npy, and of a refined extraction its images.

    scores.json: n_extracted, phi, n_unproven (fx.cliques.Extraction) and, where N0 was estimated, n_estimated with its
    interval; of a refined one n_evaluations, what refining took. extraction.json: the cliques and their centres as numbers
    of generated images. descriptors.npy: of all generated images, float32 [N, d]. refined-<i>.png: what became of centre i.
    """
    if spec.refine:
        _refine(spec, folder)
        return
    generated = results.complete(spec.generate)
    network = load_descriptor(spec.descriptor, spec.preset)
    found = describe(network, [picture_file(generated, number) for number in range(spec.generate.n_generated)])
    similarity = similarity_matrix(found)
    n_training, scores = spec.n_training, {}
    if n_training is None:
        loose, _ = copy_thresholds(spec.descriptor)
        estimate, low, high = estimate_n_training(similarity, loose)
        n_training = min(max(estimate, 1), len(found))
        scores = {"n_estimated": estimate, "n_estimated_low": low, "n_estimated_high": high}
    if spec.distinct:
        _, strict = copy_thresholds(spec.descriptor)
        extraction = extract_distinct(similarity, n_training, strict, spec.rule, spec.phi)
    else:
        extraction = extract(similarity, n_training, spec.rule, spec.phi)
    scores |= {
        "n_extracted": extraction.n_extracted,
        "n_unproven": extraction.n_unproven,
        "phi_end": extraction.threshold,
    }
    sets = {"cliques": [list(clique) for clique in extraction.cliques], "centres": list(map(int, extraction.centres))}
    np.save(folder / "descriptors.npy", found)
    (folder / "extraction.json").write_text(json.dumps(sets))
    (folder / results.SCORES).write_text(json.dumps(scores))


def _refine(spec: Extract, folder: Path) -> None:
    """Refine the images of the same extraction without `refine`, whose files are taken over."""
    plain = results.complete(replace(spec, refine=None))
    for name in ("extraction.json", "descriptors.npy"):
        shutil.copyfile(plain / name, folder / name)
    centres = extraction_sets(plain)["centres"]
    pair = load_tuned(spec.generate.model, PRECISIONS[spec.generate.precision])

    def latents(numbers: Sequence[int]) -> Tensor:
        return to_latents(pair, from_uint8(generated_pictures(spec.generate, numbers)))

    similarity = similarity_matrix(np.load(plain / "descriptors.npy"))
    images = refined(spec.refine, spec.generate, pair, latents, centres, similarity)
    for number, pixels in enumerate(to_uint8(images)):
        save_picture(_refined_file(folder, number), pixels)
    scores = json.loads((plain / results.SCORES).read_text())
    scores["n_evaluations"] = evaluations(spec.refine, spec.generate, len(centres))
    (folder / results.SCORES).write_text(json.dumps(scores))


def _refined_file(folder: Path, number: int) -> Path:
    return folder / f"refined-{number:06d}.png"


def extraction_sets(folder: Path) -> dict[str, list]:
    """The cliques and centres in the folder of a finished Extract, as numbers of generated images."""
    return json.loads((folder / "extraction.json").read_text())


def extracted_pictures(spec: Extract) -> np.ndarray:
    """The extracted images, uint8 [k, h, w, 3]: the centres, or what became of them; extracted now if they are not there."""
    folder = results.complete(spec)
    centres = extraction_sets(folder)["centres"]
    if spec.refine:
        return np.stack([np.asarray(Image.open(_refined_file(folder, number))) for number in range(len(centres))])
    return generated_pictures(spec.generate, centres)


def extracted_descriptors(spec: Extract) -> np.ndarray:
    """The descriptors of the extracted images, float32 [k, d]."""
    if spec.refine:
        return descriptors(load_descriptor(spec.descriptor, spec.preset), from_uint8(extracted_pictures(spec)))
    folder = results.complete(spec)
    return np.load(folder / "descriptors.npy")[extraction_sets(folder)["centres"]]
