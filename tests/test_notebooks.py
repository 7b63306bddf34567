"""The committed notebooks are executed, laid out alike and true to the committed tables; each runs, in small."""

import ast
import base64
import contextlib
import os
import subprocess
import sys
from pathlib import Path

import committed
import layout
import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import papermill
import pytest

from fx import datasets, plots, results, tables
from fx.evaluation import Score
from fx.paths import NOTEBOOKS, ROOT
from fx.reproduce import DEFAULTS, NOT_BY_DEFAULT, find_notebooks, parameters, profiles

ALL = sorted(NOTEBOOKS.glob("[0-9][0-9]-*.ipynb"))
EXPERIMENTS = [path for path in ALL if path.name[:2] != NOT_BY_DEFAULT]
FEW = "steps_per_image=1 sampling_steps=2 lora.rank=2 lora.alpha=2"
PARAMETERS = sorted(NOTEBOOKS.glob("params/*/*.yaml"))


def run_nbval(how: str, notebook: Path, outputs: Path, runs: Path) -> None:
    """Run a notebook with its tables and figures in `outputs` and its steps in `runs`, where others may have done some."""
    nbval_alone = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # the other plugins take a second to be imported
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "nbval.plugin", how, "-p", "no:cacheprovider", "-q", str(notebook)],
        env=os.environ | nbval_alone | {"FX_RUNS": str(runs), "FX_OUTPUTS": str(outputs)},
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
    notebook = nbformat.read(path, 4)
    found = [*layout.execution_faults(notebook), *layout.version_faults(notebook)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_committed_notebook_has_the_layout_of_all(path):
    found = list(layout.layout_faults(nbformat.read(path, 4), path.name[:2]))
    assert not found, "\n".join(found)
    assert path.stat().st_size < 3 * 2**20


@pytest.fixture
def nothing_runs(runs, monkeypatch) -> None:
    """Steps are refused, and what cells save goes nowhere near the committed files."""

    def refuse(*_, **__):
        raise RuntimeError("nothing is run in this test")

    monkeypatch.setattr(results, "run", refuse)
    monkeypatch.setattr(results, "complete", refuse)
    monkeypatch.setattr(plots, "FIGURES", runs.parent)
    monkeypatch.setattr(tables, "TABLES", runs.parent)


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_what_a_notebook_shows_of_the_complete_run_is_what_is_committed(path, nothing_runs):
    found = list(committed.committed_faults(nbformat.read(path, 4)))
    assert not found, "\n".join(found)


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


# what these tests can see, tried on a small notebook


def markdown(source: str, **metadata):
    return nbformat.v4.new_markdown_cell(source, metadata=metadata)


def executed(source: str, *outputs, **metadata):
    return nbformat.v4.new_code_cell(source, outputs=list(outputs), metadata=metadata)


def printed(text: str, name: str = "stdout"):
    return nbformat.v4.new_output("stream", name=name, text=text)


def shown(**data):
    """A value that a cell ends in; its execution count is set with the cell's."""
    data = {name.replace("_", "/"): value for name, value in data.items()}
    return nbformat.v4.new_output("execute_result", data=data)


def html(*rows: str) -> str:
    """A table as a page has it, its cells separated by strokes."""
    return "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row.split('|'))}</tr>" for row in rows)


FOLDED = {"tags": ["solution", "hide-cell"], "jupyter": {"source_hidden": True, "outputs_hidden": True}}
PIXEL = base64.b64encode(b"a picture").decode()
TABLE = {"text_html": html("|arm|AS", "0|direct|0.250", "1|cfg|0.333"), "text_plain": "  arm ..."}


def numbered(cells: list):
    """A notebook of these cells, their executions counted from 1."""
    count = 0
    for cell in cells:
        if cell.cell_type == "code":
            cell.execution_count = count = count + 1
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = count
    return nbformat.v4.new_notebook(cells=cells)


def versions() -> str:
    pins = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line)
    return f"python 3.11, torch {pins['torch']}, numpy {pins['numpy']}, fx 0.1.0\n"


@pytest.fixture
def good(tmp_path, monkeypatch) -> nbformat.NotebookNode:
    """A notebook without a fault, and the committed table and figure that it shows."""
    monkeypatch.setattr(tables, "SHIPPED_TABLES", tmp_path)
    monkeypatch.setattr(plots, "SHIPPED_FIGURES", tmp_path)
    (tmp_path / "mini").mkdir()
    (tmp_path / "mini/scores.csv").write_text("arm,AS\ndirect,0.25\ncfg,0.333333\n")
    (tmp_path / "as-mini.png").write_bytes(b"a picture")
    imports = "import pandas as pd\nfrom fx import plots, results, tables\npd.set_option('display.precision', 3)\n"
    exercises = [
        [markdown("## Exercises\n\n**1.** Read."), markdown("<details><summary>Solution</summary>It is.</details>")],
        [markdown("**2.** Change."), executed("2 + 2", shown(text_plain="4"))],
        [markdown("**3.** Invent."), executed("own = results.run([])\nprint(len(own), len(scores))", printed("0 2\n"))],
    ]
    for _, solution in exercises:
        solution.metadata.update(FOLDED)
    return numbered(
        [
            markdown("# 07 · A title\n\nWhat is it? You will see a table. Reading takes 5 minutes."),
            executed(imports + "print(results.environment_summary())", printed(versions())),
            executed("profile = 'quick'", tags=["parameters"]),
            markdown("## The complete run: all of it"),
            executed("tables.complete('scores')", shown(**TABLE)),
            markdown("CFG is better."),
            executed(
                "scores = tables.complete('scores')\nscores.set_index('arm').T",
                shown(text_html=html("arm|direct|cfg", "AS|0.25|0.333")),
            ),
            executed("print(f'{scores.AS.max():.2f} at most')", printed("0.33 at most\n")),
            markdown("And in a picture, where it is higher:"),
            executed("plots.complete('as')", shown(image_png=PIXEL, text_plain="<IPython.core.display.Image object>")),
            markdown("It is."),
            markdown("## Your own run\n\nThe same with fewer items."),
            executed("rows = results.run([])\nlen(rows)", shown(text_plain="0")),
            markdown("Beside the complete run:"),
            executed("print(len(rows), len(scores))", printed("0 2\n")),
            *(cell for pair in exercises for cell in pair),
            executed("assert all(path.exists() for path in [])"),
        ]
    )


def faults(notebook) -> list[str]:
    """All faults of a notebook of the number 07."""
    found = [*layout.execution_faults(notebook), *layout.version_faults(notebook)]
    return [*found, *layout.layout_faults(notebook, "07"), *committed.committed_faults(notebook)]


def test_a_good_notebook_has_no_faults(good, nothing_runs):
    assert faults(good) == []


def without(number: int):
    return lambda cells: cells.pop(number)


def instead(number: int, cell):
    return lambda cells: cells.__setitem__(number, cell)


def edited(number: int, **changes):
    return lambda cells: cells[number].update(changes)


MANY = html(*["a|b"] * 40)
FLAWS = {
    "is not executed": edited(6, execution_count=None),
    "not executed from top": edited(4, execution_count=7),
    "ended in an error": edited(2, outputs=[nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])]),
    "standard error": edited(2, outputs=[printed("careful", "stderr")]),
    "output of another execution": lambda cells: cells[4].outputs[0].update(execution_count=9),
    "a path of the machine": lambda cells: (
        cells[6].outputs[0].data.update({"text/plain": "[PosixPath('/home/a/b.csv')]"})
    ),
    "prints, but no output": edited(7, outputs=[]),
    "code cell 3 ends in a value, but no output": edited(4, outputs=[]),
    "code cell 4 ends in a value, but no output": lambda cells: cells[6].update(outputs=[], source="scores"),
    "executed with torch 1.0": edited(1, outputs=[printed("python 3.11, torch 1.0\n")]),
    "does not print results.environment_summary": edited(1, outputs=[printed("hello\n")]),
    "is not a title": edited(0, source="# 08 · A title\n\nYou will see it in 5 minutes."),
    '"You will see"': edited(0, source="# 07 · A title\n\nReading takes 5 minutes."),
    '"minutes"': edited(0, source="# 07 · A title\n\nYou will see a table."),
    "first code cell does not print the versions": edited(1, source="print('torch')"),
    "another run's parameters": lambda cells: cells.insert(
        3, executed("scheduler = 'local:2'", tags=["injected-parameters"])
    ),
    "not tagged parameters": lambda cells: cells[2].metadata.clear(),
    'no "## The complete run"': edited(3, source="## Results"),
    'followed by "## Your own run"': edited(11, source="## This run\n\nWith fewer items."),
    "outside of its section": lambda cells: cells.insert(13, executed("tables.complete('scores')", shown(**TABLE))),
    "says what follows from it": edited(10, source="### Next"),
    "saying that it is smaller": edited(11, source="## Your own run\n\nThe same again."),
    'no "## Exercises"': edited(15, source="**1.** Read."),
    "not its last section": edited(19, source="## More\n\n**3.** Invent."),
    "it has 2 exercises": without(18),
    "it has 4 exercises": lambda cells: (
        cells[15:15] == cells.insert(21, markdown("**4.** More.")) or cells.insert(22, cells[18])
    ),
    "does not stand under its exercise": edited(17, source="### Two"),
    "cell 16 is not folded": edited(16, source="It is."),
    "cell 18 is not folded": lambda cells: cells[18].metadata.pop("jupyter"),
    "cell 20 is not folded": lambda cells: cells[20].metadata.update(tags=["solution"]),
    "is no solution": lambda cells: cells[18].metadata.clear(),
    "does not assert": edited(21, source="assert profile"),
    "last cell does not assert": lambda cells: cells.append(markdown("The end.")),
    "no prose between three": without(5),
    "picture without a sentence": lambda cells: (
        cells[10].update(source="### Next") or cells[8].update(source="### Now")
    ),
    "a table of 40 rows": edited(12, outputs=[shown(text_html=MANY)]),
    "letters of 6 points": edited(12, source="axes.set_title('a', fontsize=6)", outputs=[]),
    "cell 4 has stored another table": edited(
        4, outputs=[shown(text_html=html("|arm|AS", "0|direct|0.250", "1|cfg|0.334"))]
    ),
    "cell 6 has stored another table": edited(6, outputs=[shown(text_html=html("arm|direct|cfg", "AS|0.25|0.3"))]),
    "cell 7 has stored another text": edited(7, outputs=[printed("0.34 at most\n")]),
    "cell 9 has stored another table or figure": edited(9, outputs=[shown(image_png="bm8=", text_plain="<IPython>")]),
    "shows others, which is not committed": edited(4, source="tables.complete('others')"),
    "depends on this run": edited(6, source="scores = tables.complete('scores')\nresults.run([])"),
    "cell 7 shows the complete run and depends on this run": edited(7, source="print(len(scores), results.run([]))"),
}


@pytest.mark.parametrize("message", FLAWS)
def test_every_flaw_of_a_notebook_is_seen(good, nothing_runs, message):
    FLAWS[message](good.cells)
    assert [fault for fault in faults(good) if message in fault]


@pytest.mark.parametrize("changed", ["mini/scores.csv", "as-mini.png"])
def test_a_committed_file_that_changes_is_seen_in_what_notebooks_have_stored_of_it(
    good, nothing_runs, tmp_path, changed
):
    content = (tmp_path / changed).read_bytes()
    (tmp_path / changed).write_bytes(content.replace(b"0.333333", b"0.343333").replace(b"picture", b"photo"))
    cells = [4, 6, 7] if changed.endswith("csv") else [9]
    found = list(committed.committed_faults(good))
    assert [int(fault.split()[1]) for fault in found] == cells
    assert all("has stored another" in fault for fault in found)


def test_notebook_03_refuses_more_items_than_there_are_before_any_training(nothing_runs):
    (path,) = find_notebooks(["03"])

    def run(names: dict) -> None:
        for cell in code_cells(path):
            exec(cell.source, names)
            if is_parameters(cell):
                names["artists"] = 25

    with pytest.raises(ValueError, match="style has 20 reported items: a number from 0 to 20, not 25"):
        run({})
    pd.reset_option("display")


@pytest.mark.parametrize("profile", ["quick", "smoke"])
def test_notebook_12_takes_the_runs_of_notebook_03(profile, runs, monkeypatch):
    """What notebook 12 samples from is generated by notebook 03, so that nothing is fine-tuned or sampled twice."""
    third, twelfth = find_notebooks(["03", "12"])
    ours = asked_of_the_runner(twelfth, parameters(twelfth, profile, {}), monkeypatch, only_first=True)
    theirs = asked_of_the_runner(third, parameters(third, profile, {}), monkeypatch)
    theirs = [spec for spec in theirs if isinstance(spec, Score)]
    assert {extract.rule for extract in ours} > {"paper"}
    assert {extract for extract in ours if extract.rule == "paper"} <= {spec.extract for spec in theirs}
    assert {extract.generate for extract in ours} <= {spec.extract.generate for spec in theirs}


def test_the_complete_run_of_notebook_12_has_the_first_items_of_notebook_03s():
    third, twelfth = (parameters(notebook, "mini", {}) for notebook in find_notebooks(["03", "12"]))
    for name in ("settings_name", "change"):
        assert third.get(name) == twelfth.get(name)
    for name in ("artists", "objects"):
        assert 3 <= twelfth[name] <= third[name]


@pytest.mark.parametrize("profile", ["quick", "smoke", "mini"])  # paper: the same lists of other numbers
def test_notebook_14_tries_ideas_on_nothing_that_it_reports(profile, runs, monkeypatch):
    """Its lists of items, and that what is reported is one of the ideas that were tried."""
    (path,) = find_notebooks(["14"])
    asked: dict[str, list] = {}

    def refuse(specs, *_, description, **__):
        asked[description] = list(specs)
        raise RuntimeError("nothing is run in this test")

    def nothing(spec):
        raise RuntimeError("nothing is done in this test")

    monkeypatch.setattr(results, "run", refuse)
    monkeypatch.setattr(results, "complete", nothing)
    names: dict = {}
    for cell in code_cells(path):
        with contextlib.suppress(RuntimeError, NameError):
            exec(cell.source, names)
        if is_parameters(cell):
            names |= parameters(path, profile, {})
    pd.reset_option("display")
    plt.close("all")

    def items(description: str) -> set[str]:
        models = {spec.extract.generate.model for spec in asked[description]}
        return {part.item for model in models for part in getattr(model, "model", model).training}

    reported = items("reported")
    for description in asked.keys() - {"reported"}:
        assert not items(description) & reported, description
        for item in items(description):
            assert item in datasets.names(datasets.kind(item), "development")
    assert asked.keys() == {"designs", "budgets", "development w'", "reported", "shares"}
    for item in reported:
        assert item in datasets.names(datasets.kind(item), "reported")
    designs = {spec.extract.refine for spec in asked["designs"]}
    assert {spec.extract.refine for spec in asked["reported"]} <= designs


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_can_run_on_a_cluster(path):
    (tagged,) = (cell for cell in code_cells(path) if is_parameters(cell))
    others = "\n".join(cell.source for cell in code_cells(path) if not is_parameters(cell))
    if "results.run(" in others:
        assert 'scheduler = ""' in tagged.source
        assert others.index("results.connect(scheduler)") < others.index("results.run(")


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_every_notebook_has_parameters_in_every_profile(path):
    for profile in profiles():
        assert profile == DEFAULTS or parameters(path, profile, {})["profile"] == profile


@pytest.mark.parametrize("file", PARAMETERS, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_every_file_of_parameters_belongs_to_a_notebook_that_takes_them(file):
    notebook = NOTEBOOKS / f"{file.stem}.ipynb"
    assert notebook in ALL
    assert parameters(notebook, file.parent.name, {})


def in_small(path: Path, profile: str, **changes: object) -> dict[str, object]:
    """A notebook's parameters in a profile, with the counts of smoke and these changes."""
    small = parameters(path, "smoke", {})
    if profile == "smoke":
        return small
    counts = {
        name: value for name, value in small.items() if name not in ("profile", "settings_name", "families", "change")
    }
    return parameters(path, profile, counts | {"change": FEW} | changes)


# 00 is about the mini models; 08 takes published checkpoints with the paper's parameters, or makes a zoo
RUNS = {f"{path.stem} smoke": (path, "smoke", {}) for path in ALL if path.name[:2] == NOT_BY_DEFAULT}
RUNS |= {f"{path.stem} paper": (path, "paper", {}) for path in EXPERIMENTS if path.name[:2] != "02"}
RUNS |= {f"{path.stem} zoo": (path, "paper", {"source": "zoo"}) for path in EXPERIMENTS if path.name[:2] == "08"}


@pytest.fixture(scope="session")
def area(of_all) -> Path:
    """One work area for all notebooks, as in a reproduction: what one has done, or is doing, the others find."""
    return of_all / "runs"


@pytest.fixture
def in_world(world, monkeypatch) -> dict[str, str]:
    """The paper's models and images are where they would be, in small."""
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    return world


def check_written(folder: Path, notebook: Path, profile: str) -> None:
    """A run has left tables and figures under the profile's name in `folder`, beside `notebook`, and nothing else."""
    left = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file() and file != notebook]
    assert left or notebook.name[:2] == "13"
    assert not [
        name
        for name in left
        if not name.startswith(f"data/results/{profile}/")
        and not (name.startswith("figures/") and name.endswith(f"-{profile}.png"))
    ]


@pytest.mark.long
@pytest.mark.parametrize(("path", "profile", "changes"), RUNS.values(), ids=RUNS)
def test_notebook_runs_and_leaves_the_files_of_its_profile_only(path, profile, changes, request, area, tmp_path):
    """With the paper's parameters on tiny random models of the real classes, all by the names that they have on the Hub."""
    if profile == "paper":
        request.getfixturevalue("in_world")
    prepared = tmp_path / path.name
    papermill.execute_notebook(path, prepared, in_small(path, profile, **changes), prepare_only=True)
    run_nbval("--nbval-lax", prepared, tmp_path, area)
    check_written(tmp_path, prepared, profile)


@pytest.mark.long
def test_notebook_02_runs_and_what_its_derivation_printed_is_exact(in_world, area, tmp_path):
    """As above, and all that stands before its own run is printed again, character for character."""
    (path,) = find_notebooks(["02"])
    notebook = nbformat.read(path, 4)
    (tagged,) = (n for n, cell in enumerate(notebook.cells) if cell.cell_type == "code" and is_parameters(cell))
    values = in_small(path, "paper")
    del values["points"], values["steps"]  # on which the derivation's numbers depend
    own = layout.sections(notebook).index(layout.OWN_RUN)
    shown = next(n for n, cell in enumerate(notebook.cells) if n > tagged and cell.cell_type == "code")  # the values
    for n, cell in enumerate(notebook.cells):
        if cell.cell_type == "code" and (n > own or n == shown):
            cell.source = "# NBVAL_IGNORE_OUTPUT\n" + cell.source
    changed = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    notebook.cells.insert(tagged + 1, nbformat.v4.new_code_cell("# NBVAL_IGNORE_OUTPUT\n" + changed))
    nbformat.write(notebook, prepared := tmp_path / path.name)
    run_nbval("--nbval", prepared, tmp_path, area)
    check_written(tmp_path, prepared, "paper")
