"""Few-shot fine-tuning as in App. E: DreamBooth without prior loss, and LoRA, both on the U-Net only."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor
from tqdm import tqdm

from fx import results
from fx.datasets import load_images, load_item
from fx.defenses import TRANSFORMS
from fx.families import Condition, check_tokens, denoise, encode, image_size, prediction_type
from fx.models import LORA_FILE, load_pipeline, load_tokenizer, model_folder

METHODS = ("dreambooth", "lora")
LORA_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]  # of self- and cross-attention
SAVE_EVERY = 60.0  # seconds between checkpoints


@dataclass(frozen=True)
class FineTune:
    """What to fine-tune, on which images, and how.

    item: a shipped item ("style/mimooh") or a folder of images; caption: "" for the shipped item's own.
    steps_per_image: the optimiser sees steps_per_image * N0 images in all, in batches of `batch_size` (App. E: 200, 1).
    rank, alpha: of the LoRA; 0 for DreamBooth. transform: "none", or a defense of fx.defenses.
    """

    item: str
    caption: str = ""
    base: str = "mini-sd"
    method: str = "dreambooth"
    learning_rate: float = 1.0e-5
    steps_per_image: int = 200
    batch_size: int = 4
    rank: int = 0
    alpha: int = 0
    transform: str = "none"
    seed: int = 0

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}: choose from {', '.join(METHODS)}")
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


@results.inputs.register
def _(spec: FineTune) -> dict[str, str]:
    item = load_item(spec.item, spec.caption)
    tokenizer = load_tokenizer(spec.base)
    check_tokens(tokenizer, item.caption, tokenizer.model_max_length)
    images = {f"image {number}": results.sha256_of(path) for number, path in enumerate(item.training)}
    return {"base": results.sha256_of(model_folder(spec.base)), "caption": item.caption, **images}


@results.perform.register
def _(spec: FineTune, folder: Path) -> None:
    """Write the fine-tuned U-Net (DreamBooth) or the LoRA, both in diffusers' layout, and losses.npy."""
    item = load_item(spec.item, spec.caption)
    pipeline = load_pipeline(spec.base)
    condition = encode(pipeline, item.caption)
    images = load_images(item.training, image_size(pipeline))
    losses = train(pipeline, images, condition, spec, results.scratch(spec))
    np.save(folder / "losses.npy", losses)
    (folder / "item.json").write_text(json.dumps({"caption": item.caption, "n_training": item.n_training}))
    if spec.method == "lora":
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
        settings = pipeline.unet.peft_config["default"].to_dict()  # without them, loading takes alpha to be the rank
        pipeline.save_lora_weights(
            folder, unet_lora_layers=layers, unet_lora_adapter_metadata=settings, weight_name=LORA_FILE
        )
    else:
        pipeline.unet.save_pretrained(folder / "unet")


def train(
    pipeline: StableDiffusionPipeline, images: Tensor, condition: Condition, spec: FineTune, scratch: Path
) -> np.ndarray:
    """Fine-tune `pipeline.unet` in place on images [n0, 3, h, w]; the loss of every step, float32 [steps].

    The network learns what it predicts: eps, x0 or v; ValueError for a flow model. Latents, noise and loss have the
    autoencoder's precision, the draws are the same in any. Killed and called again with the same
    `scratch`, it goes on from its last checkpoint with the same result: the draws of each step come from their own seed.
    """
    noising = DDPMScheduler.from_config(pipeline.scheduler.config)
    targets = {"epsilon": lambda x0, eps, t: eps, "sample": lambda x0, eps, t: x0, "v_prediction": noising.get_velocity}
    if (kind := prediction_type(pipeline)) not in targets:
        raise ValueError(f"fx fine-tunes models that predict {', '.join(targets)}, not {kind}")
    unet = pipeline.unet
    trained = trained_parameters(pipeline, spec)
    optimizer = torch.optim.AdamW(trained, lr=spec.learning_rate, weight_decay=0.01, fused=True)
    latents = latent_source(pipeline, images, spec.transform)
    losses = np.zeros(-(-spec.steps_per_image * len(images) // spec.batch_size), np.float32)
    start = _resume(scratch, trained, optimizer, losses)
    unet.train()
    saved = time.monotonic()
    for step in tqdm(range(start, len(losses)), spec.item, len(losses), initial=start, mininterval=2, leave=False):
        torch.manual_seed(spec.seed * 1_000_003 + step)
        x0 = latents(torch.randint(len(images), (spec.batch_size,)))
        t = torch.randint(noising.config.num_train_timesteps, (len(x0),)).to(x0.device)
        eps = torch.randn(x0.shape).to(x0)
        predicted = denoise(unet, noising.add_noise(x0, eps, t), t, condition)
        loss = F.mse_loss(predicted, targets[kind](x0, eps, t))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses[step] = loss.item()
        if time.monotonic() - saved > SAVE_EVERY:
            _save(scratch, trained, optimizer, losses, step + 1)
            saved = time.monotonic()
    unet.requires_grad_(False).eval()
    return losses


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


def _save(scratch: Path, trained: list[Tensor], optimizer, losses: np.ndarray, step: int) -> None:
    state = {"step": step, "trained": trained, "optimizer": optimizer.state_dict(), "losses": torch.from_numpy(losses)}
    torch.save(state, part := scratch / "state.pt.part")
    os.replace(part, scratch / "state.pt")


@torch.no_grad()
def _resume(scratch: Path, trained: list[Tensor], optimizer, losses: np.ndarray) -> int:
    if not (scratch / "state.pt").exists():
        return 0
    state = torch.load(scratch / "state.pt", weights_only=True)
    for parameter, stored in zip(trained, state["trained"], strict=True):
        parameter.copy_(stored)
    optimizer.load_state_dict(state["optimizer"])
    losses[:] = state["losses"].numpy()
    return state["step"]
