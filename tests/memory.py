"""How much memory generation, extraction and scoring take as the number of generated images N grows.

    PYTHONPATH=. python tests/memory.py [N ...] [--figure FILE]

A tiny model draws N images of 64 pixels (500, 1,000, 2,000 and 5,000 unless others are named), and each step is done in a
process of its own, forked from one that has only imported. Its peak is what it has had resident at most beyond what it
began with. The similarities of all pairs, as float32 and as whole millionths, are 8 N^2 bytes and told apart. Whoever held
all images would hold 12 kB for each as bytes and 49 kB as numbers. The tests run a short form (tests/test_memory.py).
"""

import argparse
import contextlib
import ctypes
import json
import sys
import tempfile
from pathlib import Path

import pandas as pd
import psutil
import tiny
import torch
from PIL import Image

from fx import plots, results
from fx.cost import in_a_process, peak
from fx.evaluation import Score
from fx.extraction import Extract
from fx.finetune import FineTune, TrainingItem
from fx.sampling import Generate

STAGES = ("generate", "extract", "score")
MATRICES = 8  # bytes for each pair of images
USUAL = (500, 1000, 2000, 5000)


def specs(base: str, pictures: str, n: int) -> dict[str, object]:
    """A step of each stage, of which the later ones build on the earlier."""
    model = FineTune((TrainingItem(pictures, "a dog"),), base, steps_per_image=2, learning_rate=1e-3)
    generate = Generate(model, "direct", 1.0, n_generated=n, steps=1)
    extract = Extract(generate, 10, rule="tightest")
    return dict(zip(STAGES, (generate, extract, Score(extract, judge="")), strict=True))


def freed_at_once() -> None:
    """Have glibc give each block of 64 kB and more back as it is freed: what it would keep for later blurs a peak."""
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc has no such thing
        ctypes.CDLL(None).mallopt(-3, 64 * 1024)  # M_MMAP_THRESHOLD


def work(area: Path, base: str, pictures: str, n: int, stage: str) -> float:
    """In a process of its own: do a step whose predecessors are finished; the megabytes that came on top."""
    results.RUNS = area
    torch.set_num_threads(1)
    freed_at_once()
    before = psutil.Process().memory_info().rss / 1e6
    results.complete(specs(base, pictures, n)[stage])
    return peak() - before


def measured(numbers: tuple[int, ...], place: Path) -> pd.DataFrame:
    """A line for each stage and N: N, stage, MB at the peak, MB of the similarities, and MB without those."""
    base, pictures = str(place / "base"), place / "pictures"
    tiny.save("sd1", Path(base))
    config = place / "base/unet/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 16}))
    pictures.mkdir()
    for number, picture in enumerate(tiny.pictures(3)):
        Image.fromarray(picture).save(pictures / f"{number}.png")
    lines = []
    for n in numbers:
        results.RUNS = place / f"runs{n}"
        results.complete(specs(base, str(pictures), n)["generate"].model)
        for stage in STAGES:
            found = in_a_process(work, results.RUNS, base, str(pictures), n, stage)
            pairs = MATRICES * n**2 / 1e6 if stage == "extract" else 0.0
            lines.append({"N": n, "stage": stage, "MB": found, "of similarities": pairs, "without": found - pairs})
            print(f"N = {n}, {stage}: {found:.0f} MB, {found - pairs:.0f} without similarities", file=sys.stderr)
    return pd.DataFrame(lines)


def growth(table: pd.DataFrame) -> pd.DataFrame:
    """For each stage, without similarities: the largest N's peak over the smallest's, and kB for each image more."""
    wide = table.pivot(index="stage", columns="N", values="without").loc[list(STAGES)]
    least, most = wide.columns.min(), wide.columns.max()
    more = 1e3 * (wide[most] - wide[least]) / (most - least)
    return pd.DataFrame({"largest over smallest": wide[most] / wide[least], "kB an image": more})


def drawn(table: pd.DataFrame, file: Path) -> None:
    """Save a picture: MB over N, one line per stage, with the similarities apart."""
    figure, axes = plots.plt.subplots(figsize=(4.5, 3))
    for stage, marker in zip(STAGES, "os^", strict=True):
        own = table[table.stage == stage]
        axes.plot(own.N, own.without, marker=marker, label=stage)
    extract = table[table.stage == "extract"]
    axes.plot(extract.N, extract["of similarities"], "--", color="0.5", label="similarities of all pairs")
    axes.set(xlabel="$N$", ylabel="MB", ylim=(0, 1.4 * max(table.without.max(), table["of similarities"].max())))
    axes.legend(loc="upper left", ncols=2)
    figure.savefig(file)
    plots.plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("numbers", nargs="*", type=int, default=USUAL, metavar="N")
    parser.add_argument("--figure", type=Path, help="a picture of it")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        table = measured(tuple(given.numbers), Path(place))
    print(table.round(0).to_string(index=False))
    print(growth(table).round(2).to_string())
    if given.figure:
        drawn(table, given.figure)


if __name__ == "__main__":
    main()
