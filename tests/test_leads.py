"""What is worked out about a checkpoint: base, caption and number of images, and by what each is known."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from fx import captions, leads, results
from fx.families import denoise, encode
from fx.finetune import FineTune, TrainingItem
from fx.inspect import inspect
from fx.models import load_pair, load_pipeline
from fx.publishing import Published, published


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, str]:
    """Three tiny models of one family: one, a near relative of it, and a stranger; and one of another family."""
    folder = tmp_path_factory.mktemp("bases")
    tiny.save("sd1", folder / "first")
    shutil.copytree(folder / "first", folder / "relative")
    file = folder / "relative/unet/diffusion_pytorch_model.safetensors"
    draw = torch.Generator().manual_seed(3)
    moved = {name: value + 0.02 * torch.randn(value.shape, generator=draw) for name, value in load_file(file).items()}
    save_file(moved, file, {"format": "pt"})
    tiny.save("sd1", folder / "stranger", seed=7)
    tiny.save("sdxl", folder / "sdxl")
    return {path.name: str(path) for path in sorted(folder.iterdir())}


@pytest.fixture
def made(picture_folder, runs, bases):
    """A function that publishes a short fine-tuning of one of the bases."""

    def make(method: str, form: str, says: bool = False, base: str = "first", **options) -> str:
        fields = {"base": bases[base], "method": method, "learning_rate": 1e-3, "steps_per_image": 5, "batch_size": 2}
        fields |= {"rank": 2, "alpha": 4} if method == "lora" else {}
        model = FineTune((TrainingItem(str(picture_folder), "a dog"),), **fields | options)
        return str(published(Published(model, form, says)))

    return make


@pytest.mark.parametrize("base", ["first", "relative"])
@pytest.mark.parametrize("form", ["parts", "fp16", "single file"])
def test_the_base_of_a_network_is_told_by_its_weights(made, bases, base, form):
    path = made("dreambooth", form, base=base)
    assert leads.base_of(path, [bases[name] for name in ("stranger", "first", "relative")]) == (
        bases[base],
        "its weights",
    )


def test_the_base_of_an_adapter_is_the_one_it_names_or_the_only_one_that_fits(made, bases):
    silent, says = made("lora", "kohya"), made("lora", "diffusers", says=True, base="relative")
    every = [bases[name] for name in ("first", "relative", "stranger")]
    known = leads.inspect(says).base_names
    assert leads.base_of(says, every, known) == (bases["relative"], "what it says")
    named = leads.base_of(says, every, [f"Somebody/{bases['relative'].rpartition('/')[2]}@v1"])
    assert named == (bases["relative"], "what it says")
    assert leads.base_of(silent, [bases["sdxl"], bases["first"]]) == (bases["first"], "its shapes")
    with pytest.raises(ValueError, match=r"none of the base models fits \(.*sdxl: does not fit"):
        leads.base_of(silent, [bases["sdxl"]])


@pytest.mark.parametrize("adapter", ["lora", "dora", "loha"])
def test_weights_tell_no_adapters_base_whether_it_is_attached_or_merged(made, bases, monkeypatch, adapter):
    path, every = made("lora", "kohya", adapter=adapter), [bases["first"], bases["relative"]]
    told = leads.pd.DataFrame({"base": every[::-1], "verdict": ["highest", "lower"]})
    monkeypatch.setattr(leads, "rank_by_alignment", lambda *_: told)
    assert leads.base_of(path, every) == (bases["relative"], "its alignment")


def test_images_are_drawn_with_the_caption_that_is_said_else_the_weights_else_a_guess(made, bases, monkeypatch):
    every, asked = [bases["first"], bases["relative"]], []
    told = leads.pd.DataFrame({"base": every, "verdict": ["highest", "lower"]})
    monkeypatch.setattr(leads, "rank_by_alignment", lambda *given: asked.append(given[2]) or told)
    monkeypatch.setattr(leads.captions, "rank", lambda change, pipeline, texts: tiny_rank(texts))
    for says, candidates in ((True, ["a cat"]), (False, ["a cat", "a cow"]), (False, [])):
        path = made("lora", "kohya", says=says)
        monkeypatch.setattr(leads, "inspect", without_names)
        leads.gather(path, every, candidates, guess="a thing")
    assert asked == ["a dog", "a cat", "a thing"]


def without_names(path: str):
    """What a file says, but for its base."""
    return dataclasses.replace(inspect(path), base_names=[])


def test_a_network_that_has_nothing_in_common_with_any_base_is_refused(made, bases):
    with pytest.raises(ValueError, match=r"none of the base models fits .*stranger: unrelated"):
        leads.base_of(made("dreambooth", "parts"), [bases["stranger"]])


def test_where_an_adapter_says_nothing_its_alignment_decides_and_doubt_is_said(made, bases, monkeypatch):
    path, every = made("lora", "kohya"), [bases["first"], bases["relative"]]
    table = leads.rank_by_alignment(path, every, n=4, steps=2, passes=1)
    monkeypatch.setattr(leads, "rank_by_alignment", lambda *_: table)
    base, by = leads.base_of(path, every)
    assert base == table.base[0]
    doubt = table.verdict[1] == "not told apart"
    assert by == "its alignment" + (f", not told apart from {table.base[1]}" if doubt else "")


def descent(base: str, x0: torch.Tensor) -> dict[str, torch.Tensor]:
    """Minus the signs of the gradient of the loss on latents, in one batch, for every linear layer of the U-Net."""
    pipeline = load_pipeline(base)
    draw = torch.Generator().manual_seed(0)
    x0 = x0[torch.randperm(len(x0), generator=draw)]
    t, eps = torch.randint(1000, (len(x0),), generator=draw), torch.randn(x0.shape, generator=draw)
    kept = pipeline.scheduler.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    x, unet = kept.sqrt() * x0 + (1 - kept).sqrt() * eps, pipeline.unet.requires_grad_(True)
    predicted = denoise(unet, x, t, encode(pipeline, "a dog").expand(len(x0)))
    ((predicted - eps) ** 2).mean().backward()
    linear = {name for name, layer in unet.named_modules() if isinstance(layer, torch.nn.Linear)}
    return {name: -unet.get_submodule(name).weight.grad.sign() for name in linear}


@pytest.mark.parametrize("sign", [1, -1])
def test_a_change_that_is_a_step_down_the_gradient_is_wholly_aligned(bases, tmp_path, sign):
    """With one batch an entry over its root mean square is its sign."""
    x0 = torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    steps, pipeline = descent(bases["first"], x0), load_pipeline(bases["first"])
    for name, step in steps.items():
        pipeline.unet.get_submodule(name).weight.data += sign * 1e-3 * step
    pipeline.unet.save_pretrained(tmp_path / "unet")
    pair = load_pair(bases["first"], tmp_path)
    found = leads.alignments(pair, x0, "a dog", passes=1)
    # entries whose gradient is zero, or rounds to it, have no sign to agree in
    share = torch.tensor([(step != 0).float().mean() for step in steps.values()])
    assert len(found) == len(leads.changes_of(pair))
    assert (sign * found > 0.97).sum() >= 0.8 * (share > 0.9).sum()
    assert sign * np.median(found) > 0.97
    other = leads.alignments(load_pair(bases["stranger"], tmp_path), x0, "a dog", passes=1)
    assert np.abs(other).mean() < 0.5
    assert not any(weight.requires_grad for weight in pair.base.unet.parameters())


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_an_adapters_change_is_the_product_of_its_matrices(made, bases, form):
    path = made("lora", form)
    pair, tensors = (
        load_pair(bases["first"], path),
        load_file(next(Path(path).glob("*.safetensors")) if Path(path).is_dir() else path),
    )
    found = leads.changes_of(pair)
    ups = [name for name in tensors if "lora_up" in name or "lora.up" in name or "lora_B" in name]
    assert len(found) == len(ups)
    products = []
    for up in ups:
        down = up.replace("lora_up", "lora_down").replace("lora.up", "lora.down").replace("lora_B", "lora_A")
        products.append(4 / 2 * tensors[up] @ tensors[down])  # alpha over rank
    norms = sorted(float(product.norm()) for product in products)
    assert sorted(float(change.norm()) for change in found.values()) == pytest.approx(norms, rel=1e-4)


def test_bases_stand_in_the_order_of_their_mean_alignment_with_intervals_over_layers(made, bases, monkeypatch):
    every = [bases[name] for name in ("first", "relative", "stranger")]
    layers = dict(zip(every, ([0.1, 0.2, 0.3, 0.4], [0.3, 0.4, 0.5, 0.6], [0.3, 0.4, 0.5, 0.59]), strict=True))
    monkeypatch.setattr(leads, "load_pair", lambda base, path: base)
    monkeypatch.setattr(leads, "_draw", lambda *_: torch.zeros(2, 4, 4, 4))
    monkeypatch.setattr(leads, "alignments", lambda base, *_: np.array(layers[base]))
    table = leads.rank_by_alignment("file", every)
    assert table.base.tolist() == [every[1], every[2], every[0]]
    assert table.alignment.tolist() == pytest.approx([0.45, 0.4475, 0.25])
    assert table.verdict.tolist() == ["highest", "not told apart", "lower"]
    half = 3.182446 * 0.005 / 2  # Student's t, 3 degrees of freedom, of the differences 0, 0, 0, -.01
    assert [table.low[1], table.high[1]] == pytest.approx([-0.0025 - half, -0.0025 + half], abs=1e-6)


def test_a_checkpoint_that_changes_no_linear_layer_has_no_alignment(bases):
    pair = load_pair(bases["first"], str(Path(bases["first"]) / "unet"))
    with pytest.raises(ValueError, match="changes no linear layer"):
        leads.alignments(pair, torch.zeros(2, 4, 4, 4), "a dog")


def test_a_flow_models_adapter_is_ranked_too(picture_folder, runs, tmp_path):
    every = [str(tiny.save("sd3", tmp_path / name, seed)) for name, seed in (("one", 0), ("two", 5))]
    model = FineTune((TrainingItem(str(picture_folder), "a dog"),), every[0], "lora", 1e-3, 2, 2, 2, 2)
    table = leads.rank_by_alignment(str(published(Published(model, "diffusers"))), every, "a dog", 2, 2, 1)
    assert set(table.base) == set(every)
    assert np.isfinite(table.alignment).all()


def test_a_caption_is_what_the_checkpoint_says_else_its_weights_else_a_guess(made, bases, monkeypatch):
    said, silent = made("lora", "kohya", says=True), made("lora", "kohya")
    known = leads.gather(said, [bases["first"]], ["a cat", "a dog"])
    assert (known.caption, known.caption_by) == ("a dog", "a folder of training images")
    assert (known.n_training, known.n_training_by) == (4, "its header")
    asked = []
    monkeypatch.setattr(captions, "rank", lambda change, pipeline, texts: asked.append(texts) or tiny_rank(texts))
    known = leads.gather(silent, [bases["first"]], ["a cat", "a dog"], guess="a thing")
    assert (known.caption, known.caption_by, asked) == ("a cat", "its weights", [["a cat", "a dog"]])
    assert (known.n_training, known.n_training_by) == (None, "estimated")
    assert leads.gather(silent, [bases["first"]], guess="a thing").caption_by == "a guess"
    assert known.checkpoint() == leads.Checkpoint(silent, bases["first"], "a cat")


def tiny_rank(texts):
    return leads.pd.DataFrame({"caption": texts, "score": range(len(texts), 0, -1)})


def test_weights_that_carry_no_caption_leave_a_guess_with_the_reason(bases, tmp_path):
    folder = tmp_path / "only-time"
    shutil.copytree(Path(bases["first"]) / "unet", folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["time_embedding.linear_1.bias"] += 0.1
    save_file(tensors, file, {"format": "pt"})
    found = leads.caption_of(str(folder), bases["first"], [], ["a dog"], "a thing")
    assert found[0] == "a thing"
    assert found[1].startswith("a guess: no projection of the caption was changed")


def test_nothing_is_computed_twice_for_two_captions_of_one_model(made):
    """Forms and what they say are steps: the fine-tuning is done once."""
    made("lora", "kohya")
    made("lora", "kohya", says=True)
    assert len(list((results.RUNS / "finetune").iterdir())) == 1
