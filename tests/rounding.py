"""How far one extraction differs between processors and numbers of threads.

    python tests/rounding.py

Settings by which PyTorch's libraries compute as on older processors stand for other machines. Under each, one object is
extracted with the first setting's fine-tuned model and with one of its own, and compared with the first. Prints the rows
of the table in CONTRIBUTING.md; a few minutes on two free cores.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[1]
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2"}
OLDER = {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}
SETTINGS = {
    "the same again": {},
    "as with AVX2": AVX2,
    "as with SSE4.1": OLDER | {"OPENBLAS_CORETYPE": "Nehalem"},
    "two threads": {"OMP_NUM_THREADS": "2"},
}
EXTRACTION = """
from fx import results, settings
chosen = settings.load()["dreambooth"]
results.run([chosen.score(chosen.fine_tune("object/candle"), "finextract")])
"""


def extraction(runs: Path, variables: dict[str, str]) -> Path:
    """Fine-tune, generate, extract and score in the work area `runs`, which may hold finished steps; the work area."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FX_RUNS": str(runs)} | variables
    subprocess.run([sys.executable, "-c", EXTRACTION], env=environment, cwd=ROOT, check=True, capture_output=True)
    return runs


def only(runs: Path, file: str) -> dict:
    """The one JSON file of that name, below RUNS / kind / address."""
    (path,) = runs.glob(file)
    return json.loads(path.read_text())


def compared(first: Path, other: Path) -> list[str]:
    """Differences: largest of weights, largest and mean of grey levels, of AS; extracted images that are the same."""
    weights = [load_file(next(runs.glob("finetune/*/unet/*.safetensors"))) for runs in (first, other)]
    moved = max(float(np.abs(weights[0][name] - weights[1][name]).max()) for name in weights[0])
    images = [np.stack([Image.open(file) for file in sorted(runs.glob("generate/*/*.png"))]) for runs in (first, other)]
    levels = np.abs(np.subtract(*images, dtype=int))
    scores = [only(runs, "score/*/scores.json")["AS"] for runs in (first, other)]
    centres = [set(only(runs, "extract/*/extraction.json")["centres"]) for runs in (first, other)]
    apart = f"{abs(scores[0] - scores[1]):.1g}"
    return [
        f"{moved:.1e}",
        f"{levels.max()}",
        f"{levels.mean():.1e}",
        apart,
        f"{len(centres[0] & centres[1])} of {len(centres[0])}",
    ]


def main() -> None:
    """Print a row per setting and model."""
    with tempfile.TemporaryDirectory() as place:
        first = extraction(Path(place) / "first", {})
        for name, variables in SETTINGS.items():
            for model in ("the same", "its own"):
                runs = Path(place) / name / model
                if model == "the same":
                    shutil.copytree(first / "finetune", runs / "finetune")
                row = [name, model, *compared(first, extraction(runs, variables))]
                print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
