"""Random picture transforms on batches, drawn from an explicit generator: float32 [n, 3, h, w] in [-1, 1]."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def to_float(pictures: Tensor) -> Tensor:
    """uint8 [n, 3, h, w] in 0..255 to float32 in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def uniform(n: int, low: float, high: float, rng: torch.Generator) -> Tensor:
    """n numbers between low and high."""
    return torch.rand(n, generator=rng) * (high - low) + low


def warp(x: Tensor, rng: torch.Generator, zoom=(0.9, 1.1), turn: float = 0.0, shift: float = 0.05, mirror=True):
    """Random zoom (above 1 magnifies), rotation (degrees), shift (share of the width) and mirroring; white outside."""
    n = len(x)
    scale = 1 / torch.exp(uniform(n, math.log(zoom[0]), math.log(zoom[1]), rng))
    angle = uniform(n, -turn, turn, rng) * math.pi / 180
    flip = torch.where(torch.rand(n, generator=rng) < 0.5, -1.0, 1.0) if mirror else torch.ones(n)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = scale * angle.cos() * flip, -scale * angle.sin()
    theta[:, 1, 0], theta[:, 1, 1] = scale * angle.sin() * flip, scale * angle.cos()
    theta[:, :, 2] = torch.stack([uniform(n, -2 * shift, 2 * shift, rng) for _ in range(2)], dim=1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x - 1, grid, align_corners=False) + 1  # zero padding is white


def recolour(x: Tensor, rng: torch.Generator, strength: float = 0.4) -> Tensor:
    """Random brightness, contrast and channel mixing."""
    n = len(x)
    gain = 1 + uniform(n, -strength, strength, rng)
    bias = uniform(n, -strength, strength, rng)
    mix = torch.eye(3) + uniform(9 * n, -strength / 2, strength / 2, rng).view(n, 3, 3)
    mixed = torch.einsum("nij,njhw->nihw", mix / mix.sum(2, keepdim=True).clamp(min=0.2), x)
    return (gain.view(-1, 1, 1, 1) * mixed + bias.view(-1, 1, 1, 1)).clamp(-1, 1)


def jitter(x: Tensor, rng: torch.Generator) -> Tensor:
    """The mild augmentation of training: small zoom and shift, mirroring."""
    return warp(x, rng)


def blur(x: Tensor, rng: torch.Generator) -> Tensor:
    """Down- and upsampling by a random factor from 2 to 5 (one factor for the batch)."""
    side = int(x.shape[-1] / uniform(1, 2, 5, rng).item())
    return F.interpolate(F.interpolate(x, size=side, mode="area"), size=x.shape[-1], mode="bilinear")


def noise(x: Tensor, rng: torch.Generator, high: float = 0.6) -> Tensor:
    """Gaussian noise of a random strength up to `high` per picture."""
    level = uniform(len(x), 0.1, high, rng).view(-1, 1, 1, 1)
    return (x + level * torch.randn(x.shape, generator=rng)).clamp(-1, 1)


def cover(x: Tensor, rng: torch.Generator, high: float = 0.5) -> Tensor:
    """A rectangle of random size (up to `high` of the side), place and colour over each picture."""
    n, _, h, w = x.shape
    size = uniform(2 * n, 0.15, high, rng).view(2, n)
    start = torch.rand(2, n, generator=rng) * (1 - size)
    axes = [torch.arange(side)[None] / side for side in (h, w)]
    inside = [(a >= s[:, None]) & (a < (s + z)[:, None]) for a, s, z in zip(axes, start, size, strict=True)]
    mask = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    colour = uniform(3 * n, -1, 1, rng).view(n, 3, 1, 1)
    return torch.where(mask, colour, x)


def corrupt(x: Tensor, rng: torch.Generator) -> Tensor:
    """One of blur, noise, covering, or blur with noise for each picture, in equal shares."""
    options = torch.stack([blur(x, rng), noise(x, rng), cover(x, rng), noise(blur(x, rng), rng, 0.3)])
    kind = torch.randint(len(options), (len(x),), generator=rng)
    return options[kind, torch.arange(len(x))]
