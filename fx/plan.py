"""What notebooks would compute, and about how long it would take and how much disk it would need, without any of the work.

    python -m fx.reproduce --profile paper --dry-run

The cells of a notebook are run with a runner that notes the steps it is asked for and answers with numbers that mean
nothing, so that cells which build on a table go on; one that needs the files of a step ends there. What a plan holds
would be done, then, but steps that depend on files of others are missing: a few of most notebooks, nearly all of 08, 13
and 15, whose models are steps. Models and images that are not
here have stand-ins: a shipped model, and as many pictures as WikiArt and DreamBooth have.

Time is evaluations of the denoising network, counted, times the seconds of one. They are measured on this machine: on
the network itself where it is here, else by its floating-point operations and the speed of a convolution and a product of
matrices. Disk is generated images and checkpoints.
"""

import contextlib
import functools
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import nn

from fx import checkpoints, command, needs, originals, results
from fx.paths import EXTERNAL, MODELS, NOTEBOOKS

PNG = 0.55  # bytes of a losslessly compressed picture over those of its pixels
BACKWARD = {
    "dreambooth": 3.0,
    "lora": 2.5,
}  # a training pass over a forward one; a LoRA's base needs no gradients of weights
TRAINING_ITEMS = {"wikiart": (originals.REPORTED + originals.DEVELOPMENT, 60), "dreambooth": (30, 5)}


@dataclass(frozen=True)
class Planned:
    """A step that would be done. place: its folder below the work area; forward: evaluations of the base's network for one
    image each; trained: the same with a backward pass; images: that it writes; model: "dreambooth", "lora:<rank>" or "".
    """

    place: str
    done: bool
    base: str = ""
    forward: int = 0
    trained: int = 0
    images: int = 0
    model: str = ""


def described(spec) -> Planned:
    """What doing a step asks of the network; nothing for a step that does not sample or train."""
    from fx import refine
    from fx.extraction import Extract
    from fx.finetune import FineTune, load_training
    from fx.sampling import BLOCK, Generate, evaluations

    asked = results._asked(spec)
    place = results.place_of(asked)
    known = {"place": f"{place.parent.name}/{place.name}", "done": not results.fault_in(place, asked)}
    if isinstance(spec, FineTune):
        images = sum(load_training(part).n_training for part in spec.training)
        trained = -(-spec.steps_per_image * images // spec.batch_size) * spec.batch_size
        model = f"lora:{spec.rank}" if spec.method == "lora" else spec.method
        return Planned(**known, base=spec.base, trained=trained, model=model)
    if isinstance(spec, Generate):
        sampled = -(-spec.n_generated // BLOCK) * BLOCK
        forward = evaluations(replace(spec, n_generated=sampled))
        return Planned(**known, base=spec.model.base, forward=forward, images=spec.n_generated)
    if isinstance(spec, Extract) and spec.refine and spec.n_training:
        forward = refine.evaluations(spec.refine, spec.generate, spec.n_training)
        return Planned(**known, base=spec.generate.model.base, forward=forward)
    return Planned(**known)


def steps(notebook: Path, values: dict[str, object]) -> list[Planned]:
    """The steps of a notebook with these parameters, each once; found in a process of its own."""
    if notebook.name.startswith("00"):  # whose cells train and fetch by themselves
        raise RuntimeError(f"{notebook.name} is not planned: it trains the shipped models, which takes hours")
    words = [sys.executable, "-m", "fx.plan", str(notebook), json.dumps(values)]
    with tempfile.TemporaryDirectory() as place:
        here = {"FX_EXTERNAL": str(stand_in_images(Path(place))), "FX_OUTPUTS": place, "MPLBACKEND": "agg"}
        here |= {"FX_RUNS": str(results.RUNS), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(words, env=os.environ | here, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"{notebook.name} could not be planned: {last}")
    return [Planned(**step) for step in json.loads(done.stdout.splitlines()[-1])]


def noted(notebook: Path, values: dict[str, object]) -> list[Planned]:
    """The same in this process, whose runner does nothing from then on."""
    found: dict[str, Planned] = {}

    def note(spec) -> None:
        for _, node in results._walk(spec):
            if results._is_step(node) and (key := results.digest(node)) not in found:
                found[key] = described(node)

    _without_work(note)
    os.chdir(NOTEBOOKS)
    space: dict[str, object] = {"display": lambda *shown: None}
    for cell in nbformat.read(notebook, 4).cells:
        if cell.cell_type == "code":
            with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
                exec(compile(cell.source, cell.get("id", notebook.name), "exec"), space)
            if "parameters" in cell.metadata.get("tags", []):
                space |= values
    return list(found.values())


def _without_work(note: Callable[[object], None]) -> None:
    """Let steps be noted instead of done, figures not be drawn, and what is missing have stand-ins."""
    from matplotlib.figure import Figure

    from fx import clique_plots, evaluation, extraction, plots, similarity

    def run(specs: Iterable, client=None, description: str = "") -> pd.DataFrame:
        specs = list(specs)
        for spec in specs:
            note(spec)
        rows = results._settings(specs)
        names = results._column_names(dict.fromkeys(path for row in rows for path in row))
        table = pd.DataFrame([{names[path]: value for path, value in row.items()} for row in rows])
        return _AnyColumn(table.reindex(columns=list(names.values())))

    def complete(spec) -> Path:
        note(spec)
        raise LookupError("a plan has no files of a step")

    asked, known = results._asked, {}

    def asked_once(spec) -> dict:
        key = repr(spec)  # which tells 1 from 1.0
        if key not in known:
            known[key] = asked(spec)
        return known[key]

    results._asked = asked_once  # no input changes while nothing is done
    results.run, results.complete, results.connect = run, complete, lambda scheduler: None
    for module in (plots, clique_plots):
        for name, function in list(vars(module).items()):
            if getattr(function, "__annotations__", {}).get("return") is Figure:
                setattr(module, name, lambda *given, **named: Figure())
    plots.save = lambda figure, name, profile: Path(name)
    plots.complete = lambda name, profile="": ""
    find, path = checkpoints.find, similarity.descriptor_path

    def stand_in(name: str) -> Path:
        try:
            return find(name)
        except (FileNotFoundError, ValueError):
            return MODELS / ("mini-clip" if any(word in str(name).lower() for word in ("clip", "dino")) else "mini-sd")

    def descriptor(name):
        try:
            return path(name)
        except FileNotFoundError:
            return path("mini-sscd")

    checkpoints.find = stand_in
    for module in (similarity, extraction, evaluation):
        module.descriptor_path = descriptor


class _AnyColumn(pd.DataFrame):
    """A table that has every column: one that it does not have holds numbers between 0 and 1 that mean nothing."""

    @property
    def _constructor(self):
        return _AnyColumn

    def __getitem__(self, key):
        wanted = key if isinstance(key, list) else [key]
        if all(isinstance(name, str) for name in wanted):
            self._invent(wanted)
        return super().__getitem__(key)

    def __getattr__(self, name: str):
        if name == "AS":
            self._invent([name])
        return super().__getattr__(name)

    def melt(self, id_vars=None, value_vars=None, **options):
        self._invent([*(id_vars or []), *(value_vars or [])])
        return super().melt(id_vars=id_vars, value_vars=value_vars, **options)

    def pivot_table(self, values=None, **options):
        self._invent([values] if isinstance(values, str) else list(values or []))
        return super().pivot_table(values=values, **options)

    def _invent(self, names: list[str]) -> None:
        draw = np.random.default_rng(0)
        for name in names:
            if name not in self.columns:
                super().__setitem__(name, draw.random(len(self)))


def stand_in_images(folder: Path) -> Path:
    """A folder like data/external, in which the sets that are not there have pictures of a few pixels in their place."""
    for path in EXTERNAL.iterdir() if EXTERNAL.is_dir() else ():
        if path.name != "dreambooth" or (path / originals.CLASSES).exists():  # nothing may be written through a link
            (folder / path.name).symlink_to(path)
    for name, (count, each) in TRAINING_ITEMS.items():
        if not (folder / name).exists():
            for number in range(count):
                if name == "wikiart":
                    style, stem = f"Style_{number}", f"artist-{number}_"
                else:
                    style, stem = f"subject{number}", ""
                (place := folder / name / style).mkdir(parents=True)
                for image in range(each):
                    pixels = np.full((8, 8, 3), (number * 7 + image) % 256, np.uint8)
                    Image.fromarray(pixels).save(place / f"{stem}{image:02d}.png")
    if not (classes := folder / "dreambooth" / originals.CLASSES).exists():
        lines = "".join(f"subject{number},dog\n" for number in range(TRAINING_ITEMS["dreambooth"][0]))
        classes.write_text(f"subject_name,class\n{lines}")
    return folder


# How long a step takes and how much it writes


@dataclass(frozen=True)
class Size:
    """Of a base model's network. operations: floating-point, of one evaluation for one image; parameters; side: pixels of
    its images; inner: sum of in- and outputs over the layers that a LoRA is added to; seconds: of one evaluation, float32.
    """

    operations: float
    parameters: int
    side: int
    inner: int
    seconds: float


SDXL = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
SD1 = {"sample_size": 64, "cross_attention_dim": 768}
# the networks' published configurations, for when they are not here
CONFIGS = {
    "CompVis/stable-diffusion-v1-4": SD1,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": SD1,
    "BAAI/AltDiffusion": SD1,
    "stabilityai/stable-diffusion-xl-base-1.0": SDXL,
}


@functools.cache
def size_of(base: str) -> Size | None:
    """The size of a base model's network; None for one that is neither here nor known."""
    from fx import families
    from fx.models import load_pipeline

    pipeline = None
    if (MODELS / base).is_dir() or needs.has_model(base):
        with contextlib.suppress(OSError, ValueError):  # a part of it is not here; nobody is asked on the network
            pipeline = load_pipeline(base)
    if pipeline is None:
        config = CONFIGS.get(base.partition("@")[0])
        return None if config is None else _of_config(config)
    network = families.network(pipeline)
    condition = families.encode(pipeline, "a dog").expand(n := 10)
    x = torch.randn(n, *families.latent_shape(pipeline)).to(network.device)
    t = torch.full((n,), 500).to(network.device)

    @torch.inference_mode()
    def once() -> None:
        families.denoise(network, x, t, condition)

    side = families.image_size(pipeline)
    inner = inner_size(network, families.network_name(pipeline))
    return Size(operations_of(once) / n, parameters_of(network), side, inner, seconds_of(once) / n)


def _of_config(config: dict[str, object]) -> Size:
    """The size of a U-Net of this configuration, without its weights; seconds by the speed of this machine."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        network = UNet2DConditionModel(**config)
        x = torch.zeros(1, 4, config["sample_size"], config["sample_size"])
        text, t = torch.zeros(1, 77, config["cross_attention_dim"]), torch.zeros(1)
        added = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)}
    found = operations_of(lambda: network(x, t, text, added_cond_kwargs=added))
    inner = inner_size(network, "unet")
    return Size(found, parameters_of(network), config["sample_size"] * 8, inner, found / speed())


def operations_of(once: Callable[[], object]) -> float:
    """Floating-point operations of a call, a multiplication and an addition counted as two."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        once()
    return float(counter.get_total_flops())


def parameters_of(network: nn.Module) -> int:
    return sum(weight.numel() for weight in network.parameters())


def inner_size(network: nn.Module, name: str) -> int:
    """In- and outputs of the layers that a LoRA is added to, summed: times the rank, its parameters."""
    from fx.finetune import LORA_LAYERS

    chosen = tuple(f".{layer}" for layer in LORA_LAYERS[name])
    return sum(
        layer.in_features + layer.out_features
        for path, layer in network.named_modules()
        if isinstance(layer, nn.Linear) and path.endswith(chosen)
    )


def seconds_of(once: Callable[[], object], repeats: int = 3) -> float:
    """Seconds of a call, the least of some after one that does not count."""
    once()
    found = []
    for _ in range(repeats):
        _wait()
        start = time.perf_counter()
        once()
        _wait()
        found.append(time.perf_counter() - start)
    return min(found)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@functools.cache
def speed() -> float:
    """Floating-point operations a second of this machine, in float32, on layers of the size that these networks have."""
    from fx.models import device

    x, kernel = torch.randn(2, 320, 64, 64).to(device()), torch.randn(320, 320, 3, 3).to(device())
    rows, weight = torch.randn(2 * 4096, 640).to(device()), torch.randn(640, 640).to(device())

    @torch.inference_mode()
    def once() -> None:
        nn.functional.conv2d(x, kernel, padding=1)
        rows @ weight

    return operations_of(once) / seconds_of(once)


def estimate(planned: dict[str, list[Planned]]) -> pd.DataFrame:
    """A line per notebook: steps, how many of them are done, hours and gigabytes of the others; and one of all together.

    planned: notebook -> its steps. A step of several notebooks counts in the first. Where a base model is of unknown size,
    hours and gigabytes are missing.
    """
    seen: set[str] = set()
    lines = []
    for name, found in planned.items():
        own = [step for step in _largest(found) if step.place not in seen]
        seen |= {step.place for step in found}
        waiting = [step for step in own if not step.done]
        seconds, size = np.sum([needed(step) for step in waiting], axis=0) if waiting else (0.0, 0.0)
        lines.append(
            {
                "notebook": name,
                "steps": len(own),
                "done": len(own) - len(waiting),
                "hours": seconds / 3600,
                "GB": size / 1e9,
            }
        )
    table = pd.DataFrame(lines, columns=["notebook", "steps", "done", "hours", "GB"])
    numbers = ["steps", "done", "hours", "GB"]
    together = {"notebook": "together", **{name: table[name].sum(skipna=False) for name in numbers}}
    return pd.concat([table, pd.DataFrame([together])], ignore_index=True)


def _largest(found: list[Planned]) -> list[Planned]:
    """Of steps that differ in the number of images alone the one with most, which holds the others."""
    most: dict[str, Planned] = {}
    for step in found:
        stem = step.place.rpartition("-")[0] if step.images else step.place
        if stem not in most or step.images > most[stem].images:
            most[stem] = step
    return list(most.values())


def needed(step: Planned) -> tuple[float, float]:
    """Seconds and bytes of a step; nan where its base model is of unknown size."""
    if not step.base:
        return 0.0, 0.0
    if (size := size_of(step.base)) is None:
        return float("nan"), float("nan")
    method, _, rank = step.model.partition(":")
    weights = {"dreambooth": size.parameters, "lora": size.inner * int(rank or 0), "": 0}[method]
    seconds = (step.forward + BACKWARD.get(method, 0.0) * step.trained) * size.seconds
    return seconds, 4.0 * weights + PNG * 3 * size.side**2 * step.images


def main() -> None:
    """What `steps` calls in a process of its own: a notebook and its parameters as JSON in, its steps as JSON out."""
    if len(sys.argv) != 3:
        raise ValueError("this is called by fx.reproduce: python -m fx.reproduce --dry-run")
    found = noted(Path(sys.argv[1]).resolve(), json.loads(sys.argv[2]))
    print(json.dumps([asdict(step) for step in found]))


if __name__ == "__main__":
    command.run("fx.plan", main)
