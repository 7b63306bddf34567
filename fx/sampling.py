"""One deterministic two-model sampler for all arms of a comparison (Sec. 4, 5.1).

All arms start from the same latents, walk the same timesteps of the same sampler and see the same caption; only the
prediction differs. An arm is a pair of predictions, `reference` and `target`, from the first of which the sampler
extrapolates through the second.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import PNDMScheduler
from torch import Tensor
from tqdm import tqdm

from fx import guidance, results
from fx.datasets import load_item, to_uint8
from fx.families import SAMPLERS, decode, latent_shape, make_scheduler
from fx.finetune import FineTune
from fx.models import ModelPair, load_pair

Predict = Callable[[Tensor, Tensor], Tensor]  # (x_t, t) -> prediction, both [n, c, h, w]
Scale = float | Sequence[float] | Callable[[float], float]  # a number, one per step, or a function of the timestep


@dataclass(frozen=True)
class Arm:
    """A way of sampling: the model ("base" or "tuned") and whether it sees the caption, for reference and target."""

    meaning: str
    reference: tuple[str, bool] | None
    target: tuple[str, bool]


ARMS = {
    "direct": Arm("theta' with the caption", None, ("tuned", True)),
    "cfg": Arm("classifier-free guidance within theta' (Eq. 8)", ("tuned", False), ("tuned", True)),
    "finextract": Arm("from theta without to theta' with the caption (Eq. 13)", ("base", False), ("tuned", True)),
    "conditional_only": Arm("from theta to theta', both with the caption (App. H)", ("base", True), ("tuned", True)),
    "model_guidance": Arm("from theta to theta', both without (Eq. 6, App. C)", ("base", False), ("tuned", False)),
}


@dataclass(frozen=True)
class Generate:
    """What to sample: N = images_per_training * N0 images of one arm.

    guidance_scale is w' (1 for direct), correction_scale is k (finextract only), both a number or one per step; steps are
    sampling steps. Image i owns the seed (seed, i): its starting latent is the same in every arm and does not depend on N
    or the batch size.
    """

    finetune: FineTune
    arm: str = "finextract"
    guidance_scale: float | tuple[float, ...] = 3.0
    correction_scale: float | tuple[float, ...] = 0.0
    images_per_training: int = 50
    steps: int = 25
    seed: int = 0
    sampler: str = "ddim"

    def __post_init__(self):
        check_arm(self.arm, self.guidance_scale, self.correction_scale)
        if self.images_per_training < 1 or not 1 <= self.steps < 1000:
            raise ValueError(
                f"images_per_training {self.images_per_training} must be at least 1, steps {self.steps} within 1..999"
            )
        if self.seed < 0:
            raise ValueError(f"seed {self.seed} must be at least 0")
        if self.sampler not in SAMPLERS:
            raise ValueError(f"unknown sampler {self.sampler!r}: choose from {', '.join(SAMPLERS)}")
        for name in ("guidance_scale", "correction_scale"):
            values = scale_values(getattr(self, name), range(self.steps), name)
            if self.sampler == "published" and len(set(values)) > 1:
                raise ValueError(f"the published sampler has one {name} for all steps")


def check_arm(arm: str, w: Scale, k: Scale) -> None:
    """ValueError for an unknown arm or a scale that the arm would not use."""
    if arm not in ARMS:
        raise ValueError(f"unknown arm {arm!r}: choose from {', '.join(ARMS)}")
    if arm == "direct" and w != 1.0:
        raise ValueError(f"direct sampling has no guidance: its guidance scale is 1.0, not {w}")
    if arm != "finextract" and k != 0.0:
        raise ValueError(f"the correction scale {k} is a term of Eq. 13: only the arm finextract has one")


@results.perform.register
def _(spec: Generate, folder: Path) -> None:
    """Write images.npy, uint8 [N, h, w, 3]."""
    item = load_item(spec.finetune.item, spec.finetune.caption)
    pair = load_pair(spec.finetune.base, results.complete(spec.finetune))
    images = sample(
        pair,
        item.caption,
        n=spec.images_per_training * item.n_training,
        arm=spec.arm,
        w=spec.guidance_scale,
        k=spec.correction_scale,
        steps=spec.steps,
        seed=spec.seed,
        sampler=spec.sampler,
        scratch=results.scratch(spec),
    )
    np.save(folder / "images.npy", images)


# The core: two predictions, one walk


def scale_values(scale: Scale, timesteps: Sequence[float], name: str = "scale") -> list[float]:
    """The scale at each step: a number, one number per step, or a function of the timestep (first to last).

    Raises ValueError for a sequence of another length and for a value that is not finite.
    """
    if callable(scale):
        values = [float(scale(float(t))) for t in timesteps]
    elif isinstance(scale, Sequence | np.ndarray | Tensor) and np.ndim(scale) == 1:
        values = [float(value) for value in scale]
    else:
        values = [float(scale)] * len(timesteps)
    if len(values) != len(timesteps):
        raise ValueError(f"the {name} has {len(values)} values for {len(timesteps)} sampling steps: give one per step")
    if bad := [value for value in values if not math.isfinite(value)]:
        raise ValueError(f"the {name} must be finite at every step, not {bad[0]}")
    return values


def sample_latents(
    reference: Predict | None,
    target: Predict,
    x: Tensor,
    scheduler,
    steps: int,
    w: Scale = 1.0,
    k: Scale = 0.0,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Walk from x_T to x_0, both [n, c, h, w], guided by two models given as functions (x_t, t) -> prediction.

    The prediction of each step is reference + w (target - reference) + k * (the reference's noise), Eq. 13; without a
    reference it is the target's own. Both models predict what `scheduler` expects (its prediction_type). w and k are
    numbers, one number per step, or functions of the timestep. `scheduler` is one of diffusers' (DDIMScheduler,
    DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler) or `ReleasedDDIM`. Latents stay in x's
    precision, float32 or better. `callback(timestep, x)` is called after each step.
    """

    def predict(x: Tensor, t: Tensor) -> tuple[Tensor | None, Tensor]:
        return reference(x, t) if reference is not None else None, target(x, t)

    return walk(predict, x, scheduler, steps, w, k, callback)


@torch.no_grad()
def walk(
    predict: Callable[[Tensor, Tensor], tuple[Tensor | None, Tensor]],
    x: Tensor,
    scheduler,
    steps: int,
    w: Scale = 1.0,
    k: Scale = 0.0,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """`sample_latents` for one function that returns both predictions, (reference or None, target), at once."""
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"latents must be float32 or float64, not {x.dtype}: guidance amplifies rounding errors")
    scheduler.set_timesteps(steps, device=x.device)
    scales = scale_values(w, scheduler.timesteps, "guidance scale w'")
    corrections = scale_values(k, scheduler.timesteps, "correction scale k")
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    for step, t in enumerate(scheduler.timesteps):
        reference, target = (None if part is None else part.to(x.dtype) for part in predict(x, t))
        if reference is not None:
            alpha, sigma = noise_level(scheduler, step, t)
            target = guidance.finextract(reference, target, scales[step], corrections[step], kind, x, alpha, sigma)
        x = scheduler.step(target, t, x).prev_sample
        if callback is not None:
            callback(int(t), x)
    return x


def noise_level(scheduler, step: int, t: Tensor) -> tuple[float, float]:
    """alpha and sigma of x_t = alpha x0 + sigma eps before step number `step`, at timestep t."""
    if hasattr(scheduler, "alphas_cumprod"):
        kept = float(scheduler.alphas_cumprod[int(t)])
        return kept**0.5, (1 - kept) ** 0.5
    sigma = float(scheduler.sigmas[step])
    return 1 - sigma, sigma


class ReleasedDDIM:
    """The hand-written DDIM step of the authors' code, quirks included, with the interface of a diffusers scheduler.

    It walks the first `steps` of PNDM's steps + 1 timesteps (for Stable Diffusion 981, 961, 961, 941, ..., 21), so that
    the second is visited twice and the last, 1, never; each step leads to timestep max(1, t - 1000 // steps); and what
    is there after the last step, at timestep 1, is decoded as if it were clean.
    """

    def __init__(self, pndm: PNDMScheduler):
        self._pndm = pndm
        self.config, self.alphas_cumprod = pndm.config, pndm.alphas_cumprod

    def set_timesteps(self, steps: int, device=None) -> None:
        self._pndm.set_timesteps(steps, device=device)
        self.timesteps = self._pndm.timesteps[:steps]
        self.stride = self.config.num_train_timesteps // steps

    def step(self, eps: Tensor, t: Tensor, x: Tensor):
        now, then = (self.alphas_cumprod[i].to(x) for i in (int(t), max(1, int(t) - self.stride)))
        x0 = (x - (1 - now).sqrt() * eps) / now.sqrt()
        return _Step(then.sqrt() * x0 + (1 - then).sqrt() * eps)


@dataclass(frozen=True)
class _Step:
    prev_sample: Tensor


def arm_scheduler(pipeline, sampler: str, arm: str):
    """The scheduler of an arm: the same for all, but for `published`, where direct and cfg keep the stock PNDM."""
    scheduler = make_scheduler(pipeline, sampler)
    return ReleasedDDIM(scheduler) if sampler == "published" and arm not in ("direct", "cfg") else scheduler


# Images of a model pair


def predictor(pair: ModelPair, caption: str, arm: str):
    """The two predictions of an arm as one function (x_t, t) -> (reference or None, target)."""
    return pair.predictions(ARMS[arm].reference, ARMS[arm].target, caption)


def starting_latents(shape: tuple[int, ...], seed: int, first: int, last: int) -> Tensor:
    """x_T of images first..last-1, float32 [last - first, *shape] standard normal; image i draws from (seed, i)."""
    draws = [np.random.default_rng([seed, index]).standard_normal(shape, np.float32) for index in range(first, last)]
    return torch.from_numpy(np.stack(draws))


def sample(
    pair: ModelPair,
    caption: str,
    n: int,
    arm: str = "finextract",
    w: Scale = 3.0,
    k: Scale = 0.0,
    steps: int = 25,
    seed: int = 0,
    sampler: str = "ddim",
    batch_size: int = 50,
    decode_chunk: int = 16,
    scratch: Path | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> np.ndarray:
    """Sample n images of one arm, uint8 [n, h, w, 3].

    sampler: see `fx.families.make_scheduler`; "published" reproduces the authors' code, see `ReleasedDDIM`. Finished
    batches lie in `scratch` and are not sampled again. A batch that does not fit into memory is halved. `decode_chunk`
    images are decoded at a time.
    """
    check_arm(arm, w, k)
    scheduler = arm_scheduler(pair.tuned, sampler, arm)
    predict = predictor(pair, caption, arm)
    walked = functools.partial(walk, predict, scheduler=scheduler, steps=steps, w=w, k=k, callback=callback)
    images, bar = [], tqdm(total=n, desc=f"{arm} {caption}"[:40], mininterval=2, leave=False)
    while (first := sum(map(len, images))) < n:
        file = scratch / f"{first:06d}.npy" if scratch else None
        if file and file.exists():
            images.append(np.load(file))
        else:
            try:
                images.append(_sample_batch(pair, walked, first, min(first + batch_size, n), seed, decode_chunk))
            except torch.OutOfMemoryError:
                if batch_size == 1:
                    raise
                torch.cuda.empty_cache()
                batch_size //= 2
                continue
            if file:
                np.save(part := file.with_suffix(".part.npy"), images[-1])
                part.rename(file)
        bar.update(len(images[-1]))
    bar.close()
    return np.concatenate(images)


def _sample_batch(pair: ModelPair, walked, first: int, last: int, seed: int, decode_chunk: int) -> np.ndarray:
    x = starting_latents(latent_shape(pair.tuned), seed, first, last).to(pair.tuned.device)
    return to_uint8(decode(pair.tuned, walked(x), decode_chunk))
