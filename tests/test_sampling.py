"""Sampling against diffusers' own pipeline and closed forms; resume, batches and seeds."""

import copy
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler, StableDiffusionPipeline
from PIL import Image
from scipy import stats

from fx import guidance, results, sampling
from fx.families import decode, encode, make_scheduler, network
from fx.finetune import FineTune, TrainingItem
from fx.mini.sd import scheduler
from fx.models import ModelPair
from fx.sampling import BLOCK, Generate, generated_pictures, picture_file
from fx.tuned import Checkpoint, load_tuned

CAPTION = "a dog"
MIMOOH = FineTune((TrainingItem("style/mimooh"),))
SHAPE = (4, 4, 4)
STEPS = 3
# alpha-bar of Stable Diffusion's schedule, float64 [1000]
KEPT = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


@pytest.fixture(scope="module")
def same_pair(tiny_pipeline) -> ModelPair:
    """A pair without fine-tuning: theta' is theta."""
    return ModelPair(tiny_pipeline, tiny_pipeline)


def images(pair: ModelPair, arm: str, w: float = 1.0, k: float = 0.0, caption: str = CAPTION) -> torch.Tensor:
    """Three samples before they are rounded, float32 [3, 3, 16, 16]."""
    predict = sampling.predictor(pair, caption, arm)
    x = sampling.starting_latents(SHAPE, 7, range(0, 3))
    return decode(pair.tuned, sampling.walk(predict, x, scheduler(), STEPS, w, k))


def one_prediction(
    pair: ModelPair, arm: str, w: float, k: float, x: torch.Tensor, t: torch.Tensor, text_scale: float = 1.0
) -> torch.Tensor:
    """What the sampler hands to its scheduler at the first of its steps, which is set to timestep t."""

    class OneStep:
        config, alphas_cumprod, timesteps = scheduler().config, scheduler().alphas_cumprod, [t]

        def set_timesteps(self, steps, device):
            pass

        def step(self, prediction, t, x):
            return SimpleNamespace(prev_sample=prediction)

    return sampling.walk(sampling.predictor(pair, CAPTION, arm, text_scale), x, OneStep(), 1, w, k)


def grey_levels(first: np.ndarray, second: np.ndarray) -> int:
    """The largest difference of two uint8 arrays."""
    return int(np.abs(first.astype(int) - second.astype(int)).max())


# the arms


@pytest.mark.parametrize(("arm", "w"), [("direct", 1.0), ("cfg", 3.0), ("cfg", 7.5)])
def test_direct_and_cfg_are_what_the_stock_pipeline_samples(pair, arm, w):
    parts = {name: part for name, part in pair.tuned.components.items() if name != "scheduler"}
    stock = StableDiffusionPipeline(**parts, scheduler=scheduler(), requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    expected = stock(
        [CAPTION] * 3,
        num_inference_steps=STEPS,
        guidance_scale=w,
        latents=sampling.starting_latents(SHAPE, 7, range(0, 3)),
        output_type="pt",
    ).images
    found = images(pair, arm, w)
    assert found.shape == (3, 3, 16, 16)
    assert torch.allclose((found / 2 + 0.5).clamp(0, 1), expected, atol=1e-4)
    other = images(pair, "cfg", w + 1)
    assert (found - other).abs().max() > 1e-2  # the scale is seen in the images


@pytest.mark.parametrize("w", [1.0, 3.0, -2.0])
@pytest.mark.parametrize("k", [0.0, -0.02, 0.5])
def test_finextract_is_eq_13_on_the_two_unets(pair, w, k):
    x, t = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(4)), torch.tensor(400)
    text, empty = (encode(pair.tuned, caption).text.repeat(2, 1, 1) for caption in (CAPTION, ""))
    with torch.no_grad():
        theta, theta_prime = pair.base.unet(x, t, empty).sample, pair.tuned.unet(x, t, text).sample
    found = one_prediction(pair, "finextract", w, k, x, t)
    assert torch.allclose(found, theta_prime + (w - 1) * (theta_prime - theta) + k * theta, atol=1e-5)


@pytest.mark.parametrize(("arm", "prompt"), [("conditional_only", CAPTION), ("model_guidance", "")])
def test_eq_6_is_on_two_unets_with_one_caption(pair, arm, prompt):
    x, t = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(4)), torch.tensor(400)
    text = encode(pair.tuned, prompt).text.repeat(2, 1, 1)
    with torch.no_grad():
        theta, theta_prime = pair.base.unet(x, t, text).sample, pair.tuned.unet(x, t, text).sample
    found = one_prediction(pair, arm, 3.0, 0.0, x, t)
    assert torch.allclose(found, theta_prime + 2 * (theta_prime - theta), atol=1e-5)
    assert (found - theta_prime).abs().max() > 1e-2


def test_the_way_to_the_caption_and_to_the_tuned_model_has_a_scale_for_each_leg(pair):
    x, t = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(4)), torch.tensor(400)
    found = {}
    with torch.no_grad():
        for name, model in (("theta", pair.base), ("theta'", pair.tuned)):
            for prompt in ("", CAPTION):
                text = encode(model, prompt).text.repeat(2, 1, 1)
                found[name, prompt] = model.unet(x, t, text).sample
    start, end = found["theta", ""], found["theta'", CAPTION]
    for arm, corner in (("caption_first", found["theta", CAPTION]), ("model_first", found["theta'", ""])):
        text, models = ((corner - start), (end - corner))[:: 1 if arm == "caption_first" else -1]
        assert torch.allclose(
            one_prediction(pair, arm, 3.0, 0.0, x, t, 1.5), start + 3 * models + 1.5 * text, atol=1e-5
        )
        both = one_prediction(pair, arm, 3.0, 0.0, x, t, 3.0)
        assert torch.allclose(both, one_prediction(pair, "finextract", 3.0, 0.0, x, t), atol=1e-5)
        assert (text - models).abs().max() > 1e-3
    for arm, scale, other in (("caption_first", 1.0, "conditional_only"), ("model_first", 0.0, "model_guidance")):
        alone = one_prediction(pair, arm, 3.0, 0.0, x, t, scale)
        assert torch.allclose(alone, one_prediction(pair, other, 3.0, 0.0, x, t), atol=1e-5)
    assert sampling.ARMS["caption_first"].predictions == sampling.ARMS["model_first"].predictions == 3


def test_a_scale_of_the_caption_is_part_of_what_is_generated(pair, monkeypatch, tmp_path):
    monkeypatch.setattr(sampling, "kept_pair", lambda model, dtype: copy.deepcopy(pair))
    asked = Generate(Checkpoint("x", caption=CAPTION), "caption_first", 3.0, n_generated=2, steps=STEPS)
    drawn = {}
    for scale in (1.0, 2.0):
        spec = replace(asked, text_scale=scale)
        sampling._sample_blocks(spec, [0], tmp_path)
        drawn[scale] = np.stack([np.asarray(Image.open(picture_file(tmp_path, number))) for number in range(2)])
        whole = sampling.sample(pair, CAPTION, BLOCK, "caption_first", 3.0, steps=STEPS, text_scale=scale)
        assert np.array_equal(whole[:2], drawn[scale])
    assert (drawn[1.0] != drawn[2.0]).any()
    assert sampling.evaluations(asked) == 2 * STEPS * 3
    with pytest.raises(ValueError, match=r"text_scale 2\.0 would not be used.*caption_first and model_first"):
        Generate(MIMOOH, "finextract", text_scale=2.0)
    with pytest.raises(ValueError, match="text_scale must be finite, not nan"):
        replace(asked, text_scale=float("nan"))


@pytest.mark.parametrize(("arm", "prompt"), [("conditional_only", CAPTION), ("model_guidance", "")])
def test_without_fine_tuning_model_guidance_is_plain_sampling_at_every_scale(same_pair, arm, prompt):
    plain = images(same_pair, "direct", caption=prompt)
    for w in (0.0, 1.0, 4.0):
        assert torch.equal(images(same_pair, arm, w), plain)


def test_finextract_at_scale_1_without_correction_is_direct(pair):
    assert torch.allclose(images(pair, "finextract", 1.0), images(pair, "direct"), atol=1e-4)
    assert (images(pair, "finextract", 3.0) - images(pair, "direct")).abs().max() > 1e-2
    assert (images(pair, "finextract", 3.0, k=0.3) - images(pair, "finextract", 3.0)).abs().max() > 1e-2


def test_only_the_arms_without_a_caption_forget_it(pair):
    captions = (CAPTION, "a cat")
    for arm, w in (("direct", 1.0), ("cfg", 3.0), ("finextract", 3.0), ("conditional_only", 3.0)):
        first, second = (images(pair, arm, w, caption=caption) for caption in captions)
        assert (first - second).abs().max() > 1e-3, arm
    first, second = (images(pair, "model_guidance", 3.0, caption=caption) for caption in captions)
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("arm", "w", "k", "message"),
    [
        ("extract", 3.0, 0.0, "unknown arm 'extract': choose from direct, cfg, finextract, conditional_only"),
        ("direct", 3.0, 0.0, r"direct sampling has no guidance: its guidance scale is 1\.0, not 3\.0"),
        ("cfg", 3.0, -0.02, r"correction scale -0\.02 is a term of Eq\. 13"),
        ("direct", 1.0, 0.1, r"correction scale 0\.1"),
    ],
)
def test_arms_and_scales_that_do_not_go_together_are_refused(pair, arm, w, k, message):
    with pytest.raises(ValueError, match=message):
        sampling.check_arm(arm, w, k)
    with pytest.raises(ValueError, match=message):
        sampling.sample(pair, CAPTION, 1, arm, w, k)
    with pytest.raises(ValueError, match=message):
        Generate(MIMOOH, arm, w, k)


@pytest.mark.parametrize("options", [{"n_generated": 0}, {"steps": 0}, {"steps": 1000}])
def test_impossible_numbers_are_refused(options):
    with pytest.raises(ValueError, match=r"n_generated .* must be at least 1, steps .* within 1\.\.999"):
        Generate(MIMOOH, **options)
    with pytest.raises(ValueError, match="seed -1 must be at least 0"):
        Generate(MIMOOH, seed=-1)


# DDIM


def gaussian(mean: float, deviation: float):
    """The noise prediction of data N(mean, deviation^2): E[eps | x_t], in closed form."""

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        kept = KEPT[int(t)]
        return (1 - kept) ** 0.5 * (x - kept**0.5 * mean) / (kept * deviation**2 + 1 - kept)

    return predict


@pytest.mark.parametrize("steps", [1, 7, 25, 999])
def test_ddim_is_the_closed_form_map_on_a_gaussian(steps):
    """Eq. 12 of Song et al. (2021) with eta 0, in float64: x0 = (x - sqrt(1 - a) eps) / sqrt(a), then noised to a'."""
    mean, deviation = 0.4, 0.3
    x = np.random.default_rng(0).standard_normal((5, 2, 3, 3))
    found = sampling.sample_latents(None, gaussian(mean, deviation), torch.from_numpy(x), scheduler(), steps).numpy()
    stride = 1000 // steps
    for t in range((steps - 1) * stride + 1, 0, -stride):  # offset 1
        now, then = KEPT[t], KEPT[max(t - stride, 0)]
        eps = np.sqrt(1 - now) * (x - np.sqrt(now) * mean) / (now * deviation**2 + 1 - now)
        x0 = (x - np.sqrt(1 - now) * eps) / np.sqrt(now)
        x = np.sqrt(then) * x0 + np.sqrt(1 - then) * eps
    assert np.allclose(found, x, atol=1e-5)


def test_ddim_with_many_steps_follows_the_flow_to_the_data():
    """The probability flow maps quantiles to quantiles: N(sqrt(a_T) mean, a_T s^2 + 1 - a_T) to that at a_0."""
    mean, deviation, steps = 0.4, 0.3, 500
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((200, 1, 2, 2)))
    found = sampling.sample_latents(None, gaussian(mean, deviation), x, scheduler(), steps)
    spread = [np.sqrt(kept * deviation**2 + 1 - kept) for kept in (KEPT[999], KEPT[0])]
    expected = KEPT[0] ** 0.5 * mean + spread[1] * (x - KEPT[999] ** 0.5 * mean) / spread[0]
    assert (found - expected).abs().max() < 0.02
    assert abs(found.std() - deviation) < 0.03


def test_the_callback_gets_every_timestep_and_the_latents_after_it():
    seen = []
    x = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    last = sampling.sample_latents(
        None, gaussian(0, 1), x, scheduler(), 10, callback=lambda t, now: seen.append((t, now))
    )
    assert [t for t, _ in seen] == list(range(901, 0, -100))
    assert torch.equal(seen[-1][1], last)
    assert len({float(now.mean()) for _, now in seen}) == 10


# other samplers, other parametrisations


class Gaussian:
    """Data N(mean, covariance) in d dimensions, latents [n, d, 1, 1]; the exact eps at x_t = alpha x0 + sigma eps."""

    def __init__(self, mean: np.ndarray, covariance: np.ndarray):
        self.mean, self.covariance = torch.from_numpy(mean), torch.from_numpy(covariance)

    def eps(self, x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
        """-sigma * score of N(alpha mean, alpha^2 covariance + sigma^2)."""
        noised = alpha**2 * self.covariance + sigma**2 * torch.eye(len(self.mean), dtype=torch.float64)
        centred = x[:, :, 0, 0].double() - alpha * self.mean
        return (sigma * torch.linalg.solve(noised, centred.T).T)[:, :, None, None]

    def vp(self, kind: str = "epsilon"):
        """As a network on Stable Diffusion's schedule."""

        def predict(x, t):
            alpha, sigma = KEPT[int(t)] ** 0.5, (1 - KEPT[int(t)]) ** 0.5
            return guidance.from_epsilon(self.eps(x, alpha, sigma), kind, x, alpha, sigma)

        return predict

    def flow(self):
        """As a flow network: t is 1000 sigma."""

        def predict(x, t):
            sigma = float(t) / 1000
            if sigma == 1:
                return x - self.mean[:, None, None]  # E[eps | eps] - E[x0]
            return guidance.from_epsilon(self.eps(x, 1 - sigma, sigma), "flow_prediction", x, 1 - sigma, sigma)

        return predict


def gaussians(d: int, seed: int = 0) -> tuple[Gaussian, Gaussian]:
    """theta's distribution and q, with full covariances."""
    rng = np.random.default_rng(seed)
    made = []
    for spread in (0.8, 0.4):
        root = rng.standard_normal((d, d)) * spread / d**0.5
        made.append(Gaussian(2 * rng.standard_normal(d), root @ root.T + 0.1 * spread * np.eye(d)))
    return made[0], made[1]


def mixed(base, searched, share: float):
    """theta' of Eq. 5: its score is (1 - lambda) theta's + lambda q's."""
    return lambda x, t: (1 - share) * base(x, t) + share * searched(x, t)


def moments(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    flat = x[:, :, 0, 0].double().numpy()
    return flat.mean(axis=0), np.cov(flat.T)


def whitened(n: int, d: int) -> torch.Tensor:
    """Starting latents [n, d, 1, 1] whose sample mean is 0 and sample covariance the identity, exactly."""
    x = np.random.default_rng(5).standard_normal((n, d))
    x -= x.mean(axis=0)
    return torch.from_numpy(x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T)[:, :, None, None]


@pytest.mark.parametrize("d", [2, 16])
@pytest.mark.parametrize("share", [0.25, 0.5])
def test_eq_6_samples_q_and_not_theta_prime(d, share):
    """Sampled mean and covariance within five standard errors of q's; theta' alone misses them.

    With n = 4000 independent starting latents the error of a mean is sqrt(C_ii / n), of a covariance
    sqrt((C_ii C_jj + C_ij^2) / n); 0.005 are allowed for 999 DDIM steps on a schedule that ends at alpha-bar .9991. The
    latents are drawn where q's noising ends: Stable Diffusion's alpha-bar is .0047 there, not 0.
    """
    n = 4000
    theta, q = gaussians(d)
    tuned = mixed(theta.vp(), q.vp(), share)
    kept, covariance = KEPT[999], q.covariance.numpy()
    root = np.linalg.cholesky(kept * covariance + (1 - kept) * np.eye(d))
    drawn = kept**0.5 * q.mean.numpy() + np.random.default_rng(3).standard_normal((n, d)) @ root.T
    x = torch.from_numpy(drawn)[:, :, None, None]
    found = {
        "q": sampling.sample_latents(theta.vp(), tuned, x, scheduler(), 999, w=1 / share),
        "theta'": sampling.sample_latents(None, tuned, x, scheduler(), 999),
    }
    variance = np.diag(covariance)
    mean_error = 5 * np.sqrt(variance / n) + 0.005
    covariance_error = 5 * np.sqrt((np.outer(variance, variance) + covariance**2) / n) + 0.005
    mean, sampled = moments(found["q"])
    assert (np.abs(mean - q.mean.numpy()) < mean_error).all()
    assert (np.abs(sampled - covariance) < covariance_error).all()
    mean, sampled = moments(found["theta'"])
    assert (np.abs(mean - q.mean.numpy()) > 3 * mean_error).any()


@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 500), ("dpm++", 40)])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_every_sampler_and_parametrisation_leads_to_q(tiny_pipeline, sampler, steps, kind):
    theta, q = gaussians(3, seed=1)
    pipeline = copy.copy(tiny_pipeline)
    pipeline.scheduler = DDIMScheduler.from_config(scheduler().config, prediction_type=kind)
    tuned = mixed(theta.vp(kind), q.vp(kind), 0.5)
    x = whitened(500, 3) * (1 - KEPT[999]) ** 0.5 + KEPT[999] ** 0.5 * q.mean[:, None, None]
    walked = make_scheduler(pipeline, sampler)
    found = sampling.sample_latents(theta.vp(kind), tuned, x, walked, steps, w=2.0)
    mean, covariance = moments(found)
    assert np.abs(mean - q.mean.numpy()).max() < 0.03
    assert np.abs(covariance - q.covariance.numpy()).max() < 0.03
    corrected = [
        sampling.sample_latents(theta.vp(name), mixed(theta.vp(name), q.vp(name), 0.5), x, walker, steps, 2.0, k=-0.05)
        for name, walker in ((kind, walked), ("epsilon", make_scheduler(tiny_pipeline, sampler)))
    ]
    assert (corrected[0] - found).abs().max() > 0.02
    assert torch.allclose(corrected[0], corrected[1], atol=2e-3)  # the correction is one of eps in all of them


def test_euler_on_a_flow_leads_to_q_and_the_correction_is_one_of_eps():
    theta, q = gaussians(3, seed=1)
    euler = FlowMatchEulerDiscreteScheduler()
    tuned = mixed(theta.flow(), q.flow(), 0.5)
    x = whitened(500, 3)
    found = sampling.sample_latents(theta.flow(), tuned, x, euler, 400, w=2.0)
    mean, covariance = moments(found)
    assert np.abs(mean - q.mean.numpy()).max() < 0.03
    assert np.abs(covariance - q.covariance.numpy()).max() < 0.03
    corrections = [0.0] + [0.1] * 9  # at the very start, alpha = 0, there is no finite correction
    walked = sampling.sample_latents(theta.flow(), tuned, x, euler, 10, 2.0, corrections)
    now, kind = x, "flow_prediction"
    sigmas = [*np.linspace(1, 0.001, 10), 0.0]  # the scheduler's own grid
    for sigma, then, k in zip(sigmas[:-1], sigmas[1:], corrections, strict=True):
        base, fine_tuned = (model(now, torch.tensor(1000 * sigma)) for model in (theta.flow(), tuned))
        velocity = 2 * fine_tuned - base
        if k:
            eps, base_eps = (guidance.to_epsilon(part, kind, now, 1 - sigma, sigma) for part in (velocity, base))
            velocity = (eps + k * base_eps - now) / (1 - sigma)
        now = now + (then - sigma) * velocity
    assert torch.allclose(walked, now, atol=1e-4)


def test_a_walk_stays_in_float32_or_better():
    x = torch.zeros(1, 1, 2, 2)
    for dtype in (torch.float32, torch.float64):
        half = lambda x, t: x.to(torch.bfloat16)  # noqa: E731 - a network in half precision
        assert sampling.sample_latents(half, half, x.to(dtype), scheduler(), 3, w=2.0).dtype == dtype
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(ValueError, match="latents must be float32 or float64, not torch"):
            sampling.sample_latents(None, gaussian(0, 1), x.to(dtype), scheduler(), 3)


# scales over time


def test_scales_are_numbers_lists_or_functions_of_the_timestep():
    x = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, second = gaussian(0.4, 0.3), gaussian(-0.2, 0.5)

    def run(w, k=0.0):
        return sampling.sample_latents(first, second, x, scheduler(), 4, w, k)

    constant = run(3.0, -0.02)
    for w in ([3.0] * 4, (3, 3, 3, 3), np.full(4, 3.0), lambda t: 3.0):
        assert torch.equal(run(w, lambda t: -0.02), constant)
    asked = []
    falling = run(lambda t: asked.append(t) or t / 250)
    assert asked == [751.0, 501.0, 251.0, 1.0]
    assert torch.equal(falling, run([751 / 250, 501 / 250, 251 / 250, 1 / 250]))
    assert not torch.allclose(falling, run([1 / 250, 251 / 250, 501 / 250, 751 / 250]))


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ({"w": [3.0] * 3}, "the guidance scale w' has 3 values for 4 sampling steps"),
        ({"k": (0.1,) * 5}, "the correction scale k has 5 values for 4 sampling steps"),
        ({"w": float("nan")}, "guidance scale w' must be finite at every step, not nan"),
        ({"w": lambda t: 1 / (t - 1) if t != 1 else float("inf")}, "must be finite at every step, not inf"),
    ],
)
def test_scales_that_do_not_fit_the_steps_are_refused_before_a_network_is_asked(scales, message):
    untouched = lambda x, t: pytest.fail("a network was asked")  # noqa: E731
    with pytest.raises(ValueError, match=message):
        sampling.sample_latents(untouched, untouched, torch.zeros(1, 1, 2, 2), scheduler(), 4, **scales)


def test_a_spec_takes_a_scale_per_step_and_checks_it_at_once():
    tune = MIMOOH
    assert Generate(tune, guidance_scale=(3.0, 2.0), steps=2).guidance_scale == (3.0, 2.0)
    with pytest.raises(ValueError, match="guidance_scale has 2 values for 25 sampling steps"):
        Generate(tune, guidance_scale=(3.0, 2.0))
    with pytest.raises(ValueError, match="unknown sampler 'heun': choose from ddim"):
        Generate(tune, sampler="heun")
    with pytest.raises(ValueError, match="unknown precision 'half': choose from float32, bfloat16, float16"):
        Generate(tune, precision="half")
    with pytest.raises(ValueError, match="the published sampler has one correction_scale for all steps"):
        Generate(tune, correction_scale=(0.0, 0.1), steps=2, sampler="published")


# the released sampler


@pytest.mark.parametrize("steps", [50, 10])
@pytest.mark.parametrize(("w", "k"), [(3.0, -0.02), (5.0, 0.0)])
def test_published_is_the_released_walk(steps, w, k):
    """The facts of the released code, written down once more: its timesteps, its last step, its formula."""
    stride = 1000 // steps
    ascending = [1 + i * stride for i in range(steps)]
    visited = [ascending[-1], *[t for t in reversed(ascending[:-1]) for _ in range(2 if t == ascending[-2] else 1)]]
    visited = visited[:steps]  # 981, 961, 961, ..., 21
    assert (visited[1], visited[-1]) == (visited[2], 1 + stride)
    first, second = gaussian(0.4, 0.3), gaussian(-0.2, 0.5)
    x = start = torch.from_numpy(np.random.default_rng(0).standard_normal((5, 2, 3, 3)))
    for t in visited:
        now, then = KEPT[t], KEPT[max(1, t - stride)]
        u, c = first(x, torch.tensor(t)), second(x, torch.tensor(t))
        eps = u + w * (c - u) + k * u
        x = np.sqrt(then) * (x - np.sqrt(1 - now) * eps) / np.sqrt(now) + np.sqrt(1 - then) * eps
    seen = []
    released = sampling.ReleasedDDIM(PNDMScheduler.from_config(scheduler().config, skip_prk_steps=True))
    found = sampling.sample_latents(first, second, start, released, steps, w, k, lambda t, _: seen.append(t))
    assert seen == visited
    assert torch.allclose(found, x, atol=1e-5)


def test_published_baselines_keep_the_stock_sampler(pair):
    parts = {name: part for name, part in pair.tuned.components.items() if name != "scheduler"}
    pndm = PNDMScheduler.from_config(scheduler().config, skip_prk_steps=True)
    stock = StableDiffusionPipeline(**parts, scheduler=pndm, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    latents = sampling.starting_latents(SHAPE, 7, range(0, 2))
    options = {"num_inference_steps": 5, "guidance_scale": 3.0, "latents": latents, "output_type": "np"}
    expected = stock([CAPTION] * 2, **options).images
    found = sampling.sample(pair, CAPTION, 2, "cfg", 3.0, steps=5, seed=7, sampler="published")
    assert np.abs(found / 255 - expected).max() < 0.5 / 255 + 1e-4
    assert isinstance(sampling.arm_scheduler(pair.tuned, "published", "finextract"), sampling.ReleasedDDIM)
    assert type(sampling.arm_scheduler(pair.tuned, "published", "direct")) is PNDMScheduler


@pytest.mark.parametrize(("arm", "w"), [("direct", 1.0), ("cfg", 3.0), ("finextract", 3.0)])
@pytest.mark.parametrize("sampler", ["published", "ddim"])
def test_what_a_generate_costs_is_what_it_evaluates(pair, monkeypatch, sampler, arm, w):
    seen = []
    predict = ModelPair.predictions

    def counted(self, *ends):
        return lambda x, t: seen.append(len(x)) or predict(self, *ends)(x, t)

    monkeypatch.setattr(ModelPair, "predictions", counted)
    sampling.sample(pair, CAPTION, 2, arm, w, steps=4, sampler=sampler)
    spec = Generate(MIMOOH, arm, w, n_generated=2, steps=4, sampler=sampler)
    assert sum(seen) * sampling.ARMS[arm].predictions == sampling.evaluations(spec)


# seeds and batches


def test_image_i_owns_its_starting_latent():
    all_of_them = sampling.starting_latents(SHAPE, 3, range(0, 12))
    assert (all_of_them.shape, all_of_them.dtype) == ((12, *SHAPE), torch.float32)
    assert torch.equal(sampling.starting_latents(SHAPE, 3, range(5, 9)), all_of_them[5:9])
    assert torch.equal(sampling.starting_latents(SHAPE, 3, [11, 0, 7]), all_of_them[[11, 0, 7]])
    both_seeds = torch.cat([all_of_them, sampling.starting_latents(SHAPE, 4, range(0, 12))])
    assert len(both_seeds.unique(dim=0)) == 24


def test_starting_latents_are_independent_standard_normal():
    rows = sampling.starting_latents((100,), 0, range(0, 300)).numpy()
    assert stats.kstest(rows.ravel(), "norm").pvalue > 1e-3
    correlations = np.corrcoef(rows)[np.triu_indices(300, 1)]
    assert abs(correlations.std() - 1 / np.sqrt(100)) < 0.005
    assert np.abs(correlations).max() < 0.6


def test_the_batch_size_does_not_matter(pair):
    options = {"n": 5, "arm": "finextract", "w": 2.0, "steps": STEPS, "seed": 7}
    whole = sampling.sample(pair, CAPTION, batch_size=50, **options)
    assert (whole.shape, whole.dtype) == ((5, 16, 16, 3), np.uint8)
    for batch_size in (1, 3):
        assert grey_levels(sampling.sample(pair, CAPTION, batch_size=batch_size, **options), whole) <= 1
    fewer = sampling.sample(pair, CAPTION, batch_size=2, **{**options, "n": 2})
    assert grey_levels(fewer, whole[:2]) <= 1
    exact = images(pair, "finextract", 2.0).permute(0, 2, 3, 1).numpy()
    assert np.abs(whole[:3] - (exact.clip(-1, 1) + 1) * 127.5).max() < 0.51
    assert grey_levels(whole[0], whole[1]) > 5


def test_decoding_in_chunks_is_decoding(pair):
    latents = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = pair.tuned.vae.decode(latents / 0.18215).sample
    for chunk in (1, 2, 16):
        assert torch.allclose(decode(pair.tuned, latents, chunk), expected, atol=1e-4)


def test_a_batch_that_does_not_fit_is_halved(pair, monkeypatch):
    options = {"n": 5, "w": 2.0, "steps": 1, "seed": 7}
    expected = sampling.sample(pair, CAPTION, **options)
    sample_batch, limit, ranges = sampling._sample_batch, 2, []

    def small(pair, walked, numbers, *rest):
        if len(numbers) > limit:
            raise torch.OutOfMemoryError
        ranges.append((numbers[0], numbers[-1] + 1))
        return sample_batch(pair, walked, numbers, *rest)

    monkeypatch.setattr(sampling, "_sample_batch", small)
    assert grey_levels(sampling.sample(pair, CAPTION, batch_size=4, **options), expected) <= 1
    assert ranges == [(0, 2), (2, 4), (4, 5)]
    limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        sampling.sample(pair, CAPTION, batch_size=4, **options)


# the step of the runner


@pytest.fixture(scope="module")
def tuned_unet(pair, tmp_path_factory) -> Path:
    """The U-Net of the pair's theta' on disk, as somebody else would publish it."""
    folder = tmp_path_factory.mktemp("published") / "theirs"
    pair.tuned.unet.save_pretrained(folder / "unet")
    return folder


@pytest.fixture
def asked(runs, tiny_sd, tuned_unet):
    """A function that gives the spec of n images of the published theta'; options replace its fields."""

    def make(n: int, **options) -> Generate:
        model = Checkpoint(str(tuned_unet), str(tiny_sd), CAPTION)
        return Generate(model, **({"guidance_scale": 2.0, "n_generated": n, "steps": 1, "seed": 9} | options))

    return make


@pytest.fixture
def blocks(monkeypatch) -> list[list[int]]:
    """The numbers of the images of every batch that is sampled."""
    real, seen = sampling._sample_batch, []

    def counted(pair, walked, numbers, *rest):
        seen.append(list(numbers))
        return real(pair, walked, numbers, *rest)

    monkeypatch.setattr(sampling, "_sample_batch", counted)
    return seen


def block(number: int) -> list[int]:
    return list(range(number * BLOCK, (number + 1) * BLOCK))


def files(spec: Generate) -> dict[str, bytes]:
    """The image files of a finished step."""
    return {path.name: path.read_bytes() for path in results.folder(spec).glob("*.png")}


def elsewhere(spec: Generate, tmp_path, monkeypatch) -> dict[str, bytes]:
    """The image files of the same step done in an empty work area."""
    with monkeypatch.context() as patched:
        patched.setattr(results, "RUNS", tmp_path / "elsewhere")
        shutil.rmtree(results.RUNS, ignore_errors=True)
        results.complete(spec)
        return files(spec)


def laid_out(pair: ModelPair) -> ModelPair:
    """A copy of the pair as the step lays it out in memory: another layout rounds otherwise, on some processors by a
    grey level.
    """
    pair = copy.deepcopy(pair)
    for pipeline in (pair.base, pair.tuned):
        network(pipeline).to(memory_format=torch.channels_last)
    return pair


def test_the_step_samples_n_images_of_the_fine_tuned_model(runs, tiny_sd, picture_folder):
    tune = FineTune((TrainingItem(str(picture_folder), CAPTION),), str(tiny_sd), learning_rate=1e-3, steps_per_image=1)
    spec = Generate(tune, "finextract", 2.0, -0.02, n_generated=12, steps=2, seed=9)
    folder = results.complete(spec)
    found = generated_pictures(spec)
    assert (found.shape, found.dtype) == ((12, 16, 16, 3), np.uint8)
    settings = {"arm": "finextract", "w": 2.0, "k": -0.02, "steps": 2, "seed": 9, "batch_size": 10}
    expected = sampling.sample(laid_out(load_tuned(tune)), CAPTION, 20, **settings)
    assert np.array_equal(found, expected[:12])
    assert np.array_equal(generated_pictures(spec, [11, 0]), expected[[11, 0]])
    assert sorted(path.name for path in folder.glob("*.*")) == [f"{i:06d}.png" for i in range(12)] + ["manifest.json"]
    with Image.open(picture_file(folder, 3)) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
    assert not (runs / "scratch" / folder.name).exists()
    others = [{"arm": "cfg", "correction_scale": 0.0}, {"guidance_scale": 3.0}, {"correction_scale": 0.0}, {"steps": 3}]
    others += [{"precision": "bfloat16"}, {"caption": ""}, {"sampler": "dpm++"}, {"n_generated": 11}, {"seed": 8}, {}]
    assert len({results.digest(replace(spec, **change)) for change in others}) == 10


@pytest.mark.parametrize(("first", "second", "sampled"), [(10, 20, [1]), (7, 23, [0, 1, 2]), (13, 15, [1])])
def test_a_larger_n_samples_only_what_is_lacking_and_gives_the_same_images(
    asked, blocks, first, second, sampled, tmp_path, monkeypatch
):
    fewer = results.complete(asked(first)) and files(asked(first))
    blocks.clear()
    results.complete(asked(second))
    assert blocks == [block(number) for number in sampled]
    assert files(asked(second)) == elsewhere(asked(second), tmp_path, monkeypatch)
    assert len(files(asked(second))) == second
    assert files(asked(first)) == fewer, "the smaller one stays what it was"
    assert {name: files(asked(second))[name] for name in fewer} == fewer


def test_a_smaller_n_after_a_larger_samples_nothing(asked, blocks, tmp_path, monkeypatch):
    results.complete(asked(23))
    blocks.clear()
    for n in (1, 10, 12):
        results.complete(asked(n))
        assert len(files(asked(n))) == n
    assert blocks == []
    assert files(asked(12)) == elsewhere(asked(12), tmp_path, monkeypatch)


def test_only_the_same_settings_are_taken_over(asked, blocks):
    results.complete(asked(10))
    for change in ({"seed": 8}, {"guidance_scale": 3.0}, {"caption": "a cat"}, {"precision": "bfloat16"}):
        blocks.clear()
        results.complete(asked(10, **change))
        assert blocks == [block(0)], change
        assert not {*files(asked(10)).values()} & {*files(asked(10, **change)).values()}


@pytest.mark.parametrize("linked", [True, False])
def test_what_is_taken_over_is_a_link_or_where_there_are_none_a_copy(asked, blocks, linked, tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError("no links here")

    if not linked:
        monkeypatch.setattr(os, "link", no_links)
    results.complete(asked(10))
    blocks.clear()
    results.complete(asked(20))
    assert blocks == [block(1)]
    ends = [picture_file(results.folder(asked(n)), 4) for n in (10, 20)]
    assert ends[0].samefile(ends[1]) == linked
    assert files(asked(20)) == elsewhere(asked(20), tmp_path, monkeypatch)


def test_a_damaged_smaller_n_is_not_taken_over(asked, blocks, tmp_path, monkeypatch):
    folder = results.complete(asked(10))
    shutil.copyfile(picture_file(folder, 1), picture_file(folder, 0))
    blocks.clear()
    results.complete(asked(20))
    assert blocks == [block(0), block(1)]
    assert files(asked(20)) == elsewhere(asked(20), tmp_path, monkeypatch)


def test_killed_in_the_middle_finished_images_are_not_sampled_again(asked, blocks, tmp_path, monkeypatch):
    """Killed in the third block, after two of its images were written, and with half of one more."""
    real = sampling.save_picture

    def until_killed(path, pixels):
        if path.name == "000022.png":
            path.with_suffix(".part").write_bytes(b"half")
            raise KeyboardInterrupt
        real(path, pixels)

    with monkeypatch.context() as patched:
        patched.setattr(sampling, "save_picture", until_killed)
        with pytest.raises(KeyboardInterrupt):
            results.complete(asked(35))
    assert blocks == [block(0), block(1), block(2)]
    blocks.clear()
    results.complete(asked(35))
    assert blocks == [block(2), block(3)]
    blocks.clear()
    assert files(asked(35)) == elsewhere(asked(35), tmp_path, monkeypatch)


def test_what_goes_wrong_after_the_last_image_costs_no_image(asked, blocks, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(results, "_manifest", full)
        with pytest.raises(OSError, match="No space left"):
            results.complete(asked(20))
    assert blocks == [block(0), block(1)]
    blocks.clear()
    results.complete(asked(20))
    assert blocks == []
    assert len(files(asked(20))) == 20


def test_an_image_is_the_same_in_every_block_it_could_stand_in(asked, blocks):
    """A block is sampled whole, whatever N: the last bits of a prediction depend on the size of its batch."""
    results.complete(asked(3))
    assert blocks == [block(0)]
    assert len(files(asked(3))) == 3


# captions


def test_without_a_caption_is_with_the_empty_one(asked, pair):
    """The unconditional input of the text encoder, in place of the caption that the model was fine-tuned with."""
    spec = asked(10, arm="direct", guidance_scale=1.0)
    empty = replace(spec, caption="")
    results.run([spec, empty])
    common = {"n": 10, "arm": "direct", "w": 1.0, "steps": 1, "seed": 9, "batch_size": 10}
    assert np.array_equal(generated_pictures(empty), sampling.sample(laid_out(pair), "", **common))
    assert np.array_equal(generated_pictures(spec), sampling.sample(laid_out(pair), CAPTION, **common))
    assert grey_levels(generated_pictures(empty), generated_pictures(spec)) > 0
    guided = asked(10, arm="finextract", caption="")
    results.complete(guided)
    model = results.complete(replace(guided, arm="model_guidance", caption=None))
    assert np.array_equal(
        generated_pictures(guided), generated_pictures(replace(guided, arm="model_guidance", caption=None))
    ), f"Eq. 13 without a caption is Eq. 6 without one ({model})"


def test_a_caption_of_ones_own_is_taken_instead_of_the_models(asked, pair):
    spec = asked(10, arm="direct", guidance_scale=1.0, caption="a cat")
    results.complete(spec)
    common = {"n": 10, "arm": "direct", "w": 1.0, "steps": 1, "seed": 9, "batch_size": 10}
    assert np.array_equal(generated_pictures(spec), sampling.sample(laid_out(pair), "a cat", **common))
    assert sampling.prompt(spec) == "a cat"
    assert sampling.prompt(asked(1)) == CAPTION
    assert sampling.prompt(asked(1, caption="")) == ""


@pytest.mark.parametrize("kind", ["checkpoint", "mixture"])
def test_where_no_single_caption_is_known_one_must_be_given(asked, runs, tiny_sd, tuned_unet, picture_folder, kind):
    parts = tuple(TrainingItem(str(picture_folder), caption) for caption in (CAPTION, "a cat"))
    unknown = {"checkpoint": Checkpoint(str(tuned_unet), str(tiny_sd)), "mixture": FineTune(parts, str(tiny_sd))}[kind]
    with pytest.raises(ValueError, match=r"no single caption is known of .*: give Generate a caption, or caption=''"):
        results.run([asked(3), replace(asked(3), model=unknown)])
    assert not runs.exists(), "nothing was begun"
    for caption in ("", "a cat"):
        assert results.digest(replace(asked(3), model=unknown, caption=caption))


def test_a_caption_too_long_is_refused_before_any_work(asked, runs):
    with pytest.raises(ValueError, match="has 32 tokens, the text encoder reads at most 16"):
        results.run([asked(3), asked(3, caption="dog " * 30)])
    assert not runs.exists()


# precision


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_networks_have_the_precision_asked_for_and_guidance_is_in_float32(asked, monkeypatch, precision):
    dtype, walked, seen = sampling.PRECISIONS[precision], sampling.walk, []
    guided, decoded = guidance.finextract, sampling.decode

    def walk(predict, x, *rest, **options):
        reference, target = predict(x, torch.tensor(500))
        seen.append((x.dtype, reference.dtype, target.dtype))
        return walked(predict, x, *rest, **options)

    def finextract(reference, target, *rest):
        seen.append((reference.dtype, target.dtype))
        return guided(reference, target, *rest)

    def decode(pipeline, latents, *rest):
        parts = (pipeline.unet, pipeline.text_encoder, pipeline.vae)
        seen.append((latents.dtype, *(part.dtype for part in parts)))
        return decoded(pipeline, latents, *rest)

    monkeypatch.setattr(sampling, "walk", walk)
    monkeypatch.setattr(guidance, "finextract", finextract)
    monkeypatch.setattr(sampling, "decode", decode)
    results.complete(asked(2, precision=precision))
    single = torch.float32
    assert set(seen) == {(single,) * 3, (single,) * 2, (single, dtype, dtype, single)}


def test_half_precision_gives_nearly_the_same_images(asked):
    specs = {name: asked(10, steps=3, precision=name) for name in sampling.PRECISIONS}
    results.run(specs.values())
    single = generated_pictures(specs["float32"])
    for name in ("bfloat16", "float16"):
        apart = np.abs(generated_pictures(specs[name]).astype(int) - single)
        assert apart.mean() < 2
        assert apart.max() > 0
