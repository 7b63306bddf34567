"""What is done on a GPU, on one that is pretended: every tensor where it belongs, and the numbers those of the CPU."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pretend
import pytest
import safetensors.torch
import tiny
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel

from fx import results
from fx.caption_search import CaptionSearch
from fx.evaluation import Quality, Score
from fx.extraction import Extract
from fx.finetune import FineTune, TrainingItem
from fx.models import load_pipeline
from fx.sampling import ARMS, Generate


def test_the_pretended_gpu_refuses_what_a_real_one_refuses():
    with pretend.gpu():
        there, here = torch.arange(6.0).view(2, 3).to(pretend.GPU), torch.ones(2, 3)
        assert there.device == pretend.GPU
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            there + here
        with pytest.raises(RuntimeError):
            there.numpy()
        assert (there + here.to(there.device)).cpu().tolist() == [[1, 2, 3], [4, 5, 6]]
        assert (2 * there)[1].sum().item() == 24
        layer = torch.nn.Linear(3, 1).to(pretend.GPU)
        with pytest.raises(RuntimeError, match="same device"):
            layer(here)
        layer(there).sum().backward()
        assert layer.weight.grad.device == pretend.GPU
        assert layer.weight.grad.cpu().tolist() == [[3, 5, 7]]


def both(spec, tmp_path, monkeypatch, levels: float = 1) -> None:
    """Do a step and those it is built on here and there, each from what the ones before have made here; AssertionError
    unless both leave the same files, but for rounding, of pictures by so many levels.

    Optimisers take another way through one and the same arithmetic there, and attention is done by plain operations.
    """
    for step in results.nested_steps(spec):
        both(step, tmp_path, monkeypatch, levels)
    monkeypatch.setattr(results, "RUNS", tmp_path / "there")
    with pretend.gpu():
        there = results.complete(spec)
    monkeypatch.setattr(results, "RUNS", tmp_path / "here")
    with sdpa_kernel(SDPBackend.MATH):  # as there
        here = results.complete(spec)
    names = files_in(here)
    assert names == files_in(there)
    for name in names:
        one, other = (numbers(name, (place / name).read_bytes()) for place in (here, there))
        assert one.keys() == other.keys(), name
        rounding = {".png": levels, ".json": 1e-3}.get(Path(name).suffix, 1e-5)
        for part in one:
            np.testing.assert_allclose(other[part], one[part], rtol=1e-3, atol=rounding)
    shutil.rmtree(there)
    shutil.copytree(here, there)


def files_in(step: Path) -> list[str]:
    """The files of a finished step but its manifest, which tells the time."""
    files = [str(file.relative_to(step)) for file in step.rglob("*") if file.is_file()]
    return sorted(file for file in files if file != results.MANIFEST)


def numbers(name: str, content: bytes) -> dict[str, np.ndarray]:
    """The numbers in a file, by name; its text, if it has none."""
    match Path(name).suffix:
        case ".png":
            return {"pixels": np.asarray(Image.open(io.BytesIO(content)), float)}
        case ".npy":
            return {"": np.load(io.BytesIO(content))}
        case ".safetensors":
            return {name: tensor.float().numpy() for name, tensor in safetensors.torch.load(content).items()}
        case ".json":
            return leaves(json.loads(content))
        case _:
            raise AssertionError(f"{name} is of a kind that is not compared")


def leaves(value, where: str = "") -> dict[str, np.ndarray]:
    """The numbers of nested lists and dictionaries by their place; words by their place and themselves."""
    if isinstance(value, dict | list):
        inside = value.items() if isinstance(value, dict) else enumerate(value)
        return {place: number for key, part in inside for place, number in leaves(part, f"{where}/{key}").items()}
    return {where: np.array(float(value))} if isinstance(value, int | float) else {f"{where}={value}": np.array(0.0)}


def tuned(base, pictures, method: str, **options) -> FineTune:
    rank = {"rank": 2, "alpha": 2} if method == "lora" else {}
    item = TrainingItem(str(pictures), "a dog")
    return FineTune((item,), base=str(base), method=method, steps_per_image=2, batch_size=2, **rank, **options)


@pytest.mark.parametrize("method", ["dreambooth", "lora"])
def test_fine_tuning_sampling_by_every_arm_extracting_and_scoring(
    method, tiny_sd, picture_folder, tmp_path, monkeypatch
):
    model = tuned(tiny_sd, picture_folder, method)
    for arm in ARMS:
        w = 3.0 if ARMS[arm].reference else 1.0
        images = Generate(model, arm, w, n_generated=4, steps=2, correction_scale=0.01 if arm == "finextract" else 0.0)
        both(images, tmp_path, monkeypatch)
    both(Score(Extract(images, 2), judge=""), tmp_path, monkeypatch)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family(family, picture_folder, tmp_path, monkeypatch):
    base = tiny.save(family, tmp_path / family)
    model = tuned(base, picture_folder, "lora")
    sampler = "euler" if family in ("sd3", "flux") else "ddim"
    both(Generate(model, "finextract", 3.0, n_generated=2, steps=2, sampler=sampler), tmp_path, monkeypatch)


def test_the_judge_and_the_search_for_a_caption(tiny_sd, picture_folder, tmp_path, monkeypatch):
    judge = str(tiny.save_judge("clip", tmp_path / "clip"))
    model = tuned(tiny_sd, picture_folder, "dreambooth", text_encoder=False)
    images = Generate(model, "cfg", 2.0, n_generated=4, steps=2)
    both(CaptionSearch(model, most=1, proposals=4), tmp_path, monkeypatch)
    both(Quality(images, (), judge, judge), tmp_path, monkeypatch)


def test_half_precision(tiny_sd, picture_folder, tmp_path, monkeypatch):
    model = tuned(tiny_sd, picture_folder, "dreambooth")
    both(Generate(model, "finextract", 3.0, n_generated=2, steps=2, precision="bfloat16"), tmp_path, monkeypatch, 8)


def test_what_is_loaded_is_there(tiny_sd):
    with pretend.gpu():
        pipeline = load_pipeline(str(tiny_sd))
        for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            assert {weight.device for weight in part.parameters()} == {pretend.GPU}
