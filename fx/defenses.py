"""Defenses that change images before fine-tuning, and what undoes them.

Training transforms are what a model provider may do (Sec. 5.4); perturbations are what an artist may do before anybody has
the images; purifications are what whoever trains may do against those.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import v2

from fx.datasets import from_uint8, to_uint8
from fx.families import Condition, denoise, encode, latent_statistics, network, noising, round_trip


def cutout(images: Tensor, share: float = 0.5) -> Tensor:
    """Cutout (DeVries and Taylor, 2017): one grey square at a random place in each image, [n, 3, side, side] in [-1, 1].

    share: its side over the image's, theirs is half. The centre may lie anywhere, so that the square may stick out.
    """
    side = int(images.shape[-1] * share)
    erased = images.clone()
    for image in erased:
        top, left = (torch.randint(images.shape[-1], (2,)) - side // 2).tolist()
        image[:, max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = 0
    return erased


def randaugment(images: Tensor, magnitude: float = 9) -> Tensor:
    """RandAugment (Cubuk et al., 2020), two operations of a magnitude of 0..30 per image, [n, 3, h, w] in [-1, 1]."""
    augment = v2.RandAugment(num_ops=2, magnitude=int(magnitude))
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte()
    return torch.stack([augment(image) for image in pixels]).float() / 127.5 - 1


@dataclass(frozen=True)
class Change:
    """Something that is done to images with a strength: its usual one, and the least and the most that it takes.

    change: of a transform (images [n, 3, h, w] in [-1, 1], strength) -> images; of a purification (pictures uint8
    [n, h, w, 3], strength, pipeline) -> pictures.
    """

    change: Callable
    usual: float
    least: float
    most: float
    whole: bool = False  # whether the strength is a whole number


# The names a FineTune may carry, "cutout" or with a strength "cutout:0.25"; both draw from torch's global generator, which
# fine-tuning seeds at every step.
TRANSFORMS = {
    "cutout": Change(cutout, usual=0.5, least=0.01, most=1.0),
    "randaugment": Change(randaugment, usual=9, least=0, most=30, whole=True),
}


def _named(named: str, kind: str, known: dict[str, Change], none: str = "") -> tuple[Change, float]:
    """What "name" or "name:strength" stands for; ValueError for an unknown name or a strength that it does not take."""
    name, colon, strength = named.partition(":")
    if name not in known:
        raise ValueError(f"unknown {kind} {named!r}: choose from {none}{', '.join(known)}")
    found = known[name]
    try:
        value = float(strength) if colon else float(found.usual)
    except ValueError:
        value = math.nan
    if not found.least <= value <= found.most or (found.whole and value % 1):
        number = "a whole number" if found.whole else "a number"
        raise ValueError(f"{kind} {named!r}: the strength of {name} is {number} from {found.least:g} to {found.most:g}")
    return found, value


def check_transform(named: str) -> None:
    """ValueError for a transform that is not known, or not in this strength."""
    _named(named, "transform", TRANSFORMS, "none, ")


def transform(named: str) -> Callable[[Tensor], Tensor]:
    """The function images [n, 3, h, w] in [-1, 1] -> images that a name of TRANSFORMS stands for, with its strength."""
    found, strength = _named(named, "transform", TRANSFORMS, "none, ")
    return lambda images: found.change(images, strength)


# Perturbations: what an artist may do to the images before anybody has them


@dataclass(frozen=True)
class Perturbation:
    """A change of pixels within a budget that is to keep a model from learning an image.

    gain: (pipeline, images [n, 3, h, w] in [-1, 1], condition, draws) -> [n], what the change makes as large as it can.
    """

    meaning: str
    gain: Callable[[DiffusionPipeline, Tensor, Condition, "Draws"], Tensor]


@dataclass(frozen=True)
class Draws:
    """What one step draws for each image: timesteps t [n], noise of the latents and of the posterior [n, c, h, w]."""

    t: Tensor
    eps: Tensor
    posterior: Tensor


def denoising_error(pipeline: DiffusionPipeline, images: Tensor, condition: Condition, draws: Draws) -> Tensor:
    """AdvDM (Liang et al., 2023, Eq. 7): the training loss of the base model on each image, [n]."""
    schedule = noising(pipeline)
    scale, shift = latent_statistics(pipeline.vae)
    found = pipeline.vae.encode(images).latent_dist
    x0 = (found.mean + found.std * draws.posterior - shift) * scale
    x = schedule.add(x0, draws.eps, draws.t)
    predicted = denoise(network(pipeline), x, schedule.timestep(draws.t), condition.expand(len(images)))
    return (predicted - schedule.target(x0, draws.eps, draws.t)).square().mean(dim=(1, 2, 3))


def closeness_to_pattern(pipeline: DiffusionPipeline, images: Tensor, condition: Condition, draws: Draws) -> Tensor:
    """Mist's texture term (Liang and Wu, 2023): minus the squared distance of each latent to that of a pattern, [n]."""
    with torch.no_grad():
        wanted = pipeline.vae.encode(pattern(*images.shape[2:]).to(images)[None]).latent_dist.mean
    return -(pipeline.vae.encode(images).latent_dist.mean - wanted).square().mean(dim=(1, 2, 3))


def closeness_to_nothing(pipeline: DiffusionPipeline, images: Tensor, condition: Condition, draws: Draws) -> Tensor:
    """PhotoGuard's encoder attack (Salman et al., 2023): minus the squared length of each latent, [n]."""
    return -pipeline.vae.encode(images).latent_dist.mean.square().mean(dim=(1, 2, 3))


def nothing(pipeline: DiffusionPipeline, images: Tensor, condition: Condition, draws: Draws) -> Tensor:
    """No gain at all, [n] zeros: the random start within the budget stays, a null for the others, which begin from it."""
    return 0 * images.sum(dim=(1, 2, 3))


PERTURBATIONS = {
    "advdm": Perturbation("the base model denoises the image worse (AdvDM)", denoising_error),
    "mist": Perturbation("its latent comes near that of a pattern (Mist's texture term)", closeness_to_pattern),
    "photoguard": Perturbation("its latent comes near zero (PhotoGuard's encoder attack)", closeness_to_nothing),
    "random": Perturbation(
        "a random change of the same budget that follows nothing: no protection, but what one must beat", nothing
    ),
}


def pattern(height: int, width: int, period: int = 8) -> Tensor:
    """Mist's target is a picture of strong repeated texture; ours are diagonal stripes: float32 [3, h, w], -1 or 1."""
    place = torch.arange(height)[:, None] + torch.arange(width)
    return (2.0 * ((place // max(1, period // 2)) % 2) - 1).expand(3, height, width)


def perturb(
    pipeline: DiffusionPipeline,
    pictures: np.ndarray,
    method: str = "advdm",
    eps: int = 8,
    steps: int = 100,
    step_size: float = 1.0,
    caption: str = "a picture",
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    progress: Callable[[], object] = lambda: None,
) -> np.ndarray:
    """Pictures uint8 [n, h, w, 3] changed by at most `eps` of their 255 grey levels, which holds for the bytes returned.

    Projected gradient ascent on the gain of one of PERTURBATIONS against `pipeline`, the base model: from a random start
    within the budget, `steps` steps of `step_size` grey levels along the gradient's sign. h and w are multiples of the
    autoencoder's and the network's factor. caption: what images are shown to the base model under. numbers: of the
    pictures, by which they own their draws (0, 1, ... if None), so that a picture's result does not depend on the others.
    `progress` is called after each step. ValueError for an unknown method, a budget outside 1..255 or other bad numbers.
    """
    check_perturbation(method, eps, steps, step_size)
    vae, of = pipeline.vae, range(len(pictures)) if numbers is None else numbers
    kept = [part for part in (vae, network(pipeline)) for part in part.parameters() if part.requires_grad]
    condition = encode(pipeline, caption)
    pixels = torch.tensor(pictures).permute(0, 3, 1, 2).to(vae.device, vae.dtype)
    low, high = (pixels - eps).clamp(min=0), (pixels + eps).clamp(max=255)
    start = [np.random.default_rng([seed, n]).uniform(-eps, eps, pixels.shape[1:]) for n in of]
    changed = (pixels + torch.from_numpy(np.stack(start)).to(pixels)).clamp(low, high)
    for part in kept:
        part.requires_grad_(False)
    try:
        for step in range(steps):
            at = changed.clone().requires_grad_()
            gain = PERTURBATIONS[method].gain(
                pipeline, at / 127.5 - 1, condition, _draws(pipeline, pixels, seed, of, step)
            )
            (slope,) = torch.autograd.grad(gain.sum(), at)
            changed = (changed + step_size * slope.sign()).clamp(low, high)
            progress()
    finally:
        for part in kept:
            part.requires_grad_(True)
    return changed.round().byte().permute(0, 2, 3, 1).cpu().numpy()


def check_perturbation(method: str, eps: int, steps: int, step_size: float, seed: int = 0) -> None:
    """ValueError for what `perturb` cannot do."""
    if method not in PERTURBATIONS:
        raise ValueError(f"unknown perturbation {method!r}: choose from {', '.join(PERTURBATIONS)}")
    if int(eps) != eps or not 1 <= eps <= 255:
        raise ValueError(f"eps {eps} must be a whole number of grey levels, 1 to 255 (8 is hardly seen, 16 is)")
    if steps < 1 or not 0 < step_size <= 255:
        raise ValueError(f"steps {steps} must be at least 1, step_size {step_size} above 0 and at most 255 grey levels")
    if seed < 0:
        raise ValueError(f"seed {seed} must be at least 0")


def _draws(pipeline: DiffusionPipeline, pixels: Tensor, seed: int, numbers: Sequence[int], step: int) -> Draws:
    """The draws of one step: picture n has those of (seed, n, step), on any device and in any batch."""
    factor, channels = pipeline.vae_scale_factor, pipeline.vae.config.latent_channels
    shape = (channels, pixels.shape[2] // factor, pixels.shape[3] // factor)
    own = [np.random.default_rng([seed, n, step]) for n in numbers]
    t = torch.tensor([int(draw.integers(pipeline.scheduler.config.num_train_timesteps)) for draw in own])
    noise = torch.from_numpy(np.stack([draw.standard_normal((2, *shape), np.float32) for draw in own])).to(pixels)
    return Draws(t.to(pixels.device), noise[:, 0], noise[:, 1])


# Purifications: what whoever trains may do against perturbations


def jpeg(pictures: np.ndarray, quality: int = 75) -> np.ndarray:
    """Saved as JPEG of this quality (1 to 95) and read again, uint8 [n, h, w, 3]."""
    again = []
    for picture in pictures:
        Image.fromarray(picture).save(file := BytesIO(), "JPEG", quality=quality)
        again.append(np.asarray(Image.open(file).convert("RGB")))
    return np.stack(again)


def blur(pictures: np.ndarray, sigma: float = 1.0) -> np.ndarray:
    """Gaussian blur of this standard deviation in pixels, uint8 [n, h, w, 3]."""
    return np.stack(
        [np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(sigma))) for picture in pictures]
    )


def noise_and_resize(pictures: np.ndarray, sigma: float = 8.0, share: float = 0.5, seed: int = 0) -> np.ndarray:
    """Gaussian noise of `sigma` grey levels, shrunk to `share` of the side and enlarged again, uint8 [n, h, w, 3]."""
    draw, again = np.random.default_rng(seed), []
    for picture in pictures:
        noisy = (picture + draw.normal(0, sigma, picture.shape)).round().clip(0, 255).astype(np.uint8)
        size = [max(1, round(side * share)) for side in (picture.shape[1], picture.shape[0])]
        small = Image.fromarray(noisy).resize(size, Image.Resampling.LANCZOS)
        again.append(np.asarray(small.resize(picture.shape[1::-1], Image.Resampling.BICUBIC)))
    return np.stack(again)


def regenerate(
    pipeline: DiffusionPipeline,
    pictures: np.ndarray,
    strength: float = 0.2,
    caption: str = "",
    seed: int = 0,
    steps: int = 50,
) -> np.ndarray:
    """Noised to `strength` (0 to 1) of the base model's way and denoised by it, uint8 [n, h, w, 3].

    Diffusion purification (Nie et al., 2022) by diffusers' own image-to-image pipeline, without guidance.
    """
    made = AutoPipelineForImage2Image.from_pipe(pipeline)
    made.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed * 1_000_003 + number) for number in range(len(pictures))]
    images = made(
        prompt=[caption] * len(pictures),
        image=pictures.astype(np.float32) / 255,
        strength=strength,
        num_inference_steps=steps,
        guidance_scale=1.0,
        generator=generators,
        output_type="np",
    ).images
    return (images * 255).round().astype(np.uint8)


def autoencoded(pipeline: DiffusionPipeline, pictures: np.ndarray) -> np.ndarray:
    """Encoded and decoded again by the base model's autoencoder, uint8 [n, h, w, 3]."""
    with torch.no_grad():
        return to_uint8(round_trip(pipeline.vae, from_uint8(pictures)))


# name -> what it does; "name:strength" in place of the usual one
PURIFICATIONS = {
    "jpeg": Change(lambda pictures, q, _: jpeg(pictures, int(q)), usual=75, least=1, most=95, whole=True),
    "blur": Change(lambda pictures, sigma, _: blur(pictures, sigma), usual=1.0, least=0.1, most=50),
    "noise and resize": Change(
        lambda pictures, sigma, _: noise_and_resize(pictures, sigma), usual=8.0, least=0, most=255
    ),
    "autoencoder": Change(lambda pictures, _, pipeline: autoencoded(pipeline, pictures), usual=1, least=1, most=1),
    "regenerate": Change(
        lambda pictures, share, pipeline: regenerate(pipeline, pictures, share), usual=0.2, least=0.02, most=1.0
    ),
}


def check_purification(named: str) -> None:
    """ValueError for a purification that is not known, or not in this strength."""
    _named(named, "purification", PURIFICATIONS)


def purify(named: str, pictures: np.ndarray, pipeline: DiffusionPipeline) -> np.ndarray:
    """Pictures uint8 [n, h, w, 3] after a purification, "jpeg" or with a strength "jpeg:50"; the sizes stay.

    pipeline: the base model, whose autoencoder or network some of them use.
    """
    found, strength = _named(named, "purification", PURIFICATIONS)
    return found.change(pictures, strength, pipeline)
