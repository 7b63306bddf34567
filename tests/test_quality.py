"""CLIP-IQA and fidelity against transformers' own classes, on tiny random judges and on the shipped mini-clip."""

import gc
import json
import shutil
import weakref

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import gaussian_blur
from transformers import AutoImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer, Dinov2Model, ViTModel

from fx import models, quality
from fx.datasets import from_uint8, load_images, load_item, names, to_uint8
from fx.mini import clip
from fx.paths import MODELS
from fx.quality import antonym_scores, clip_iqa, column, features, fidelity, load_judge


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kind -> folder of a tiny random judge: to be read, not to be changed."""
    root = tmp_path_factory.mktemp("judges")
    return {kind: tiny.save_judge(kind, root / kind) for kind in quality.KINDS}


@pytest.fixture(scope="module")
def judges(folders):
    return {kind: load_judge(folder) for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def mini():
    return load_judge("mini-clip")


@pytest.fixture(scope="module")
def drawings():
    """Training images of shipped items, none of which the mini models have seen: float [n, 3, 64, 64] in [-1, 1]."""
    chosen = names("style", limit=8) + names("object", limit=8)
    return torch.cat([load_images(load_item(name).training, 64) for name in chosen])


def pictures(n, height=32, width=32, seed=0):
    """Smooth random pictures, each of its own colours, uint8 [n, height, width, 3]."""
    coarse = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    return to_uint8(smooth)


def changed(folder, target, **values):
    """A copy of a judge's folder with other entries in its config.json."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | values))
    return target


# CLIP-IQA


@pytest.mark.parametrize("size", [(32, 32), (48, 70)])
def test_clip_iqa_is_the_softmax_of_clips_own_logits(folders, judges, size):
    images = pictures(6, *size)
    twin, processor = CLIPModel.from_pretrained(folders["clip"]).eval(), CLIPProcessor.from_pretrained(folders["clip"])
    inputs = processor(
        text=["Good photo.", "Bad photo."],
        images=[Image.fromarray(i) for i in images],
        return_tensors="pt",
        padding=True,
    )
    with torch.no_grad():
        expected = twin(**inputs).logits_per_image.softmax(dim=1)[:, 0].numpy()
    found = clip_iqa(judges["clip"], images)
    assert found.shape == (6,)
    assert found.dtype == np.float32
    assert expected.std() > 0.02, "the twin tells the pictures apart"
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_mini_clip_is_asked_in_the_words_it_was_trained_with(mini, drawings):
    model = CLIPModel.from_pretrained(MODELS / "mini-clip", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(MODELS / "mini-clip")
    with torch.no_grad():
        texts = model.get_text_features(clip.tokenize(tokenizer, [clip.GOOD, clip.BAD])).pooler_output.double().numpy()
        shown = model.get_image_features(pixel_values=drawings[:12]).pooler_output.double().numpy()
    cosines = shown @ texts.T / np.linalg.norm(shown, axis=1)[:, None] / np.linalg.norm(texts, axis=1)
    good, bad = np.exp(np.exp(model.logit_scale.item()) * cosines).T
    np.testing.assert_allclose(clip_iqa(mini, drawings[:12]), good / (good + bad), atol=1e-4)


def test_prompts_belong_to_the_network(folders, tmp_path):
    own = changed(folders["clip"], tmp_path / "own", quality_prompts=["a good picture", "a bad picture"])
    turned = changed(folders["clip"], tmp_path / "turned", quality_prompts=["Bad photo.", "Good photo."])
    images = pictures(3)
    published = clip_iqa(load_judge(folders["clip"]), images)
    assert not np.allclose(clip_iqa(load_judge(own), images), published, atol=1e-3)
    np.testing.assert_allclose(clip_iqa(load_judge(turned), images), 1 - published, atol=1e-5)


def test_mini_clips_folder_says_what_its_training_code_says():
    config = json.loads((MODELS / "mini-clip" / "config.json").read_text())
    assert config["quality_prompts"] == [clip.GOOD, clip.BAD]
    model = CLIPModel.from_pretrained(MODELS / "mini-clip")
    stored = AutoImageProcessor.from_pretrained(MODELS / "mini-clip")
    assert stored.to_dict() == clip.image_processor(model).to_dict()
    built = clip.build(CLIPTokenizer.from_pretrained(MODELS / "mini-clip"))
    assert built.config.quality_prompts == [clip.GOOD, clip.BAD]


def test_antonym_scores_are_a_softmax_over_scaled_cosines():
    images, prompts = torch.tensor([[3.0, 0.0], [0.0, 0.2], [5.0, 5.0]]), torch.tensor([[2.0, 0.0], [0.0, 7.0]])
    found = antonym_scores(images, prompts, 2.0)
    assert found.tolist() == pytest.approx([1 / (1 + np.exp(-2)), 1 / (1 + np.exp(2)), 0.5])
    assert antonym_scores(images, prompts, 0.0).tolist() == [0.5] * 3


def test_clean_drawings_score_above_blurred_ones_and_those_above_noise(mini, drawings):
    rng = torch.Generator().manual_seed(0)
    blurred = gaussian_blur(drawings, [9, 9], [1.5, 1.5])
    noisy = (drawings + torch.randn(drawings.shape, generator=rng)).clamp(-1, 1)
    clean, blurred, noisy = (clip_iqa(mini, images) for images in (drawings, blurred, noisy))
    assert 1 >= clean.mean() > blurred.mean() + 0.02
    assert blurred.mean() > noisy.mean() + 0.2
    assert noisy.min() >= 0
    assert (clean > blurred).mean() > 0.9
    assert (blurred > noisy).mean() > 0.9
    assert (clean > noisy).mean() > 0.9


# features and fidelity


@pytest.mark.parametrize(("kind", "twin"), [("vit", ViTModel), ("dinov2", Dinov2Model)])
@pytest.mark.parametrize("size", [(32, 32), (40, 64)])
def test_fidelity_is_the_mean_cosine_of_class_tokens_over_all_pairs(folders, judges, kind, twin, size):
    generated, training = pictures(5, *size), pictures(3, 50, 50, seed=1)
    processor, network = AutoImageProcessor.from_pretrained(folders[kind]), twin.from_pretrained(folders[kind]).eval()

    def token(image):
        with torch.no_grad():
            prepared = processor(Image.fromarray(image), return_tensors="pt")
            return network(**prepared).last_hidden_state[0, 0].double()

    pairs = [torch.cosine_similarity(token(a), token(b), dim=0).item() for a in generated for b in training]
    assert np.std(pairs) > 0.01, "the twin tells the pictures apart"
    assert fidelity(judges[kind], generated, training) == pytest.approx(np.mean(pairs), abs=1e-5)


def test_fidelity_by_a_clip_is_that_of_its_image_embeddings(folders, judges):
    generated, training = pictures(4), pictures(2, seed=1)
    twin = CLIPModel.from_pretrained(folders["clip"]).eval()
    processor = AutoImageProcessor.from_pretrained(folders["clip"])
    with torch.no_grad():
        a, b = (
            twin.get_image_features(**processor([*images], return_tensors="pt")).pooler_output
            for images in (generated, training)
        )
    expected = torch.cosine_similarity(a[:, None], b[None], dim=2).mean().item()
    assert fidelity(judges["clip"], generated, training) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["clip", "vit", "dinov2"])
def test_an_image_is_entirely_faithful_to_itself_and_no_order_counts(judges, kind):
    generated, training = pictures(6), pictures(4, seed=1)
    assert fidelity(judges[kind], training[:1], training[:1]) == pytest.approx(1, abs=1e-6)
    found = fidelity(judges[kind], generated, training)
    assert found < 0.999
    assert fidelity(judges[kind], generated[::-1], training[[2, 0, 3, 1]]) == pytest.approx(found, abs=1e-5)
    assert fidelity(judges[kind], training, generated) == pytest.approx(found, abs=1e-5)
    assert fidelity(judges[kind], np.repeat(generated, 2, axis=0), training) == pytest.approx(found, abs=1e-5)


def test_drawings_are_more_faithful_to_their_own_artist_than_to_the_others(mini):
    items = [load_images(load_item(name).training, 64) for name in names("style", limit=6)]
    table = np.array([[fidelity(mini, a, b) for b in items] for a in items])
    assert (np.diag(table) > (table.sum(axis=1) - np.diag(table)) / (len(items) - 1)).all()


@pytest.mark.parametrize("kind", ["clip", "vit", "dinov2"])
def test_features_have_unit_length_and_do_not_depend_on_batches(judges, kind):
    images = pictures(7, 40, 40)
    found = features(judges[kind], images)
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    for batch_size in (1, 3):
        np.testing.assert_allclose(features(judges[kind], images, batch_size), found, atol=1e-5)
    assert features(judges[kind], images[2:3])[0] == pytest.approx(found[2], abs=1e-5)


def test_batches_bound_what_is_held_at_once(judges, tmp_path):
    np.save(tmp_path / "images.npy", pictures(7))
    seen = []

    def processor(images, return_tensors):
        seen.append(len(images))
        return judges["vit"].processor(images=images, return_tensors=return_tensors)

    judge = quality.Judge(judges["vit"].network, processor)
    found = features(judge, np.load(tmp_path / "images.npy", mmap_mode="r"), batch_size=3)
    assert seen == [3, 3, 1]
    np.testing.assert_allclose(found, features(judges["vit"], pictures(7)), atol=1e-5)


def test_floats_enter_as_the_pictures_of_eight_bits_that_they_are(judges):
    images = pictures(4, 40, 40)
    for floats in (from_uint8(images), from_uint8(images).double()):
        np.testing.assert_array_equal(features(judges["vit"], floats), features(judges["vit"], images))


# loading and naming


def test_a_judge_is_kept_by_what_it_is_until_models_are_let_go(folders, tmp_path):
    models.let_go()
    first = load_judge(folders["clip"])
    assert load_judge(shutil.copytree(folders["clip"], tmp_path / "copy")) is first
    other = load_judge(folders["vit"])
    assert load_judge(folders["clip"]) is first
    changed = json.loads((tmp_path / "copy/config.json").read_text()) | {"quality_prompts": ["red", "blue"]}
    (tmp_path / "copy/config.json").write_text(json.dumps(changed))
    assert not torch.equal(load_judge(tmp_path / "copy").prompts, first.prompts), "another one now"
    gone = weakref.ref(other.network)
    del other
    models.let_go()
    gc.collect()
    assert gone() is None
    assert load_judge(folders["clip"]) is not first


def test_a_published_judge_is_taken_from_the_hubs_cache(folders, judges, tmp_path, monkeypatch):
    for name, kind in ((quality.CLIP, "clip"), (quality.DINO, "vit")):
        owner_and_name, _, revision = name.partition("@")
        repository = tmp_path / ("models--" + owner_and_name.replace("/", "--"))
        shutil.copytree(folders[kind], repository / "snapshots" / ("0" * 40))
        (repository / "refs" / revision).parent.mkdir(parents=True)
        (repository / "refs" / revision).write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    images = pictures(3)
    models.let_go()  # or it would be the judge that is kept, which has the same files
    found, expected = clip_iqa(load_judge(quality.CLIP), images), clip_iqa(judges["clip"], images)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert fidelity(load_judge(quality.DINO), images, images) == pytest.approx(fidelity(judges["vit"], images, images))
    with pytest.raises(FileNotFoundError, match="facebook/dino-vits16 at revision refs/pr/2 is no path"):
        load_judge("facebook/dino-vits16@refs/pr/2")


def test_a_judge_is_frozen_float32_and_in_eval_mode(judges, mini):
    for judge in (*judges.values(), mini):
        assert not any(module.training for module in judge.network.modules())
        assert all(p.dtype == torch.float32 and not p.requires_grad for p in judge.network.parameters())
    assert mini.scale == pytest.approx(18.5, abs=0.1)
    assert judges["vit"].prompts is None


def test_a_column_says_who_judged(tmp_path):
    assert column("CLIP-IQA", "mini-clip") == "CLIP-IQA (mini-clip)"
    assert column("fidelity", "mini-clip") == column("fidelity", MODELS / "mini-clip") == "fidelity (mini-clip)"
    assert column("fidelity", quality.DINO) == "fidelity (facebook/dino-vits16)"
    assert column("CLIP-IQA", quality.CLIP) == "CLIP-IQA (openai/clip-vit-base-patch16)"
    with pytest.raises(ValueError, match="unknown measure 'DINO': choose one of CLIP-IQA, fidelity"):
        column("DINO", "mini-clip")


def test_what_is_not_there_is_refused(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'mini-clip' is shipped.*unknown model 'mini-clp'"):
        load_judge("mini-clp")
    for kind, file in (("vit", "config.json"), ("vit", "preprocessor_config.json"), ("clip", "tokenizer.json")):
        folder = shutil.copytree(folders[kind], tmp_path / f"no {file}")
        (folder / file).unlink()
        with pytest.raises(FileNotFoundError, match=f"no {file} holds no {file}"):
            load_judge(folder)
    folder = shutil.copytree(folders["vit"], tmp_path / "bare")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors.*refs/pr/1"):
        load_judge(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle"):
        load_judge(folder)


def test_another_network_and_damaged_files_are_refused(folders, tmp_path):
    with pytest.raises(ValueError, match=r"of type 'bert'.*choose one of clip, vit, dinov2"):
        load_judge(changed(folders["vit"], tmp_path / "bert", model_type="bert"))
    with pytest.raises(ValueError, match="do not fit its config"):
        load_judge(changed(folders["vit"], tmp_path / "deeper", num_hidden_layers=3))
    folder = shutil.copytree(folders["vit"], tmp_path / "cut")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated"):
        load_judge(folder)
    state = load_file(folders["vit"] / "model.safetensors")
    name = next(iter(state))
    state[name].view(-1)[0] = float("nan")
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="is not finite"):
        load_judge(folder)
    folder = shutil.copytree(folders["vit"], tmp_path / "text")
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"preprocessor_config\.json cannot be read"):
        load_judge(folder)


def test_a_dino_reads_no_prompts(judges):
    with pytest.raises(ValueError, match="a ViTModel reads no text: judge by a CLIP"):
        clip_iqa(judges["vit"], pictures(1))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (pictures(2)[:0], r"at least one.*ndarray \[0, 32, 32, 3\]"),
        (torch.zeros(0, 3, 8, 8), r"at least one.*Tensor \[0, 3, 8, 8\]"),
        (pictures(1)[0], r"\[32, 32, 3\]"),
        (pictures(1)[..., :1], r"\[1, 32, 32, 1\]"),
        (pictures(2).transpose(0, 3, 1, 2), r"\[2, 3, 32, 32\]"),
        (pictures(1).astype(np.float32), "float32"),
        (torch.from_numpy(pictures(1)), "Tensor.*torch.uint8"),
        (torch.zeros(2, 8, 8, 3), r"\[2, 8, 8, 3\]"),
    ],
)
def test_what_is_no_list_of_images_is_refused(judges, images, message):
    for judge in (judges["clip"], judges["vit"]):
        with pytest.raises(ValueError, match=message):
            fidelity(judge, pictures(1), images)
    with pytest.raises(ValueError, match=message):
        clip_iqa(judges["clip"], images)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 255.0, -1.1])
def test_floats_outside_their_range_are_refused(judges, bad):
    images = torch.zeros(3, 3, 8, 8)
    images[1, 2, 3, 4] = bad
    with pytest.raises(ValueError, match=r"must lie in \[-1, 1\]"):
        clip_iqa(judges["clip"], images)
