"""From a saved table or figure to the steps behind it: fx.provenance, and the command python -m fx.runs why."""

import json
import multiprocessing
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest

from fx import plots, provenance, results, runs, tables


@dataclass(frozen=True)
class Leaf:
    n: int


@dataclass(frozen=True)
class Total:
    of: tuple[Leaf, ...]


@results.perform.register
def _(spec: Leaf, folder: Path) -> None:
    (folder / "scores.json").write_text(json.dumps({"leaf": spec.n}))


@results.perform.register
def _(spec: Total, folder: Path) -> None:
    for leaf in spec.of:
        results.complete(leaf)
    (folder / "scores.json").write_text(json.dumps({"total": sum(leaf.n for leaf in spec.of)}))


def total(n: int) -> Total:
    return Total(tuple(map(Leaf, range(n))))


@pytest.fixture(autouse=True)
def _area(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RUNS", tmp_path / "runs")


@pytest.fixture
def saved(tmp_path, monkeypatch) -> SimpleNamespace:
    """A table and a figure of one notebook and a table of the next, each after some steps."""
    outputs = tmp_path / "outputs"
    monkeypatch.setattr(tables, "TABLES", outputs / "data/results")
    monkeypatch.setattr(plots, "FIGURES", outputs / "figures")

    def notebook(*names: str, specs: list) -> None:
        monkeypatch.setattr(provenance, "_began", {})
        monkeypatch.setattr(results, "_asked_for", {})
        for name, spec in zip(names, specs, strict=True):
            rows = results.run([spec])
            if name.startswith("fig"):
                plots.save(plt.figure(), name, "mini")
            else:
                tables.save(rows, name, "mini")

    notebook("table01", "fig01", specs=[total(2), total(3)])
    notebook("table02", specs=[Leaf(7)])
    return SimpleNamespace(outputs=outputs, table=outputs / "data/results/mini", notebook=notebook)


def steps(*specs) -> list[str]:
    return ["/".join(results.folder(spec).parts[-2:]) for spec in specs]


def test_why_names_the_steps_of_a_table_and_what_they_were_built_on_and_no_others(saved):
    found, unchanged = runs.why(saved.table / "table01.csv")
    assert list(found) == steps(total(2), Leaf(0), Leaf(1))
    assert unchanged
    for step, manifest in found.items():
        assert manifest == json.loads((results.RUNS / step / results.MANIFEST).read_text())
    found, _ = runs.why(saved.outputs / "figures/fig01-mini.png")
    assert list(found) == steps(total(2), Leaf(0), Leaf(1), total(3), Leaf(2))
    assert list(runs.why(saved.table / "table02.csv")[0]) == steps(Leaf(7))


def test_a_step_that_a_notebook_completes_without_a_table_is_noted_too_and_what_that_needs_is_not(saved):
    provenance._began.clear()
    results._asked_for.clear()
    results.complete(total(2))
    assert results.asked_for() == steps(total(2))
    results.run([total(3)])
    results.complete(Leaf(0))
    assert results.asked_for() == steps(total(2), total(3), Leaf(0))
    with pytest.raises(TypeError):
        results.complete(None)
    assert results.asked_for() == steps(total(2), total(3), Leaf(0))


def test_a_notebook_that_is_run_again_is_noted_anew(saved):
    before = (saved.table / provenance.NAME).read_bytes()
    saved.notebook("table01", "fig01", specs=[total(2), total(3)])
    assert (saved.table / provenance.NAME).read_bytes() == before, "the same steps, the same record"
    saved.notebook("table01", specs=[Leaf(9)])
    assert list(runs.why(saved.table / "table01.csv")[0]) == steps(Leaf(9))
    with pytest.raises(ValueError, match=r"fig01-mini\.png: nothing was noted"):
        runs.why(saved.outputs / "figures/fig01-mini.png")
    assert list(runs.why(saved.table / "table02.csv")[0]) == steps(Leaf(7))


def test_why_says_what_is_missing_and_what_was_changed(saved, capsys):
    table = saved.table / "table01.csv"
    shutil.rmtree(results.folder(Leaf(1)))
    table.write_text(table.read_text() + "1,2\n")
    assert runs.main(["why", str(table)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{steps(total(2))[0]}  20")
    assert lines[2] == f"{steps(Leaf(1))[0]}  not in this work area"
    assert lines[3] == f"{table}: 3 steps (2 leaf, 1 total)"
    assert "changed afterwards" in lines[4]
    assert runs.main(["why", str(saved.table / "table03.csv")]) == 2
    assert "table03.csv does not exist" in capsys.readouterr().err
    (saved.table / "table03.csv").write_text("a\n1\n")
    assert runs.main(["why", str(saved.table / "table03.csv")]) == 2
    assert "nothing was noted of how it was made" in capsys.readouterr().err


def save_many(first: int, folder: Path, area: Path) -> None:
    results.RUNS = area
    provenance._began.clear()
    for number in range(first, first + 15):
        (file := folder / f"table{number}.csv").write_text(str(number))
        provenance.note(file, folder)


def test_two_notebooks_of_a_profile_may_save_at_the_same_time(tmp_path):
    (folder := tmp_path / "mini").mkdir()
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=save_many, args=(first, folder, tmp_path / "runs")) for first in (100, 200)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    noted = json.loads((folder / provenance.NAME).read_text())["files"]
    assert set(noted) == {f"table{first + n}.csv" for first in (100, 200) for n in range(15)}
    assert sorted(path.suffix for path in folder.iterdir()) == [".csv"] * 30 + [".json"]


def test_a_damaged_record_is_begun_anew_and_harms_no_table(saved, capsys):
    (saved.table / provenance.NAME).write_text('{"files": 3}')
    saved.notebook("table02", specs=[Leaf(7)])
    assert list(runs.why(saved.table / "table02.csv")[0]) == steps(Leaf(7))
    assert runs.main(["why", "--manifests", str(saved.table / "table02.csv")]) == 0
    printed = capsys.readouterr().out
    assert '"inputs"' in printed
    assert '"versions"' in printed
