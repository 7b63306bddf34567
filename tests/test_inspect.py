"""What a checkpoint says: kinds, families, adapters, hints, base models, and nothing but a message from hostile files."""

import json
import struct
from pathlib import Path

import pytest
import tiny
import torch
from huggingface_hub import ModelCardData
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from fx import inspect as command
from fx.inspect import as_text, distances, inspect, place_of, rank_bases
from fx.models import load_pair, load_pipeline

ATTENTION = "down_blocks_{}_attentions_0_transformer_blocks_0_attn2_to_{}"
KOHYA = {
    "ss_sd_model_name": "sd-v1-5.safetensors",
    "ss_network_dim": "4",
    "ss_dataset_dirs": json.dumps({"10_sks dog": {"img_count": 7, "n_repeats": 10}, "plain": {"img_count": 1}}),
    "ss_tag_frequency": json.dumps({"10_sks dog": {"a dog": 7, "grass": 2}}),
    "modelspec.trigger_phrase": "photo of sks dog",
    "modelspec.title": "my dog",
    "secret": "not shown",
}


def kohya(width: int = 768, ranks: tuple[int, int] = (4, 8), alpha: float = 2.0) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA in kohya's layout: keys of two blocks of a U-Net and one layer of a text encoder."""
    made = {}
    for block, rank in enumerate(ranks):
        name = f"lora_unet_{ATTENTION.format(block, 'k')}"
        made |= {f"{name}.lora_down.weight": torch.ones(rank, width), f"{name}.lora_up.weight": torch.ones(16, rank)}
        made[f"{name}.alpha"] = torch.tensor(alpha)
    text = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    return made | {f"{text}.lora_down.weight": torch.ones(2, width), f"{text}.lora_up.weight": torch.ones(width, 2)}


def lora(folder: Path, tensors: dict, metadata: dict | None = None) -> Path:
    save_file(tensors, folder / "lora.safetensors", metadata)
    return folder / "lora.safetensors"


def test_an_adapter_in_kohyas_layout_by_its_blocks_ranks_scales_and_words(tmp_path):
    found = inspect(str(lora(tmp_path, kohya(), KOHYA)))
    assert (found.kind, found.family, found.troubles) == ("lora", "Stable Diffusion 1", ())
    assert found.tensors == 8
    assert found.formats == {"F32": 8}
    assert found.bytes == (tmp_path / "lora.safetensors").stat().st_size
    rows = found.layers.set_index(["part", "block"])
    assert rows.loc[("network", "down_blocks.0"), ["kind", "layers", "ranks", "scales"]].tolist() == [
        "LoRA",
        1,
        "4",
        "0.5",
    ]
    assert rows.loc[("network", "down_blocks.1"), ["ranks", "scales"]].tolist() == ["8", "0.25"]
    assert rows.loc[("text encoder", "layers.0"), ["ranks", "scales"]].tolist() == ["2", "1"]
    assert found.base_names == ("sd-v1-5.safetensors",)
    assert found.metadata.images == 8
    assert found.said["ss_network_dim"] == "4"
    assert "secret" not in found.said
    assert found.leads == (
        ("photo of sks dog", "modelspec.trigger_phrase"),
        ("sks dog", "a folder of training images"),
        ("a dog", "7 captions"),
        ("grass", "2 captions"),
    )


@pytest.mark.parametrize(
    ("module", "place"),
    [
        ("lora_unet_mid_block_attentions_0_proj_in", ("network", "middle")),
        ("unet.up_blocks.2.attentions.0.proj_in", ("network", "up_blocks.2")),
        ("base_model.model.down_blocks.1.resnets.0.conv1", ("network", "down_blocks.1")),
        ("lora_unet_input_blocks_4_1_proj_in", ("network", "input_blocks.4")),
        ("lora_te2_text_model_encoder_layers_11_mlp_fc1", ("text encoder 2", "layers.11")),
        ("text_encoder.text_model.encoder.layers.3.mlp.fc1", ("text encoder", "layers.3")),
        ("transformer.single_transformer_blocks.7.attn.to_q", ("network", "single_transformer_blocks.7")),
        ("lora_unet_double_blocks_3_img_attn_qkv", ("network", "double_blocks.3")),
        ("transformer.transformer_blocks.2.attn.to_k", ("network", "transformer_blocks.2")),
        ("lora_unet_conv_in", ("network", "elsewhere")),
    ],
)
def test_the_block_of_a_module_in_every_layout(module, place):
    found = place_of(module)
    assert found == place


@pytest.mark.parametrize(
    ("width", "family"),
    [(768, "Stable Diffusion 1"), (1024, "Stable Diffusion 2"), (2048, "SDXL"), (33, "width 33, which no published")],
)
def test_a_family_is_told_by_what_the_cross_attention_reads(tmp_path, width, family):
    assert family in inspect(str(lora(tmp_path, kohya(width)))).family


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("transformer.single_transformer_blocks.0.attn.to_q", "FLUX.1"),
        ("lora_unet_double_blocks_0_img_attn_proj", "FLUX.1"),
        ("transformer.transformer_blocks.0.attn.add_k_proj", "Stable Diffusion 3"),
    ],
)
def test_transformers_are_told_by_their_blocks(tmp_path, name, family):
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.ones(8, 2)}
    found = inspect(str(lora(tmp_path, tensors)))
    assert found.family == family


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_pipeline_of_every_family(tmp_path, family):
    folder = tiny.save(family, tmp_path / family)
    found = inspect(str(folder), [str(folder)])
    assert (found.kind, found.troubles) == ("pipeline", ())
    assert found.family == type(load_pipeline(str(folder))).__name__ or family == "alt"
    assert found.bases.verdict.tolist() == ["nearest"]
    assert found.tensors > 50


def test_the_kinds_of_layers_are_told_apart(tmp_path):
    a, b, c, d = ("lora_unet_" + ATTENTION.format(0, part) for part in ("k", "v", "q", "out_0"))
    tensors = {f"{a}.{word}": torch.ones(2, 2) for word in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")}
    tensors |= {f"{b}.lokr_w1": torch.ones(2, 2), f"{b}.lokr_w2": torch.ones(2, 2), f"{c}.diff": torch.ones(4, 4)}
    tensors |= {f"{d}.lora_down.weight": torch.ones(3, 4), f"{d}.lora_up.weight": torch.ones(4, 3)}
    tensors[f"{d}.dora_scale"] = torch.ones(4, 1)
    found = inspect(str(lora(tmp_path, tensors))).layers.set_index("kind")
    assert set(found.index) == {"LoHa", "LoKr", "difference", "DoRA"}
    assert found.ranks.to_dict() == {"LoHa": "2", "LoKr": "", "difference": "", "DoRA": "3"}


def test_a_folder_of_peft_has_the_scale_and_the_base_of_its_settings(tmp_path, tiny_sd):
    unet = load_pipeline(str(tiny_sd)).unet
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["to_k"], base_model_name_or_path="someone/base")
    get_peft_model(unet, config).save_pretrained(tmp_path / "peft")
    settings = json.loads((tmp_path / "peft/adapter_config.json").read_text()) | {
        "base_model_name_or_path": "someone/base"
    }
    (tmp_path / "peft/adapter_config.json").write_text(json.dumps(settings))
    found = inspect(str(tmp_path / "peft"))
    assert (found.kind, found.troubles) == ("peft", ())
    assert set(found.layers.ranks) == {"2"}
    assert set(found.layers.scales) == {"3"}
    assert found.base_names == ("someone/base",)


def test_a_model_card_names_base_and_caption(tmp_path):
    file = lora(tmp_path, kohya())
    front = "base_model: 'someone/base'\ninstance_prompt: a photo of sks dog\ntags:\n- lora\n  trigger: no"
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\ntrigger: text")
    assert inspect(str(file)).leads == (("a photo of sks dog", "the model card"),)
    found = inspect(str(tmp_path))
    assert found.base_names == ("someone/base",)
    assert found.leads == (("a photo of sks dog", "the model card"),)
    long = "a watercolour drawing of an old harbour with three small fishing boats and it's a: dog " * 3
    entries = ModelCardData(instance_prompt=long.strip(), license="mit").to_yaml()
    (tmp_path / "README.md").write_text(f"---\n{entries}\n---\n")
    assert inspect(str(file)).leads == ((long.strip(), "the model card"),), "folded by whoever wrote it"
    assert f"… ({len(long) - 1} characters)" in as_text(inspect(str(file)))
    (tmp_path / "README.md").write_text("---\ninstance_prompt: a dog: sks\nbase_model: !!python/object:x\n---\n")
    assert inspect(str(file)).leads == (("a dog: sks", "the model card"),), "no YAML, but plain lines"
    (tmp_path / "README.md").write_text("---" + "\n" * 100_000 + "a dog")  # quadratic, it would take minutes
    assert inspect(str(file)).leads == ()
    (tmp_path / "README.md").write_bytes(b"---\n\xff\xfe: \x00\n")
    assert inspect(str(file)).leads == ()


def test_what_is_damaged_or_strange_is_said_beside_what_can_be_told(tmp_path):
    tensors = kohya() | {"lora_unet_x.strange": torch.ones(1)}
    found = inspect(str(lora(tmp_path, tensors)))
    assert found.family == "Stable Diffusion 1"
    assert any("1 tensors are of no known kind (lora_unet_x.strange)" in trouble for trouble in found.troubles)
    tensors = kohya()
    tensors[f"lora_unet_{ATTENTION.format(0, 'k')}.lora_up.weight"][0, 0] = float("nan")
    found = inspect(str(lora(tmp_path, tensors)))
    assert len(found.layers) == 3
    assert any("is not finite" in trouble for trouble in found.troubles)
    found = inspect(str(lora(tmp_path, kohya(), {"modelspec.prediction_type": "guess"})))
    assert any("'guess'" in trouble for trouble in found.troubles)


def test_an_embedding_and_a_pickle_are_named_and_not_opened(tmp_path):
    save_file({"emb_params": torch.ones(2, 8)}, tmp_path / "word.safetensors")
    found = inspect(str(tmp_path / "word.safetensors"))
    assert found.kind == "embedding"
    assert "theta' would be theta" in found.troubles[0]
    (tmp_path / "model.ckpt").write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    found = inspect(str(tmp_path / "model.ckpt"))
    assert "is a pickle" in found.troubles[0]
    assert found.kind == "unknown"


def test_a_file_that_brings_a_word_along_hints_at_it(tmp_path):
    tensors = kohya() | {"bundle_emb.sks.string_to_param.*": torch.ones(1, 768)}
    found = inspect(str(lora(tmp_path, tensors)))
    assert ("sks", "a word that it brings along") in found.leads
    assert found.troubles == ()


# which base


@pytest.fixture(scope="module")
def three_bases(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("bases")
    return [str(tiny.save("sd1", folder / f"base-{seed}", seed)) for seed in range(3)]


def moved(base: str, folder: Path, size: float) -> Path:
    """A fine-tuned model: the base's U-Net, every weight moved by noise of this size, as parts in a folder."""
    unet = load_pipeline(base).unet
    draw = torch.Generator().manual_seed(5)
    for weight in unet.parameters():
        weight.data += size * weight.data.std(correction=0) * torch.randn(weight.shape, generator=draw)
    unet.save_pretrained(folder / "unet")
    return folder


@pytest.mark.parametrize("true", range(3))
def test_the_right_base_comes_first_and_others_are_unrelated(three_bases, tmp_path, true):
    found = rank_bases(str(moved(three_bases[true], tmp_path / "tuned", 0.05)), three_bases)
    assert found.base[0] == three_bases[true]
    assert found.verdict.tolist() == ["nearest", "unrelated", "unrelated"]
    assert found.unet[0] < 0.1 < 1 < found.unet[1]
    assert (found.vae == 0).all()


def test_two_versions_of_one_base_are_nearest_and_further(three_bases, tmp_path):
    parent = load_pipeline(three_bases[0])
    parent.unet = load_pair(three_bases[0], moved(three_bases[0], tmp_path / "next", 0.2)).tuned.unet
    parent.save_pretrained(tmp_path / "version 2")
    tuned = moved(str(tmp_path / "version 2"), tmp_path / "tuned", 0.02)
    found = rank_bases(str(tuned), [three_bases[0], str(tmp_path / "version 2"), three_bases[1]])
    assert found.base.tolist() == [str(tmp_path / "version 2"), three_bases[0], three_bases[1]]
    assert found.verdict.tolist() == ["nearest", "further", "unrelated"]


def test_where_none_fits_it_is_said(three_bases, tmp_path, monkeypatch):
    # or no/such would be asked for again and again
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    other = tiny.save("sdxl", tmp_path / "sdxl")
    tuned = moved(three_bases[0], tmp_path / "tuned", 0.05)
    found = rank_bases(str(tuned), [str(other), three_bases[1], "no/such"])
    assert found.verdict[0] == "unrelated"
    assert found.verdict[1].startswith("does not fit: ")
    assert found.verdict[2].startswith("does not fit: ")
    found = rank_bases(str(tuned), [str(other)])
    assert found.verdict.tolist()[0].startswith("does not fit: ")


def test_distances_are_those_of_all_weights_written_out(three_bases, tmp_path):
    pair = load_pair(three_bases[0], moved(three_bases[0], tmp_path / "tuned", 0.1))
    one, other = (
        torch.cat([w.flatten() for w in part.parameters()]).double() for part in (pair.base.unet, pair.tuned.unet)
    )
    assert distances(pair)["unet"] == pytest.approx(float((other - one).norm() / one.norm()), rel=1e-6)
    assert distances(pair)["text_encoder"] == distances(pair)["vae"] == 0


def test_the_distance_of_a_lora_is_what_it_adds(three_bases, tmp_path):
    pipeline = load_pipeline(three_bases[0])
    size = torch.cat([w.flatten() for w in pipeline.unet.parameters()]).double().norm()
    name = ATTENTION.format(0, "k").replace("_attentions_0_", ".attentions.0.").replace("blocks_0_a", "blocks.0.a")
    path = next(path for path, _ in pipeline.unet.named_modules() if path.endswith("attn2.to_k"))
    shape = pipeline.unet.get_submodule(path).weight.shape
    draw = torch.Generator().manual_seed(3)
    down, up = torch.randn(2, shape[1], generator=draw), torch.randn(shape[0], 2, generator=draw)
    tensors = {
        f"unet.{path}.lora_A.weight": down,
        f"unet.{path}.lora_B.weight": up,
        f"unet.{path}.alpha": torch.tensor(6.0),
    }
    pair = load_pair(three_bases[0], lora(tmp_path, tensors))
    expected = float((3.0 * up.double() @ down.double()).norm() / size)
    assert distances(pair)["unet"] == pytest.approx(expected, rel=1e-5), name
    assert rank_bases(str(tmp_path / "lora.safetensors"), three_bases).verdict.tolist() == ["fits"] * 3


# hostile files

GOOD = {"lora_unet_a.lora_down.weight": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}}


def with_entry(**changes) -> dict:
    return {"lora_unet_a.lora_down.weight": GOOD["lora_unet_a.lora_down.weight"] | changes}


def packed(header: object, data: bytes = bytes(8), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


HOSTILE = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "no header": struct.pack("<Q", 0),
    "a length beyond the file": packed(GOOD, length=10**6),
    "a length of 2^63": packed(GOOD, length=2**63),
    "a length of 2^64 - 1": packed(GOOD, length=2**64 - 1),
    "a length within the header": packed(GOOD, length=10),
    "no JSON": packed(b"{" * 50),
    "a list": packed([1, 2]),
    "a number": packed(7),
    "not UTF-8": packed(b'{"\xff\xfe": 1}'),
    "nested a thousand times": packed(b'{"__metadata__": ' + b"[" * 1000 + b"]" * 1000 + b"}"),
    "no data": packed(GOOD, b""),
    "data cut short": packed(GOOD, bytes(4)),
    "data left over": packed(GOOD, bytes(80)),
    "offsets backwards": packed(with_entry(data_offsets=[8, 0])),
    "offsets below nought": packed(with_entry(data_offsets=[-8, 0])),
    "offsets beyond the file": packed(with_entry(data_offsets=[0, 2**40])),
    "offsets of 2^64": packed(with_entry(data_offsets=[0, 2**64])),
    "offsets that are text": packed(with_entry(data_offsets=["0", "8"])),
    "a shape that overflows": packed(with_entry(shape=[2**40, 2**40])),
    "a shape below nought": packed(with_entry(shape=[-1, -2])),
    "a shape that is no list": packed(with_entry(shape=2)),
    "a shape that does not fill its bytes": packed(with_entry(shape=[3, 3])),
    "an unknown format": packed(with_entry(dtype="F3")),
    "no format": packed({"lora_unet_a.lora_down.weight": {"shape": [1, 2], "data_offsets": [0, 8]}}),
    "metadata that is no text": packed(GOOD | {"__metadata__": {"ss_network_dim": 4}}),
    "metadata that is a list": packed(GOOD | {"__metadata__": [1]}),
    "one tensor over another": packed(GOOD | {"lora_unet_a.lora_up.weight": GOOD["lora_unet_a.lora_down.weight"]}),
    "a pickle by another name": b"\x80\x04\x95" + bytes(100),
    "a zip by another name": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_malformed_header_is_one_message(tmp_path, what, capsys):
    file = tmp_path / "lora.safetensors"
    file.write_bytes(HOSTILE[what])
    assert command.main([str(file)]) == 1
    out, error = capsys.readouterr()
    assert error == ""
    assert str(file) in out.split("what would not load")[1]
    assert len(inspect(str(file)).troubles) == 1


STRANGE = {
    "a kohya entry that is no JSON": {"ss_tag_frequency": "{", "ss_dataset_dirs": "[" * 100_000, "ss_datasets": "7"},
    "kohya entries of other shapes": {
        "ss_tag_frequency": '[{"a": 1}]',
        "ss_dataset_dirs": '{"1_a": null, "2_": 3}',
        "ss_datasets": '[{"subsets": [{"image_dir": 7, "class_tokens": ["x"]}]}, 5]',
    },
    "numbers of a million digits": {
        "ss_num_train_images": "9" * 10**6,
        "ss_dataset_dirs": f'{{"1_a": {{"img_count": {"9" * 5000}}}}}',
    },
    "control characters": {
        "modelspec.title": "\x1b[2J\x1b[31mred\u202e\n\nnew line",
        "modelspec.trigger_phrase": "\x07",
    },
    "control characters in names": {"modelspec.\x1b[2J\n\nforged": "x", "ss_sd_model_name": "\x1b[31mred\nforged"},
    "a megabyte": {"modelspec.description": "x" * 10**6},
    "peft's settings that are none": {"lora_adapter_metadata": "[1, 2]"},
}


@pytest.mark.parametrize("what", STRANGE)
def test_strange_entries_in_a_good_header_do_no_harm(tmp_path, what, capsys):
    command.main([str(lora(tmp_path, kohya(), STRANGE[what]))])
    out, error = capsys.readouterr()
    assert error == ""
    assert "Stable Diffusion 1" in out
    assert all(character.isprintable() or character == "\n" for character in out)
    assert max(map(len, out.splitlines())) < 400


def test_half_a_character_does_not_cost_a_script_its_answer(tmp_path, capsys):
    file = lora(tmp_path, kohya(), {"ss_tag_frequency": '{"1_a": {"\\ud800x": 3}}'})
    command.main(["--json", str(file)])
    out = capsys.readouterr().out
    assert out.encode()
    assert json.loads(out)["metadata"]["tags"] == [["\ud800x", 3]]


def test_the_command_prints_what_was_found_or_that_there_is_nothing(tmp_path, capsys, tiny_sd):
    file = lora(tmp_path, kohya(), KOHYA)
    assert command.main([str(file), "--base", str(tiny_sd)]) == 0
    out = capsys.readouterr().out
    for expected in (
        "Stable Diffusion 1",
        "down_blocks.0",
        "'sks dog', by a folder of training images",
        "does not fit",
    ):
        assert expected in out
    assert command.main([str(file), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kind"] == "lora"
    assert told["layers"][0]["ranks"] == "4"
    assert told["metadata"]["images"] == 8
    assert command.main([str(tmp_path / "nothing")]) == 2
    assert "nothing" in capsys.readouterr().err


def test_its_help_names_its_options(capsys):  # that the module is a command: tests/test_command.py
    with pytest.raises(SystemExit, match="0"):
        command.main(["--help"])
    assert "--base" in capsys.readouterr().out
