"""mini-alt and mini-sdxl: their losses against computations by hand, their encodings against the stock pipelines'."""

import copy
import json
import re
from types import SimpleNamespace

import pandas as pd
import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from fx.families import AltConfig, AltTextEncoder, encode
from fx.mini import alt, clip, sd, sdxl, training, vae
from fx.models import load_pipeline
from fx.paths import MODELS

TEXTS = ["a red apple", "ein roter Apfel", "une pomme", "art style of mimooh", "リンゴ", "красное яблоко"]
NAMES = {"en": {}, "de": {"red apple": "roter Apfel"}, "ru": {"red apple": "красное яблоко"}}
NAMES = {language: NAMES.get(language, {}) for language in alt.SAID}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return alt.train_tokenizer(TEXTS * 3, tmp_path_factory.mktemp("words"), vocabulary=80)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return clip.train_tokenizer(TEXTS * 3, tmp_path_factory.mktemp("tokenizer"))


def small_text(tokenizer, kind=CLIPTextModel) -> CLIPTextModel:
    """An untrained text tower of 32 tokens, 24 wide, projected to 16."""
    torch.manual_seed(3)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    size = {"hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
    return kind(
        CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=32, projection_dim=16, **size, **special)
    ).eval()


def small_alt(words, width: int = 32) -> AltTextEncoder:
    torch.manual_seed(4)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "max_position_embeddings": 34}
    return AltTextEncoder(
        AltConfig(vocab_size=len(words), project_dim=width, type_vocab_size=1, **size, **special)
    ).eval()


# mini-alt: captions


def test_labels_are_the_names_of_one_emoji_in_every_language(tmp_path):
    for language in alt.SAID:
        (folder := tmp_path / "names/package" / language).mkdir(parents=True)
        entries = [{"hexcode": "1F34E", "label": "Red Apple" if language == "en" else f"{language} apple"}]
        if language == "de":
            entries += [{"hexcode": "1F34F", "label": "grüner Apfel"}]  # English does not have it
        (folder / "data.json").write_text(json.dumps(entries))
    found = alt.labels(tmp_path)
    assert found.keys() == alt.SAID.keys()
    assert found["de"] == {"red apple": "de apple"}
    assert found["en"] == {"red apple": "Red Apple"}


def test_captions_say_one_thing_in_all_languages_that_have_a_word_for_it():
    emoji = pd.Series({"collection": "noto", "title": "red apple", "author": "", "folder": "f"})
    family, thing = alt.captions(emoji, NAMES)
    assert family == {
        "en": "google emoji of red apple",
        "de": "google Emoji von roter Apfel",
        "ru": "эмодзи google красное яблоко",
    }
    assert thing == {"en": "a red apple", "de": "roter Apfel", "ru": "красное яблоко"}
    work = pd.Series({"collection": "openclipart", "title": "", "author": "mimooh", "folder": "food/red_fruit"})
    clipart, thing, style = alt.captions(work, NAMES)
    assert set(clipart) == set(thing) == set(style) == set(alt.SAID), "titles of clip art are the same in all"
    assert (clipart["en"], thing["en"]) == ("clipart of food red fruit", "a food red fruit")
    assert (style["en"], style["de"], style["zh"]) == (
        "art style of mimooh",
        "Kunststil von mimooh",
        "mimooh 的艺术风格",
    )
    work["author"] = ""
    assert len(alt.captions(work, NAMES)) == 2


def test_the_vocabulary_has_xlm_rs_special_tokens_and_knows_every_letter_it_saw(words, tmp_path):
    assert [words.convert_tokens_to_ids(word) for word in alt.SPECIAL] == [0, 1, 2, 3]
    for text in TEXTS:
        ids = words(text).input_ids
        assert (ids[0], ids[-1]) == (0, 2)
        assert 3 not in ids, text
        assert words.decode(ids, skip_special_tokens=True) == text.lower()
    tokens, mask = alt.numbered(words, ["a red apple", ""])
    assert tokens.shape == mask.shape == (2, clip.MAX_TOKENS)
    assert (tokens == 1).equal(mask == 0)
    assert mask[1].sum() == 2
    words.save_pretrained(tmp_path)
    again = alt.train_tokenizer(["something else"], tmp_path)
    assert again.get_vocab() == words.get_vocab(), "one that lies there is kept"


def test_the_encoder_reads_32_tokens_and_speaks_with_mini_clips_width(words):
    tokens, mask = alt.numbered(words, ["apple " * 40, "apple"])
    assert mask[0].all()
    assert alt.build(words)(tokens, mask)[0].shape == (2, 32, 192)


# mini-alt: what it learns


def test_sentence_states_are_the_states_where_the_caption_ends(tokenizer):
    text = small_text(tokenizer)
    found = alt.sentence_states(text, tokenizer, TEXTS[:3], batch=2)
    for caption, state in zip(TEXTS[:3], found, strict=True):
        alone = tokenizer(caption, return_tensors="pt").input_ids
        torch.testing.assert_close(state, text(alone).last_hidden_state[0, -1], atol=1e-5, rtol=1e-5)


def test_distillation_asks_every_position_for_the_teachers_sentence(words):
    pairs, taught = [(["a red apple", "ein roter Apfel"], 1), (["une pomme"], 0)], torch.randn(2, 32, generator=rng(5))
    model = small_alt(words)
    terms = alt.distillation_loss(pairs, taught, words, batch=12)(model, rng(7))
    again = rng(7)
    chosen = torch.randint(2, (12,), generator=again).tolist()
    draws = torch.rand(12, generator=again).tolist()
    texts = [pairs[i][0][int(u * len(pairs[i][0]))] for i, u in zip(chosen, draws, strict=True)]
    assert len(set(texts)) == 3
    errors, cosines = [], []
    for i, caption in zip(chosen, texts, strict=True):
        states = model(*alt.numbered(words, [caption]))[0][0]
        wanted = taught[pairs[i][1]]
        errors += [((state - wanted) ** 2).mean() for state in states]
        cosines.append(states[0] @ wanted / states[0].norm() / wanted.norm())
    assert terms["loss"].item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-4)
    assert terms["cosine"].item() == pytest.approx(torch.stack(cosines).mean().item(), abs=1e-5)


def test_distillation_falls_in_a_toy_run(words, tmp_path):
    pairs, taught = [([text], row) for row, text in enumerate(TEXTS)], torch.randn(len(TEXTS), 32, generator=rng(5))
    loss = alt.distillation_loss(pairs, taught, words, batch=6)
    schedule = training.Schedule(steps=120, lr=1e-2, warmup=5, ema=0.5)
    average, log = training.train(small_alt(words), loss, schedule, tmp_path)
    assert log[-1]["loss"] < 0.3 * log[0]["loss"]
    said = average.eval()(*alt.numbered(words, TEXTS))[0][:, 0].detach()
    assert (F.normalize(said, dim=1) @ F.normalize(taught, dim=1).T).argmax(dim=1).tolist() == [*range(len(TEXTS))]


def test_a_learner_trains_the_encoder_and_the_cross_attention_and_nothing_else(words):
    learner = alt.Learner(small_alt(words), unet := tiny.unet())
    trained = {name for name, weight in learner.named_parameters() if weight.requires_grad}
    crossing = {f"unet.{name}" for name, _ in unet.named_parameters() if ".attn2." in name}
    assert trained == crossing | {f"text.{name}" for name, _ in learner.text.named_parameters()}
    assert crossing
    x, t = torch.randn(2, 4, 4, 4, generator=rng()), torch.tensor([3, 700])
    tokens, mask = alt.numbered(words, TEXTS[:2])
    assert torch.equal(learner(x, t, tokens, mask), unet(x, t, learner.text(tokens, mask)[0]).sample)


def test_alts_diffusion_loss_is_that_of_sd_under_the_encoders_captions(words):
    learner = alt.Learner(small_alt(words), tiny.unet())
    latents, choices = torch.randn(3, 4, 4, 4, generator=rng(2)), [[0, 1], [2], [3, 4, 5]]
    encoded = [learner.text(*alt.numbered(words, [text]))[0][0].detach() for text in [*TEXTS, ""]]
    wanted = sd.diffusion_loss(latents, choices, torch.stack(encoded[:-1]), encoded[-1], batch=40)(learner.unet, rng(9))
    terms = alt.diffusion_loss(latents, choices, TEXTS, words, batch=40)(learner, rng(9))
    for name, value in wanted.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-4)


def test_a_saved_mini_alt_loads_as_altdiffusion_does(words, tmp_path):
    text = small_alt(words)
    autoencoder = tiny.autoencoder()
    alt.assemble(tiny.unet(), autoencoder, text, words).save_pretrained(tmp_path)
    stock = StableDiffusionPipeline.from_pretrained(tmp_path)
    for loaded in (load_pipeline(str(tmp_path)), stock):
        assert type(loaded.text_encoder) is AltTextEncoder
        found = encode(loaded, "ein roter Apfel").text
        torch.testing.assert_close(found, text(*alt.numbered(words, ["ein roter Apfel"]))[0], atol=1e-5, rtol=1e-5)


# mini-sdxl


def test_mini_sdxl_begins_by_drawing_what_mini_sd_draws():
    """Whatever the second encoder, the pooled caption and the sizes say; and the twin reads the first encoder only."""
    torch.manual_seed(7)
    unet, other = sdxl.build().eval(), sd.build().eval()
    taken = sdxl.start_from(unet, other)
    assert taken == sum(tensor.numel() for tensor in other.parameters())
    x, t = torch.randn(2, 32, 8, 8, generator=rng(1)), torch.tensor([900, 20])
    first, second = torch.randn(2, 2, 32, 192, generator=rng(2))
    added = {"text_embeds": torch.randn(2, 128, generator=rng(3)), "time_ids": torch.tensor([sdxl.WHOLE] * 2).float()}
    with torch.no_grad():
        found = unet(x, t, torch.cat([first, second], dim=2), added_cond_kwargs=added).sample
        torch.testing.assert_close(found, other(x, t, first).sample, atol=1e-5, rtol=1e-5)
    assert unet.config.addition_embed_type == "text_time"


def test_mini_sdxl_learns_its_own_parts_only():
    unet = sd.learn_apart(sdxl.build())
    learned = {name for name, weight in unet.named_parameters() if weight.requires_grad}
    others = set(dict(sd.build().named_parameters()))
    assert {name for name in unet.state_dict() if name not in others} <= learned, "what mini-sd does not have"
    assert {name for name in learned & others if ".attn2." not in name} == set()
    assert sum(".attn2." in name for name in learned) == sum(".attn2." in name for name in others)


def test_text_loss_is_the_symmetric_contrast_with_finished_image_features(tokenizer):
    model, features = small_text(tokenizer, CLIPTextModelWithProjection), F.normalize(torch.randn(4, 16), dim=1)
    captions = [["a red apple", "une pomme"], ["ein roter Apfel"], ["art style of mimooh"], ["apple"]]
    terms = sdxl.text_loss(features, captions, tokenizer, scale=7.0, batch=5)(model, rng(3))
    again = rng(3)
    chosen = torch.randint(4, (5,), generator=again).tolist()
    texts = [
        captions[i][int(u * len(captions[i]))] for i, u in zip(chosen, torch.rand(5, generator=again), strict=True)
    ]
    alone = [model(tokenizer(text, return_tensors="pt").input_ids).text_embeds[0] for text in texts]
    similar = torch.tensor([[7 * (features[i] @ t / t.norm()).item() for t in alone] for i in chosen])
    by_image = -(similar.diag() - similar.logsumexp(1)).mean()
    by_text = -(similar.diag() - similar.logsumexp(0)).mean()
    assert terms["loss"].item() == pytest.approx((by_image + by_text).item() / 2, rel=1e-4)
    hits = [row.argmax().item() == place for place, row in enumerate(similar)]
    assert terms["accuracy"].item() == pytest.approx(sum(hits) / 5)


@pytest.fixture(scope="module")
def small_sdxl(tokenizer) -> SimpleNamespace:
    """A mini-sdxl of narrow parts, with an autoencoder of the real one's factor."""
    torch.manual_seed(5)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    tower = {"hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
    text = {**tower, **special, "vocab_size": len(tokenizer), "max_position_embeddings": 32}
    vision = {**tower, "image_size": 64, "patch_size": 32}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=32,
        out_channels=32,
        layers_per_block=1,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=48,
        attention_head_dim=2,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    )
    second = small_text(tokenizer, CLIPTextModelWithProjection)
    return SimpleNamespace(unet=unet, clip=model, second=second, vae=vae.build())


def test_captions_of_mini_sdxl_are_encoded_as_the_stock_pipeline_does(small_sdxl, tokenizer):
    pipeline = sdxl.assemble(small_sdxl.unet, small_sdxl.vae, small_sdxl.clip, small_sdxl.second, tokenizer)
    assert type(pipeline) is StableDiffusionXLPipeline
    assert pipeline.config.force_zeros_for_empty_prompt
    states, pooled = sdxl.encode_captions(pipeline.text_encoder, small_sdxl.second, tokenizer, TEXTS[:3])
    wanted, _, embeds, _ = pipeline.encode_prompt(TEXTS[:3], do_classifier_free_guidance=False)
    torch.testing.assert_close(states.float(), wanted, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(pooled.float(), embeds, atol=2e-3, rtol=2e-3)
    assert states.dtype == pooled.dtype == torch.float16
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(["a red apple"], num_inference_steps=1, output_type="np", generator=rng()).images
    assert drawn.shape == (1, 64, 64, 3)


def test_the_diffusion_loss_of_mini_sdxl_adds_sizes_and_pooled_captions_and_drops_both(small_sdxl):
    latents, choices = torch.randn(3, 32, 8, 8, generator=rng(1)), [[0, 1], [2], [3]]
    states, pooled = torch.randn(4, 32, 48, generator=rng(2)), torch.randn(4, 16, generator=rng(3))
    sizes = torch.tensor([sdxl.WHOLE, (80, 80, 3, 9, 64, 64), (96, 96, 0, 32, 64, 64)])
    terms = sdxl.diffusion_loss(latents, sizes, choices, states, pooled, batch=30)(small_sdxl.unet, rng(4))
    again = rng(4)
    chosen, rows, dropped = sd.draw_captions(choices, 30, again)
    assert 0 < dropped.sum() < 30
    t, eps = torch.randint(1000, (30,), generator=again), torch.randn(30, 32, 8, 8, generator=again)
    kept = sd.scheduler().alphas_cumprod[t]
    errors = []
    for n in range(30):
        context, embeds = states[rows[n]] * ~dropped[n], pooled[rows[n]] * ~dropped[n]
        noisy = kept[n].sqrt() * latents[chosen[n]] + (1 - kept[n]).sqrt() * eps[n]
        added = {"text_embeds": embeds[None], "time_ids": sizes[[chosen[n]]].float()}
        predicted = small_sdxl.unet(noisy[None], t[[n]], context[None], added_cond_kwargs=added).sample[0]
        errors.append((predicted - eps[n]).square().mean())
    snr = kept / (1 - kept)
    weighted = torch.stack(errors) * snr.clamp(max=5) / snr
    assert terms["mse"].item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-4)
    assert terms["loss"].item() == pytest.approx(weighted.mean().item(), rel=1e-4)


def test_crops_are_what_their_six_numbers_say():
    across = torch.arange(128, dtype=torch.uint8).expand(3, 128, 128)
    ramps = torch.stack([across, across.transpose(1, 2)] * 6)
    cut, told = sdxl.crop(ramps, rng(1))
    assert (cut.dtype, cut.shape, told.shape) == (torch.uint8, (12, 3, 64, 64), (12, 6))
    assert len({row[0] for row in told.tolist()}) > 4, "of several sizes"
    for number, (height, width, top, left, *target) in enumerate(told.tolist()):
        assert height == width
        assert 64 <= height <= 96
        assert min(top, left) >= 0
        assert max(top, left) + 64 <= height
        assert target == [64, 64]
        start = left if number % 2 == 0 else top
        expected = (torch.arange(start, start + 64) + 0.5) * 128 / height - 0.5  # the ramp's value where a pixel lies
        line = cut[number, 0, 30] if number % 2 == 0 else cut[number, 0, :, 30]
        assert (line - expected)[3:-3].abs().max() < 1
    _, told = sdxl.crop(ramps, rng(), largest=64)
    assert told.tolist() == [list(sdxl.WHOLE)] * 12


# on disk


@pytest.fixture(scope="module")
def beside(tmp_path_factory, tokenizer) -> SimpleNamespace:
    """A mini-sdxl that has not learned anything, written beside the shipped mini-sd."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("mini-sd", "mini-vae"):
        (folder / name).symlink_to(MODELS / name)
    torch.manual_seed(11)
    base, unet = load_pipeline("mini-sd"), sdxl.build()
    sdxl.start_from(unet, base.unet)
    clip_model = CLIPModel.from_pretrained(MODELS / "mini-clip", dtype=torch.float32)
    pipeline = sdxl.assemble(unet, base.vae, clip_model, sdxl.build_text(base.tokenizer), base.tokenizer)
    sd.save_beside(folder, "mini-sdxl", pipeline)
    return SimpleNamespace(folder=folder, pipeline=pipeline)


def test_a_family_links_to_what_is_mini_sds_and_loads_by_the_stock_class(beside):
    place = beside.folder / "mini-sdxl"
    links = sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_symlink())
    assert links == ["text_encoder", "unet/diffusion_pytorch_model-00001-of-00002.safetensors", "vae"]
    assert sum(path.stat().st_size for path in place.rglob("*.safetensors") if not path.is_symlink()) < 12e6
    stock = StableDiffusionXLPipeline.from_pretrained(place, dtype=torch.float32)
    for part in ("unet", "text_encoder", "text_encoder_2", "vae"):
        own, loaded = (getattr(one, part).state_dict() for one in (beside.pipeline, stock))
        assert own.keys() == loaded.keys()
        for name, tensor in own.items():
            assert torch.equal(tensor.half().float(), loaded[name]), (part, name)
    assert type(load_pipeline(str(place))) is StableDiffusionXLPipeline


def test_a_family_whose_unet_learned_elsewhere_too_is_not_written_as_if_it_had_not(beside):
    changed = copy.deepcopy(beside.pipeline)
    with torch.no_grad():
        changed.unet.mid_block.resnets[0].conv1.weight[0, 0, 0, 0] += 1
    with pytest.raises(ValueError, match="the U-Net of other does not have mini-sd's weights outside"):
        sd.save_beside(beside.folder, "other", changed)


def test_the_second_file_of_a_unet_holds_what_learns_apart(beside):
    for name, at_most in (("mini-sd", "attn2"), ("mini-sdxl", "attn2|add_embedding")):
        unet = beside.folder / name / "unet"
        index = json.loads((unet / "diffusion_pytorch_model.safetensors.index.json").read_text())
        for number in (1, 2):
            file = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
            names = set(load_file(unet / file))
            assert names == {name for name, place in index["weight_map"].items() if place == file}
            assert all((re.search(at_most, name) is not None) == (number == 2) for name in names)
