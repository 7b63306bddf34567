"""Which steps a table or figure was made from: every file that `fx.tables` and `fx.plots` save is noted here.

data/results/<profile>/provenance.json has the steps of each notebook in the order they were asked for, and of every saved
file its SHA-256 and how many of those steps had been asked for when it was saved. So a file's record holds all steps that
can have entered it, among them those that the notebook had used for something else. `python -m fx.runs why FILE` prints it.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from fx import locks, results

NAME = "provenance.json"
_began: dict[Path, str] = {}  # for each record that this process writes to, the first file that it noted


@dataclass(frozen=True)
class Record:
    """What is known of a saved file: its steps, "score/<digest>", in order, and whether it is still what was saved."""

    steps: list[str]
    unchanged: bool
    first: str  # the first file that the same notebook saved


def note(file: Path, record: Path) -> None:
    """Record in the folder `record` that this process has just saved `file`, from the steps it has asked for by now."""
    record /= NAME
    lock = results.RUNS / "locks" / f"provenance-{hashlib.sha256(str(record.resolve()).encode()).hexdigest()[:16]}.lock"
    results.RUNS.mkdir(parents=True, exist_ok=True)
    with locks.alone(lock, str(record)):  # another notebook of the profile may save at the same time
        _note(file, record)


def _note(file: Path, record: Path) -> None:
    known, name, steps = _read(record), _name(file), results.asked_for()
    if (first := _began.get(record)) not in known["steps"]:
        first = _began[record] = (
            name  # the first file of a notebook: what it saved in an earlier run is to be noted anew
        )
        known["files"] = {other: entry for other, entry in known["files"].items() if entry["first"] != first}
    known["steps"][first] = steps
    known["files"][name] = {"sha256": _sha256(file), "first": first, "steps": len(steps)}
    used = {entry["first"] for entry in known["files"].values()}
    known["steps"] = {key: known["steps"][key] for key in sorted(used)}
    known["files"] = dict(sorted(known["files"].items()))
    record.parent.mkdir(parents=True, exist_ok=True)
    (part := record.with_suffix(f".part-{os.getpid()}")).write_text(json.dumps(known, indent=0) + "\n")
    os.replace(part, record)


def of(file: Path) -> Record:
    """The record of a saved table or figure; FileNotFoundError without the file, ValueError where there is none."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist")
    file = file.resolve()
    of_a_figure = sorted((file.parents[1] / "data/results").glob(f"*/{NAME}")) if file.suffix == ".png" else []
    for record in [*of_a_figure, file.parent / NAME]:
        if entry := (known := _read(record))["files"].get(_name(file)):
            steps = known["steps"][entry["first"]][: entry["steps"]]
            return Record(steps, entry["sha256"] == _sha256(file), entry["first"])
    raise ValueError(f"{file}: nothing was noted of how it was made; run its notebook again (python -m fx.reproduce)")


def _name(file: Path) -> str:
    """A table by its name, a figure with its folder's."""
    return f"{file.parent.name}/{file.name}" if file.suffix == ".png" else file.name


def _read(record: Path) -> dict[str, dict]:
    """The record, without what is not as `note` writes it; empty where there is none."""
    try:
        found = json.loads(record.read_text())
        files, steps = found["files"].items(), found["steps"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {"files": {}, "steps": {}}
    steps = {
        first: asked for first, asked in steps if isinstance(asked, list) and all(isinstance(s, str) for s in asked)
    }
    return {"files": {name: entry for name, entry in files if _is_entry(entry, steps)}, "steps": steps}


def _is_entry(entry, steps: dict) -> bool:
    kinds = {"sha256": str, "first": str, "steps": int}
    as_written = isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in kinds.items())
    return as_written and entry["first"] in steps


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
