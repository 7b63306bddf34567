"""Begun alone, moved to a cluster of three processes, one of them killed: the same table and images, byte by byte."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import kills
import pandas as pd
import psutil
import pytest
import torch

from fx import results, sampling
from fx.evaluation import Score
from fx.extraction import Extract
from fx.finetune import FineTune, TrainingItem
from fx.sampling import Generate

pytest.importorskip("dask.distributed")
N = 110  # two whole parts and a piece


def specs(base: Path, pictures: Path) -> list[Score]:
    """Two arms of one fine-tuned model, which they share, and a second model."""
    models = [
        FineTune((TrainingItem(str(pictures), "a dog"),), base=str(base), steps_per_image=steps, batch_size=2)
        for steps in (10, 6)
    ]
    plan = [(models[0], "direct", 1.0), (models[0], "cfg", 3.0), (models[1], "finextract", 3.0)]
    generated = [Generate(model, arm, w, n_generated=N, steps=2) for model, arm, w in plan]
    return [Score(Extract(images, 4), judge="") for images in generated]


def begin_alone(runs: Path, base: Path, pictures: Path) -> None:
    """What another process does on its own, before there is a cluster."""
    results.RUNS = runs
    torch.set_num_threads(1)
    results.run(specs(base, pictures))


def kill_in_the_middle(runs: Path, base: Path, pictures: Path) -> dict[str, int]:
    """Let a process begin alone and kill it when it has sampled some images; the steps that it had finished."""
    process = multiprocessing.get_context("spawn").Process(target=begin_alone, args=(runs, base, pictures))
    process.start()
    while len(list(runs.glob("scratch/*/*.png"))) < 20:
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    return kills.finished(runs)


@pytest.mark.long
def test_a_run_moved_to_a_cluster_that_loses_a_worker_ends_the_same(tiny_sd, picture_folder, tmp_path, monkeypatch):
    asked, threads = specs(tiny_sd, picture_folder), torch.get_num_threads()
    monkeypatch.setattr(results, "RUNS", alone := tmp_path / "alone")
    torch.set_num_threads(1)
    here = results.run(asked)
    torch.set_num_threads(threads)
    monkeypatch.setattr(results, "RUNS", shared := tmp_path / "shared")
    monkeypatch.setenv("FX_RUNS", str(shared))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    before = kill_in_the_middle(shared, tiny_sd, picture_folder)
    images = len(list(shared.glob("scratch/*/*.png")))
    killed = []

    def kill_one(pids: list[int]) -> None:
        """As soon as an image is there, the worker that has one of them in hand, or another."""
        while len(list(shared.glob("scratch/*/*.png"))) <= images:
            time.sleep(0.01)
        os.kill(pids[0], signal.SIGKILL)
        killed.append(pids[0])

    results.connect("local:3")
    try:
        client = results._connected["client"]
        workers = client.run(os.getpid).values()
        trimming = client.run(os.environ.get, "MALLOC_TRIM_THRESHOLD_").values()
        assassin = threading.Thread(target=kill_one, args=(list(workers),), daemon=True)
        assassin.start()
        there = results.run(asked)
        assassin.join(10)
    finally:
        results.connect("")
    assert len(workers) == 3
    assert set(trimming) == {None}, "set, it keeps the allocator from learning"
    assert client.status == "closed"
    assert not [pid for pid in workers if psutil.pid_exists(pid)]  # the processes end with it
    assert killed
    assert before
    assert before.items() <= kills.finished(shared).items(), "finished and then done again"
    pd.testing.assert_frame_equal(there, here)
    assert len(kills.kept(alone)) > 3 * N
    assert kills.differences(alone, shared) == []
    assert not list(shared.glob("*/*.set-aside-*"))
    assert not [path for path in shared.glob("scratch/*") if any(path.iterdir())]


def test_a_large_generation_is_shared_out_in_parts_that_fit_together(tiny_sd, picture_folder, runs):
    model = specs(tiny_sd, picture_folder)[0].extract.generate.model
    asked = Generate(model, "direct", 1.0, n_generated=N, steps=2)
    shares = results.parts(asked)
    assert shares == [(0, 50), (50, 100), (100, 110)]
    assert results.parts(Generate(model, "direct", 1.0, n_generated=50, steps=2)) == []
    for share in reversed(shares):
        results.perform_part(asked, *share)
    sampled = sorted(file.name for file in results.scratch(asked).iterdir())
    assert sampled == [sampling.picture_file(Path(), number).name for number in range(N)]
    before = {name: (results.scratch(asked) / name).stat().st_mtime_ns for name in sampled}
    results.perform_part(asked, *shares[0])  # twice is no harm
    assert {name: (results.scratch(asked) / name).stat().st_mtime_ns for name in sampled} == before
    folder = results.complete(asked)
    assert len(list(folder.glob("*.png"))) == N
