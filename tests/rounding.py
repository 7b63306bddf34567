"""How far results differ between processors and numbers of threads: the demo under several settings.

    python tests/rounding.py

Settings by which PyTorch's libraries compute as on older processors stand for other machines. Each is compared with the
first, and runs the demo twice: with the first one's fine-tuned model, and with one of its own. Prints the table of CONTRIBUTING.md; about a
quarter of an hour on two free cores.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
OLDER = {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}
SETTINGS = {
    "this processor, one thread": {},
    "again": {},
    "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2"},
    "SSE4.1": {**OLDER, "OPENBLAS_CORETYPE": "Nehalem"},
    "two threads": {"OMP_NUM_THREADS": "2"},
}


def demo(runs: Path, settings: dict[str, str]) -> Path:
    """Run the demo in the work area `runs`, in which finished steps are taken over; the work area."""
    variables = os.environ | {"OMP_NUM_THREADS": "1", "FX_RUNS": str(runs)} | settings
    subprocess.run([sys.executable, "-m", "fx.demo"], env=variables, cwd=ROOT, check=True, capture_output=True)
    return runs


def read(runs: Path, kind: str, file: str) -> dict:
    """A JSON file of every finished step of a kind, by the step's address, which is the same under all settings."""
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(runs.glob(f"{kind}/*/{file}"))}


def compared(first: Path, other: Path) -> dict:
    """The largest differences over the demo's three arms."""
    images = [
        tuple(np.load(runs / path.relative_to(first)).astype(int) for runs in (first, other))
        for path in sorted(first.glob("generate/*/images.npy"))
    ]
    levels = np.abs(np.stack([a - b for a, b in images]))
    scores = [pd.DataFrame(read(runs, "extract", "scores.json")).T.astype(float) for runs in (first, other)]
    apart = (scores[0] - scores[1]).abs().max()
    centres = [read(runs, "extract", "matches.json") for runs in (first, other)]
    same = [len({*centres[0][name]["centres"]} & {*centres[1][name]["centres"]}) for name in centres[0]]
    return {
        "grey levels, largest": levels.max(),
        "grey levels, mean": f"{levels.mean():.4f}",
        "AS": f"{apart['AS']:.4f}",
        "A-ESR": f"{apart[['A-ESR_strict', 'A-ESR_loose']].max():.2f}",
        "same extracted images": f"{sum(same)} of {sum(len(step['centres']) for step in centres[0].values())}",
    }


def main() -> None:
    """Print one row per setting and model."""
    with tempfile.TemporaryDirectory() as place:
        (first, settings), *others = SETTINGS.items()
        reference = demo(Path(place) / first, settings)
        for name, settings in others:
            for model in ("the same", "its own"):
                runs = Path(place) / name / model
                if model == "the same":
                    shutil.copytree(reference / "finetune", runs / "finetune")
                row = {"setting": name, "fine-tuned model": model, **compared(reference, demo(runs, settings))}
                print("| " + " | ".join(map(str, row.values())) + " |", flush=True)
        print("columns: " + ", ".join(row))


if __name__ == "__main__":
    main()
