"""The short form of tests/kills.py: a few kills, a full disk. What the long form found stands in docs/researchers.md."""

import random

import kills
import pytest

from fx import finetune, results, sampling


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[str, str]:
    return kills.world(tmp_path_factory.mktemp("world"))


@pytest.mark.long
def test_an_extraction_that_is_killed_again_and_again_ends_as_if_nothing_had_happened(world, tmp_path):
    outcome = kills.disturb("extract", 3, tmp_path, *world, random.Random(1))
    assert outcome.kills == 3
    assert outcome.steps == 4, "the fine-tuning, the images, the extraction, the scores"
    assert outcome.files > 48


@pytest.mark.long
def test_a_disk_that_was_full_and_is_freed_costs_nothing(world, tmp_path):
    if (outcome := kills.fill("extract", tmp_path, *world)) is None:
        pytest.skip("this system lets nobody mount a disk of their own (unshare -rm mount)")
    assert outcome.files > 48


def test_the_comparison_sees_a_changed_a_missing_and_a_further_file(world, tmp_path, monkeypatch):
    for module, name in ((results, "RUNS"), (finetune, "SAVE_EVERY"), (sampling, "BLOCK")):
        monkeypatch.setattr(module, name, getattr(module, name))  # what kills.do changes is put back
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        kills.do("fine-tune", tmp_path / name, *world)
    one, other = tmp_path / "one", tmp_path / "other"
    assert kills.kept(one)
    assert kills.differences(one, other) == []
    step = next(iter(kills.finished(other)))
    file = next(file for file in sorted((other / step).iterdir()) if file.name != results.MANIFEST)
    content = file.read_bytes()
    file.write_bytes(content + b"x")
    assert kills.differences(one, other) == [f"{step}/{file.name}"]
    assert kills.broken(other)
    file.unlink()
    assert kills.differences(one, other) == [f"{step}/{file.name}"]
    file.write_bytes(content)
    (other / step / "more.txt").write_text("more")
    assert kills.differences(one, other) == [f"{step}/more.txt"]
