"""Few-shot fine-tuning as in App. E: DreamBooth without prior loss, and LoRA, both on the denoising network only.

Beyond the paper, what people publish as well: DoRA and LoHa in LoRA's place, and text encoders that learn too.
"""

import functools
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoHaConfig, LoraConfig, PeftConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from fx import parts, results
from fx.checkpoints import settle
from fx.datasets import Item, load_images, load_item
from fx.defenses import check_transform, transform
from fx.families import (
    TEXT_PARTS,
    UNGUIDED,
    Condition,
    denoise,
    encode,
    image_size,
    latent_shape,
    latent_statistics,
    network,
    network_name,
    noising,
    unpack,
)
from fx.models import LORA_FILE, PRECISIONS, check_fits, load_pipeline, model_folder
from fx.perturbation import Changed, changed_images, item_of

METHODS = ("dreambooth", "lora")
ADAPTERS = ("lora", "dora", "loha")
# of self- and cross-attention; of a transformer also where the text attends
LORA_LAYERS = {"unet": ["to_q", "to_k", "to_v", "to_out.0"]}
LORA_LAYERS["transformer"] = [*LORA_LAYERS["unet"], "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
TEXT_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj"]
SIGMA_FILE = "sigma.safetensors"
SAVE_EVERY = 60.0  # seconds between checkpoints


@dataclass(frozen=True)
class TrainingItem:
    """Images that are learned under one caption.

    item: a shipped item ("style/mimooh") or a folder of images; caption: None for the shipped item's own, a folder needs
    one; first: only so many of its training images, or more than these, where it has further works; None for all training
    images. changed: None, or how these images were changed before anybody trained on them (fx.perturbation); an evaluator
    compares with the images as they were.
    """

    item: str
    caption: str | None = None
    first: int | None = None
    changed: Changed | None = field(default=None, metadata={"absent": None})

    def __post_init__(self):
        if self.changed is not None and (not isinstance(self.changed, Changed) or item_of(self.changed) != self.item):
            raise ValueError(f"changed must be a Perturb or a Purify of {self.item!r}, not {self.changed!r}")


def load_training(part: TrainingItem) -> Item:
    """The images of `part` as they were, with the caption they are learned under.

    ValueError if it has fewer than `first` images, or if `first` is to go beyond the images that were changed.
    """
    item = load_item(part.item, part.caption or "")
    works = (*item.training, *item.more)
    if part.first is not None and not 1 <= part.first <= len(works):
        further = f" and {len(item.more)} further works" if item.more else ""
        raise ValueError(
            f"{item.name} has {item.n_training} training images{further}: first is 1 to {len(works)}, not {part.first}"
        )
    if part.changed and part.first and part.first > item.n_training:
        raise ValueError(
            f"changed are the {item.n_training} training images of {item.name}: first {part.first} goes beyond"
        )
    return replace(item, training=item.training if part.first is None else works[: part.first])


def learned_from(part: TrainingItem) -> tuple[Path, ...]:
    """The images that a model is fine-tuned on: those of `load_training`, or what they were changed to, made if missing."""
    own = load_training(part).training
    return changed_images(part.changed)[: len(own)] if part.changed else own


# Protections: what the owner of a model can do while it is fine-tuned (fewer steps and a lower rank aside)


@dataclass(frozen=True)
class Bayesian:
    """BNN fine-tuning (Wu et al., 2026): weights are drawn from N(mu, sigma^2) at every forward pass, and mu is the model.

    Drawn are the linear layers of the network but those of cross-attention and of what embeds the time (and SDXL's sizes and
    pooled text; of a transformer also what reads the text); of a LoRA its up matrices. mu and sigma of these are trained,
    everything else as without. sigma: the standard deviation at the start and of the prior, whose mean is the base model
    (of a LoRA zero). kl_weight: of the divergence to the prior, summed over weights.
    """

    sigma: float = 0.01
    kl_weight: float = 0.0

    def __post_init__(self):
        if not (0 < self.sigma < 1 and self.kl_weight >= 0):
            raise ValueError(f"sigma {self.sigma} must lie between 0 and 1, kl_weight {self.kl_weight} be at least 0")


@dataclass(frozen=True)
class PriorPreservation:
    """DreamBooth's prior loss (Ruiz et al., 2023, Eq. 2): the model also learns what the base model draws for a class.

    caption: of the class, "a dog"; images: how many are drawn by the base model, with classifier-free guidance of
    `guidance_scale` (diffusers' w, 1 for none) in 25 steps; weight: of this loss (theirs: 1).
    """

    caption: str
    images: int = 50
    weight: float = 1.0
    guidance_scale: float = 3.0

    def __post_init__(self):
        if not (self.images >= 1 and self.weight > 0 and self.guidance_scale >= 1):
            raise ValueError(
                f"images {self.images} and guidance_scale {self.guidance_scale} must be at least 1, "
                f"weight {self.weight} above 0"
            )


@dataclass(frozen=True)
class NoisyGradients:
    """DP-SGD's mechanism (Abadi et al., 2016, Alg. 1), followed by AdamW: what one image can change is bounded and blurred.

    The gradient of every image is clipped to the length `clip`, and Gaussian noise of standard deviation noise * clip is
    added to their sum; the mean over the batch is then clipped to length 1, like the gradients of every fine-tuning here. No
    privacy budget is computed: with a handful of images it would be large.
    """

    clip: float = 1.0
    noise: float = 0.01

    def __post_init__(self):
        if not (self.clip > 0 and self.noise >= 0):
            raise ValueError(f"clip {self.clip} must be above 0, noise {self.noise} at least 0")


Protection = Bayesian | PriorPreservation | NoisyGradients


@dataclass(frozen=True)
class FineTune:
    """What to fine-tune, on which images, and how.

    training: one item, or several for a mixture, in which each image keeps the caption of its item.
    steps_per_image: the optimiser sees steps_per_image * N0 images in all, in batches of `batch_size` (App. E: 200, 1).
    rank, alpha: of the LoRA; 0 for DreamBooth. adapter: what has that rank: LoRA, its relative with lengths of its own
    (DoRA; Liu et al., 2024), or a Hadamard product of two (LoHa; Yeh et al., 2024). text_encoder: whether the text
    encoders learn too, by the same method (Stable Diffusion 1, 2 and SDXL). transform: "none", or a defense of
    fx.defenses, with its strength if it is not the usual one ("cutout", "cutout:0.25"). precision: of the forward and the
    backward pass ("float32", "bfloat16", "float16"); weights and optimiser are in float32 always. protection: None, or
    what else the owner does.
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
    protection: Protection | None = field(default=None, metadata={"absent": None})
    adapter: str = field(default="lora", metadata={"absent": "lora"})
    text_encoder: bool = field(default=False, metadata={"absent": False})

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
        if self.adapter not in ADAPTERS:
            raise ValueError(f"unknown adapter {self.adapter!r}: choose from {', '.join(ADAPTERS)}")
        if self.adapter != "lora" and (self.method != "lora" or isinstance(self.protection, Bayesian)):
            raise ValueError(f"the adapter {self.adapter} takes the place of a LoRA without random weights")
        if self.transform != "none":
            check_transform(self.transform)
        if self.protection is not None and not isinstance(self.protection, Protection):
            raise ValueError(
                f"protection {self.protection!r} must be None, Bayesian, PriorPreservation or NoisyGradients"
            )
        if self.steps_per_image < 1 or self.batch_size < 1 or not 0 < self.learning_rate < 1:
            raise ValueError(
                f"steps_per_image {self.steps_per_image} and batch_size {self.batch_size} must be at least 1, "
                f"learning_rate {self.learning_rate} between 0 and 1"
            )
        if self.seed < 0:
            raise ValueError(f"seed {self.seed} must be at least 0")


@results.inputs.register
def _(spec: FineTune) -> dict[str, str]:
    found = {"base": results.sha256_of(model_folder(spec.base))}
    if spec.text_encoder:
        check_text_encoders(spec.base)
    if isinstance(spec.protection, PriorPreservation):
        check_fits(spec.base, spec.protection.caption)
    for number, part in enumerate(spec.training):
        item = load_training(part)
        check_fits(spec.base, item.caption)
        found[f"caption {number}"] = item.caption
        found |= {f"image {number}.{i}": results.sha256_of(path) for i, path in enumerate(item.training)}
    return found


def check_text_encoders(base: str) -> None:
    """ValueError unless the text encoders of this base model can be fine-tuned: those of Stable Diffusion 1, 2 and SDXL."""
    folder = model_folder(base)
    with parts.reading(folder):
        kind, alt, _ = parts.pipeline_class(folder)
    if alt or kind not in (StableDiffusionPipeline, StableDiffusionXLPipeline):
        name = "AltDiffusion" if alt else kind.__name__
        raise ValueError(f"the text encoders of {base} ({name}) are not fine-tuned here: leave text_encoder out")


@results.perform.register
def _(spec: FineTune, folder: Path) -> None:
    """Write the fine-tuned parts (DreamBooth) or the adapter, and losses.npy.

    Networks, LoRA and DoRA lie there in diffusers' layout, a LoHa in LyCORIS's, which has no other. Of a Bayesian
    fine-tuning these are the means; the standard deviations stand beside in sigma.safetensors, by the names of the weights.
    """
    items = [load_training(part) for part in spec.training]
    pipeline = load_pipeline(spec.base)
    images = torch.cat([load_images(learned_from(part), image_size(pipeline)) for part in spec.training])
    captions = [item.caption for item in items for _ in item.training]
    losses, sigma = train(pipeline, images, captions, spec, results.scratch(spec))
    np.save(folder / "losses.npy", losses)
    if sigma:
        save_file(sigma, folder / SIGMA_FILE)
    trained = trained_parts(pipeline, spec)
    if spec.method == "dreambooth":
        for name, model in trained.items():
            model.save_pretrained(folder / name)
    elif spec.adapter == "loha":
        save_file(lycoris(trained, spec.alpha), folder / LORA_FILE)
    else:
        pipeline.save_lora_weights(folder, weight_name=LORA_FILE, **_lora_layers(trained))
        settle(folder / LORA_FILE)


def _lora_layers(trained: dict[str, nn.Module]) -> dict[str, dict]:
    """The layers of every part and peft's settings for them, without which loading takes alpha to be the rank.

    What peft keeps as a set is sorted: its order is another in every process.
    """
    found = {}
    for name, model in trained.items():
        layers = get_peft_model_state_dict(model)
        converted = layers if name == "transformer" else convert_state_dict_to_diffusers(layers)
        settings = model.peft_config["default"].to_dict().items()
        settings = {key: sorted(value) if isinstance(value, set) else value for key, value in settings}
        found |= {f"{name}_lora_layers": converted, f"{name}_lora_adapter_metadata": settings}
    return found


def lycoris(trained: dict[str, nn.Module], alpha: float) -> dict[str, Tensor]:
    """The adapters of these parts under kohya's and LyCORIS's names, each layer with its alpha."""
    found = {}
    for part, model in trained.items():
        stem = f"lora_te{'2' if part == 'text_encoder_2' else '1' if 'text_encoder_2' in trained else ''}"
        stem = stem if part in TEXT_PARTS else "lora_unet"
        for name, tensor in get_peft_model_state_dict(model).items():
            module, _, word = name.rpartition(".")
            module = f"{stem}_{module.replace('.', '_')}"
            found |= {f"{module}.{word}": tensor.contiguous(), f"{module}.alpha": torch.tensor(float(alpha))}
    return found


def train(
    pipeline: DiffusionPipeline, images: Tensor, captions: Sequence[str], spec: FineTune, scratch: Path
) -> tuple[np.ndarray, dict[str, Tensor]]:
    """Fine-tune a pipeline's network in place on images [n0, 3, h, w] under their captions [n0].

    Returns the losses, float32 [steps], without the terms that a protection adds, and of a Bayesian fine-tuning the
    standard deviations by the names of the weights. The network learns what it predicts: eps, x0, v or a flow's
    velocity. Latents, noise and loss have the autoencoder's precision, the draws are the same in any. Killed and called
    again with the same `scratch`, it goes on from its last checkpoint with the same result: the draws of each step come
    from their own seed.
    """
    schedule, model = noising(pipeline), network(pipeline)
    class_loss = _class_loss(pipeline, spec, scratch) if isinstance(spec.protection, PriorPreservation) else None
    trained = trained_parameters(pipeline, spec)
    random = RandomWeights(model, spec.protection) if isinstance(spec.protection, Bayesian) else None
    trained += random.sigmas if random else []
    optimizer = torch.optim.AdamW(trained, lr=spec.learning_rate, weight_decay=0.01, fused=True)
    scaler = torch.amp.GradScaler(model.device.type, enabled=spec.precision == "float16")
    latents = latent_source(pipeline, images, spec.transform)
    conditions = condition_source(pipeline, captions, spec.text_encoder)
    losses = np.zeros(-(-spec.steps_per_image * len(images) // spec.batch_size), np.float32)
    start = _resume(scratch, trained, optimizer, scaler, losses)
    model.train()
    saved = time.monotonic()
    title = ", ".join(part.item for part in spec.training)[-40:]

    def backward(step: int) -> float:
        """Gradients of a step; its loss without what a protection adds."""
        torch.manual_seed(spec.seed * 1_000_003 + step)
        chosen = torch.randint(len(images), (spec.batch_size,))
        x0 = latents(chosen)
        t = torch.randint(schedule.levels, (len(x0),)).to(x0.device)
        eps = torch.randn(x0.shape).to(x0)

        def loss_of(rows: slice) -> Tensor:
            """The loss of some rows of the batch."""
            x = schedule.add(x0[rows], eps[rows], t[rows])
            with torch.autocast(model.device.type, PRECISIONS[spec.precision], enabled=spec.precision != "float32"):
                predicted = denoise(model, x, schedule.timestep(t[rows]), conditions(chosen[rows]))
            return F.mse_loss(predicted, schedule.target(x0[rows], eps[rows], t[rows]))

        if isinstance(spec.protection, NoisyGradients):
            return _noisy_backward(loss_of, len(x0), trained, spec.protection, scaler)
        return _backward(loss_of, len(x0), scaler, random, class_loss)

    for step in tqdm(range(start, len(losses)), title, len(losses), initial=start, mininterval=2, leave=False):
        losses[step] = _within_memory(backward, step, pipeline, spec, optimizer)
        _step(trained, optimizer, scaler, random)
        if time.monotonic() - saved > SAVE_EVERY:
            _save(scratch, trained, optimizer, scaler, losses, step + 1)
            saved = time.monotonic()
    for part in trained_parts(pipeline, spec).values():
        part.requires_grad_(False).eval()
    return losses, random.named() if random else {}


def _within_memory(backward: Callable[[int], float], step: int, pipeline, spec: FineTune, optimizer) -> float:
    """backward(step); where it does not fit, again with activations computed twice instead of kept (Chen et al., 2016).

    This is called gradient checkpointing. It costs about a third more time and changes no result; it stays on.
    """
    try:
        return backward(step)
    except torch.OutOfMemoryError:
        found = trained_parts(pipeline, spec).values()
        if all(part.is_gradient_checkpointing for part in found):
            raise
    optimizer.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    for part in found:
        if isinstance(part, PreTrainedModel):
            part.activation_checkpointing_enable()
        else:
            part.enable_gradient_checkpointing()
    warnings.warn("the training does not fit into memory: activations are computed twice from here on", stacklevel=3)
    return backward(step)


def _backward(loss_of, n: int, scaler: torch.amp.GradScaler, random: "RandomWeights | None", class_loss) -> float:
    """Gradients of the loss of a batch of n, and of that of the class if there is one; the first as a number."""
    with random.drawn() if random else nullcontext():
        loss = loss_of(slice(n))
        scaler.scale(loss + class_loss(n) if class_loss else loss).backward()
    return loss.item()


def _step(
    trained: list[Tensor], optimizer, scaler: torch.amp.GradScaler, random: "RandomWeights | None" = None
) -> None:
    """One step of the optimiser with the gradients of a scaled loss, clipped to norm 1; random adds its divergence before.

    The scaler does nothing but in float16: there it scales the loss, or small gradients would vanish, and leaves out a step
    whose gradients overflow.
    """
    scaler.unscale_(optimizer)
    if random:
        random.add_divergence()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if random:
        random.keep_positive()


class RandomWeights:
    """The weights of a network that a Bayesian fine-tuning draws: w = mu + sigma * eps, eps standard normal.

    Outside of `drawn` the network holds mu. The reparametrisation gradient is that of w for mu, and times eps for sigma.
    """

    LEAST = 1e-7  # of sigma

    def __init__(self, unet: nn.Module, protection: Bayesian):
        self.chosen = {
            name: weight for name, weight in unet.named_parameters() if weight.requires_grad and is_random(unet, name)
        }
        if not self.chosen:
            raise ValueError(f"a {type(unet).__name__} has no linear layer that could be drawn")
        self.mus = list(self.chosen.values())
        self.sigmas = [nn.Parameter(torch.full_like(mu, protection.sigma)) for mu in self.mus]
        self.prior = [mu.detach().clone() for mu in self.mus]
        self.protection = protection

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """Inside, the network has weights of one draw; at the end their gradients become those of mu and sigma."""
        with torch.no_grad():
            known = [mu.detach().clone() for mu in self.mus]
            noise = [torch.randn(mu.shape).to(mu) for mu in self.mus]
            for mu, sigma, eps in zip(self.mus, self.sigmas, noise, strict=True):
                mu.add_(sigma * eps)
        try:
            yield
        finally:
            with torch.no_grad():
                for mu, sigma, before, eps in zip(self.mus, self.sigmas, known, noise, strict=True):
                    mu.copy_(before)
                    sigma.grad = None if mu.grad is None else mu.grad * eps

    def divergence(self) -> Tensor:
        """KL(N(mu, sigma^2) || prior), summed over all drawn weights, in nats."""
        parts = []
        for mu, sigma, mean in zip(self.mus, self.sigmas, self.prior, strict=True):
            ratio = sigma / self.protection.sigma
            parts.append(((ratio**2 + ((mu - mean) / self.protection.sigma) ** 2 - 1) / 2 - ratio.log()).sum())
        return torch.stack(parts).sum()

    def add_divergence(self) -> None:
        """Add the gradient of kl_weight times the divergence to those of mu and sigma."""
        if self.protection.kl_weight:
            (self.protection.kl_weight * self.divergence()).backward()

    @torch.no_grad()
    def keep_positive(self) -> None:
        for sigma in self.sigmas:
            sigma.clamp_(min=self.LEAST)

    def named(self) -> dict[str, Tensor]:
        return {name: sigma.detach().clone() for name, sigma in zip(self.chosen, self.sigmas, strict=True)}


def is_random(unet: nn.Module, name: str) -> bool:
    """Whether a Bayesian fine-tuning draws the weight of this name: a LoRA's up matrix, or a linear layer's as published."""
    if ".lora_" in name:
        return ".lora_B." in name
    layer = unet.get_submodule(name.rpartition(".")[0])
    spared = (".attn2.", "time_emb", "add_", "time_text_embed.", "context_embedder.")
    return isinstance(layer, nn.Linear) and not any(part in name for part in spared)


def _noisy_backward(loss_of, n: int, trained: list[Tensor], protection: NoisyGradients, scaler) -> float:
    """Gradients of a batch by DP-SGD: each image's clipped, summed, noise added, divided by n; the mean loss."""
    total, losses = [torch.zeros_like(weight) for weight in trained], []
    for row in range(n):
        loss = loss_of(slice(row, row + 1))
        losses.append(loss.item())
        gradients = torch.autograd.grad(scaler.scale(loss), trained, materialize_grads=True)
        gradients = [gradient / scaler.get_scale() for gradient in gradients]
        length = torch.stack([gradient.norm() for gradient in gradients]).norm()
        share = (protection.clip / length.clamp(min=1e-12)).clamp(max=1.0)
        for known, gradient in zip(total, gradients, strict=True):
            known.add_(gradient * share)
    for weight, known in zip(trained, total, strict=True):
        noise = torch.randn(weight.shape).to(weight) * protection.noise * protection.clip
        weight.grad = scaler.scale((known + noise) / n)
    return float(np.mean(losses))


def _class_loss(pipeline: DiffusionPipeline, spec: FineTune, scratch: Path) -> Callable[[int], Tensor]:
    """A function that gives the weighted loss on a batch of the base model's own images of the class.

    They are drawn once, as latents, by the pipeline itself, and kept in `scratch`.
    """
    prior, schedule, model = spec.protection, noising(pipeline), network(pipeline)
    if not (kept := scratch / "class.pt").exists():
        found = []
        pipeline.set_progress_bar_config(desc=f"images of {prior.caption!r}", leave=False, mininterval=2)
        for first in range(0, prior.images, 25):
            if (batch := scratch / f"class-{first:06d}.pt").exists():
                found.append(torch.load(batch, weights_only=True))
                continue
            generators = [
                torch.Generator().manual_seed(spec.seed * 1_000_003 + number)
                for number in range(first, min(first + 25, prior.images))
            ]
            drawn = pipeline(
                [prior.caption] * len(generators),
                num_inference_steps=25,
                generator=generators,
                output_type="latent",
                **_guided(pipeline, prior.guidance_scale),
            ).images
            found.append(unpack(drawn, *latent_shape(pipeline)[1:]) if isinstance(pipeline, FluxPipeline) else drawn)
            torch.save(found[-1], part := batch.with_suffix(".part"))
            os.replace(part, batch)
        pipeline.set_progress_bar_config(disable=True)
        torch.save(torch.cat(found), part := scratch / "class.pt.part")
        os.replace(part, kept)
    known = torch.load(kept, weights_only=True)
    conditions = condition_source(pipeline, [prior.caption], spec.text_encoder)

    def loss(n: int) -> Tensor:
        x0 = known[torch.randint(len(known), (n,))].to(pipeline.vae.device)
        t = torch.randint(schedule.levels, (n,)).to(x0.device)
        eps = torch.randn(x0.shape).to(x0)
        with torch.autocast(model.device.type, PRECISIONS[spec.precision], enabled=spec.precision != "float32"):
            condition = conditions(torch.zeros(n, dtype=torch.int64))
            predicted = denoise(model, schedule.add(x0, eps, t), schedule.timestep(t), condition)
        return prior.weight * F.mse_loss(predicted, schedule.target(x0, eps, t))

    return loss


def _guided(pipeline: DiffusionPipeline, scale: float) -> dict[str, object]:
    """Classifier-free guidance of this scale, as the pipeline itself takes it."""
    if isinstance(pipeline, FluxPipeline):
        return {"guidance_scale": UNGUIDED, "true_cfg_scale": scale, "negative_prompt": ""}
    return {"guidance_scale": scale}


def condition_source(pipeline: DiffusionPipeline, captions: Sequence[str], learning: bool = False):
    """A function from image numbers [b] to the encoded captions of these images.

    Each caption is encoded once, or, where text encoders are learning, anew each time.
    """
    different = list(dict.fromkeys(captions))
    row_of = torch.tensor([different.index(caption) for caption in captions])

    def encoded(numbers: Sequence[int]) -> Condition:
        each = [encode(pipeline, different[number], learning) for number in numbers]
        return functools.reduce(Condition.followed_by, each)

    if not learning:
        known = encoded(range(len(different)))
        return lambda chosen: known if len(different) == 1 else known.rows(row_of[chosen])

    def learned(chosen: Tensor) -> Condition:
        numbers, rows = row_of[chosen].unique(return_inverse=True)
        return encoded(numbers.tolist()).rows(rows)

    return learned


def trained_parts(pipeline: DiffusionPipeline, spec: FineTune) -> dict[str, nn.Module]:
    """The parts of a pipeline that a fine-tuning changes, by name: the network, and text encoders if they are to learn."""
    found = {network_name(pipeline): network(pipeline)}
    return found | {
        name: part for name in TEXT_PARTS if spec.text_encoder and (part := getattr(pipeline, name, None)) is not None
    }


def trained_parameters(pipeline: DiffusionPipeline, spec: FineTune) -> list[Tensor]:
    """Switch on what the method trains: every weight of the parts, or fresh adapters on all of their attention's."""
    found = trained_parts(pipeline, spec)
    torch.manual_seed(spec.seed)
    for name, part in found.items():
        if spec.method == "lora":
            part.add_adapter(adapter_config(spec, LORA_LAYERS.get(name, TEXT_LAYERS)))
        else:
            part.requires_grad_(True)
    return [weight for part in found.values() for weight in part.parameters() if weight.requires_grad]


def adapter_config(spec: FineTune, layers: list[str]) -> PeftConfig:
    """peft's settings for a fresh adapter on these layers."""
    if spec.adapter == "loha":
        return LoHaConfig(r=spec.rank, alpha=spec.alpha, target_modules=layers)
    options = {"use_dora": True} if spec.adapter == "dora" else {}
    return LoraConfig(
        r=spec.rank, lora_alpha=spec.alpha, init_lora_weights="gaussian", target_modules=layers, **options
    )


def latent_source(pipeline: DiffusionPipeline, images: Tensor, named: str):
    """A function from image numbers [b] to freshly drawn scaled latents [b, c, h, w].

    Without a transform the encoder runs once; with one, every drawn image is transformed and encoded anew.
    """
    vae, (scale, shift) = pipeline.vae, latent_statistics(pipeline.vae)
    if named == "none":
        with torch.no_grad():
            known = [vae.encode(part.to(vae.device, vae.dtype)).latent_dist for part in images.split(16)]
        mean, std = torch.cat([part.mean for part in known]), torch.cat([part.std for part in known])
        return lambda n: (mean[n] + std[n] * torch.randn(mean[n].shape).to(mean.device) - shift) * scale

    change = transform(named)

    @torch.no_grad()
    def transformed(chosen: Tensor) -> Tensor:
        posterior = vae.encode(change(images[chosen]).to(vae.device, vae.dtype)).latent_dist
        return (posterior.mean + posterior.std * torch.randn(posterior.mean.shape).to(vae.device) - shift) * scale

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
