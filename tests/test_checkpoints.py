"""Checkpoints as people publish them: every layout is loaded, what is damaged or does not fit is refused with a reason."""

import copy
import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import AutoencoderKL, DDIMScheduler, FluxTransformer2DModel, StableDiffusionPipeline
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection

from fx import checkpoints, families, models, parts, single_files
from fx.names_of_modules import flux_originals

CAPTION = "a dog"
RANK, ALPHA = 2, 4
SINGLE_FILE = Path(__file__).parent / "fixtures/single-file"
UNET_FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Two random models of each family: the base models and others of the same shapes."""
    root = tmp_path_factory.mktemp("models")
    made = {family: tiny.save(family, root / family) for family in tiny.FAMILIES}
    return made | {f"{family} tuned": tiny.save(family, root / f"{family}-tuned", seed=1) for family in tiny.FAMILIES}


def adapted(family: str, folder: Path, seed: int = 3, text: bool = True):
    """The pipeline of a folder with a random adapter of rank 2, alpha 4, on network and text encoders, put there by peft."""
    pipeline = models.load_pipeline(str(folder))
    torch.manual_seed(seed)
    settings = {"r": RANK, "lora_alpha": ALPHA, "init_lora_weights": False}
    families.network(pipeline).add_adapter(LoraConfig(target_modules=["to_q", "to_v"], **settings))
    if text:
        for encoder in families.text_encoders(pipeline):
            encoder.add_adapter(LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "out_proj"], **settings))
    return pipeline


def layers(model) -> dict[str, torch.Tensor]:
    """An adapter's tensors under peft's names."""
    return get_peft_model_state_dict(model)


def answer(pair: models.ModelPair, model: str) -> torch.Tensor:
    """The model's prediction for a fixed latent and the caption."""
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return pair.predict(model, x, torch.tensor(500), pair.condition(model, CAPTION))


def same(pair: models.ModelPair, base: models.DiffusionPipeline, tuned: models.DiffusionPipeline) -> bool:
    """Whether a loaded pair answers as these two pipelines do, and theta not as theta'."""
    expected = models.ModelPair(base, tuned)
    apart = (answer(pair, "tuned") - answer(pair, "base")).abs().max() > 1e-3
    return bool(
        apart
        and torch.allclose(answer(pair, "base"), answer(expected, "base"), atol=1e-5)
        and torch.allclose(answer(pair, "tuned"), answer(expected, "tuned"), atol=1e-5)
    )


# what each layout holds


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_whole_diffusers_folder(folders, family):
    base, tuned = (models.load_pipeline(str(folders[name])) for name in (family, f"{family} tuned"))
    assert same(models.load_pair(str(folders[family]), folders[f"{family} tuned"]), base, tuned)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("alone", [True, False])
def test_a_folder_with_the_network_only(folders, family, alone, tmp_path):
    base = models.load_pipeline(str(folders[family]))
    name = families.network_name(base)
    source = folders[f"{family} tuned"] / name
    shutil.copytree(source, tmp_path / "model" if alone else tmp_path / "model" / name)
    tuned = copy.copy(base)
    setattr(tuned, name, type(families.network(base)).from_pretrained(source).eval())
    pair = models.load_pair(str(folders[family]), tmp_path / "model")
    assert same(pair, base, tuned)
    assert pair.tuned.vae is pair.base.vae


def test_a_folder_with_its_own_text_encoder_added_token_and_autoencoder(folders, tmp_path):
    """theta' reads the caption with its own tokenizer and encoder, theta with the base model's; theta' 's vae decodes."""
    tuned = StableDiffusionPipeline.from_pretrained(folders["sd1 tuned"], safety_checker=None)
    tuned.tokenizer.add_tokens("sks")
    tuned.text_encoder.resize_token_embeddings(len(tuned.tokenizer))
    for part in ("unet", "text_encoder", "tokenizer", "vae"):
        getattr(tuned, part).save_pretrained(tmp_path / part)
    pair = models.load_pair(str(folders["sd1"]), tmp_path)
    caption = "a sks dog"
    base = models.load_pipeline(str(folders["sd1"]))
    assert torch.equal(pair.condition("base", caption).text, families.encode(base, caption).text)
    ids = pair.tuned.tokenizer(caption).input_ids
    assert len(ids) == len(base.tokenizer(caption).input_ids) - 2  # one token instead of three
    assert torch.equal(
        pair.tuned.text_encoder.get_input_embeddings().weight, tuned.text_encoder.get_input_embeddings().weight
    )
    assert not torch.equal(pair.tuned.vae.decoder.conv_in.weight, pair.base.vae.decoder.conv_in.weight)
    assert torch.equal(pair.tuned.vae.decoder.conv_in.weight, tuned.vae.decoder.conv_in.weight)


@pytest.mark.parametrize(
    ("family", "text"),
    [*((family, False) for family in tiny.FAMILIES), ("sd1", True), ("sd2", True), ("sdxl", True), ("sd3", True)],
)
def test_a_lora_in_diffusers_layout(folders, family, text, tmp_path):
    made = adapted(family, folders[family], text=text)
    tensors, metadata = {}, {}
    for name in (
        families.network_name(made),
        *("text_encoder", "text_encoder_2")[: len(families.text_encoders(made)) * text],
    ):
        part = getattr(made, name)
        tensors[f"{name}_lora_layers"] = convert_state_dict_to_diffusers(layers(part))
        metadata[f"{name}_lora_adapter_metadata"] = part.peft_config["default"].to_dict()
    type(made).save_lora_weights(tmp_path, **tensors, **metadata)
    base = models.load_pipeline(str(folders[family]))
    for place in (tmp_path, tmp_path / checkpoints.LORA_FILE):
        assert same(models.load_pair(str(folders[family]), place), base, made)


FUSED = {
    "double_blocks_0_img_attn_qkv": ("transformer_blocks.0.attn", ("to_q", "to_k", "to_v")),
    "double_blocks_1_txt_attn_qkv": ("transformer_blocks.1.attn", ("add_q_proj", "add_k_proj", "add_v_proj")),
    "single_blocks_1_linear1": ("single_transformer_blocks.1", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
    "double_blocks_1_img_mlp_0": ("transformer_blocks.1.ff.net.0", ("proj",)),
    "double_blocks_0_txt_attn_proj": ("transformer_blocks.0.attn", ("to_add_out",)),
    "single_blocks_0_linear2": ("single_transformer_blocks.0", ("proj_out",)),
    "single_blocks_0_modulation_lin": ("single_transformer_blocks.0.norm", ("linear",)),
    "img_in": ("", ("x_embedder",)),
}


@torch.no_grad()
def kohya_for_flux(pipeline, text: bool) -> tuple[dict[str, torch.Tensor], models.DiffusionPipeline]:
    """A random LoRA as sd-scripts trains it on the original modules, and the model with its products in the weights."""
    torch.manual_seed(4)
    kohya = {}

    def layer(name: str, weights: list[torch.Tensor]) -> None:
        rows = sum(len(weight) for weight in weights)
        down, up = torch.randn(RANK, weights[0].shape[1]), torch.randn(rows, RANK)
        entries = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(float(ALPHA))}
        kohya.update({f"{name}.{ending}": value for ending, value in entries.items()})
        for weight, part in zip(weights, (ALPHA / RANK * up @ down).split([len(w) for w in weights]), strict=True):
            weight += part

    for name, (place, ends) in FUSED.items():
        layer(
            f"lora_unet_{name}",
            [pipeline.transformer.get_submodule(f"{place}.{end}".strip(".")).weight for end in ends],
        )
    if text:
        layer(
            "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
            [
                next(
                    m for n, m in pipeline.text_encoder.named_modules() if n.endswith("layers.0.self_attn.q_proj")
                ).weight
            ],
        )
    return kohya, pipeline


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "flux"])
@pytest.mark.parametrize("text", [False, True])
def test_a_lora_in_kohya_layout(folders, family, text, tmp_path):
    if family == "flux":
        kohya, tuned = kohya_for_flux(models.load_pipeline(str(folders[family])), text)
        save_file(kohya, tmp_path / "artist.safetensors")
        pair = models.load_pair(str(folders[family]), tmp_path)
        assert same(pair, models.load_pipeline(str(folders[family])), tuned)
        assert pair.one_network
        return
    made = adapted(family, folders[family], text=text)
    tensors = {f"unet.{name}": value for name, value in layers(made.unet).items()}
    for name in ("text_encoder", "text_encoder_2")[: len(families.text_encoders(made)) if text else 0]:
        tensors |= {f"{name}.{key}": value for key, value in layers(getattr(made, name)).items()}
    kohya = {
        key.replace(
            "lora_te1_encoder", "lora_te_text_model_encoder" if family != "sdxl" else "lora_te1_text_model_encoder"
        ).replace("lora_te2_encoder", "lora_te2_text_model_encoder"): value  # transformers 5 has lost "text_model"
        for key, value in convert_state_dict_to_kohya(tensors).items()
    }
    for key in kohya:
        if key.endswith(".alpha"):
            kohya[key] = torch.tensor(float(ALPHA))
    assert all(key.startswith(("lora_unet_", "lora_te")) for key in kohya)
    save_file(kohya, tmp_path / "artist.safetensors")
    base = models.load_pipeline(str(folders[family]))
    for place in (tmp_path, tmp_path / "artist.safetensors"):
        assert same(models.load_pair(str(folders[family]), place), base, made)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("text", [False, True])
def test_a_lora_in_peft_layout(folders, family, text, tmp_path):
    """Written by PeftModel.save_pretrained: the network's adapter alone, or in folders beside the text encoder's."""
    made = models.load_pipeline(str(folders[family]))
    torch.manual_seed(4)
    settings = {"r": RANK, "lora_alpha": ALPHA, "init_lora_weights": False}
    name = families.network_name(made)
    wrapped = get_peft_model(families.network(made), LoraConfig(target_modules=["to_q", "to_v"], **settings))
    assert isinstance(wrapped, PeftModel)
    wrapped.save_pretrained(tmp_path / name if text else tmp_path)
    if text:
        queries = "query" if family == "alt" else "q_proj"
        encoder = get_peft_model(made.text_encoder, LoraConfig(target_modules=[queries], **settings))
        encoder.save_pretrained(tmp_path / "text_encoder")
    base = models.load_pipeline(str(folders[family]))
    pair = models.load_pair(str(folders[family]), tmp_path)
    tuned = copy.copy(base)
    setattr(tuned, name, wrapped.merge_and_unload())
    if text:
        tuned.text_encoder = encoder.merge_and_unload()
    assert same(pair, models.load_pipeline(str(folders[family])), tuned)


def single_file_base(family: str):
    """A random pipeline with the settings of the model in fixtures/single-file."""
    tokenizer, base = tiny.byte_tokenizer(), tiny.pipeline(family)
    levels = 3 if family == "sd1" else 1
    base.vae = AutoencoderKL(
        block_out_channels=(32,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
        sample_size=16,
    )
    if family == "sd1":
        base.unet = tiny.unet(block_out_channels=(32, 64), norm_num_groups=32)
        base.text_encoder = tiny.text_encoder(tokenizer, layers=1)
        return base
    settings = {"block_out_channels": (32, 32), "norm_num_groups": 32, "use_linear_projection": True}
    if family == "sd2":
        base.unet = tiny.unet(**settings)
        base.text_encoder = tiny.text_encoder(tokenizer, layers=23, intermediate_size=128, hidden_act="gelu")
        return base
    base.unet = tiny.unet(
        cross_attention_dim=32 + 64,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64 + 6 * 8,
        **settings,
    )
    wide = {"hidden_size": 64, "intermediate_size": 256, "projection_dim": 64, "hidden_act": "gelu"}
    base.text_encoder_2 = tiny.text_encoder(tokenizer, CLIPTextModelWithProjection, layers=3, **wide)
    return base


def check_single_file_of_flux(folders, prefix: str, tmp_path):
    """The network alone under its bare names, or behind a prefix with its text encoders."""
    base, tuned = (models.load_pipeline(str(folders[name])) for name in ("flux", "flux tuned"))
    weights = {f"{prefix}{name}": value for name, value in original_flux(tuned.transformer).items()}
    own = copy.copy(base)
    own.transformer = tuned.transformer
    if prefix:
        for part, place in (("text_encoder", "clip_l"), ("text_encoder_2", "t5xxl")):
            setattr(own, part, getattr(tuned, part))
            weights |= {
                f"text_encoders.{place}.transformer.{k}": v for k, v in getattr(tuned, part).state_dict().items()
            }
        weights = {
            k: v for k, v in weights.items() if not k.endswith("encoder.embed_tokens.weight")
        }  # the same once more
    save_file({name: value.clone() for name, value in weights.items()}, tmp_path / "flux.safetensors")
    assert same(models.load_pair(str(folders["flux"]), tmp_path / "flux.safetensors"), base, own)
    lacking = {name: value.clone() for name, value in weights.items() if "single_blocks.1.linear1.bias" not in name}
    save_file(lacking, tmp_path / "flux.safetensors")
    with pytest.raises(
        ValueError, match=r"lacks weights of FluxTransformer2DModel: single_transformer_blocks\.1\.attn"
    ):
        models.load_pair(str(folders["flux"]), tmp_path / "flux.safetensors")
    save_file(weights | {f"{prefix}double_blocks.7.img_mlp.0.bias": torch.zeros(3)}, tmp_path / "flux.safetensors")
    with pytest.raises(ValueError, match=r"left over weights of its transformer: .*double_blocks\.7\.img_mlp\.0\.bias"):
        models.load_pair(str(folders["flux"]), tmp_path / "flux.safetensors")


def original_flux(model) -> dict[str, torch.Tensor]:
    """A network's weights as the original code keeps them; `test_flux_originals_are_those_that_diffusers_converts`."""
    state, found = model.state_dict(), {}
    for original, pieces in flux_originals(model).items():
        for kind in ("weight", "bias"):
            parts = [state[f"{path}.{kind}"] for path, _ in pieces if f"{path}.{kind}" in state]
            if parts:
                whole = torch.cat(parts)
                if pieces[0][1] is not None:
                    whole[torch.cat([rows for _, rows in pieces])] = torch.cat(parts)
                found[f"{original}.{'scale' if '.norm.' in original else kind}"] = whole
    return found


def test_flux_originals_are_those_that_diffusers_converts():
    """At the width that diffusers' own conversion takes for granted; every row of a weight holds its number."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    tensors = {}
    for number, (original, pieces) in enumerate(flux_originals(model).items()):
        rows = sum(model.get_submodule(path).weight.shape[0] for path, _ in pieces)
        column = torch.arange(rows, dtype=torch.float64) + 10**6 * number
        kinds = {"scale": column} if ".norm." in original else {"weight": column[:, None], "bias": -column}
        tensors |= {f"{original}.{kind}": value for kind, value in kinds.items()}
    expected = convert_flux_transformer_checkpoint_to_diffusers(dict(tensors))
    found = single_files.renamed_flux(model, tensors)
    assert found.keys() == expected.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "flux"])
def test_a_single_file(family, folders, tmp_path):
    """Written by the original code (fixtures/single-file/make.py), with that code's own answers; FLUX.1's from its names."""
    if family == "flux":
        for prefix in ("", "model.diffusion_model."):
            check_single_file_of_flux(folders, prefix, tmp_path)
        return
    single_file_base(family).save_pretrained(tmp_path)
    pair = models.load_pair(str(tmp_path), SINGLE_FILE / f"{family}.safetensors")
    expected = load_file(SINGLE_FILE / f"{family}-expected.safetensors")

    def close(found, name):
        return torch.allclose(found, expected[name], rtol=1e-3, atol=1e-3 * expected[name].abs().max())

    added = {"text_embeds": expected["pooled"], "time_ids": expected["time_ids"]} if family == "sdxl" else {}
    condition = families.Condition(expected["context"], added)
    with torch.no_grad():
        found = pair.predict("tuned", expected["x"], expected["t"], condition)
        assert close(found, "unet")
        assert (found - pair.predict("base", expected["x"], expected["t"], condition)).abs().max() > 1e-2
        assert close(families.decode(pair.tuned, expected["x"] * pair.tuned.vae.config.scaling_factor), "decoded")
        if family == "sd2":
            assert close(pair.tuned.text_encoder(expected["tokens"]).last_hidden_state, "normed")
        if family == "sdxl":
            read = pair.tuned.text_encoder_2(expected["tokens"], output_hidden_states=True)
            assert close(read.hidden_states[-2], "hidden")
            assert close(read.text_embeds, "projected")
    if family != "sd2":
        prefix = "cond_stage_model" if family == "sd1" else "conditioner.embedders.0"
        weights = load_file(SINGLE_FILE / f"{family}.safetensors")
        stored = weights[f"{prefix}.transformer.text_model.embeddings.token_embedding.weight"]
        assert torch.equal(pair.tuned.text_encoder.get_input_embeddings().weight, stored.float())
        assert not torch.equal(pair.base.text_encoder.get_input_embeddings().weight, stored.float())


def test_a_single_file_on_the_wrong_base_is_refused(folders):
    with pytest.raises(ValueError, match=r"sd1\.safetensors cannot be loaded|do not fit"):
        models.load_pair(str(folders["sd1"]), SINGLE_FILE / "sd1.safetensors")


def test_a_lora_pair_holds_one_network(folders, tmp_path):
    made = adapted("sd1", folders["sd1"], text=False)
    made.save_lora_weights(tmp_path, unet_lora_layers=convert_state_dict_to_diffusers(layers(made.unet)))
    pair = models.load_pair(str(folders["sd1"]), tmp_path)
    assert pair.one_network
    assert pair.base.unet is pair.tuned.unet


def test_a_hub_id_with_a_revision_is_taken_from_the_cache(folders, tmp_path, monkeypatch):
    """The layout of the Hub's cache, with two revisions of which one is asked for."""
    repository = tmp_path / "models--someone--dogs"
    for number, name in enumerate(("sd1", "sd1 tuned")):
        shutil.copytree(folders[name], repository / "snapshots" / (str(number) * 40))
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    (repository / "refs/v2").write_text("1" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    pair = models.load_pair("someone/dogs", "someone/dogs@v2")
    base, tuned = (models.load_pipeline(str(folders[name])) for name in ("sd1", "sd1 tuned"))
    assert same(pair, base, tuned)
    with pytest.raises(FileNotFoundError, match="someone/dogs at revision v3 is no path on this machine"):
        models.load_pair("someone/dogs", "someone/dogs@v3")
    with pytest.raises(FileNotFoundError, match="someone/cats is no path on this machine"):
        models.load_pipeline("someone/cats")


def test_a_missing_file_is_not_asked_for_at_the_hub(monkeypatch):
    """Its name is nobody else's business, and the path is what is wrong."""

    def asked(*_, **__):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(checkpoints, "_snapshot", asked)
    for name in ("downloads/artist.safetensors", "downloads/artist.ckpt", "downloads/Artist.PT"):
        with pytest.raises(FileNotFoundError, match=f"unknown model '{name}': there is no such file, check the path"):
            checkpoints.find(name)
    with pytest.raises(AssertionError, match="the Hub was asked"):
        checkpoints.find("someone/dogs")


def test_a_fine_tuned_model_that_predicts_v_on_a_base_that_predicts_eps(folders, tmp_path):
    shutil.copytree(folders["sd1 tuned"], tmp_path / "v")
    settings = json.loads((tmp_path / "v/scheduler/scheduler_config.json").read_text())
    (tmp_path / "v/scheduler/scheduler_config.json").write_text(
        json.dumps(settings | {"prediction_type": "v_prediction"})
    )
    pair = models.load_pair(str(folders["sd1"]), tmp_path / "v")
    assert families.prediction_type(pair.tuned) == "v_prediction"
    kept = float(DDIMScheduler.from_config(settings).alphas_cumprod[500])
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        condition = pair.condition("base", CAPTION)
        eps = families.denoise(pair.base.unet, x, torch.tensor(500), condition)
    expected = kept**0.5 * eps - (1 - kept) ** 0.5 * (x - (1 - kept) ** 0.5 * eps) / kept**0.5
    assert torch.allclose(answer(pair, "base"), expected, atol=1e-4)


# what files say about themselves


def test_kohya_metadata_is_read(tmp_path):
    entries = {
        "ss_sd_model_name": "v1-5-pruned.safetensors",
        "ss_clip_skip": "2",
        "ss_num_train_images": "120",
        "ss_dataset_dirs": json.dumps(
            {"10_dog": {"n_repeats": 10, "img_count": 5}, "7_cat": {"n_repeats": 7, "img_count": 10}}
        ),
        "ss_tag_frequency": json.dumps({"10_dog": {"a dog": 5, "grass": 2}, "7_cat": {"grass": 4, " a cat": 1}}),
    }
    file = tmp_path / "x.safetensors"
    save_file({"lora_unet_a.lora_down.weight": torch.zeros(1)}, file, metadata=entries)
    found = checkpoints.metadata(file)
    assert found.base == "v1-5-pruned.safetensors"
    assert (found.clip_skip, found.images, found.images_with_repeats) == (2, 15, 120)
    assert found.tags == (("grass", 6), ("a dog", 5), ("a cat", 1))
    assert checkpoints.metadata(tmp_path) == found
    subsets = [{"subsets": [{"img_count": 3, "num_repeats": 2}, {"img_count": 4, "num_repeats": 1}]}]
    newer = {"ss_base_model_version": "sdxl_base_v1-0", "ss_datasets": json.dumps(subsets), "ss_clip_skip": "None"}
    save_file({"lora_unet_a.lora_down.weight": torch.zeros(1)}, file, metadata=newer)
    assert checkpoints.metadata(file) == checkpoints.Metadata(base="sdxl_base_v1-0", images=7)


@pytest.mark.parametrize(
    "entries", [None, {"ss_tag_frequency": "{broken", "ss_dataset_dirs": "[]", "ss_clip_skip": ""}]
)
def test_missing_or_broken_metadata_is_no_error(tmp_path, entries):
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors", metadata=entries)
    assert checkpoints.metadata(tmp_path / "x.safetensors") == checkpoints.Metadata()


FOREIGN = {
    "tags as one JSON string": {"ss_tag_frequency": json.dumps("dog, grass")},
    "tags without folders": {"ss_tag_frequency": json.dumps({"dog": 5})},
    "tags as a list": {"ss_tag_frequency": json.dumps(["dog"])},
    "a count that is null": {
        "ss_tag_frequency": json.dumps({"10_dog": {"dog": None, "cat": -1, "cow": 1.5, "pig": True}})
    },
    "folders as numbers": {"ss_dataset_dirs": json.dumps({"a": 3})},
    "img_count null": {"ss_dataset_dirs": json.dumps({"10_dog": {"img_count": None}})},
    "subsets null": {"ss_datasets": json.dumps([{"subsets": None}, 3, {"subsets": [None]}])},
    "datasets as a number": {"ss_datasets": "7"},
    "digits that are none": {"ss_clip_skip": "²", "ss_num_train_images": "٣"},
    "deep": {"ss_datasets": "[" * 5000},
    "many digits": {"ss_num_train_images": "9" * 5000, "ss_datasets": "9" * 5000},
}


@pytest.mark.parametrize("case", FOREIGN)
def test_metadata_of_another_shape_is_left_out(tmp_path, case):
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors", metadata=FOREIGN[case])
    assert checkpoints.metadata(tmp_path / "x.safetensors") == checkpoints.Metadata()


def test_metadata_that_can_be_read_in_part_is_read_in_part(tmp_path):
    entries = {"ss_tag_frequency": json.dumps({"10_dog": {"dog": 3, "cat": None}, "20_cat": [1], "5_x": {"dog ": "2"}})}
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors", metadata=entries)
    assert checkpoints.metadata(tmp_path / "x.safetensors").tags == (("dog", 5),)
    with pytest.raises(FileNotFoundError, match=r"y\.safetensors does not exist"):
        checkpoints.metadata(tmp_path / "y.safetensors")


# single files: their parts and what they say of their schedule


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict:
    """The base pipelines of the single files, loaded once."""
    root = tmp_path_factory.mktemp("originals")
    for family in ("sd1", "sd2", "sdxl"):
        single_file_base(family).save_pretrained(root / family)
    return {family: models.load_pipeline(str(root / family)) for family in ("sd1", "sd2", "sdxl")}


def cut(folder: Path, family: str, change, metadata: dict | None = None) -> Path:
    """A copy of a single file with other tensors."""
    tensors = load_file(SINGLE_FILE / f"{family}.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata=metadata)
    return folder / "model.safetensors"


def lacking(prefix: str):
    return lambda tensors: {name: value for name, value in tensors.items() if not name.startswith(prefix)}


@pytest.mark.parametrize(
    ("family", "prefix", "parts"),
    [
        ("sd1", "first_stage_model.", {"unet", "text_encoder"}),
        ("sd1", "cond_stage_model.", {"unet", "vae"}),
        ("sd2", "cond_stage_model.", {"unet", "vae"}),
        ("sdxl", "conditioner.embedders.1.", {"unet", "vae", "text_encoder"}),
        ("sdxl", ("conditioner.", "first_stage_model."), {"unet"}),
    ],
)
def test_a_single_file_without_some_parts_has_the_others(originals, tmp_path, family, prefix, parts):
    base = originals[family]
    whole = single_files.load(base, SINGLE_FILE / f"{family}.safetensors")
    found = single_files.load(base, cut(tmp_path, family, lacking(prefix)))
    assert found.keys() == parts
    for part in parts:
        for name, value in whole[part].state_dict().items():
            assert torch.equal(found[part].state_dict()[name], value)


def test_a_network_file_on_its_own_is_a_fine_tuned_model(originals, tmp_path):
    """As diffusers saves it, in the original names without a prefix, and as the only file in a folder."""
    base = originals["sd1"]
    wanted = {name: value + 0.01 for name, value in base.unet.state_dict().items()}
    save_file(wanted, tmp_path / "model.safetensors")
    found = single_files.load(base, tmp_path / "model.safetensors")
    assert found.keys() == {"unet"}
    assert all(torch.equal(value, wanted[name]) for name, value in found["unet"].state_dict().items())
    assert checkpoints.kind_of(tmp_path) == "single file"
    start = "model.diffusion_model."
    file = cut(tmp_path, "sd1", lambda t: {k.removeprefix(start): v for k, v in t.items() if k.startswith(start)})
    bare, whole = single_files.load(base, file), single_files.load(base, SINGLE_FILE / "sd1.safetensors")
    assert all(torch.equal(v, whole["unet"].state_dict()[k]) for k, v in bare["unet"].state_dict().items())


def one(tensors: dict, start: str, end: str) -> str:
    return next(name for name in tensors if name.startswith(start) and name.endswith(end))


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("sd1", lambda t: t.pop(one(t, "cond", "q_proj.weight")), "lacks weights of CLIPTextModel: .*q_proj.weight"),
        (
            "sdxl",
            lambda t: t.pop(one(t, "conditioner.embedders.1", "ln_1.bias")),
            "lacks weights of CLIPTextModelWithP",
        ),
        ("sd1", lambda t: t[one(t, "cond", "q_proj.weight")].fill_(torch.nan), "cond.*q_proj.weight is not finite"),
        (
            "sdxl",
            lambda t: t[one(t, "conditioner.embedders.1", "ln_1.bias")].fill_(torch.inf),
            "ln_1.bias is not finite",
        ),
        ("sd1", lambda t: t.update({"model.diffusion_model.spare.weight": torch.ones(1)}), "left over .*spare"),
        (
            "sd1",
            lambda t: t.update({"cond_stage_model.spare": torch.ones(1)}),
            "left over weights of CLIPTextModel: spare",
        ),
        ("sd1", lambda t: t.update({"first_stage_model.spare": torch.ones(1)}), "left over .*first_stage_model.spare"),
        ("sd1", lambda t: t.update({"control_model.x": torch.ones(1)}), "none of its parts .control_model.x"),
        ("sd1", lambda t: t.update({k: v.to(torch.int8) for k, v in t.items()}), "is stored as int8: quantised"),
        ("sd1", lambda t: t.update({"model.diffusion_model.scaled_fp8": torch.ones(1)}), "left over .*scaled_fp8"),
        (
            "sd1",
            lambda t: [t.pop(k) for k in list(t) if "diffusion" in k],
            "holds no unet of a StableDiffusionPipeline",
        ),
        ("sdxl", lambda t: t.update(edm_mean=torch.ones(4)), "edm_mean that it is an EDM model"),
    ],
)
def test_a_single_file_that_is_damaged_or_has_something_left_over_is_refused(
    originals, tmp_path, family, change, message
):
    def changed(tensors):
        change(tensors)
        return tensors

    with pytest.raises(ValueError, match=message):
        single_files.load(originals[family], cut(tmp_path, family, changed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_a_single_file_in_fewer_bits_is_read(originals, tmp_path, dtype):
    name = "model.diffusion_model.input_blocks.0.0.weight"
    file = cut(tmp_path, "sd1", lambda tensors: {key: value.to(dtype) for key, value in tensors.items()})
    stored = load_file(file)[name].float()
    assert torch.equal(single_files.load(originals["sd1"], file)["unet"].conv_in.weight, stored)


def test_a_single_textual_inversion_is_named_as_such(folders, tmp_path):
    save_file({"<sks>": torch.randn(1, 32)}, tmp_path / "sks.safetensors")
    with pytest.raises(ValueError, match="is a textual-inversion embedding"):
        models.load_pair(str(folders["sd1"]), tmp_path / "sks.safetensors")


V, ZERO = {"v_pred": torch.zeros(0)}, {"ztsnr": torch.zeros(0)}


@pytest.mark.parametrize(
    ("marks", "metadata", "kind", "zero"),
    [
        ({}, None, "epsilon", False),
        (V, None, "v_prediction", False),
        (V | ZERO, None, "v_prediction", True),
        ({}, {"modelspec.prediction_type": "v"}, "v_prediction", False),
        ({}, {"modelspec.predict_key": "v"}, "v_prediction", False),
        ({}, {"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, "v_prediction", False),
        ({}, {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, "v_prediction", True),
        ({}, {"modelspec.prediction_type": "epsilon"}, "epsilon", False),
    ],
)
def test_what_a_single_file_says_of_its_predictions_is_obeyed(originals, tmp_path, marks, metadata, kind, zero):
    file = cut(tmp_path, "sdxl", lambda tensors: tensors | marks, metadata)
    schedule = single_files.load(originals["sdxl"], file).get("scheduler", originals["sdxl"].scheduler)
    assert schedule.config.prediction_type == kind
    assert (float(schedule.alphas_cumprod[-1]) == 0) == zero


@pytest.mark.parametrize(
    ("marks", "metadata", "message"),
    [
        (
            V,
            {"modelspec.prediction_type": "epsilon"},
            "contradicts itself: epsilon by modelspec.*v_prediction by the tensor",
        ),
        ({}, {"modelspec.prediction_type": "score"}, "is 'score'; known are epsilon"),
        (
            {},
            {"modelspec.prediction_type": "flow"},
            "predicts flow_prediction, which a StableDiffusionXLPipeline does not",
        ),
    ],
)
def test_a_single_file_that_says_what_cannot_be_obeyed_is_refused(originals, tmp_path, marks, metadata, message):
    with pytest.raises(ValueError, match=message):
        single_files.load(originals["sdxl"], cut(tmp_path, "sdxl", lambda tensors: tensors | marks, metadata))


def test_a_schedule_kept_in_a_single_file_is_obeyed(originals, tmp_path):
    """`alphas_cumprod` of another schedule; the base model's own, in half precision, changes nothing."""
    base = originals["sd1"]
    other = DDIMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear").alphas_cumprod
    sigmas = ((1 - other) / other) ** 0.5
    for kept in ({"alphas_cumprod": other}, {"denoiser.sigmas": sigmas}, {"denoiser.sigmas": sigmas.flip(0)}):
        file = cut(tmp_path, "sd1", lambda tensors, kept=kept: tensors | kept)
        assert torch.allclose(single_files.load(base, file)["scheduler"].alphas_cumprod, other, rtol=1e-4)
    same = {"alphas_cumprod": base.scheduler.alphas_cumprod.half()}
    assert "scheduler" not in single_files.load(base, cut(tmp_path, "sd1", lambda tensors: tensors | same))


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"emb_params": (2, 8)}, True),
        ({"clip_l": (2, 8), "clip_g": (2, 16)}, True),
        ({"emb_params": (2, 8, 1)}, False),
        ({"a": (2,), "b": (2,), "c": (2,)}, False),
        ({"middle_block.0.weight": (2, 8)}, False),
        ({}, False),
    ],
)
def test_an_embedding_is_known_by_one_or_two_matrices_without_a_module(tmp_path, tensors, expected):
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "a.safetensors")
    assert checkpoints.is_embedding(tmp_path / "a.safetensors") == expected


# folders


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_folders_with_variants_only_are_read(folders, tmp_path, name):
    tuned = models.load_pipeline(str(folders["sd1 tuned"]))
    tuned.save_pretrained(tmp_path / "whole", variant=name)
    tuned.unet.save_pretrained(tmp_path / "part/unet", variant=name)
    assert not list(tmp_path.glob("*/*/model.safetensors"))
    base = models.load_pipeline(str(folders["sd1"]))
    only_unet = copy.copy(base)
    only_unet.unet = tuned.unet
    assert same(models.load_pair(str(folders["sd1"]), tmp_path / "whole"), base, tuned)
    assert same(models.load_pair(str(folders["sd1"]), tmp_path / "part"), base, only_unet)


def test_plain_weights_go_before_variants_and_several_variants_are_refused(tmp_path):
    for name in ("model.fp16.safetensors", "model.non_ema.safetensors"):
        save_file({"a": torch.zeros(1)}, tmp_path / name)
    assert checkpoints.variant(tmp_path) == "fp16"
    (tmp_path / "model.fp16.safetensors").rename(tmp_path / "model.ema.safetensors")
    with pytest.raises(ValueError, match="holds the variants ema, non_ema of its weights"):
        checkpoints.variant(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model-00001-of-00002.safetensors")
    assert checkpoints.variant(tmp_path) is None


def test_a_hub_repository_with_variants_only_is_fetched_whole(folders, tmp_path, monkeypatch):
    """Of two Hub repositories the one with plain weights is fetched without its fp16 copies, the other with them."""
    tuned = models.load_pipeline(str(folders["sd1 tuned"]))
    tuned.save_pretrained(tmp_path / "hub/someone/half", variant="fp16")
    shutil.copytree(tmp_path / "hub/someone/half", tmp_path / "hub/someone/both")
    shutil.copytree(folders["sd1 tuned"], tmp_path / "hub/someone/both", dirs_exist_ok=True)

    def download(repository, revision=None, allow_patterns=(), ignore_patterns=()):
        source, target = tmp_path / "hub" / repository, tmp_path / "cache" / repository
        for file in (path for path in source.rglob("*") if path.is_file()):
            name = str(file.relative_to(source))
            if any(fnmatch(name, p) for p in allow_patterns) and not any(fnmatch(name, p) for p in ignore_patterns):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target / name)
        return str(target)

    monkeypatch.setattr(checkpoints, "hf_hub_download", lambda *_, **__: None)
    monkeypatch.setattr(checkpoints, "snapshot_download", download)
    base = models.load_pipeline(str(folders["sd1"]))
    assert same(models.load_pair(str(folders["sd1"]), "someone/half"), base, tuned)
    assert not list(checkpoints.find("someone/both").rglob("*.fp16.*"))


def test_a_settled_file_has_the_same_bytes_whenever_it_is_saved_and_says_the_same(tmp_path):
    """The library leaves the order of eight entries to chance, so three files as they come are hardly ever one."""
    file, tensors = tmp_path / "a.safetensors", {"b": torch.randn(3, 5), "a": torch.arange(7, dtype=torch.int8)}
    told = {f"entry {number}": 'ü "\n\\' * number for number in range(8)}
    found = set()
    for _ in range(3):
        save_file(tensors, file, told)
        checkpoints.settle(file)
        found.add(file.read_bytes())
    assert len(found) == 1
    assert checkpoints.header(file) == told
    read = load_file(file)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_a_process_asks_the_hub_once_for_a_repository_and_again_if_it_is_gone(tmp_path, monkeypatch):
    asked = []

    def download(repository, revision=None, **_):
        asked.append(f"{repository}@{revision}")
        (place := tmp_path / str(revision)).mkdir(exist_ok=True)
        return str(place)

    monkeypatch.setattr(checkpoints, "hf_hub_download", lambda *_, **__: None)
    monkeypatch.setattr(checkpoints, "snapshot_download", download)
    for _ in range(3):
        assert checkpoints.find("someone/birds") == tmp_path / "None"
        assert checkpoints.find("someone/birds@v2") == tmp_path / "v2"
    assert asked == ["someone/birds@None", "someone/birds@v2"]
    shutil.rmtree(tmp_path / "v2")
    assert checkpoints.find("someone/birds@v2").is_dir()
    assert asked[2:] == ["someone/birds@v2"]


def test_pickles_that_nobody_reads_are_no_matter(folders, tmp_path):
    """A training checkpoint: unet/ beside accelerate's optimizer.bin, scheduler.bin and random_states_0.pkl."""
    shutil.copytree(folders["sd1 tuned"] / "unet", tmp_path / "unet")
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl", "scaler.pt"):
        (tmp_path / name).write_bytes(b"")
    assert checkpoints.kind_of(tmp_path) == "parts"
    shutil.rmtree(tmp_path / "unet")
    with pytest.raises(FileNotFoundError, match="holds no model"):
        checkpoints.kind_of(tmp_path)
    _lora(tmp_path)
    assert checkpoints.kind_of(tmp_path) == "lora"


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "unet/adapter_config.json"])
def test_a_folder_with_a_model_and_an_adapter_is_refused(folders, tmp_path, name):
    shutil.copytree(folders["sd1 tuned"], tmp_path / "both")
    _lora(tmp_path / "both")
    (tmp_path / "both" / checkpoints.LORA_FILE).rename(tmp_path / "both" / name)
    with pytest.raises(ValueError, match=f"holds a model and an adapter .*{name}"):
        checkpoints.kind_of(tmp_path / "both")


TEXT_DAMAGE = {
    "lacks a layer": (lambda t: [t.pop(k) for k in list(t) if "layers.1." in k], "missing keys .*layers.1"),
    "another prefix": (lambda t: [t.update({f"x.{k}": t.pop(k)}) for k in list(t)], "(missing|unexpected) keys"),
    "NaN": (lambda t: t[one(t, "", "q_proj.weight")].fill_(torch.nan), "q_proj.weight is not finite"),
    "one too many": (lambda t: t.update(spare=torch.ones(1)), "unexpected keys spare"),
    "another shape": (
        lambda t: t.update({k: v[:5] for k, v in t.items() if "final_layer_norm.b" in k}),
        "final_layer_norm",
    ),
    "whole numbers": (lambda t: t.update({k: v.char() for k, v in t.items() if "q_proj.w" in k}), "stored as I8"),
}


@pytest.mark.parametrize(
    ("family", "part", "case"),
    [
        *(("sd1", "text_encoder", case) for case in TEXT_DAMAGE),
        *(("sdxl", "text_encoder_2", case) for case in TEXT_DAMAGE),
        ("alt", "text_encoder", "one too many"),
    ],
)
def test_text_encoders_are_checked_as_networks_are(folders, tmp_path, family, part, case):
    damage, message = TEXT_DAMAGE[case]
    shutil.copytree(folders[f"{family} tuned"] / part, tmp_path / part)
    rewrite(tmp_path / part / "model.safetensors", damage)
    with pytest.raises(ValueError, match=message) as refused:
        parts.load_text_encoder(tmp_path / part, family == "alt", torch.float32)
    assert f"{tmp_path}/{part}" in str(refused.value)


SCHEDULE, VAE = "scheduler/scheduler_config.json", "vae/config.json"
SETTINGS_REFUSED = {
    "another latent scale": (lambda f: settings(f / VAE, scaling_factor=0.5), "scaling_factor is 0.18215 and 0.5"),
    "a slightly other latent scale": (
        lambda f: settings(f / VAE, scaling_factor=0.19),
        "scaling_factor is 0.18215 and 0.19",
    ),
    "another latent shift": (lambda f: settings(f / VAE, shift_factor=0.1), "shift_factor is None and 0.1"),
    "latent statistics": (
        lambda f: settings(f / VAE, latents_mean=[0.1] * 4, latents_std=[2.0] * 4),
        r"latents_mean is None and \[0.1",
    ),
    "an EDM schedule": (
        lambda f: settings(f / SCHEDULE, _class_name="EDMEulerScheduler"),
        "holds a EDMEulerScheduler, but",
    ),
    "a flow schedule": (
        lambda f: settings(f / SCHEDULE, _class_name="FlowMatchEulerDiscreteScheduler"),
        "FlowMatchEulerDiscreteScheduler, but this family's models are supported with a noise schedule",
    ),
    "an unknown schedule": (
        lambda f: settings(f / SCHEDULE, _class_name="MyScheduler"),
        "'MyScheduler', which is no sched",
    ),
    "another autoencoder": (lambda f: settings(f / VAE, _class_name="AutoencoderTiny"), "holds AutoencoderTiny"),
    "a class as a list": (
        lambda f: settings(f / "model_index.json", _class_name=["StableDiffusionPipeline"]),
        "which is not supported; supported are",
    ),
    "a part too many": (
        lambda f: shutil.copytree(f / "text_encoder", f / "text_encoder_2"),
        "holds text_encoder_2/, which a StableDiffusionPipeline has not",
    ),
    "a tokenizer without a vocabulary": (
        lambda f: [p.unlink() for p in (f / "tokenizer").iterdir() if p.name != "tokenizer_config.json"],
        "tokenizer holds no tokenizer",
    ),
    "a tokenizer of another model": (
        lambda f: shutil.rmtree(f / "tokenizer") or _larger_tokenizer().save_pretrained(f / "tokenizer"),
        "tokens, its text encoder",
    ),
}


def _larger_tokenizer():
    tokenizer = tiny.byte_tokenizer()
    tokenizer.add_tokens(["sks", "xyz"])
    return tokenizer


@pytest.mark.parametrize("case", SETTINGS_REFUSED)
def test_settings_that_cannot_be_obeyed_are_refused(folders, case, tmp_path):
    damage, message = SETTINGS_REFUSED[case]
    shutil.copytree(folders["sd1 tuned"], tmp_path / "tuned")
    damage(tmp_path / "tuned")
    with pytest.raises(ValueError, match=message):
        models.load_pair(str(folders["sd1"]), tmp_path / "tuned")


def test_a_base_model_without_a_part_is_refused_and_a_fine_tuned_one_takes_the_base_models(folders, tmp_path):
    shutil.copytree(folders["sd1 tuned"], tmp_path / "model")
    shutil.rmtree(tmp_path / "model/tokenizer")
    with pytest.raises(ValueError, match="model holds no tokenizer/, which a StableDiffusionPipeline needs"):
        models.load_pipeline(str(tmp_path / "model"))
    pair = models.load_pair(str(folders["sd1"]), tmp_path / "model")
    assert pair.tuned.tokenizer is pair.base.tokenizer
    assert pair.tuned.unet is not pair.base.unet


def test_latents_are_decoded_by_the_autoencoders_own_statistics(folders):
    pipeline = copy.copy(models.load_pipeline(str(folders["sd1"])))
    mean, std = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
    pipeline.vae = copy.deepcopy(pipeline.vae)
    pipeline.vae.register_to_config(latents_mean=mean, latents_std=std, scaling_factor=0.5)
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    by_hand = x * torch.tensor(std)[:, None, None] / 0.5 + torch.tensor(mean)[:, None, None]
    with torch.no_grad():
        assert torch.allclose(families.decode(pipeline, x), pipeline.vae.decode(by_hand).sample, atol=1e-5)


@pytest.mark.parametrize("name", ["a" * 300, "~nobody-of-this-name/x", "a\0b"])
def test_a_name_that_can_be_no_model_is_refused(folders, name):
    with pytest.raises(FileNotFoundError):
        models.load_pair(str(folders["sd1"]), name)


# thirty inputs that are refused


def rewrite(file: Path, change) -> None:
    """Change the tensors of a safetensors file in place."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def settings(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _lora(place: Path, tensors: dict | None = None, name: str = checkpoints.LORA_FILE) -> None:
    """A LoRA file for the tiny U-Net, or one with these tensors."""
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    fitting = {f"{key}.lora_A.weight": torch.ones(2, 32), f"{key}.lora_B.weight": torch.ones(32, 2)}
    place.mkdir(exist_ok=True)
    save_file(fitting if tensors is None else tensors, place / name)


def _pickle_only(folder: Path, part: str, name: str) -> None:
    file = next((folder / part).glob("*.safetensors"))
    torch.save(load_file(file), folder / part / name)
    file.unlink()


KEY = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
UNET = f"unet/{UNET_FILE}"
# what is done to a copy of a good fine-tuned folder `f` (or what is put in its place), and what is said about it
REFUSED = {
    "nothing there": (lambda f: shutil.rmtree(f), "is no file or folder, no Hub id"),
    "empty folder": (lambda f: shutil.rmtree(f) or f.mkdir(), "holds no model: neither model_index.json"),
    "folder of text": (lambda f: shutil.rmtree(f) or f.mkdir() or (f / "a.txt").write_text("x"), "holds no model"),
    "text as safetensors": (
        lambda f: shutil.rmtree(f) or f.mkdir() or (f / "lora.safetensors").write_text("hello" * 9),
        r"lora\.safetensors is truncated or no safetensors file",
    ),
    "truncated unet": (lambda f: _truncate(f / UNET), r"unet/.*safetensors is truncated"),
    "truncated vae": (lambda f: _truncate(f / f"vae/{UNET_FILE}"), r"vae/.*safetensors is truncated"),
    "unet as pickle": (lambda f: _pickle_only(f, "unet", "diffusion_pytorch_model.bin"), r"\.bin is a pickle"),
    "text encoder as pickle": (lambda f: _pickle_only(f, "text_encoder", "pytorch_model.bin"), r"\.bin is a pickle"),
    "lora as pickle": (
        lambda f: shutil.rmtree(f) or f.mkdir() or torch.save({}, f / "pytorch_lora_weights.bin"),
        r"pytorch_lora_weights\.bin is a pickle",
    ),
    "a ckpt": (lambda f: shutil.rmtree(f) or f.mkdir() or torch.save({}, f / "model.ckpt"), r"model\.ckpt is a pickle"),
    "missing weights": (lambda f: (f / UNET).unlink(), "unet cannot be loaded"),
    "missing shard": (
        lambda f: (f / "unet/x.safetensors.index.json").write_text('{"weight_map": {"a": "shard-2.safetensors"}}'),
        "names shard-2.safetensors, which is not there",
    ),
    "broken config": (lambda f: (f / "unet/config.json").write_text("{"), r"unet/config\.json is no valid JSON"),
    "config is a list": (
        lambda f: (f / "unet/config.json").write_text("[]"),
        r"config\.json holds list instead of settings",
    ),
    "unknown network": (
        lambda f: settings(f / "unet/config.json", _class_name="FluxModel"),
        "holds FluxModel; supported",
    ),
    "unknown pipeline": (
        lambda f: settings(f / "model_index.json", _class_name="PixArtSigmaPipeline"),
        "PixArtSigmaPipeline, which is not",
    ),
    "a weight missing": (lambda f: rewrite(f / UNET, lambda t: t.pop("conv_in.bias")), r"missing keys conv_in\.bias"),
    "a weight too many": (
        lambda f: rewrite(f / UNET, lambda t: t.update(spare=torch.zeros(1))),
        "unexpected keys spare",
    ),
    "a weight of another shape": (
        lambda f: rewrite(f / UNET, lambda t: t.update({"conv_in.bias": torch.zeros(3)})),
        r"unet cannot be loaded.*conv_in\.bias",
    ),
    "not a number": (
        lambda f: rewrite(f / UNET, lambda t: t["conv_in.bias"].fill_(float("nan"))),
        r"conv_in\.bias is not finite",
    ),
    "infinite vae": (
        lambda f: rewrite(f / f"vae/{UNET_FILE}", lambda t: t["decoder.conv_in.bias"].fill_(float("inf"))),
        "is not finite",
    ),
    "another width": (
        lambda f: shutil.rmtree(f) or tiny.unet(block_out_channels=(16, 48)).save_pretrained(f / "unet"),
        r"block_out_channels is .16, 32. and .16, 48.",
    ),
    "another text width": (
        lambda f: shutil.rmtree(f) or tiny.unet(cross_attention_dim=48).save_pretrained(f / "unet"),
        "cross_attention_dim is 32 and 48",
    ),
    "another latent size": (
        lambda f: shutil.rmtree(f) or tiny.unet(sample_size=8).save_pretrained(f / "unet"),
        "sample_size is 4 and 8",
    ),
    "inpainting": (
        lambda f: shutil.rmtree(f) or tiny.unet(in_channels=9).save_pretrained(f / "unet"),
        "in_channels is 4 and 9",
    ),
    "another family": (
        lambda f: shutil.rmtree(f) or tiny.save("sdxl", f),
        "StableDiffusionPipeline.*StableDiffusionXLPipeline",
    ),
    "another kind of network": (
        lambda f: shutil.rmtree(f) or tiny.pipeline("sd3").transformer.save_pretrained(f / "transformer"),
        "holds no unet/, which is what StableDiffusionPipeline denoises with",
    ),
    "unknown prediction type": (
        lambda f: settings(f / "scheduler/scheduler_config.json", prediction_type="score"),
        "unknown prediction type 'score'",
    ),
    "zero terminal SNR on a base without": (
        lambda f: settings(
            f / "scheduler/scheduler_config.json",
            _class_name="DDIMScheduler",
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
        ),
        "starts from pure noise",
    ),
    "lora of other layers": (
        lambda f: (
            shutil.rmtree(f)
            or _lora(
                f, {"unet.nowhere.lora_A.weight": torch.ones(2, 2), "unet.nowhere.lora_B.weight": torch.ones(2, 2)}
            )
        ),
        r"unet\.nowhere\.lora_A\.weight|nowhere",
    ),
    "lora of the text encoder only": (
        lambda f: (
            shutil.rmtree(f)
            or _lora(
                f,
                {
                    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 32),
                    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(32, 2),
                },
            )
        ),
        "holds no adapter for the unet.*first keys are text_encoder",
    ),
    "lora of another width": (
        lambda f: (
            shutil.rmtree(f)
            or _lora(f, {f"{KEY}.lora_A.weight": torch.ones(2, 64), f"{KEY}.lora_B.weight": torch.ones(64, 2)})
        ),
        "cannot be loaded.*size mismatch",
    ),
    "lora of zeros": (
        lambda f: (
            shutil.rmtree(f)
            or _lora(f, {f"{KEY}.lora_A.weight": torch.ones(2, 32), f"{KEY}.lora_B.weight": torch.zeros(32, 2)})
        ),
        "the LoRA changes nothing",
    ),
    "lora with NaN": (
        lambda f: (
            shutil.rmtree(f)
            or _lora(
                f, {f"{KEY}.lora_A.weight": torch.ones(2, 32), f"{KEY}.lora_B.weight": torch.full((32, 2), torch.nan)}
            )
        ),
        r"mid_block.*lora_B\.weight is not finite",
    ),
    "several loras": (
        lambda f: shutil.rmtree(f) or _lora(f, name="a.safetensors") or _lora(f, name="b.safetensors"),
        r"holds several LoRA files \(a\.safetensors, b\.safetensors\)",
    ),
    "peft without weights": (
        lambda f: shutil.rmtree(f) or f.mkdir() or LoraConfig(target_modules=["to_q"]).save_pretrained(str(f)),
        "adapter_config.json but no adapter_model.safetensors",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_damaged_or_does_not_fit_is_refused(folders, case, tmp_path):
    damage, message = REFUSED[case]
    folder = tmp_path / "tuned"
    shutil.copytree(folders["sd1 tuned"], folder)
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as refused:
        models.load_pair(str(folders["sd1"]), folder)
    assert str(tmp_path) in str(refused.value), "the message names the file"


def test_there_are_thirty():
    assert len(REFUSED) >= 30


def test_a_base_model_must_be_a_whole_folder(folders):
    with pytest.raises(ValueError, match="unet is no complete model: a base model is a diffusers folder"):
        models.load_pipeline(str(folders["sd1"] / "unet"))
    with pytest.raises(
        ValueError, match=r"sd1\.safetensors is no complete model.*convert it once by .* save_pretrained"
    ):
        models.load_pipeline(str(SINGLE_FILE / "sd1.safetensors"))
