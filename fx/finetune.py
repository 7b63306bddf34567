"""Few-shot fine-tuning as in App. E: DreamBooth without prior loss, and LoRA, both on the U-Net only."""

import functools
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor
from tqdm import tqdm

from fx import results
from fx.datasets import Item, load_images, load_item
from fx.defenses import TRANSFORMS
from fx.families import Condition, check_tokens, denoise, encode, image_size, training_target
from fx.models import LORA_FILE, PRECISIONS, load_pipeline, load_tokenizer, model_folder

METHODS = ("dreambooth", "lora")
LORA_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]  # of self- and cross-attention
SAVE_EVERY = 60.0  # seconds between checkpoints


@dataclass(frozen=True)
class TrainingItem:
    """Images that are learned under one caption.

    item: a shipped item ("style/mimooh") or a folder of images; caption: None for the shipped item's own, a folder needs
    one; first: only so many of its training images, or more than these, where it has further works; None for all training
    images.
    """

    item: str
    caption: str | None = None
    first: int | None = None


def load_training(part: TrainingItem) -> Item:
    """The images of `part` with the caption they are learned under; ValueError if it has fewer than `first` images."""
    item = load_item(part.item, part.caption or "")
    works = (*item.training, *item.more)
    if part.first is not None and not 1 <= part.first <= len(works):
        further = f" and {len(item.more)} further works" if item.more else ""
        raise ValueError(
            f"{item.name} has {item.n_training} training images{further}: first is 1 to {len(works)}, not {part.first}"
        )
    return replace(item, training=item.training if part.first is None else works[: part.first])


@dataclass(frozen=True)
class FineTune:
    """What to fine-tune, on which images, and how.

    training: one item, or several for a mixture, in which each image keeps the caption of its item.
    steps_per_image: the optimiser sees steps_per_image * N0 images in all, in batches of `batch_size` (App. E: 200, 1).
    rank, alpha: of the LoRA; 0 for DreamBooth. transform: "none", or a defense of fx.defenses. precision: of the forward
    and the backward pass ("float32", "bfloat16", "float16"); weights and optimiser are in float32 always.
    """

    VERSION: ClassVar[int] = 1

    training: tuple[TrainingItem, ...]
    base: str = "mini-sd"
    method: str = "dreambooth"
    learning_rate: float = 1.0e-5
    steps_per_image: int = 200
    batch_size: int = 4
    rank: int = 0
    alpha: int = 0
    transform: str = "none"
    precision: str = "float32"
    seed: int = 0

    def __post_init__(self):
        if not isinstance(self.training, tuple) or not all(isinstance(part, TrainingItem) for part in self.training):
            raise ValueError(f"training {self.training!r} must be a tuple of TrainingItem, one or several")
        if not self.training:
            raise ValueError("training is empty: name at least one TrainingItem")
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}: choose from {', '.join(METHODS)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"unknown precision {self.precision!r}: choose from {', '.join(PRECISIONS)}")
        if not (min(self.rank, self.alpha) > 0 if self.method == "lora" else self.rank == self.alpha == 0):
            raise ValueError(f"rank {self.rank} and alpha {self.alpha}: LoRA needs both above 0, DreamBooth both 0")
        if self.transform != "none" and self.transform not in TRANSFORMS:
            raise ValueError(f"unknown transform {self.transform!r}: choose from none, {', '.join(TRANSFORMS)}")
        if self.steps_per_image < 1 or self.batch_size < 1 or not 0 < self.learning_rate < 1:
            raise ValueError(
                f"steps_per_image {self.steps_per_image} and batch_size {self.batch_size} must be at least 1, "
                f"learning_rate {self.learning_rate} between 0 and 1"
            )
        if self.seed < 0:
            raise ValueError(f"seed {self.seed} must be at least 0")


def check_trainable(base: str) -> None:
    """ValueError, before anything is loaded, for a base model that `train` would refuse: one that predicts a flow."""
    named = json.loads((model_folder(base) / "model_index.json").read_text()).get("_class_name")
    if named == "StableDiffusion3Pipeline":
        raise ValueError(
            f"{base} is a {named}, a flow model: fx fine-tunes models that predict noise, images or v; "
            "a checkpoint that was fine-tuned elsewhere can be extracted (fx.tuned.Checkpoint)"
        )


@results.inputs.register
def _(spec: FineTune) -> dict[str, str]:
    check_trainable(spec.base)
    tokenizer = load_tokenizer(spec.base)
    found = {"base": results.sha256_of(model_folder(spec.base))}
    for number, part in enumerate(spec.training):
        item = load_training(part)
        check_tokens(tokenizer, item.caption, tokenizer.model_max_length)
        found[f"caption {number}"] = item.caption
        found |= {f"image {number}.{i}": results.sha256_of(path) for i, path in enumerate(item.training)}
    return found


@results.perform.register
def _(spec: FineTune, folder: Path) -> None:
    """Write the fine-tuned U-Net (DreamBooth) or the LoRA, both in diffusers' layout, and losses.npy."""
    items = [load_training(part) for part in spec.training]
    pipeline = load_pipeline(spec.base)
    images = torch.cat([load_images(item.training, image_size(pipeline)) for item in items])
    captions = [item.caption for item in items for _ in item.training]
    losses = train(pipeline, images, captions, spec, results.scratch(spec))
    np.save(folder / "losses.npy", losses)
    if spec.method == "lora":
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
        settings = pipeline.unet.peft_config["default"].to_dict()  # without them, loading takes alpha to be the rank
        pipeline.save_lora_weights(
            folder, unet_lora_layers=layers, unet_lora_adapter_metadata=settings, weight_name=LORA_FILE
        )
    else:
        pipeline.unet.save_pretrained(folder / "unet")


def train(
    pipeline: StableDiffusionPipeline, images: Tensor, captions: Sequence[str], spec: FineTune, scratch: Path
) -> np.ndarray:
    """Fine-tune `pipeline.unet` in place on images [n0, 3, h, w] under their captions [n0]; losses, float32 [steps].

    The network learns what it predicts: eps, x0 or v; ValueError for a flow model. Latents, noise and loss have the
    autoencoder's precision, the draws are the same in any. Killed and called again with the same `scratch`, it goes on
    from its last checkpoint with the same result: the draws of each step come from their own seed.
    """
    noising, target = training_target(pipeline)
    unet = pipeline.unet
    trained = trained_parameters(pipeline, spec)
    optimizer = torch.optim.AdamW(trained, lr=spec.learning_rate, weight_decay=0.01, fused=True)
    scaler = torch.amp.GradScaler(unet.device.type, enabled=spec.precision == "float16")
    latents, conditions = latent_source(pipeline, images, spec.transform), condition_source(pipeline, captions)
    losses = np.zeros(-(-spec.steps_per_image * len(images) // spec.batch_size), np.float32)
    start = _resume(scratch, trained, optimizer, scaler, losses)
    unet.train()
    saved = time.monotonic()
    title = ", ".join(part.item for part in spec.training)[-40:]
    for step in tqdm(range(start, len(losses)), title, len(losses), initial=start, mininterval=2, leave=False):
        torch.manual_seed(spec.seed * 1_000_003 + step)
        chosen = torch.randint(len(images), (spec.batch_size,))
        x0 = latents(chosen)
        t = torch.randint(noising.config.num_train_timesteps, (len(x0),)).to(x0.device)
        eps = torch.randn(x0.shape).to(x0)
        with torch.autocast(unet.device.type, PRECISIONS[spec.precision], enabled=spec.precision != "float32"):
            predicted = denoise(unet, noising.add_noise(x0, eps, t), t, conditions(chosen))
        losses[step] = _update(F.mse_loss(predicted, target(x0, eps, t)), trained, optimizer, scaler)
        if time.monotonic() - saved > SAVE_EVERY:
            _save(scratch, trained, optimizer, scaler, losses, step + 1)
            saved = time.monotonic()
    unet.requires_grad_(False).eval()
    return losses


def _update(loss: Tensor, trained: list[Tensor], optimizer, scaler: torch.amp.GradScaler) -> float:
    """One step of the optimiser, gradients clipped to norm 1; the loss as a number.

    The scaler does nothing but in float16: there it scales the loss, or small gradients would vanish, and leaves out a step
    whose gradients overflow.
    """
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def condition_source(pipeline: StableDiffusionPipeline, captions: Sequence[str]):
    """A function from image numbers [b] to the encoded captions of these images; each caption is encoded once."""
    different = list(dict.fromkeys(captions))
    encoded = [encode(pipeline, caption) for caption in different]
    if len(encoded) == 1:
        return lambda chosen: encoded[0]
    all_of_them = functools.reduce(Condition.followed_by, encoded)
    row_of = torch.tensor([different.index(caption) for caption in captions])
    return lambda chosen: all_of_them.rows(row_of[chosen])


def trained_parameters(pipeline: StableDiffusionPipeline, spec: FineTune) -> list[Tensor]:
    """Switch on what the method trains: every U-Net weight, or a fresh adapter on all attention projections."""
    if spec.method == "lora":
        torch.manual_seed(spec.seed)
        pipeline.unet.add_adapter(
            LoraConfig(r=spec.rank, lora_alpha=spec.alpha, init_lora_weights="gaussian", target_modules=LORA_LAYERS)
        )
    else:
        pipeline.unet.requires_grad_(True)
    return [parameter for parameter in pipeline.unet.parameters() if parameter.requires_grad]


def latent_source(pipeline: StableDiffusionPipeline, images: Tensor, transform: str):
    """A function from image numbers [b] to freshly drawn scaled latents [b, c, h, w].

    Without a transform the encoder runs once; with one, every drawn image is transformed and encoded anew.
    """
    vae, scale = pipeline.vae, pipeline.vae.config.scaling_factor
    if transform == "none":
        with torch.no_grad():
            known = vae.encode(images.to(vae.device, vae.dtype)).latent_dist
        mean, std = known.mean, known.std
        return lambda chosen: (mean[chosen] + std[chosen] * torch.randn(mean[chosen].shape).to(mean.device)) * scale

    @torch.no_grad()
    def transformed(chosen: Tensor) -> Tensor:
        posterior = vae.encode(TRANSFORMS[transform](images[chosen]).to(vae.device, vae.dtype)).latent_dist
        return (posterior.mean + posterior.std * torch.randn(posterior.mean.shape).to(vae.device)) * scale

    return transformed


def _save(scratch: Path, trained: list[Tensor], optimizer, scaler, losses: np.ndarray, step: int) -> None:
    state = {"step": step, "trained": trained, "losses": torch.from_numpy(losses)}
    state |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    torch.save(state, part := scratch / "state.pt.part")
    os.replace(part, scratch / "state.pt")


@torch.no_grad()
def _resume(scratch: Path, trained: list[Tensor], optimizer, scaler, losses: np.ndarray) -> int:
    if not (scratch / "state.pt").exists():
        return 0
    state = torch.load(scratch / "state.pt", weights_only=True)
    for parameter, stored in zip(trained, state["trained"], strict=True):
        parameter.copy_(stored)
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    losses[:] = state["losses"].numpy()
    return state["step"]
