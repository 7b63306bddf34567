"""What lies in the work area (fx.results.RUNS): python -m fx.runs [list | verify | log | why | prune | pack | unpack].

    python -m fx.runs                                  # a line per kind of step: finished, unfinished, set aside, sizes
    python -m fx.runs verify                           # files against their manifests; exit code 1 if one differs
    python -m fx.runs log                              # steps whose last try failed or was killed, and where their logs are
    python -m fx.runs log 3f9a                         # the log of the steps whose digest begins so
    python -m fx.runs why data/results/mini/table02.csv     # the steps behind a table or figure; --manifests: all of them
    python -m fx.runs prune --kinds generate           # what would go; --yes removes it
    python -m fx.runs pack scores.tar.xz               # finished scores, a few kilobytes each, to be kept or sent
    python -m fx.runs unpack scores.tar.xz             # into this work area, where they need not be computed again

Steps are found under their addresses, so what is unpacked counts only for the same specs, images and weights.
"""

import argparse
import json
import lzma
import platform
import re
import shutil
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import psutil
from tqdm import tqdm

from fx import command, provenance, results

SMALL = ("score", "quality", "reference", "captionsearch")  # kinds that are packed unless others are named: no images
NOT_KINDS = ("scratch", "locks", "logs", "hashes", "executed")
FINISHED = re.compile(r"[0-9a-f]{16}(-\d+)?")
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\dT[\d:]+\+00:00 (started|finished|failed|interrupted)\b")
STATES = ("finished", "unfinished", "set aside")


@dataclass(frozen=True)
class Entry:
    """A folder of the work area: its kind of step, its state (one of STATES), its size in bytes, whether it may go."""

    path: Path
    kind: str
    state: str
    size: int
    removable: bool


def entries(kinds: Iterable[str] = ()) -> Iterator[Entry]:
    """All folders of steps, in order; of some kinds only if they are named.

    Removable is what nobody works on: finished and set aside always, an unfinished one if its process is of this machine and
    no longer runs, kept work of a step (scratch) if nobody holds its lock.
    """
    root, wanted = results.RUNS, {kind.lower() for kind in kinds}
    if not root.is_dir():
        return
    known = {path.name for path in root.iterdir() if path.is_dir() and path.name not in NOT_KINDS} | {"scratch"}
    if unknown := sorted(wanted - known - {*SMALL}):
        raise ValueError(f"no steps of the kind {', '.join(unknown)}: here are {', '.join(sorted(known))}")
    for parent in sorted(path for path in root.iterdir() if path.is_dir() and path.name not in NOT_KINDS):
        for path in sorted(parent.iterdir()):
            state = _state(path.name)
            if state and (not wanted or parent.name in wanted):
                yield Entry(path, parent.name, state, size_of(path), state != "unfinished" or _left_behind(path))
    if not wanted or "scratch" in wanted:
        for path in sorted((root / "scratch").glob("*")):
            yield Entry(path, "scratch", "unfinished", size_of(path), not results.is_being_computed(path.name))


def _state(name: str) -> str:
    """The state of a folder by its name, "" for one that is none of a step."""
    if FINISHED.fullmatch(name):
        return "finished"
    digest, _, rest = name.partition(".")
    if not FINISHED.fullmatch(digest):
        return ""
    return {"part": "unfinished", "set": "set aside"}.get(rest.partition("-")[0], "")


def _left_behind(part: Path) -> bool:
    """Whether an unfinished folder belongs to a process of this machine that no longer runs."""
    owner = re.fullmatch(r".*\.part-(\d+)-(.*)", part.name)
    return bool(owner) and owner[2] == platform.node() and not psutil.pid_exists(int(owner[1]))


def size_of(path: Path) -> int:
    """Bytes of all files below a folder, or of a file; what vanishes meanwhile counts nothing."""
    total = 0
    for file in [path] if path.is_file() else path.rglob("*"):
        try:
            total += 0 if file.is_dir() else file.lstat().st_size
        except FileNotFoundError:
            continue
    return total


def overview(kinds: Iterable[str] = ()) -> pd.DataFrame:
    """A row per kind: how many folders are finished, unfinished and set aside, and their size in megabytes."""
    rows = [{"kind": e.kind, "state": e.state, "MB": e.size / 1e6} for e in entries(kinds)]
    if not rows:
        return pd.DataFrame(columns=["kind", *STATES, "MB"])
    table = pd.DataFrame(rows)
    counts = table.groupby(["kind", "state"]).size().unstack(fill_value=0).reindex(columns=STATES, fill_value=0)
    return counts.assign(MB=table.groupby("kind").MB.sum()).reset_index().rename_axis(columns=None)


def fault_of(step: Path) -> str:
    """In a few words, why a finished folder is not what its manifest says; "" if it is."""
    try:
        manifest = json.loads((step / results.MANIFEST).read_bytes())
        asked = {entry: manifest[entry] for entry in ("spec", "inputs")} | (
            {"grows": manifest["grows"]} if "grows" in manifest else {}
        )
        place = results.place_of(asked)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"its {results.MANIFEST} cannot be read ({type(error).__name__})"
    if (place.parent.name, place.name) != (step.parent.name, step.name):
        return f"its {results.MANIFEST} is that of {place.parent.name}/{place.name}"
    return results.fault_in(step, asked)


def faults(kinds: Iterable[str] = ()) -> dict[Path, str]:
    """The finished folders that are not what their manifests say, each with the reason."""
    found = [entry.path for entry in entries(kinds) if entry.state == "finished"]
    told = ((path, fault_of(path)) for path in tqdm(found, desc="verify", unit="step", mininterval=2))
    return {path: fault for path, fault in told if fault}


def logs(digest: str) -> list[Path]:
    """The logs of the steps whose digest begins so, in order; ValueError if there is none."""
    found = sorted(path for path in (results.RUNS / "logs").glob("*/*.log") if path.name.startswith(digest))
    if not found:
        raise ValueError(f"no step whose digest begins with {digest!r} has a log in {results.RUNS / 'logs'}")
    return found


def unended() -> dict[Path, str]:
    """The logs of steps that did not end well when last tried, nor lie finished: "failed", "interrupted" or "killed".

    A step that some process is computing now is none of them.
    """
    found = {}
    for path in sorted((results.RUNS / "logs").glob("*/*.log")):
        place = results.RUNS / path.parent.name / path.stem
        if place.exists() or results.is_being_computed(path.stem):
            continue
        told = [match[1] for line in path.read_text(encoding="utf-8").splitlines() if (match := LOG_LINE.match(line))]
        if told and told[-1] != "finished":
            found[path] = "killed" if told[-1] == "started" else told[-1]
    return found


def why(file: Path) -> tuple[dict[str, dict | None], bool]:
    """The steps behind a saved table or figure, and whether it is still the file that was saved.

    The steps are "kind/digest" -> manifest, None for one that this work area does not have, in the order they were asked
    for, each followed by the steps that it was built on. Raises as `fx.provenance.of` does.
    """
    record, found = provenance.of(file), {}
    waiting = record.steps[::-1]
    while waiting:
        if (step := waiting.pop()) in found:
            continue
        try:
            found[step] = json.loads((results.RUNS / step / results.MANIFEST).read_bytes())
            waiting += _nested(found[step]["spec"])[::-1]
        except (OSError, ValueError, KeyError, TypeError):
            found[step] = None
    return found, record.unchanged


def _nested(asked) -> list[str]:
    """The addresses of steps in what a manifest says was asked."""
    if isinstance(asked, dict) and asked.keys() == {"kind", "digest"}:
        return [f"{asked['kind']}/{asked['digest']}"]
    inside = asked.values() if isinstance(asked, dict) else asked if isinstance(asked, list) else []
    return [step for value in inside for step in _nested(value)]


def to_prune(kinds: Iterable[str] = ()) -> list[Entry]:
    """What `prune` removes: with kinds all folders of these kinds, without only what is unfinished or set aside."""
    kinds = tuple(kinds)
    return [entry for entry in entries(kinds) if entry.removable and (kinds or entry.state != "finished")]


def pack(file: Path, kinds: Iterable[str] = SMALL) -> int:
    """Write the finished steps of these kinds into a .tar.xz, the same bytes for the same steps; how many there are.

    Raises FileExistsError for a file that is there, ValueError for a step that is not what its manifest says and where there
    is none to pack.
    """
    if file.exists():
        raise FileExistsError(f"{file} exists: name another file, or remove it first")
    found = [entry.path for entry in entries(kinds) if entry.state == "finished"]
    if not found:
        raise ValueError(f"no finished step of these kinds in {results.RUNS}: {', '.join(kinds)}")
    part = file.with_name(f".{file.name}.part")
    try:
        with tarfile.open(part, "w:xz", preset=9) as archive:
            for step in tqdm(found, desc="pack", unit="step", mininterval=2):
                if fault := fault_of(step):
                    raise ValueError(f"{step} cannot be packed: {fault}; python -m fx.runs verify names all such steps")
                archive.add(step, f"{step.parent.name}/{step.name}", filter=_anonymous)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    return len(found)


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without owner and time."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    member.mode = 0o755 if member.isdir() else 0o644
    return member


def unpack(file: Path) -> tuple[int, int]:
    """Take finished steps over from an archive of `pack`: how many are new, and how many were there already.

    Each is checked against its manifest before it is put in its place. Raises FileNotFoundError, and ValueError for an
    archive that cannot be read or holds anything else, before anything is put in place.
    """
    results.RUNS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=results.RUNS, prefix=".unpack-") as name:
        root = Path(name)
        try:
            with tarfile.open(file, "r:xz") as archive:
                archive.extractall(root, filter="data")
        except (tarfile.TarError, EOFError, OSError, lzma.LZMAError) as error:
            if isinstance(error, FileNotFoundError):
                raise FileNotFoundError(f"{file} does not exist: name a file that fx.runs pack has written") from None
            raise ValueError(f"{file} cannot be unpacked ({error}): it must be one that fx.runs pack wrote") from error
        if loose := [path.name for path in root.iterdir() if not path.is_dir()]:
            raise ValueError(f"{loose[0]} in {file} is no step: name a file that fx.runs pack has written")
        steps = sorted(path for path in root.glob("*/*"))
        for step in steps:
            fault = "it is no step" if not FINISHED.fullmatch(step.name) else fault_of(step)
            if fault:
                raise ValueError(f"{step.relative_to(root)} in {file} cannot be taken over: {fault}")
        new = 0
        for step in steps:
            place = results.RUNS / step.relative_to(root)
            place.parent.mkdir(exist_ok=True)
            if not place.exists():
                step.rename(place)
                new += 1
    return new, len(steps) - new


# the command


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m fx.runs", description=f"Steps in the work area, {results.RUNS}.")
    commands = parser.add_subparsers(dest="command")
    for name, told in (("list", "a line per kind"), ("verify", "files against manifests"), ("prune", "make room")):
        command = commands.add_parser(name, help=told)
        command.add_argument("--kinds", nargs="+", default=[], metavar="KIND", help="generate, finetune, score, ...")
        if name == "prune":
            command.add_argument("--yes", action="store_true", help="remove; without it only say what would go")
    log = commands.add_parser("log", help="what became of steps when they were tried")
    log.add_argument("digest", nargs="?", default="", help="how it begins; without it, all that did not end well")
    asked = commands.add_parser("why", help="the steps behind a table or figure")
    asked.add_argument("file", type=Path)
    asked.add_argument("--manifests", action="store_true", help="with what was asked of each, its inputs and versions")
    for name, told in (("pack", "finished steps into a .tar.xz"), ("unpack", "take them over from one")):
        command = commands.add_parser(name, help=told)
        command.add_argument("file", type=Path)
        if name == "pack":
            command.add_argument("--kinds", nargs="+", default=list(SMALL), metavar="KIND", help="default: %(default)s")
    given = parser.parse_args(arguments)
    try:
        return _do(given)
    except (OSError, ValueError) as error:
        print(f"fx.runs: {error}", file=sys.stderr)
        return 2


def _do(given: argparse.Namespace) -> int:
    if given.command == "pack":
        print(
            f"{pack(given.file, given.kinds)} steps packed into {given.file}, {given.file.stat().st_size / 1e6:.1f} MB"
        )
    elif given.command == "unpack":
        new, known = unpack(given.file)
        print(f"{new} steps taken over from {given.file}; {known} were there already")
    elif given.command == "verify":
        found = faults(given.kinds)
        for path, fault in found.items():
            print(f"{path.parent.name}/{path.name}: {fault}")
        print(f"{len(found)} faults" if found else "every finished step is what its manifest says")
        return 1 if found else 0
    elif given.command == "log" and given.digest:
        for path in logs(given.digest):
            print(f"{path.parent.name}/{path.stem}\n{path.read_text(encoding='utf-8')}", end="")
    elif given.command == "log":
        for path, what in (found := unended()).items():
            print(f"{path.parent.name}/{path.stem} {what}: {path}")
        print(f"{len(found)} steps did not end well" if found else "no step is left that did not end well")
    elif given.command == "why":
        _tell(given.file, given.manifests)
    elif given.command == "prune":
        return _prune(to_prune(given.kinds), given.yes)
    else:
        print(overview(getattr(given, "kinds", ())).to_string(index=False, float_format="{:.1f}".format))
    return 0


def _tell(file: Path, whole: bool) -> None:
    """Print the steps behind a file, a line or a manifest each."""
    found, unchanged = why(file)
    for step, manifest in found.items():
        if manifest is None:
            print(f"{step}  not in this work area")
        elif whole:
            print(json.dumps({"step": step} | manifest, indent=1))
        else:
            when, took = manifest.get("finished", "some day"), manifest.get("seconds", "?")
            print(f"{step}  {when}  {took} s  fx {manifest.get('versions', {}).get('fx', '?')}")
    count = ", ".join(f"{n} {kind}" for kind, n in sorted(Counter(step.partition("/")[0] for step in found).items()))
    print(f"{file}: {len(found)} steps ({count or 'none'})")
    if not unchanged:
        print(f"{file} is not the file that was saved then: it was changed afterwards")


def _prune(found: list[Entry], remove: bool) -> int:
    """Say what would go, or remove it."""
    gone = []
    for entry in found:
        what = f"{entry.kind}/{entry.path.name}, {entry.state}, {entry.size / 1e6:.1f} MB"
        if remove and entry.state == "unfinished" and results.is_being_computed(entry.path.name):
            print(f"leaving {what}: by now it is being computed")
            continue
        print(f"{'removing' if remove else 'would remove'} {what}")
        if remove:
            shutil.rmtree(entry.path) if entry.path.is_dir() else entry.path.unlink()
        gone.append(entry)
    total = sum(entry.size for entry in gone) / 1e6
    print(f"{len(gone)} folders, {total:.1f} MB" + ("" if remove or not found else "; --yes removes them"))
    return 0


if __name__ == "__main__":
    command.run("fx.runs", main)
