"""The fine-tuned model theta', whoever made it: a fine-tuning of ours, or a checkpoint of somebody else's (Sec. 3.1)."""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch

from fx import checkpoints, results
from fx.finetune import FineTune, TrainingItem, load_training
from fx.models import ModelPair, load_pair, model_folder


@dataclass(frozen=True)
class Checkpoint:
    """Somebody else's fine-tuned model, as far as an outsider knows it.

    path: a file, a folder, or a Hub id with an optional "@revision", of any kind that `fx.models.load_pair` reads; base: the
    model it was made of; caption: the one it was fine-tuned with, None if that is not known.
    """

    path: str
    base: str = "mini-sd"
    caption: str | None = None


@results.inputs.register
def _(spec: Checkpoint) -> dict[str, str]:
    found = checkpoints.find(spec.path)
    return {"base": results.sha256_of(model_folder(spec.base)), "checkpoint": results.sha256_of(found)}


@functools.singledispatch
def weights(model) -> str | Path:
    """What `fx.models.load_pair` is to load as theta'; of a FineTune its finished folder, made now if it is missing."""
    raise TypeError(f"{model!r} is neither a FineTune nor a Checkpoint")


@weights.register
def _(model: FineTune) -> Path:
    return results.complete(model)


@weights.register
def _(model: Checkpoint) -> str:
    return model.path


def load_tuned(model: FineTune | Checkpoint, dtype: torch.dtype = torch.float32) -> ModelPair:
    """The model pair of a spec: its base model theta, and theta'. Errors as in `fx.models.load_pair`."""
    return load_pair(model.base, weights(model), dtype)


def own_caption(model: FineTune | Checkpoint) -> str | None:
    """The caption that a model was fine-tuned with, None if it is not known or if there were several."""
    if isinstance(model, Checkpoint):
        return model.caption
    captions = {load_training(part).caption for part in model.training}
    return captions.pop() if len(captions) == 1 else None


def own_training(model: FineTune | Checkpoint) -> tuple[TrainingItem, ...]:
    """What a model is known to have been trained on: the items of a FineTune, nothing of a Checkpoint."""
    return model.training if isinstance(model, FineTune) else ()
