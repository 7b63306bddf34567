"""How well each of two models denoises given latents: what membership tests, CGI-DM and refinement are made of."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fx.families import Condition, Noising, latent_statistics, noising
from fx.models import ModelPair

ROUNDING = 1e-5  # what of a gradient is nothing but rounding


@torch.no_grad()
def to_latents(pair: ModelPair, pixels: Tensor, chunk: int = 16) -> Tensor:
    """Images [n, 3, h, w] in [-1, 1] as the latents that theta' sees, scaled, without noise: [n, c, h', w']."""
    vae, (scale, shift) = pair.tuned.vae, latent_statistics(pair.tuned.vae)
    means = [vae.encode(part.to(vae.device, vae.dtype)).latent_dist.mode() for part in pixels.split(chunk)]
    return (torch.cat(means) - shift) * scale


def errors(
    pair: ModelPair, model: str, schedule: Noising, x0: Tensor, eps: Tensor, number: Tensor, condition: Condition
) -> Tensor:
    """The mean squared error of a model's prediction for each of x0 [n, c, h, w] with noise eps [c, h, w]: float64 [n].

    number: int64 [1], which of the schedule's noise levels.
    """
    t, noise = number.expand(len(x0)).to(x0.device), eps.expand_as(x0)
    predicted = pair.predict(model, schedule.add(x0, noise, t), schedule.timestep(t)[0], condition)
    return (predicted - schedule.target(x0, noise, t)).double().square().mean(dim=(1, 2, 3))


@torch.no_grad()
def log_ratios(
    pair: ModelPair, x0: Tensor, caption: str, levels: Sequence[float], draws: int, seed: int = 0, chunk: int = 32
) -> np.ndarray:
    """log L_theta - log L_theta' of latents x0 [n, c, h, w] at each level, the mean over draws: float64 [levels, n].

    levels: shares of the training schedule; both models see the caption, the same t and the same noise.
    """
    schedule = noising(pair.tuned)
    conditions = {model: pair.condition(model, caption) for model in ("base", "tuned")}
    found = np.zeros((len(levels), len(x0)))
    with tqdm(total=len(levels) * draws, desc="losses", mininterval=2, leave=False) as bar:
        for row, level in enumerate(levels):
            number = torch.tensor([round(level * (schedule.levels - 1))])
            for draw in range(draws):
                generator = torch.Generator().manual_seed(seed * 1_000_003 + 1_009 * row + draw)
                eps = torch.randn(x0.shape[1:], generator=generator).to(x0)
                for first in range(0, len(x0), chunk):
                    part = x0[first : first + chunk]
                    error = {
                        model: errors(pair, model, schedule, part, eps, number, conditions[model])
                        for model in conditions
                    }
                    ratio = error["base"].log() - error["tuned"].log()
                    found[row, first : first + chunk] += ratio.cpu().numpy() / draws
                bar.update()
    return found


def told_apart(difference: Tensor, one: Tensor) -> Tensor:
    """The difference of two gradients [n, c, h, w], one of which is given; 0 where they are equal but for rounding."""
    return torch.where(lengths(difference) > ROUNDING * lengths(one), difference, 0.0)


def lengths(x: Tensor) -> Tensor:
    """The length of each of x [n, c, h, w]: [n, 1, 1, 1]."""
    return x.flatten(1).norm(dim=1)[:, None, None, None]
