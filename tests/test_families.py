"""Every family: loaded from its published layout, encoded, sampled and decoded as the libraries' own classes do it."""

import copy
import inspect
import os
from types import SimpleNamespace

import numpy as np
import pytest
import supported
import tiny
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
)
from diffusers.pipelines.deprecated.alt_diffusion import RobertaSeriesModelWithTransformation
from diffusers.pipelines.deprecated.alt_diffusion.modeling_roberta_series import RobertaSeriesConfig

from fx import families, models, sampling

CAPTION = "a dog"
SHAPE = (4, 4, 4)
STEPS = 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A diffusers folder per family."""
    return {family: tiny.save(family, tmp_path_factory.mktemp("models") / family) for family in tiny.FAMILIES}


@pytest.fixture(scope="module")
def pipelines(folders):
    return {family: models.load_pipeline(str(folder)) for family, folder in folders.items()}


def stock(pipeline, scheduler):
    """The library's own pipeline of the same parts."""
    parts = {name: part for name, part in pipeline.components.items() if name != "scheduler"}
    options = {"requires_safety_checker": False} if "safety_checker" in parts else {}
    made = type(pipeline)(**parts, scheduler=scheduler, **options)
    made.set_progress_bar_config(disable=True)
    return made


def schedulers(pipeline) -> dict:
    """What each sampler should be, from diffusers' own classes."""
    config = pipeline.scheduler.config
    if isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
        return {"euler": FlowMatchEulerDiscreteScheduler.from_config(config)}
    ddim, dpm = {}, {"timestep_spacing": "linspace"}
    if config.rescale_betas_zero_snr:
        ddim = dpm = {"timestep_spacing": "trailing"}
    return {
        "ddim": DDIMScheduler.from_config(config, **ddim),
        "dpm++": DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++", **dpm),
    }


def asked(family: str, x: torch.Tensor, w: float) -> dict:
    """Starting latents and guidance as the stock pipeline takes them; the distilled FLUX.1 is told 1, which is none."""
    if family != "flux":
        return {"guidance_scale": w, "latents": x}
    guided = {"guidance_scale": 1.0, "true_cfg_scale": w, "negative_prompt": [""] * len(x)}
    return {"latents": packed_by_hand(x), **guided}


def packed_by_hand(x: torch.Tensor) -> torch.Tensor:
    """2x2 latents of all channels as one token, row by row."""
    n, _, h, w = x.shape
    squares = [x[:, :, i : i + 2, j : j + 2].reshape(n, -1) for i in range(0, h, 2) for j in range(0, w, 2)]
    return torch.stack(squares, dim=1)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(("arm", "w"), [("direct", 1.0), ("cfg", 3.0)])
def test_direct_and_cfg_are_what_the_stock_pipeline_samples(pipelines, family, arm, w):
    pipeline = pipelines[family]
    for sampler, scheduler in schedulers(pipeline).items():
        x = sampling.starting_latents(SHAPE, 7, range(2))
        options = {"num_inference_steps": STEPS, "output_type": "pt", **asked(family, x, w)}
        expected = stock(pipeline, scheduler)([CAPTION] * 2, **options).images
        predict = sampling.predictor(models.ModelPair(pipeline, pipeline), CAPTION, arm)
        walked = sampling.walk(predict, x, families.make_scheduler(pipeline, sampler), STEPS, w)
        found = families.decode(pipeline, walked)
        assert found.shape == (2, 3, 16, 16)
        assert torch.allclose((found / 2 + 0.5).clamp(0, 1), expected, atol=1e-4), sampler
        assert found.std() > 1e-3


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_without_fine_tuning_model_guidance_is_the_direct_sample_at_every_scale(pipelines, family):
    pipeline = pipelines[family]
    pair = models.ModelPair(pipeline, pipeline)
    sampler = next(iter(schedulers(pipeline)))
    for arm, prompt in (("conditional_only", CAPTION), ("model_guidance", "")):
        options = {"n": 2, "steps": STEPS, "sampler": sampler}
        plain = sampling.sample(pair, prompt, arm="direct", w=1.0, **options)
        for w in (0.0, 3.0, 20.0):
            found = sampling.sample(pair, CAPTION, arm=arm, w=w, **options)
            assert (found == plain).all()


def without_caption(family: str, pipeline) -> dict:
    """What the network of a family is given for two images without a caption, by the pipeline's own encoding.

    Of SDXL zeros, as force_zeros_for_empty_prompt says, and the sizes of original, corner and target.
    """
    if family == "sdxl":
        added = {"text_embeds": torch.zeros(2, 32), "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 2)}
        return {"encoder_hidden_states": torch.zeros(2, 16, 64), "added_cond_kwargs": added}
    if family == "sd3":
        text, _, pooled, _ = pipeline.encode_prompt(["", ""], None, None, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": text, "pooled_projections": pooled}
    if family == "flux":
        text, pooled, ids = pipeline.encode_prompt(["", ""])
        return {"encoder_hidden_states": text, "pooled_projections": pooled, "txt_ids": ids}
    return {"encoder_hidden_states": pipeline.encode_prompt(["", ""], "cpu", 1, False)[0]}


def answer(model, x: torch.Tensor, t: torch.Tensor, given: dict) -> torch.Tensor:
    """A network asked as its family is."""
    if "txt_ids" not in given:
        return model(x, timestep=t.expand(2), **given).sample
    places = torch.tensor([[0.0, i, j] for i in range(2) for j in range(2)])
    told = {"timestep": t.expand(2) / 1000, "guidance": torch.ones(2), "img_ids": places}
    tokens = model(packed_by_hand(x), **told, **given).sample
    squares = tokens.reshape(2, 2, 2, 4, 2, 2)  # image, row, column, channel, and within the square
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


def shifted(family: str) -> dict:
    """What FLUX.1's pipeline tells its schedule: even steps, and the shift of an image of four tokens."""
    mu = 0.5 + (4 - 256) / (4096 - 256) * (1.15 - 0.5)
    return {"sigmas": np.linspace(1, 1 / STEPS, STEPS), "mu": mu} if family == "flux" else {}


@torch.no_grad()
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_model_guidance_walks_along_eq_6_of_the_two_networks_without_a_caption(pipelines, family):
    """Once more with the networks themselves, the stock scheduler and Eq. 6 as it is printed."""
    base, w = pipelines[family], 3.0
    tuned, part = copy.copy(base), families.network_name(base)
    moved = copy.deepcopy(families.network(base))
    generator = torch.Generator().manual_seed(1)
    for parameter in moved.parameters():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    setattr(tuned, part, moved)
    sampler, scheduler = next(iter(schedulers(base).items()))
    start = sampling.starting_latents(SHAPE, 7, range(2))
    given, x = without_caption(family, base), start
    scheduler.set_timesteps(STEPS, **shifted(family))
    for t in scheduler.timesteps:
        theta, theta_prime = (answer(model, x, t, given) for model in (families.network(base), moved))
        x = scheduler.step(theta_prime + (w - 1) * (theta_prime - theta), t, x).prev_sample
    found = sampling.sample(
        models.ModelPair(base, tuned), CAPTION, 2, "model_guidance", w, steps=STEPS, seed=7, sampler=sampler
    )
    expected = families.decode(base, x).permute(0, 2, 3, 1).numpy().clip(-1, 1) * 127.5 + 127.5
    assert np.abs(found - expected).max() <= 0.5 + 0.1
    direct = sampling.sample(models.ModelPair(base, tuned), "", 2, "direct", 1.0, steps=STEPS, seed=7, sampler=sampler)
    assert np.abs(found.astype(int) - direct).max() > 5, "the guidance shows"


@pytest.mark.parametrize("pre", [False, True])
def test_alt_encoder_is_the_published_one(pre, tmp_path):
    """Weights saved by the published class are read by ours and give its projected states."""
    tokenizer = tiny.roberta_tokenizer()
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = RobertaSeriesConfig(vocab_size=len(tokenizer), project_dim=32, has_pre_transformation=pre, **size)
    torch.manual_seed(0)
    published = RobertaSeriesModelWithTransformation(config).eval()
    published.save_pretrained(tmp_path)
    ours = families.AltTextEncoder.from_pretrained(tmp_path).eval()
    inputs = tokenizer(["a dog", "a cat sat"], padding="max_length", max_length=16, return_tensors="pt")
    with torch.no_grad():
        expected = published(inputs.input_ids, attention_mask=inputs.attention_mask).projection_state
        found = ours(inputs.input_ids, attention_mask=inputs.attention_mask)[0]
    assert found.shape == (2, 16, 32)
    assert torch.allclose(found, expected, atol=1e-6)
    assert ours.config.use_attention_mask


def test_sdxl_gets_zeros_for_no_caption_and_pooled_text_and_sizes_beside_it(pipelines):
    empty, full = (families.encode(pipelines["sdxl"], caption) for caption in ("", CAPTION))
    assert not empty.text.any()
    assert not empty.added["text_embeds"].any()
    assert full.text.shape == (1, 16, 64)
    assert full.added["text_embeds"].shape == (1, 32)
    assert full.added["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]]


def test_captions_of_a_batch_bring_all_that_belongs_to_them(pipelines):
    """SDXL's pooled text goes with the caption of its row."""
    first, second = (families.encode(pipelines["sdxl"], caption) for caption in ("a dog", "a cat"))
    rows = first.followed_by(second).rows(torch.tensor([1, 0, 1]))
    expected = [second, first, second]
    assert torch.equal(rows.text, torch.cat([one.text for one in expected]))
    assert rows.added.keys() == first.added.keys()
    for name, value in rows.added.items():
        assert torch.equal(value, torch.cat([one.added[name] for one in expected]))
    assert not torch.equal(first.added["text_embeds"], second.added["text_embeds"])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_caption_that_does_not_fit_is_refused(pipelines, family):
    limit = 512 if family == "flux" else 16
    with pytest.raises(ValueError, match=f"tokens, the text encoder reads at most {limit}: shorten it"):
        families.encode(pipelines[family], "dog " * 2 * limit)


def test_flux_reads_by_t5_what_clip_cuts_off(pipelines):
    """As the published pipeline does: what CLIP gives it is one vector."""
    long, longer = (families.encode(pipelines["flux"], "a " * n) for n in (30, 60))
    assert long.text.shape == longer.text.shape == (1, 512, 32)
    assert not torch.equal(long.text, longer.text)
    assert torch.equal(long.added["pooled_projections"], longer.added["pooled_projections"])


@pytest.mark.parametrize("dynamic", [True, False])
def test_flux_that_is_not_distilled_or_not_shifted_is_sampled_as_its_pipeline_does(dynamic):
    """FLUX.1-schnell has neither a guidance embedding nor a shift by the size of the image."""
    torch.manual_seed(0)
    pipeline = tiny.flux(tiny.byte_tokenizer(), guidance_embeds=False)
    for part in families.text_encoders(pipeline):
        part.eval()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0 + dynamic, use_dynamic_shifting=dynamic)
    pipeline.set_progress_bar_config(disable=True)
    x = sampling.starting_latents(SHAPE, 7, range(2))
    expected = stock(pipeline, FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config))(
        [CAPTION] * 2, latents=packed_by_hand(x), num_inference_steps=STEPS, output_type="pt"
    ).images
    predict = sampling.predictor(models.ModelPair(pipeline, pipeline), CAPTION, "direct")
    found = families.decode(pipeline, sampling.walk(predict, x, families.make_scheduler(pipeline, "euler"), STEPS))
    assert torch.allclose((found / 2 + 0.5).clamp(0, 1), expected, atol=1e-4)


def test_stable_diffusion_3_with_a_dynamic_shift_is_sampled_as_its_pipeline_does(pipelines):
    pipeline = copy.copy(pipelines["sd3"])
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.7, max_shift=2.0)
    x = sampling.starting_latents(SHAPE, 7, range(2))
    made = stock(pipeline, FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config))
    expected = made([CAPTION] * 2, latents=x, num_inference_steps=STEPS, guidance_scale=1.0, output_type="pt").images
    predict = sampling.predictor(models.ModelPair(pipeline, pipeline), CAPTION, "direct")
    found = families.decode(pipeline, sampling.walk(predict, x, families.make_scheduler(pipeline, "euler"), STEPS))
    assert torch.allclose((found / 2 + 0.5).clamp(0, 1), expected, atol=1e-4)


def test_packing_is_undone_by_unpacking_and_is_that_of_2x2_squares():
    x = torch.randn(3, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(families.pack(x), packed_by_hand(x))
    assert torch.equal(families.unpack(families.pack(x), 6, 8), x)


def test_the_third_text_encoder_of_stable_diffusion_3_reads_256_tokens_whatever_its_tokenizer_would():
    """T5's tokenizers allow 512 and more; the pipeline cuts at max_sequence_length, 256 by default."""

    def tokenizer(caption):
        return SimpleNamespace(input_ids=caption.split())

    tokenizer.model_max_length = 512
    pipeline = SimpleNamespace(tokenizer_3=tokenizer)
    families.check_caption(pipeline, "dog " * 256)
    with pytest.raises(ValueError, match="has 257 tokens, the text encoder reads at most 256"):
        families.check_caption(pipeline, "dog " * 257)
    default = inspect.signature(StableDiffusion3Pipeline.encode_prompt).parameters["max_sequence_length"].default
    assert default == 256


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3"])
def test_in_half_precision_latents_and_autoencoder_stay_in_float32(folders, family):
    pipeline = models.load_pipeline(str(folders[family]), torch.bfloat16)
    assert families.network(pipeline).dtype == torch.bfloat16
    assert pipeline.vae.dtype == torch.float32
    seen = []
    sampler = next(iter(schedulers(pipeline)))
    pair = models.ModelPair(pipeline, pipeline)
    sampling.sample(pair, CAPTION, 1, "cfg", 3.0, steps=2, sampler=sampler, callback=lambda t, x: seen.append(x.dtype))
    assert seen == [torch.float32] * 2


@pytest.mark.parametrize(
    ("family", "sampler", "message"),
    [
        ("sd1", "euler", "the sampler euler does not fit a model with epsilon: use ddim, dpm"),
        ("sd3", "ddim", "the sampler ddim does not fit a model with flow_prediction: use euler"),
        ("sd2", "published", "written for epsilon models, this one has v_prediction"),
        ("sd1", "heun", "unknown sampler 'heun': choose from ddim"),
    ],
)
def test_samplers_that_do_not_fit_the_model_are_refused(pipelines, family, sampler, message):
    pair = models.ModelPair(pipelines[family], pipelines[family])
    with pytest.raises(ValueError, match=message):
        sampling.sample(pair, CAPTION, 1, sampler=sampler)


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_latents_are_never_clipped_or_thresholded_whatever_the_folder_says(folders, sampler):
    """Both are for pixels; a scheduler_config.json of a pixel model has them."""
    pipeline = models.load_pipeline(str(folders["sd1"]))
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=True, thresholding=True)
    config = families.make_scheduler(pipeline, sampler).config
    assert not config.thresholding
    assert sampler == "dpm++" or not config.clip_sample  # DPM-Solver++ knows no clipping


def test_zero_terminal_snr_is_walked_from_its_end_and_refused_for_eps(pipelines, folders):
    walked = families.make_scheduler(pipelines["sd2"], "ddim")
    walked.set_timesteps(4)
    assert walked.timesteps[0] == 999
    assert walked.alphas_cumprod[999] == 0
    wrong = models.load_pipeline(str(folders["sd2"]))
    wrong.scheduler = DDIMScheduler.from_config(wrong.scheduler.config, prediction_type="epsilon")
    with pytest.raises(ValueError, match=r"zero SNR.*epsilon model cannot start from there"):
        families.make_scheduler(wrong, "ddim")
    pair = models.ModelPair(pipelines["sd2"], pipelines["sd2"])
    with pytest.raises(ValueError, match="at alpha = 0"):
        sampling.sample(pair, CAPTION, 1, "finextract", 3.0, k=0.1, steps=2)
    sampling.sample(pair, CAPTION, 1, "finextract", 3.0, k=(0.0, 0.1), steps=2)


def test_a_family_is_supported_where_its_test_ran():
    """Not where it was only collected: of two families' tests here one passed."""
    row = next(iter(supported.ROWS))
    lines = supported.page({f"tests/test_families.py::{row}[direct-1.0-sd1]"}).splitlines()
    assert [cell.strip() for cell in lines[-1].split("|")[2:-1]] == ["yes"] + [""] * (len(tiny.FAMILIES) - 1)
    assert supported.rows_run({f"a::{row}[sd1]"}) == {row}
    everywhere = {f"a::{row}[{family}]" for row in supported.ROWS for family in tiny.FAMILIES}
    assert supported.stale(everywhere), "no single file of every family is proven"
    assert not supported.stale(everywhere - {f"a::{row}[{family}]" for family in tiny.FAMILIES}), "a row did not run"


def test_the_page_of_what_is_supported_says_what_the_tests_prove():
    """Compared with the tests that ran before this one; side by side conftest.py compares, at the end of the session."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("one of several workers has not seen all tests; the page is compared when all have finished")
    if missing := sorted(set(supported.ROWS) - supported.rows_run(supported.PASSED)):
        pytest.skip(f"only after {missing[0]} has run")
    assert supported.PAGE.read_text() == supported.page(supported.PASSED)
