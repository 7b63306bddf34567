"""The runner: every step of the reproduction is done once, kept under its content address, and checked before reuse.

A step is described by a *spec*, a frozen dataclass of plain values (None, str, int, float, bool, tuples of these, other
specs), and done by a function registered for the class of the spec:

    @dataclass(frozen=True)
    class Extract:
        generate: Generate
        threshold: float

    @results.perform.register
    def _(spec: Extract, folder: Path) -> None:
        images = np.load(results.complete(spec.generate) / "images.npy")   # computed now if it is not there yet
        ...
        (folder / "scores.json").write_text(json.dumps({"AS": 0.41, "A-ESR": 0.17}))

    table = results.run([Extract(...), Extract(...)])   # one row per spec: settings and scores as columns

Below `RUNS` lie
    <kind>/<digest>/                  a finished step; manifest.json holds its spec, its inputs and a SHA-256 per file
    <kind>/<digest>-<n>/              the same of a step that grows (`GROWS`, below)
    <kind>/<digest>.part-<pid>-<host> a step being computed; renamed into place when it is finished
    <kind>/<digest>.set-aside-<n>     a folder that failed the check; kept for a person to look at, never read again
    scratch/<digest>/                 what a long step keeps in order to go on after an interruption
    locks/<digest>.lock               held while a step is computed, so that nobody computes it a second time meanwhile; and
    locks/<digest>.claim              who computes it, for machines that the lock does not reach (fx.locks)
    logs/<kind>/<digest>.log          when, where and by whom a step was tried, how long it took, and its traceback

The address covers the settings, the outside content a step reads (`inputs`), the addresses of the steps it builds on and
the `VERSION` of its class (1 where it has none), not the code, or every edit would cost hours of fine-tuning: whoever
changes what a step computes raises the VERSION of its class. A step that is nested in another enters by its address
alone, so that the folder of an extraction says nothing about the images a model was trained on; a nested dataclass that
is no step enters with its fields and inputs.

A field that comes to an existing class later may say which of its values means what was done before it came, by
`dataclasses.field(default="none", metadata={"absent": "none"})`: with that value it is left out of the address, and
finished steps stay finished.

A class may name one of its fields as GROWS, a number of things of which a larger one holds all of a smaller one
(generated images). It stands at the end of the address, and `relatives` finds what was done for other numbers.

Hidden files (names that begin with a dot) count nowhere as content.

Kinds of step that FX_DROP names ("finetune", several by commas) are removed as soon as nothing that a `run` asked for needs
them any more: checkpoints of gigabytes, once their images exist. Asked for again, they are computed again.
"""

import contextlib
import contextvars
import dataclasses
import errno
import functools
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import shutil
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import psutil
from tqdm import tqdm

from fx import locks

# The environment variable FX_RUNS moves the work area; a relative one starts at the package root.
RUNS: Path = Path(__file__).resolve().parents[1] / Path(os.environ.get("FX_RUNS") or "runs").expanduser()

MANIFEST = "manifest.json"
SCORES = "scores.json"
FULL = 2**20  # bytes free below which a disk counts as full
LARGE = 64 * 2**20  # bytes from which on a file's SHA-256 is remembered beyond the process
PACKAGES = ("torch", "diffusers", "transformers", "peft", "numpy", "fx")


# What a kind of step must define


@functools.singledispatch
def perform(spec, folder: Path) -> None:
    """Do the step that `spec` describes and write its files into `folder`, which exists and is empty.

    Registered per dataclass. A step may complete the specs it holds (`complete`), may keep unfinished work in
    `scratch(spec)`, and may leave a flat scores.json (numbers and strings), which becomes columns of the table.
    Raises TypeError for a class that has no registered function.
    """
    raise TypeError(_unknown(spec))


AT_END: list[Callable[[], None]] = []  # called when `run` ends, however: gives back what steps keep for one another


@functools.singledispatch
def inputs(spec) -> dict[str, str]:
    """Name -> SHA-256 (see `sha256_of`) of the outside content that `spec` reads: training images, model weights.

    Registered per dataclass where it reads any; {} otherwise. They enter the digest, so a changed image or weight makes
    it another step. What nested specs read needs no mention: the runner adds it.
    """
    return {}


@functools.singledispatch
def parts(spec) -> list[tuple]:
    """What of a step can be done beforehand, by several workers at once: arguments for `perform_part`; [] otherwise."""
    return []


@functools.singledispatch
def perform_part(spec, *part) -> None:
    """Do one of the `parts` of a step, into `scratch(spec)`, from where `perform` takes it; twice is no harm.

    Registered per dataclass together with `parts`. Each file must be written whole or not at all.
    """
    raise TypeError(f"nothing is known about how to do a part of a {type(spec).__name__}")


# Addresses


def digest(spec) -> str:
    """Content address: the first 16 hex digits of the SHA-256 of canonical JSON of kind, version, fields and inputs.

    A nested step enters with its own address, any other nested spec with its own kind, fields and inputs. The order of
    fields does not matter; the type of a number does (1, 1.0 and True differ). "-<n>" follows where the class has a field
    that GROWS. Raises TypeError for anything but a frozen dataclass of plain values.
    """
    return _address(_asked(spec))


def folder(spec) -> Path:
    """Where the finished step lies, RUNS / kind / digest (kind: class name in lower case), whether it exists or not."""
    return place_of(_asked(spec))


def scratch(spec) -> Path:
    """A folder for unfinished work of `spec`, made on demand; it outlives an interruption, `complete` removes it."""
    path = RUNS / "scratch" / digest(spec)
    path.mkdir(parents=True, exist_ok=True)
    return path


def relatives(spec) -> list[Path]:
    """Finished and verified folders of what `spec` asks for in other numbers of the field that GROWS, largest first."""
    asked, field = _asked(spec), type(spec).GROWS
    own = place_of(asked)
    stem = f"{own.name.rpartition('-')[0]}-"
    found = []
    for path in own.parent.glob(f"{stem}*"):
        number = path.name.removeprefix(stem)
        if path != own and number.isdecimal():
            other = {**asked, "spec": {**asked["spec"], "fields": {**asked["spec"]["fields"], field: int(number)}}}
            if not fault_in(path, other):
                found.append((int(number), path))
    return [path for _, path in sorted(found, reverse=True)]


def sha256_of(path: str | Path) -> str:
    """SHA-256 (64 hex digits) of a file's bytes, or of the sorted relative names and file hashes of a folder.

    A file is read again only when its size or one of its time stamps has changed. Raises FileNotFoundError where
    nothing lies at `path`, ValueError for a folder without files.
    """
    path = Path(path)
    if path.is_dir():
        hashes = _file_hashes(path)
        if not hashes:
            raise ValueError(f"{path} is a folder without files, so there is nothing to hash; put the files there")
        return hashlib.sha256(_canonical(hashes).encode()).hexdigest()
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist, so it cannot be hashed; check the path")
    stat = path.stat()
    if not path.is_file():
        raise ValueError(f"{path} is no file that has an end (a device, a pipe): remove it")
    known = stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
    return (_sha256_of_file if stat.st_size < LARGE else _sha256_of_large_file)(path.absolute(), *known)


@functools.cache
def _sha256_of_file(path: Path, size: int, modified: int, changed: int) -> str:
    """SHA-256 of one file; size and time stamps (ns) are there to tell a rewritten file from the one already read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_of_large_file(path: Path, size: int, modified: int, changed: int) -> str:
    """The same, remembered in RUNS/hashes by all processes: gigabytes are read once, not at every start."""
    known = [str(path), path.stat().st_ino, size, modified, changed]
    note = RUNS / "hashes" / f"{hashlib.sha256(_canonical(known).encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        entry = json.loads(note.read_bytes())
        if entry["file"] == known and re.fullmatch("[0-9a-f]{64}", entry["sha256"]):
            return entry["sha256"]
    found = _sha256_of_file(path, size, modified, changed)
    with contextlib.suppress(OSError):  # a work area that cannot be written is reported where something must be kept
        note.parent.mkdir(parents=True, exist_ok=True)
        part = note.with_name(f"{note.name}.part-{os.getpid()}")
        part.write_text(json.dumps({"file": known, "sha256": found}))
        part.replace(note)
    return found


def _file_hashes(root: Path) -> dict[str, str]:
    """Relative name (with forward slashes) -> SHA-256 of every file below `root` that is not hidden."""

    def stop(error: OSError):
        raise error

    hashes = {}
    for base, folders, names in os.walk(root, onerror=stop, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(base, name) for name in names if not name.startswith(".")):
            hashes[path.relative_to(root).as_posix()] = sha256_of(path)
    return hashes


def _canonical(value) -> str:
    """JSON with sorted keys and no blanks: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _asked(spec) -> dict:
    """What identifies a step, as the manifest repeats it: {"spec": kind, version and fields, "inputs": name -> SHA-256}.

    An input of a nested spec that is no step carries the way to it in its name: "model.checkpoint".
    """
    described = _plain(_checked(spec), type(spec).__name__, outermost=True)
    named = {
        ".".join((*path, name)): value
        for path, node in _walk(spec, enter=lambda node: node is spec or not _is_step(node))
        if dataclasses.is_dataclass(node) and (node is spec or not _is_step(node))
        for name, value in inputs(node).items()
    }
    grows = getattr(type(spec), "GROWS", None)
    return {"spec": described, "inputs": named} | ({"grows": grows} if grows else {})


def _address(asked: dict) -> str:
    """The digest of what `_asked` returned."""
    spec, number = asked["spec"], ""
    if grows := asked.get("grows"):
        number = f"-{spec['fields'][grows]}"
        spec = {**spec, "fields": {name: value for name, value in spec["fields"].items() if name != grows}}
    text = _canonical({"spec": spec, "inputs": asked["inputs"]})
    return hashlib.sha256(text.encode()).hexdigest()[:16] + number


def _is_step(value) -> bool:
    """Whether a function is registered that does this spec; the others only describe something."""
    return dataclasses.is_dataclass(value) and perform.dispatch(type(value)) is not perform.dispatch(object)


def place_of(asked: dict) -> Path:
    """The folder of a step by what its manifest says of it: {"spec", "inputs"}, and "grows" where it has it."""
    return RUNS / asked["spec"]["kind"] / _address(asked)


def _checked(spec):
    """`spec` itself, if it is an instance of a frozen dataclass; TypeError otherwise."""
    if not dataclasses.is_dataclass(spec) or isinstance(spec, type) or not spec.__dataclass_params__.frozen:
        raise TypeError(f"{spec!r} is no spec: pass an instance of a class declared with @dataclass(frozen=True)")
    return spec


def _unknown(spec) -> str:
    """The message for a spec whose class has no registered function."""
    name = type(spec).__name__
    return (
        f"nothing is known about how to do a {name}: import the module that defines it, "
        f"or register a function for {name} with @results.perform.register"
    )


def _plain(value, where: str, outermost: bool = False):
    """`value` as JSON holds it; `where` names it in the TypeError.

    Tuples become lists, specs {"kind", "version", "fields"}, and a step that is not the outermost {"kind", "digest"}.
    """
    if value is None or isinstance(value, (str, bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, tuple):
        return [_plain(element, f"{where}[{i}]") for i, element in enumerate(value)]
    if dataclasses.is_dataclass(value):
        kind = type(_checked(value)).__name__.lower()
        if not outermost and _is_step(value):
            return {"kind": kind, "digest": digest(value)}
        return {
            "kind": kind,
            "version": getattr(type(value), "VERSION", 1),
            "fields": {
                field.name: _plain(getattr(value, field.name), f"{where}.{field.name}")
                for field in dataclasses.fields(value)
                if field.metadata.get("absent", dataclasses.MISSING) != getattr(value, field.name)
            },
        }
    raise TypeError(
        f"{where} is {value!r} ({type(value).__name__}); a spec holds None, str, int, float (finite), bool, "
        "tuples of these and other specs: convert it, a list with tuple(), a path with str()"
    )


def _walk(value, path: tuple[str, ...] = (), enter=lambda node: True) -> Iterator[tuple[tuple[str, ...], object]]:
    """Every spec and every plain value in `value`, itself first, with the field names that lead there.

    A tuple without specs is one plain value; the elements of a tuple with specs go by "field[0]", "field[1]", ...
    enter: whether to go on into a spec.
    """
    if isinstance(value, tuple) and _holds_spec(value):
        for i, element in enumerate(value):
            yield from _walk(element, (*path[:-1], f"{path[-1]}[{i}]"), enter)
        return
    yield path, value
    if dataclasses.is_dataclass(value) and enter(value):
        for field in dataclasses.fields(value):
            yield from _walk(getattr(value, field.name), (*path, field.name), enter)


def _holds_spec(value) -> bool:
    """Whether `value` is a spec or a tuple with a spec in it, at any depth."""
    return dataclasses.is_dataclass(value) or (isinstance(value, tuple) and any(map(_holds_spec, value)))


# One step


def complete(spec) -> Path:
    """The finished and verified folder of `spec`; the step is done now if it is missing.

    A folder whose manifest or files are not what they should be is renamed to <digest>.set-aside-<n>, a warning says
    what was wrong, and the step is done anew. If another process is at work on the same step, this one waits for it.
    Raises TypeError for something that is no spec or has no registered function, OSError if RUNS cannot be written.
    """
    _require_performable(spec)
    asked = _asked(spec)
    final = place_of(asked)
    if fault_in(final, asked):
        _require_writable_runs()
        with _alone(final):
            if fault := fault_in(final, asked):  # asked again: it may have been finished while this process waited
                _set_aside(final, fault)
                _compute(spec, final, asked)
    shutil.rmtree(RUNS / "scratch" / final.name, ignore_errors=True)
    _note([final])
    return final


def _require_performable(spec) -> None:
    """TypeError unless `spec` is a spec whose class has a registered function."""
    if perform.dispatch(type(_checked(spec))) is perform.dispatch(object):
        raise TypeError(_unknown(spec))


def _require_writable_runs() -> None:
    """OSError with the way out unless RUNS exists, or can be made, and takes a file."""
    try:
        RUNS.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=RUNS):
            pass
    except OSError as error:
        way_out = "set the environment variable FX_RUNS to a folder that can be written, before fx is imported"
        raise type(error)(error.errno, f"results cannot be kept ({error.strerror}): {way_out}", str(RUNS)) from error


def fault_in(final: Path, asked: dict) -> str:
    """In a few words, why the folder cannot stand for the step asked for; empty if it can."""
    if not os.path.lexists(final):
        return "it is missing"
    try:
        manifest = json.loads((final / MANIFEST).read_bytes())
        present = _file_hashes(final)
    except (OSError, ValueError, RecursionError) as error:
        return f"its {MANIFEST} or another file cannot be read ({type(error).__name__})"
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        return f"its {MANIFEST} has no list of files"
    for entry in ("spec", "inputs"):
        if _canonical(manifest.get(entry)) != _canonical(asked[entry]):
            return f'its {MANIFEST} has another "{entry}"'
    return _difference(manifest["files"], {name: value for name, value in present.items() if name != MANIFEST})


def _difference(listed: dict, present: dict[str, str]) -> str:
    """How the files that are present (name -> SHA-256) differ from the listed ones; empty if they do not."""
    groups = {
        "missing": listed.keys() - present.keys(),
        "changed": {name for name in listed.keys() & present.keys() if listed[name] != present[name]},
        "unknown": present.keys() - listed.keys(),
    }
    return "; ".join(f"{word}: {', '.join(sorted(names))}" for word, names in groups.items() if names)


def _set_aside(final: Path, fault: str) -> None:
    """Rename what lies at `final`, if anything, to the first free <digest>.set-aside-<n> and warn."""
    if not os.path.lexists(final):
        return
    names = (final.with_name(f"{final.name}.set-aside-{n}") for n in itertools.count(1))
    aside = next(path for path in names if not os.path.lexists(path))
    final.rename(aside)
    step = f"{final.parent.name}/{final.name}"
    warnings.warn(f"{step} was set aside as {aside.name} and is computed anew: {fault}", stacklevel=3)


def is_being_computed(name: str) -> bool:
    """Whether some process holds the lock of the step whose folder has this name, or of a part of it."""
    folder = RUNS / "locks"
    return any(map(locks.is_held, [folder / f"{name}.lock", *folder.glob(f"{name}.part-*.lock")]))


@contextlib.contextmanager
def _alone(final: Path) -> Iterator[None]:
    """Hold the lock of one step; it is released when the process ends, however it ends."""
    with locks.alone(RUNS / "locks" / f"{final.name}.lock", f"{final.parent.name}/{final.name}"):
        yield


def _compute(spec, final: Path, asked: dict) -> None:
    """Do the step in a folder of its own, add the manifest, rename into place. Nothing remains of a failed attempt."""
    _remove_leftovers(final)
    part = final.with_name(f"{final.name}.part-{os.getpid()}-{platform.node()}")
    part.mkdir(parents=True)
    try:
        with _logged(final) as started, _full_disk_named():
            with _unnoted():
                perform(spec, part)
            manifest = _manifest(spec, part, asked, time.perf_counter() - started)
            (part / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
            _publish(part, final, asked)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def _full_disk_named() -> Iterator[None]:
    """A library that meets a full disk may raise anything at all: then an OSError that says what it is."""
    try:
        yield
    except Exception as error:
        if getattr(error, "errno", None) == errno.ENOSPC or _has_room():
            raise
        reason = f"{os.strerror(errno.ENOSPC)} (met as {type(error).__name__}: {error})"
        raise OSError(errno.ENOSPC, reason, str(RUNS)) from error


def _has_room() -> bool:
    """Whether the disk of RUNS is not full; nor is one that has gone altogether."""
    try:
        return shutil.disk_usage(RUNS).free >= FULL
    except OSError:
        return True


def log_of(place: Path) -> Path:
    """The log of the step with this folder, whether it exists or not."""
    return RUNS / "logs" / place.parent.name / f"{place.name}.log"


@contextlib.contextmanager
def _logged(final: Path) -> Iterator[float]:
    """Write into the log of a step when it starts and how it ends, with the traceback of a failure; yields the start.

    A start without an end is a process that was killed.
    """
    file, started = log_of(final), time.perf_counter()
    kept = (RUNS / "scratch" / final.name).is_dir()
    who = f"process {os.getpid()} on {platform.node()}"

    def note(text: str) -> None:
        with contextlib.suppress(OSError):  # a full disk must not cost the step its own message
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8", errors="backslashreplace") as log:
                log.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {text}\n")

    note(f"started{' on kept work' if kept else ''}: {who}, {', '.join(f'{k} {v}' for k, v in _versions().items())}")
    try:
        yield started
    except BaseException as error:
        what = "failed" if isinstance(error, Exception) else "interrupted"
        note(
            f"{what} after {time.perf_counter() - started:.1f} s\n{''.join(traceback.format_exception(error)).rstrip()}"
        )
        raise
    note(f"finished after {time.perf_counter() - started:.1f} s")


def _remove_leftovers(final: Path) -> None:
    """Remove .part folders of killed runs: of this host, and of a process that no longer runs.

    One with this process's own number is such a leftover too: whoever holds the lock has not made its own yet.
    """
    for part in final.parent.glob(f"{final.name}.part-*"):
        owner = re.fullmatch(r"(\d+)-(.*)", part.name.removeprefix(f"{final.name}.part-"))
        if owner and owner[2] == platform.node():
            pid = int(owner[1])
            if pid == os.getpid() or not psutil.pid_exists(pid):
                shutil.rmtree(part)


def _manifest(spec, part: Path, asked: dict, seconds: float) -> dict:
    """What is recorded of a step just done; `seconds` is the duration of the run that finished it.

    Raises RuntimeError if the step wrote nothing, or a manifest of its own, or if an input changed meanwhile;
    ValueError for a scores.json that is not flat.
    """
    files = _file_hashes(part)
    if not files or MANIFEST in files:
        wrong = f"wrote its own {MANIFEST}, a name the runner needs" if files else "wrote no file into its folder"
        raise RuntimeError(f"{spec!r} {wrong}: correct the function registered for {type(spec).__name__}")
    if _asked(spec) != asked:
        raise RuntimeError(f"an input of {spec!r} changed while it was computed; run again when the inputs are at rest")
    if SCORES in files:
        _read_scores(part)
    return {
        **asked,
        "files": files,
        "versions": _versions(),
        "seed": getattr(spec, "seed", None),
        "seconds": round(seconds, 3),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _publish(part: Path, final: Path, asked: dict) -> None:
    """Rename `part` to `final`; if a good folder has come to lie there meanwhile, that one stays."""
    try:
        os.replace(part, final)
    except OSError:
        if fault_in(final, asked):
            raise


@functools.cache
def _versions() -> dict[str, str]:
    """Version of Python and of each package the results depend on; "unknown" for one that is not installed."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "unknown"
    return versions


def environment_summary() -> str:
    """One line with the versions that results depend on, for the first cell of a notebook."""
    return ", ".join(f"{name} {version}" for name, version in _versions().items())


# Many steps


def run(specs: Iterable, client=None, description: str = "steps") -> pd.DataFrame:
    """Complete every spec and return the table: one row per spec in the order given, settings and scores as columns.

    A setting of a nested spec takes the name of its field if no other setting or score has it, otherwise the enclosing
    field is put in front (finetune_seed), and so on outwards; a score in conflict becomes scores_<name>. Where specs of
    different classes stand in the same place, a column with the name of that place tells the kinds apart ("kind" for
    the specs themselves). Equal specs are computed once and have a row each.

    client: a dask.distributed.Client whose workers see the same RUNS folder; None for the one that `connect` has set;
        without any the steps are done here, one by one. On workers, nested steps are done before what needs them, each once,
        and large steps in `parts`; a worker that is lost costs what it was doing.
    description: what stands before the progress bar.

    Raises TypeError or OSError before any work if a spec is no spec, has no registered function, or RUNS cannot be
    written. If steps fail, all others are still finished; then RuntimeError names the failed ones.
    """
    specs, client = list(specs), client or _connected["client"]
    for spec in specs:
        _require_performable(spec)
    places = [folder(spec) for spec in specs]
    rows = Counter(places)
    waiting = {place: spec for place, spec in zip(places, specs, strict=True) if fault_in(place, _asked(spec))}
    if waiting and client is None:
        _require_writable_runs()
    done = len(specs) - sum(rows[place] for place in waiting)
    drop = _dropping(dict(zip(places, specs, strict=True)), waiting)
    shown = {"desc": description, "total": len(specs), "initial": done, "unit": "spec", "mininterval": 2}
    with contextlib.ExitStack() as stack, tqdm(**shown) as bar, _unnoted():
        for give_back in AT_END:
            stack.callback(give_back)

        def finished(place: Path) -> None:
            bar.update(rows[place])
            drop(place)

        failed = _work_through(waiting, client, finished)
    if failed:
        raise RuntimeError(_failures(waiting, failed)) from next(iter(failed.values()))
    _note(places)
    return _table(specs, places)


_asked_for: dict[str, None] = {}
_noting = contextvars.ContextVar("noting", default=True)


def _note(places: Iterable[Path]) -> None:
    """Remember that this process has asked for these steps, unless a step is asking that is being done."""
    if _noting.get():
        _asked_for.update(dict.fromkeys(f"{place.parent.name}/{place.name}" for place in places))


@contextlib.contextmanager
def _unnoted() -> Iterator[None]:
    before = _noting.set(False)
    try:
        yield
    finally:
        _noting.reset(before)


def asked_for() -> list[str]:
    """The steps, "kind/digest", whose results this process has got from `run` or `complete`, each once, in order."""
    return list(_asked_for)


def _dropping(asked: dict, waiting: dict) -> Callable[[Path], None]:
    """A function to call when a step of `waiting` is finished: it removes what FX_DROP names and no other still needs.

    asked, waiting: folder -> spec. What is asked for itself stays. What nothing that waits needs goes at once.
    """
    kinds = {kind for kind in os.environ.get("FX_DROP", "").replace(" ", "").lower().split(",") if kind}
    if not kinds:
        return lambda place: None
    needs = {place: _inside(spec, kinds) - asked.keys() for place, spec in asked.items()}
    left = Counter(inner for place in waiting for inner in needs[place])
    for inner in set().union(*needs.values()) - left.keys():
        _drop(inner)

    def drop(place: Path) -> None:
        for inner in needs[place]:
            left[inner] -= 1
            if not left[inner]:
                _drop(inner)

    return drop


def _inside(spec, kinds: set[str]) -> set[Path]:
    """The folders of the steps of these kinds that a spec holds, at any depth."""
    nested = {node for _, node in _walk(spec) if node is not spec and _is_step(node)}
    return {folder(node) for node in nested if type(node).__name__.lower() in kinds}


def _drop(place: Path) -> None:
    """Remove a finished step, unless it is being computed."""
    if place.is_dir() and not is_being_computed(place.name):
        gone = place.with_name(f"{place.name}.part-{os.getpid()}-{platform.node()}")
        place.rename(gone)  # at once, so that nobody reads half of it
        shutil.rmtree(gone, ignore_errors=True)


def _work_through(waiting: dict, client, finished: Callable[[Path], object]) -> dict[Path, Exception]:
    """Complete the specs (folder -> spec), call `finished(folder)` after each, return the errors of the failed ones."""
    failed = {}
    outcomes = _complete_here(waiting) if client is None else _complete_on(client, waiting)
    with contextlib.closing(outcomes):
        for place, error in outcomes:
            if error is None:
                finished(place)
            else:
                failed[place] = error
    return failed


def _complete_here(waiting: dict) -> Iterator[tuple[Path, Exception | None]]:
    """Complete the specs (folder -> spec) one by one; yield each folder with the error it ended in, or None.

    OSError at once where the disk is full: every other step would end the same way, some after hours.
    """
    for place, spec in waiting.items():
        try:
            error = _misplaced(place, complete(spec))
        except Exception as caught:
            if getattr(caught, "errno", None) == errno.ENOSPC:
                raise
            error = caught
        yield place, error


def _complete_on(client, waiting: dict) -> Iterator[tuple[Path, Exception | None]]:
    """The same on the workers of a dask client, in the order in which they finish; on exit the rest is cancelled.

    Every unfinished nested step is a task of its own that comes before what needs it, so that no worker waits for
    another, and so are the parts of a step.
    """
    from dask.distributed import as_completed

    tasks: dict = {}
    options = {"pure": False} | _resources(client)
    submitted = {place: _submit(client, spec, tasks, options) for place, spec in waiting.items()}
    futures = {future: place for place, future in submitted.items() if future is not None}
    try:
        for place in submitted.keys() - futures.values():  # finished by somebody else in between
            yield place, None
        for future in as_completed(futures):
            place = futures[future]
            yield place, future.exception() or _misplaced(place, future.result())
    finally:
        client.cancel([*futures, *(task for task in tasks.values() if task is not None and task not in futures)])


def _submit(client, spec, tasks: dict, options: dict):
    """The future of a step, after those of what it needs; None if it is finished. tasks: address -> future, so far."""
    asked = _asked(spec)
    place = place_of(asked)
    if place not in tasks:
        tasks[place] = None
        if fault_in(place, asked):
            before = [_submit(client, inner, tasks, options) for inner in nested_steps(spec)]
            before = [future for future in before if future is not None]
            if shares := parts(spec):
                before = [client.submit(_after, before, "part", spec, *share, **options) for share in shares]
            tasks[place] = client.submit(_after, before, "whole", spec, **options)
    return tasks[place]


def _after(before: list, what: str, spec, *share) -> Path | None:
    """On a worker: a step or a part of it, once what it needs is there."""
    if what == "whole":
        return complete(spec)
    asked = _asked(spec)
    if fault_in(place := place_of(asked), asked):
        own = RUNS / "locks" / f"{place.name}.part-{share[0]}.lock"
        own.parent.mkdir(parents=True, exist_ok=True)
        try:
            with locks.alone(own, f"a part of {place.parent.name}/{place.name}"):
                perform_part(spec, *share)
        except OSError:  # its scratch was removed by somebody who has finished the step meanwhile
            if fault_in(place, asked):
                raise
    return None


def nested_steps(spec) -> list:
    """The steps that a spec holds directly, in order, each once."""
    inside = _walk(spec, enter=lambda node: node is spec or not _is_step(node))
    return list(dict.fromkeys(node for _, node in inside if node is not spec and _is_step(node)))


def _resources(client) -> dict[str, dict[str, int]]:
    """One GPU for each task where workers offer any as a dask resource."""
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    return {"resources": {"GPU": 1}} if any(worker.get("resources", {}).get("GPU") for worker in workers) else {}


_connected: dict = {"client": None}
# dask's own value keeps glibc from raising the size from which it takes every tensor from the kernel anew: a third of the
# time of mini models then goes into clearing pages
TRIMMING = "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_"


def connect(scheduler: str) -> None:
    """Let every later `run` of this process use a dask cluster; "" for none, steps are then done here.

    scheduler: "local:4" for four worker processes on this machine, one thread each; the address of a scheduler
    ("tcp://host:8786"); or the path of a scheduler file (*.json). ValueError for anything else, where dask is not
    installed, and for workers with several threads, which would share one generator of random numbers; OSError if no
    scheduler answers.
    """
    if (old := _connected["client"]) is not None:
        _connected["client"] = None
        old.close()
    check_scheduler(scheduler)
    if not scheduler:
        return
    import dask
    from dask.distributed import Client

    kind, _, rest = scheduler.partition(":")
    if kind == "local":  # a cluster of the client's own, which ends with it
        with dask.config.set({TRIMMING: None}):
            client = Client(n_workers=int(rest), threads_per_worker=1, dashboard_address=":0")
    else:
        client = Client(scheduler_file=scheduler) if scheduler.endswith(".json") else Client(scheduler, timeout=10)
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    if many := [worker["nthreads"] for worker in workers if worker["nthreads"] > 1]:
        client.close()
        raise ValueError(f"a worker of {scheduler} has {many[0]} threads: start its workers with --nthreads 1")
    print(f"{len(workers)} workers, dashboard {client.dashboard_link}")
    _connected["client"] = client


def check_scheduler(scheduler: str) -> None:
    """ValueError, before anything is asked of it, for what `connect` does not know, and where dask is not installed."""
    kind, _, rest = scheduler.partition(":")
    if scheduler and not (kind == "local" and rest.isdecimal() and int(rest) > 0) and "://" not in scheduler:
        if not scheduler.endswith(".json"):
            raise ValueError(
                f'scheduler {scheduler!r}: "" for none, "local:4" for four processes here, an address such as '
                '"tcp://host:8786", or a scheduler file (*.json)'
            )
        if not Path(scheduler).is_file():
            raise ValueError(f"there is no scheduler file {scheduler}: start dask with --scheduler-file {scheduler}")
    if scheduler and not importlib.util.find_spec("distributed"):
        raise ValueError("a scheduler needs dask: pip install -e .[cluster]")


def _misplaced(place: Path, finished: Path) -> Exception | None:
    """The error of a step that was finished elsewhere than its table row will be read from; None if it was not."""
    if finished.name == place.name and (place / MANIFEST).exists():
        return None
    return FileNotFoundError(
        f"it was finished as {finished}, which is not found as {place}: set FX_RUNS to one folder that all workers "
        "share, give all of them the same inputs, and leave the inputs alone during the run"
    )


def _failures(waiting: dict, failed: dict[Path, Exception]) -> str:
    """The message that names every failed spec, its digest and its error."""
    lines = [f"- {waiting[place]!r} ({place.name}): {type(error).__name__}: {error}" for place, error in failed.items()]
    return "\n".join(
        [f"{len(failed)} step(s) failed; everything else is finished and kept, so a new run does only these:", *lines]
    )


# The table


def _table(specs: list, places: list[Path]) -> pd.DataFrame:
    """One row per spec: its settings, then the scores in its folder, each under the shortest name that is its own."""
    settings = _settings(specs)
    scores = [{("scores", name): value for name, value in _read_scores(place).items()} for place in places]
    paths = dict.fromkeys(path for row in [*settings, *scores] for path in row)
    names = _column_names(paths)
    rows = [
        {names[path]: value for path, value in (setting | score).items()}
        for setting, score in zip(settings, scores, strict=True)
    ]
    return pd.DataFrame(rows, columns=list(names.values()))


def _settings(specs: list) -> list[dict[tuple[str, ...], object]]:
    """Path -> value of the settings of each spec; the kind of a spec is a setting only where the kinds differ."""
    rows = [dict(_walk(spec)) for spec in specs]
    kinds = [
        {path: type(node).__name__.lower() for path, node in row.items() if dataclasses.is_dataclass(node)}
        for row in rows
    ]
    places = {path for row in kinds for path in row}
    everywhere = {path for path in places if len({row.get(path) for row in kinds}) == 1}
    return [
        {path or ("spec", "kind"): value for path, value in (row | kind).items() if path not in everywhere}
        for row, kind in zip(rows, kinds, strict=True)
    ]


def _column_names(paths: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """A name per path: its last part alone where that is unique, else as many parts before it as make it unique.

    If even whole paths read the same (field "a_b" beside field "b" of field "a"), those are joined with dots.
    """
    depths = dict.fromkeys(paths, 1)
    while True:
        names = {path: "_".join(path[-depth:]) for path, depth in depths.items()}
        uses = Counter(names.values())
        longer = [path for path, name in names.items() if uses[name] > 1 and depths[path] < len(path)]
        if not longer:
            return {path: name if uses[name] == 1 else ".".join(path) for path, name in names.items()}
        depths.update({path: depths[path] + 1 for path in longer})


def _read_scores(path: Path) -> dict[str, float | int | str | bool | None]:
    """The contents of scores.json in a folder, {} without one; ValueError if it is not flat."""
    file = path / SCORES
    try:
        scores = json.loads(file.read_bytes()) if file.exists() else {}
    except ValueError as error:
        raise ValueError(f"{SCORES} is not JSON ({error}); write it with json.dumps") from error
    if not isinstance(scores, dict) or any(isinstance(value, (dict, list)) for value in scores.values()):
        raise ValueError(f"{SCORES} must be one flat object of numbers and strings, not {scores!r:.200}")
    return scores
