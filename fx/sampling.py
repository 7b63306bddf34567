"""One deterministic two-model sampler for all arms of a comparison (Sec. 4, 5.1).

All arms start from the same latents, walk the same timesteps of the same DDIM sampler and see the same caption; only
the noise prediction differs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fx import guidance, results
from fx.datasets import load_item, to_uint8
from fx.finetune import FineTune
from fx.models import ModelPair, encode_caption, load_pair

ARMS = {
    "direct": "theta' with the caption",
    "cfg": "classifier-free guidance within theta' (Eq. 8)",
    "finextract": "from theta without to theta' with the caption (Eq. 13)",
    "conditional_only": "from theta to theta', both with the caption (App. H)",
    "model_guidance": "from theta to theta', both without a caption (Eq. 6, App. C)",
}


@dataclass(frozen=True)
class Generate:
    """What to sample: N = images_per_training * N0 images of one arm.

    guidance_scale is w' (1 for direct), correction_scale is k (finextract only), steps are DDIM steps. Image i owns
    the seed (seed, i): its starting latent is the same in every arm and does not depend on N or the batch size.
    """

    finetune: FineTune
    arm: str = "finextract"
    guidance_scale: float = 3.0
    correction_scale: float = 0.0
    images_per_training: int = 50
    steps: int = 25
    seed: int = 0

    def __post_init__(self):
        check_arm(self.arm, self.guidance_scale, self.correction_scale)
        if self.images_per_training < 1 or not 1 <= self.steps < 1000:
            raise ValueError(
                f"images_per_training {self.images_per_training} must be at least 1, steps {self.steps} within 1..999"
            )


def check_arm(arm: str, w: float, k: float) -> None:
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
        scratch=results.scratch(spec),
    )
    np.save(folder / "images.npy", images)


def predictor(pair: ModelPair, caption: str, arm: str, w: float, k: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The guided noise prediction of an arm as a function (x_t, t) -> eps, both [n, c, h, w]."""
    check_arm(arm, w, k)
    text = encode_caption(pair.pipeline, "" if arm == "model_guidance" else caption)
    if arm == "direct":
        return lambda x, t: pair.tuned(x, t, text)
    empty = encode_caption(pair.pipeline, "")
    if arm == "cfg":
        return lambda x, t: guidance.classifier_free_guidance(pair.tuned(x, t, empty), pair.tuned(x, t, text), w)
    if arm == "finextract":
        return lambda x, t: guidance.finextract(pair.base(x, t, empty), pair.tuned(x, t, text), w, k)
    combine = guidance.conditional_only if arm == "conditional_only" else guidance.model_guidance
    return lambda x, t: combine(pair.base(x, t, text), pair.tuned(x, t, text), w)


def starting_latents(shape: tuple[int, ...], seed: int, first: int, last: int) -> Tensor:
    """x_T of images first..last-1, float32 [last - first, *shape] standard normal; image i draws from (seed, i)."""
    draws = [np.random.default_rng([seed, index]).standard_normal(shape, np.float32) for index in range(first, last)]
    return torch.from_numpy(np.stack(draws))


@torch.no_grad()
def ddim(
    predict: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    scheduler,
    steps: int,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Walk DDIM (eta 0) from x_T to x_0: x [n, c, h, w]; `callback(timestep, x)` after each step."""
    scheduler.set_timesteps(steps, device=x.device)
    for t in scheduler.timesteps:
        x = scheduler.step(predict(x, t), t, x).prev_sample
        if callback is not None:
            callback(int(t), x)
    return x


def sample(
    pair: ModelPair,
    caption: str,
    n: int,
    arm: str = "finextract",
    w: float = 3.0,
    k: float = 0.0,
    steps: int = 25,
    seed: int = 0,
    batch_size: int = 50,
    scratch: Path | None = None,
) -> np.ndarray:
    """Sample n images of one arm, uint8 [n, h, w, 3].

    Finished batches lie in `scratch` and are not sampled again. A batch that does not fit into memory is halved.
    """
    predict = predictor(pair, caption, arm, w, k)
    images, bar = [], tqdm(total=n, desc=f"{arm} {caption}"[:40], mininterval=2, leave=False)
    while (first := sum(map(len, images))) < n:
        file = scratch / f"{first:06d}.npy" if scratch else None
        if file and file.exists():
            images.append(np.load(file))
        else:
            try:
                images.append(_sample_batch(pair, predict, first, min(first + batch_size, n), steps, seed))
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


@torch.no_grad()
def _sample_batch(pair: ModelPair, predict, first: int, last: int, steps: int, seed: int) -> np.ndarray:
    pipeline = pair.pipeline
    config = pipeline.unet.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    x = starting_latents(shape, seed, first, last).to(pipeline.device) * pipeline.scheduler.init_noise_sigma
    x = ddim(predict, x, pipeline.scheduler, steps)
    return to_uint8(decode(pipeline, x))


@torch.no_grad()
def decode(pipeline, latents: Tensor, chunk: int = 16) -> Tensor:
    """Scaled latents [n, c, h, w] to images [n, 3, H, W] in [-1, 1], `chunk` at a time."""
    vae = pipeline.vae
    return torch.cat([vae.decode(part / vae.config.scaling_factor).sample for part in latents.split(chunk)])
