"""Run the notebooks in order by papermill and so regenerate every table and figure.

python -m fx.reproduce                        # all but 00 as they stand: the profile quick, into runs/executed/quick
python -m fx.reproduce --profile mini         # the complete run, whose tables and figures the repository shows
python -m fx.reproduce 03 -p artists=5 -p change="sampling_steps=25"
python -m fx.reproduce --profile paper --dry-run   # what would run, what it needs, hours and gigabytes; nothing else
"""

import argparse
import ast
import os
import re
import reprlib
from pathlib import Path

import huggingface_hub
import nbformat
import papermill
import torch
import yaml
from tqdm import tqdm

from fx import command, kernel, needs, plan, results, summary
from fx.paths import NOTEBOOKS, TABLES
from fx.results import RUNS

DEFAULTS = "quick"  # the profile that the notebooks' own defaults are
DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9]*|[0-9]*\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?")
NOT_BY_DEFAULT = "00"  # trains the shipped models: hours


def profiles() -> list[str]:
    """The parameter sets there are: quick, the notebooks' own defaults, and the folders of notebooks/params."""
    return list(dict.fromkeys([DEFAULTS, *sorted(file.parent.name for file in NOTEBOOKS.glob("params/*/*.yaml"))]))


def find_notebooks(numbers: list[str]) -> list[Path]:
    """Notebook files of the given numbers ("03" or "3"), or all but 00, in order; ValueError for one that is none."""
    files = {path.name[:2]: path for path in sorted(NOTEBOOKS.glob("[0-9][0-9]*.ipynb"))}
    numbers = [number.zfill(2) if number else "''" for number in numbers]
    if unknown := [number for number in numbers if number not in files]:
        raise ValueError(f"no notebook {', '.join(unknown)}: there are {', '.join(files)}")
    return [files[number] for number in numbers] or [path for key, path in files.items() if key != NOT_BY_DEFAULT]


def parameters(notebook: Path, profile: str, extra: dict[str, object]) -> dict[str, object]:
    """What papermill injects: params/<profile>/<notebook>.yaml, then `extra`.

    ValueError for an unknown profile, a profile without a file for this notebook (quick needs none), any name that the
    notebook's parameters cell does not know, and a value of another type than the one it has there.
    """
    if profile not in profiles():
        raise ValueError(f"unknown profile {profile!r}: choose from {', '.join(profiles())}")
    file = NOTEBOOKS / "params" / profile / f"{notebook.stem}.yaml"
    if profile != DEFAULTS and not file.exists():
        raise ValueError(f"the profile {profile} has no parameters for {notebook.name}")
    given = {**((yaml.safe_load(file.read_text()) if file.exists() else None) or {}), **extra}
    known = papermill.inspect_notebook(kernel.noted(notebook))
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(
            f"{notebook.name} has no parameter {', '.join(unknown)}: its parameters are {', '.join(known)}. "
            "Name the notebook that has it: fx.reproduce 03 -p artists=20"
        )
    for name, value in given.items():
        default = ast.literal_eval(known[name]["default"])
        if type(value) is not type(default) and (type(value), type(default)) != (int, float):
            hint = " (YAML reads 1e-3 as text: write 1.0e-3)" if isinstance(default, float) else ""
            raise ValueError(
                f"{notebook.name}: {name} takes {type(default).__name__} values such as {default!r}, "
                f"not {reprlib.repr(value)}{hint}"
            )
    return given


def assignment(text: str) -> tuple[str, object]:
    """ "name=value" with the value read as YAML; argparse error for anything else, and for a number that is not decimal.

    YAML 1.1 reads 010 as 8, 1:30 as 90 and 1_0 as 10.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form name=value")
    try:
        read = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date such as 2026-13-01
        raise argparse.ArgumentTypeError(f"the value of {reprlib.repr(text)} is not YAML") from None
    if not isinstance(read, str | int | float):
        raise argparse.ArgumentTypeError(
            f"{reprlib.repr(text)} is no number, no text and neither true nor false (an empty text is '')"
        )
    if type(read) in (int, float) and not DECIMAL.fullmatch(value.strip()):
        raise argparse.ArgumentTypeError(
            f"YAML reads {text!r} as {read}: write a plain decimal number, or text in quotes"
        )
    return name, read


def main(words: list[str] | None = None) -> None:
    """Check every notebook's parameters, run them one after the other, and write the summary; a failure stops there."""
    parser = argparse.ArgumentParser("python -m fx.reproduce", description=__doc__.split("\n\n")[0])
    parser.add_argument("notebooks", nargs="*", metavar="NUMBER", help="such as 01 03; default: all but 00")
    parser.add_argument("--profile", default=DEFAULTS, help=f"one of {', '.join(profiles())} (default {DEFAULTS})")
    parser.add_argument(
        "-p",
        dest="extra",
        type=assignment,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a parameter of the notebooks named, as in their first code cells; may be repeated: 03 -p artists=5",
    )
    parser.add_argument(
        "--scheduler",
        metavar="S",
        help='a dask cluster for the notebooks that take one: "local:4", an address, a scheduler file',
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only say what would run, what it needs and whether it is here, and about how long it takes (some minutes)",
    )
    parser.add_argument(
        "--fetch", action="store_true", help="fetch models from the Hub that are not here; never done otherwise"
    )
    parser.add_argument(
        "--drop",
        default="",
        metavar="KINDS",
        help='steps to remove once nothing needs them, "finetune" for checkpoints whose images exist; less disk, and a '
        "notebook that asks for them again computes them again",
    )
    parser.add_argument("--in-place", action="store_true", help="write the outputs into notebooks/ itself")
    options = parser.parse_args(words)
    chosen = find_notebooks(options.notebooks)
    results.check_scheduler(options.scheduler or "")
    given = {notebook: parameters(notebook, options.profile, dict(options.extra)) for notebook in chosen}
    for notebook, values in given.items() if options.scheduler is not None else ():
        if "scheduler" in papermill.inspect_notebook(kernel.noted(notebook)):
            file = options.scheduler.endswith(".json")  # which the notebooks, in a folder of their own, must find too
            values["scheduler"] = str(Path(options.scheduler).absolute()) if file else options.scheduler
    if options.in_place and (named := {name for values in given.values() for name in values}):
        raise ValueError(
            f"--in-place stores what a notebook shows with its own parameters, so {', '.join(sorted(named))} cannot be "
            "given: run it with them first without --in-place, its steps are kept"
        )
    wanted = needed(given)
    if options.dry_run:
        os.environ["HF_HUB_OFFLINE"] = "1"
        huggingface_hub.constants.HF_HUB_OFFLINE = True  # it has read the variable when it was imported
        print(would_run(given, wanted), flush=True)
        print(estimated(given))
        return
    needs.check([need for need in wanted if not (options.fetch and need.on_hub)])
    if options.drop:
        os.environ["FX_DROP"] = options.drop  # read by fx.results
    if not options.fetch:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read by the notebooks' kernels, which would ask the Hub otherwise
    folder = RUNS / "executed" / options.profile
    folder.mkdir(parents=True, exist_ok=True)
    for notebook, values in given.items():
        target = notebook if options.in_place else folder / notebook.name
        print(f"{notebook.name} -> {target}", flush=True)
        with kernel.own():
            papermill.execute_notebook(notebook, target, values, cwd=str(NOTEBOOKS), log_output=False, **kernel.OPTIONS)
        if options.in_place:
            tidy(target)
    if (TABLES / options.profile).is_dir():
        print("\n".join(str(path) for path in summary.write(options.profile)))


def needed(given: dict[Path, dict[str, object]]) -> list[needs.Need]:
    """What these notebooks need with these parameters that is not shipped, each thing once."""
    found = {}
    for notebook, values in given.items():
        known = papermill.inspect_notebook(kernel.noted(notebook))
        defaults = {name: ast.literal_eval(entry["default"]) for name, entry in known.items()}
        own = {**defaults, **values}
        sections = f"{own.get('settings_name', '')} {own.get('families', '')}".split()
        for need in needs.needs(sections, str(own.get("change", ""))):
            found.setdefault(need.name, need)
        for need in needs.published() if own.get("source") == "paper" else ():
            found.setdefault(need.name, need)
    return list(found.values())


def would_run(given: dict[Path, dict[str, object]], wanted: list[needs.Need]) -> str:
    """What would run, with which parameters, and what it needs, as text."""
    lines = ["would run:"]
    for notebook, values in given.items():
        lines.append(
            f"  {notebook.name}: "
            + (", ".join(f"{name}={value!r}" for name, value in values.items()) or "as it stands")
        )
    if not wanted:
        return "\n".join([*lines, "needs nothing that is not here"])
    missing = [need for need in wanted if not need.here]
    lines += ["needs, beside what is shipped:", needs.table(wanted).to_string(index=False, na_rep="")]
    lines += [f"get {need.name}: {need.how}" for need in missing]
    return "\n".join(lines)


def estimated(given: dict[Path, dict[str, object]]) -> str:
    """Steps, hours and gigabytes of these notebooks, as text."""
    found, lines = {}, []
    for notebook, values in tqdm(given.items(), desc="planning", unit="notebook", leave=False):
        try:
            found[notebook.name] = plan.steps(notebook, values)
        except RuntimeError as error:
            lines.append(str(error))
    table = plan.estimate(found).to_string(index=False, na_rep="unknown", float_format="{:.1f}".format)
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"this CPU, {torch.get_num_threads()} threads"
    )
    lines += [
        f"at least, on {device}: hours of sampling and training, GB of images and checkpoints that are not done yet"
    ]
    return "\n".join([*lines, table])


def tidy(notebook: Path) -> None:
    """Take out of an executed notebook what says where and when it ran: papermill's marks and the standard error."""
    content = nbformat.read(notebook, 4)
    content.metadata.pop("papermill", None)
    for cell in content.cells:
        for mark in ("papermill", "execution"):
            cell.metadata.pop(mark, None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.write(content, notebook)


if __name__ == "__main__":
    command.run("fx.reproduce", main)
