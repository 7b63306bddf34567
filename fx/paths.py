"""Where things lie; everything is resolved from the package root, never from the working directory."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"
DATASETS = DATA / "datasets"
MODELS = DATA / "models"
PAPER = DATA / "paper"
TABLES = DATA / "results"
FIGURES = ROOT / "figures"
NOTEBOOKS = ROOT / "notebooks"
COMPLETE = "mini"  # the profile whose tables and figures the repository shows
