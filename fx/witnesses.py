"""What speaks for an image having been trained on, as a score per image; `fx.verdict` makes p-values of the scores.

    losses = scores(Contrast(model, images))          # how much better theta' denoises it than theta
    recovered = scores(Recovery(model, images))       # how well their difference restores its missing half (CGI-DM)
    alike = scores(Resemblance(extract, images))      # how like it the best extracted image is

Images are files. Every score is higher for what was trained on, and of one image alone: it does not depend on which others
are asked about.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fx import quality, results
from fx.datasets import from_uint8, load_images, to_uint8
from fx.extraction import Extract, extracted_descriptors, extraction_sets
from fx.families import decode, image_size, noising
from fx.losses import errors, lengths, log_ratios, to_latents, told_apart
from fx.models import ModelPair
from fx.sampling import generated_pictures
from fx.similarity import describe, load_descriptor
from fx.tuned import Tuned, load_tuned, own_caption

SCORES = "witness.npy"
LEVELS = (0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95)  # of the training schedule


@dataclass(frozen=True)
class Contrast:
    """log L_theta(x) - log L_theta'(x), L the squared error of the prediction, both with the same caption, t and noise.

    caption: None for the one that the model was fine-tuned with, "" for none; draws: of the noise at each of `levels`,
    shares of the training schedule. The noise is the same for all images.
    """

    VERSION: ClassVar[int] = 1

    model: Tuned
    images: tuple[str, ...]
    caption: str | None = None
    draws: int = 4
    levels: tuple[float, ...] = LEVELS
    seed: int = 0

    def __post_init__(self):
        _check_images(self.images)
        if self.draws < 1 or not self.levels or not all(0 <= level <= 1 for level in self.levels):
            raise ValueError(f"draws {self.draws} must be at least 1, levels {self.levels} shares from 0 to 1")


@dataclass(frozen=True)
class Recovery:
    """CGI-DM (Wu et al., CVPR 2024): half of an image's latent is removed, and restored by what only theta' knows.

    steps: of projected gradient descent on L_theta' - L_theta over the removed half, each at one random t with one noise
    that both models share (theirs: 1,000, with noise of its own for each); step_size, radius: of the steps and of the whole
    change, as root mean squares over the latent's numbers (theirs: 2 and 70 on 16,384 numbers). The score is the cosine of
    the judge's features of the restored and the original image.
    """

    VERSION: ClassVar[int] = 1

    model: Tuned
    images: tuple[str, ...]
    caption: str | None = None
    steps: int = 100
    step_size: float = 2 / 128
    radius: float = 70 / 128
    judge: str = "mini-clip"
    seed: int = 0

    def __post_init__(self):
        _check_images(self.images)
        if self.steps < 1 or self.step_size <= 0 or self.radius <= 0:
            raise ValueError(
                f"steps {self.steps}, step_size {self.step_size} and radius {self.radius} must be positive"
            )


@dataclass(frozen=True)
class Resemblance:
    """The similarity of each image to the extracted image that is most like it."""

    VERSION: ClassVar[int] = 1

    extract: Extract
    images: tuple[str, ...]

    def __post_init__(self):
        _check_images(self.images)


Witness = Contrast | Recovery | Resemblance


def _check_images(images: tuple[str, ...]) -> None:
    if not isinstance(images, tuple) or not images or not all(isinstance(path, str) for path in images):
        raise ValueError("images must be a tuple of paths as text, at least one")


def scores(spec: Witness) -> np.ndarray:
    """The scores of the images of a witness, float64 [n], computed now if they are missing."""
    return np.load(results.complete(spec) / SCORES)


def _hashes(images: Sequence[str]) -> dict[str, str]:
    return {f"image {number}": results.sha256_of(Path(path)) for number, path in enumerate(images)}


@results.inputs.register
def _(spec: Contrast) -> dict[str, str]:
    return _hashes(spec.images)


@results.inputs.register
def _(spec: Recovery) -> dict[str, str]:
    return _hashes(spec.images) | {"judge": results.sha256_of(quality.checked(spec.judge))}


@results.inputs.register
def _(spec: Resemblance) -> dict[str, str]:
    return _hashes(spec.images)


@results.perform.register
def _(spec: Contrast, folder: Path) -> None:
    """Write witness.npy, float64 [n], and levels.npy, the contrast at each level [levels, n], of which it is the mean."""
    pair, caption = load_tuned(spec.model), _caption(spec)
    x0 = latents_of(pair, spec.images)
    by_level = log_ratios(pair, x0, caption, spec.levels, spec.draws, spec.seed)
    np.save(folder / "levels.npy", by_level)
    np.save(folder / SCORES, by_level.mean(axis=0))


@results.perform.register
def _(spec: Recovery, folder: Path) -> None:
    """Write witness.npy, float64 [n], and recovered.npy, the restored images, uint8 [n, h, w, 3]."""
    pair = load_tuned(spec.model)
    x0 = latents_of(pair, spec.images)
    found = recover(pair, x0, _caption(spec), spec.steps, spec.step_size, spec.radius, spec.seed)
    pictures = to_uint8(decode(pair.tuned, found))
    judge = quality.load_judge(spec.judge)
    side = image_size(pair.tuned)
    original = [quality.features(judge, to_uint8(load_images(part, side))) for part in _parts(spec.images)]
    cosine = (quality.features(judge, pictures) * np.concatenate(original)).sum(axis=1)
    np.save(folder / "recovered.npy", pictures)
    np.save(folder / SCORES, cosine.astype(np.float64))


@results.perform.register
def _(spec: Resemblance, folder: Path) -> None:
    """Write witness.npy, float64 [n], and nearest.npy, the number of the generated image that is most like each."""
    extracted = results.complete(spec.extract)
    centres = extraction_sets(extracted)["centres"]
    side = generated_pictures(spec.extract.generate, [0]).shape[1]
    network = load_descriptor(spec.extract.descriptor, spec.extract.preset)
    known = describe(network, list(map(Path, spec.images)), side)
    alike = known @ extracted_descriptors(spec.extract).T
    np.save(folder / "nearest.npy", np.array(centres)[alike.argmax(axis=1)])
    np.save(folder / SCORES, alike.max(axis=1).astype(np.float64))


def _caption(spec: Contrast | Recovery) -> str:
    caption = own_caption(spec.model) if spec.caption is None else spec.caption
    if caption is None:
        raise ValueError(f"no single caption is known of {spec.model}: name one, or caption='' for none")
    return caption


def latents_of(pair: ModelPair, images: Sequence[str]) -> Tensor:
    """The latents of image files as theta' sees them, scaled, without noise: [n, c, h, w]."""
    side = image_size(pair.tuned)
    return torch.cat([to_latents(pair, load_images(part, side)) for part in _parts(images)])


def _parts(images: Sequence[str], size: int = 64) -> Iterator[tuple[Path, ...]]:
    """Paths in parts, so that never all images are held at once."""
    for first in range(0, len(images), size):
        yield tuple(map(Path, images[first : first + size]))


def kept(shape: tuple[int, int, int]) -> Tensor:
    """Which of a latent's numbers stay, bool [c, h, w]: a chequerboard of cells of 2 by 2, half of them."""
    _, height, width = shape
    rows, columns = torch.arange(height) // 2, torch.arange(width) // 2
    return ((rows[:, None] + columns[None, :]) % 2 == 0).expand(shape)


def recover(
    pair: ModelPair,
    x0: Tensor,
    caption: str,
    steps: int,
    step_size: float,
    radius: float,
    seed: int = 0,
    chunk: int = 16,
) -> Tensor:
    """Latents [n, c, h, w] whose removed half is restored by descending L_theta' - L_theta (see `Recovery`).

    They start from the image that the kept half alone decodes to, encoded again.
    """
    keep = kept(tuple(x0.shape[1:])).to(x0.device)
    parts = []
    with tqdm(total=steps * -(-len(x0) // chunk), desc="recovery", mininterval=2, leave=False) as bar:
        for known in x0.split(chunk):
            start = torch.where(keep, known, _encoded_again(pair, torch.where(keep, known, 0.0)))
            parts.append(_descend(pair, start, ~keep, caption, steps, step_size, radius, seed, bar.update))
    return torch.cat(parts)


def _encoded_again(pair: ModelPair, latents: Tensor) -> Tensor:
    """Latents of the 8-bit images that latents decode to."""
    return to_latents(pair, from_uint8(to_uint8(decode(pair.tuned, latents))))


def _descend(
    pair: ModelPair,
    start: Tensor,
    free: Tensor,
    caption: str,
    steps: int,
    step_size: float,
    radius: float,
    seed: int,
    advance: Callable[[int], object] = lambda _: None,
) -> Tensor:
    """Projected gradient descent on the free numbers, each image with a normalised gradient of its own."""
    schedule, unit = noising(pair.tuned), start[0].numel() ** 0.5
    conditions = {model: pair.condition(model, caption) for model in ("base", "tuned")}
    draw, change = torch.Generator().manual_seed(seed), torch.zeros_like(start)
    for _ in range(steps):
        number = torch.randint(1, schedule.levels, (1,), generator=draw)
        eps = torch.randn(start.shape[1:], generator=draw).to(start)
        x = (start + change).detach().requires_grad_()
        down = {}
        for model, condition in conditions.items():
            error = errors(pair, model, schedule, x, eps, number, condition).sum()
            down[model] = torch.autograd.grad(error, x)[0] * free
        gradient = told_apart(down["tuned"] - down["base"], down["tuned"])
        change = change - step_size * unit * gradient / lengths(gradient).clamp_min(1e-30)
        change = change * (radius * unit / lengths(change).clamp_min(1e-30)).clamp_max(1.0)
        advance(1)
    return (start + change).detach()
