"""The committed notebooks are executed and in order; with smoke parameters each runs from top to bottom."""

import ast
import contextlib
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import papermill
import pytest

from fx import plots, results, tables
from fx.paths import NOTEBOOKS, ROOT
from fx.reproduce import DEFAULTS, NOT_BY_DEFAULT, find_notebooks, parameters, profiles

ALL = sorted(NOTEBOOKS.glob("[0-9][0-9]-*.ipynb"))
EXPERIMENTS = [path for path in ALL if path.name[:2] != NOT_BY_DEFAULT]
PARAMETERS = sorted(NOTEBOOKS.glob("params/*/*.yaml"))


def run_nbval(how: str, notebook: Path, work: Path) -> None:
    """Run a notebook with all that it writes in `work`, so that no other test and no committed file meets it."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", how, "-p", "no:cacheprovider", "-q", str(notebook)],
        env=os.environ | {"FX_RUNS": str(work / "runs"), "FX_OUTPUTS": str(work)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def code_cells(path: Path) -> list:
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


def is_parameters(cell) -> bool:
    return "parameters" in cell.metadata.get("tags", [])


def asked_of_the_runner(notebook: Path, values: dict, monkeypatch, only_first: bool = False) -> list:
    """The specs that a notebook with these parameters hands to `results.run`, all or the first list; none is done.

    The runner refuses, and so every cell that needs its results fails and is passed over. Call it with the fixture `runs`,
    an empty work area in which nothing is finished.
    """

    def refuse(specs, *_, **__):
        asked.append(list(specs))
        raise RuntimeError("nothing is run in this test")

    asked: list = []
    monkeypatch.setattr(results, "run", refuse)
    monkeypatch.setattr(results, "complete", refuse)
    monkeypatch.setattr(plots, "FIGURES", results.RUNS.parent)
    monkeypatch.setattr(tables, "TABLES", results.RUNS.parent)
    names: dict = {}
    for cell in code_cells(notebook):
        with contextlib.suppress(Exception):
            exec(cell.source, names)
        if is_parameters(cell):
            assert set(values) <= set(names)
            names |= values
        if asked and only_first:
            break
    pd.reset_option("display")
    plt.close("all")
    assert asked
    return [spec for specs in asked for spec in specs]


def test_there_are_notebooks():
    assert ALL
    assert set(find_notebooks([])) <= set(ALL)


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_committed_notebook_is_executed_in_order_without_error(path):
    counts = [cell.execution_count for cell in code_cells(path)]
    assert counts == list(range(1, len(counts) + 1)), "execute it: python -m fx.reproduce --in-place"
    outputs = [output for cell in code_cells(path) for output in cell.outputs]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error"]


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_notebook_has_one_parameters_cell_of_plain_values(path):
    tagged = [cell for cell in code_cells(path) if is_parameters(cell)]
    assert len(tagged) == 1
    values: dict = {}
    exec(tagged[0].source, values)
    del values["__builtins__"]
    assert values
    assert {type(value) for value in values.values()} <= {int, float, str, bool}
    assert values["profile"] == DEFAULTS
    assert set(values) == set(papermill.inspect_notebook(path)), "papermill cannot read a line with two equality signs"


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_chosen_settings_stand_in_one_file_only(path):
    (tagged,) = (cell for cell in code_cells(path) if is_parameters(cell))
    assert 'settings_name = "mini-sd"' in tagged.source
    assert 'change = ""' in tagged.source
    others = "\n".join(cell.source for cell in code_cells(path) if not is_parameters(cell))
    loads = [node for node in ast.walk(ast.parse(others)) if isinstance(node, ast.Call)]
    loads = [node.args for node in loads if ast.unparse(node.func) == "settings.load"]
    own = [args[1] for args in loads if ast.unparse(args[0]) == "settings_name"]
    assert own
    for given in own:  # the change alone, or in a text with more
        assert "change" in [node.id for node in ast.walk(given) if isinstance(node, ast.Name)]
    named = [node.value for node in ast.walk(ast.parse(others)) if isinstance(node, ast.Constant)]
    assert not {"mini-sscd", "mini-clip"} & set(named)
    loaded = [node for node in ast.walk(ast.parse(others)) if isinstance(node, ast.Call) and node.args]
    loaded = [node.args[0] for node in loaded if ast.unparse(node.func).rpartition(".")[2].startswith("load_")]
    assert not [node.value for node in loaded if isinstance(node, ast.Constant)], "load what the settings name"


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_tables_and_figures_are_saved_under_the_profile_and_no_other_name(path):
    """Every call of plots.save and tables.save has the parameter `profile` as its last argument."""
    saved = [
        call
        for cell in code_cells(path)
        for call in ast.walk(ast.parse(cell.source))
        if isinstance(call, ast.Call) and ast.unparse(call.func) in ("plots.save", "tables.save")
    ]
    assert saved
    assert {ast.unparse(call.args[2]) for call in saved} == {"profile"}
    assert "subset" not in "".join(ast.unparse(call) for call in saved)


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_notebook_ends_by_asserting_its_artefacts_and_tells_its_story(path):
    notebook = nbformat.read(path, 4)
    assert "assert" in code_cells(path)[-1].source
    prose = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    assert len(prose) >= len(code_cells(path)) // 2
    assert path.stat().st_size < 3 * 2**20


@pytest.mark.long
def test_notebook_03_refuses_more_items_than_there_are_before_any_training(tmp_path, monkeypatch):
    monkeypatch.setenv("FX_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("FX_OUTPUTS", str(tmp_path))
    with pytest.raises(
        papermill.PapermillExecutionError, match="style has 20 reported items: a number from 0 to 20, not 25"
    ):
        papermill.execute_notebook(
            NOTEBOOKS / "03-extraction.ipynb",
            tmp_path / "03.ipynb",
            {"artists": 25},
            cwd=str(NOTEBOOKS),
            progress_bar=False,
        )
    assert not list(tmp_path.rglob("manifest.json"))


@pytest.mark.parametrize("profile", ["quick", "smoke"])
def test_notebook_12_takes_the_runs_of_notebook_03(profile, runs, monkeypatch):
    """What notebook 12 samples from is generated by notebook 03, so that nothing is fine-tuned or sampled twice."""
    third, twelfth = find_notebooks(["03", "12"])
    ours = asked_of_the_runner(twelfth, parameters(twelfth, profile, {}), monkeypatch, only_first=True)
    theirs = asked_of_the_runner(third, parameters(third, profile, {}), monkeypatch)
    assert {spec.extract.rule for spec in ours} > {"paper"}
    assert {spec for spec in ours if spec.extract.rule == "paper"} <= set(theirs)
    assert {spec.extract.generate for spec in ours} <= {spec.extract.generate for spec in theirs}


def test_complete_runs_of_notebooks_03_and_12_have_the_same_items():
    third, twelfth = (parameters(notebook, "mini", {}) for notebook in find_notebooks(["03", "12"]))
    shared = ("artists", "objects", "settings_name", "change")
    assert {name: third.get(name) for name in shared} == {name: twelfth.get(name) for name in shared}


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_every_notebook_has_parameters_in_every_profile(path):
    for profile in profiles():
        assert profile == DEFAULTS or parameters(path, profile, {})["profile"] == profile


@pytest.mark.parametrize("file", PARAMETERS, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_every_file_of_parameters_belongs_to_a_notebook_that_takes_them(file):
    notebook = NOTEBOOKS / f"{file.stem}.ipynb"
    assert notebook in ALL
    assert parameters(notebook, file.parent.name, {})


@pytest.mark.long
@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_notebook_runs_with_smoke_parameters_and_leaves_the_files_of_that_profile_only(path, tmp_path):
    prepared = tmp_path / path.name
    papermill.execute_notebook(path, prepared, parameters(path, "smoke", {}), prepare_only=True)
    run_nbval("--nbval-lax", prepared, tmp_path)
    written = [file.relative_to(tmp_path) for file in tmp_path.rglob("*") if file.is_file() and file != prepared]
    left = [file.as_posix() for file in written if file.parts[0] != "runs"]
    assert left
    assert not [
        name
        for name in left
        if not name.startswith("data/results/smoke/")
        and not (name.startswith("figures/") and name.endswith("-smoke.png"))
    ]


@pytest.mark.long
def test_outputs_of_notebook_02_are_exact(tmp_path):
    """The whole of it, with its own parameters: what it printed is printed again, character for character."""
    run_nbval("--nbval", *find_notebooks(["02"]), tmp_path)
