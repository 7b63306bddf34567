"""Model pairs: what is loaded, what is refused, and that theta stays theta beside a LoRA."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from fx import checkpoints, models
from fx.families import Condition, encode
from fx.sampling import ARMS

RANK = 2
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def tuned_folder(tiny_sd, tmp_path_factory) -> Path:
    """A folder whose unet/ has other random weights than the base model's."""
    folder = tmp_path_factory.mktemp("tuned")
    unet = UNet2DConditionModel.from_pretrained(tiny_sd / "unet")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    unet.save_pretrained(folder / "unet")
    return folder


@pytest.fixture(scope="module")
def lora_folder(tiny_pipeline, tmp_path_factory) -> Path:
    """A folder with a LoRA of rank 2 on every query and value projection, written without diffusers or peft."""
    generator, tensors = torch.Generator().manual_seed(2), {}
    for name, module in tiny_pipeline.unet.named_modules():
        if name.endswith(("to_q", "to_v")):
            down, up = (RANK, module.in_features), (module.out_features, RANK)
            tensors[f"unet.{name}.lora_A.weight"] = torch.randn(down, generator=generator)
            tensors[f"unet.{name}.lora_B.weight"] = torch.randn(up, generator=generator)
    folder = tmp_path_factory.mktemp("lora")
    save_file(tensors, folder / models.LORA_FILE)
    return folder


@pytest.fixture(scope="module")
def lora_pair(tiny_sd, lora_folder) -> models.ModelPair:
    return models.load_pair(str(tiny_sd), lora_folder)


@pytest.fixture(scope="module")
def asked(tiny_pipeline) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    """Three latents, a timestep and an encoded caption."""
    x = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    return x, torch.tensor(500), encode(tiny_pipeline, "a dog")


def plain(unet, asked) -> torch.Tensor:
    """The noise prediction of diffusers' U-Net itself."""
    x, t, text = asked
    with torch.no_grad():
        return unet(x, t, text.text.repeat(len(x), 1, 1)).sample


# loading


def test_an_unknown_model_is_refused_with_the_shipped_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "MODELS", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"'nothing': .*shipped models: none"):
        models.model_folder("nothing")
    for name in ("b-sd", "a-sd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text("{}")
    (tmp_path / "mini-vae").mkdir()
    with pytest.raises(FileNotFoundError, match=r"'none': .*shipped models: a-sd, b-sd\)$"):
        models.model_folder("none")
    with pytest.raises(FileNotFoundError, match="mini-vae holds no model"):
        models.model_folder("mini-vae")
    assert models.model_folder("a-sd") == tmp_path / "a-sd"


def test_a_pipeline_is_float32_frozen_and_has_the_ddim_scheduler(tiny_sd, tmp_path):
    saved = StableDiffusionPipeline.from_pretrained(tiny_sd)
    settings = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "skip_prk_steps": True}
    saved.scheduler = PNDMScheduler(**settings, steps_offset=1)
    saved.to(torch.float16).save_pretrained(tmp_path)
    pipeline = models.load_pipeline(str(tmp_path))
    assert type(pipeline.scheduler) is DDIMScheduler
    assert pipeline.scheduler.config.beta_end == 0.012
    assert not pipeline.scheduler.config.clip_sample  # latents reach beyond [-1, 1]
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        assert not part.training
        for parameter in part.parameters():
            assert (parameter.dtype, parameter.requires_grad) == (torch.float32, False)
    stored = load_file(tmp_path / "unet" / WEIGHTS)
    assert torch.equal(pipeline.unet.conv_in.weight, stored["conv_in.weight"].float())


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("unet", "diffusion_pytorch_model.bin"),
        ("vae", "diffusion_pytorch_model.bin"),
        ("text_encoder", "pytorch_model.bin"),
    ],
)
def test_a_pipeline_with_a_part_as_pickle_only_is_refused(tiny_sd, tmp_path, part, name):
    folder = tmp_path / "model"
    shutil.copytree(tiny_sd, folder)
    weights = next((folder / part).glob("*.safetensors"))
    torch.save(load_file(weights), folder / part / name)
    models.load_pipeline(str(folder))  # beside safetensors it is not read and does no harm
    weights.unlink()
    with pytest.raises(ValueError, match=rf"{part}/{name} is a pickle.*only safetensors"):
        models.load_pipeline(str(folder))


def test_a_fine_tuned_model_with_a_pickle_is_refused(tiny_sd, tuned_folder, lora_folder, tmp_path):
    shutil.copytree(tuned_folder, tmp_path / "a")
    weights = tmp_path / "a/unet" / WEIGHTS
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    (tmp_path / "b").mkdir()
    torch.save(load_file(lora_folder / models.LORA_FILE), tmp_path / "b/pytorch_lora_weights.bin")
    for folder in ("a", "b"):
        with pytest.raises(ValueError, match=r"\.bin is a pickle"):
            models.load_pair(str(tiny_sd), tmp_path / folder)


# captions


@pytest.mark.parametrize("caption", ["", "a dog", "a dog a dog a"])
def test_captions_are_encoded_as_the_pipeline_does(tiny_pipeline, caption):
    expected, empty = tiny_pipeline.encode_prompt(caption, tiny_pipeline.device, 1, True)
    assert expected.shape == (1, 16, 32)
    assert torch.allclose(encode(tiny_pipeline, caption).text, expected, atol=1e-6)
    assert torch.allclose(encode(tiny_pipeline, "").text, empty, atol=1e-6)


def test_a_caption_of_all_tokens_fits_and_one_more_is_refused_with_both_counts(tiny_pipeline):
    assert encode(tiny_pipeline, "dog " * 14).text.shape == (1, 16, 32)  # start, 14 words, end
    with pytest.raises(ValueError, match="has 17 tokens, the text encoder reads at most 16"):
        encode(tiny_pipeline, "dog " * 15)


# pairs


def test_a_pair_with_a_unet_folder_has_both_unets(tiny_sd, tiny_pipeline, tuned_folder, asked):
    pair = models.load_pair(str(tiny_sd), tuned_folder)
    tuned = UNet2DConditionModel.from_pretrained(tuned_folder / "unet")
    with torch.no_grad():
        assert torch.allclose(pair.predict("base", *asked), plain(tiny_pipeline.unet, asked), atol=1e-6)
        assert torch.allclose(pair.predict("tuned", *asked), plain(tuned, asked), atol=1e-6)
        assert (pair.predict("tuned", *asked) - pair.predict("base", *asked)).abs().max() > 1e-2
    assert not any(p.requires_grad for unet in (pair.base.unet, pair.tuned.unet) for p in unet.parameters())


def test_theta_of_a_lora_pair_is_the_untouched_unet(lora_pair, tiny_pipeline, asked):
    with torch.no_grad():
        for _ in range(2):  # switching back and forth leaves no trace
            assert torch.equal(lora_pair.predict("base", *asked), plain(tiny_pipeline.unet, asked))
            assert (lora_pair.predict("tuned", *asked) - plain(tiny_pipeline.unet, asked)).abs().max() > 1e-2


def test_theta_prime_of_a_lora_pair_is_the_unet_with_the_adapter_added(
    lora_pair, lora_folder, tiny_sd, tiny_pipeline, asked
):
    by_hand = copy.deepcopy(tiny_pipeline.unet)
    layers = load_file(lora_folder / models.LORA_FILE)
    with torch.no_grad():
        for name, module in by_hand.named_modules():
            if name.endswith(("to_q", "to_v")):
                module.weight += layers[f"unet.{name}.lora_B.weight"] @ layers[f"unet.{name}.lora_A.weight"]
    fused = StableDiffusionPipeline.from_pretrained(tiny_sd)
    fused.load_lora_weights(lora_folder, weight_name=models.LORA_FILE)
    fused.fuse_lora()
    fused.unload_lora_weights()
    with torch.no_grad():
        found = lora_pair.predict("tuned", *asked)
    assert torch.allclose(found, plain(by_hand, asked), atol=1e-5)
    assert torch.allclose(found, plain(fused.unet, asked), atol=1e-5)


def test_theta_prime_keeps_its_adapter_when_theta_fails(lora_pair, asked, monkeypatch):
    with torch.no_grad():
        before = lora_pair.predict("tuned", *asked)
        with monkeypatch.context() as broken:
            broken.setattr(models, "denoise", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError))
            with pytest.raises(torch.OutOfMemoryError):
                lora_pair.predict("base", *asked)
        assert torch.equal(lora_pair.predict("tuned", *asked), before)


@pytest.mark.parametrize("arm", ["cfg", "finextract", "conditional_only", "model_guidance"])
def test_one_network_answers_for_both_models_in_one_forward_pass(lora_pair, asked, arm, monkeypatch):
    x, t, _ = asked
    ends = (ARMS[arm].reference, ARMS[arm].target)
    with torch.no_grad():
        expected = [
            lora_pair.predict(model, x, t, lora_pair.condition(model, "a dog" if captioned else ""))
            for model, captioned in ends
        ]
        predict = lora_pair.predictions(*ends, "a dog")
        batches, forward = [], models.denoise
        monkeypatch.setattr(models, "denoise", lambda unet, x, *rest: batches.append(len(x)) or forward(unet, x, *rest))
        for _ in range(2):
            found = predict(x, t)
            for part, wanted in zip(found, expected, strict=True):
                assert torch.allclose(part, wanted, atol=1e-5)
    assert batches == [6, 6]
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    assert not any(layer._forward_hooks for layer in lora_pair.tuned.unet.modules())


def test_one_forward_pass_scales_the_adapter_as_two_do(tiny_sd, asked):
    """Of alpha 6 at rank 2: three times the product of its factors."""
    first = models.load_pipeline(str(tiny_sd))
    settings = LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_v"], init_lora_weights=False)
    first.unet.add_adapter(settings)
    first.unet.eval()
    pair, (x, t, text) = models.ModelPair(first, first), asked
    with torch.no_grad():
        base, tuned = pair.predictions(("base", True), ("tuned", True), "a dog")(x, t)
        assert torch.allclose(tuned, plain(first.unet, (x, t, text)), atol=1e-5)
        first.unet.disable_adapters()
        assert torch.allclose(base, plain(first.unet, (x, t, text)), atol=1e-5)
    assert (tuned - base).abs().max() > 1e-2


@pytest.mark.parametrize("ends", [(("base", False), ("base", True)), (("tuned", True), ("base", True))])
def test_any_two_predictions_can_be_asked_for(lora_pair, asked, ends):
    x, t, _ = asked
    with torch.no_grad():
        found = lora_pair.predictions(*ends, "a dog")(x, t)
        for part, (model, captioned) in zip(found, ends, strict=True):
            wanted = lora_pair.predict(model, x, t, lora_pair.condition(model, "a dog" if captioned else ""))
            assert torch.allclose(part, wanted, atol=1e-5)


def test_dora_which_cannot_be_mixed_is_asked_twice(tiny_sd, asked):
    first = models.load_pipeline(str(tiny_sd))
    first.unet.add_adapter(
        LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], use_dora=True, init_lora_weights=False)
    )
    first.unet.eval()
    pair, (x, t, _) = models.ModelPair(first, first), asked
    assert not models.mixable(first.unet)
    with torch.no_grad():
        base, tuned = pair.predictions(("base", False), ("tuned", True), "a dog")(x, t)
        assert torch.allclose(base, pair.predict("base", x, t, pair.condition("base", "")), atol=1e-6)
        assert torch.allclose(tuned, pair.predict("tuned", x, t, pair.condition("tuned", "a dog")), atol=1e-6)
        first.unet.disable_adapters()
        assert torch.allclose(base, plain(first.unet, (x, t, encode(first, ""))), atol=1e-6)


def test_each_model_encodes_with_its_own_text_encoder_and_adapters_are_off_for_theta(tiny_sd, tiny_pipeline):
    first = models.load_pipeline(str(tiny_sd))
    second = copy.copy(first)
    second.text_encoder = copy.deepcopy(first.text_encoder)
    with torch.no_grad():
        second.text_encoder.get_input_embeddings().weight.mul_(2)
    pair = models.ModelPair(first, second)
    plain_text = encode(tiny_pipeline, "a dog").text
    assert torch.equal(pair.condition("base", "a dog").text, plain_text)
    assert not torch.allclose(pair.condition("tuned", "a dog").text, plain_text, atol=1e-3)
    settings = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], init_lora_weights=False)
    first.text_encoder.add_adapter(settings)
    adapted = models.ModelPair(first, first)
    for _ in range(2):
        assert torch.allclose(adapted.condition("base", "a dog").text, plain_text, atol=1e-6)
        assert not torch.allclose(adapted.condition("tuned", "a dog").text, plain_text, atol=1e-3)


# models that speak in different parametrisations or schedules


def pair_with(tiny_pipeline, base: dict, tuned: dict) -> models.ModelPair:
    """Two pipelines on the tiny U-Net whose schedulers differ from the tiny one's by these settings."""
    first, second = copy.copy(tiny_pipeline), copy.copy(tiny_pipeline)
    first.scheduler = DDIMScheduler.from_config(tiny_pipeline.scheduler.config, **base)
    second.scheduler = DDIMScheduler.from_config(tiny_pipeline.scheduler.config, **tuned)
    second.unet = copy.deepcopy(tiny_pipeline.unet)
    return models.ModelPair(first, second)


@pytest.mark.parametrize(
    "kinds", [("epsilon", "v_prediction"), ("v_prediction", "epsilon"), ("sample", "v_prediction")]
)
def test_theta_speaks_as_theta_prime_does(tiny_pipeline, asked, kinds):
    """Two models that know the same eps agree whatever they predict."""
    x, t, condition = asked
    pair = pair_with(tiny_pipeline, *({"prediction_type": kind} for kind in kinds))
    kept = float(tiny_pipeline.scheduler.alphas_cumprod[500])
    alpha, sigma = kept**0.5, (1 - kept) ** 0.5
    with torch.no_grad():
        said = plain(tiny_pipeline.unet, asked)  # in theta's own words
        found = pair.predict("base", x, t, condition)
    eps = {"epsilon": said, "v_prediction": alpha * said + sigma * x, "sample": (x - alpha * said) / sigma}[kinds[0]]
    wanted = {"epsilon": eps, "v_prediction": alpha * eps - sigma * (x - sigma * eps) / alpha}[kinds[1]]
    assert torch.allclose(found, wanted, atol=1e-4)


def test_theta_of_another_schedule_is_asked_at_the_same_log_snr(tiny_pipeline, asked):
    x, t, condition = asked
    pair = pair_with(tiny_pipeline, {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}, {})
    kept = pair.base.scheduler.alphas_cumprod
    level = pair.tuned.scheduler.alphas_cumprod[500]
    same = models.same_level(kept, float(level))
    low, high = int(same), int(same) + 1
    assert kept[high] <= level <= kept[low]
    with torch.no_grad():
        found = pair.predict("base", x, t, condition)
        assert torch.allclose(found, plain(tiny_pipeline.unet, (x, same, condition)), atol=1e-5)
        near = plain(tiny_pipeline.unet, (x, torch.tensor(round(float(same))), condition))
    assert torch.allclose(found, near, atol=0.05)
    for number in (0, 1, 333, 999):  # a schedule against itself
        assert float(models.same_level(kept, float(kept[number]))) == pytest.approx(number, abs=1e-2)


def test_a_folder_with_neither_or_with_a_foreign_lora_is_refused(tiny_sd, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no model: neither model_index\.json, nor a unet/"):
        models.load_pair(str(tiny_sd), tmp_path)
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    tensors = {f"{layer}.lora_A.weight": torch.zeros(2, 32), f"{layer}.lora_B.weight": torch.zeros(32, 2)}
    save_file(tensors, tmp_path / models.LORA_FILE)
    with pytest.raises(
        ValueError, match="no adapter for the unet of a StableDiffusionPipeline: its first keys are text"
    ):
        models.load_pair(str(tiny_sd), tmp_path)
