"""A tiny random pipeline of the stock classes, a folder of pictures and a work area of its own, for all test files."""

import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

# Tests side by side (pytest-xdist): one thread each, in the kernels and processes they start as well, set before torch is
# imported. More threads than cores would wait for one another most of the time.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import paper_world
import pytest
import supported
import tiny
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from filelock import FileLock
from hypothesis import settings
from PIL import Image

from fx import results
from fx.finetune import FineTune, TrainingItem
from fx.mini.sd import scheduler
from fx.models import ModelPair, load_pipeline
from fx.sampling import Generate, picture_file, save_picture

settings.register_profile("fx", deadline=None)  # a busy machine is no failure
settings.load_profile("fx")


def pytest_collection_modifyitems(config, items):
    """Side by side, the long tests first, so that no worker is left with one when the others have finished."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note which tests ran and passed, for the page of what is supported."""
    if report.when == "call" and report.outcome == "passed" and not hasattr(report, "wasxfail"):
        supported.PASSED.add(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Side by side, fail the session if SUPPORTED.md is not what the tests of all workers prove; see test_families.py."""
    here = not hasattr(session.config, "workerinput") and session.config.getoption("numprocesses", None)
    if here and supported.stale(supported.PASSED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """Say why the session failed, if the page is the reason."""
    if config.getoption("numprocesses", None) and supported.stale(supported.PASSED):
        terminalreporter.write_line(
            "FAILED tests/SUPPORTED.md is not what the tests prove: run python tests/supported.py"
        )


@pytest.fixture(scope="session")
def of_all(tmp_path_factory) -> Path:
    """A folder for what is made once for all workers, where tests run side by side: whoever makes it takes a lock."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def world(of_all) -> dict[str, str]:
    """The environment in which the paper's models and images lie where they would, in small (paper_world); made once."""
    with FileLock(of_all / "world.lock"):
        if not (told := of_all / "world.json").exists():
            told.write_text(json.dumps(paper_world.build(of_all / "world")))
    return json.loads(told.read_text())


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
def reader(tiny_pipeline):
    """The tiny pipeline with a text encoder that tells captions apart better than an untrained one does."""
    pipeline = copy.copy(tiny_pipeline)
    pipeline.text_encoder = tiny.spread(copy.deepcopy(tiny_pipeline.text_encoder))
    return pipeline


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


@pytest.fixture
def place(runs) -> Iterator[Callable]:
    """A function that lets given pictures be what a Generate of a model makes; it gives the Generate."""
    original, placed = results.perform.dispatch(Generate), {}

    def perform(asked, folder):
        for number, pixels in enumerate(placed[asked]):
            save_picture(picture_file(folder, number), pixels)

    def put(model, images: np.ndarray, **options) -> Generate:
        spec = Generate(model, n_generated=len(images), steps=2, **options)
        placed[spec] = images
        return spec

    results.perform.register(Generate, perform)
    yield put
    results.perform.register(Generate, original)


@pytest.fixture(scope="module")
def pair(tiny_pipeline) -> ModelPair:
    """The tiny base model and a theta' whose weights are moved by noise."""
    tuned = copy.copy(tiny_pipeline)
    tuned.unet = copy.deepcopy(tiny_pipeline.unet)
    tuned.scheduler = DDIMScheduler.from_config(tiny_pipeline.scheduler.config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.unet.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
    return ModelPair(tiny_pipeline, tuned)


@pytest.fixture(params=["sd1", "sd3"])
def model(request, picture_folder, tmp_path, runs) -> FineTune:
    """A tiny model of each of two families, much changed by a short fine-tuning; files of their own kind override it."""
    base = tmp_path / request.param
    tiny.save(request.param, base)
    fields = {"learning_rate": 1e-2, "steps_per_image": 3, "batch_size": 2}
    return FineTune((TrainingItem(str(picture_folder), "a dog"),), str(base), **fields)
