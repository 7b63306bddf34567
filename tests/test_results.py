"""The runner: content addresses, resume after a kill, verification before reuse, the table, a dask client.

The steps here are toys. Each writes a line to a log outside its folder, so that a test can count what was really done,
in this process and in killed ones.
"""

import copy
import errno
import hashlib
import json
import math
import multiprocessing
import os
import platform
import re
import runpy
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pandas as pd
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fx import results

ROOT = Path(__file__).resolve().parents[1]
DEADLINE = 30  # seconds after which a test gives up on another process
HALT: dict[str, str] = {}  # where the steps of this process stand still; set in other processes only


# toy steps


@dataclass(frozen=True)
class Square:
    """A step with two files, one of them in a subfolder, and scores."""

    number: int
    label: str = "a"
    seed: int = 0


@dataclass(frozen=True)
class Mean:
    """A step that reads other steps."""

    squares: tuple[Square, ...]
    seed: int = 0


@dataclass(frozen=True)
class Copy:
    """A step that reads a file from outside; it keeps only the file's length, so two contents give the same rows."""

    source: str


@dataclass(frozen=True)
class Around:
    """A step around any other value."""

    inner: object
    seed: int = 0


@dataclass(frozen=True)
class Long:
    """A step of several parts that goes on where it was interrupted."""

    parts: int


@dataclass(frozen=True)
class Faulty:
    """A step that does something wrong."""

    what: str


@dataclass(frozen=True)
class Read:
    """No step: names a file that the step around it reads."""

    source: str
    label: str = "a"


@dataclass(frozen=True)
class Drawn:
    """A step of n files, of which a larger n holds all of a smaller one."""

    GROWS: ClassVar[str] = "n"

    n: int
    label: str = "a"
    inner: object = None


@dataclass(frozen=True)
class Unheard:
    """A spec without a function."""

    number: int = 0


def log(line: str) -> None:
    with (results.RUNS / "calls.log").open("a") as file:
        file.write(line + "\n")


def calls() -> Counter:
    """How often each step was begun below RUNS, by any process."""
    path = results.RUNS / "calls.log"
    return Counter(path.read_text().split("\n")[:-1]) if path.exists() else Counter()


def halt(place: str) -> None:
    """Stand still at the place that `begin` chose, until the file `go` appears or the process is killed."""
    if place == HALT.get("place"):
        (results.RUNS / "halted").touch()
        wait_for(results.RUNS / "go")


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + DEADLINE
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} did not appear"
        time.sleep(0.01)


@results.perform.register
def _(spec: Square, folder: Path) -> None:
    log(f"square {spec.number}")
    (folder / "deep").mkdir()
    (folder / "deep" / "digits.txt").write_text(f"{spec.number**2} {spec.label}")
    halt(f"square {spec.number}")
    (folder / "scores.json").write_text(json.dumps({"square": spec.number**2, "root": math.sqrt(abs(spec.number))}))


@results.perform.register
def _(spec: Mean, folder: Path) -> None:
    log("mean")
    read = [json.loads((results.complete(s) / "scores.json").read_text())["square"] for s in spec.squares]
    (folder / "scores.json").write_text(json.dumps({"mean": sum(read) / len(read)}))


@results.perform.register
def _(spec: Copy, folder: Path) -> None:
    log("copy")
    content = Path(spec.source).read_bytes()
    (folder / "copy.bin").write_bytes(content)
    (folder / "scores.json").write_text(json.dumps({"length": len(content)}))


@results.inputs.register
def _(spec: Copy) -> dict[str, str]:
    return {"source": results.sha256_of(spec.source)}


@results.inputs.register
def _(spec: Read) -> dict[str, str]:
    return {"source": results.sha256_of(spec.source)}


@results.perform.register
def _(spec: Drawn, folder: Path) -> None:
    known = {path.name: path for other in results.relatives(spec) for path in other.glob("*.txt")}
    for number in range(spec.n):
        if name := known.get(f"{number}.txt"):
            shutil.copy(name, folder)
        else:
            log(f"drawn {number}")
            (folder / f"{number}.txt").write_text(f"{number} {spec.label}")


@results.perform.register
def _(spec: Around, folder: Path) -> None:
    log("around")
    (folder / "scores.json").write_text(json.dumps({"loss": 0.5, "seed": 7}))


@results.perform.register
def _(spec: Long, folder: Path) -> None:
    log("long")
    state = results.scratch(spec) / "state.txt"
    state.touch()
    for part in range(len(state.read_text()), spec.parts):
        halt(f"part {part}")
        log(f"part {part}")
        with state.open("a") as file:
            file.write("x")
    shutil.copy(state, folder / "state.txt")


@results.perform.register
def _(spec: Faulty, folder: Path) -> None:
    log(f"faulty {spec.what}")
    (folder / "begun.txt").touch()
    match spec.what:
        case "raises":
            raise ZeroDivisionError("the toy divided by zero")
        case "interrupted":
            raise KeyboardInterrupt
        case "writes nothing":
            (folder / "begun.txt").unlink()
        case "own manifest":
            (folder / "manifest.json").write_text("{}")
        case "nested scores":
            (folder / "scores.json").write_text('{"a": {"b": 1}}')
        case "broken scores":
            (folder / "scores.json").write_text("{")


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch) -> Path:
    """An empty RUNS."""
    monkeypatch.setattr(results, "RUNS", tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture(scope="module")
def processes():
    """A source of other processes, each forked from one that has imported this module and has no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        first = context.Process(target=halt, args=("nowhere",))
        first.start()  # starts the server, which keeps this environment
        first.join(DEADLINE)
    return context


def begin(processes, place: str, work: Callable, *arguments) -> multiprocessing.Process:
    """Another process on the same RUNS that does work(*arguments) and has come to `place`, where it stands still."""
    process = processes.Process(target=work_elsewhere, args=(results.RUNS, place, work, arguments))
    process.start()
    wait_for(results.RUNS / "halted")
    return process


def work_elsewhere(runs: Path, place: str, work: Callable, arguments: tuple) -> None:
    """What another process does."""
    results.RUNS = runs
    HALT["place"] = place
    work(*arguments)


def kill_at(processes, place: str, work: Callable, *arguments) -> int:
    """Let another process do work(*arguments) and kill it without warning when it has come to `place`; its pid."""
    process = begin(processes, place, work, *arguments)
    process.kill()
    process.join(DEADLINE)
    (results.RUNS / "halted").unlink()
    assert process.exitcode == -signal.SIGKILL
    return process.pid


def leftovers() -> list[str]:
    return sorted(path.name for path in results.RUNS.rglob("*.part-*"))


def set_aside() -> list[Path]:
    return sorted(results.RUNS.rglob("*.set-aside-*"))


# the table


def test_rows_hold_settings_then_scores_in_the_order_given():
    table = results.run([Square(3, "b"), Square(-2), Square(0)])
    expected = pd.DataFrame(
        {
            "number": [3, -2, 0],
            "label": ["b", "a", "a"],
            "seed": [0, 0, 0],
            "square": [9, 4, 0],
            "root": [3**0.5, 2**0.5, 0.0],
        }
    )
    pd.testing.assert_frame_equal(table, expected)


def test_no_specs_give_an_empty_table():
    assert results.run([]).empty


def test_specs_may_come_from_a_generator():
    assert results.run(Square(n) for n in (1, 2))["square"].tolist() == [1, 4]


def test_a_step_without_scores_gives_its_settings_only():
    assert results.run([Long(2)]).to_dict("records") == [{"parts": 2}]


def test_equal_specs_are_computed_once_and_have_a_row_each():
    table = results.run([Square(2), Square(5), Square(2)])
    assert table["square"].tolist() == [4, 25, 4]
    assert calls() == {"square 2": 1, "square 5": 1}


def spec_class(name: str, **fields):
    """An instance of a new frozen class with these field values, in this order."""
    return make_dataclass(name, fields, frozen=True)(**fields)


def columns(*specs) -> list[str]:
    return results.run(specs).columns.tolist()


def test_a_unique_leaf_stands_alone_and_a_colliding_one_takes_its_parent():
    inner = spec_class("Train", method="lora", seed=1)
    table = results.run([Around(inner, seed=2)])
    # Around's scores are loss and seed, so three things are called seed
    assert table.to_dict("records") == [{"method": "lora", "inner_seed": 1, "seed": 2, "loss": 0.5, "scores_seed": 7}]


def test_colliding_parents_take_theirs_in_turn():
    leaf = spec_class("Leaf", rank=1)
    tree = spec_class(
        "Tree", left=spec_class("Branch", twig=leaf), right=spec_class("Branch", twig=replace(leaf, rank=2))
    )
    assert columns(Around(tree))[:2] == ["left_twig_rank", "right_twig_rank"]


def test_names_that_no_parent_can_tell_apart_are_joined_with_dots():
    inner = spec_class("Outer", a_b=1, a=spec_class("Inner", b=2), b=3)
    assert columns(Around(inner))[:3] == ["inner.a_b", "inner.a.b", "inner_b"]


def test_elements_of_a_tuple_of_specs_are_numbered_and_plain_tuples_stay_whole():
    table = results.run([Mean((Square(1), Square(3)))])
    assert table.loc[0, ["squares[0]_number", "squares[1]_number", "mean"]].tolist() == [1, 3, 5]
    plain = results.run([Around((1, "x"))])
    assert plain.loc[0, "inner"] == (1, "x")


def test_names_are_chosen_for_all_rows_together():
    """A leaf unique in one row and not in another has one name in both; what a row lacks is missing."""
    table = results.run([Around(spec_class("A", depth=1)), Around(spec_class("B", depth=2, seed=3))])
    assert "seed" in table
    assert table["depth"].tolist() == [1, 2]
    assert table["inner_seed"].isna().tolist() == [True, False]


def test_the_kind_is_a_column_only_where_kinds_differ():
    table = results.run([Around(Square(1)), Around(Unheard()), Around(None)])
    assert table["inner"].tolist()[:2] == ["square", "unheard"]
    assert pd.isna(table["inner"][2])
    assert "inner" not in columns(Around(Square(1)), Around(Square(2)))
    assert results.run([Square(1), Long(1)])["kind"].tolist() == ["square", "long"]
    assert "kind" not in columns(Square(1), Square(2))


# resume


def test_finished_steps_are_not_done_again():
    first = results.run([Square(n) for n in range(3)])
    again = results.run([Square(n) for n in range(4)])
    assert calls() == {f"square {n}": 1 for n in range(4)}
    pd.testing.assert_frame_equal(again.iloc[:3], first)


def test_complete_returns_the_folder_and_does_nested_steps_on_the_way():
    folder = results.complete(Mean((Square(1), Square(3))))
    assert folder == results.folder(Mean((Square(1), Square(3))))
    assert json.loads((folder / "scores.json").read_text()) == {"mean": 5.0}
    assert (results.folder(Square(3)) / "deep" / "digits.txt").read_text() == "9 a"
    assert calls() == {"mean": 1, "square 1": 1, "square 3": 1}


def test_killed_while_a_step_is_computed(processes):
    pid = kill_at(processes, "square 3", results.complete, Square(3))
    assert leftovers() == [f"{results.digest(Square(3))}.part-{pid}-{platform.node()}"]
    assert not results.folder(Square(3)).exists()
    table = results.run([Square(3)])
    assert table["square"].tolist() == [9]
    assert calls() == {"square 3": 2}
    assert leftovers() == []


def test_killed_in_the_middle_of_a_run(processes, tmp_path, monkeypatch):
    kill_at(processes, "square 2", results.run, [Square(n) for n in range(4)])
    table = results.run([Square(n) for n in range(4)])
    assert calls() == {"square 0": 1, "square 1": 1, "square 2": 2, "square 3": 1}
    assert leftovers() == []
    monkeypatch.setattr(results, "RUNS", tmp_path / "undisturbed")
    pd.testing.assert_frame_equal(table, results.run([Square(n) for n in range(4)]))


def test_killed_inside_a_long_step_goes_on_from_its_scratch(processes):
    kill_at(processes, "part 2", results.complete, Long(4))
    assert (results.scratch(Long(4)) / "state.txt").read_text() == "xx"
    assert (results.complete(Long(4)) / "state.txt").read_text() == "xxxx"
    assert calls() == {"long": 2} | {f"part {n}": 1 for n in range(4)}
    assert list((results.RUNS / "scratch").iterdir()) == []


def lines_of(spec) -> list[str]:
    return results.log_of(results.folder(spec)).read_text().splitlines()


def test_the_log_of_a_step_tells_every_try(processes):
    pid = kill_at(processes, "part 2", results.complete, Long(4))
    results.complete(Long(4))
    first, second, last = lines_of(Long(4))
    assert f"started: process {pid} on {platform.node()}, python {platform.python_version()}" in first
    assert f"started on kept work: process {os.getpid()}" in second
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00 finished after \d+\.\d s", last)
    results.complete(Long(4))  # finished, so nothing is tried
    assert len(lines_of(Long(4))) == 3


@pytest.mark.parametrize(
    ("what", "word", "error", "last"),
    [
        ("raises", "failed", RuntimeError, "ZeroDivisionError: the toy divided by zero"),
        ("interrupted", "interrupted", KeyboardInterrupt, "KeyboardInterrupt"),
    ],
)
def test_the_log_of_a_failed_step_holds_its_traceback(what, word, error, last):
    with pytest.raises(error):
        results.run([Faulty(what)])
    _, ended, *traceback = lines_of(Faulty(what))
    assert f" {word} after " in ended
    assert traceback[0].startswith("Traceback")
    assert traceback[-1] == last


def test_a_log_that_cannot_be_written_costs_nothing():
    results.log_of(results.folder(Square(1))).parent.parent.mkdir(parents=True)
    results.log_of(results.folder(Square(1))).parent.write_text("a file where the folder should be")
    assert results.run([Square(1)]).square.tolist() == [1]


# steps that are dropped


def test_what_is_to_be_dropped_goes_when_nothing_that_was_asked_for_needs_it(monkeypatch):
    monkeypatch.setenv("FX_DROP", "square")
    shared, own = Square(1), Square(2)
    seen = []
    real = results._complete_here

    def watched(waiting):
        for place, error in real(waiting):
            yield place, error
            seen.append([results.folder(square).exists() for square in (shared, own)])

    monkeypatch.setattr(results, "_complete_here", watched)
    table = results.run([Mean((shared,)), Mean((shared, own)), Square(3)])
    assert seen == [[True, False], [False, False], [False, False]]
    assert results.folder(Square(3)).exists()  # asked for itself
    assert table["mean"].tolist()[:2] == [1.0, 2.5]
    assert leftovers() == []


def test_what_was_asked_for_itself_or_is_of_another_kind_is_never_dropped(monkeypatch):
    monkeypatch.setenv("FX_DROP", "mean, square")
    results.run([Around(Mean((Square(1),))), Square(1)])
    assert results.folder(Square(1)).exists()
    assert results.folder(Around(Mean((Square(1),)))).exists()
    results.complete(Square(5))
    results.run([Mean((Square(6),))])
    assert results.folder(Square(5)).exists()


def test_what_a_killed_run_left_is_dropped_by_the_next_and_computed_again_where_it_is_needed(monkeypatch):
    before = results.run([Mean((Square(1), Square(2)))])
    monkeypatch.setenv("FX_DROP", "square")
    pd.testing.assert_frame_equal(results.run([Mean((Square(1), Square(2)))]), before)
    assert not results.folder(Square(1)).exists()
    assert results.run([Mean((Square(1),))])["mean"].tolist() == [1.0]
    assert calls() == {"square 1": 2, "square 2": 1, "mean": 2}


def test_without_being_told_nothing_is_dropped(monkeypatch):
    monkeypatch.delenv("FX_DROP", raising=False)
    results.run([Mean((Square(1),))])
    assert results.folder(Square(1)).exists()


def test_scratch_has_a_place_of_its_own_and_goes_after_success_only():
    assert results.scratch(Long(1)) == results.RUNS / "scratch" / results.digest(Long(1))
    assert results.scratch(Long(1)).is_dir()
    (results.scratch(Faulty("raises")) / "state").touch()
    results.complete(Long(1))
    with pytest.raises(ZeroDivisionError):
        results.complete(Faulty("raises"))
    assert [path.name for path in (results.RUNS / "scratch").iterdir()] == [results.digest(Faulty("raises"))]


def test_only_parts_of_dead_processes_of_this_host_are_removed(monkeypatch):
    monkeypatch.setattr(psutil, "pid_exists", lambda pid: pid in (111, os.getpid()))
    folder = results.folder(Square(1))
    owners = {"111-{}": True, "222-{}": False, "222-elsewhere": True, f"{os.getpid()}-{{}}": False, "unknown": True}
    for owner in owners:
        Path(f"{folder}.part-{owner.format(platform.node())}").mkdir(parents=True)
    results.complete(Square(1))
    kept = [f"{folder.name}.part-{owner.format(platform.node())}" for owner, stays in owners.items() if stays]
    assert leftovers() == sorted(kept)


def test_a_step_that_another_process_computes_is_waited_for(processes):
    process = begin(processes, "square 6", results.complete, Square(6))
    threading.Timer(0.3, (results.RUNS / "go").touch).start()
    with pytest.warns(UserWarning, match=f"computing square/{results.digest(Square(6))}; waiting"):
        results.complete(Square(6))
    process.join(DEADLINE)
    assert process.exitcode == 0
    assert calls() == {"square 6": 1}


@pytest.mark.filterwarnings("ignore:another process or thread")
def test_threads_compute_a_shared_step_once():
    threads = [threading.Thread(target=results.complete, args=(Mean((Square(1),), seed=n),)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert calls() == {"mean": 4, "square 1": 1}


def test_a_folder_published_meanwhile_wins_if_it_is_good_and_is_left_alone_if_not(tmp_path):
    """Where locks do not work, two processes may finish the same step: here the rival has, just before the rename."""
    rival = tmp_path / "rival"
    shutil.copytree(results.complete(Square(1)), rival)
    shutil.rmtree(results.folder(Square(1)))
    manifest = (rival / "manifest.json").read_bytes()
    asked = json.loads(manifest)
    part = tmp_path / "part"
    shutil.copytree(rival, part)
    (part / "manifest.json").write_text("mine")
    shutil.copytree(rival, results.folder(Square(1)))
    results._publish(part, results.folder(Square(1)), {key: asked[key] for key in ("spec", "inputs")})
    assert (results.folder(Square(1)) / "manifest.json").read_bytes() == manifest
    (results.folder(Square(1)) / "scores.json").write_text("{}")
    with pytest.raises(OSError, match="part"):
        results._publish(part, results.folder(Square(1)), {key: asked[key] for key in ("spec", "inputs")})
    assert (results.folder(Square(1)) / "scores.json").read_text() == "{}"


# verification


def edit_manifest(folder: Path, change) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def same_size_and_time(folder: Path) -> None:
    """Other bytes, but the same length and time of modification."""
    path = folder / "deep" / "digits.txt"
    stat, content = path.stat(), path.read_text()
    time.sleep(0.02)  # longer than the tick of the file system's clock
    path.write_text(content[::-1])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def become_foreign(folder: Path) -> None:
    other = results.complete(Square(8))
    shutil.rmtree(folder)
    shutil.copytree(other, folder)


def become_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("a note")


DAMAGE = {
    "changed file": (lambda f: (f / "scores.json").write_text('{"square": 99}'), "changed: scores.json"),
    "same size and time": (same_size_and_time, "changed: deep/digits.txt"),
    "emptied file": (lambda f: (f / "deep" / "digits.txt").write_text(""), "changed: deep/digits.txt"),
    "missing file": (lambda f: (f / "deep" / "digits.txt").unlink(), "missing: deep/digits.txt"),
    "unknown file": (lambda f: (f / "deep" / "other.txt").touch(), "unknown: deep/other.txt"),
    "dangling link": (lambda f: (f / "link").symlink_to("nowhere"), "cannot be read"),
    "manifest gone": (lambda f: (f / "manifest.json").unlink(), "cannot be read"),
    "manifest no JSON": (lambda f: (f / "manifest.json").write_text('{"spec'), "cannot be read"),
    "manifest no text": (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe\xff"), "cannot be read"),
    "manifest a list": (lambda f: (f / "manifest.json").write_text("[1]"), "no list of files"),
    "manifest without files": (lambda f: edit_manifest(f, lambda m: m.pop("files")), "no list of files"),
    "another setting": (lambda f: edit_manifest(f, lambda m: m["spec"]["fields"].update(number=4)), 'another "spec"'),
    "another type": (lambda f: edit_manifest(f, lambda m: m["spec"]["fields"].update(seed=False)), 'another "spec"'),
    "not a number": (lambda f: edit_manifest(f, lambda m: m["spec"]["fields"].update(seed=math.nan)), 'another "spec"'),
    "another input": (lambda f: edit_manifest(f, lambda m: m["inputs"].update(images="0" * 64)), 'another "inputs"'),
    "another hash": (lambda f: edit_manifest(f, lambda m: m["files"].update({"scores.json": "0"})), "changed: scores"),
    "foreign folder": (become_foreign, 'another "spec"'),
    "empty folder": (lambda f: [shutil.rmtree(f), f.mkdir()], "cannot be read"),
    "a file": (become_a_file, "cannot be read"),
}


def contents(path: Path) -> dict[str, bytes]:
    """Every file below a folder (or the file itself) with its bytes."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return {str(p.relative_to(path)): p.read_bytes() for p in files}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("seen", [False, True], ids=["unseen", "verified before"])
def test_what_is_damaged_or_foreign_is_set_aside_and_computed_anew(name, seen):
    damage, reason = DAMAGE[name]
    good = results.run([Square(3)])
    folder = results.complete(Square(3))
    if seen:
        results.run([Square(3)])
    damage(folder)
    damaged = contents(folder)
    with pytest.warns(UserWarning, match=reason) as caught:
        again = results.run([Square(3)])
    assert f"square/{folder.name} was set aside as {folder.name}.set-aside-1" in str(caught[0].message)
    assert calls()["square 3"] == 2
    pd.testing.assert_frame_equal(again, good)
    assert [path.name for path in set_aside()] == [f"{folder.name}.set-aside-1"]
    assert contents(set_aside()[0]) == damaged
    results.run([Square(3)])
    assert calls()["square 3"] == 2


def test_every_damaged_folder_is_kept_under_its_own_number():
    for text in ("first", "second"):
        (results.complete(Square(1)) / "scores.json").write_text(text)
        with pytest.warns(UserWarning, match="set aside"):
            results.complete(Square(1))
    assert [path.name[-1] + (path / "scores.json").read_text() for path in set_aside()] == ["1first", "2second"]


def test_hidden_files_do_no_harm():
    folder = results.complete(Square(1))
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints" / "scores-checkpoint.json").touch()
    (folder / "deep" / ".DS_Store").touch()
    results.complete(Square(1))
    assert calls() == {"square 1": 1}


def test_a_damaged_nested_step_is_computed_anew_where_it_is_used():
    (results.complete(Square(3)) / "scores.json").write_text('{"square": 1000}')
    with pytest.warns(UserWarning, match="changed: scores.json"):
        table = results.run([Mean((Square(3),))])
    assert table["mean"].tolist() == [9]


def test_a_file_is_read_once_per_process(monkeypatch):
    results.run([Square(1)])
    results.run([Square(1)])
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("a file was hashed again"))
    results.run([Square(1)])


# the manifest


def test_the_manifest_says_what_was_done(tmp_path, monkeypatch):
    clock = iter((100.0, 141.125, 142.0))  # the last for the log
    monkeypatch.setattr(results, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    source = tmp_path / "source.bin"
    source.write_bytes(b"abc")
    folder = results.complete(Around(Read(str(source)), seed=5))
    manifest = json.loads((folder / "manifest.json").read_text())
    inner = {"kind": "read", "version": 1, "fields": {"source": str(source), "label": "a"}}
    assert manifest["spec"] == {"kind": "around", "version": 1, "fields": {"inner": inner, "seed": 5}}
    assert manifest["inputs"] == {"inner.source": hashlib.sha256(b"abc").hexdigest()}
    assert manifest["files"] == {"scores.json": hashlib.sha256((folder / "scores.json").read_bytes()).hexdigest()}
    assert manifest["versions"].keys() == {"python", "torch", "diffusers", "transformers", "peft", "numpy", "fx"}
    assert manifest["versions"]["numpy"] == np.__version__
    assert manifest["seed"] == 5
    assert manifest["seconds"] == 41.125
    assert abs(pd.Timestamp.now("UTC") - pd.Timestamp(manifest["finished"])) < pd.Timedelta(minutes=1)


def test_a_step_without_seed_has_none():
    assert json.loads((results.complete(Long(1)) / "manifest.json").read_text())["seed"] is None


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("writes nothing", RuntimeError, "wrote no file"),
        ("own manifest", RuntimeError, "own manifest.json"),
        ("nested scores", ValueError, "flat"),
        ("broken scores", ValueError, "not JSON"),
        ("raises", ZeroDivisionError, "divided"),
        ("interrupted", KeyboardInterrupt, None),
    ],
)
def test_nothing_is_kept_of_a_step_that_goes_wrong(what, error, message):
    with pytest.raises(error, match=message):
        results.complete(Faulty(what))
    assert list((results.RUNS / "faulty").iterdir()) == []


@dataclass(frozen=True)
class Odd:
    """A step in a library that says something odd."""

    n: int = 0


@results.perform.register
def _(spec: Odd, folder: Path) -> None:
    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")


def test_a_full_disk_is_called_so_whatever_the_library_says(monkeypatch):
    usage = shutil.disk_usage(Path.cwd())
    with pytest.raises(RuntimeError, match="unexpected pos"):
        results.complete(Odd())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4096))
    with pytest.raises(OSError, match=r"No space left on device \(met as RuntimeError: .*unexpected pos") as found:
        results.complete(Odd())
    assert (found.value.errno, found.value.filename) == (errno.ENOSPC, str(results.RUNS))
    assert "No space left on device" in results.log_of(results.folder(Odd())).read_text()


def test_a_full_disk_ends_a_run_at_once(monkeypatch):
    """The steps after it are not tried: each would end the same way, some after hours."""
    tried, complete = [], results.complete

    def on_a_full_disk(spec):
        tried.append(spec)
        if isinstance(spec, Odd):
            raise OSError(errno.ENOSPC, "No space left on device")
        return complete(spec)

    monkeypatch.setattr(results, "complete", on_a_full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        results.run([Square(1), Odd(), Square(2)])
    assert tried == [Square(1), Odd()]
    assert results.run([Square(1)])["square"].tolist() == [1]


def test_a_disk_that_is_gone_is_not_called_full(monkeypatch):
    def gone(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(shutil, "disk_usage", gone)
    with pytest.raises(RuntimeError, match="unexpected pos"):
        results.complete(Odd())


def test_environment_summary_is_one_line_of_versions():
    summary = results.environment_summary()
    assert "\n" not in summary
    assert f"python {platform.python_version()}, torch " in summary
    assert f"numpy {np.__version__}" in summary


# addresses


def test_digest_is_the_sha256_of_the_canonical_json():
    text = '{"inputs":{},"spec":{"fields":{"label":"a","number":3,"seed":0},"kind":"square","version":1}}'
    assert results.digest(Square(3)) == hashlib.sha256(text.encode()).hexdigest()[:16]
    assert results.folder(Square(3)) == results.RUNS / "square" / results.digest(Square(3))
    assert not results.RUNS.exists()


@pytest.mark.parametrize("change", [{"number": 4}, {"label": "b"}, {"seed": 1}, {"seed": 0.0}, {"seed": False}])
def test_a_changed_field_changes_the_digest(change):
    assert results.digest(replace(Square(3), **change)) != results.digest(Square(3))


def test_the_order_of_fields_does_not_matter_but_names_and_kind_do():
    base = results.digest(spec_class("Toy", a=1, b=2))
    assert results.digest(spec_class("Toy", b=2, a=1)) == base
    others = [spec_class("Toy", a=2, b=1), spec_class("Toy", a=1, c=2), spec_class("Tool", a=1, b=2)]
    assert base not in map(results.digest, others)


def test_nested_fields_and_their_order_in_a_tuple_enter_the_digest():
    specs = [
        Mean((Square(1), Square(2))),
        Mean((Square(2), Square(1))),
        Mean((Square(1), Square(2, "b"))),
        Mean((Square(1),)),
        Mean(()),
        Around(Square(1)),
        Around((Square(1),)),
        Around(((Square(1),),)),
        Around(Around(Square(1))),
        Around(None),
    ]
    assert len({results.digest(spec) for spec in specs}) == len(specs)


def test_values_that_differ_in_anything_have_different_digests():
    plain = [None, True, False, 0, 1, -1, 0.0, 1.0, 0.1, 0.1 + 1e-16, 1e300, "", "0", "1", "null", "true", "é", "[]"]
    values = [*plain, (), *((value,) for value in plain), (0, 1), (1, 0), ((0,), 1), (0, (1,)), ((0, 1),), 10**30]
    assert len({results.digest(Around(value)) for value in values}) == len(set(map(repr, values))) == len(values)


def test_a_nested_step_enters_by_its_address_alone_and_any_other_spec_with_all_it_has(tmp_path):
    source = tmp_path / "secret-images"
    source.write_bytes(b"abc")
    step, read = Copy(str(source)), Read(str(source), "plain words")
    folder = results.complete(Around((Mean((Square(5, "hush"),)), step, read)))
    text = (folder / "manifest.json").read_text()
    manifest = json.loads(text)
    mean, copied, described = manifest["spec"]["fields"]["inner"]
    assert mean == {"kind": "mean", "digest": results.digest(Mean((Square(5, "hush"),)))}
    assert copied == {"kind": "copy", "digest": results.digest(step)}
    fields = {"source": str(source), "label": "plain words"}
    assert described == {"kind": "read", "version": 1, "fields": fields}
    assert manifest["inputs"] == {"inner[2].source": hashlib.sha256(b"abc").hexdigest()}
    hidden = results.complete(Around((Mean((Square(5, "hush"),)), step))) / "manifest.json"
    for secret in ("secret-images", "hush", hashlib.sha256(b"abc").hexdigest()):
        assert secret not in hidden.read_text()


def test_inputs_of_a_nested_step_change_the_address_of_the_steps_around_it(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"one")
    specs = [Around(Around(Copy(str(source)))), Around(Around((1, Read(str(source)))))]
    before = [results.digest(spec) for spec in specs]
    source.write_bytes(b"three")
    assert not {*before} & {results.digest(spec) for spec in specs}


def test_a_version_is_part_of_the_address_of_a_step_and_of_those_built_on_it(monkeypatch):
    specs = [Square(3), Mean((Square(3),)), Around((1, Mean((Square(3),)))), Around(Unheard()), Around(1)]
    before = [results.digest(spec) for spec in specs]
    old = results.complete(Square(3))
    monkeypatch.setattr(Square, "VERSION", 1, raising=False)  # 1 is what a class without one has
    assert [results.digest(spec) for spec in specs] == before
    monkeypatch.setattr(Square, "VERSION", 2)
    monkeypatch.setattr(Unheard, "VERSION", 2, raising=False)  # no step, and still a part of one
    changed = [results.digest(spec) != digest for spec, digest in zip(specs, before, strict=True)]
    assert changed == [True, True, True, True, False]
    assert results.complete(Square(3)) != old
    assert calls() == {"square 3": 2}
    assert old.is_dir()
    assert set_aside() == []


def test_a_field_that_came_later_keeps_the_address_with_the_value_that_means_absent():
    def later(*fields):
        return make_dataclass("Toy", [("number", int), *fields], frozen=True)

    plain = later()(1)
    new = later(("extra", str, field(default="none", metadata={"absent": "none"})))
    assert results.digest(new(1)) == results.digest(new(1, "none")) == results.digest(plain)
    assert results.digest(Around(new(1))) == results.digest(Around(plain))
    assert results.digest(new(1, "some")) != results.digest(plain)
    assert results.digest(new(1, None)) not in (results.digest(plain), results.digest(new(1, "some")))
    unmarked = later(("extra", str, field(default="none")))
    assert results.digest(unmarked(1)) != results.digest(plain)
    # what is absent from the address is still a column of the table
    assert results.run([Around(new(1))])["extra"].tolist() == ["none"]


# steps that grow


def test_a_number_that_grows_stands_at_the_end_of_the_address_alone():
    digests = {n: results.digest(Drawn(n)) for n in (1, 2, 10)}
    stems = {digest.rpartition("-")[0] for digest in digests.values()}
    assert stems == {hashlib.sha256(results._canonical(without_n()).encode()).hexdigest()[:16]}
    assert [digest.rpartition("-")[2] for digest in digests.values()] == ["1", "2", "10"]
    assert results.digest(Drawn(2, "b")).rpartition("-")[0] not in stems
    assert results.digest(Around(Drawn(1))) != results.digest(Around(Drawn(2)))
    folder = results.complete(Drawn(2))
    assert folder == results.RUNS / "drawn" / digests[2]
    assert json.loads((folder / "manifest.json").read_text())["spec"]["fields"]["n"] == 2


def without_n() -> dict:
    """What the stem of the address of Drawn(n) is the SHA-256 of."""
    return {"spec": {"kind": "drawn", "version": 1, "fields": {"label": "a", "inner": None}}, "inputs": {}}


def test_relatives_are_finished_steps_of_other_numbers_largest_first(tmp_path):
    assert results.relatives(Drawn(3)) == []
    for spec in (Drawn(2), Drawn(10), Drawn(3), Drawn(4, "b"), Drawn(5, inner=Square(1)), Around(Drawn(1))):
        results.complete(spec)
    assert results.relatives(Drawn(3)) == [results.folder(Drawn(10)), results.folder(Drawn(2))]
    assert results.relatives(Drawn(7)) == [results.folder(Drawn(n)) for n in (10, 3, 2)]
    assert results.relatives(Drawn(7, "b")) == [results.folder(Drawn(4, "b"))]
    assert calls()["drawn 0"] == 3, "one for each label and inner step"


def test_relatives_follow_the_inputs(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"one")
    spec = Drawn(2, inner=Read(str(source)))
    results.complete(spec)
    assert len(results.relatives(replace(spec, n=3))) == 1
    source.write_bytes(b"three")
    assert results.relatives(replace(spec, n=3)) == []


@pytest.mark.parametrize("fault", ["changed", "unknown", "manifest", "foreign", "renamed", "unfinished", "set aside"])
def test_relatives_are_none_that_are_damaged_foreign_or_unfinished(fault):
    folder = results.complete(Drawn(2))
    match fault:
        case "changed":
            (folder / "0.txt").write_text("1 a")
        case "unknown":
            (folder / "2.txt").write_text("2 a")
        case "manifest":
            (folder / "manifest.json").unlink()
        case "foreign":
            shutil.rmtree(folder)
            shutil.copytree(results.complete(Drawn(2, "b")), folder)
        case "renamed":  # what was done for n = 2 lies where n = 5 is looked for
            folder.rename(folder.with_name(folder.name.replace("-2", "-5")))
        case "unfinished":
            folder.rename(folder.with_name(f"{folder.name}.part-1-node-2"))
        case "set aside":
            folder.rename(folder.with_name(f"{folder.name}.set-aside-2"))
    assert results.relatives(Drawn(3)) == []
    results.complete(Drawn(3))
    assert [(results.folder(Drawn(3)) / f"{i}.txt").read_text() for i in range(3)] == ["0 a", "1 a", "2 a"]


def test_a_damaged_step_that_grows_is_set_aside_and_its_relatives_help():
    for n in (2, 3):
        results.complete(Drawn(n))
    (results.folder(Drawn(3)) / "2.txt").write_text("wrong")
    with pytest.warns(UserWarning, match=r"changed: 2\.txt"):
        results.complete(Drawn(3))
    assert calls() == {"drawn 0": 1, "drawn 1": 1, "drawn 2": 2}
    assert (results.folder(Drawn(3)) / "2.txt").read_text() == "2 a"


@given(st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5))
@settings(max_examples=30)
def test_digest_depends_on_the_value_alone(value):
    assert results.digest(Around((value, None))) == results.digest(Around((copy.deepcopy(value), None)))
    assert results.digest(Around(value)) != results.digest(Around(repr(value) + "."))


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ([1, 2], "Around.inner is "),
        ((1, {"a": 1}), r"Around.inner\[1\] is "),
        (Path("x"), "Around.inner is "),
        (math.nan, "Around.inner is nan"),
        (-math.inf, "Around.inner is -inf"),
        (np.int64(3), "Around.inner is "),
        (Around({1}), r"Around\.inner is \{1\}"),  # a nested step is asked for its own address
        (make_dataclass("Wrap", {"deep": set}, frozen=True)({1}), r"Around\.inner\.deep is \{1\}"),
    ],
)
def test_a_field_that_is_not_plain_is_refused_by_name_before_any_work(value, name):
    with pytest.raises(TypeError, match=name):
        results.run([Square(1), Around(value)])
    assert calls() == {}


# outside content


def test_changed_input_content_is_another_step_and_the_old_one_stays(tmp_path):
    source = tmp_path / "source.bin"
    source.write_bytes(b"one")
    spec = Around(((Copy(str(source)), 1),))  # inputs are found at any depth
    old = {s: results.complete(s) for s in (spec, Copy(str(source)))}
    source.write_bytes(b"three")
    for s, folder in old.items():
        assert results.complete(s) != folder
        assert (folder / "manifest.json").exists()
    assert set_aside() == []
    source.write_bytes(b"one")
    assert {s: results.complete(s) for s in old} == old
    assert calls() == {"around": 2, "copy": 2}


def test_two_inputs_of_one_step_are_told_apart_by_their_way(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    a, b = (Read(str(tmp_path / name)) for name in ("a", "b"))
    inputs = json.loads((results.complete(Around((a, b))) / "manifest.json").read_text())["inputs"]
    assert inputs == {"inner[0].source": results.sha256_of(a.source), "inner[1].source": results.sha256_of(b.source)}


def test_an_input_that_changes_during_the_work_spoils_it(tmp_path, monkeypatch):
    source = tmp_path / "source.bin"
    source.write_bytes(b"one")
    written = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda path, data: written(path, data) + source.open("ab").write(b"!"))
    with pytest.raises(RuntimeError, match="changed while it was computed"):
        results.complete(Copy(str(source)))
    assert list((results.RUNS / "copy").iterdir()) == []


def test_a_missing_input_is_reported_before_any_work(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.png does not exist"):
        results.run([Square(1), Copy(str(tmp_path / "missing.png"))])
    assert calls() == {}


def test_sha256_of_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100_000)
    assert results.sha256_of(path) == results.sha256_of(str(path)) == hashlib.sha256(b"x" * 100_000).hexdigest()
    path.write_bytes(b"y")
    assert results.sha256_of(path) == hashlib.sha256(b"y").hexdigest()


def test_sha256_of_a_folder_covers_names_contents_and_places(tmp_path):
    def make(name: str, files: dict[str, str]) -> str:
        for file, text in files.items():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text(text)
        return results.sha256_of(tmp_path / name)

    base = make("base", {"b": "2", "sub/a": "1"})
    hashes = {"b": hashlib.sha256(b"2").hexdigest(), "sub/a": hashlib.sha256(b"1").hexdigest()}
    assert base == hashlib.sha256(json.dumps(hashes, separators=(",", ":")).encode()).hexdigest()
    assert make("same", {"sub/a": "1", "b": "2", ".hidden": "3"}) == base
    others = [{"b": "1", "sub/a": "2"}, {"b": "2", "a": "1"}, {"b": "2", "sub/a": "1", "c": ""}, {"b": "2"}]
    assert base not in {make(f"other{i}", files) for i, files in enumerate(others)}


def test_sha256_of_a_folder_follows_links(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "image").write_text("1")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "linked").symlink_to(tmp_path / "there")
    before = results.sha256_of(tmp_path / "here")
    (tmp_path / "there" / "image").write_text("22")
    assert results.sha256_of(tmp_path / "here") != before


@pytest.fixture
def large(tmp_path, monkeypatch) -> Path:
    """A file that counts as large."""
    monkeypatch.setattr(results, "LARGE", 8)
    path = tmp_path / "large.bin"
    path.write_bytes(b"large one")
    return path


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The names of the files that were read to be hashed, from now on."""
    real, names = hashlib.file_digest, []
    monkeypatch.setattr(
        hashlib, "file_digest", lambda file, kind: names.append(Path(file.name).name) or real(file, kind)
    )
    return names


def as_a_new_process() -> None:
    """Forget the hashes that this process remembers."""
    results._sha256_of_file.cache_clear()


def test_a_large_file_is_read_once_by_all_processes_and_a_small_one_by_each(large, reads):
    small = large.with_name("small.bin")
    small.write_bytes(b"small")
    for _ in range(3):
        as_a_new_process()
        assert results.sha256_of(large) == hashlib.sha256(b"large one").hexdigest()
        assert results.sha256_of(small) == hashlib.sha256(b"small").hexdigest()
    assert reads == ["large.bin", "small.bin", "small.bin", "small.bin"]
    (note,) = (results.RUNS / "hashes").iterdir()
    assert json.loads(note.read_text())["sha256"] == hashlib.sha256(b"large one").hexdigest()


def test_a_large_file_rewritten_with_the_same_size_and_time_is_noticed(large):
    before, stat = results.sha256_of(large), large.stat()
    time.sleep(0.02)  # longer than the tick of the file system's clock
    large.write_bytes(b"large two")
    os.utime(large, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    as_a_new_process()
    assert results.sha256_of(large) == hashlib.sha256(b"large two").hexdigest() != before


def test_a_large_file_in_the_place_of_another_is_noticed(large):
    results.sha256_of(large)
    other = large.with_name("other.bin")
    other.write_bytes(b"large two")
    other.replace(large)
    as_a_new_process()
    assert results.sha256_of(large) == hashlib.sha256(b"large two").hexdigest()


@pytest.mark.parametrize(
    "damage",
    [
        lambda note: "",
        lambda note: note[:-9],
        lambda note: "[1, 2]",
        lambda note: json.dumps({"file": json.loads(note)["file"]}),
        lambda note: json.dumps(json.loads(note) | {"sha256": "abc"}),
        lambda note: json.dumps(json.loads(note) | {"sha256": 5}),
        lambda note: json.dumps(json.loads(note) | {"sha256": f"{'0' * 64}\n"}),
        lambda note: json.dumps({"file": ["another", *json.loads(note)["file"][1:]], "sha256": "0" * 64}),
    ],
)
def test_a_note_that_is_damaged_or_of_another_file_is_not_trusted(large, reads, damage):
    expected = results.sha256_of(large)
    (note,) = (results.RUNS / "hashes").iterdir()
    good = note.read_text()
    note.write_text(damage(good))
    as_a_new_process()
    assert results.sha256_of(large) == expected
    assert reads == ["large.bin"] * 2
    assert note.read_text() == good, "and it is mended"
    assert [path.name for path in note.parent.iterdir()] == [note.name]


def test_a_work_area_that_cannot_be_written_is_no_obstacle_to_hashing(large, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(results, "RUNS", tmp_path / "file" / "runs")
    assert results.sha256_of(large) == hashlib.sha256(b"large one").hexdigest()


def test_nothing_to_hash_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        results.sha256_of(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="without files"):
        results.sha256_of(tmp_path / "empty")
    os.mkfifo(tmp_path / "empty/pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    for endless in ("empty", "zeros"):
        with pytest.raises(ValueError, match="is no file that has an end"):
            results.sha256_of(tmp_path / endless)


# errors


def test_a_failing_step_lets_all_others_finish_and_is_named():
    with pytest.raises(RuntimeError) as caught:
        results.run([Square(1), Faulty("raises"), Square(2), Faulty("broken scores")])
    message = str(caught.value)
    assert message.startswith("2 step(s) failed; everything else is finished and kept")
    assert f"Faulty(what='raises') ({results.digest(Faulty('raises'))}): ZeroDivisionError: the toy divided" in message
    assert "Faulty(what='broken scores')" in message
    assert "Square" not in message
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert results.run([Square(1), Square(2)])["square"].tolist() == [1, 4]
    assert calls() == {"square 1": 1, "faulty raises": 1, "square 2": 1, "faulty broken scores": 1}


def test_a_keyboard_interrupt_goes_straight_through():
    with pytest.raises(KeyboardInterrupt):
        results.run([Square(1), Faulty("interrupted"), Square(2)])
    assert calls() == {"square 1": 1, "faulty interrupted": 1}


@dataclass
class Melting:
    """A spec that could change after its address was taken."""

    number: int = 0


@pytest.mark.parametrize(
    ("stranger", "message"),
    [
        (Unheard(), "how to do a Unheard: import the module"),
        (Melting(), "frozen=True"),
        (Square, "pass an instance"),
        ("square", "'square' is no spec"),
        (Around(Melting()), "frozen=True"),
        (Around(Square), "pass an instance"),
    ],
)
def test_a_stranger_is_refused_before_any_work(stranger, message):
    with pytest.raises(TypeError, match=message):
        results.run([Square(1), stranger])
    with pytest.raises(TypeError, match=message):
        results.complete(stranger)
    assert not results.RUNS.exists()


def test_perform_itself_refuses_an_unknown_class(tmp_path):
    with pytest.raises(TypeError, match=r"Unheard with @results\.perform\.register"):
        results.perform(Unheard(), tmp_path)


@pytest.mark.parametrize("call", [lambda: results.run([Square(1), Square(2)]), lambda: results.complete(Square(1))])
def test_runs_that_cannot_be_written_is_reported_before_any_work(call, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(results, "RUNS", tmp_path / "file" / "runs")
    monkeypatch.setitem(globals(), "log", lambda line: pytest.fail("work was begun"))
    with pytest.raises(NotADirectoryError, match="set the environment variable FX_RUNS"):
        call()


def test_an_input_that_changes_between_check_and_work_is_noticed(tmp_path, monkeypatch):
    """The row would otherwise be read from a folder that was never made."""
    source = tmp_path / "source.bin"
    source.write_bytes(b"one")
    monkeypatch.setattr(results, "_require_writable_runs", lambda: source.write_bytes(b"three"))
    results.RUNS.mkdir()
    (results.RUNS / "locks").mkdir()
    with pytest.raises(RuntimeError, match="leave the inputs alone"):
        results.run([Copy(str(source))])


# progress


def test_the_bar_counts_finished_rows_at_once_and_failed_ones_never(monkeypatch):
    bars = []

    class Bar(results.tqdm):
        def __init__(self, **options):
            bars.append((self, options))
            super().__init__(**options)

    monkeypatch.setattr(results, "tqdm", Bar)
    results.run([Square(1)])
    with pytest.raises(RuntimeError):
        results.run([Square(1), Square(2), Faulty("raises"), Square(1), Square(2)], description="toys")
    bar, options = bars[1]
    assert (options["total"], options["initial"], bar.n, options["desc"]) == (5, 2, 4, "toys")
    assert options["mininterval"] >= 2
    assert bar.disable or bar.last_print_n == 4


# where RUNS lies, and what is imported


@pytest.mark.parametrize(
    ("value", "place"),
    [(None, ROOT / "runs"), ("", ROOT / "runs"), ("some/place", ROOT / "some/place"), ("/a/place", Path("/a/place"))],
)
def test_fx_runs_moves_the_work_area(value, place, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # the working directory does not count
    monkeypatch.delenv("FX_RUNS", raising=False)
    if value is not None:
        monkeypatch.setenv("FX_RUNS", value)
    assert runpy.run_path(results.__file__)["RUNS"] == place


def note_imports(file: Path) -> None:
    """Write what this process has imported."""
    file.write_text(json.dumps(sorted(sys.modules)))


def test_the_runner_imports_neither_dask_nor_the_diffusion_stack(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=note_imports, args=(tmp_path / "imports",))
    process.start()
    process.join(DEADLINE)
    imported = set(json.loads((tmp_path / "imports").read_text()))
    assert "fx.results" in imported
    assert not imported & {"dask", "distributed", "torch", "diffusers", "transformers", "peft"}


# dask


@pytest.fixture(scope="module")
def client():
    distributed = pytest.importorskip("dask.distributed")
    with (
        distributed.LocalCluster(processes=False, n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@pytest.mark.filterwarnings("ignore:another process or thread")
def test_a_dask_client_gives_the_same_rows(client, tmp_path, monkeypatch):
    specs = [Mean((Square(n), Square(1))) for n in range(4)] + [Square(9), Mean((Square(0), Square(1)))]
    results.run(specs[:1])
    table = results.run(specs, client=client)
    assert calls() == {"mean": 4, "square 0": 1, "square 1": 1, "square 2": 1, "square 3": 1, "square 9": 1}
    pd.testing.assert_frame_equal(results.run(specs, client=client), table)
    monkeypatch.setattr(results, "RUNS", tmp_path / "without client")
    pd.testing.assert_frame_equal(results.run(specs), table)


def test_on_workers_nested_steps_are_tasks_of_their_own_that_come_first(client, monkeypatch):
    """Each once, before what needs it, however many specs hold it; a finished one is no task."""
    results.complete(Square(0))
    submitted, submit = [], client.submit

    def noted(function, before, what, spec, *share, **options):
        assert all(future.key in [f.key for _, f in submitted] for future in before)
        submitted.append((spec, future := submit(function, before, what, spec, *share, **options)))
        return future

    monkeypatch.setattr(client, "submit", noted)
    specs = [Mean((Square(1), Square(0))), Mean((Square(1), Square(2))), Square(2)]
    results.run(specs, client=client)
    assert [spec for spec, _ in submitted] == [Square(1), specs[0], Square(2), specs[1]]
    assert calls() == {"square 0": 1, "square 1": 1, "square 2": 1, "mean": 2}


def test_parts_of_a_step_are_done_by_workers_before_the_step(client, monkeypatch):
    done = []
    monkeypatch.setattr(results, "parts", lambda spec: [(0, 2), (2, 4)] if spec == Square(4) else [])
    monkeypatch.setattr(
        results, "perform_part", lambda spec, *share: done.append((spec, share, calls().get("square 4")))
    )
    table = results.run([Square(4), Square(5)], client=client)
    assert sorted(done, key=str) == [(Square(4), (0, 2), None), (Square(4), (2, 4), None)]
    assert calls()["square 4"] == 1
    assert table.number.tolist() == [4, 5]


def test_a_part_whose_scratch_is_gone_is_no_error_if_the_step_is_finished(monkeypatch):
    def gone(spec, *share):
        raise FileNotFoundError("its scratch")

    monkeypatch.setattr(results, "perform_part", gone)
    with pytest.raises(FileNotFoundError, match="its scratch"):
        results._after([], "part", Square(1), 0, 2)
    monkeypatch.setattr(results, "perform_part", lambda spec, *share: results.complete(spec) and gone(spec))
    assert results._after([], "part", Square(1), 0, 2) is None


def test_steps_ask_for_a_gpu_where_workers_offer_one():
    def client(*offers):
        workers = {str(n): {"resources": offer} for n, offer in enumerate(offers)}
        return SimpleNamespace(scheduler_info=lambda n_workers: {"workers": workers})

    assert results._resources(client({}, {"GPU": 2})) == {"resources": {"GPU": 1}}
    assert results._resources(client({}, {"memory": 2})) == {}


def test_a_connected_cluster_is_used_by_every_run_until_it_is_let_go(client, monkeypatch):
    used = []
    monkeypatch.setitem(results._connected, "client", client)
    monkeypatch.setattr(client, "close", lambda: used.append("closed"))
    complete_on = results._complete_on
    monkeypatch.setattr(results, "_complete_on", lambda c, waiting: used.append(c is client) or complete_on(c, waiting))
    results.run([Square(7)])
    results.connect("")
    assert used == [True, "closed"]
    results.run([Square(8)])
    assert used == [True, "closed"]


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        ("local", "for none, .local:4. for four processes here, an address such as"),
        ("local:0", "for none, .local:4. for four processes here"),
        ("somewhere", "for none, .local:4."),
        ("gone.json", "there is no scheduler file gone.json: start dask with --scheduler-file gone.json"),
    ],
)
def test_a_scheduler_that_is_none_is_named_with_the_ways_out(scheduler, message):
    with pytest.raises(ValueError, match=message):
        results.connect(scheduler)


def test_workers_with_several_threads_are_refused():
    """Two trainings in one process would take their random numbers from one generator, each another half of them."""
    distributed = pytest.importorskip("dask.distributed")
    options = {"n_workers": 1, "processes": False, "dashboard_address": ":0"}
    with (
        distributed.LocalCluster(threads_per_worker=2, **options) as cluster,
        pytest.raises(ValueError, match=r"has 2 threads: start its workers with --nthreads 1"),
    ):
        results.connect(cluster.scheduler_address)
    assert results._connected["client"] is None
    with distributed.LocalCluster(threads_per_worker=1, **options) as cluster:
        results.connect(cluster.scheduler_address)
        assert results._connected["client"].status == "running"
        results.connect("")


def test_a_dask_client_lets_others_finish_and_names_the_failed_ones(client):
    specs = [Faulty("raises"), Square(1), Square(2)]
    for attempt in (1, 2):
        with pytest.raises(RuntimeError, match=r"1 step\(s\) failed(?s:.*)Faulty\(what='raises'\).*divided by zero"):
            results.run(specs, client=client)
        assert calls() == {"square 1": 1, "square 2": 1, "faulty raises": attempt}


def test_a_worker_that_keeps_its_results_elsewhere_is_noticed(client, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    monkeypatch.setattr(results, "complete", lambda spec: elsewhere / results.digest(spec))
    with pytest.raises(RuntimeError, match=r"finished as .*elsewhere.*set FX_RUNS to one folder"):
        results.run([Square(1)], client=client)


def test_an_interrupt_cancels_what_the_workers_have_not_begun(client, monkeypatch):
    distributed = pytest.importorskip("dask.distributed")

    class Bar(results.tqdm):
        def update(self, n=1):
            raise KeyboardInterrupt

    cancelled = []
    monkeypatch.setattr(results, "tqdm", Bar)
    monkeypatch.setattr(client, "cancel", cancelled.extend)
    with pytest.raises(KeyboardInterrupt):
        results.run([Square(n) for n in range(5)], client=client)
    assert len(cancelled) == 5
    distributed.wait(cancelled)  # not cancelled in truth: they must end before this test's RUNS does
