"""Adapters of every layout: theta' is what the file says by an independent reckoning, and theta stays what it was."""

import copy
import json
import logging
from pathlib import Path

import pytest
import tiny
import torch
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file

from fx import adapters, families, models, names_of_modules

LYCORIS = Path(__file__).parent / "fixtures/lycoris"
LINEAR, CONV = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k", "mid_block.resnets.0.conv1"
TO_Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
TO_OUT = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
TEXT = "text_model.encoder.layers.0.self_attn"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: tiny.save(family, root / family) for family in ("sd1", "sdxl", "sd3", "alt", "flux")}


@pytest.fixture(scope="module")
def loaded(folders) -> dict:
    """The base models, loaded once: only copies of them are given an adapter."""
    return {family: models.load_pipeline(str(folder)) for family, folder in folders.items()}


@pytest.fixture
def base(loaded):
    """A Stable Diffusion pipeline whose network and text encoder are this test's own."""
    return own(loaded["sd1"])


def own(pipeline):
    """The pipeline with copies of the parts that an adapter may be put on."""
    mine = copy.copy(pipeline)
    for name in (families.network_name(pipeline), "text_encoder", "text_encoder_2"):
        if getattr(pipeline, name, None) is not None:
            setattr(mine, name, copy.deepcopy(getattr(pipeline, name)))
    return mine


def factors(
    module: str, rank: int = 2, alpha: float | None = None, into: int = 32, out: int = 32, seed: int = 0
) -> dict:
    """A kohya layer for a module of the U-Net, or under the name given after "=", with its own rank and alpha."""
    key = module.removeprefix("=") if module.startswith("=") else "lora_unet_" + module.replace(".", "_")
    draw = torch.Generator().manual_seed(seed)
    tensors = {f"{key}.lora_down.weight": torch.randn(rank, into, generator=draw)}
    tensors[f"{key}.lora_up.weight"] = torch.randn(out, rank, generator=draw)
    return tensors | ({} if alpha is None else {f"{key}.alpha": torch.tensor(alpha)})


def saved(folder: Path, tensors: dict, metadata: dict | None = None) -> Path:
    save_file(tensors, folder / "adapter.safetensors", metadata=metadata)
    return folder / "adapter.safetensors"


def weight(model, name: str) -> torch.Tensor:
    """A module's weight with its adapter, if it has one, reckoned from peft's own difference."""
    module = model.get_submodule(name)
    return (
        module.base_layer.weight + module.get_delta_weight("default")
        if hasattr(module, "base_layer")
        else module.weight
    )


def change(before, after, name: str) -> torch.Tensor:
    """What an adapter adds to a module's weight."""
    return (weight(after, name) - before.get_submodule(name).weight).detach()


# layers without settings


@pytest.mark.parametrize("kind", sorted(p.stem for p in LYCORIS.glob("*[!s].safetensors")))
def test_every_kind_of_lycoris_layer_answers_as_lycoris_does(base, kind):
    """LyCORIS's own answers (fixtures/lycoris/make.py) for a linear layer and a convolution."""
    stored, answers = load_file(LYCORIS / "modules.safetensors"), load_file(LYCORIS / "answers.safetensors")
    with torch.no_grad():
        for name in (LINEAR, CONV):
            for key, value in base.unet.get_submodule(name).named_parameters():
                value.copy_(stored[f"{name}.{key}"])
        tuned = adapters.add(base, LYCORIS / f"{kind}.safetensors", "lora").unet
        for name in (LINEAR, CONV):
            x, wanted = stored[f"{name}.x"], answers[f"{kind}.{name}"]
            assert torch.allclose(tuned.get_submodule(name)(x), wanted, atol=1e-4), name
            with models.without_adapters([base.unet]):
                assert (base.unet.get_submodule(name)(x) - wanted).abs().max() > 0.01
                if kind == "locon":
                    assert tuned is base.unet, "a plain LoRA shares the network"
                original = torch.nn.functional.linear if name == LINEAR else torch.nn.functional.conv2d
                options = {} if name == LINEAR else {"padding": 1, "bias": stored[f"{name}.bias"]}
                theta = original(x, stored[f"{name}.weight"], **options)
                assert torch.allclose(base.unet.get_submodule(name)(x), theta, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_every_layer_has_its_own_scale_and_rank(base, loaded, tmp_path, dtype):
    """alpha / rank by hand; without alpha 1; alpha as a whole number; the text encoder's layers too."""
    tensors = factors(TO_Q, 2, 1.0) | factors(LINEAR, 4, None, seed=1) | factors(TO_OUT, 3, 12.0, seed=2)
    tensors |= factors(f"=lora_te_{TEXT.replace('.', '_')}_q_proj", 5, 2.0, seed=3)
    tensors = {name: value if "alpha" in name else value.to(dtype) for name, value in tensors.items()}
    tensors["lora_unet_" + TO_OUT.replace(".", "_") + ".alpha"] = torch.tensor(12)
    tuned = adapters.add(base, saved(tmp_path, tensors), "lora")
    assert tuned.unet is base.unet
    for name, scale in {TO_Q: 1 / 2, LINEAR: 1.0, TO_OUT: 4.0}.items():
        key = "lora_unet_" + name.replace(".", "_")
        by_hand = scale * tensors[f"{key}.lora_up.weight"].float() @ tensors[f"{key}.lora_down.weight"].float()
        assert torch.allclose(change(loaded["sd1"].unet, tuned.unet, name), by_hand, atol=1e-4)
    key = f"lora_te_{TEXT.replace('.', '_')}_q_proj"
    by_hand = 2 / 5 * tensors[f"{key}.lora_up.weight"].float() @ tensors[f"{key}.lora_down.weight"].float()
    encoder = loaded["sd1"].text_encoder
    assert torch.allclose(change(encoder, tuned.text_encoder, "encoder.layers.0.self_attn.q_proj"), by_hand, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        (f"unet.{TO_OUT}", ("lora_A.weight", "lora_B.weight")),
        (f"unet.{TO_OUT}", ("lora.down.weight", "lora.up.weight")),
        (f"unet.{TO_OUT}", ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight")),
        (TO_OUT.replace(".to_out.0", ".processor"), ("to_out_lora.down.weight", "to_out_lora.up.weight")),
        ("lora_unet_" + TO_OUT.replace(".", "_"), ("lora_A.weight", "lora_B.weight")),
        ("lora_unet_middle_block_1_transformer_blocks_0_attn1_to_out_0", ("lora_down.weight", "lora_up.weight")),
        ("diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_out.0", ("lora_down.weight", "lora_up.weight")),
        ("lycoris_" + TO_OUT.replace(".", "_"), ("lora_down.weight", "lora_up.weight")),
    ],
)
def test_a_layer_is_found_under_every_name(base, loaded, tmp_path, name, ending):
    down, up = torch.randn(2, 32), torch.randn(32, 2)
    tuned = adapters.add(base, saved(tmp_path, {f"{name}.{ending[0]}": down, f"{name}.{ending[1]}": up}), "lora")
    assert torch.allclose(change(loaded["sd1"].unet, tuned.unet, TO_OUT), up @ down, atol=1e-5)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_original_names_are_those_that_diffusers_converts(loaded, family):
    """Each weight under its original name comes out of diffusers' own conversion under the name it started from."""
    unet = loaded[family].unet
    original = names_of_modules.original_names(unet)
    assert original.keys() == set(names_of_modules.weighted(unet))
    named = {f"model.diffusion_model.{original[name]}.weight": torch.tensor(i) for i, name in enumerate(original)}
    if family == "sdxl":  # the conversion asks for biases only here and at up- and downsamplers
        named |= {key.replace("weight", "bias"): value for key, value in named.items() if "label_emb" in key}
    named |= {key.replace("weight", "bias"): torch.tensor(-1) for key in named if ".op." in key or ".conv." in key}
    converted = convert_ldm_unet_checkpoint(named, unet.config)
    for i, name in enumerate(original):
        assert int(converted[f"{name}.weight"]) == i, name


# the upsamplers in the files of Stable Diffusion 1.5 and SDXL 1.0; diffusers' conversion would take them at either place
WITHOUT_ATTENTION = {
    "sd1": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "sdxl": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
UPSAMPLERS = {"sd1": {0: "2.1", 1: "5.2", 2: "8.2"}, "sdxl": {0: "2.2", 1: "5.2"}}


@pytest.mark.parametrize("family", WITHOUT_ATTENTION)
def test_original_names_of_a_network_with_a_level_without_attention(family):
    up = WITHOUT_ATTENTION[family]
    down = tuple(name.replace("Up", "Down") for name in reversed(up))
    sizes = {"layers_per_block": 2, "block_out_channels": (16,) * len(up)}
    unet = tiny.unet(down_block_types=down, up_block_types=up, **sizes)
    original = names_of_modules.original_names(unet)
    assert original.keys() == set(names_of_modules.weighted(unet))
    for level, place in UPSAMPLERS[family].items():
        assert original[f"up_blocks.{level}.upsamplers.0.conv"] == f"output_blocks.{place}.conv"
    named = {f"model.diffusion_model.{original[name]}.weight": torch.tensor(i) for i, name in enumerate(original)}
    named |= {key.replace("weight", "bias"): torch.tensor(-1) for key in named if ".op." in key or ".conv." in key}
    converted = convert_ldm_unet_checkpoint(named, unet.config)
    assert {name: int(converted[f"{name}.weight"]) for name in original} == {name: i for i, name in enumerate(original)}


def test_a_layers_scalar_and_the_bias_of_its_factor_count_as_its_product_does():
    """LyCORIS multiplies the product by a learned scalar; peft scales what lora_B gives, its bias included."""
    generator = torch.Generator().manual_seed(0)
    down, up, bias, x = (torch.randn(shape, generator=generator) for shape in ((2, 4), (3, 2), (3,), (5, 4)))
    linear = torch.nn.Linear(4, 3)
    plain = {"down": down, "up": up, "alpha": torch.tensor(6.0)}
    with torch.no_grad():
        for layer, change in (
            (plain, 3 * x @ down.T @ up.T),
            (plain | {"scalar": torch.tensor(0.25)}, 0.75 * x @ down.T @ up.T),
            (plain | {"up_bias": bias}, 3 * (x @ down.T @ up.T + bias)),
            (plain | {"bias": bias}, 3 * x @ down.T @ up.T + bias),
        ):
            merged = adapters.merged(torch.nn.Sequential(linear), {"0": layer}, Path("file"))
            assert torch.allclose(merged(x), linear(x) + change, atol=1e-5), layer.keys()


def test_both_text_encoders_of_sdxl_and_mixed_names_are_all_used(loaded, tmp_path):
    base = own(loaded["sdxl"])
    tensors = factors(TO_Q) | factors("=lora_unet_middle_block_1_transformer_blocks_0_attn2_to_q", seed=1)
    for number in (1, 2):
        tensors |= factors(f"=lora_te{number}_{TEXT.replace('.', '_')}_v_proj", seed=number + 1)
    tuned = adapters.add(base, saved(tmp_path, tensors), "lora")
    ours, theirs = loaded["sdxl"], f"{TEXT}.v_proj"
    for before, after, name, key in (
        (
            ours.unet,
            tuned.unet,
            TO_Q.replace("attn1", "attn2"),
            "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_q",
        ),
        (
            ours.text_encoder,
            tuned.text_encoder,
            theirs.removeprefix("text_model."),
            f"lora_te1_{theirs.replace('.', '_')}",
        ),
        (ours.text_encoder_2, tuned.text_encoder_2, theirs, f"lora_te2_{theirs.replace('.', '_')}"),
    ):
        by_hand = tensors[f"{key}.lora_up.weight"] @ tensors[f"{key}.lora_down.weight"]
        assert torch.allclose(change(before, after, name), by_hand, atol=1e-5), key


# what has no place


def without(tensors: dict, ending: str) -> dict:
    return {name: value for name, value in tensors.items() if not name.endswith(ending)}


KEY = "lora_unet_" + TO_Q.replace(".", "_")
LOHA = {f"{KEY}.hada_w{i}_{x}": torch.ones(32, 2) if x == "a" else torch.ones(2, 32) for i in (1, 2) for x in "ab"}
REFUSED = {
    "another depth": (factors(TO_Q) | factors("down_blocks.7.attn.to_q"), "fits only in part: 2 of 4 .*down_blocks_7"),
    "a second text encoder": (
        factors(TO_Q) | factors("=lora_te2_" + TEXT.replace(".", "_") + "_q_proj"),
        "lora_te2_text",
    ),
    "more text layers": (factors(TO_Q) | factors("=lora_te_text_model_encoder_layers_7_self_attn_q_proj"), "layers_7"),
    "an unknown tensor": (factors(TO_Q) | {f"{KEY}.gamma": torch.ones(1)}, r"1 of 3 tensors .*gamma"),
    "A without B": (
        without(factors(TO_Q) | factors(LINEAR), f"{LINEAR[-6:].replace('.', '_')}.lora_up.weight"),
        "incomplete",
    ),
    "alpha only": (
        factors(TO_Q) | {f"lora_unet_{LINEAR.replace('.', '_')}.alpha": torch.ones(())},
        "attn2.to_k is no layer of a known kind: it has alpha",
    ),
    "LoHa without w2": (without(LOHA, "hada_w2_b"), "is incomplete: it has hada_w1_a"),
    "two kinds at once": (factors(TO_Q) | LOHA, "is no layer of a known kind"),
    "two names for one layer": (
        factors(TO_Q) | factors("=lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"),
        "has down of unet.*twice, the second time as lora_unet_mid",
    ),
    "another width": (
        factors(TO_Q, into=48),
        r"attn1\.to_q cannot be loaded: size mismatch, \[32, 48\] for \[32, 32\]",
    ),
    "two ranks": (
        factors(TO_Q) | {f"{KEY}.lora_up.weight": torch.ones(32, 3)},
        r"attn1.to_q cannot be loaded: up \[32, 3\] and",
    ),
    "no matrices": (
        {f"{KEY}.lora_up.weight": torch.ones(32), f"{KEY}.lora_down.weight": torch.ones(2)},
        "are no matrices",
    ),
    "alpha as a list": (factors(TO_Q) | {f"{KEY}.alpha": torch.ones(3)}, r"its alpha is \[3\], not one number"),
    "an embedding only": ({"bundle_emb.sks.string_to_param.*": torch.ones(1, 32)}, "an embedding and nothing else"),
    "a magnitude too long": (factors(TO_Q) | {f"{KEY}.dora_scale": torch.ones(31, 1)}, "size mismatch, magnitude"),
    "a bias too long": ({f"{KEY}.diff": torch.ones(32, 32), f"{KEY}.diff_b": torch.ones(32)}, "size mismatch, a bias"),
    "NaN in the text encoder": (
        factors(TO_Q)
        | {k: v * torch.nan for k, v in factors("=lora_te_" + TEXT.replace(".", "_") + "_q_proj").items()},
        "lora_te_.* is not finite",
    ),
    "whole numbers": ({k: v.to(torch.int8) for k, v in factors(TO_Q).items()}, "stored as int8: quantised"),
    "OFT": ({f"{KEY}.oft_blocks": torch.ones(4, 8, 8)}, "holds OFT .*not supported: merge it"),
    "IA3": ({f"{KEY}.weight": torch.ones(32), f"{KEY}.on_input": torch.ones(())}, "holds IA3"),
    "zeros": ({f"{KEY}.diff": torch.zeros(32, 32)}, "changes nothing in the unet"),
    "text encoder only": (factors("=lora_te_" + TEXT.replace(".", "_") + "_q_proj"), "no adapter for the unet"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_place_is_refused_with_its_name(base, tmp_path, case):
    tensors, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as refused:
        adapters.add(base, saved(tmp_path, tensors), "lora")
    assert str(tmp_path) in str(refused.value)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"modelspec.prediction_type": "v"}, "prediction_type is v_prediction, but the base model's is epsilon"),
        ({"ss_v_parameterization": "True"}, "prediction_type is v_prediction"),
        ({"ss_zero_terminal_snr": "True"}, "rescale_betas_zero_snr is True, but the base model's is False"),
        ({"modelspec.prediction_type": "wavelet"}, "modelspec.prediction_type is 'wavelet'; known are epsilon"),
        ({"lora_adapter_metadata": "{broken"}, "cannot be loaded: JSONDecodeError"),
    ],
)
def test_a_lora_that_says_it_was_made_for_another_base_is_refused(base, tmp_path, metadata, message):
    with pytest.raises(ValueError, match=message):
        adapters.add(base, saved(tmp_path, factors(TO_Q), metadata), "lora")


# peft's settings

QV = {"target_modules": ["to_q", "to_v"]}
SETTINGS = {
    "rslora": LoraConfig(r=2, lora_alpha=4, use_rslora=True, **QV),
    "patterns": LoraConfig(r=2, rank_pattern={"mid_block.*to_q": 4}, alpha_pattern={"attn2.to_v": 1}, **QV),
    "convolutions": LoraConfig(r=2, lora_alpha=3, target_modules=["conv1"]),
    "bias of B": LoraConfig(r=2, target_modules=["to_out.0"], lora_bias=True),
    "biases": LoraConfig(r=2, target_modules=["to_out.0"], bias="all"),
    "whole modules": LoraConfig(r=2, modules_to_save=["conv_out"], **QV),
    "dora": LoraConfig(r=2, use_dora=True, **QV),
    "gaussian": LoraConfig(r=2, init_lora_weights="gaussian", **QV),
    "orthogonal": LoraConfig(r=2, init_lora_weights="orthogonal", **QV),
    "pissa": LoraConfig(r=2, init_lora_weights="pissa", **QV),
    "olora": LoraConfig(r=2, init_lora_weights="olora", **QV),
    "loha": LoHaConfig(r=2, alpha=3, **QV),
    "lokr": LoKrConfig(r=2, alpha=3, **QV),
    "ia3": IA3Config(target_modules=["to_q", "to_v"], feedforward_modules=[]),
    "oft": OFTConfig(oft_block_size=4, r=0, **QV),
    "vera": VeraConfig(r=2, target_modules=["attn1.to_q", "attn2.to_q"]),
}
ON_A_COPY = {"biases", "whole modules", "dora", "pissa", "olora", "loha", "lokr", "ia3", "oft", "vera"}


def trained(unet, config, folder: Path) -> torch.nn.Module:
    """A copy of the U-Net with an adapter as if trained, saved by peft."""
    wrapped = get_peft_model(copy.deepcopy(unet), copy.deepcopy(config))
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=draw)
    wrapped.save_pretrained(folder)
    return wrapped.eval()


def ask(unet) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return unet(
            torch.randn(1, 4, 4, 4, generator=draw), torch.tensor(500), torch.randn(1, 16, 32, generator=draw)
        ).sample


def untouched(unet, original) -> bool:
    """Whether a U-Net has the original's weights below its adapter, and answers alike with the adapter off."""
    weights = {
        name.replace(".base_layer", ""): value for name, value in unet.state_dict().items() if ".lora_" not in name
    }
    with models.without_adapters([unet]):
        alike = torch.allclose(ask(unet), ask(original), atol=1e-5)
    return alike and all(torch.equal(value, weights[name]) for name, value in original.state_dict().items())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SETTINGS)
def test_a_folder_of_peft_answers_as_peft_does_and_leaves_theta_alone(base, loaded, tmp_path, name):
    wanted = ask(trained(base.unet, SETTINGS[name], tmp_path))
    again = PeftModel.from_pretrained(copy.deepcopy(base.unet), tmp_path).eval()
    assert torch.allclose(ask(again), wanted, atol=1e-5), "peft itself reads the folder as it was trained"
    tuned = adapters.add(base, tmp_path, "peft")
    assert torch.allclose(ask(tuned.unet), wanted, atol=1e-5)
    assert (tuned.unet is base.unet) == (name not in ON_A_COPY)
    assert untouched(base.unet, loaded["sd1"].unet)
    assert (ask(loaded["sd1"].unet) - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("begun", ["pissa", "olora", "gaussian"])
def test_settings_in_the_header_of_a_diffusers_file_are_obeyed_and_leave_theta_alone(base, loaded, tmp_path, begun):
    config = LoraConfig(r=2, lora_alpha=6, init_lora_weights=begun, use_rslora=True, target_modules=["to_q"])
    wrapped = trained(base.unet, config, tmp_path / "peft")
    settings = {
        f"unet.{key}": value for key, value in config.to_dict().items() if key not in ("peft_type", "target_modules")
    }
    settings |= {"unet.target_modules": ["to_q"]}
    layers = get_peft_model_state_dict(wrapped)
    tensors = {f"unet.{name.removeprefix('base_model.model.')}": value.contiguous() for name, value in layers.items()}
    file = saved(tmp_path, tensors, {"lora_adapter_metadata": json.dumps(settings, default=str)})
    tuned = adapters.add(base, file, "lora")
    assert torch.allclose(ask(tuned.unet), ask(wrapped), atol=1e-5)
    assert untouched(base.unet, loaded["sd1"].unet)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("begun", ["pissa_niter_4", "corda", "lora_ga", "something_new"])
def test_an_adapter_whose_beginning_cannot_be_repeated_is_refused(base, tmp_path, begun):
    trained(base.unet, LoraConfig(r=2, **QV), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": begun}))
    with pytest.raises(ValueError, match=f"begun by init_lora_weights='{begun}'"):
        adapters.add(base, tmp_path, "peft")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "NEW"}, "peft has no adapters of type 'NEW'"),
        ({"use_future": True}, "peft has no setting use_future"),
        ({"target_modules": ["nowhere"]}, "cannot be loaded: .*nowhere"),
        ({"target_modules": ["to_q", "to_k"]}, "lacks .*to_k"),
        ({"r": 3}, "cannot be loaded: .*size mismatch"),
    ],
)
def test_settings_that_do_not_fit_their_weights_are_refused(base, tmp_path, settings, message):
    trained(base.unet, LoraConfig(r=2, target_modules=["to_q"]), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(ValueError, match=message):
        adapters.add(base, tmp_path, "peft")


def test_an_adapter_in_a_folder_of_no_part_is_refused(base, tmp_path):
    for place in ("unet", "text_encoder_2"):
        trained(base.unet, LoraConfig(r=2, target_modules=["to_q"]), tmp_path / place)
    with pytest.raises(ValueError, match="text_encoder_2 holds an adapter that belongs to no part"):
        adapters.add(base, tmp_path, "peft")


def test_text_layers_under_the_names_of_older_libraries_are_found(base, loaded, tmp_path):
    """Saved when CLIPTextModel's modules still began with "text_model."."""
    trained(base.unet, LoraConfig(r=2, target_modules=["to_q"]), tmp_path / "unet")
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], alpha_pattern={f"{TEXT}.q_proj": 6})
    encoder = trained(base.text_encoder, LoraConfig(r=2, target_modules=["q_proj"]), tmp_path / "text_encoder")
    config.save_pretrained(str(tmp_path / "text_encoder"))
    file = tmp_path / "text_encoder/adapter_model.safetensors"
    old = {name.replace("model.encoder", "model.text_model.encoder"): value for name, value in load_file(file).items()}
    save_file(old, file)
    tuned = adapters.add(base, tmp_path, "peft")
    assert encoder is not None
    name = "encoder.layers.0.self_attn.q_proj"
    up, down = (old[f"base_model.model.{TEXT}.q_proj.lora_{letter}.weight"] for letter in "BA")
    assert torch.allclose(change(loaded["sd1"].text_encoder, tuned.text_encoder, name), 3 * up @ down, atol=1e-5)


# embeddings


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_an_embedding_that_a_file_brings_along_is_known_to_theta_prime_only(loaded, tmp_path, family):
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    base, vectors = own(loaded[family]), torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    kinds = ("clip_l", "clip_g") if family == "sdxl" else ("string_to_param.*",)
    tensors = factors(TO_Q) | {f"bundle_emb.sks person.{kind}": vectors * (i + 1) for i, kind in enumerate(kinds)}
    tuned = adapters.add(base, saved(tmp_path, tensors), "lora")
    caption = "a sks person"
    with models.without_adapters(families.text_encoders(base)):
        assert torch.equal(families.encode(base, caption).text, families.encode(loaded[family], caption).text)
    for i, number in enumerate(["", "_2"][: len(kinds)]):
        tokenizer, encoder = getattr(tuned, f"tokenizer{number}"), getattr(tuned, f"text_encoder{number}")
        ids = tokenizer(tuned.maybe_convert_prompt(caption, tokenizer)).input_ids
        rows = encoder.get_input_embeddings().weight[ids]
        assert any(torch.equal(rows[n : n + 2], vectors * (i + 1)) for n in range(len(ids)))
    assert not torch.allclose(families.encode(tuned, caption).text, families.encode(base, caption).text, atol=1e-3)


def test_an_embedding_of_another_width_is_refused(base, tmp_path):
    tensors = factors(TO_Q) | {"bundle_emb.sks.string_to_param.*": torch.randn(2, 48)}
    with pytest.raises(ValueError, match=r"adapter\.safetensors cannot be loaded"):
        adapters.add(base, saved(tmp_path, tensors), "lora")


def test_a_lora_for_the_transformer_of_stable_diffusion_3_and_for_altdiffusion(loaded, tmp_path):
    for family, prefix, name in (
        ("sd3", "transformer.", "transformer_blocks.0.attn.to_q"),
        ("alt", "unet.", TO_Q),
    ):
        base = own(loaded[family])
        down, up = torch.randn(2, 32), torch.randn(32, 2)
        tensors = {f"{prefix}{name}.lora_A.weight": down, f"{prefix}{name}.lora_B.weight": up}
        tuned = families.network(adapters.add(base, saved(tmp_path, tensors), "lora"))
        assert torch.allclose(change(families.network(loaded[family]), tuned, name), up @ down, atol=1e-5)


# FLUX.1, whose original modules are several here

QKV = "lora_unet_double_blocks_1_img_attn_qkv"
ATTENTION = "transformer_blocks.1.attn"


def test_a_fused_layer_is_cut_as_diffusers_cuts_it():
    """Against its conversion of sd-scripts' files, which folds the scale in."""
    torch.manual_seed(0)
    tensors = {f"{QKV}.lora_down.weight": torch.randn(4, 8), f"{QKV}.lora_up.weight": torch.randn(24, 4)}
    tensors[f"{QKV}.alpha"] = torch.tensor(2.0)
    expected = _convert_kohya_flux_lora_to_diffusers(dict(tensors))
    layer = {"down": tensors[f"{QKV}.lora_down.weight"], "up": tensors[f"{QKV}.lora_up.weight"]}
    for number, end in enumerate(("to_q", "to_k", "to_v")):
        found = adapters.piece(
            layer | {"alpha": torch.tensor(2.0)}, torch.arange(8 * number, 8 * number + 8), 24, "here"
        )
        name = f"transformer.{ATTENTION}.{end}"
        theirs = expected[f"{name}.lora_B.weight"] @ expected[f"{name}.lora_A.weight"]
        assert torch.allclose(adapters.scale(found) * adapters.product(found), theirs, atol=1e-6)


def fused_layer(kind: str, n: int, width: int) -> dict[str, torch.Tensor]:
    """A random layer of a kind on a module of n rows."""
    if kind == "difference":
        return {"diff": torch.randn(n, width), "bias": torch.randn(n)}
    if kind == "LoHa":
        return {
            f"hada_w{i}_{end}": torch.randn(*size) for i in "12" for end, size in (("a", (n, 2)), ("b", (2, width)))
        }
    if kind == "LoKr":
        return {
            "lokr_w1": torch.randn(6, 2),
            "lokr_w2_a": torch.randn(n // 6, 3),
            "lokr_w2_b": torch.randn(3, width // 2),
        }
    if kind == "LoKr, both of low rank":
        first = {"lokr_w1_a": torch.randn(3, 1), "lokr_w1_b": torch.randn(1, 2)}
        return first | {
            "lokr_w2_a": torch.randn(n // 3, 2),
            "lokr_w2_b": torch.randn(2, width // 2),
            "alpha": torch.tensor(3.0),
        }
    layer = {"up": torch.randn(n, 2), "down": torch.randn(2, width), "alpha": torch.tensor(3.0)}
    return layer | ({"magnitude": torch.rand(n, 1) + 1} if kind == "DoRA" else {"up_bias": torch.randn(n)})


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "LoHa", "LoKr", "LoKr, both of low rank", "difference"])
def test_every_kind_of_layer_on_a_fused_module_is_what_it_is_on_the_whole(kind):
    """The rows of the whole weight after the layer are those of its pieces, in whatever order these stand."""
    torch.manual_seed(1)
    n, width = 24, 8
    layer, weight = fused_layer(kind, n, width), torch.randn(n, width)
    whole = adapters.new_weight(layer, weight, "whole")
    for rows in (torch.arange(8), torch.arange(8, 24), torch.cat([torch.arange(16, 24), torch.arange(8)])):
        cut = adapters.piece(layer, rows, n, "piece")
        assert torch.allclose(adapters.new_weight(cut, weight[rows], "piece"), whole[rows], atol=1e-5)
        for word in ("bias", "up_bias"):
            assert word not in layer or torch.equal(cut[word], layer[word][rows])


def test_a_fused_layer_that_cannot_be_cut_is_refused_with_its_name(loaded, tmp_path):
    rows = torch.arange(8)
    for layer, message in (
        ({"up": torch.ones(9, 2), "down": torch.ones(2, 8)}, "a layer of 9 rows for 24"),
        (
            {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(12, 4)},
            "Kronecker blocks of 12 rows lie across two modules",
        ),
        ({"lokr_w1": torch.ones(4, 2), "lokr_w2": torch.ones(6, 4)}, "Kronecker blocks of 6 rows lie across"),
    ):
        with pytest.raises(ValueError, match=message):
            adapters.piece(layer, rows, 24, "here")
    base = own(loaded["flux"])
    tensors = {f"{QKV}.lora_down.weight": torch.ones(2, 32), f"{QKV}.lora_up.weight": torch.ones(95, 2)}
    with pytest.raises(ValueError, match=rf"{QKV} cannot be loaded: size mismatch, a layer of 95 rows for 96"):
        adapters.add(base, saved(tmp_path, tensors), "lora")
    tensors = {f"{QKV}.lora_down.weight": torch.ones(2, 32), f"{QKV}.lora_up.weight": torch.ones(96, 2)}
    twice = {f"transformer.{ATTENTION}.to_k.lora_A.weight": torch.ones(2, 32)}
    twice |= {f"transformer.{ATTENTION}.to_k.lora_B.weight": torch.ones(32, 2)}
    with pytest.raises(ValueError, match=rf"transformer.{ATTENTION}.to_k twice"):
        adapters.add(base, saved(tmp_path, tensors | twice), "lora")
    del tensors[f"{QKV}.lora_up.weight"]
    with pytest.raises(ValueError, match="is incomplete: it has down only"):
        adapters.add(base, saved(tmp_path, tensors), "lora")


@torch.no_grad()
def test_lycoris_on_a_fused_module_and_on_the_last_modulation_of_flux(loaded, tmp_path):
    """The halves of the last modulation stand the other way round in the original code."""
    torch.manual_seed(2)
    base = own(loaded["flux"])
    last = base.transformer.norm_out.linear.weight
    name = "lora_unet_final_layer_adaLN_modulation_1"
    layers = {QKV: fused_layer("LoHa", 96, 32), name: {"diff": torch.randn(last.shape)}}
    tensors = {f"{module}.{word}": value for module, layer in layers.items() for word, value in layer.items()}
    tuned = adapters.add(base, saved(tmp_path, tensors), "lora").transformer
    before = loaded["flux"].transformer
    parts = [change(before, tuned, f"{ATTENTION}.{end}") for end in ("to_q", "to_k", "to_v")]
    assert torch.allclose(torch.cat(parts), adapters.product(layers[QKV]), atol=1e-5)
    shift, scale = layers[name]["diff"].chunk(2)
    assert torch.allclose(change(before, tuned, "norm_out.linear"), torch.cat([scale, shift]), atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(base.transformer.parameters(), before.parameters(), strict=True))
