"""What is worked out about a checkpoint: base, caption and number of images, and by what each is known."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from fx import captions, leads, results
from fx.families import denoise, encode, network
from fx.finetune import FineTune, TrainingItem
from fx.models import load_pair
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
    assert leads.base_of(silent, [bases["sdxl"], bases["first"]]) == (bases["first"], "its shapes")
    with pytest.raises(ValueError, match=r"none of the base models fits \(.*sdxl: does not fit"):
        leads.base_of(silent, [bases["sdxl"]])


@pytest.mark.parametrize("adapter", ["lora", "dora", "loha"])
def test_weights_tell_no_adapters_base_whether_it_is_attached_or_merged(made, bases, monkeypatch, adapter):
    path, every = made("lora", "kohya", adapter=adapter), [bases["first"], bases["relative"]]
    told = leads.pd.DataFrame({"base": every[::-1], "verdict": ["lowest", "higher"]})
    monkeypatch.setattr(leads, "rank_by_loss", lambda *_: told)
    assert leads.base_of(path, every) == (bases["relative"], "the loss on its own images")


def test_the_loss_is_asked_with_the_caption_that_is_said(made, bases, monkeypatch):
    path, asked = made("lora", "kohya", says=True), []
    monkeypatch.setattr(leads, "base_of", lambda *given: asked.append(given) or (bases["first"], "its weights"))
    leads.gather(path, [bases["first"]], guess="a thing")
    leads.gather(made("lora", "kohya"), [bases["first"]], guess="a thing")
    assert [given[3] for given in asked] == ["a dog", "a thing"]


def test_a_network_that_has_nothing_in_common_with_any_base_is_refused(made, bases):
    with pytest.raises(ValueError, match=r"none of the base models fits .*stranger: unrelated"):
        leads.base_of(made("dreambooth", "parts"), [bases["stranger"]])


def test_where_an_adapter_says_nothing_the_loss_decides_and_doubt_is_said(made, bases, monkeypatch):
    path, every = made("lora", "kohya"), [bases["first"], bases["relative"]]
    table = leads.rank_by_loss(path, every, n=4, steps=2)
    monkeypatch.setattr(leads, "rank_by_loss", lambda *_: table)
    base, by = leads.base_of(path, every)
    assert base == table.base[0]
    doubt = table.verdict[1] == "not told apart"
    assert by == "the loss on its own images" + (f", not told apart from {table.base[1]}" if doubt else "")


def test_losses_of_all_bases_are_of_the_same_noised_images(made, bases):
    """Against the loss written out: what each base draws with the adapter, noised alike, denoised by each."""
    path, every = made("lora", "kohya", learning_rate=2e-2), [bases["stranger"], bases["first"]]
    table = leads.rank_by_loss(path, every, "a dog", n=3, steps=2).set_index("base")
    pairs = {base: load_pair(base, path) for base in every}
    with torch.no_grad():
        x0 = torch.cat([leads._draw(pair, "a dog", 3, 2) for pair in pairs.values()])
        assert x0.shape == (6, 4, 4, 4)
        found = {}
        for base, pair in pairs.items():
            draw, logs = torch.Generator().manual_seed(0), []
            for level in leads.LEVELS:
                t, eps = round(level * 999), torch.randn(x0.shape, generator=draw)
                kept = pair.tuned.scheduler.alphas_cumprod[t]
                x = kept.sqrt() * x0 + (1 - kept).sqrt() * eps
                predicted = denoise(network(pair.tuned), x, torch.tensor(t), encode(pair.tuned, "a dog"))
                logs.append(((predicted - eps) ** 2).mean(dim=(1, 2, 3)).log())
            found[base] = torch.stack(logs).mean(dim=0).double().numpy()
    for base, losses in found.items():
        assert table.loss[base] == pytest.approx(losses.mean(), abs=1e-5)
    first, second = table.index
    assert table.loss[first] <= table.loss[second]
    apart = found[second] - found[first]
    half = 2.570582 * apart.std(ddof=1) / np.sqrt(6)  # Student's t, 5 degrees of freedom
    assert [table.low[second], table.high[second]] == pytest.approx(
        [apart.mean() - half, apart.mean() + half], abs=1e-5
    )
    assert table.verdict.tolist() == ["lowest", "higher" if apart.mean() > half else "not told apart"]


def test_a_flow_models_adapter_is_ranked_too(picture_folder, runs, tmp_path):
    every = [str(tiny.save("sd3", tmp_path / name, seed)) for name, seed in (("one", 0), ("two", 5))]
    model = FineTune((TrainingItem(str(picture_folder), "a dog"),), every[0], "lora", 1e-3, 2, 2, 2, 2)
    table = leads.rank_by_loss(str(published(Published(model, "diffusers"))), every, "a dog", n=2, steps=2)
    assert set(table.base) == set(every)
    assert np.isfinite(table.loss).all()


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
