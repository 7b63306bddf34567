"""What an attacker sees of how well an extraction went: signs for choosing w' and the rest without the training images.

    rows = results.run([Signs(s.extract(s.generate(model, "finextract", 100, guidance_scale=w), 10)) for w in (2, 3, 5)])

The paper chooses w' and k on the training images, which an attacker does not have (beyond the paper). Every sign here is
made of generated images and the two models and of nothing else, and each is the higher the better it is said to be. Which of
them can be believed is what notebook 14 measures; `choose_scale` follows the one that it found.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd

from fx import results
from fx.cliques import largest_cliques
from fx.datasets import from_uint8
from fx.extraction import Extract, extracted_descriptors, extracted_pictures
from fx.losses import log_ratios, to_latents
from fx.models import PRECISIONS
from fx.sampling import Generate, picture_file, prompt
from fx.settings import Settings
from fx.similarity import copy_thresholds, describe, load_descriptor, similarity_matrix
from fx.tuned import Extrapolated, Tuned, load_tuned

SCALES = (1.0, 2.0, 3.0, 5.0, 8.0)  # w' to choose from: notebook 14's
NEAREST = 5  # generated images most like one, for its tightness
BURNT = 4  # how far from 0 or 255 a value of a pixel is at an end of its range


@dataclass(frozen=True)
class Signs:
    """The signs of one extraction, from what it was extracted from.

    base: images that theta drew with the same caption (`of_base`), None for no comparison; levels, draws: of the losses,
    as in fx.losses.log_ratios.
    """

    VERSION: ClassVar[int] = 1

    extract: Extract
    base: Generate | None = None
    levels: tuple[float, ...] = (0.15, 0.35, 0.55, 0.75)
    draws: int = 2
    seed: int = 0

    def __post_init__(self):
        if self.extract.generate.n_generated <= NEAREST:
            raise ValueError(
                f"{self.extract.generate.n_generated} generated images are too few for signs: more than {NEAREST}"
            )
        if self.draws < 1 or not self.levels or not all(0 <= level <= 1 for level in self.levels):
            raise ValueError(f"draws {self.draws} must be at least 1, levels {self.levels} shares from 0 to 1")


def choose_scale(
    chosen: Settings, model: Tuned, n_training: int, n_generated: int, scales: tuple[float, ...] = SCALES, **options
) -> tuple[Settings, pd.DataFrame]:
    """The settings with the w' that `log_ratio` takes, without any training image, and a row per w' tried.

    w' = 1 is direct sampling: if it is chosen, k is 0 as well. n_generated: images for each w'; the extraction with the one
    chosen has them already, with 1 that of the arm "direct". The smaller of two equal ones is taken. The rows have the
    columns w and those of Signs. `options` as in `signs_of_scales`. ValueError for no scale.
    """
    tried = signs_of_scales(chosen, model, n_training, n_generated, scales, **options)
    rows = results.run(tried.values(), description="choosing w'").reset_index(drop=True).assign(w=list(tried))
    best = rows.w[int(rows.log_ratio.astype(float).argmax())]
    return replace(chosen, finextract_scale=best, correction_scale=0.0 if best == 1 else chosen.correction_scale), rows


def signs_of_scales(
    chosen: Settings,
    model: Tuned,
    n_training: int,
    n_generated: int,
    scales: tuple[float, ...] = SCALES,
    arm: str = "finextract",
    **changes,
) -> dict[float, Signs]:
    """The signs that `choose_scale` follows, by w', from the smallest on; ValueError for no scale.

    arm: what w' is of, FineXtract or without a caption "model_guidance"; `changes` are other fields of the Generate.
    """
    if not scales:
        raise ValueError("no w' to choose from: name at least one")
    direct = chosen.generate(model, "direct", n_generated, **changes)
    asked = {
        w: direct if w == 1 else chosen.generate(model, arm, n_generated, guidance_scale=w, **changes)
        for w in sorted(scales)
    }
    return {w: Signs(chosen.extract(one, n_training)) for w, one in asked.items()}


def of_base(generate: Generate, n_generated: int) -> Generate:
    """As many images as theta draws with the caption of a Generate, by direct sampling."""
    model = generate.model.model if isinstance(generate.model, Extrapolated) else generate.model
    plain = {"guidance_scale": 1.0, "correction_scale": 0.0, "text_scale": 1.0}
    return replace(generate, model=Extrapolated(model, 0.0), arm="direct", n_generated=n_generated, **plain)


@results.inputs.register
def _(spec: Signs) -> dict[str, str]:
    copy_thresholds(spec.extract.descriptor)  # ValueError now for one without
    return {}


@results.perform.register
def _(spec: Signs, folder: Path) -> None:
    """Write scores.json: the signs of `of_similarities`; and of the extracted images log_ratio, away_from_base, unburnt.

    log_ratio: log L_theta - log L_theta', the mean over images and levels; away_from_base: 1 less the similarity to the
    image of theta's that is most alike, the mean over images; unburnt: the share of colour values inside their range.
    """
    extracted_in = results.complete(spec.extract)
    similarity = similarity_matrix(np.load(extracted_in / "descriptors.npy"))
    pictures, generate = extracted_pictures(spec.extract), spec.extract.generate
    pair = load_tuned(generate.model, PRECISIONS[generate.precision])
    latents = to_latents(pair, from_uint8(pictures))
    ratios = log_ratios(pair, latents, prompt(generate), spec.levels, spec.draws, spec.seed)
    signs = of_similarities(similarity, copy_thresholds(spec.extract.descriptor)[0])
    signs |= {"log_ratio": float(ratios.mean()), "unburnt": unburnt(pictures)}
    if spec.base:
        drawn = results.complete(spec.base)
        network = load_descriptor(spec.extract.descriptor, spec.extract.preset)
        known = describe(network, [picture_file(drawn, number) for number in range(spec.base.n_generated)])
        signs["away_from_base"] = float(1 - (extracted_descriptors(spec.extract) @ known.T).max(axis=1).mean())
    (folder / results.SCORES).write_text(json.dumps(signs))


def of_similarities(similarity: np.ndarray, loose: float) -> dict[str, float]:
    """The signs that similarities [N, N] of generated images hold; `loose`: from which on two are copies of each other.

    tight: the mean similarity of an image to the five most like it; standing_out: that less the mean of all pairs;
    groups: cliques of three or more, removed one after the other; covered: the share of images in them; halves_agree: the
    mean similarity of an image to the most alike among those of the other half, even and odd ones.
    """
    n = len(similarity)
    apart = similarity[~np.eye(n, dtype=bool)].reshape(n, n - 1)
    tight = float(np.sort(apart, axis=1)[:, -NEAREST:].mean())
    cliques, _ = largest_cliques(similarity, loose)
    groups = [len(clique) for clique in cliques if len(clique) >= 3]
    other = similarity[::2, 1::2]
    agreement = np.concatenate([other.max(axis=1), other.max(axis=0)])
    return {
        "tight": tight,
        "standing_out": tight - float(apart.mean()),
        "groups": len(groups),
        "covered": sum(groups) / n,
        "halves_agree": float(agreement.mean()),
    }


def unburnt(pictures: np.ndarray) -> float:
    """The share of colour values of uint8 images [n, h, w, 3] that are not within BURNT of either end of their range."""
    return float(((pictures > BURNT) & (pictures < 255 - BURNT)).mean())
