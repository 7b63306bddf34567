"""One environment in three files: pyproject.toml (ranges), requirements.txt and environment.yml (exact pins).

The three must agree, the running environment must be the pinned one, and `make` must never mistake half an installation
for a whole one.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
CONDA_NAMES = {"pytorch": "torch", "matplotlib-base": "matplotlib", "seaborn-base": "seaborn", "dask-core": "dask"}
PIN = re.compile(r"([A-Za-z0-9][\w.-]*?)\s*={1,2}\s*(\d[\w.]*)")

REQUIREMENTS = (ROOT / "requirements.txt").read_text(encoding="utf-8")
ENVIRONMENT = (ROOT / "environment.yml").read_text(encoding="utf-8")
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def collect(lines: list[str], rename: dict[str, str]) -> dict[str, str]:
    """Canonical name -> version of lines `name==version` or `name=version`.

    Raises ValueError for any other line and for a name that is there twice.
    """
    pins = {}
    for line in lines:
        match = PIN.fullmatch(line)
        if not match:
            raise ValueError(f"{line!r} is no exact pin: write name==version")
        name = canonicalize_name(rename.get(match[1], match[1]))
        if name in pins:
            raise ValueError(f"{name} is pinned twice, at {pins[name]} and at {match[2]}: keep one")
        pins[name] = match[2]
    return pins


def pip_pins(text: str) -> dict[str, str]:
    """Canonical name -> version of a requirements.txt whose every line is a comment, empty or `name==version`."""
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    loose = [line for line in lines if line and "==" not in line]
    if loose:
        raise ValueError(f"{loose[0]!r} is no exact pin: write name==version")
    return collect([line for line in lines if line], {})


def conda_pins(text: str) -> dict[str, str]:
    """Canonical PyPI name -> version of an environment.yml, its pip section included, python and pip left out."""
    entries = yaml.safe_load(text)["dependencies"]
    from_conda = [entry for entry in entries if isinstance(entry, str) and not re.match(r"(python|pip)(=|$)", entry)]
    from_pip = [line for entry in entries if isinstance(entry, dict) for line in entry["pip"]]
    return collect(from_conda + from_pip, CONDA_NAMES)


def declared(text: str) -> dict[str, SpecifierSet]:
    """Canonical name -> allowed versions of a pyproject.toml, all extras included."""
    project = tomllib.loads(text)["project"]
    extras = project.get("optional-dependencies", {}).values()
    requirements = [Requirement(line) for lines in (project["dependencies"], *extras) for line in lines]
    return {canonicalize_name(r.name): r.specifier for r in requirements}


def needed_by(names) -> set[str]:
    """Canonical names of everything that the installed packages `names` require directly, extras included."""
    return {canonicalize_name(Requirement(line).name) for name in names for line in metadata.requires(name) or []}


def disagreements(pip: dict[str, str], conda: dict[str, str], ranges: dict[str, SpecifierSet]) -> list[str]:
    """What is wrong between the three files, one sentence each; empty if they agree.

    A pin that pyproject does not name is allowed in both pinned files at once (see `test_further_pins`).
    """
    found = [f"{n} is in pyproject.toml but not pinned in requirements.txt" for n in ranges.keys() - pip.keys()]
    found += [f"{n} is pinned in requirements.txt but not in environment.yml" for n in pip.keys() - conda.keys()]
    found += [f"{n} is pinned in environment.yml but not in requirements.txt" for n in conda.keys() - pip.keys()]
    for name in pip.keys() & conda.keys():
        if Version(pip[name]) != Version(conda[name]):
            found.append(f"{name} is {pip[name]} in requirements.txt but {conda[name]} in environment.yml")
    for name in pip.keys() & ranges.keys():
        if pip[name] not in ranges[name]:
            found.append(f"{name} is pinned at {pip[name]}, which pyproject.toml's {ranges[name]} excludes")
    return sorted(found)


def strangers(pip: dict[str, str]) -> list[str]:
    """Where the running environment is not the pinned one, one sentence each. A build suffix (+cpu) does not count."""
    found = []
    for name, wanted in pip.items():
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            found.append(f"{name}=={wanted} is not installed")
            continue
        if installed not in SpecifierSet(f"=={wanted}", prereleases=True):
            found.append(f"{name} is installed as {installed}, pinned is {wanted}")
    return found


def imported(folder: Path) -> set[str]:
    """Top-level modules that the Python files below `folder` import absolutely, the standard library left out."""
    names = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names)


# the three files and the running environment


def test_the_three_files_agree():
    assert disagreements(pip_pins(REQUIREMENTS), conda_pins(ENVIRONMENT), declared(PROJECT)) == []


def test_further_pins_are_needed_by_declared_packages():
    ranges = declared(PROJECT)
    assert pip_pins(REQUIREMENTS).keys() - ranges.keys() <= needed_by(ranges)


def test_environment_yml_uses_conda_forge_and_the_oldest_python_of_pyproject():
    environment = yaml.safe_load(ENVIRONMENT)
    assert environment["channels"] == ["conda-forge"]
    python = next(e for e in environment["dependencies"] if isinstance(e, str) and e.startswith("python="))
    assert tomllib.loads(PROJECT)["project"]["requires-python"] == ">=" + python.partition("=")[2]


def test_the_running_environment_is_the_pinned_one():
    wrong = strangers(pip_pins(REQUIREMENTS))
    assert not wrong, "; ".join(wrong) + ". Bring the environment up to date: make test"


def test_everything_imported_is_declared():
    ranges, owners = declared(PROJECT), metadata.packages_distributions()
    local = {"fx", "tests", "conftest"} | {
        path.stem for name in ("tests", "docs") for path in (ROOT / name).glob("*.py")
    }
    local |= {"ldm", "open_clip", "lycoris"}  # of the make.py of fixtures alone, which say how they are installed
    for module in sorted((imported(ROOT / "fx") | imported(ROOT / "tests")) - local):
        owner = {canonicalize_name(name) for name in owners.get(module, [])}
        assert owner & ranges.keys(), f"{module} is imported but pyproject.toml does not name its package {owner}"


def test_citation_has_the_version_and_licence_of_pyproject():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads(PROJECT)["project"]
    assert (str(citation["version"]), citation["license"]) == (project["version"], project["license"])


def test_citation_and_readmes_name_the_paper_as_published():
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["preferred-citation"]
    assert (paper["type"], paper["year"]) == ("conference-paper", 2025)
    where = f"{paper['publisher']['name']} {paper['volume']}:{paper['start']}–{paper['end']}"
    for file in ("README.md", "data/paper/README.md"):
        text = " ".join((ROOT / file).read_text(encoding="utf-8").split())
        for part in (paper["title"], where, paper["identifiers"][0]["value"]):
            assert part in text, (file, part)


# the checks themselves, on bad input


@pytest.mark.parametrize("name", sorted(pip_pins(REQUIREMENTS)))
def test_every_single_change_of_a_pin_is_noticed(name):
    pip, conda, ranges = pip_pins(REQUIREMENTS), conda_pins(ENVIRONMENT), declared(PROJECT)
    without = {n: v for n, v in pip.items() if n != name}
    assert any(name in line for line in disagreements(without, conda, ranges))
    assert any(name in line for line in disagreements(pip, {n: conda[n] for n in without}, ranges))
    assert any(name in line for line in disagreements(pip | {name: "999.1"}, conda, ranges))
    assert any(name in line for line in disagreements(pip, conda | {name: "999.1"}, ranges))
    assert any(name in line for line in strangers({name: "999.1"}))


def test_a_pin_outside_the_declared_range_is_noticed():
    both = {"numpy": "1.9"}
    assert disagreements(both, both, {"numpy": SpecifierSet(">=2")}) == [
        "numpy is pinned at 1.9, which pyproject.toml's >=2 excludes"
    ]
    assert disagreements(both, both, {"numpy": SpecifierSet(">=1.9")}) == []


def test_a_declared_package_without_a_pin_is_noticed():
    assert disagreements({}, {}, {"numpy": SpecifierSet()}) == [
        "numpy is in pyproject.toml but not pinned in requirements.txt"
    ]


def test_a_package_that_is_not_installed_is_noticed():
    assert strangers({"fx-no-such-package": "1.0"}) == ["fx-no-such-package==1.0 is not installed"]


@pytest.mark.parametrize("line", ["numpy", "numpy>=2", "numpy=2.4", "numpy==2.*", "-r other.txt", "./numpy.whl"])
def test_a_requirement_that_is_no_exact_pin_is_refused(line):
    with pytest.raises(ValueError, match="no exact pin"):
        pip_pins(f"scipy==1.17.1\n{line}  # why\n")


def test_a_name_pinned_twice_is_refused_however_it_is_spelt():
    with pytest.raises(ValueError, match="pinned twice"):
        pip_pins("resvg-py==0.5.0\nresvg_py==0.4.0\n")
    with pytest.raises(ValueError, match="pinned twice"):
        conda_pins("dependencies: [pytorch=2.1, {pip: [torch==2.1]}]")


def test_conda_names_and_the_pip_section_are_read():
    text = "dependencies: [python=3.11, pip, pytorch=2.14.1, python-dateutil=2.9, {pip: [Resvg_Py==0.5.0]}]"
    assert conda_pins(text) == {"torch": "2.14.1", "python-dateutil": "2.9", "resvg-py": "0.5.0"}


def test_imports_are_found_wherever_they_stand(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.py").write_text("import os, a.b\ndef f():\n    from c.d import e\n    from . import g\n")
    assert imported(tmp_path) == {"a", "c"}


# the environment that `make` sets up, with an interpreter that only writes down what it is asked to do

FAKE_PYTHON = """#!/bin/sh
echo "$@" >> {log}
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip") if [ "$3" = install ] && [ -e {broken} ]; then exit 1; fi ;;
esac
"""


@pytest.fixture
def make(tmp_path):
    """A function that runs make on a target in a bare copy and returns (exit status, what Python was asked to do)."""
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    log = tmp_path / "log"
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python3-fake"
    python.write_text(FAKE_PYTHON.format(log=log, broken=tmp_path / "broken"))
    python.chmod(0o755)

    def run(*arguments: str) -> tuple[int, list[str]]:
        log.write_text("")
        command = ["make", f"PYTHON3={python}", *arguments]
        foreign = {"FX_RUNS", "MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS", "WORKERS"}  # of a make that runs us
        variables = {k: v for k, v in os.environ.items() if k not in foreign}
        status = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, check=False).returncode
        return status, log.read_text().splitlines()

    return run


TEST = "-m pytest -n 2 --dist loadgroup"
INSTALL = ["-m pip install -r requirements.txt", "-m pip install --no-deps -e ."]


def test_make_installs_once_and_later_commands_reuse_it(make):
    status, calls = make()
    assert status == 0
    assert calls[-3:] == [*INSTALL, "-m fx.demo"]
    assert make() == (0, ["-m fx.demo"])
    assert make("test") == (0, [TEST])
    assert make("test", "WORKERS=3") == (0, [TEST.replace("2", "3")])
    assert make("reproduce") == (0, ["-m fx.reproduce --scheduler local:2"])
    assert make("reproduce", "WORKERS=3") == (0, ["-m fx.reproduce --scheduler local:3"])
    assert make("lab") == (0, ["-m jupyterlab notebooks"])
    assert make("site") == (0, ["-m fx.site"])
    assert make("setup") == (0, [])


@pytest.mark.parametrize("name", ["requirements.txt", "pyproject.toml"])
def test_make_installs_again_when_the_dependencies_changed(make, tmp_path, name):
    make("test")
    newer = (tmp_path / ".venv" / ".installed").stat().st_mtime + 1
    os.utime(tmp_path / name, (newer, newer))
    status, calls = make("test")
    assert status == 0
    assert calls[-3:] == [*INSTALL, TEST]
    assert not any(call.startswith("-m venv") for call in calls)


def test_a_failed_installation_is_taken_up_again(make, tmp_path):
    (tmp_path / "broken").touch()
    status, calls = make("test")
    assert status != 0
    assert TEST not in calls
    assert not (tmp_path / ".venv" / ".installed").exists()
    (tmp_path / "broken").unlink()
    status, calls = make("test")
    assert status == 0
    assert calls[-3:] == [*INSTALL, TEST]


def test_clean_env_removes_the_environment_only(make, tmp_path):
    make("test")
    assert make("clean-env")[0] == 0
    assert not (tmp_path / ".venv").exists()
    assert (tmp_path / "requirements.txt").exists()


def docker_steps() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile, (word, rest) each."""
    text = (ROOT / ".devcontainer/Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(line.split(" ", 1)) for line in lines]


def test_the_steps_of_the_dockerfile_set_up_the_environment_in_a_clean_folder(make, tmp_path):
    """With an interpreter that only writes down what it is asked; no image was built, there is no Docker here.

    What is copied before the installation must be all that it reads.
    """
    folder, steps = tmp_path / "clean", docker_steps()
    folder.mkdir()
    until = next(i for i, (word, rest) in enumerate(steps) if word == "RUN" and rest.startswith("make"))
    for word, rest in steps[:until]:
        if word == "COPY":
            *names, target = rest.split()
            for name in names:
                copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
                copy(ROOT / name, folder / target / ("" if copy is shutil.copytree else name))
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    for name in (project["readme"], *project["license-files"], "fx/__init__.py"):
        assert (folder / name).is_file(), f"pip install -e . reads {name}"
    status, calls = make("-C", str(folder), steps[until][1].removeprefix("make "))
    assert status == 0
    assert calls[-2:] == INSTALL
    command = ast.literal_eval(steps[-1][1])
    assert (steps[-1][0], command[:4]) == ("CMD", [".venv/bin/python", "-m", "jupyterlab", "notebooks"])
    assert (folder / command[0]).is_file()


def test_the_containers_have_the_oldest_python_of_pyproject_and_call_targets_that_there_are():
    container = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())
    images = [container["image"], next(rest for word, rest in docker_steps() if word == "FROM")]
    oldest = tomllib.loads(PROJECT)["project"]["requires-python"].removeprefix(">=")
    assert all(image.startswith(f"python:{oldest}-") for image in images)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert container["onCreateCommand"].removeprefix("make ") in targets
