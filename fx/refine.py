"""Extracted images made more like what they are copies of, by the two models alone (beyond the paper).

    Extract(generate, 10, refine=Consensus())       # from what neighbours have in common
    Extract(generate, 10, refine=Contrastive())     # down the difference of both models' losses

An extraction's centres are noisy copies of training images. Both ways start from their latents and ask theta and theta'
again. No training image is seen. What a way costs is counted in evaluations of a network for one image, a backward pass as
two; `fx.sampling.evaluations` counts what generation costs.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fx.families import decode, noising
from fx.losses import errors, told_apart
from fx.models import ModelPair
from fx.sampling import ARMS, BLOCK, Generate, arm_scheduler, halved, noised, predictor, prompt, walk

PER_STEP = 2 * 3  # evaluations of a step of Contrastive for one image: of both models, a forward and a backward pass


@dataclass(frozen=True)
class Consensus:
    """A centre is sampled again, from the mean latent of its nearest generated images with new noise.

    neighbours: how many images most like the centre are averaged with it; share: of the steps that are walked again, with
    the arm and scales of the Generate; draws: of the noise, whose ends are averaged.
    """

    neighbours: int = 5
    share: float = 0.6
    draws: int = 4

    def __post_init__(self):
        if self.neighbours < 0 or self.draws < 1 or not 0 < self.share < 1:
            raise ValueError(
                f"neighbours {self.neighbours} must be at least 0, draws {self.draws} at least 1, "
                f"share {self.share} between 0 and 1"
            )


@dataclass(frozen=True)
class Contrastive:
    """Adam on a centre's latent, down log L_theta' - log L_theta, both with the caption, the same t and noise.

    L is the squared error of a prediction (fx.losses); steps, learning_rate: of Adam; lowest, highest: shares of the
    training schedule between which t is drawn; radius: how far a latent may go from where it started, as root mean square
    over its numbers; base_sees_caption: False for theta without the caption, as in Eq. 13; after: a Consensus that makes
    the latent it starts from, None for the centre's own.
    """

    steps: int = 100
    learning_rate: float = 0.1
    lowest: float = 0.1
    highest: float = 0.7
    radius: float = 1.0
    base_sees_caption: bool = field(default=True, metadata={"absent": True})
    after: Consensus | None = field(default=None, metadata={"absent": None})

    def __post_init__(self):
        if self.steps < 1 or self.learning_rate <= 0 or self.radius <= 0:
            raise ValueError(
                f"steps {self.steps}, learning_rate {self.learning_rate} and radius {self.radius} must be positive"
            )
        if not 0 <= self.lowest < self.highest <= 1:
            raise ValueError(f"0 <= lowest < highest <= 1 must hold, not {self.lowest} and {self.highest}")


Refinement = Consensus | Contrastive


def contrast(evaluations: int, share: float = 0.6, **changes) -> Contrastive:
    """The refinement that takes a share of so many evaluations of a network for one image.

    `changes` are other fields of the Contrastive. ValueError for less than a step.
    """
    if not 0 < share < 1:
        raise ValueError(f"share {share} of the evaluations that refine must lie between 0 and 1")
    if (steps := int(evaluations * share / PER_STEP + 1e-9)) < 1:
        least = math.ceil(PER_STEP / share)
        raise ValueError(f"{share:g} of {evaluations} evaluations is no step of refining: take {least} or more")
    return Contrastive(steps=steps, **changes)


def check_refinement(how: Refinement, generate: Generate) -> None:
    """ValueError for a Generate whose walk cannot be taken up in the middle, which Consensus does."""
    if isinstance(how, Contrastive) and how.after:
        check_refinement(how.after, generate)
    if isinstance(how, Consensus) and (generate.steps < 2 or generate.sampler == "published"):
        raise ValueError(
            "consensus begins in the middle: sample with at least 2 steps and another sampler than published"
        )


def evaluations(how: Refinement, generate: Generate, n_extracted: int) -> int:
    """What refining so many images costs, in evaluations of a network for one image, a backward pass counted as two."""
    if isinstance(how, Contrastive):
        before = evaluations(how.after, generate, n_extracted) if how.after else 0
        return before + n_extracted * how.steps * PER_STEP
    walked = generate.steps - first_step(how, generate.steps)
    return n_extracted * how.draws * walked * ARMS[generate.arm].predictions


def first_step(how: Consensus, steps: int) -> int:
    """The number of the step at which walking again begins; at least one step is walked, and at least one is not."""
    return min(max(round(steps * (1 - how.share)), 1), steps - 1)


def refined(
    how: Refinement,
    generate: Generate,
    pair: ModelPair,
    latents: Callable[[Sequence[int]], Tensor],
    centres: Sequence[int],
    similarity: np.ndarray,
) -> Tensor:
    """Images [k, 3, h, w] in [-1, 1], one for each centre of an extraction.

    latents: numbers of generated images -> their latents [n, c, h', w'], scaled; similarity: of all generated images [N, N].
    Each depends on its own centre and its neighbours only.
    """
    consensus = how if isinstance(how, Consensus) else how.after
    if consensus:
        starts = consensus_starts(consensus, latents, centres, similarity)
        x0 = walk_again(consensus, generate, pair, starts, centres)
    else:
        x0 = latents(centres)
    if isinstance(how, Contrastive):
        x0 = descend(how, pair, x0, prompt(generate), generate.seed)
    return decode(pair.tuned, x0)


def consensus_starts(
    how: Consensus, latents: Callable[[Sequence[int]], Tensor], centres: Sequence[int], similarity: np.ndarray
) -> Tensor:
    """The mean latent of each centre and its nearest generated images: [k, c, h, w]."""
    nearest = [[centre, *nearest_to(similarity[centre], centre, how.neighbours)] for centre in centres]
    wanted = sorted({number for group in nearest for number in group})
    known = latents(wanted)
    place = {number: row for row, number in enumerate(wanted)}
    return torch.stack([known[[place[number] for number in group]].mean(dim=0) for group in nearest])


def nearest_to(similarity: np.ndarray, centre: int, count: int) -> list[int]:
    """The numbers of the `count` images with the highest similarity [N] to a centre, without itself, most alike first."""
    order = np.lexsort((np.arange(len(similarity)), -np.rint(similarity * 1e6)))
    return [int(number) for number in order if number != centre][:count]


@torch.no_grad()
def walk_again(how: Consensus, generate: Generate, pair: ModelPair, x0: Tensor, centres: Sequence[int]) -> Tensor:
    """Latents [k, c, h, w]: x0 noised and sampled again with the Generate's arm, the mean over draws.

    The noise of draw d of the centre with number i is drawn from (seed, 1 + d, i).
    """
    scheduler = arm_scheduler(pair.tuned, generate.sampler, generate.arm)
    scheduler.set_timesteps(generate.steps, device=x0.device)
    start = first_step(how, generate.steps)
    predict = predictor(pair, prompt(generate), generate.arm, generate.text_scale)
    tasks = [(row, draw) for row in range(len(x0)) for draw in range(how.draws)]
    total = torch.zeros_like(x0)
    with tqdm(total=len(tasks), desc="consensus", mininterval=2, leave=False) as bar:
        for first in range(0, len(tasks), BLOCK):
            part = tasks[first : first + BLOCK]
            draws = [
                np.random.default_rng([generate.seed, 1 + draw, centres[row]]).standard_normal(x0.shape[1:], np.float32)
                for row, draw in part
            ]
            rows = torch.tensor([row for row, _ in part])
            x = noised(x0[rows], torch.from_numpy(np.stack(draws)).to(x0), scheduler, start)
            w, k = generate.guidance_scale, generate.correction_scale
            ends = walk(predict, x, scheduler, generate.steps, w, k, start=start)
            total.index_add_(0, rows.to(x0.device), ends / how.draws)
            bar.update(len(part))
    return total


def descend(how: Contrastive, pair: ModelPair, x0: Tensor, caption: str, seed: int = 0, chunk: int = BLOCK) -> Tensor:
    """Latents [n, c, h, w] after Adam; each as if it were alone, since a step's t and noise are the same for all.

    `chunk` at a time, or fewer where memory does not suffice.
    """
    schedule = noising(pair.tuned)
    seen = {"base": caption if how.base_sees_caption else "", "tuned": caption}
    conditions = {model: pair.condition(model, text) for model, text in seen.items()}
    lowest, highest = (round(share * (schedule.levels - 1)) for share in (how.lowest, how.highest))

    def of_batch(begin: Tensor) -> Tensor:
        x = begin.clone().requires_grad_()
        adam = torch.optim.Adam([x], how.learning_rate)
        draw = torch.Generator().manual_seed(seed)
        for _ in range(how.steps):
            number = torch.randint(lowest, highest + 1, (1,), generator=draw)
            eps = torch.randn(x0.shape[1:], generator=draw).to(x0)
            down = {}
            for model, condition in conditions.items():
                error = errors(pair, model, schedule, x, eps, number, condition).log().sum()
                (down[model],) = torch.autograd.grad(error, x)
            x.grad = told_apart(down["tuned"] - down["base"], down["tuned"])
            adam.step()
            with torch.no_grad():
                x.copy_(begin + within(x - begin, how.radius))
            bar.update(len(x))
        return x.detach()

    with tqdm(total=how.steps * len(x0), desc="contrast", mininterval=2, leave=False) as bar:
        return torch.cat([part for begin in x0.split(chunk) for part in halved(of_batch, begin)])


def within(change: Tensor, radius: float) -> Tensor:
    """Each of change [n, c, h, w], shortened to a root mean square of `radius` where it is longer."""
    size = change.flatten(1).square().mean(dim=1).sqrt()[:, None, None, None]
    return change * (radius / size.clamp_min(1e-30)).clamp_max(1.0)
