"""Every notebook with the paper's parameters, fewer of everything, on tiny random models of the real classes."""

import os
import subprocess
import sys

import paper_world
import pytest
import yaml

from fx.paths import NOTEBOOKS, ROOT

FEW = "steps_per_image=1 sampling_steps=2 lora.rank=2 lora.alpha=2"
# notebook -> what is scaled down; everything else is as in params/paper
COUNTS = {
    "01": {"shown": 2, "measured": 2},
    "02": {"artists": 1, "methods": "dreambooth", "points": 300, "steps": 20, "starts": 2},
    "03": {
        **{"artists": 1, "objects": 1, "images_per_training": 2, "development_artists": 1},
        **{"cfg_scales": "2", "finextract_scales": "2", "correction_scales": "0.02"},
    },
    "04": {"artists": 1, "images_per_training": 2, "training_images": "2 12", "generated_images": "1 2"},
    "05": {
        **{"artists": 1, "images_per_training": 2, "development_artists": 1, "guidance_scales": "3"},
        **{"correction_scales": "0.02", "solvers": "ddim-2", "steps_per_image": "1", "ranks": "3"},
    },
    "06": {"artists": 1, "images_per_training": 2, "perturbations": "advdm:8", "perturbation_steps": 1, "stages": "1"},
    "07": {
        **{"artists": 1, "objects": 1, "candidates": 5, "hard_candidates": 6, "training_lengths": "1", "most": 1},
        **{"extended_artists": 1, "searched_artists": 1, "searched_objects": 1, "iterations": 2, "restarts": 1},
        **{"images_per_training": 2},
    },
    "08": {"images_per_training": 2},
    "09": {"artists": 1, "images_per_training": 2, "guidance_scales": "1 5"},
    "10": {"mixtures": 1, "artists": 2, "artists_per_set": "1 2", "images_per_training": 2, "steps_per_image": 1},
    "11": {
        **{"images": 1, "batch_size": 1, "repeats": 1, "batch_sizes": "", "precisions": "", "solvers": ""},
        **{"difference_ranks": "2", "objects": 1, "images_per_training": 2},
    },
    "12": {
        **{"artists": 1, "objects": 0, "images_per_training": 2, "timed_images": 60, "repeats": 1},
        **{"other_matrices": 1, "largest": 500},
    },
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, str]:
    return paper_world.build(tmp_path_factory.mktemp("world"))


def reproduce(world: dict[str, str], tmp_path, *words: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, **world, "FX_RUNS": str(tmp_path / "runs"), "FX_OUTPUTS": str(tmp_path)}
    command = [sys.executable, "-m", "fx.reproduce", "--profile", "paper", *words]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


def test_every_notebook_but_that_of_the_mini_models_has_its_counts():
    assert set(COUNTS) == {path.name[:2] for path in NOTEBOOKS.glob("[0-9][0-9]-*.ipynb")} - {"00"}
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == {path.stem for path in NOTEBOOKS.glob("params/paper/*")}


@pytest.mark.long
@pytest.mark.parametrize("number", sorted(COUNTS))
def test_a_notebook_runs_with_the_papers_parameters(number, world, tmp_path):
    (file,) = NOTEBOOKS.glob(f"params/paper/{number}-*.yaml")
    words = [f"{name}={value if not isinstance(value, str) else repr(value)}" for name, value in COUNTS[number].items()]
    change = [] if number in ("00",) else [f"change={FEW}"]
    done = reproduce(world, tmp_path, number, *(part for word in [*words, *change] for part in ("-p", word)))
    assert done.returncode == 0, done.stderr[-3000:]
    assert yaml.safe_load(file.read_text())["profile"] == "paper"
    written = [
        path.name for path in tmp_path.rglob("*") if path.suffix in (".csv", ".png") and "runs" not in path.parts
    ]
    assert written
    assert all("-paper" in name or name.endswith(".csv") for name in written)
    assert not any((tmp_path / "data/results").glob("*/../quick"))


def test_without_the_models_it_ends_at_once_with_what_is_missing(world, tmp_path):
    done = reproduce({**world, "HF_HUB_CACHE": str(tmp_path)}, tmp_path, "03")
    assert done.returncode == 1
    assert done.stderr.count("CompVis/stable-diffusion-v1-4 (base model, 4.3 GB") == 1
    assert "wikiart" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_of_all_lists_what_is_here(world, tmp_path):
    done = reproduce(world, tmp_path, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(".ipynb: ") == len(COUNTS)
    rows = [line.split() for line in done.stdout.splitlines() if line.endswith((" yes", " no"))]
    assert len(rows) >= 8
    assert {row[-1] for row in rows} == {"yes"}
