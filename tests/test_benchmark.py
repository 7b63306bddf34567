"""The benchmark's arithmetic, and that it runs; it asserts nothing about time."""

import pandas as pd
import pytest

from fx import benchmark


def test_ratios_are_medians_over_those_of_cfg_of_the_same_method():
    rows = pd.DataFrame(
        [("lora", "cfg", s, 100.0) for s in (1.0, 2.0, 9.0)]
        + [("lora", "finextract", s, 110.0) for s in (3.0, 3.0, 50.0)]
        + [("dreambooth", "cfg", 4.0, 10.0), ("dreambooth", "finextract", 2.0, 15.0)],
        columns=["method", "arm", "seconds", "memory"],
    )
    table = benchmark.ratios(rows).set_index(["method", "arm"])
    assert table.loc[("lora", "finextract"), "seconds / cfg"] == pytest.approx(1.5)
    assert table.loc[("lora", "finextract"), "memory / cfg"] == pytest.approx(1.1)
    assert table.loc[("dreambooth", "finextract"), "seconds / cfg"] == pytest.approx(0.5)
    assert table.loc[("dreambooth", "finextract"), "memory / cfg"] == pytest.approx(1.5)
    assert table.loc[("lora", "cfg"), "seconds / cfg"] == 1


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
