"""The archive of a finished run, read back by the library that others would read it with."""

import hashlib
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from rocrate.rocrate import ROCrate

from fx import crate, plots, provenance, results, tables


@dataclass(frozen=True)
class Small:
    n: int


@results.perform.register
def _(spec: Small, folder: Path) -> None:
    (folder / "scores.json").write_text(json.dumps({"small": spec.n}))


@pytest.fixture
def run(runs, tmp_path, monkeypatch) -> Path:
    """The outputs of one notebook: a table of one step, a figure of two; and a table of which nothing was noted."""
    outputs = tmp_path / "outputs"
    for module in (tables, crate):
        monkeypatch.setattr(module, "TABLES", outputs / "data/results")
    for module in (plots, crate):
        monkeypatch.setattr(module, "FIGURES", outputs / "figures")
    monkeypatch.setattr(provenance, "_began", {})
    monkeypatch.setattr(results, "_asked_for", {})
    tables.save(results.run([Small(1)]), "table01", "mini")
    results.run([Small(2)])
    plots.save(plt.figure(figsize=(1, 1)), "fig01", "mini")
    (outputs / "data/results/mini/old.csv").write_text("a\n1\n")
    return outputs


def test_an_archive_holds_what_was_saved_and_says_what_it_was_made_from(run, tmp_path):
    counts = crate.write(file := tmp_path / "run.zip", "mini")
    assert (counts["tables"], counts["figures"], counts["manifests"], counts["missing"]) == (2, 1, 2, 0)
    read = ROCrate(file)
    action = read.get("#run-table01.csv")
    assert action.type == "CreateAction"
    assert {made.id for made in action["result"]} == {"data/results/mini/table01.csv", "figures/fig01-mini.png"}
    digests = [results.digest(Small(n)) for n in (1, 2)]
    assert [used.id for used in action["object"]] == [f"manifests/small/{digest}.json" for digest in digests]
    assert action["instrument"].type == "SoftwareApplication"
    with zipfile.ZipFile(file) as archive:
        names = set(archive.namelist())
        for entity in read.data_entities:
            if digest := entity.get("sha256"):
                assert entity.id in names
                assert hashlib.sha256(archive.read(entity.id)).hexdigest() == digest
        assert json.loads(archive.read(f"manifests/small/{digests[0]}.json"))["spec"]["fields"] == {"n": 1}
    assert "notebooks/03-extraction.ipynb" in names


def test_manifests_that_are_gone_are_counted(run, tmp_path, capsys):
    (results.folder(Small(2)) / results.MANIFEST).unlink()
    assert crate.main([str(tmp_path / "run.zip")]) == 0
    said = capsys.readouterr().out
    assert "2 tables, 1 figures" in said
    assert "1 steps are not in the work area" in said


def test_an_archive_is_not_written_over_nor_made_of_nothing(run, tmp_path):
    (there := tmp_path / "there.zip").write_text("mine")
    with pytest.raises(FileExistsError, match=r"there\.zip exists"):
        crate.write(there, "mini")
    assert there.read_text() == "mine"
    with pytest.raises(FileNotFoundError, match="has no tables: run"):
        crate.write(tmp_path / "paper.zip", "paper")
    assert sorted(path.name for path in tmp_path.glob("*.zip")) == ["there.zip"]
