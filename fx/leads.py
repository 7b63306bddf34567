"""What somebody who only has a checkpoint works out before the attack: base model, caption, number of training images.

    known = gather("downloads/artist.safetensors", bases=["mini-sd"], candidates=["art style of A", "art style of B"])
    model = known.checkpoint()

Each answer says where it comes from: the header or the model card, the weights, or a guess. A `Lookup` is the same as a step
that is done once: known = gathered(Lookup("downloads/artist.safetensors", ("mini-sd",), ("art style of A",))).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fx import captions, checkpoints, results
from fx.families import FLOWS, latent_shape, noising
from fx.inspect import inspect, rank_bases
from fx.metrics import paired_interval
from fx.models import ModelPair, load_pair, model_folder
from fx.sampling import arm_scheduler, predictor, starting_latents, walk
from fx.tuned import Checkpoint

LEADS = "leads.json"
SAID = ("the model card", "modelspec.trigger_phrase", "a folder of training images")  # where whole captions stand
LEVELS = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85)  # of the training schedule, at which losses are compared


@dataclass(frozen=True)
class Leads:
    """What is known of a checkpoint, and by what. n_training: None where nothing tells it, it is then estimated."""

    path: str
    base: str
    base_by: str
    caption: str
    caption_by: str
    n_training: int | None
    n_training_by: str

    @property
    def method(self) -> str:
        """How it was fine-tuned, by what it is: "lora" of an adapter of any kind, else "dreambooth"."""
        return "lora" if checkpoints.kind_of(checkpoints.find(self.path)) in ("lora", "peft") else "dreambooth"

    def checkpoint(self) -> Checkpoint:
        """The spec of the fine-tuned model, as far as it is known."""
        return Checkpoint(self.path, self.base, self.caption)


def gather(path: str, bases: Sequence[str], candidates: Sequence[str] = (), guess: str = "") -> Leads:
    """Base, caption and number of images of a checkpoint.

    bases: the base models to choose from; candidates: captions to be ranked by the weights where neither header nor model
    card has one; guess: the caption if the weights carry none. Raises ValueError, with the reasons, if no base fits.
    """
    found = inspect(path)
    said = [lead for lead in found.leads if lead[1] in SAID]
    base, base_by = base_of(path, bases, found.base_names, said[0][0] if said else guess)
    caption, caption_by = caption_of(path, base, said, candidates, guess)
    n = found.metadata.images
    return Leads(path, base, base_by, caption, caption_by, n, "estimated" if n is None else "its header")


@dataclass(frozen=True)
class Lookup:
    """`gather` as a step of its own; the fields are its arguments."""

    VERSION: ClassVar[int] = 1

    path: str
    bases: tuple[str, ...]
    candidates: tuple[str, ...] = ()
    guess: str = ""

    def __post_init__(self):
        if not self.bases:
            raise ValueError("bases is empty: name the base models to choose from")


@results.inputs.register
def _(spec: Lookup) -> dict[str, str]:
    found = {f"base {number}": results.sha256_of(model_folder(base)) for number, base in enumerate(spec.bases)}
    return found | {"checkpoint": results.sha256_of(checkpoints.find(spec.path))}


@results.perform.register
def _(spec: Lookup, folder: Path) -> None:
    """Write leads.json, the fields of a Leads."""
    known = gather(spec.path, spec.bases, spec.candidates, spec.guess)
    (folder / LEADS).write_text(json.dumps(asdict(known), ensure_ascii=False), encoding="utf-8")


def gathered(spec: Lookup) -> Leads:
    """What the finished step found, which is done now if it is missing."""
    return Leads(**json.loads((results.complete(spec) / LEADS).read_text("utf-8")))


def base_of(path: str, bases: Sequence[str], named: Sequence[str] = (), caption: str = "") -> tuple[str, str]:
    """The base model that a checkpoint was made of, and by what that is known.

    Weights tell it of a whole network (`fx.inspect.rank_bases`). Of an adapter they do not: the name in its header or model
    card, if that is among `bases` and fits, the only one that fits, or else the loss (`rank_by_loss`). ValueError if none
    fits.
    """
    table = rank_bases(path, bases)
    fitting = table[~table.verdict.str.startswith(("does not fit", "unrelated"))]
    if fitting.empty:
        reasons = "; ".join(f"{row.base}: {row.verdict}" for row in table.itertuples())
        raise ValueError(f"{path}: none of the base models fits ({reasons}): name others")
    if fitting.verdict.iloc[0] == "nearest":
        return fitting.base.iloc[0], "its weights"
    last = {name.rpartition("/")[2].lower() for name in named}
    if said := [base for base in fitting.base if base.rpartition("/")[2].lower() in last]:
        return said[0], "what it says"
    if len(fitting) == 1:
        return fitting.base.iloc[0], "its shapes"
    by_loss = rank_by_loss(path, list(fitting.base), caption)
    doubt = by_loss.base[by_loss.verdict == "not told apart"].tolist()
    return by_loss.base[0], "the loss on its own images" + (
        f", not told apart from {', '.join(doubt)}" if doubt else ""
    )


def caption_of(
    path: str, base: str, said: Sequence[tuple[str, str]], candidates: Sequence[str] = (), guess: str = ""
) -> tuple[str, str]:
    """The caption of a checkpoint and by what it is known: what it says, else its weights' best candidate, else a guess."""
    if said:
        return said[0]
    if not candidates:
        return guess, "a guess"
    pair = load_pair(base, path)
    try:
        change = captions.change_of(pair)
    except ValueError as error:
        return guess, f"a guess: {error}"
    return captions.rank(change, pair.tuned, candidates).caption[0], "its weights"


@torch.no_grad()
def rank_by_loss(path: str, bases: Sequence[str], caption: str = "", n: int = 16, steps: int = 10) -> pd.DataFrame:
    """Base models of an adapter by how well each, with the adapter on it, denoises what all of them draw; the best first.

    Each draws n images with the adapter and the caption, from the same latents; all of them are noised to the same LEVELS
    with the same noise. Columns: base; loss, the mean over images and levels of the logarithm of the squared error; low and
    high, of the 95% interval over images of its difference to the first; verdict, "lowest", "higher", or "not told apart"
    where that interval holds 0. A base that draws better anyhow has an advantage, so near relatives may be confused
    even where they are told apart.
    """
    pairs = {base: load_pair(base, path) for base in bases}
    drawn = torch.cat([_draw(pair, caption, n, steps) for pair in pairs.values()])
    losses = {base: log_losses(pair, "tuned", drawn, caption).mean(dim=0).numpy() for base, pair in pairs.items()}
    order = sorted(losses, key=lambda base: losses[base].mean())
    rows = []
    for base in order:
        low, high = (np.nan, np.nan) if base == order[0] else paired_interval(losses[base], losses[order[0]])
        verdict = "lowest" if base == order[0] else "higher" if low > 0 else "not told apart"
        rows.append({"base": base, "loss": losses[base].mean(), "low": low, "high": high, "verdict": verdict})
    return pd.DataFrame(rows)


def _draw(pair: ModelPair, caption: str, n: int, steps: int) -> Tensor:
    """Latents of n images by direct sampling, [n, c, h, w]."""
    scheduler = arm_scheduler(pair.tuned, "euler" if isinstance(pair.tuned, FLOWS) else "dpm++", "direct")
    x = starting_latents(latent_shape(pair.tuned), 0, range(n)).to(pair.tuned.device)
    return walk(predictor(pair, caption, "direct"), x, scheduler, steps)


@torch.no_grad()
def log_losses(pair: ModelPair, model: str, x0: Tensor, caption: str, levels: Sequence[float] = LEVELS) -> Tensor:
    """The logarithm of a model's squared error on latents x0 [n, c, h, w]: float64 [levels, n] on the CPU.

    model: "base" or "tuned"; levels: shares of the training schedule, 0 to 1. The noise of image i at a level is the same in
    every call.
    """
    schedule, condition, found = noising(pair.tuned), pair.condition(model, caption), []
    draw = torch.Generator().manual_seed(0)
    for level in levels:
        t = torch.full((len(x0),), round(level * (schedule.levels - 1)))
        eps = torch.randn(x0.shape, generator=draw).to(x0)
        x = schedule.add(x0, eps, t.to(x0.device))
        told = schedule.timestep(t)[0].to(x0.device)
        error = pair.predict(model, x, told, condition) - schedule.target(x0, eps, t.to(x0.device))
        found.append(error.double().square().mean(dim=(1, 2, 3)).log().cpu())
    return torch.stack(found)
