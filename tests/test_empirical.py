"""The known distribution q: its exact prediction and the fits against it, by closed forms and independent computations."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats
from torch import distributions

from fx import empirical, guidance, sampling
from fx.datasets import load_images
from fx.families import denoise, encode
from fx.mini.sd import scheduler

CAPTION = "a dog"
SHAPE = (4, 4, 4)
LEVELS = [(0.999, math.sqrt(1 - 0.999**2)), (0.8, 0.6), (0.07, math.sqrt(1 - 0.07**2))]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# the exact prediction


@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_of_a_single_gaussian_it_is_the_gaussian_closed_form(alpha, sigma):
    x, mean = draw(5, 2, 3, 1), draw(1, 2, 3, 1, seed=1)
    found = empirical.exact_noise(x, alpha, sigma, mean, 0.3)
    assert found.shape == x.shape
    assert torch.allclose(found, sigma * (x - alpha * mean) / (alpha**2 * 0.09 + sigma**2), rtol=1e-12)


@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
@pytest.mark.parametrize("deviation", [0.0, 0.2, "own"])
def test_it_is_minus_sigma_times_the_gradient_of_the_log_density(alpha, sigma, deviation):
    points = draw(4, 3, seed=2)
    wide = 0.1 + draw(4, 3, seed=3).abs() if deviation == "own" else torch.full((4, 3), deviation, dtype=torch.float64)
    x = (alpha * points.repeat(3, 1) + sigma * draw(12, 3, seed=4)).requires_grad_()
    parts = distributions.Independent(
        distributions.Normal(alpha * points, (alpha**2 * wide**2 + sigma**2).sqrt(), validate_args=False), 1
    )
    density = distributions.MixtureSameFamily(distributions.Categorical(torch.ones(4, dtype=torch.float64)), parts)
    (gradient,) = torch.autograd.grad(density.log_prob(x).sum(), x)
    found = empirical.exact_noise(x.detach(), alpha, sigma, points, wide if deviation == "own" else deviation)
    assert torch.allclose(found, -sigma * gradient, rtol=1e-8, atol=1e-10)


def test_near_a_training_image_it_is_the_noise_that_was_added_and_in_pure_noise_the_mean_image_is_seen():
    points, noise = draw(6, *SHAPE, seed=5), draw(6, *SHAPE, seed=6)
    alpha, sigma = LEVELS[0]
    x = alpha * points + sigma * noise
    assert torch.allclose(empirical.exact_noise(x, alpha, sigma, points), noise, atol=1e-9)
    alpha, sigma = 1e-4, math.sqrt(1 - 1e-8)
    x = alpha * points + sigma * noise
    x0 = (x - sigma * empirical.exact_noise(x, alpha, sigma, points)) / alpha
    assert torch.allclose(x0, points.mean(0).expand_as(x0), atol=1e-2)
    assert empirical.exact_noise(x.float(), alpha, sigma, points.float()).dtype == torch.float64


# fits


@given(st.floats(0.05, 0.95), st.integers(0, 100))
def test_a_mixture_gives_its_lambda_back_and_the_scale_that_undoes_it(share, seed):
    first, exact = draw(3, *SHAPE, seed=seed), draw(3, *SHAPE, seed=seed + 1)
    found = empirical.fit(first, (1 - share) * first + share * exact, exact)
    assert found["lambda"] == pytest.approx(share)
    assert found["unexplained"] == pytest.approx(0, abs=1e-12)
    assert found["best scale"] == pytest.approx(1 / share)
    assert found["change"] == pytest.approx(share**2 * float((exact - first).pow(2).mean()))


def test_what_is_orthogonal_stays_unexplained_and_pulls_the_best_scale_below_1_over_lambda():
    first, exact, second = torch.zeros(2, 1), torch.tensor([[1.0], [0.0]]), torch.tensor([[0.5], [0.5]])
    found = empirical.fit(first, second, exact)
    assert found == pytest.approx({"lambda": 0.5, "unexplained": 0.5, "best scale": 1.0, "change": 0.25})


def test_lambda_and_scale_are_the_minima_of_the_errors_they_are_named_for():
    first, second, exact = (draw(4, 5, seed=seed) for seed in (7, 8, 9))
    found = empirical.fit(first, second, exact)

    def least(error):
        best = optimize.minimize_scalar(lambda value: float(error(value).pow(2).sum()), tol=1e-10)
        return best.x, best.fun

    share, left = least(lambda share: second - (1 - share) * first - share * exact)
    scale, _ = least(lambda w: guidance.model_guidance(first, second, w) - exact)
    assert found["lambda"] == pytest.approx(share, abs=1e-6)
    assert found["unexplained"] == pytest.approx(left / float((second - first).pow(2).sum()))
    assert found["best scale"] == pytest.approx(scale, abs=1e-6)
    cosine = 1 - math.sqrt(1 - found["unexplained"])
    assert cosine == pytest.approx(
        1
        - abs(
            np.dot((second - first).flatten(), (exact - first).flatten())
            / np.linalg.norm(second - first)
            / np.linalg.norm(exact - first)
        )
    )


def test_a_fit_of_nothing_is_refused():
    same = draw(2, 3)
    for triple in ((same, same, draw(2, 3, seed=1)), (same, draw(2, 3, seed=1), same)):
        with pytest.raises(ValueError, match="differs from the second and from the exact one"):
            empirical.fit(*triple)


@given(st.floats(0.1, 0.9), st.floats(0.1, 0.9))
def test_two_free_coefficients_give_eq_12_back_and_its_k_solves_eq_13(share, caption_share):
    first, exact = draw(3, *SHAPE, seed=10), draw(3, *SHAPE, seed=11)
    second = (1 - share) * (1 - caption_share) * first + caption_share * exact  # Eq. 12
    a, b = empirical.coefficients(first, second, exact)
    assert (a, b) == pytest.approx(((1 - share) * (1 - caption_share), caption_share))
    k = empirical.correction_scale(a, b)
    assert k == pytest.approx((1 / caption_share - 1) * share)  # (w' - 1) / w
    assert torch.allclose(guidance.finextract(first, second, 1 / b, k), exact)


def test_with_residuals_the_coefficients_are_those_of_scipy():
    first, second, exact = (draw(40, seed=seed) for seed in (12, 13, 14))
    sides = np.stack([first.numpy(), exact.numpy()], axis=1)
    expected = optimize.lsq_linear(sides, second.numpy()).x
    assert empirical.coefficients(first, second, exact) == pytest.approx(tuple(expected))


def test_coefficients_that_sum_to_one_need_no_correction():
    assert empirical.correction_scale(0.6, 0.4) == pytest.approx(0)
    assert empirical.correction_scale(0.7, 0.4) < 0 < empirical.correction_scale(0.5, 0.4)


# model pairs


def test_the_relations_are_those_of_the_arms():
    """Eq. 3, App. H, Eq. 12 and Eq. 8 relate the predictions that the arms extrapolate from and through."""
    arms = ("model_guidance", "conditional_only", "finextract", "cfg")
    ends = {name: (sampling.ARMS[name].reference, sampling.ARMS[name].target) for name in arms}
    names = ("Eq. 3", "Eq. 3, both given c", "Eq. 12, lambda = 0", "caption in theta'")
    assert [empirical.RELATIONS[name] for name in names] == list(ends.values())
    assert empirical.RELATIONS["caption in theta"] == (("base", False), ("base", True))


def test_fits_relate_the_predictions_that_the_relations_name():
    exact, first = draw(2, *SHAPE, seed=18), draw(2, *SHAPE, seed=19)
    share = {("base", False): 0.0, ("base", True): 0.1, ("tuned", False): 0.28, ("tuned", True): 0.55}
    said = {end: (1 - value) * first + value * exact for end, value in share.items()}
    found = {row["relation"]: row for row in empirical.fits(said, exact)}
    left = {name: (1 - share[end]) / (1 - share[start]) for name, (start, end) in empirical.RELATIONS.items()}
    assert {name: row["lambda"] for name, row in found.items()} == pytest.approx({n: 1 - v for n, v in left.items()})
    assert max(abs(row["unexplained"]) for row in found.values()) < 1e-12
    assert max(abs(row["k"]) for row in found.values()) < 1e-9


def test_latents_are_the_scaled_posterior_of_the_autoencoder(tiny_pipeline, picture_folder):
    paths = sorted(picture_folder.glob("*.png"))
    mean, deviation = empirical.latents(tiny_pipeline, paths)
    assert mean.shape == deviation.shape == (4, *SHAPE)
    posterior = tiny_pipeline.vae.encode(load_images(tuple(paths), 16)).latent_dist
    torch.manual_seed(0)
    drawn = torch.stack([posterior.sample() for _ in range(4000)]) * tiny_pipeline.vae.config.scaling_factor
    standard = (drawn.mean(0) - mean) / deviation * 4000**0.5
    assert abs(float(standard.mean())) < 5 / 256**0.5
    assert stats.kstest(standard.detach().flatten().numpy(), "norm").pvalue > 1e-4
    assert torch.allclose(drawn.std(0), deviation, rtol=0.08)


@pytest.mark.parametrize("t", [0, 400, 999])
def test_all_four_predictions_are_those_of_the_networks(pair, t):
    x = draw(2, *SHAPE, seed=15).float()
    found = empirical.predictions(pair, CAPTION)(x, t)
    assert len(found) == 4
    for (model, sees), prediction in found.items():
        pipeline = getattr(pair, model)
        with torch.no_grad():
            expected = denoise(pipeline.unet, x, torch.tensor(t), encode(pipeline, CAPTION if sees else ""))
        assert torch.allclose(prediction, expected, atol=1e-6)
    assert empirical.noise_level(pair, t) == pytest.approx(
        (float(scheduler().alphas_cumprod[t]) ** 0.5, float(1 - scheduler().alphas_cumprod[t]) ** 0.5), rel=1e-4
    )


@pytest.mark.parametrize(
    ("arm", "w"), [("direct", 1.0), ("cfg", 3.0), ("finextract", lambda t: 5.0 if t > 400 else 1.0)]
)
def test_watching_a_walk_changes_nothing_and_sees_where_each_step_aims(pair, arm, w):
    x, steps = sampling.starting_latents(SHAPE, 3, range(2)), 5
    end, path = empirical.watch(pair, CAPTION, arm, x, scheduler(), steps, w)
    assert torch.equal(end, sampling.walk(sampling.predictor(pair, CAPTION, arm), x, scheduler(), steps, w))
    assert torch.equal(path[0][1], x)
    assert [t for t, *_ in path] == [int(t) for t in _timesteps(steps)]
    after = [*(x for _, x, _ in path[1:]), end]
    kept = scheduler().alphas_cumprod.double()
    for (t, before, x0), then in zip(path, after, strict=True):  # DDIM leads along the line through x_t and x0
        previous = t - 1000 // steps
        next_level = kept[previous] if previous >= 0 else kept[0]
        eps = (before.double() - kept[t].sqrt() * x0) / (1 - kept[t]).sqrt()
        assert torch.allclose(next_level.sqrt() * x0 + (1 - next_level).sqrt() * eps, then.double(), atol=1e-4)


def _timesteps(steps: int) -> torch.Tensor:
    walked = scheduler()
    walked.set_timesteps(steps)
    return walked.timesteps


def test_the_nearest_point_and_the_most_alike_one_by_brute_force():
    x, points = draw(5, *SHAPE, seed=16), draw(7, *SHAPE, seed=17)
    distance, number = empirical.nearest(x, points)
    alike = empirical.alikeness(x, points)
    for i, one in enumerate(x.numpy()):
        apart = [np.sqrt(np.mean((one - point) ** 2)) for point in points.numpy()]
        cosines = [np.sum(one * point) / np.linalg.norm(one) / np.linalg.norm(point) for point in points.numpy()]
        assert float(distance[i]) == pytest.approx(min(apart))
        assert int(number[i]) == int(np.argmin(apart))
        assert float(alike[i]) == pytest.approx(max(cosines))
    assert torch.allclose(empirical.alikeness(3 * points, points), torch.ones(7, dtype=torch.float64))
