"""mini-sscd: a copy-detection descriptor trained by SSCD's recipe (Pizzi et al., 2022).

Contrastive learning over copies of a picture, mixed pictures with two right answers, and the entropy term that pushes
nearest neighbours apart, so that unrelated pictures come out near cosine 0.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fx.mini.pictures import blur, cover, noise, recolour, to_float, warp
from fx.similarity import MiniSSCD


def copy(x: Tensor, rng: torch.Generator) -> Tensor:
    """What somebody might do to a picture and still call it a copy: each edit with a chance of its own."""
    x = warp(x, rng, zoom=(0.75, 1.3), turn=10, shift=0.08)
    for edit, chance in ((recolour, 0.5), (blur, 0.4), (noise, 0.3), (cover, 0.3)):
        edited = edit(x, rng)
        x = torch.where((torch.rand(len(x), generator=rng) < chance)[:, None, None, None], edited, x)
    return x


def mix(x: Tensor, rng: torch.Generator, share: float = 0.5) -> tuple[Tensor, Tensor]:
    """Blend a `share` of the batch with its neighbour in the batch; the pictures and the target matrix [n, n].

    Row i of the targets says which originals picture i shows, and how much of each (mixup; half of the mixed ones are
    put side by side instead, as in CutMix).
    """
    n, width = len(x), x.shape[-1]
    keep = torch.rand(n, generator=rng) * 0.5 + 0.5
    keep = torch.where(torch.rand(n, generator=rng) < share, keep, 1.0)
    column = torch.arange(width)[None] < (keep * width).round()[:, None]
    beside = torch.where(column[:, None, None, :], x, x.roll(1, 0))
    blend = keep.view(n, 1, 1, 1) * x + (1 - keep.view(n, 1, 1, 1)) * x.roll(1, 0)
    pick = (torch.rand(n, generator=rng) < 0.5).view(n, 1, 1, 1)
    return torch.where(pick, beside, blend), torch.diag(keep) + torch.diag(1 - keep).roll(-1, 1)


def copy_loss(pictures: Tensor, batch: int = 128, temperature: float = 0.05, entropy: float = 3.0):
    """The loss function for `training.train`: InfoNCE with mixed targets plus entropy * KoLeo.

    pictures: uint8 [n, 3, 64, 64].
    """

    def loss(model: MiniSSCD, rng: torch.Generator) -> dict[str, Tensor]:
        chosen = to_float(pictures[torch.randperm(len(pictures), generator=rng)[:batch]])
        mixed, targets = mix(copy(chosen, rng), rng)
        a, b = model(torch.cat([mixed, copy(chosen, rng)])).chunk(2)
        logits = a @ b.T / temperature
        contrast = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, _rows(targets.T))) / 2
        off = (b @ b.T).fill_diagonal_(-1).amax(dim=1)
        koleo = -torch.log((2 - 2 * off).clamp(min=1e-6).sqrt()).mean()
        hit = (logits.argmax(1) == targets.argmax(1)).float().mean()
        return {"loss": contrast + entropy * koleo, "contrast": contrast, "koleo": koleo, "hit": hit}

    return loss


def _rows(targets: Tensor) -> Tensor:
    return targets / targets.sum(dim=1, keepdim=True)


@torch.no_grad()
def settle_statistics(model: MiniSSCD, pictures: Tensor, batches: int = 40) -> MiniSSCD:
    """Measure the batch-norm statistics of averaged weights anew, on copies; returns the model in eval mode."""
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None
    model.train()
    for index in range(batches):
        rng = torch.Generator().manual_seed(index)
        model(copy(to_float(pictures[torch.randperm(len(pictures), generator=rng)[:128]]), rng))
    return model.eval()


@torch.no_grad()
def describe(model: MiniSSCD, pictures: Tensor, batch: int = 256) -> Tensor:
    """Descriptors float32 [n, d] of pictures uint8 [n, 3, h, w]."""
    return torch.cat([model(to_float(part)) for part in pictures.split(batch)])


@torch.no_grad()
def copy_scores(model: MiniSSCD, pictures: Tensor, titles: list[str], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of each picture with a copy of itself [n], and of all pairs of pictures with different titles [m]."""
    original = describe(model, pictures)
    rng = torch.Generator().manual_seed(seed)
    copied = torch.cat([model(copy(to_float(part), rng)) for part in pictures.split(256)])
    names = np.unique(titles, return_inverse=True)[1]
    first, second = np.triu_indices(len(names), 1)
    different = names[first] != names[second]
    pairs = (original @ original.T).numpy()[first[different], second[different]]
    return (original * copied).sum(dim=1).numpy(), pairs
