"""What the arms cost over CFG (Table 6), and what one set of settings costs over another, measured in one run.

    python -m fx.benchmark                                       # seconds per image and peak memory of each arm
    python -m fx.benchmark --images 100 --repeats 5
    python -m fx.benchmark --settings mini-sd-reference mini-sd  # an item: fine-tuning and the images of three arms

Every measurement is a process of its own, and the arms take turns, so that a busy machine slows all of them alike. The
LoRA and the fine-tuned U-Net are fresh and random: cost does not depend on what was learned.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict

from fx import command, settings
from fx.datasets import load_images, names
from fx.families import image_size
from fx.finetune import LORA_LAYERS, METHODS, TrainingItem, load_training, train
from fx.models import PRECISIONS, load_pair, load_pipeline
from fx.sampling import sample

ARMS = {"direct": 1.0, "cfg": 3.0, "finextract": 3.0}


def make(folder: Path, base: str) -> None:
    """A random LoRA of rank 64 and a copy of the U-Net, as two fine-tuned models of `base`."""
    pipeline = load_pipeline(base)
    pipeline.unet.save_pretrained(folder / "dreambooth/unet")
    settings = LoraConfig(r=64, lora_alpha=64, target_modules=LORA_LAYERS["unet"], init_lora_weights=False)
    pipeline.unet.add_adapter(settings)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
    pipeline.save_lora_weights(folder / "lora", unet_lora_layers=layers)


def measure(base: str, tuned: Path, arm: str, images: int) -> dict[str, float]:
    """Seconds per image (model loading apart) and peak memory in MB: of the GPU where there is one, of the process else."""
    pair = load_pair(base, tuned)
    sample(pair, "a dog", 2, arm, ARMS[arm], steps=2)  # what is done only once
    start = time.perf_counter()
    sample(pair, "a dog", images, arm, ARMS[arm])
    seconds = (time.perf_counter() - start) / images
    if torch.cuda.is_available():
        return {"seconds": seconds, "memory": torch.cuda.max_memory_allocated() / 1e6}
    return {"seconds": seconds, "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}


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
        make(Path(place), chosen.base)
        pair = load_pair(chosen.base, Path(place) / method, PRECISIONS[chosen.precision])
        sampling = 0.0
        for arm, w in ARMS.items():
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
    done = subprocess.run([sys.executable, "-m", "fx.benchmark", *words], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(words: list[str] | None = None) -> None:
    """Measure all arms of both methods and print them over CFG."""
    parser = argparse.ArgumentParser("python -m fx.benchmark", description=__doc__.split("\n\n")[0])
    parser.add_argument("--base", default="mini-sd", help="base model (default mini-sd)")
    parser.add_argument("--images", type=int, default=50, help="images per measurement (default 50)")
    parser.add_argument("--repeats", type=int, default=3, help="measurements per arm (default 3)")
    parser.add_argument("--settings", nargs="+", metavar="NAME", help="sections of fx/settings.yaml to compare instead")
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "ARM"), help=argparse.SUPPRESS)
    parser.add_argument("--set", nargs=2, metavar=("NAME", "METHOD"), help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.images < 1 or options.repeats < 1:
        parser.error(f"--images {options.images} and --repeats {options.repeats} must be at least 1")
    if options.one:
        print(json.dumps(measure(options.base, Path(options.one[0]), options.one[1], options.images)))
        return
    if options.set:
        print(json.dumps(measure_settings(*options.set, options.images)))
        return
    if options.settings:
        for name in options.settings:
            settings.load(name)
        table = compare_settings(options.settings, options.images, options.repeats)
        print(table.to_string(index=False, float_format="{:.2f}".format))
        return
    rows = []
    with tempfile.TemporaryDirectory() as place:
        make(Path(place), options.base)
        for method in METHODS:
            for _ in range(options.repeats):
                for arm in ARMS:
                    one = ["--base", options.base, "--images", str(options.images), "--one", f"{place}/{method}", arm]
                    rows.append({"method": method, "arm": arm} | run_apart(one))
    print(ratios(pd.DataFrame(rows)).to_string(index=False, float_format="{:.3f}".format))


def ratios(rows: pd.DataFrame) -> pd.DataFrame:
    """Medians over repeats, and each arm's over CFG's of the same method."""
    table = rows.groupby(["method", "arm"], sort=False).median().reset_index()
    for column in ("seconds", "memory"):
        cfg = table.method.map(table[table.arm == "cfg"].set_index("method")[column])
        table[f"{column} / cfg"] = table[column] / cfg
    return table


if __name__ == "__main__":
    command.run("fx.benchmark", main)
