"""fx.reproduce: which notebooks run with which parameters, what is refused beforehand, and one toy notebook run."""

import json
import os
import re
import runpy
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import nbformat
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from fx import reproduce

PARAMETERS = "artists = 3\nlearning_rate = 1.0e-3\nmethod = 'lora'\nquick = False"
WRITES_ITS_PARAMETERS = """\
import json, os
print(json.dumps({"artists": artists, "rate": learning_rate, "method": method, "quick": quick, "in": os.getcwd()}))
assert artists != 13, "thirteen is refused"
"""


def add_notebook(folder: Path, name: str) -> Path:
    """A notebook with a `parameters` cell that prints its parameters and its working directory."""
    cells = [
        new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
        new_code_cell(WRITES_ITS_PARAMETERS),
    ]
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), path := folder / name)
    return path


@pytest.fixture
def notebooks(tmp_path, monkeypatch) -> Path:
    """Notebooks 00, 01 and 03, parameters of the smoke profile for 01 and 03 and of mini for 03; runs/ beside them."""
    folder = tmp_path / "notebooks"
    for profile in ("mini", "smoke"):
        (folder / "params" / profile).mkdir(parents=True)
    for name in ("03-extraction.ipynb", "00-mini-models.ipynb", "01-fine-tuning.ipynb"):
        add_notebook(folder, name)
    (folder / "drawing.ipynb").write_text("no number, no part of the reproduction")
    (folder / "params/smoke/01-fine-tuning.yaml").write_text("artists: 1\nlearning_rate: 2.0e-4\nquick: true\n")
    (folder / "params/smoke/03-extraction.yaml").write_text("# nothing to change\n")
    (folder / "params/mini/03-extraction.yaml").write_text("artists: 2\n")
    monkeypatch.setattr(reproduce, "NOTEBOOKS", folder)
    monkeypatch.setattr(reproduce, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(reproduce, "TABLES", tmp_path / "results")
    return folder


@pytest.fixture
def executed(monkeypatch) -> list[tuple]:
    """What papermill is asked to run, without running it."""
    calls = []
    monkeypatch.setattr(papermill, "execute_notebook", lambda *args, **options: calls.append((*args, options)))
    return calls


def names(paths: list[Path]) -> list[str]:
    return [path.name[:2] for path in paths]


def test_find_notebooks_takes_all_but_00_in_order_by_default(notebooks):
    assert names(reproduce.find_notebooks([])) == ["01", "03"]
    assert all(path.is_file() for path in reproduce.find_notebooks([]))


def test_find_notebooks_takes_the_asked_ones(notebooks):
    assert names(reproduce.find_notebooks(["3", "00"])) == ["03", "00"]


def test_find_notebooks_names_the_unknown_number_and_those_there_are(notebooks):
    with pytest.raises(ValueError, match=r"no notebook 04, 98: there are 00, 01, 03$"):
        reproduce.find_notebooks(["01", "04", "98"])


def test_the_shipped_notebooks_have_one_number_each():
    numbers = [path.name[:2] for path in reproduce.NOTEBOOKS.glob("*.ipynb")]
    assert all(number.isdigit() for number in numbers)
    assert len(set(numbers)) == len(numbers)
    assert len(reproduce.find_notebooks([])) == len(set(numbers) - {"00"})


def test_parameters_are_those_of_the_profile_with_the_right_types(notebooks):
    given = reproduce.parameters(notebooks / "01-fine-tuning.ipynb", "smoke", {})
    assert given == {"artists": 1, "learning_rate": 2.0e-4, "quick": True}
    assert [type(value) for value in given.values()] == [int, float, bool]


def test_parameters_of_the_command_line_win(notebooks):
    given = reproduce.parameters(notebooks / "01-fine-tuning.ipynb", "smoke", {"artists": 7, "method": "dreambooth"})
    assert given == {"artists": 7, "learning_rate": 2.0e-4, "quick": True, "method": "dreambooth"}


def test_quick_needs_no_file_and_reads_one_that_is_there(notebooks):
    assert reproduce.DEFAULTS == "quick"
    assert reproduce.parameters(notebooks / "03-extraction.ipynb", "quick", {}) == {}
    (notebooks / "params/quick").mkdir()
    (notebooks / "params/quick/03-extraction.yaml").write_text("artists: 5\n")
    assert reproduce.parameters(notebooks / "03-extraction.ipynb", "quick", {}) == {"artists": 5}
    assert reproduce.parameters(notebooks / "01-fine-tuning.ipynb", "quick", {}) == {}


def test_profiles_are_quick_and_the_folders_that_hold_parameters(notebooks):
    assert reproduce.profiles() == ["quick", "mini", "smoke"]
    (notebooks / "params/empty").mkdir()
    (notebooks / "params/quick").mkdir()
    (notebooks / "params/quick/03-extraction.yaml").write_text("artists: 5\n")
    (notebooks / "params/paper").mkdir()
    (notebooks / "params/paper/01-fine-tuning.yaml").touch()
    assert reproduce.profiles() == ["quick", "mini", "paper", "smoke"]


def test_quick_is_the_default_and_goes_into_its_own_folder(notebooks, executed, tmp_path):
    reproduce.main([])
    assert [Path(call[1]) for call in executed] == [
        tmp_path / "runs/executed/quick" / name for name in ("01-fine-tuning.ipynb", "03-extraction.ipynb")
    ]
    assert [call[2] for call in executed] == [{}, {}]


def test_a_file_without_entries_changes_nothing(notebooks):
    assert reproduce.parameters(notebooks / "03-extraction.ipynb", "smoke", {"artists": 4}) == {"artists": 4}


def test_another_profile_needs_a_file_for_the_notebook(notebooks):
    with pytest.raises(ValueError, match=r"the profile smoke has no parameters for 00-mini-models\.ipynb"):
        reproduce.parameters(notebooks / "00-mini-models.ipynb", "smoke", {})
    with pytest.raises(ValueError, match=r"the profile mini has no parameters for 01-fine-tuning\.ipynb"):
        reproduce.parameters(notebooks / "01-fine-tuning.ipynb", "mini", {})
    assert reproduce.parameters(notebooks / "03-extraction.ipynb", "mini", {}) == {"artists": 2}


def test_an_unknown_profile_is_named_with_the_known_ones(notebooks):
    with pytest.raises(ValueError, match=r"unknown profile 'fast': choose from quick, mini, smoke$"):
        reproduce.parameters(notebooks / "01-fine-tuning.ipynb", "fast", {})


def test_an_unknown_parameter_is_named_with_the_known_ones(notebooks):
    with pytest.raises(ValueError, match="has no parameter artist, step: its parameters are artists, learning_rate, "):
        reproduce.parameters(notebooks / "01-fine-tuning.ipynb", "quick", {"step": 1, "artist": 2, "artists": 3})
    (notebooks / "params/smoke/01-fine-tuning.yaml").write_text("artits: 1\n")
    with pytest.raises(ValueError, match="no parameter artits"):
        reproduce.parameters(notebooks / "01-fine-tuning.ipynb", "smoke", {})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("n=3", 3), ("n=-2", -2), ("n=1.0e-5", 1.0e-5), ("n=0.5", 0.5), ("n=true", True), ("n=False", False)),
        *(("n=lora", "lora"), ("n='3'", "3"), ("n=a=b", "a=b"), ("n=style/zazou", "style/zazou")),
    ],
)
def test_assignment_reads_the_value_as_yaml(text, value):
    name, read = reproduce.assignment(text)
    assert (name, read, type(read)) == ("n", value, type(value))


@pytest.mark.parametrize(
    "text", ["n=010", "n=1:30", "n=1_000", "n=0x10", "n=0b1", "n=.inf", "n=.nan", "n=-010", "n=1:30.5"]
)
def test_assignment_refuses_numbers_that_yaml_reads_as_others(text):
    """YAML 1.1's octal, base-60, underscored, hexadecimal and binary numbers: 010 is 8, 1:30 is 90."""
    with pytest.raises(ArgumentTypeError, match=f"YAML reads '{text}' as .*: write a plain decimal number"):
        reproduce.assignment(text)


def test_assignment_refuses_a_date_that_there_is_not():
    with pytest.raises(ArgumentTypeError, match="'n=2026-13-01' is not YAML"):
        reproduce.assignment("n=2026-13-01")


@pytest.mark.parametrize("text", ["artists", "=3", "two words=3", "1st=3", "n=[1", "n={a", "n=[1, 2]", "n=null"])
def test_assignment_refuses_anything_else_and_repeats_it(text):
    with pytest.raises(ArgumentTypeError) as error:
        reproduce.assignment(text)
    assert repr(text) in str(error.value)


def test_main_runs_the_notebooks_in_order_into_the_folder_of_the_profile(notebooks, executed, tmp_path):
    reproduce.main(["--profile", "smoke", "-p", "artists=9", "-p", "method=dreambooth"])
    folder = tmp_path / "runs/executed/smoke"
    assert [Path(call[0]).name for call in executed] == ["01-fine-tuning.ipynb", "03-extraction.ipynb"]
    assert [Path(call[1]) for call in executed] == [folder / Path(call[0]).name for call in executed]
    assert executed[0][2] == {"artists": 9, "learning_rate": 2.0e-4, "quick": True, "method": "dreambooth"}
    assert executed[1][2] == {"artists": 9, "method": "dreambooth"}
    assert folder.is_dir()


def test_a_scheduler_goes_to_the_notebooks_that_take_one(notebooks, executed):
    notebook = nbformat.read(notebooks / "03-extraction.ipynb", 4)
    notebook.cells[0].source += '\nscheduler = ""'
    nbformat.write(notebook, notebooks / "03-extraction.ipynb")
    reproduce.main(["--scheduler", "local:2", "-p", "artists=4"])
    assert [call[2] for call in executed] == [
        {"artists": 4} | (reproduce.parameters(notebooks / "01-fine-tuning.ipynb", "quick", {})),
        {"artists": 4, "scheduler": "local:2"},
    ]


def test_the_file_of_a_scheduler_is_found_from_the_notebooks_own_folder(notebooks, executed, tmp_path, monkeypatch):
    notebook = nbformat.read(notebooks / "03-extraction.ipynb", 4)
    notebook.cells[0].source += '\nscheduler = ""'
    nbformat.write(notebook, notebooks / "03-extraction.ipynb")
    (tmp_path / "dask.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    reproduce.main(["03", "--scheduler", "dask.json"])
    assert executed[0][2]["scheduler"] == str(tmp_path / "dask.json")


def test_main_ends_with_the_summary_of_the_profile_where_there_are_tables(notebooks, executed, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(reproduce.summary, "write", lambda profile: asked.append(profile) or [tmp_path / "summary.md"])
    reproduce.main(["--profile", "smoke"])
    assert asked == []
    (tmp_path / "results" / "smoke").mkdir(parents=True)
    reproduce.main(["--profile", "smoke"])
    assert asked == ["smoke"]


@pytest.mark.parametrize("words", [["-p", "artists=3"], ["--profile", "smoke"]])
def test_in_place_takes_no_parameters_which_would_stay_in_the_notebook(notebooks, executed, words):
    with pytest.raises(
        ValueError, match=r"--in-place stores what .* with its own parameters, so artists.* cannot be given"
    ):
        reproduce.main(["01", "--in-place", *words])
    assert executed == []


def test_main_in_place_writes_over_the_notebook_itself_and_tidies_it(notebooks, executed, monkeypatch):
    tidied = []
    monkeypatch.setattr(reproduce, "tidy", tidied.append)
    reproduce.main(["03"])
    assert (tidied, executed.pop()[1].name) == ([], "03-extraction.ipynb")
    reproduce.main(["01", "--in-place"])
    assert tidied == [notebooks / "01-fine-tuning.ipynb"]
    ((source, target, values, _),) = executed
    assert Path(source) == Path(target) == notebooks / "01-fine-tuning.ipynb"
    assert values == {}


def test_tidy_keeps_outputs_and_forgets_where_and_when(tmp_path):
    cell = nbformat.v4.new_code_cell("print(1)", execution_count=1)
    cell.outputs = [nbformat.v4.new_output("stream", name=name, text=name) for name in ("stdout", "stderr")]
    cell.metadata |= {"papermill": {"duration": 1.0}, "execution": {"iopub.status.busy": "2026-01-01"}}
    cell.metadata["tags"] = ["parameters"]
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"papermill": {"input_path": "/somewhere"}})
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, tmp_path / "a.ipynb")
    reproduce.tidy(tmp_path / "a.ipynb")
    found = nbformat.read(tmp_path / "a.ipynb", 4)
    assert [output.text for output in found.cells[0].outputs] == ["stdout"]
    assert found.cells[0].metadata == {"tags": ["parameters"]}
    assert found.cells[0].execution_count == 1
    assert set(found.metadata) == {"kernelspec"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["01", "05"], "no notebook 05"),
        (["01", ""], "no notebook ''"),
        (["01", "--scheduler", "locl:4"], "scheduler 'locl:4': "),
        (["01", "--scheduler", "none.json"], "no scheduler file none"),
        (["--profile", "fast"], "unknown profile 'fast'"),
        (["00", "--profile", "smoke"], "smoke has no parameters"),
        (["01", "03", "-p", "w=3"], "no parameter w"),
    ],
)
def test_main_refuses_what_is_wrong_before_anything_runs(notebooks, executed, words, message):
    (notebooks / "params/smoke/03-extraction.yaml").write_text("unheard_of: 1\n")
    with pytest.raises(ValueError, match=message):
        reproduce.main(words)
    with pytest.raises(ValueError, match=r"03-extraction\.ipynb has no parameter unheard_of"):
        reproduce.main(["--profile", "smoke"])  # 01 comes first and is in order
    assert executed == []


def test_main_refuses_a_malformed_parameter_with_usage(notebooks, executed, capsys):
    with pytest.raises(SystemExit) as error:
        reproduce.main(["-p", "artists"])
    assert error.value.code == 2
    assert "'artists' is not of the form name=value" in capsys.readouterr().err
    assert executed == []


def test_a_notebook_runs_end_to_end_with_its_parameters_in_its_own_folder(notebooks, tmp_path, capsys):
    reproduce.main(["01", "--profile", "smoke", "-p", "method=dreambooth"])
    path = tmp_path / "runs/executed/smoke/01-fine-tuning.ipynb"
    printed = nbformat.read(path, as_version=4).cells[-1].outputs[0].text
    assert json.loads(printed) == {
        **{"artists": 1, "rate": 2.0e-4, "method": "dreambooth", "quick": True},
        "in": str(notebooks),
    }
    assert f"01-fine-tuning.ipynb -> {path}" in capsys.readouterr().out
    source = nbformat.read(notebooks / "01-fine-tuning.ipynb", as_version=4)
    assert not any(cell.outputs for cell in source.cells), "the notebook itself stays as it is"


@pytest.mark.parametrize("spec", [{"name": "conda-env-fx-py", "display_name": "x", "language": "python"}, None])
def test_a_notebook_runs_on_this_python_whatever_kernel_is_noted_in_it(notebooks, tmp_path, monkeypatch, spec):
    """Also where the user has a kernel named python3 that is another Python."""
    path = notebooks / "01-fine-tuning.ipynb"
    notebook = nbformat.read(path, 4)
    notebook.cells[-1].source = "import sys; print(sys.executable)"
    notebook.metadata = {"kernelspec": spec} if spec else {}
    nbformat.write(notebook, path)
    theirs = tmp_path / "jupyter/kernels/python3"
    theirs.mkdir(parents=True)
    spec = {"argv": ["/nowhere/python", "-m", "ipykernel_launcher", "-f", "{connection_file}"], "display_name": "x"}
    (theirs / "kernel.json").write_text(json.dumps(spec | {"language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    reproduce.main(["01", "--profile", "smoke"])
    printed = nbformat.read(tmp_path / "runs/executed/smoke/01-fine-tuning.ipynb", 4).cells[-1].outputs[0].text
    assert printed.strip() == sys.executable
    assert os.environ["JUPYTER_PATH"] == str(tmp_path / "jupyter")


def test_a_file_that_is_no_notebook_is_named(notebooks):
    (notebooks / "03-extraction.ipynb").write_text("{}")
    with pytest.raises(ValueError, match=r"03-extraction\.ipynb is no notebook"):
        reproduce.parameters(notebooks / "03-extraction.ipynb", "mini", {})


def test_a_failing_notebook_stops_the_run(notebooks, tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="thirteen is refused"):
        reproduce.main(["01", "03", "-p", "artists=13"])
    assert (tmp_path / "runs/executed/quick/01-fine-tuning.ipynb").exists()
    assert not (tmp_path / "runs/executed/quick/03-extraction.ipynb").exists()


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_command_ends_with_one_line_for_a_wrong_number(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fx.reproduce", "98"])
    with pytest.raises(SystemExit) as error:
        runpy.run_module("fx.reproduce", run_name="__main__")
    assert error.value.code.startswith("fx.reproduce: no notebook 98: there are")
    assert "\n" not in error.value.code


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_an_interrupted_command_ends_with_one_line_that_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["fx.reproduce", "02", "--profile", "smoke"])
    monkeypatch.setattr("argparse.ArgumentParser.parse_args", interrupted)
    with pytest.raises(SystemExit) as error:
        runpy.run_module("fx.reproduce", run_name="__main__")
    assert error.value.code == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert "interrupted" in line
    assert "the same command goes on" in line


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("learning_rate", "1e-5", "float values such as 0.001"),
        ("artists", 2.0, "int values such as 3"),
        ("artists", True, "int values such as 3"),
        ("quick", 1, "bool values such as False"),
        ("method", 5, "str values such as 'lora'"),
    ],
)
def test_parameters_refuse_a_value_of_another_type(notebooks, name, value, wanted):
    with pytest.raises(ValueError, match=f"{name} takes {wanted}, not {value!r}"):
        reproduce.parameters(notebooks / "01-fine-tuning.ipynb", "quick", {name: value})


def test_parameters_take_a_whole_number_for_a_float(notebooks):
    given = reproduce.parameters(notebooks / "01-fine-tuning.ipynb", "quick", {"learning_rate": 1})
    assert given == {"learning_rate": 1}


@pytest.fixture
def with_settings(notebooks) -> Path:
    """Notebook 03 takes its models from a section of the settings, as the real ones do."""
    source = 'settings_name = "mini-sd"\nfamilies = ""\nchange = ""\nartists = 1'
    cells = [new_code_cell(source, metadata={"tags": ["parameters"]}), new_code_cell("import os\nprint(os.environ)")]
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), notebooks / "03-extraction.ipynb")
    (notebooks / "params/paper").mkdir()
    (notebooks / "params/paper/03-extraction.yaml").write_text("settings_name: paper\nfamilies: paper paper-sdxl\n")
    return notebooks


def test_what_a_run_needs_and_lacks_is_said_before_anything_starts(
    with_settings, executed, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(reproduce.needs.originals, "EXTERNAL", tmp_path / "none")
    with pytest.raises(FileNotFoundError) as caught:
        reproduce.main(["03", "--profile", "paper"])
    assert not executed
    message = str(caught.value)
    assert message.startswith("7 things are not here that this run needs:\n")
    for part in (
        "CompVis/stable-diffusion-v1-4 (base model, 4.3 GB, CreativeML OpenRAIL-M)",
        "25.4 GB",
        str(tmp_path / "none"),
    ):
        assert part in message
    assert "sscd_disc_mixup.torchscript.pt.sha256" in message
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_says_it_and_ends(with_settings, executed, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "estimated", lambda given: "estimates")
    reproduce.main(["03", "--profile", "paper", "--dry-run", "-p", "artists=7"])
    said = capsys.readouterr().out
    assert "03-extraction.ipynb: settings_name='paper', families='paper paper-sdxl', artists=7" in said
    assert said.count("stabilityai/stable-diffusion-xl-base-1.0") >= 2
    assert "get dreambooth: " in said
    reproduce.main(["03", "--profile", "quick", "--dry-run"])
    assert capsys.readouterr().out.endswith(
        "03-extraction.ipynb: as it stands\nneeds nothing that is not here\nestimates\n"
    )
    assert not executed
    assert not (tmp_path / "runs").exists()


def test_the_network_is_asked_only_on_request(with_settings, executed, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(reproduce.needs, "check", lambda found: asked.append([need.name for need in found]))
    asked = []
    reproduce.main(["03", "--profile", "paper", "--fetch"])
    assert "HF_HUB_OFFLINE" not in os.environ
    reproduce.main(["03", "--profile", "paper"])
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    fetched, all_needs = asked
    assert set(fetched) == {"sscd_disc_mixup.torchscript.pt", "wikiart", "dreambooth"}
    assert "CompVis/stable-diffusion-v1-4" in all_needs


def test_what_is_to_be_dropped_is_told_to_the_notebooks(notebooks, monkeypatch):
    monkeypatch.setenv("FX_DROP", "")
    reproduce.main(["01", "--drop", "finetune"])
    assert os.environ["FX_DROP"] == "finetune"


def test_a_dry_run_estimates_each_notebook_and_names_one_that_cannot_be_planned(with_settings, monkeypatch):
    def steps(notebook, values):
        if notebook.name.startswith("03"):
            raise RuntimeError("03-extraction.ipynb could not be planned: why")
        return [reproduce.plan.Planned("generate/a", False), reproduce.plan.Planned("generate/b", True)]

    monkeypatch.setattr(reproduce.plan, "steps", steps)
    text = reproduce.estimated({path: {} for path in reproduce.find_notebooks(["01", "03"])})
    assert text.startswith("03-extraction.ipynb could not be planned: why\n")
    assert re.search(r"01-fine-tuning\.ipynb +2 +1 +0\.0 +0\.0", text)
