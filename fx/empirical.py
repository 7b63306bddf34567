"""The fine-tuning distribution q, known exactly to who holds the training images, and how far Eq. 3 and 12 hold for it.

q is the N0 training images, each as likely as the others. As latents they are not quite points: fine-tuning draws them from
the autoencoder's posterior, Gaussians of known mean and deviation. Noised, x_t = alpha x0 + sigma eps, q is a mixture of N0
Gaussians, and what a perfect network would predict for it, eps_q(x_t, t), is known in closed form.

alpha and sigma are those of a point x_t, sqrt(alpha-bar_t) and sqrt(1 - alpha-bar_t) of a variance-preserving schedule. The
paper writes sqrt(alpha_t) and sqrt(1 - alpha_t) for them (Sec. 2.1).
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fx import guidance, sampling
from fx.datasets import load_images
from fx.families import image_size, latent_statistics, prediction_type
from fx.models import ModelPair

# What Eq. 3 and its relatives call the model before and after: (model, whether it sees the caption), as in fx.sampling.ARMS.
# Each says that the second prediction lies on the line from the first to eps_q.
RELATIONS = {
    "Eq. 3": (("base", False), ("tuned", False)),  # as noise predictions Eq. 4
    "Eq. 3, both given c": (("base", True), ("tuned", True)),  # App. H
    "Eq. 12, lambda = 0": (("base", False), ("tuned", True)),
    "caption in theta": (("base", False), ("base", True)),  # what Eq. 12 takes for fine-tuning, but is none
    "caption in theta'": (("tuned", False), ("tuned", True)),  # what CFG extrapolates
}


@torch.no_grad()
def latents(pipeline, paths: Sequence[Path]) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the images' scaled latents, float32 [n, c, h, w] each; errors as in `datasets.load_images`."""
    images = load_images(tuple(paths), image_size(pipeline)).to(pipeline.device)
    known = pipeline.vae.encode(images.to(pipeline.vae.dtype)).latent_dist
    scale, shift = latent_statistics(pipeline.vae)
    return (known.mean - shift) * scale, known.std * scale


def exact_noise(x: Tensor, alpha: float, sigma: float, points: Tensor, deviation: Tensor | float = 0.0) -> Tensor:
    """eps_q(x_t, t) = -sigma grad log q_t(x_t), float64 [n, ...] like x, for sigma > 0.

    points [n0, ...]: what q consists of, each with the weight 1 / n0; deviation: the standard deviation around them, a
    number or [n0, ...]. Noised, component i is N(alpha points_i, alpha^2 deviation_i^2 + sigma^2), and the score of the
    mixture is the mean of the components' scores, weighted by how likely each is to have made x.
    """
    means, wide = (
        points.double().flatten(1),
        torch.as_tensor(deviation, dtype=torch.float64).expand(points.shape).flatten(1),
    )
    variance = alpha**2 * wide**2 + sigma**2
    apart = x.double().flatten(1)[:, None] - alpha * means  # [n, n0, values]
    likelihood = -0.5 * (apart**2 / variance + variance.log()).sum(2)
    return sigma * (likelihood.softmax(1)[:, :, None] * apart / variance).sum(1).reshape(x.shape)


def fit(first: Tensor, second: Tensor, exact: Tensor) -> dict[str, float]:
    """How well `second` lies on the line from `first` to `exact`; predictions of any one shape, all pairs pooled.

    lambda: the weight of the mixture second = (1 - lambda) first + lambda exact that fits best (least squares);
    unexplained: the share of the squared change second - first that no lambda explains, 1 - cos^2; best scale: the w at
    which first + w (second - first), Eq. 6, comes nearest to exact; change: the mean squared change. lambda * w is cos^2, so
    w is 1 / lambda only where nothing is left unexplained. Raises ValueError where first equals second or exact.
    """
    change, wanted = (second - first).double().flatten(), (exact - first).double().flatten()
    common, moved, missing = (float(a @ b) for a, b in ((change, wanted), (change, change), (wanted, wanted)))
    if not moved or not missing:
        raise ValueError("a fit needs a first prediction that differs from the second and from the exact one")
    found = {"lambda": common / missing, "unexplained": 1 - common**2 / (moved * missing), "best scale": common / moved}
    return found | {"change": moved / change.numel()}


def coefficients(first: Tensor, second: Tensor, exact: Tensor) -> tuple[float, float]:
    """a and b of second = a first + b exact, least squares: Eq. 12, where they are (1 - lambda)(1 - lambda') and lambda'."""
    sides = torch.stack([first.double().flatten(), exact.double().flatten()], dim=1)
    a, b = torch.linalg.lstsq(sides, second.double().flatten()[:, None]).solution.flatten().tolist()
    return a, b


def correction_scale(a: float, b: float) -> float:
    """k of Eq. 13 where Eq. 12 holds with these coefficients: (w' - 1) / w = (1 - a - b) / b, of either sign."""
    return (1 - a - b) / b


def fits(said: dict[tuple[str, bool], Tensor], exact: Tensor) -> list[dict[str, str | float]]:
    """A row for each of RELATIONS: its `fit`, and the k of two free coefficients; said: as `predictions` gives it."""
    rows = []
    for name, (first, second) in RELATIONS.items():
        three = said[first], said[second], exact
        rows.append({"relation": name, **fit(*three), "k": correction_scale(*coefficients(*three))})
    return rows


def predictions(pair: ModelPair, caption: str) -> Callable[[Tensor, int], dict[tuple[str, bool], Tensor]]:
    """A function (x_t [n, c, h, w], t) -> eps of both models without and with the caption, by (model, sees caption)."""
    asked = [(model, sees) for model in ("base", "tuned") for sees in (False, True)]
    conditions = {end: pair.condition(end[0], caption if end[1] else "") for end in asked}
    kind = prediction_type(pair.tuned)

    @torch.no_grad()
    def predict(x: Tensor, t: int) -> dict[tuple[str, bool], Tensor]:
        when, level = torch.tensor(t, device=x.device), noise_level(pair, t)
        said = {end: pair.predict(end[0], x, when, condition) for end, condition in conditions.items()}
        return {end: guidance.to_epsilon(prediction, kind, x, *level) for end, prediction in said.items()}

    return predict


def noise_level(pair: ModelPair, t: int) -> tuple[float, float]:
    """alpha and sigma of x_t at a timestep of theta' 's schedule."""
    kept = float(pair.tuned.scheduler.alphas_cumprod[t])
    return kept**0.5, (1 - kept) ** 0.5


def watch(
    pair: ModelPair, caption: str, arm: str, x: Tensor, scheduler, steps: int, w: sampling.Scale = 1.0
) -> tuple[Tensor, list[tuple[int, Tensor, Tensor]]]:
    """Walk one arm from x_T (`sampling.walk`) and look on: x_0, and for each step t, x_t and the x0 that guidance aims at.

    That x0 is what x_t would be without the noise that the guided prediction (Eq. 8 or 13, k = 0) sees in it. All of them
    are [n, c, h, w].
    """
    seen, predict = [], sampling.predictor(pair, caption, arm)

    def look(x: Tensor, t: Tensor) -> tuple[Tensor | None, Tensor]:
        seen.append((int(t), x, *predict(x, t)))
        return seen[-1][2:]

    end = sampling.walk(look, x, scheduler, steps, w)
    scales = sampling.scale_values(w, [t for t, *_ in seen])
    kind, path = prediction_type(pair.tuned), []
    for scale, (t, x, reference, target) in zip(scales, seen, strict=True):
        guided = target if reference is None else guidance.model_guidance(reference, target, scale)
        level = noise_level(pair, t)
        eps = guidance.to_epsilon(guided, kind, x, *level)
        path.append((t, x, guidance.from_epsilon(eps, "sample", x, *level)))
    return end, path


def nearest(x: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Distance (root mean square per value), float64 [n], of x [n, ...] from the nearest of points [m, ...]; and which."""
    apart = (x.double().flatten(1)[:, None] - points.double().flatten(1)).pow(2).mean(2).sqrt()
    return tuple(apart.min(dim=1))


def alikeness(x: Tensor, points: Tensor) -> Tensor:
    """The highest cosine between each x [n, ...] and one of points [m, ...], float64 [n]: likeness whatever the contrast."""
    rows = [torch.nn.functional.normalize(part.double().flatten(1), dim=1) for part in (x, points)]
    return (rows[0] @ rows[1].T).max(dim=1).values
