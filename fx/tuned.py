"""The fine-tuned model theta', whoever made it: a fine-tuning of ours, or a checkpoint of somebody else's (Sec. 3.1)."""

import functools
import math
from dataclasses import dataclass

import torch
from torch import nn

from fx import checkpoints, models, results
from fx.families import network, text_encoders
from fx.finetune import FineTune, TrainingItem, load_training
from fx.models import KEPT, ModelPair, load_pair, model_folder


@dataclass(frozen=True)
class Checkpoint:
    """Somebody else's fine-tuned model, as far as an outsider knows it.

    path: a file, a folder, or a Hub id with an optional "@revision", of any kind that `fx.models.load_pair` reads; base: the
    model it was made of; caption: the one it was fine-tuned with, None if that is not known.
    """

    path: str
    base: str = "mini-sd"
    caption: str | None = None


@dataclass(frozen=True)
class Extrapolated:
    """theta + scale (theta' - theta) in the place of theta': guidance in the weights, where one network does for two.

    To first order in theta' - theta its prediction with the caption is that of `conditional_only` with w' = scale (App. H
    with Eq. 6). It moves whatever fine-tuning changed, text encoders too; of adapters the scaling.
    """

    model: FineTune | Checkpoint
    scale: float

    def __post_init__(self):
        if not math.isfinite(self.scale):
            raise ValueError(f"the scale of an extrapolation must be finite, not {self.scale}")

    @property
    def base(self) -> str:
        """The base model, theta."""
        return self.model.base


Tuned = FineTune | Checkpoint | Extrapolated


@results.inputs.register
def _(spec: Checkpoint) -> dict[str, str]:
    found = checkpoints.find(spec.path)
    return {"base": results.sha256_of(model_folder(spec.base)), "checkpoint": results.sha256_of(found)}


@functools.singledispatch
def load_tuned(model: Tuned, dtype: torch.dtype = torch.float32) -> ModelPair:
    """The model pair of a spec: its base model theta, and theta'; of a FineTune made now if it is missing.

    Errors as in `fx.models.load_pair`, and ValueError for an extrapolation that has no meaning.
    """
    raise TypeError(f"{model!r} is no FineTune, Checkpoint or Extrapolated")


@load_tuned.register
def _(model: FineTune, dtype: torch.dtype = torch.float32) -> ModelPair:
    return load_pair(model.base, results.complete(model), dtype)


@load_tuned.register
def _(model: Checkpoint, dtype: torch.dtype = torch.float32) -> ModelPair:
    return load_pair(model.base, model.path, dtype)


@load_tuned.register
def _(model: Extrapolated, dtype: torch.dtype = torch.float32) -> ModelPair:
    pair = load_tuned(model.model, dtype)
    extrapolate(pair, model.scale)
    return pair


def kept_pair(model: Tuned, dtype: torch.dtype = torch.float32) -> ModelPair:
    """`load_tuned` for sampling: the pair stays in memory, and a Generate that asks for the same one next need not load it.

    The steps of one fine-tuned model follow one another: its arms, its guidance scales, its parts on a worker. Whatever
    loads another model, to train or to sample, lets the pair go first (`fx.models.let_go`), so there are never two, and so
    does the end of `results.run` where the steps are done here. For sampling only, which arranges the networks anew in
    memory (channels_last): what another step computes with one must not hang on what came before it.
    """
    asked = results.digest(model), dtype, models.device()
    if asked not in KEPT:
        KEPT[asked] = load_tuned(model, dtype)
    return KEPT[asked]


results.AT_END.append(models.let_go)


def extrapolate(pair: ModelPair, scale: float) -> None:
    """Move theta' of a pair to theta + scale (theta' - theta), in place.

    ValueError for DoRA, whose change does not grow with its scaling, and for text encoders of other shapes.
    """
    parts = zip(_learned(pair.base), _learned(pair.tuned), strict=True)
    for before, after in parts:
        if before is after:
            _scale_adapters(after, scale)
        else:
            _move(before, after, scale)


def _learned(pipeline) -> list[nn.Module]:
    return [network(pipeline), *text_encoders(pipeline)]


def _scale_adapters(module: nn.Module, scale: float) -> None:
    """Multiply what the adapters on this network add; of a network without any there is nothing to do."""
    for layer in module.modules():
        if getattr(layer, "lora_variant", None):
            raise ValueError("a DoRA cannot be extrapolated: its change does not grow with its scaling")
        if isinstance(found := getattr(layer, "scaling", None), dict):
            for name in found:
                found[name] *= scale


@torch.no_grad()
def _move(before: nn.Module, after: nn.Module, scale: float) -> None:
    """Move all numbers of one network away from those of another of the same architecture."""
    start, end = before.state_dict(), after.state_dict()
    if start.keys() != end.keys() or any(start[name].shape != end[name].shape for name in start):
        raise ValueError(f"{type(after).__name__} has other weights than the base model's: it cannot be extrapolated")
    for name, weight in end.items():
        if weight.is_floating_point():
            first = start[name].float()
            weight.copy_(first + scale * (weight.float() - first))


def own_caption(model: Tuned) -> str | None:
    """The caption that a model was fine-tuned with, None if it is not known or if there were several."""
    if isinstance(model, Extrapolated):
        return own_caption(model.model)
    if isinstance(model, Checkpoint):
        return model.caption
    captions = {load_training(part).caption for part in model.training}
    return captions.pop() if len(captions) == 1 else None


def own_training(model: Tuned) -> tuple[TrainingItem, ...]:
    """What a model is known to have been trained on: the items of a FineTune, nothing of a Checkpoint."""
    if isinstance(model, Extrapolated):
        return own_training(model.model)
    return model.training if isinstance(model, FineTune) else ()
