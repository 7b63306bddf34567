"""The command for the work area: what is listed, verified, removed, packed and unpacked."""

import json
import os
import platform
import tarfile
from dataclasses import dataclass
from pathlib import Path

import filelock
import pytest

from fx import results
from fx import runs as command

DEAD = 2**22 + 1  # above the largest process number


@dataclass(frozen=True)
class Sum:
    a: int
    b: int = 1


@dataclass(frozen=True)
class Grown:
    GROWS = "n"
    n: int = 1


@results.perform.register
def _(spec: Sum, folder: Path) -> None:
    (folder / "scores.json").write_text(json.dumps({"sum": spec.a + spec.b}))


@results.perform.register
def _(spec: Grown, folder: Path) -> None:
    for number in range(spec.n):
        (folder / f"{number}.txt").write_text("x" * 1000)


@pytest.fixture(autouse=True)
def area(runs) -> Path:
    """A work area with five finished steps of two kinds, an unfinished one of a dead process, and one set aside."""
    for a in range(3):
        results.complete(Sum(a))
    for n in (1, 2):
        results.complete(Grown(n))
    leave_behind(runs, DEAD)
    aside = results.folder(Sum(0)).with_name(f"{'a' * 16}.set-aside-1")
    aside.mkdir()
    (aside / "odd.txt").write_text("odd")
    return runs


def leave_behind(runs: Path, pid: int, host: str = "") -> Path:
    part = runs / "sum" / f"{'b' * 16}.part-{pid}-{host or platform.node()}"
    part.mkdir()
    (part / "half.txt").write_text("half")
    return part


def said(capsys, *arguments: str) -> tuple[int, str, str]:
    code = command.main([str(part) for part in arguments])
    return code, *capsys.readouterr()


def test_the_overview_counts_folders_and_bytes_of_each_kind(area, capsys):
    table = command.overview().set_index("kind")
    assert table.loc["sum", ["finished", "unfinished", "set aside"]].tolist() == [3, 1, 1]
    assert table.loc["grown", ["finished", "unfinished", "set aside"]].tolist() == [2, 0, 0]
    held = sum(file.stat().st_size for file in (area / "grown").rglob("*") if file.is_file())
    assert table.MB["grown"] == pytest.approx(held / 1e6)
    assert command.overview(["grown"]).kind.tolist() == ["grown"]
    code, out, _ = said(capsys)
    assert code == 0
    assert "sum" in out


def test_an_empty_or_missing_work_area_is_no_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "RUNS", tmp_path / "nowhere")
    assert command.overview().empty
    assert said(capsys, "verify")[:2] == (0, "every finished step is what its manifest says\n")
    assert said(capsys, "prune")[:2] == (0, "0 folders, 0.0 MB\n")


def test_what_stands_beside_the_steps_is_not_listed(area):
    (area / "hashes").mkdir(exist_ok=True)
    (area / "hashes" / f"{'c' * 32}.json").write_text("{}")
    (area / "sum" / "notes").mkdir()
    assert set(command.overview().kind) == {"sum", "grown"}
    assert not any(entry.path.name == "notes" for entry in command.entries())


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda step: (step / "scores.json").write_text('{"sum": 9}'), "changed: scores.json"),
        (lambda step: (step / "scores.json").unlink(), "missing: scores.json"),
        (lambda step: (step / "more.txt").write_text("more"), "unknown: more.txt"),
        (lambda step: (step / results.MANIFEST).write_text("{"), "manifest.json cannot be read"),
        (lambda step: (step / results.MANIFEST).write_text("[]"), "manifest.json cannot be read"),
        (lambda step: step.rename(step.with_name("d" * 16)), "manifest.json is that of sum/"),
    ],
)
def test_verify_names_each_step_that_is_not_what_its_manifest_says(harm, reason, capsys):
    assert said(capsys, "verify")[0] == 0
    harm(results.folder(Sum(1)))
    code, out, _ = said(capsys, "verify")
    assert code == 1
    assert reason in out
    assert out.rstrip().endswith("1 faults")


def test_prune_says_first_and_takes_only_what_is_left_behind(area, capsys):
    alive, elsewhere = leave_behind(area, os.getpid()), leave_behind(area, DEAD, "another-host")
    scratch = results.scratch(Sum(7))
    (scratch / "kept.txt").write_text("kept")
    before = sorted(area.rglob("*"))
    code, out, _ = said(capsys, "prune")
    assert code == 0
    assert sorted(area.rglob("*")) == before
    assert out.count("would remove") == 3
    assert "--yes removes them" in out
    assert said(capsys, "prune", "--yes")[0] == 0
    assert alive.exists()
    assert elsewhere.exists()
    assert not scratch.exists()
    assert command.overview().set_index("kind").loc["sum", ["finished", "unfinished", "set aside"]].tolist() == [
        3,
        2,
        0,
    ]


@pytest.mark.parametrize("of", ["the step", "a part"])
def test_prune_leaves_the_kept_work_of_a_step_that_is_being_computed(area, capsys, of):
    scratch, name = results.scratch(Sum(7)), results.folder(Sum(7)).name
    with filelock.FileLock(area / "locks" / f"{name}{'' if of == 'the step' else '.part-50'}.lock"):
        said(capsys, "prune", "--yes")
        assert scratch.exists()
    said(capsys, "prune", "--yes")
    assert not scratch.exists()


def test_prune_asks_again_before_it_removes(area, capsys):
    scratch, name = results.scratch(Sum(7)), results.folder(Sum(7)).name
    found = command.to_prune([])
    with filelock.FileLock(area / "locks" / f"{name}.lock"):
        command._prune(found, remove=True)
    assert scratch.exists()
    out = capsys.readouterr().out
    assert f"leaving scratch/{name}" in out
    assert out.splitlines()[-1].startswith(f"{len(found) - 1} folders")


def test_log_prints_what_was_tried_and_names_what_did_not_end_well(area, capsys):
    code, out, _ = said(capsys, "log", results.digest(Sum(1))[:8])
    assert code == 0
    assert out.startswith(f"sum/{results.digest(Sum(1))}\n")
    assert "finished after" in out
    assert said(capsys, "log")[:2] == (0, "no step is left that did not end well\n")
    for a, ends in ((7, ["failed after 1.0 s"]), (8, []), (9, ["interrupted after 2.0 s"]), (1, [])):
        path = results.log_of(results.folder(Sum(a)))
        lines = [f"2026-01-01T00:00:00+00:00 {what}" for what in ("started: process 1 on here", *ends)]
        path.write_text("\n".join([*lines, "Traceback", "ValueError: finished"]))
    _, out, _ = said(capsys, "log")
    told = {a: next((line for line in out.splitlines() if results.digest(Sum(a)) in line), "") for a in (7, 8, 9, 1)}
    assert " failed: " in told[7]
    assert " killed: " in told[8]
    assert " interrupted: " in told[9]
    assert told[1] == ""  # it lies finished
    with filelock.FileLock(area / "locks" / f"{results.folder(Sum(8)).name}.lock"):
        assert results.digest(Sum(8)) not in said(capsys, "log")[1]
    assert said(capsys, "log", "zzz")[0] == 2


def test_prune_of_a_kind_takes_its_finished_steps_and_no_other(area, capsys):
    said(capsys, "prune", "--kinds", "grown", "--yes")
    assert not any((area / "grown").iterdir())
    assert results.folder(Sum(1)).exists()


def test_what_was_packed_need_not_be_computed_again(area, tmp_path, monkeypatch, capsys):
    file = tmp_path / "sums.tar.xz"
    code, out, _ = said(capsys, "pack", file, "--kinds", "sum")
    assert (code, out.split()[0]) == (0, "3")
    again = tmp_path / "again.tar.xz"
    command.pack(again, ["sum"])
    assert again.read_bytes() == file.read_bytes()
    monkeypatch.setattr(results, "RUNS", tmp_path / "elsewhere")
    results.complete(Sum(2))
    assert command.unpack(file) == (2, 1)
    assert command.unpack(file) == (0, 3)

    def refuse(spec, folder):
        raise AssertionError("it was computed again")

    known = results.perform.dispatch(Sum)
    results.perform.register(Sum, refuse)
    try:
        assert results.run([Sum(0), Sum(1)])["sum"].tolist() == [1, 2]
    finally:
        results.perform.register(Sum, known)
    assert not list(results.RUNS.glob(".unpack-*"))


def test_pack_refuses_a_damaged_step_and_leaves_no_half_written_file(area, tmp_path, capsys):
    (results.folder(Sum(1)) / "scores.json").write_text("{}")
    file = tmp_path / "sums.tar.xz"
    code, _, told = said(capsys, "pack", file, "--kinds", "sum")
    assert code == 2
    assert "cannot be packed: changed: scores.json" in told
    assert not list(tmp_path.glob("*.tar.xz*")) + list(tmp_path.glob(".*.part"))
    file.write_text("mine")
    assert "exists: name another file" in said(capsys, "pack", file)[2]
    assert file.read_text() == "mine"
    for words in (["pack", tmp_path / "no.tar.xz"], ["verify"], ["prune"], ["list"]):
        code, _, told = said(capsys, *words, "--kinds", "sum", "magic")
        assert code == 2
        assert "no steps of the kind magic: here are grown, scratch, sum" in told
    assert "no finished step of these kinds" in said(capsys, "pack", tmp_path / "no.tar.xz")[2]


def foreign(tmp_path: Path, name: str, change) -> Path:
    """An archive with one step after `change(folder of the step)`, under this name."""
    place, file = tmp_path / "made" / name, tmp_path / "foreign.tar.xz"
    place.parent.mkdir(parents=True)
    place.mkdir()
    for part in results.folder(Sum(1)).iterdir():
        (place / part.name).write_bytes(part.read_bytes())
    change(place)
    with tarfile.open(file, "w:xz") as archive:
        archive.add(tmp_path / "made", ".")
    return file


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("sum/" + "e" * 16, lambda place: None, "is that of sum/"),
        ("sum/notes", lambda place: None, "it is no step"),
        ("sum/OWN", lambda place: (place / "scores.json").write_text("{}"), "changed: scores.json"),
        ("sum/OWN", lambda place: (place / "link").symlink_to("/etc/passwd"), "cannot be unpacked"),
    ],
)
def test_unpack_takes_nothing_from_an_archive_with_anything_else_in_it(name, change, reason, tmp_path, monkeypatch):
    file = foreign(tmp_path, name.replace("OWN", results.folder(Sum(1)).name), change)
    monkeypatch.setattr(results, "RUNS", tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=reason):
        command.unpack(file)
    assert not [path for path in results.RUNS.rglob("*") if path.is_file()]


def test_unpack_refuses_what_is_no_archive(tmp_path, capsys):
    file = tmp_path / "text.tar.xz"
    file.write_text("no archive")
    assert "it must be one that fx.runs pack wrote" in said(capsys, "unpack", file)[2]
    assert "does not exist" in said(capsys, "unpack", tmp_path / "none.tar.xz")[2]


def test_unpack_refuses_a_damaged_archive_and_one_with_a_file_beside_the_steps(area, tmp_path, capsys):
    command.pack(file := tmp_path / "sums.tar.xz", ["sum"])
    whole = file.read_bytes()
    for place in range(0, len(whole), max(len(whole) // 20, 1)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        code, out, told = said(capsys, "unpack", file)
        assert (code, "cannot be" in told) == (2, True) or out.startswith("0 steps taken over"), place
    (loose := tmp_path / "made").mkdir()
    (loose / "notes.txt").write_text("mine")
    with tarfile.open(other := tmp_path / "loose.tar.xz", "w:xz") as archive:
        archive.add(loose, ".")
    assert "notes.txt in" in said(capsys, "unpack", other)[2]


def test_its_help_names_its_commands(capsys):  # that the module is a command: tests/test_command.py
    with pytest.raises(SystemExit, match="0"):
        command.main(["--help"])
    out = capsys.readouterr().out
    for name in ("verify", "prune", "pack", "unpack"):
        assert name in out
