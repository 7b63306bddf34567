"""The profile paper: what it needs is found where it would lie; that each notebook runs with it is in test_notebooks.py."""

import os
from pathlib import Path

import huggingface_hub.constants
import pytest

from fx import needs, originals, reproduce, similarity
from fx.paths import NOTEBOOKS


@pytest.fixture
def there(world, monkeypatch, tmp_path) -> None:
    """Models and images are looked for in the small world, and no notebook is run."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", world["HF_HUB_CACHE"])
    for module in (needs, originals, similarity):
        monkeypatch.setattr(module, "EXTERNAL", Path(world["FX_EXTERNAL"]))
    monkeypatch.setattr(reproduce, "RUNS", tmp_path / "runs")
    originals._read.cache_clear()


def test_every_notebook_has_the_papers_parameters():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == {path.stem for path in NOTEBOOKS.glob("params/paper/*")}


def test_a_dry_run_of_all_lists_what_is_here(there, capsys, tmp_path, monkeypatch):
    """Without the plans, which take minutes; test_plan.py has those of two notebooks."""
    planned = []
    monkeypatch.setattr(reproduce.plan, "steps", lambda notebook, values: planned.append((notebook.stem, values)) or [])
    reproduce.main(["--profile", "paper", "--dry-run"])
    said = capsys.readouterr().out
    assert said.count(".ipynb: ") == len(list(NOTEBOOKS.glob("[0-9][0-9]-*.ipynb"))) - 1
    rows = [line.split() for line in said.splitlines() if line.endswith((" yes", " no"))]
    assert len(rows) == 9
    assert "stable-diffusion-v1-5/stable-diffusion-v1-5" in [row[0] for row in rows], "which notebook 08 alone needs"
    assert {row[-1] for row in rows} == {"yes"}
    assert [name for name, _ in planned] == [path.stem for path in reproduce.find_notebooks([])]
    assert {values["profile"] for _, values in planned} == {"paper"}
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("gone", "named"),
    [("hub", "CompVis/stable-diffusion-v1-4"), ("external", "sscd_disc_mixup.torchscript.pt")],
)
def test_without_a_part_of_it_a_run_ends_at_once_with_what_is_missing(there, gone, named, monkeypatch, tmp_path):
    if gone == "hub":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "none"))
    else:
        for module in (needs, originals, similarity):
            monkeypatch.setattr(module, "EXTERNAL", tmp_path / "none")
    monkeypatch.setattr(reproduce.papermill, "execute_notebook", lambda *_, **__: pytest.fail("it was run"))
    for number in [path.name[:2] for path in NOTEBOOKS.glob("[0-9][0-9]-*.ipynb")]:
        if number not in ("00",):
            with pytest.raises(FileNotFoundError) as caught:
                reproduce.main([number, "--profile", "paper"])
            assert named in str(caught.value)
            assert ("wikiart" in str(caught.value)) == (gone == "external")
    assert os.environ.get("HF_HUB_OFFLINE") in (None, "1")
