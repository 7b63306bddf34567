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
import torch.nn.functional as F
from torch import Tensor, nn

from fx import captions, checkpoints, results
from fx.families import FLOWS, denoise, latent_shape, network, noising
from fx.inspect import inspect, rank_bases
from fx.metrics import paired_interval
from fx.models import ModelPair, acting_weight, load_pair, model_folder, own_layer, without_adapters
from fx.sampling import arm_scheduler, predictor, starting_latents, walk
from fx.tuned import Checkpoint

LEADS = "leads.json"
SAID = ("the model card", "modelspec.trigger_phrase", "a folder of training images")  # where whole captions stand


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
    base, base_by = base_of(path, bases, found.base_names, said, candidates, guess)
    caption, caption_by = caption_of(path, base, said, candidates, guess)
    n = found.metadata.images
    return Leads(path, base, base_by, caption, caption_by, n, "estimated" if n is None else "its header")


@dataclass(frozen=True)
class Lookup:
    """`gather` as a step of its own; the fields are its arguments."""

    VERSION: ClassVar[int] = 3

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


def base_of(
    path: str,
    bases: Sequence[str],
    named: Sequence[str] = (),
    said: Sequence[tuple[str, str]] = (),
    candidates: Sequence[str] = (),
    guess: str = "",
) -> tuple[str, str]:
    """The base model that a checkpoint was made of, and by what that is known.

    Weights tell it of a whole network (`fx.inspect.rank_bases`). Of an adapter they do not: the name in its header or model
    card, if that is among `bases` and fits, the only one that fits, or else the alignment of its change with each base's
    gradient (`rank_by_alignment`), for which it draws images with the caption that `caption_of` finds. ValueError if none
    fits.
    """
    table = rank_bases(path, bases)
    fitting = table[~table.verdict.str.startswith(("does not fit", "unrelated"))]
    if fitting.empty:
        reasons = "; ".join(f"{row.base}: {row.verdict}" for row in table.itertuples())
        raise ValueError(f"{path}: none of the base models fits ({reasons}): name others")
    if fitting.verdict.iloc[0] == "nearest":
        return fitting.base.iloc[0], "its weights"
    last = {_last(name) for name in named}
    if told := [base for base in fitting.base if _last(base) in last]:
        return told[0], "what it says"
    if len(fitting) == 1:
        return fitting.base.iloc[0], "its shapes"
    caption, _ = caption_of(path, fitting.base.iloc[0], said, candidates, guess)  # any base: the change holds it
    ranked = rank_by_alignment(path, list(fitting.base), caption)
    doubt = ranked.base[ranked.verdict == "not told apart"].tolist()
    return ranked.base[0], "its alignment" + (f", not told apart from {', '.join(doubt)}" if doubt else "")


def _last(base: str) -> str:
    """The name of a base model without its owner and revision."""
    return base.partition("@")[0].rpartition("/")[2].lower()


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


def rank_by_alignment(
    path: str, bases: Sequence[str], caption: str = "", n: int = 16, steps: int = 10, passes: int = 4
) -> pd.DataFrame:
    """Base models of an adapter by how well its change agrees with what fine-tuning each would begin with; best first.

    On the true base the adapter's change of the weights was made by walking down the gradient of the loss on its training
    images. n images that each base draws with the adapter and the caption stand for these; g is the gradient, at the base
    without the adapter, of the denoising loss (Eq. 2) on all of them, noised `passes` times, with respect to the weights
    that the adapter changes, each entry over its root mean square over batches, as AdamW has it. Columns: base;
    alignment, the mean over layers of the cosine of -g and the change; low and high, of the 95% interval over layers of
    its difference to the first; verdict, "highest", "lower", or "not told apart" where that interval holds 0.
    """
    drawn = torch.cat([_draw(load_pair(base, path), caption, n, steps) for base in bases])
    found = {base: alignments(load_pair(base, path), drawn, caption, passes) for base in bases}
    order = sorted(found, key=lambda base: -found[base].mean())
    rows = []
    for base in order:
        low, high = (np.nan, np.nan) if base == order[0] else paired_interval(found[base], found[order[0]])
        verdict = "highest" if base == order[0] else "lower" if high < 0 else "not told apart"
        rows.append({"base": base, "alignment": found[base].mean(), "low": low, "high": high, "verdict": verdict})
    return pd.DataFrame(rows)


def alignments(pair: ModelPair, x0: Tensor, caption: str, passes: int = 4, batch: int = 8) -> np.ndarray:
    """Of every linear layer that theta' changes the cosine in [-1, 1] of its change and theta's descent, float64 [layers].

    x0: latents [n, c, h, w] to learn, as `rank_by_alignment` says. Layers are in the order of the network. ValueError if no
    linear layer is changed.
    """
    model, schedule, condition = network(pair.base), noising(pair.base), pair.condition("base", caption)
    changes = changes_of(pair)
    weights = [own_layer(model.get_submodule(name)).weight for name in changes]
    total, squares = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    draw, batches = torch.Generator().manual_seed(0), 0
    with without_adapters([model] if pair.one_network else []):
        for weight in weights:
            weight.requires_grad_(True)
        for rows in [rows for _ in range(passes) for rows in torch.randperm(len(x0), generator=draw).split(batch)]:
            some = x0[rows.to(x0.device)]
            t = torch.randint(schedule.levels, (len(rows),), generator=draw).to(x0.device)
            eps = torch.randn(some.shape, generator=draw).to(some)
            with torch.enable_grad():
                x = schedule.add(some, eps, t)
                predicted = denoise(model, x, schedule.timestep(t), condition.expand(len(rows)))
                loss = F.mse_loss(predicted, schedule.target(some, eps, t))
                gradients = torch.autograd.grad(loss, weights, materialize_grads=True)
            for known, square, gradient in zip(total, squares, gradients, strict=True):
                known += gradient
                square += gradient**2
            batches += 1
        for weight in weights:
            weight.requires_grad_(False)
    steps = [-(a / batches) / ((b / batches).sqrt() + 1e-10) for a, b in zip(total, squares, strict=True)]
    found = [F.cosine_similarity(a.flatten(), b.flatten(), 0) for a, b in zip(steps, changes.values(), strict=True)]
    return torch.stack(found).double().cpu().numpy()


@torch.no_grad()
def changes_of(pair: ModelPair) -> dict[str, Tensor]:
    """What theta' adds to the weights [out, in] of the network's linear layers, by name, however the change is stored.

    Only layers that are changed; ValueError if none is.
    """
    tuned, base = network(pair.tuned), network(pair.base)
    after = {name: acting_weight(layer) for name, layer in _linear_layers(tuned).items()}
    with without_adapters([base] if pair.one_network else []):
        before = {name: acting_weight(layer) for name, layer in _linear_layers(base).items()}
    found = {name: after[name] - weight for name, weight in before.items() if not torch.equal(after[name], weight)}
    if not found:
        raise ValueError("the checkpoint changes no linear layer of the network")
    return found


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a network by name; one with an adapter counts as one layer."""
    found, above = {}, "\n"
    for name, layer in model.named_modules():
        if not name.startswith(above) and isinstance(own_layer(layer), nn.Linear):
            found[name], above = layer, f"{name}."
    return found


@torch.no_grad()
def _draw(pair: ModelPair, caption: str, n: int, steps: int) -> Tensor:
    """Latents of n images by direct sampling, [n, c, h, w]."""
    scheduler = arm_scheduler(pair.tuned, "euler" if isinstance(pair.tuned, FLOWS) else "dpm++", "direct")
    x = starting_latents(latent_shape(pair.tuned), 0, range(n)).to(pair.tuned.device)
    return walk(predictor(pair, caption, "direct"), x, scheduler, steps)
