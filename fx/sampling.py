"""One deterministic two-model sampler for all arms of a comparison (Sec. 4, 5.1).

All arms start from the same latents, walk the same timesteps of the same sampler and see the same caption; only the
prediction differs. An arm is a pair of predictions, `reference` and `target`, from the first of which the sampler
extrapolates through the second.
"""

import contextlib
import functools
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from diffusers import PNDMScheduler
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from fx import guidance, results
from fx.datasets import to_uint8
from fx.families import SAMPLERS, decode, latent_shape, make_scheduler, network
from fx.models import PRECISIONS, ModelPair, check_fits
from fx.tuned import Tuned, kept_pair, own_caption

SHARE = 50  # images of one part of a Generate, where several workers are at work on it
BLOCK = 10  # images that a Generate samples at a time: the last bits of a prediction depend on the size of its batch
Predict = Callable[[Tensor, Tensor], Tensor]  # (x_t, t) -> prediction, both [n, c, h, w]
Scale = float | Sequence[float] | Callable[[float], float]  # a number, one per step, or a function of the timestep


@dataclass(frozen=True)
class Arm:
    """A way of sampling: the model ("base" or "tuned") and whether it sees the caption, for reference and target.

    text: the model whose step from no caption to the caption is a third term, with a scale of its own; None for no such.
    """

    meaning: str
    reference: tuple[str, bool] | None
    target: tuple[str, bool]
    text: str | None = None

    @property
    def ends(self) -> tuple[tuple[str, bool], ...]:
        """All predictions that enter, each once."""
        third = (ORIGIN, (self.text, False), (self.text, True)) if self.text else ()
        return tuple(dict.fromkeys(end for end in (self.reference, self.target, *third) if end))

    @property
    def predictions(self) -> int:
        """How many evaluations of a network a step takes for one image."""
        return len(self.ends)


STOCK = ("direct", "cfg")  # arms that the published code samples with the pipeline's own scheduler
ORIGIN = ("base", False)  # where guidance starts: theta without the caption
ARMS = {
    "direct": Arm("theta' with the caption", None, ("tuned", True)),
    "cfg": Arm("classifier-free guidance within theta' (Eq. 8)", ("tuned", False), ("tuned", True)),
    "finextract": Arm("from theta without to theta' with the caption (Eq. 13)", ("base", False), ("tuned", True)),
    "conditional_only": Arm("from theta to theta', both with the caption (App. H)", ("base", True), ("tuned", True)),
    "model_guidance": Arm("from theta to theta', both without (Eq. 6, App. C)", ("base", False), ("tuned", False)),
    # Eq. 13's step from theta without to theta' with the caption, in two legs, each with a scale: by either of two corners
    "caption_first": Arm("the caption's step in theta, then to theta'", ("base", True), ("tuned", True), "base"),
    "model_first": Arm("to theta', then the caption's step in theta'", ("base", False), ("tuned", False), "tuned"),
}


@dataclass(frozen=True)
class Generate:
    """What to sample: N = n_generated images of one arm.

    model: where theta' comes from; caption: None for the one it was fine-tuned with, "" for none; guidance_scale is w' (1
    for direct), correction_scale is k (finextract only), both a number or one per step; text_scale: of the caption's own
    step, in arms that have one (caption_first, model_first); steps are sampling steps; precision: of the networks
    ("float32", "bfloat16", "float16"), guidance is in float32 always.

    Image i owns the seed (seed, i): its starting latent is the same in every arm. Images are sampled in blocks of BLOCK
    consecutive ones, so that image i does not depend on N either, and a larger N takes over what was sampled for a
    smaller one.
    """

    GROWS: ClassVar[str] = "n_generated"
    VERSION: ClassVar[int] = 2  # 2: the networks' weights lie in channels_last

    model: Tuned
    arm: str = "finextract"
    guidance_scale: float | tuple[float, ...] = 3.0
    correction_scale: float | tuple[float, ...] = 0.0
    n_generated: int = 100
    caption: str | None = None
    steps: int = 25
    sampler: str = "ddim"
    precision: str = "float32"
    seed: int = 0
    text_scale: float = field(default=1.0, metadata={"absent": 1.0})

    def __post_init__(self):
        check_arm(self.arm, self.guidance_scale, self.correction_scale, self.text_scale)
        if self.n_generated < 1 or not 1 <= self.steps < 1000:
            raise ValueError(f"n_generated {self.n_generated} must be at least 1, steps {self.steps} within 1..999")
        if self.seed < 0:
            raise ValueError(f"seed {self.seed} must be at least 0")
        for name, known in (("sampler", SAMPLERS), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: choose from {', '.join(known)}")
        for name in ("guidance_scale", "correction_scale"):
            values = scale_values(getattr(self, name), range(self.steps), name)
            if self.sampler == "published" and len(set(values)) > 1:
                raise ValueError(f"the published sampler has one {name} for all steps")


def check_arm(arm: str, w: Scale, k: Scale, text_scale: float = 1.0) -> None:
    """ValueError for an unknown arm or a scale that the arm would not use."""
    if arm not in ARMS:
        raise ValueError(f"unknown arm {arm!r}: choose from {', '.join(ARMS)}")
    if arm == "direct" and w != 1.0:
        raise ValueError(f"direct sampling has no guidance: its guidance scale is 1.0, not {w}")
    if arm != "finextract" and k != 0.0:
        raise ValueError(f"the correction scale {k} is a term of Eq. 13: only the arm finextract has one")
    if ARMS[arm].text is None and text_scale != 1.0:
        with_text = " and ".join(name for name, own in ARMS.items() if own.text)
        raise ValueError(
            f"text_scale {text_scale} would not be used: the arms with a scale of the caption are {with_text}"
        )
    if not math.isfinite(text_scale):
        raise ValueError(f"text_scale must be finite, not {text_scale}")


def prompt(spec: Generate) -> str:
    """The caption that images are sampled with; ValueError where none is given and none or several are known."""
    if spec.caption is not None:
        return spec.caption
    caption = own_caption(spec.model)
    if caption is None:
        raise ValueError(f"no single caption is known of {spec.model}: give Generate a caption, or caption='' for none")
    return caption


@results.inputs.register
def _(spec: Generate) -> dict[str, str]:
    check_fits(spec.model.base, prompt(spec))
    return {}


@results.perform.register
def _(spec: Generate, folder: Path) -> None:
    """Write image i as <i>.png, six digits, in the work area's scratch folder first, where an interrupted run goes on.

    A block is sampled whole, whatever N; its images beyond N are not kept.
    """
    scratch = results.scratch(spec)
    _take_over(spec, scratch)
    if starts := _missing(spec, scratch, 0, spec.n_generated):
        _sample_blocks(spec, starts, scratch)
    for number in range(spec.n_generated):
        _put(picture_file(scratch, number), picture_file(folder, number))


def _put(source: Path, target: Path) -> None:
    """The file under a second name, or a copy where there are no links; scratch keeps it until the step is published."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, part := target.with_suffix(f".part-{os.getpid()}"))
        part.rename(target)


@results.parts.register
def _(spec: Generate) -> list[tuple[int, int]]:
    """Ranges of SHARE images, (first, end), where there are more than that."""
    if spec.n_generated <= SHARE:
        return []
    return [(first, min(first + SHARE, spec.n_generated)) for first in range(0, spec.n_generated, SHARE)]


@results.perform_part.register
def _(spec: Generate, first: int, end: int) -> None:
    """Sample the images from `first` to before `end` that are not there yet."""
    scratch = results.scratch(spec)
    _take_over(spec, scratch)
    if starts := _missing(spec, scratch, first, end):
        _sample_blocks(spec, starts, scratch)


def _missing(spec: Generate, scratch: Path, first: int, end: int) -> list[int]:
    """Where blocks begin of which images from `first` (a multiple of BLOCK) to before `end` are missing in `scratch`."""
    return [
        start
        for start in range(first, end, BLOCK)
        if any(not picture_file(scratch, i).exists() for i in range(start, min(start + BLOCK, spec.n_generated)))
    ]


def _sample_blocks(spec: Generate, starts: list[int], scratch: Path) -> None:
    """Sample the blocks that begin at `starts` and keep their images below N in `scratch`."""
    pair = kept_pair(spec.model, PRECISIONS[spec.precision])
    for pipeline in (pair.base, pair.tuned):
        network(pipeline).to(memory_format=torch.channels_last)  # in which CPUs are a tenth faster
    sampler = batch_sampler(
        pair,
        prompt(spec),
        spec.arm,
        spec.guidance_scale,
        spec.correction_scale,
        spec.steps,
        spec.sampler,
        text_scale=spec.text_scale,
    )
    title = f"{spec.arm} {prompt(spec)}"[:40]
    with tqdm(total=len(starts) * BLOCK, desc=title, mininterval=2, leave=False) as bar:
        for first in starts:
            for number, pixels in enumerate(sampler(range(first, first + BLOCK), spec.seed), first):
                if number < spec.n_generated:
                    save_picture(picture_file(scratch, number), pixels)
            bar.update(BLOCK)


def _take_over(spec: Generate, scratch: Path) -> None:
    """Put what was sampled for other N into `scratch`, as links where the file system has them."""
    for other in results.relatives(spec):
        for file in sorted(other.glob("[0-9]*.png")):
            if int(file.stem) < spec.n_generated and not (target := scratch / file.name).exists():
                _put(file, target)


def evaluations(spec: Generate) -> int:
    """How many evaluations of a network for one image a Generate takes: one per image, step and prediction of its arm.

    The published sampler of direct and cfg, the stock PNDM, walks a step more than it is asked for.
    """
    walked = spec.steps + (spec.sampler == "published" and spec.arm in STOCK)
    return spec.n_generated * walked * ARMS[spec.arm].predictions


def picture_file(folder: Path, number: int) -> Path:
    """Where image `number` of a finished Generate lies."""
    return folder / f"{number:06d}.png"


def save_picture(path: Path, pixels: np.ndarray) -> None:
    """Write one image uint8 [h, w, 3] without loss, whole or not at all."""
    Image.fromarray(pixels).save(part := path.with_suffix(f".part-{os.getpid()}"), format="PNG")
    part.rename(path)


def generated_pictures(spec: Generate, numbers: Sequence[int] | None = None) -> np.ndarray:
    """Images of a Generate (all, or those of the given numbers), uint8 [n, h, w, 3]; made now if they are not there."""
    folder = results.complete(spec)
    chosen = range(spec.n_generated) if numbers is None else numbers
    return np.stack([np.asarray(Image.open(picture_file(folder, number))) for number in chosen])


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
    start: int = 0,
) -> Tensor:
    """`sample_latents` for one function that returns both predictions, (reference or None, target), at once.

    start: the number of the step to begin with, for an x that has the noise of that step (`noised`) and not all.
    """
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"latents must be float32 or float64, not {x.dtype}: guidance amplifies rounding errors")
    scheduler.set_timesteps(steps, device=x.device)
    scales = scale_values(w, scheduler.timesteps, "guidance scale w'")
    corrections = scale_values(k, scheduler.timesteps, "correction scale k")
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    begin_at(scheduler, start)
    for step, t in enumerate(scheduler.timesteps[start:], start):
        reference, target = (None if part is None else part.to(x.dtype) for part in predict(x, t))
        if reference is not None:
            alpha, sigma = noise_level(scheduler, step, t)
            target = guidance.finextract(reference, target, scales[step], corrections[step], kind, x, alpha, sigma)
        x = scheduler.step(target, t, x).prev_sample
        if callback is not None:
            callback(int(t), x)
    return x


def begin_at(scheduler, start: int) -> None:
    """Let a scheduler whose timesteps are set begin with step number `start`; ValueError for one that cannot."""
    if not 0 <= start < len(scheduler.timesteps):
        raise ValueError(f"there is no step {start} among {len(scheduler.timesteps)} sampling steps")
    if start and isinstance(scheduler, ReleasedDDIM | PNDMScheduler):
        raise ValueError("the published sampler cannot begin in the middle: choose another sampler")
    if start and hasattr(scheduler, "set_begin_index"):  # DDIM has no state, and is told the timestep
        scheduler.set_begin_index(start)


def noised(x0: Tensor, eps: Tensor, scheduler, start: int) -> Tensor:
    """x_t = alpha x0 + sigma eps at step number `start` of a scheduler whose timesteps are set, all [n, c, h, w]."""
    alpha, sigma = noise_level(scheduler, start, scheduler.timesteps[start])
    return alpha * x0 + sigma * eps


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
    return ReleasedDDIM(scheduler) if sampler == "published" and arm not in STOCK else scheduler


# Images of a model pair


def predictor(pair: ModelPair, caption: str, arm: str, text_scale: float = 1.0):
    """The two predictions of an arm as one function (x_t, t) -> (reference or None, target).

    Where the caption has a scale s of its own, the reference is theta's prediction without the caption plus s times the
    caption's step, and the target is that plus the step from theta to theta'. So with w' the whole is theta's + s * (the
    caption's step) + w' * (the models' step); with s = w' it is Eq. 13 without k.
    """
    own = ARMS[arm]
    if own.text is None:
        return pair.predictions(own.reference, own.target, caption)
    asked = {end: pair.predictions(None, end, caption) for end in own.ends}

    def predict(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        found = {end: predictions(x, t)[1].to(x.dtype) for end, predictions in asked.items()}
        reference = found[ORIGIN] + text_scale * (found[own.text, True] - found[own.text, False])
        return reference, reference + (found[own.target] - found[own.reference])

    return predict


def starting_latents(shape: tuple[int, ...], seed: int, numbers: Sequence[int]) -> Tensor:
    """x_T of the images of these numbers, float32 [n, *shape] standard normal; image i draws from (seed, i)."""
    draws = [np.random.default_rng([seed, number]).standard_normal(shape, np.float32) for number in numbers]
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
    callback: Callable[[int, Tensor], None] | None = None,
    text_scale: float = 1.0,
) -> np.ndarray:
    """Sample n images of one arm, uint8 [n, h, w, 3].

    sampler: see `fx.families.make_scheduler`; "published" reproduces the authors' code, see `ReleasedDDIM`. A batch that
    does not fit into memory is halved. `decode_chunk` images are decoded at a time. `callback` as in `sample_latents`.
    """
    of_batch = batch_sampler(pair, caption, arm, w, k, steps, sampler, decode_chunk, callback, text_scale)
    images = []
    with tqdm(total=n, desc=f"{arm} {caption}"[:40], mininterval=2, leave=False) as bar:
        for first in range(0, n, batch_size):
            images.append(of_batch(range(first, min(first + batch_size, n)), seed))
            bar.update(len(images[-1]))
    return np.concatenate(images)


def batch_sampler(
    pair: ModelPair,
    caption: str,
    arm: str,
    w: Scale,
    k: Scale,
    steps: int,
    sampler: str,
    decode_chunk: int = 16,
    callback: Callable[[int, Tensor], None] | None = None,
    text_scale: float = 1.0,
) -> Callable[[Sequence[int], int], np.ndarray]:
    """A function (numbers of images [n], seed) -> the images, uint8 [n, h, w, 3]; arguments as in `sample`."""
    check_arm(arm, w, k, text_scale)
    scheduler = arm_scheduler(pair.tuned, sampler, arm)
    predict = predictor(pair, caption, arm, text_scale)
    walked = functools.partial(walk, predict, scheduler=scheduler, steps=steps, w=w, k=k, callback=callback)

    def of_batch(numbers: Sequence[int], seed: int) -> np.ndarray:
        return np.concatenate(list(halved(lambda part: _sample_batch(pair, walked, part, seed, decode_chunk), numbers)))

    return of_batch


def halved(do: Callable, whole: Sequence | torch.Tensor) -> Iterator:
    """`do` of the whole batch, or, as long as memory does not suffice, of one half after the other, in order."""
    with contextlib.suppress(torch.OutOfMemoryError):
        yield do(whole)
        return
    torch.cuda.empty_cache()  # out here, where no traceback holds what was computed
    if len(whole) == 1:
        yield do(whole)  # once more, with all that is free now
        return
    middle = len(whole) // 2
    yield from halved(do, whole[:middle])
    yield from halved(do, whole[middle:])


def _sample_batch(pair: ModelPair, walked, numbers: Sequence[int], seed: int, decode_chunk: int) -> np.ndarray:
    x = starting_latents(latent_shape(pair.tuned), seed, numbers).to(pair.tuned.device)
    return to_uint8(decode(pair.tuned, walked(x), decode_chunk))
