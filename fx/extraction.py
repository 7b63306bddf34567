"""The attacker's last step: generated images -> descriptors -> cliques -> centres (Sec. 4.3), and nothing else.

This is the threat model's line: an `Extract` knows generated images, and N0 if somebody names it. It never sees a training
image; what an evaluator does with the extracted images is in `fx.evaluation`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from fx import results
from fx.cliques import RULES, estimate_n_training, extract
from fx.sampling import Generate, picture_file
from fx.similarity import PRESETS, copy_thresholds, describe, descriptor_path, load_descriptor, similarity_matrix

FEWEST = 6  # generated images from which on N0 can be estimated (fx.cliques.estimate_n_training)


@dataclass(frozen=True)
class Extract:
    """What to extract from generated images.

    n_training: N0, the number of images to extract; None if nobody knows it, then it is estimated
    (fx.cliques.estimate_n_training at the descriptor's loose threshold). descriptor, preset: the copy-detection network
    and how images enter it (fx.similarity.load_descriptor); rule: how the extracted set is chosen, phi: a fixed threshold
    instead of the rule's own (fx.cliques.extract).
    """

    VERSION: ClassVar[int] = 1

    generate: Generate
    n_training: int | None
    descriptor: str = "mini-sscd"
    preset: str = "sscd"
    rule: str = "paper"
    phi: float | None = None

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


@results.inputs.register
def _(spec: Extract) -> dict[str, str]:
    if spec.n_training is None:
        copy_thresholds(spec.descriptor)  # ValueError now for one without, not after the images are generated
    return {"descriptor": results.sha256_of(descriptor_path(spec.descriptor)[0])}


@results.perform.register
def _(spec: Extract, folder: Path) -> None:
    """Write scores.json, extraction.json and descriptors.npy.

    scores.json: n_extracted, phi, n_unproven (fx.cliques.Extraction) and, where N0 was estimated, n_estimated with its
    interval. extraction.json: the cliques and their centres as numbers of generated images. descriptors.npy: of all
    generated images, float32 [N, d].
    """
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
