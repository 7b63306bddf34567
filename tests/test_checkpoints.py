"""Checkpoints as people publish them: every layout is loaded, what is damaged or does not fit is refused with a reason."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection

from fx import checkpoints, families, models

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


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("text", [False, True])
def test_a_lora_in_kohya_layout(folders, family, text, tmp_path):
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


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "alt", "sd3"])
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


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_single_file(family, tmp_path):
    """Written by the original code (fixtures/single-file/make.py), with that code's own answers."""
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
        lambda f: settings(f / "model_index.json", _class_name="FluxPipeline"),
        "FluxPipeline, which is not",
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
