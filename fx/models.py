"""Model pairs (Sec. 3.1): the base model theta and the fine-tuned model theta' behind one interface."""

import contextlib
import functools
import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from fx import adapters, checkpoints, guidance, parts, single_files
from fx.checkpoints import LORA_FILE as LORA_FILE
from fx.families import (
    FLOWS,
    TOKENIZERS,
    AltTextEncoder,
    Condition,
    check_tokens,
    denoise,
    encode,
    latent_shape,
    latent_statistics,
    network,
    network_name,
    prediction_type,
    text_encoders,
    token_limit,
)
from fx.parts import reading

# what must agree between theta and theta' before they can be asked about the same latents
SHAPES = (
    "in_channels",
    "out_channels",
    "sample_size",
    "cross_attention_dim",
    "block_out_channels",
    "joint_attention_dim",
    "guidance_embeds",
)
KEPT: dict = {}  # what is held for whoever asks for it next: a model pair (`fx.tuned.kept_pair`), judges (`fx.quality`)
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
diffusers_logging.disable_progress_bar()
transformers_logging.disable_progress_bar()


def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def model_folder(name: str) -> Path:
    """The folder of a diffusers pipeline: a shipped one ("mini-sd"), a path, or a Hub id with an optional "@revision".

    Raises FileNotFoundError or ValueError for what is no whole pipeline folder (see `fx.checkpoints`).
    """
    folder = checkpoints.find(name)
    kind = checkpoints.kind_of(folder)
    if kind != "pipeline":
        way_out = (
            "; convert it once by diffusers' from_single_file and save_pretrained" if kind == "single file" else ""
        )
        raise ValueError(
            f"{folder} is no complete model: a base model is a diffusers folder with model_index.json{way_out}"
        )
    return folder


@functools.cache
def load_tokenizers(name: str) -> dict[str, tuple[object, int | None]]:
    """The tokenizers of a pipeline (see `model_folder`) by name, each with the tokens of a caption that are read by it."""
    folder = model_folder(name)
    with reading(folder):
        kind, _, _ = parts.pipeline_class(folder)
    known = {part: parts.load_tokenizer(folder / part) for part in TOKENIZERS if (folder / part).is_dir()}
    return {part: (tokenizer, token_limit(kind, part, tokenizer)) for part, tokenizer in known.items()}


def check_fits(name: str, caption: str) -> None:
    """ValueError, before a model is loaded, if a caption has more tokens than a text encoder of this pipeline reads."""
    for tokenizer, limit in load_tokenizers(name).values():
        check_tokens(tokenizer, caption, limit)


def load_pipeline(name: str, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """A frozen pipeline of a supported family (`fx.families`) in `dtype`, its autoencoder always in float32.

    A Stable Diffusion or SDXL pipeline gets the deterministic DDIM scheduler. Raises FileNotFoundError or ValueError, with
    the file, for what is not there, is no whole safetensors model, or belongs to no supported family.
    """
    let_go()
    folder = model_folder(name)
    with reading(folder):
        kind, alt, index = parts.pipeline_class(folder)
        return _prepare(parts.assemble(kind, parts.load_parts(folder, kind, alt, dtype), index, folder))


def let_go() -> None:
    """Give back the memory of the model pair and the judges that are kept."""
    if KEPT:
        KEPT.clear()
        if device().type == "cuda":
            gc.collect()  # a network may hold itself
            torch.cuda.empty_cache()


def _prepare(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Frozen, on the device, silent, with the schedule that sampling starts from."""
    if not isinstance(pipeline, FLOWS):
        # a scheduler of another class may not name clip_sample, and DDIM's default would clip latents to [-1, 1]
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.vae, network(pipeline), *text_encoders(pipeline)):
        part.requires_grad_(False).eval()
    return pipeline.to(device())


@dataclass
class ModelPair:
    """theta and theta' as two pipelines that share what fine-tuning left alone.

    Where theta' is a LoRA, both pipelines hold the same network, and theta is that network with its adapter switched off.
    """

    base: DiffusionPipeline
    tuned: DiffusionPipeline

    @property
    def one_network(self) -> bool:
        """Whether one network serves both models (LoRA, or no fine-tuning at all)."""
        return network(self.base) is network(self.tuned)

    def condition(self, model: str, caption: str) -> Condition:
        """The caption as `model` ("base" or "tuned") encodes it: each with its own tokenizer and text encoders."""
        if model == "tuned":
            return encode(self.tuned, caption)
        with without_adapters(text_encoders(self.base)):
            return encode(self.base, caption)

    def predict(self, model: str, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The prediction of "base" or "tuned" for latents x [n, c, h, w] at one timestep, in theta' 's parametrisation."""
        if model == "tuned":
            return denoise(network(self.tuned), x, t, condition)
        with without_adapters([network(self.base)] if self.one_network else []):
            return self._base(x, t, condition)

    def predictions(
        self, reference: tuple[str, bool] | None, target: tuple[str, bool], caption: str
    ) -> Callable[[Tensor, Tensor], tuple[Tensor | None, Tensor]]:
        """A function (x_t, t) -> (reference or None, target), each asked of a model with or without the caption.

        Two predictions of one network are made in one forward pass over both halves of a batch; where one half is theta
        and the other theta' of a LoRA, the adapter applies to its half only (not for DoRA: two passes then).
        """
        ends = [end for end in (reference, target) if end is not None]
        models, captions = zip(*((model, caption if sees else "") for model, sees in ends), strict=True)
        conditions = [self.condition(model, text) for model, text in zip(models, captions, strict=True)]
        if len(ends) == 1:
            return lambda x, t: (None, self.predict(models[0], x, t, conditions[0]))
        if set(models) == {"tuned"} or ("tuned" in models and self.one_network and mixable(network(self.tuned))):
            return functools.partial(self._both, models, conditions)
        return lambda x, t: (self.predict(models[0], x, t, conditions[0]), self.predict(models[1], x, t, conditions[1]))

    def _both(self, models, conditions, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        n = len(x)
        both = conditions[0].expand(n).followed_by(conditions[1].expand(n))
        half = slice(n, 2 * n) if models[1] == "tuned" else slice(n)
        network_of_both = network(self.tuned)
        with contextlib.nullcontext() if models[0] == models[1] else adapters_for(network_of_both, half):
            reference, target = denoise(network_of_both, torch.cat([x, x]), t, both).split(n)
        return reference, target

    def _base(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """theta's prediction as theta' would put it: at the same log-SNR, in the same parametrisation (`guidance`)."""
        spoken, wanted = prediction_type(self.base), prediction_type(self.tuned)
        kept, tuned_kept = (getattr(p.scheduler, "alphas_cumprod", None) for p in (self.base, self.tuned))
        if spoken == wanted and (kept is None or torch.equal(kept, tuned_kept)):
            return denoise(network(self.base), x, t, condition)
        level = float(tuned_kept[int(t)])
        prediction = denoise(network(self.base), x, same_level(kept, level).to(t.device), condition)
        alpha, sigma = level**0.5, (1 - level) ** 0.5
        return guidance.from_epsilon(guidance.to_epsilon(prediction, spoken, x, alpha, sigma), wanted, x, alpha, sigma)


def same_level(alphas_cumprod: Tensor, level: float) -> Tensor:
    """The timestep, between integers if need be, at which a schedule's alpha-bar [T] is `level`; log-SNR is interpolated."""
    log_snr = torch.logit(alphas_cumprod.double().cpu(), eps=1e-12).numpy()[::-1]
    return torch.tensor(np.interp(math.log(level) - math.log1p(-level), log_snr, np.arange(len(log_snr))[::-1])).float()


@contextlib.contextmanager
def without_adapters(modules: list[nn.Module]) -> Iterator[None]:
    """Every LoRA adapter in these diffusers and transformers models is off inside the block."""
    adapted = [module for module in modules if getattr(module, "_hf_peft_config_loaded", False)]
    for module in adapted:
        module.disable_adapters()
    try:
        yield
    finally:
        for module in adapted:
            module.enable_adapters()


def own_layer(layer: nn.Module) -> nn.Module:
    """The layer itself, without the adapter around it."""
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def acting_weight(layer: nn.Module) -> Tensor:
    """What a linear layer multiplies by, [out, in], whatever adapter is on it."""
    weight = own_layer(layer).weight
    if layer is own_layer(layer):
        return weight.detach().clone()
    unit = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    return (layer(unit) - layer(torch.zeros_like(unit))).T


def mixable(model: nn.Module) -> bool:
    """Whether the model has a LoRA that adds to its layers' outputs, and can do so for a part of a batch; not DoRA."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return bool(layers) and not any(layer.lora_variant for layer in layers)


@contextlib.contextmanager
def adapters_for(model: nn.Module, images: slice) -> Iterator[None]:
    """Inside the block the LoRA applies to these images of each batch only.

    peft's own mixed batches copy the images by index, which costs a fifth of the sampling time; a slice is no copy.
    """

    def add(layer: LoraLayer, inputs: tuple[Tensor], output: Tensor) -> None:
        for name in layer.active_adapters:
            if name in layer.lora_A:
                part = inputs[0][images].to(layer.lora_A[name].weight.dtype)
                output[images] += layer.lora_B[name](layer.lora_A[name](part)) * layer.scaling[name]

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    hooks = [layer.register_forward_hook(add) for layer in layers]
    try:
        with without_adapters([model]):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def load_pair(base: str, tuned: str | Path, dtype: torch.dtype = torch.float32) -> ModelPair:
    """theta and theta' from a base model (`load_pipeline`) and whatever was made of it.

    tuned: a diffusers folder, complete or with some parts only (unet/ or transformer/, text encoders, tokenizers, vae/,
    scheduler/), or one that is the network itself; a Hub id with an optional "@revision"; a single .safetensors file with a
    whole model; a LoRA in diffusers', kohya's or peft's layout. Parts it does not hold are the base model's.

    Raises FileNotFoundError or ValueError before anything is sampled, with the file and both sides' values, for what is
    damaged or does not fit: another architecture, latent shape or text width, a prediction type that cannot be converted,
    a LoRA of which nothing matches.
    """
    path = checkpoints.find(str(tuned))
    with reading(path):
        kind = checkpoints.kind_of(path)
    first = load_pipeline(base, dtype)
    with reading(path):
        add = adapters.add if kind in ("lora", "peft") else functools.partial(_with_parts, dtype=dtype)
        second = _prepare(add(first, path, kind))
        check_fit(first, second, base, path)
    return ModelPair(first, second)


def _with_parts(first: DiffusionPipeline, path: Path, kind: str, dtype: torch.dtype) -> DiffusionPipeline:
    """The base model with the parts that a folder or a single file holds in place of its own."""
    name, settings = network_name(first), dict(first.config)
    if kind == "single file":
        found = single_files.load(first, checkpoints.single_file(path))
    elif kind == "network":
        found = {name: parts.load_part(parts.network_class(path), path, dtype)}
    else:
        alt = isinstance(getattr(first, "text_encoder", None), AltTextEncoder)
        if kind == "pipeline":
            made, alt, index = parts.pipeline_class(path)
            check_class(type(first), made, path)
            settings |= index
        found = parts.load_parts(path, type(first), alt, dtype)
    if name not in found:
        raise ValueError(f"{path} holds no {name}/, which is what {type(first).__name__} denoises with")
    ours = {part: value for part, value in first.components.items() if value is not None}
    return parts.assemble(type(first), ours | found, settings, path)


def check_class(base: type, tuned: type, path: Path) -> None:
    """ValueError unless theta and theta' are of one family."""
    if base is not tuned:
        raise ValueError(
            f"the base model is a {base.__name__}, {path} a {tuned.__name__}: name the base it was made of"
        )


def check_fit(first: DiffusionPipeline, second: DiffusionPipeline, base: str, tuned: Path) -> None:
    """ValueError, naming both sides, unless theta and theta' can be asked about the same latents."""
    one, other = network(first), network(second)
    if type(one) is not type(other):
        raise ValueError(f"{base} denoises with a {type(one).__name__}, {tuned} with a {type(other).__name__}")
    for key in SHAPES:
        if (mine := one.config.get(key)) != (theirs := other.config.get(key)):
            raise ValueError(
                f"{base} and {tuned} do not fit: {key} is {mine} and {theirs}; name the base it was made of"
            )
    if (taken := latent_shape(second)[0]) != second.vae.config.latent_channels:
        raise ValueError(
            f"{tuned} takes {taken} latent channels, its autoencoder makes "
            f"{second.vae.config.latent_channels}: inpainting and other image-conditioned models are not supported"
        )
    kinds = prediction_type(first), prediction_type(second)
    for name, kind in zip((base, tuned), kinds, strict=True):
        if kind not in guidance.PARAMETRISATIONS:
            raise ValueError(
                f"{name} has the unknown prediction type {kind!r}: known are {', '.join(guidance.PARAMETRISATIONS)}"
            )
    _check_statistics(first, second, base, tuned)
    ends = [float(getattr(p.scheduler, "alphas_cumprod", torch.ones(1))[-1]) for p in (first, second)]
    if ends[1] == 0 != ends[0]:
        raise ValueError(
            f"{tuned} starts from pure noise (zero terminal SNR), {base} at alpha-bar {ends[0]:.4f}: they have no first "
            "timestep in common; name the base it was made of"
        )


def _check_statistics(first: DiffusionPipeline, second: DiffusionPipeline, base: str, tuned: Path) -> None:
    """ValueError unless both autoencoders scale and shift latents alike: what is noise to one is none to the other."""
    mine, theirs = (latent_statistics(pipeline.vae) for pipeline in (first, second))
    if not all(torch.allclose(one, other, rtol=1e-4) for one, other in zip(mine, theirs, strict=True)):
        named = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
        one, other = ({key: pipeline.vae.config.get(key) for key in named} for pipeline in (first, second))
        differing = [f"{key} is {one[key]} and {other[key]}" for key in named if one[key] != other[key]]
        raise ValueError(
            f"{base} and {tuned} scale their latents differently ({', '.join(differing)}): name the base it was made of"
        )
