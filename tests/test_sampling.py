"""Sampling against diffusers' own pipeline and closed forms; resume, batches and seeds."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from scipy import stats

from fx import results, sampling
from fx.finetune import FineTune
from fx.mini.sd import scheduler
from fx.models import ModelPair, encode_caption, load_pair
from fx.sampling import Generate

CAPTION = "a dog"
SHAPE = (4, 4, 4)
STEPS = 3
# alpha-bar of Stable Diffusion's schedule, float64 [1000]
KEPT = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


@pytest.fixture(scope="module")
def pair(tiny_pipeline) -> ModelPair:
    """The tiny base model and a theta' whose weights are moved by noise."""
    tuned = copy.copy(tiny_pipeline)
    tuned.unet = copy.deepcopy(tiny_pipeline.unet)
    tuned.scheduler = DDIMScheduler.from_config(tiny_pipeline.scheduler.config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.unet.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
    return ModelPair(tuned, tiny_pipeline.unet)


@pytest.fixture(scope="module")
def same_pair(tiny_pipeline) -> ModelPair:
    """A pair without fine-tuning: theta' is theta."""
    return ModelPair(tiny_pipeline, tiny_pipeline.unet)


def images(pair: ModelPair, arm: str, w: float = 1.0, k: float = 0.0, caption: str = CAPTION) -> torch.Tensor:
    """Three samples before they are rounded, float32 [3, 3, 16, 16]."""
    predict = sampling.predictor(pair, caption, arm, w, k)
    x = sampling.starting_latents(SHAPE, 7, 0, 3)
    return sampling.decode(pair.pipeline, sampling.ddim(predict, x, pair.pipeline.scheduler, STEPS))


def grey_levels(first: np.ndarray, second: np.ndarray) -> int:
    """The largest difference of two uint8 arrays."""
    return int(np.abs(first.astype(int) - second.astype(int)).max())


# the arms


@pytest.mark.parametrize(("arm", "w"), [("direct", 1.0), ("cfg", 3.0), ("cfg", 7.5)])
def test_direct_and_cfg_are_what_the_stock_pipeline_samples(pair, arm, w):
    parts = {name: part for name, part in pair.pipeline.components.items() if name != "scheduler"}
    stock = StableDiffusionPipeline(**parts, scheduler=scheduler(), requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    expected = stock(
        [CAPTION] * 3,
        num_inference_steps=STEPS,
        guidance_scale=w,
        latents=sampling.starting_latents(SHAPE, 7, 0, 3),
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
    text, empty = (encode_caption(pair.pipeline, caption).repeat(2, 1, 1) for caption in (CAPTION, ""))
    with torch.no_grad():
        theta, theta_prime = pair.base_unet(x, t, empty).sample, pair.pipeline.unet(x, t, text).sample
        found = sampling.predictor(pair, CAPTION, "finextract", w, k)(x, t)
    assert torch.allclose(found, theta_prime + (w - 1) * (theta_prime - theta) + k * theta, atol=1e-5)


@pytest.mark.parametrize(("arm", "prompt"), [("conditional_only", CAPTION), ("model_guidance", "")])
def test_eq_6_is_on_two_unets_with_one_caption(pair, arm, prompt):
    x, t = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(4)), torch.tensor(400)
    text = encode_caption(pair.pipeline, prompt).repeat(2, 1, 1)
    with torch.no_grad():
        theta, theta_prime = pair.base_unet(x, t, text).sample, pair.pipeline.unet(x, t, text).sample
        found = sampling.predictor(pair, CAPTION, arm, 3.0, 0.0)(x, t)
    assert torch.allclose(found, theta_prime + 2 * (theta_prime - theta), atol=1e-5)
    assert (found - theta_prime).abs().max() > 1e-2


@pytest.mark.parametrize(("arm", "prompt"), [("conditional_only", CAPTION), ("model_guidance", "")])
def test_without_fine_tuning_model_guidance_is_plain_sampling_at_every_scale(same_pair, arm, prompt):
    plain = images(same_pair, "direct", caption=prompt)
    for w in (0.0, 1.0, 4.0):
        assert torch.allclose(images(same_pair, arm, w), plain, atol=1e-5)


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
        sampling.predictor(pair, CAPTION, arm, w, k)
    with pytest.raises(ValueError, match=message):
        Generate(FineTune("style/mimooh"), arm, w, k)


@pytest.mark.parametrize("options", [{"images_per_training": 0}, {"steps": 0}, {"steps": 1000}])
def test_impossible_numbers_are_refused(options):
    with pytest.raises(ValueError, match=r"images_per_training .* must be at least 1, steps .* within 1\.\.999"):
        Generate(FineTune("style/mimooh"), **options)


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
    found = sampling.ddim(gaussian(mean, deviation), torch.from_numpy(x), scheduler(), steps).numpy()
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
    found = sampling.ddim(gaussian(mean, deviation), x, scheduler(), steps)
    spread = [np.sqrt(kept * deviation**2 + 1 - kept) for kept in (KEPT[999], KEPT[0])]
    expected = KEPT[0] ** 0.5 * mean + spread[1] * (x - KEPT[999] ** 0.5 * mean) / spread[0]
    assert (found - expected).abs().max() < 0.02
    assert abs(found.std() - deviation) < 0.03


def test_the_callback_gets_every_timestep_and_the_latents_after_it():
    seen = []
    x = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    last = sampling.ddim(gaussian(0, 1), x, scheduler(), 10, lambda t, now: seen.append((t, now)))
    assert [t for t, _ in seen] == list(range(901, 0, -100))
    assert torch.equal(seen[-1][1], last)
    assert len({float(now.mean()) for _, now in seen}) == 10


# seeds and batches


def test_image_i_owns_its_starting_latent():
    all_of_them = sampling.starting_latents(SHAPE, 3, 0, 12)
    assert (all_of_them.shape, all_of_them.dtype) == ((12, *SHAPE), torch.float32)
    assert torch.equal(sampling.starting_latents(SHAPE, 3, 5, 9), all_of_them[5:9])
    assert torch.equal(sampling.starting_latents(SHAPE, 3, 11, 12), all_of_them[11:])
    both_seeds = torch.cat([all_of_them, sampling.starting_latents(SHAPE, 4, 0, 12)])
    assert len(both_seeds.unique(dim=0)) == 24


def test_starting_latents_are_independent_standard_normal():
    rows = sampling.starting_latents((100,), 0, 0, 300).numpy()
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
        expected = pair.pipeline.vae.decode(latents / 0.18215).sample
    for chunk in (1, 2, 16):
        assert torch.allclose(sampling.decode(pair.pipeline, latents, chunk), expected, atol=1e-4)


def test_finished_batches_are_not_sampled_again(pair, tmp_path, monkeypatch):
    options = {"n": 5, "w": 2.0, "steps": 1, "seed": 7, "batch_size": 2, "scratch": tmp_path}
    sample_batch, ranges = sampling._sample_batch, []

    def counted(pair, predict, first, last, *rest):
        if len(ranges) == 2:
            raise RuntimeError("killed")
        ranges.append((first, last))
        return sample_batch(pair, predict, first, last, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(sampling, "_sample_batch", counted)
        with pytest.raises(RuntimeError, match="killed"):
            sampling.sample(pair, CAPTION, **options)
        assert ranges == [(0, 2), (2, 4)]
        ranges[:] = ["as if one batch were done"]
        whole = sampling.sample(pair, CAPTION, **options)
        assert ranges[1:] == [(4, 5)]
    monkeypatch.setattr(ModelPair, "tuned", lambda *_: pytest.fail("theta' was asked"))
    assert np.array_equal(sampling.sample(pair, CAPTION, **options), whole)
    monkeypatch.undo()
    assert np.array_equal(sampling.sample(pair, CAPTION, **{**options, "scratch": None}), whole)


def test_a_batch_that_does_not_fit_is_halved(pair, monkeypatch):
    options = {"n": 5, "w": 2.0, "steps": 1, "seed": 7}
    expected = sampling.sample(pair, CAPTION, **options)
    sample_batch, limit, ranges = sampling._sample_batch, 2, []

    def small(pair, predict, first, last, *rest):
        if last - first > limit:
            raise torch.OutOfMemoryError
        ranges.append((first, last))
        return sample_batch(pair, predict, first, last, *rest)

    monkeypatch.setattr(sampling, "_sample_batch", small)
    assert grey_levels(sampling.sample(pair, CAPTION, batch_size=4, **options), expected) <= 1
    assert ranges == [(0, 2), (2, 4), (4, 5)]
    limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        sampling.sample(pair, CAPTION, batch_size=4, **options)


# the step of the runner


def test_the_step_samples_n_images_of_the_fine_tuned_model(runs, tiny_sd, picture_folder):
    tune = FineTune(str(picture_folder), CAPTION, str(tiny_sd), learning_rate=1e-3, steps_per_image=1)
    spec = Generate(tune, "finextract", 2.0, -0.02, images_per_training=2, steps=2, seed=9)
    folder = results.complete(spec)
    found = np.load(folder / "images.npy")
    assert (found.shape, found.dtype) == ((8, 16, 16, 3), np.uint8)
    expected = sampling.sample(
        load_pair(str(tiny_sd), results.folder(tune)), CAPTION, 8, "finextract", 2.0, -0.02, steps=2, seed=9
    )
    assert np.array_equal(found, expected)
    assert not (runs / "scratch" / folder.name).exists()
    others = [{"arm": "cfg", "correction_scale": 0.0}, {"guidance_scale": 3.0}, {"correction_scale": 0.0}, {"steps": 3}]
    digests = {results.digest(replace(spec, **change)) for change in [*others, {"seed": 8}, {}]}
    assert len(digests) == 6
