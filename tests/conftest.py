"""A tiny random pipeline of the stock classes, a folder of pictures and a work area of its own, for all test files."""

from pathlib import Path

import numpy as np
import pytest
import supported
import tiny
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import settings
from PIL import Image

from fx import results
from fx.mini.sd import scheduler
from fx.models import load_pipeline

settings.register_profile("fx", deadline=None)  # a busy machine is no failure
settings.load_profile("fx")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note which tests ran and passed, for the page of what is supported."""
    if report.when == "call" and report.outcome == "passed" and not hasattr(report, "wasxfail"):
        supported.PASSED.add(report.nodeid)


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory) -> Path:
    """A folder with a tiny random StableDiffusionPipeline: 16 px pictures, 4x4x4 latents, captions of 16 tokens."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sd"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = tiny.byte_tokenizer()
        parts = {"unet": tiny.unet(), "vae": tiny.autoencoder(), "text_encoder": tiny.text_encoder(tokenizer)}
    absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = StableDiffusionPipeline(**parts, tokenizer=tokenizer, **absent, scheduler=scheduler())
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_sd) -> StableDiffusionPipeline:
    """The pipeline in `tiny_sd`, loaded once: to be read, not to be changed."""
    return load_pipeline(str(tiny_sd))


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory) -> Path:
    """A folder of four PNG files, 24 px, each a different smooth mixture of colours: to be read, not to be changed."""
    folder = tmp_path_factory.mktemp("pictures")
    rows, columns = np.mgrid[0:24, 0:24] / 23
    for number in range(4):
        waves = [np.sin((number + 1) * rows + k * columns * (number + 2)) for k in (1, 2, 3)]
        pixels = (127.5 + 127.5 * np.stack(waves, axis=2)).round().astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """An empty work area; the steps of this test are kept there and nowhere else."""
    monkeypatch.setattr(results, "RUNS", tmp_path / "runs")
    return results.RUNS
