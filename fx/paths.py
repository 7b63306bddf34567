"""Where things lie; everything is resolved from the package root, never from the working directory."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"
DATASETS = DATA / "datasets"
MODELS = DATA / "models"
PAPER = DATA / "paper"
SHIPPED_TABLES = DATA / "results"
SHIPPED_FIGURES = ROOT / "figures"
# What is not shipped and a person puts there: the paper's images and descriptor. FX_EXTERNAL moves it.
EXTERNAL = ROOT / Path(os.environ.get("FX_EXTERNAL") or "data/external").expanduser()
# Where tables and figures are written. FX_OUTPUTS moves both: a test run leaves the committed ones alone.
OUTPUTS = ROOT / Path(os.environ.get("FX_OUTPUTS") or "").expanduser()
TABLES = OUTPUTS / "data" / "results"
FIGURES = OUTPUTS / "figures"
NOTEBOOKS = ROOT / "notebooks"
COMPLETE = "mini"  # the profile whose tables and figures the repository shows
