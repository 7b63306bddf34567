"""What the arms cost: seconds per image and peak memory of each over those of CFG, measured in one run (Table 6).

    python -m fx.benchmark
    python -m fx.benchmark --images 100 --repeats 5

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

from fx.finetune import LORA_LAYERS
from fx.models import load_pair, load_pipeline
from fx.sampling import sample

ARMS = {"direct": 1.0, "cfg": 3.0, "finextract": 3.0}


def make(folder: Path, base: str) -> None:
    """A random LoRA of rank 64 and a copy of the U-Net, as two fine-tuned models of `base`."""
    pipeline = load_pipeline(base)
    pipeline.unet.save_pretrained(folder / "dreambooth/unet")
    settings = LoraConfig(r=64, lora_alpha=64, target_modules=LORA_LAYERS, init_lora_weights=False)
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


def main(words: list[str] | None = None) -> None:
    """Measure all arms of both methods and print them over CFG."""
    parser = argparse.ArgumentParser("python -m fx.benchmark", description=__doc__.split("\n\n")[0])
    parser.add_argument("--base", default="mini-sd", help="base model (default mini-sd)")
    parser.add_argument("--images", type=int, default=50, help="images per measurement (default 50)")
    parser.add_argument("--repeats", type=int, default=3, help="measurements per arm (default 3)")
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "ARM"), help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.images < 1 or options.repeats < 1:
        parser.error(f"--images {options.images} and --repeats {options.repeats} must be at least 1")
    if options.one:
        print(json.dumps(measure(options.base, Path(options.one[0]), options.one[1], options.images)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as place:
        make(Path(place), options.base)
        for method in ("dreambooth", "lora"):
            for _ in range(options.repeats):
                for arm in ARMS:
                    command = [sys.executable, "-m", "fx.benchmark", "--base", options.base]
                    command += ["--images", str(options.images), "--one", f"{place}/{method}", arm]
                    done = subprocess.run(command, capture_output=True, text=True, check=True)
                    rows.append({"method": method, "arm": arm} | json.loads(done.stdout.splitlines()[-1]))
    print(ratios(pd.DataFrame(rows)).to_string(index=False, float_format="{:.3f}".format))


def ratios(rows: pd.DataFrame) -> pd.DataFrame:
    """Medians over repeats, and each arm's over CFG's of the same method."""
    table = rows.groupby(["method", "arm"], sort=False).median().reset_index()
    for column in ("seconds", "memory"):
        cfg = table.method.map(table[table.arm == "cfg"].set_index("method")[column])
        table[f"{column} / cfg"] = table[column] / cfg
    return table


if __name__ == "__main__":
    main()
