"""What the arms cost over CFG (Table 6), and what one set of settings costs over another, measured in one run.

    python -m fx.benchmark                                       # seconds per image and peak memory of each arm
    python -m fx.benchmark --images 100 --repeats 5
    python -m fx.benchmark --settings mini-sd-reference mini-sd  # an item: fine-tuning and the images of three arms

Every measurement is a process of its own, and what is compared takes turns, so that a busy machine slows all alike. Notebook
11 has the same numbers with intervals (fx.cost).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

from fx import command, settings
from fx.cost import SCALE, Cost, make, measurements
from fx.datasets import load_images, names
from fx.families import image_size
from fx.finetune import METHODS, TrainingItem, load_training, train
from fx.models import PRECISIONS, load_pair, load_pipeline
from fx.sampling import sample

ARMS = ("direct", "cfg", "finextract")


def measure_settings(name: str, method: str, images: int, steps: int = 8) -> dict[str, float]:
    """Seconds that an item of ten images takes with these settings, scaled up from some steps and images of each arm."""
    chosen = settings.load(name)[method]
    item = load_training(TrainingItem(names("style", "development")[0]))
    pipeline, n = load_pipeline(chosen.base), item.n_training
    spec = chosen.fine_tune(item.name, steps_per_image=-(-steps * chosen.batch_size // n))
    pictures = load_images(item.training, image_size(pipeline))
    with tempfile.TemporaryDirectory() as place:
        start = time.perf_counter()
        losses, _ = train(pipeline, pictures, [item.caption] * n, spec, Path(place))
        tuning = (time.perf_counter() - start) / len(losses) * chosen.steps_per_image * n / chosen.batch_size
        make(Path(place), cost := Cost(chosen.base, method))
        pair = load_pair(cost.base, Path(place) / "tuned", PRECISIONS[chosen.precision])
        sampling = 0.0
        for arm in ARMS:
            w = 1.0 if arm == "direct" else SCALE
            start = time.perf_counter()
            sample(
                pair, item.caption, images, arm, w, steps=chosen.sampling_steps, sampler=chosen.sampler, batch_size=10
            )
            sampling += (time.perf_counter() - start) / images * chosen.images_per_training * n
    return {"fine-tuning s": tuning, "three arms s": sampling, "item s": tuning + sampling}


def compare_settings(sets: list[str], images: int, repeats: int) -> pd.DataFrame:
    """Median seconds per set of settings and method, and the item's over that of the first set."""
    rows = []
    for method in METHODS:
        for _ in range(repeats):
            for name in sets:
                rows.append(
                    {"method": method, "settings": name} | run_apart(["--images", str(images), "--set", name, method])
                )
    table = pd.DataFrame(rows).groupby(["method", "settings"], sort=False).median().reset_index()
    first = table.method.map(table[table.settings == sets[0]].set_index("method")["item s"])
    return table.assign(**{f"item / {sets[0]}": table["item s"] / first})


def run_apart(words: list[str]) -> dict:
    """What the benchmark prints as JSON when it is called with these words in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "fx.benchmark", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def main(words: list[str] | None = None) -> None:
    """Measure all arms of both methods and print them over CFG."""
    parser = argparse.ArgumentParser("python -m fx.benchmark", description=__doc__.split("\n\n")[0])
    parser.add_argument("--base", default="mini-sd", help="base model (default mini-sd)")
    parser.add_argument("--images", type=int, default=50, help="images per measurement (default 50)")
    parser.add_argument("--repeats", type=int, default=3, help="measurements per arm (default 3)")
    parser.add_argument("--settings", nargs="+", metavar="NAME", help="sections of fx/settings.yaml to compare instead")
    parser.add_argument("--set", nargs=2, metavar=("NAME", "METHOD"), help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.images < 1 or options.repeats < 1:
        parser.error(f"--images {options.images} and --repeats {options.repeats} must be at least 1")
    if options.set:
        print(json.dumps(measure_settings(*options.set, options.images)))
        return
    if options.settings:
        for name in options.settings:
            settings.load(name)
        table = compare_settings(options.settings, options.images, options.repeats)
        print(table.to_string(index=False, float_format="{:.2f}".format))
        return
    tables = []
    for method in METHODS:
        spec = Cost(
            options.base, method, ARMS, options.images, min(50, options.images), 25, "ddim", repeats=options.repeats
        )
        tables.append(ratios(pd.DataFrame(measurements(spec))).assign(method=method))
    table = pd.concat(tables)[["method", "arm", "seconds", "memory", "seconds / cfg", "memory / cfg"]]
    print(table.to_string(index=False, float_format="{:.3f}".format))


def ratios(rows: pd.DataFrame) -> pd.DataFrame:
    """Medians over repeats of each arm's seconds and memory, and these over CFG's."""
    table = rows.groupby("arm", sort=False)[["seconds", "memory"]].median()
    return table.join((table / table.loc["cfg"]).add_suffix(" / cfg")).reset_index()


if __name__ == "__main__":
    command.run("fx.benchmark", main)
