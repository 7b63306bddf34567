"""The benchmark's arithmetic, and that it runs; it asserts nothing about time."""

from types import SimpleNamespace

import pandas as pd
import pytest

from fx import benchmark, settings


def test_ratios_are_medians_over_those_of_cfg():
    rows = pd.DataFrame(
        [("cfg", s, m) for s, m in ((1.0, 100.0), (2.0, 90.0), (9.0, 300.0))]
        + [("finextract", s, 110.0) for s in (3.0, 3.0, 50.0)],
        columns=["arm", "seconds", "memory"],
    )
    table = benchmark.ratios(rows).set_index("arm")
    assert table.loc["finextract"].to_dict() == pytest.approx(
        {"seconds": 3.0, "memory": 110.0, "seconds / cfg": 1.5, "memory / cfg": 1.1}
    )
    assert table.loc["cfg", ["seconds / cfg", "memory / cfg"]].tolist() == [1, 1]


def test_settings_are_compared_by_medians_over_the_first_set_of_the_same_method(monkeypatch):
    seconds = {("slow", "dreambooth"): [8.0, 10.0, 90.0], ("slow", "lora"): [4.0, 4.0, 5.0]}
    seconds |= {("fast", "dreambooth"): [5.0, 5.0, 1.0], ("fast", "lora"): [3.0, 1.0, 70.0]}
    turns = {key: iter(values) for key, values in seconds.items()}
    asked = []

    def run_apart(words):
        asked.append(words)
        return {"item s": next(turns[tuple(words[-2:])])}

    monkeypatch.setattr(benchmark, "run_apart", run_apart)
    table = benchmark.compare_settings(["slow", "fast"], 7, 3).set_index(["settings", "method"])
    assert table["item s"].to_dict() == {
        ("slow", "dreambooth"): 10.0,
        ("fast", "dreambooth"): 5.0,
        ("slow", "lora"): 4.0,
        ("fast", "lora"): 3.0,
    }
    assert table["item / slow"].to_dict() == {
        ("slow", "dreambooth"): 1.0,
        ("fast", "dreambooth"): 0.5,
        ("slow", "lora"): 1.0,
        ("fast", "lora"): 0.75,
    }
    assert asked[:3] == [["--images", "7", "--set", name, "dreambooth"] for name in ("slow", "fast", "slow")]


@pytest.mark.parametrize("method", ["dreambooth", "lora"])
def test_an_items_seconds_are_scaled_up_from_a_few_steps_and_images(monkeypatch, method):
    """Half a second a step and three quarters an image, by a clock of our own."""
    chosen, clock = settings.load("mini-sd", "batch_size=5")[method], [0.0]

    def spend(seconds):
        clock[0] += seconds

    def train(pipeline, images, captions, spec, scratch):
        assert len(images) == len(captions) == 10
        steps = -(-spec.steps_per_image * 10 // spec.batch_size)
        spend(0.5 * steps)
        return [0.0] * steps, {}

    def sample(pair, caption, n, arm, w, steps, **_):
        assert steps == chosen.sampling_steps
        spend(0.75 * n)

    for name, stub in (("train", train), ("sample", sample), ("make", lambda *_: spend(100))):
        monkeypatch.setattr(benchmark, name, stub)
    monkeypatch.setattr(benchmark, "load_pair", lambda *_: spend(100))
    monkeypatch.setattr(benchmark, "load_pipeline", lambda *_: spend(100))
    monkeypatch.setattr(benchmark, "image_size", lambda _: 64)
    monkeypatch.setattr(benchmark, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(benchmark.settings, "load", lambda name: {method: chosen})
    found = benchmark.measure_settings("mini-sd", method, images=4)
    tuning = 0.5 * chosen.steps_per_image * 10 / 5
    sampling = 3 * 0.75 * chosen.images_per_training * 10
    assert found == pytest.approx({"fine-tuning s": tuning, "three arms s": sampling, "item s": tuning + sampling})


@pytest.mark.long
def test_the_benchmark_measures_every_arm_of_both_methods(tiny_sd, capsys):
    benchmark.main(["--base", str(tiny_sd), "--images", "1", "--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [[m, a] for m in ("dreambooth", "lora") for a in benchmark.ARMS]
    assert all(float(value) > 0 for line in lines[1:] for value in line.split()[2:])


@pytest.mark.parametrize("words", [["--images", "0"], ["--repeats", "0"]])
def test_impossible_numbers_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(words)
    assert "must be at least 1" in capsys.readouterr().err
