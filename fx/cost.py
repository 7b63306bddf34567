"""What sampling costs, measured: seconds per image and peak memory of each arm (Table 6).

    spec = Cost("mini-sd", "lora", batch_size=10, repeats=5)
    rows = measured(spec)             # a row per arm and repeat
    table = over(rows, "cfg")         # each arm's over classifier-free guidance, with intervals

Every measurement is a process of its own (forked from one that has only imported), and the arms take turns, so that a
busy machine slows all of them alike; only their ratios mean anything. What was learned does not matter to the cost, so
the fine-tuned models are the base's own network with small random changes.
"""

import contextlib
import copy
import io
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import psutil
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from tqdm import tqdm

from fx import results
from fx.families import SAMPLERS, network, network_name
from fx.finetune import LORA_LAYERS
from fx.low_rank import strongest
from fx.metrics import mean_interval
from fx.models import LORA_FILE, PRECISIONS, ModelPair, load_pair, load_pipeline, model_folder
from fx.sampling import ARMS, sample

MEASUREMENTS = "measurements.json"
METHODS = ("dreambooth", "lora", "low rank")
SCALE = 3.0  # w' of the guided arms, which costs the same at any
START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


@dataclass(frozen=True)
class Cost:
    """What to measure: some arms on one base model with one kind of fine-tuned model, taking turns.

    method: "dreambooth", "lora", or "low rank", a whole network as its base and a difference of low rank (fx.low_rank),
    where arms that need theta' alone have the whole network; images: sampled in each measurement, `batch_size` at a time;
    rank: of the LoRA or the difference; repeats: measurements of each arm, after a round that does not count.
    """

    VERSION: ClassVar[int] = 2

    base: str = "mini-sd"
    method: str = "lora"
    arms: tuple[str, ...] = ("direct", "cfg", "finextract")
    images: int = 20
    batch_size: int = 10
    steps: int = 10
    sampler: str = "dpm++"
    precision: str = "float32"
    rank: int = 64
    repeats: int = 3

    def __post_init__(self):
        for name, known in (("method", METHODS), ("precision", PRECISIONS), ("sampler", SAMPLERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: choose from {', '.join(known)}")
        if unknown := [arm for arm in self.arms if arm not in ARMS]:
            raise ValueError(f"unknown arm {unknown[0]!r}: choose from {', '.join(ARMS)}")
        if not self.arms or len(set(self.arms)) < len(self.arms):
            raise ValueError(f"arms {self.arms}: name one or several different ones")
        numbers = ("images", "batch_size", "steps", "rank", "repeats")
        if low := [name for name in numbers if getattr(self, name) < 1]:
            raise ValueError(f"{low[0]} {getattr(self, low[0])} must be at least 1")


@results.inputs.register
def _(spec: Cost) -> dict[str, str]:
    return {"base": results.sha256_of(model_folder(spec.base))}


@results.perform.register
def _(spec: Cost, folder: Path) -> None:
    """Write measurements.json: arm, repeat, seconds per image, memory in MB and the device, one for each measurement.

    Finished measurements are kept in the work area's scratch folder, where an interrupted run goes on.
    """
    kept = results.scratch(spec) / MEASUREMENTS

    def keep(rows: list[dict]) -> None:
        (part := kept.with_suffix(".part")).write_text(json.dumps(rows))
        part.rename(kept)

    rows = measurements(spec, json.loads(kept.read_text()) if kept.exists() else [], keep)
    (folder / MEASUREMENTS).write_text(json.dumps(rows))


def measurements(
    spec: Cost, done: Sequence[dict] = (), keep: Callable[[list[dict]], None] = lambda _: None
) -> list[dict]:
    """Every measurement of a spec that counts, `repeats` of each arm in turns after a round that does not.

    done: what `keep` was given last, when it is to go on from there.
    """
    rows, asked = list(done), list(product(range(spec.repeats + 1), spec.arms))
    with tempfile.TemporaryDirectory() as place:
        make(Path(place), spec)
        for repeat, arm in tqdm(asked[len(rows) :], "measurements", len(asked), initial=len(rows), leave=False):
            rows.append({"arm": arm, "repeat": repeat} | apart(replace(spec, arms=(arm,)), Path(place)))
            keep(rows)
    return [row for row in rows if row["repeat"]]


def measured(spec: Cost) -> pd.DataFrame:
    """The measurements of a spec, done now if they are missing: arm, repeat, seconds, memory, device."""
    return pd.DataFrame(json.loads((results.complete(spec) / MEASUREMENTS).read_text()))


def make(folder: Path, spec: Cost) -> None:
    """A fine-tuned model of that method, folder/tuned: a whole pipeline (DreamBooth) or a LoRA, changed at random."""
    pipeline = load_pipeline(spec.base)
    model, name = network(pipeline), network_name(pipeline)
    torch.manual_seed(0)
    if spec.method != "lora":
        before = copy.deepcopy(model) if spec.method == "low rank" else None
        for weight in model.parameters():
            weight += 1e-4 * torch.randn_like(weight)
        pipeline.save_pretrained(folder / ("tuned" if before is None else "whole"))
        if before is None:
            return
        (folder / "tuned").mkdir()
        factors, _ = strongest(before, model, spec.rank)
        save_file({f"{name}.{key}": factor for key, factor in factors.items()}, folder / "tuned" / LORA_FILE)
        return
    model.add_adapter(
        LoraConfig(r=spec.rank, lora_alpha=spec.rank, target_modules=LORA_LAYERS[name], init_lora_weights=False)
    )
    layers = get_peft_model_state_dict(model)
    layers = layers if name == "transformer" else convert_state_dict_to_diffusers(layers)
    pipeline.save_lora_weights(folder / "tuned", **{f"{name}_lora_layers": layers})


def apart(spec: Cost, place: Path) -> dict:
    """`measure` in a process of its own."""
    try:
        return in_a_process(measure, spec, place)
    except RuntimeError as error:
        raise RuntimeError(f"the measurement of {spec.arms[0]} failed: {error}") from None


def in_a_process(do: Callable, *given):
    """What a function returns in a process of its own.

    Where there is fork, of one that has only imported, which is kept for the next call: the module of the first function
    that was asked for; a later one's is imported anew each time. Progress bars are not shown. RuntimeError for whatever goes
    wrong there.
    """
    context = multiprocessing.get_context(START)
    if START == "forkserver":
        context.set_forkserver_preload([do.__module__])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_tell, args=(theirs, do, given), daemon=True)
    process.start()
    theirs.close()
    try:
        found, fault = ours.recv()
    except EOFError:
        process.join()
        found, fault = None, f"its process ended with exit code {process.exitcode}"
    except BaseException:
        process.kill()
        raise
    process.join()
    if fault:
        raise RuntimeError(fault)
    return found


def _tell(sender, do: Callable, given: tuple) -> None:
    """In that process: send what the function returns, or what went wrong."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            sender.send((do(*given), ""))
    except Exception as error:
        sender.send((None, f"{type(error).__name__}: {error}"))


def measure(spec: Cost, place: Path) -> dict[str, float | str]:
    """Seconds per image and memory in MB of the first arm, with the fine-tuned model in `place`.

    seconds: sampling and decoding, without loading. memory: of a GPU the most that torch has allocated, else the most that
    the process has had resident beyond what it had before any model was loaded. An arm that has no use for theta does
    not load it.
    """
    arm, gpu = spec.arms[0], torch.cuda.is_available()
    before = 0.0 if gpu else psutil.Process().memory_info().rss / 1e6
    pair = load_for(arm, spec, place)
    w = 1.0 if arm == "direct" else SCALE
    sample(pair, "a dog", min(2, spec.images), arm, w, steps=2, sampler=spec.sampler)  # what is done only once
    start = time.perf_counter()
    sample(pair, "a dog", spec.images, arm, w, steps=spec.steps, sampler=spec.sampler, batch_size=spec.batch_size)
    seconds = (time.perf_counter() - start) / spec.images
    memory = torch.cuda.max_memory_allocated() / 1e6 if gpu else peak() - before
    return {"seconds": seconds, "memory": memory, "device": torch.cuda.get_device_name() if gpu else "CPU"}


def load_for(arm: str, spec: Cost, place: Path) -> ModelPair:
    """What an arm needs: theta', and theta where the arm asks it."""
    tuned, dtype = place / "tuned", PRECISIONS[spec.precision]
    asked = {model for model, _ in ARMS[arm].ends}
    if asked == {"tuned"} and spec.method != "lora":
        alone = load_pipeline(str(tuned if spec.method == "dreambooth" else place / "whole"), dtype)
        return ModelPair(alone, alone)
    return load_pair(spec.base, tuned, dtype)


def peak() -> float:
    """The most memory that this process has had resident so far, in MB.

    Linux says it of the process alone; what getrusage says there includes the process that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1e3
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (1e6 if sys.platform == "darwin" else 1e3)


def over(rows: pd.DataFrame, baseline: str, by: str = "arm") -> pd.DataFrame:
    """Ratios of seconds and of memory to the baseline's, paired by repeat: their geometric mean with its 95% interval.

    by: the column whose values are compared, of which the baseline is one. Columns: it, measure ("time", "memory"),
    repeats, ratio, low, high. ValueError if a value was not measured as often as the baseline.
    """
    parts = []
    for column, measure_name in (("seconds", "time"), ("memory", "memory")):
        wide = rows.pivot(index="repeat", columns=by, values=column)
        if baseline not in wide or wide.isna().any(axis=None):
            raise ValueError(f"{baseline!r} and the others were not measured equally often: {list(wide)}")
        for value in dict.fromkeys(rows[by]):
            if value != baseline:
                logs = np.log(wide[value] / wide[baseline]).to_numpy()
                low, high = mean_interval(logs)
                numbers = {"ratio": np.exp(logs.mean()), "low": np.exp(low), "high": np.exp(high)}
                parts.append({by: value, "measure": measure_name, "repeats": len(wide)} | numbers)
    return pd.DataFrame(parts, columns=[by, "measure", "repeats", "ratio", "low", "high"])
