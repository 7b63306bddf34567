"""The committed notebooks are executed and in order; with smoke parameters each runs from top to bottom."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest

from fx.paths import NOTEBOOKS, ROOT
from fx.reproduce import find_notebooks, parameters

ALL = sorted(NOTEBOOKS.glob("[0-9][0-9]-*.ipynb"))
SMOKE = [path for path in ALL if (NOTEBOOKS / "params/smoke" / f"{path.stem}.yaml").exists()]


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


def test_there_are_notebooks():
    assert ALL
    assert set(find_notebooks([])) <= set(ALL)


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_committed_notebook_is_executed_in_order_without_error(path):
    counts = [cell.execution_count for cell in code_cells(path)]
    if not any(counts):
        pytest.skip("committed without outputs: notebooks are executed once, when the base model they rest on is final")
    assert counts == list(range(1, len(counts) + 1))
    outputs = [output for cell in code_cells(path) for output in cell.outputs]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error"]


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_notebook_has_one_parameters_cell_of_plain_values(path):
    tagged = [cell for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    values: dict = {}
    exec(tagged[0].source, values)
    del values["__builtins__"]
    assert values
    assert {type(value) for value in values.values()} <= {int, float, str, bool}
    assert set(values) == set(papermill.inspect_notebook(path))


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


def test_notebook_12_takes_the_runs_of_notebook_03():
    defaults = [papermill.inspect_notebook(NOTEBOOKS / name) for name in ("03-extraction.ipynb", "12-clustering.ipynb")]
    shared = set(defaults[0]) & set(defaults[1])
    assert len(shared) >= 15
    assert {name: defaults[0][name]["default"] for name in shared} == {
        name: defaults[1][name]["default"] for name in shared
    }


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_every_notebook_has_smoke_parameters(path):
    assert path in SMOKE
    assert parameters(path, "smoke", {})


@pytest.mark.long
@pytest.mark.parametrize("path", SMOKE, ids=lambda path: path.stem)
def test_notebook_runs_with_smoke_parameters(path, tmp_path):
    prepared = tmp_path / path.name
    papermill.execute_notebook(path, prepared, parameters(path, "smoke", {}), prepare_only=True)
    run_nbval("--nbval-lax", prepared, tmp_path)


@pytest.mark.long
def test_outputs_of_notebook_02_are_exact(tmp_path):
    """The whole of it, with its own parameters: what it printed is printed again, character for character."""
    (path,) = (path for path in ALL if path.name.startswith("02"))
    if not any(cell.execution_count for cell in code_cells(path)):
        pytest.skip("notebook 02 is committed without outputs, so there is nothing to compare with")
    run_nbval("--nbval", path, tmp_path)
