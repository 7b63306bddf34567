"""What arms cost: what is measured, in which order, and over what; nothing is asserted about time."""

import multiprocessing
import os
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from scipy import stats

from fx import cost, models, results
from fx.cost import Cost, measured, over
from fx.families import latent_shape, network


@pytest.fixture
def spec(tiny_sd) -> Cost:
    return Cost(str(tiny_sd), "lora", images=2, batch_size=1, steps=1, rank=2, repeats=2)


@pytest.fixture
def by_the_book(monkeypatch):
    """Measurements are made up: their order, and a failure at will."""
    asked, fail_at = [], [None]

    def apart(spec, place):
        if len(asked) == fail_at[0]:
            raise KeyboardInterrupt
        asked.append((spec.arms, (place / "tuned").exists()))
        return {"seconds": float(len(asked)), "memory": 1.0, "device": "CPU"}

    monkeypatch.setattr(cost, "apart", apart)
    return asked, fail_at


def test_arms_take_turns_and_the_first_round_does_not_count(spec, by_the_book, runs):
    asked, _ = by_the_book
    rows = measured(spec)
    assert [arms for arms, _ in asked] == [(arm,) for arm in spec.arms] * 3
    assert all(there for _, there in asked)
    assert rows.arm.tolist() == list(spec.arms) * 2
    assert rows.repeat.tolist() == [1, 1, 1, 2, 2, 2]
    assert rows.seconds.tolist() == [4, 5, 6, 7, 8, 9]


def test_interrupted_it_goes_on_with_the_measurement_that_is_missing(spec, by_the_book, runs):
    asked, fail_at = by_the_book
    fail_at[0] = 5
    with pytest.raises(KeyboardInterrupt):
        measured(spec)
    fail_at[0] = None
    assert measured(spec).seconds.tolist() == [4, 5, 6, 7, 8, 9]
    assert len(asked) == 9


def test_a_ratio_is_the_geometric_mean_over_repeats_with_the_interval_of_the_logarithms():
    seconds = {"cfg": [1.0, 2.0, 4.0], "finextract": [1.1, 2.6, 4.0], "direct": [0.5, 1.0, 2.0]}
    rows = pd.DataFrame(
        [
            (arm, i, s, 10.0 * s if arm == "direct" else 7.0)
            for arm, all_s in seconds.items()
            for i, s in enumerate(all_s, 1)
        ],
        columns=["arm", "repeat", "seconds", "memory"],
    )
    table = over(rows.sample(frac=1, random_state=0), "cfg").set_index(["arm", "measure"])
    logs = np.log([1.1, 1.3, 1.0])
    found = table.loc["finextract", "time"]
    half = stats.t.ppf(0.975, 2) * logs.std(ddof=1) / 3**0.5
    assert found.ratio == pytest.approx((1.1 * 1.3 * 1.0) ** (1 / 3))
    assert (found.low, found.high) == pytest.approx((np.exp(logs.mean() - half), np.exp(logs.mean() + half)))
    assert table.loc["direct", "time"][["ratio", "low", "high"]].tolist() == pytest.approx([0.5] * 3)
    assert table.loc["finextract", "memory"].ratio == pytest.approx(1)
    assert "cfg" not in table.index.get_level_values("arm")
    with pytest.raises(ValueError, match="not measured equally often"):
        over(rows[1:], "cfg")
    with pytest.raises(ValueError, match="'stock' and the others"):
        over(rows, "stock")


@pytest.mark.parametrize("method", cost.METHODS)
@pytest.mark.parametrize("family", ["sd1", "sd3"])
def test_an_arm_loads_theta_only_where_it_asks_it(tmp_path, method, family):
    tiny.save(family, tmp_path / "base")
    spec = Cost(str(tmp_path / "base"), method, rank=2)
    cost.make(tmp_path, spec)
    pairs = {arm: cost.load_for(arm, spec, tmp_path) for arm in spec.arms}
    for arm, pair in pairs.items():
        alone = method != "lora" and arm != "finextract"  # theta' as a whole
        assert pair.one_network == (method != "dreambooth" or alone)
        x, t = torch.randn(1, *latent_shape(pair.tuned)), torch.tensor(0.5 if family == "sd3" else 400)
        with torch.no_grad():
            base, tuned = (pair.predict(m, x, t, pair.condition(m, "a dog")) for m in ("base", "tuned"))
        assert torch.equal(base, tuned) == alone
    stock = network(models.load_pipeline(spec.base)).state_dict()
    theta = network(pairs["finextract"].base).state_dict()
    for name, weight in stock.items():
        layer, _, kind = name.rpartition(".")
        assert torch.equal(weight, theta[name if name in theta else f"{layer}.base_layer.{kind}"])


def pid(spec, place):
    """In the place of `measure`: who measures, and what it says on the way."""
    print("0%", file=sys.stderr)
    return {"seconds": float(os.getpid()), "rank": spec.rank, "arms": spec.arms}


def failing(spec, place):
    raise MemoryError("too much")


def dying(spec, place):
    os._exit(3)


def test_a_measurement_is_a_process_of_its_own_and_its_failure_a_message(spec, monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(cost, "START", "fork")  # so that the process has what is patched here
    monkeypatch.setattr(cost, "measure", pid)
    first, second = (cost.apart(replace(spec, arms=("cfg",)), tmp_path) for _ in range(2))
    assert len({os.getpid(), first["seconds"], second["seconds"]}) == 3
    assert (first["rank"], first["arms"]) == (spec.rank, ("cfg",))
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(cost, "measure", failing)
    with pytest.raises(RuntimeError, match="the measurement of direct failed: MemoryError: too much"):
        cost.apart(spec, tmp_path)
    monkeypatch.setattr(cost, "measure", dying)
    with pytest.raises(RuntimeError, match="the measurement of direct failed: its process ended with exit code 3"):
        cost.apart(spec, tmp_path)


def test_an_interruption_ends_the_process_that_measures(spec, monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cost, "START", "fork")
    monkeypatch.setattr(cost, "measure", lambda *_: time.sleep(60))
    monkeypatch.setattr("multiprocessing.connection.Connection.recv", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cost.apart(spec, tmp_path)
    for process in multiprocessing.active_children():
        process.join(10)
    assert not multiprocessing.active_children()


def test_seconds_are_those_of_sampling_over_the_images_and_memory_what_came_on_top(spec, monkeypatch, tmp_path):
    clock, calls = [0.0], []

    def sample(pair, caption, n, arm, w, **_):
        clock[0] += 3.0 * n
        calls.append((n, arm, w))

    monkeypatch.setattr(cost, "sample", sample)
    monkeypatch.setattr(cost, "load_for", lambda *_: clock.__setitem__(0, 100.0))
    monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(cost, "peak", lambda: 5000.0)
    memory = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=1.2e9))
    monkeypatch.setattr(cost.psutil, "Process", lambda: memory)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = cost.measure(replace(spec, images=8, arms=("cfg",)), tmp_path)
    assert found == {"seconds": pytest.approx(3.0), "memory": pytest.approx(3800.0), "device": "CPU"}
    assert calls == [(2, "cfg", 3.0), (8, "cfg", 3.0)]
    cost.measure(replace(spec, arms=("direct",)), tmp_path)
    assert calls[-1] == (2, "direct", 1.0)


def test_on_a_gpu_memory_is_torchs_own_count(spec, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2.5e9)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(cost, "load_for", lambda *_: None)
    monkeypatch.setattr(cost, "sample", lambda *_, **__: None)
    found = cost.measure(spec, tmp_path)
    assert (found["memory"], found["device"]) == (2500.0, "a GPU")


def held(spec, place):
    """In the place of `measure`: what came on top of this process by 400 MB that it takes."""
    before = cost.peak()
    weight = b"1" * (400_000_000 if spec.rank == 2 else 1)
    return {"more": cost.peak() - before, "at all": cost.peak(), "length": len(weight)}


def test_the_peak_is_of_the_process_that_measures_and_not_of_its_parent(spec, monkeypatch, tmp_path):
    monkeypatch.setattr(cost, "START", "fork")
    monkeypatch.setattr(cost, "measure", held)
    weight = b"1" * 900_000_000
    del weight  # this process has had more than it holds now
    found = [cost.apart(replace(spec, rank=rank), tmp_path)["more"] for rank in (2, 1)]
    assert 380 < found[0] < 450
    assert found[1] < 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "full"}, "unknown method 'full'"),
        ({"arms": ("cfg", "cgf")}, "unknown arm 'cgf'"),
        ({"arms": ()}, "name one or several"),
        ({"arms": ("cfg", "cfg")}, "name one or several different ones"),
        ({"sampler": "dpm"}, "unknown sampler 'dpm'"),
        ({"precision": "float8"}, "unknown precision 'float8'"),
        ({"repeats": 0}, "repeats 0 must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Cost(**change)


@pytest.mark.long
@pytest.mark.parametrize("method", ["dreambooth", "lora"])
def test_it_measures(spec, runs, method):
    rows = measured(replace(spec, method=method, repeats=1, arms=("cfg", "finextract")))
    assert (rows[["seconds", "memory"]] > 0).all(axis=None)
    assert results.folder(replace(spec, method=method, repeats=1, arms=("cfg", "finextract"))).exists()
