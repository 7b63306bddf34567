"""Model pairs (Sec. 3.1): the base model theta and the fine-tuned model theta' behind one interface."""

import contextlib
import copy
import functools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from fx import checkpoints, guidance
from fx.checkpoints import LORA_FILE as LORA_FILE
from fx.families import (
    PIPELINES,
    TEXT_PARTS,
    TOKENIZERS,
    AltTextEncoder,
    Condition,
    denoise,
    encode,
    network,
    network_name,
    prediction_type,
    text_encoders,
)

FAMILIES = {kind.__name__: kind for kind in PIPELINES} | {"AltDiffusionPipeline": StableDiffusionPipeline}
NETWORKS = {"UNet2DConditionModel": UNet2DConditionModel, "SD3Transformer2DModel": SD3Transformer2DModel}
NO_CHECKER = {"safety_checker": None, "requires_safety_checker": False}
# what must agree between theta and theta' before they can be asked about the same latents
SHAPES = (
    "in_channels",
    "out_channels",
    "sample_size",
    "cross_attention_dim",
    "block_out_channels",
    "joint_attention_dim",
)
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
def load_tokenizer(name: str) -> CLIPTokenizer:
    """The first tokenizer of a pipeline (see `model_folder`)."""
    return AutoTokenizer.from_pretrained(model_folder(name) / "tokenizer")


def load_pipeline(name: str, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """A frozen pipeline of a supported family (`fx.families`) in `dtype`, its autoencoder always in float32.

    A Stable Diffusion or SDXL pipeline gets the deterministic DDIM scheduler. Raises FileNotFoundError or ValueError, with
    the file, for what is not there, is no whole safetensors model, or belongs to no supported family.
    """
    folder = model_folder(name)
    named = json.loads((folder / "model_index.json").read_text()).get("_class_name")
    if named not in FAMILIES:
        raise ValueError(f"{folder} is a {named}, which is not supported; supported are {', '.join(FAMILIES)}")
    with _reading(folder):
        pipeline = (
            _load_alt(folder, dtype) if named == "AltDiffusionPipeline" else _load(FAMILIES[named], folder, dtype)
        )
    return _prepare(pipeline)


def _load(kind: type, folder: Path, dtype: torch.dtype) -> DiffusionPipeline:
    parts = {"vae": load_network(AutoencoderKL, folder / "vae", torch.float32)}
    name = "transformer" if kind is StableDiffusion3Pipeline else "unet"
    parts[name] = load_network(_network_class(folder / name), folder / name, dtype)
    if kind is StableDiffusionPipeline:
        parts |= NO_CHECKER
    if kind is StableDiffusion3Pipeline:  # its T5 and its image encoder may be left out
        index = json.loads((folder / "model_index.json").read_text())
        optional = ("text_encoder_3", "tokenizer_3", "image_encoder", "feature_extractor")
        parts |= {part: None for part in optional if not any(index.get(part) or [])}
    return kind.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True, **parts)


def _load_alt(folder: Path, dtype: torch.dtype) -> StableDiffusionPipeline:
    """AltDiffusion from its sub-folders: Stable Diffusion's parts around a multilingual text encoder."""
    return StableDiffusionPipeline(
        vae=load_network(AutoencoderKL, folder / "vae", torch.float32),
        text_encoder=AltTextEncoder.from_pretrained(folder / "text_encoder", dtype=dtype, use_safetensors=True),
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        unet=load_network(UNet2DConditionModel, folder / "unet", dtype),
        scheduler=DDIMScheduler.from_pretrained(folder / "scheduler", clip_sample=False),
        feature_extractor=None,
        **NO_CHECKER,
    )


def load_network(kind: type, folder: Path, dtype: torch.dtype) -> nn.Module:
    """A diffusers network from its folder; ValueError if weights are missing, left over, misshapen or not finite."""
    with _reading(folder):
        model, info = kind.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    for trouble in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[trouble]:
            raise ValueError(
                f"the weights in {folder} do not fit its config.json: {trouble.replace('_', ' ')} "
                f"{', '.join(map(str, list(info[trouble])[:3]))}"
            )
    check_finite(model, folder)
    return model if model.dtype == dtype else model.to(dtype)


def check_finite(model: nn.Module, source: Path) -> None:
    """ValueError if a weight is NaN or infinite."""
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise ValueError(f"{source}: the weight {name} is not finite (NaN or infinite): the file is damaged")


def _network_class(folder: Path) -> type:
    config = folder / "config.json"
    named = json.loads(config.read_text()).get("_class_name") if config.is_file() else None
    if named not in NETWORKS:
        raise ValueError(f"{folder} holds {named or 'no network'}; supported networks are {', '.join(NETWORKS)}")
    return NETWORKS[named]


@contextlib.contextmanager
def _reading(source: Path) -> Iterator[None]:
    """A library's complaint about a file becomes a ValueError that names the file."""
    try:
        yield
    except (OSError, RuntimeError, LookupError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, ValueError) and str(source) in str(error):
            raise
        reason = " ".join(str(error).split())[:400]
        raise ValueError(f"{source} cannot be loaded: {type(error).__name__}: {reason}") from error


def _prepare(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Frozen, on the device, silent, with the schedule that sampling starts from."""
    if not isinstance(pipeline, StableDiffusion3Pipeline):
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
    kind = checkpoints.kind_of(path)
    first = load_pipeline(base, dtype)
    second = copy.copy(first)
    if kind == "pipeline":
        second = load_pipeline(str(path), dtype)
    elif kind == "single file":
        second = _single_file(first, base, path, dtype)
    elif kind in ("lora", "peft"):
        (_add_lora if kind == "lora" else _add_peft)(second, path)
    else:
        _replace_parts(second, path, kind, dtype)
    check_fit(first, second, base, path)
    return ModelPair(first, second)


def _single_file(first: DiffusionPipeline, base: str, path: Path, dtype: torch.dtype) -> DiffusionPipeline:
    """A whole model in one file, in the original layout; its settings are taken to be the base model's."""
    options = NO_CHECKER if isinstance(first, StableDiffusionPipeline) else {}
    with _reading(path):
        second = type(first).from_single_file(
            path, config=str(model_folder(base)), dtype=dtype, local_files_only=True, **options
        )
    second.vae.to(torch.float32)
    second.scheduler = first.scheduler
    for part in (network(second), second.vae):
        check_finite(part, path)
    return _prepare(second)


def _replace_parts(second: DiffusionPipeline, path: Path, kind: str, dtype: torch.dtype) -> None:
    """Put the parts that a folder holds in place of the base model's."""
    name = network_name(second)
    folder = path if kind == "network" else path / name
    if not folder.is_dir():
        raise ValueError(f"{path} holds no {name}/, which is what {type(second).__name__} denoises with")
    setattr(second, name, load_network(_network_class(folder), folder, dtype))
    if kind == "parts":
        if (path / "vae/config.json").is_file():
            second.vae = load_network(AutoencoderKL, path / "vae", torch.float32)
        for part in TEXT_PARTS:
            if (path / part / "config.json").is_file() and getattr(second, part, None) is not None:
                with _reading(path / part):
                    model = type(getattr(second, part)).from_pretrained(path / part, dtype=dtype, use_safetensors=True)
                setattr(second, part, model)
        for part in TOKENIZERS:
            if (path / part).is_dir() and getattr(second, part, None) is not None:
                with _reading(path / part):
                    setattr(second, part, AutoTokenizer.from_pretrained(path / part))
        if (path / "scheduler/scheduler_config.json").is_file() and not isinstance(second, StableDiffusion3Pipeline):
            second.scheduler = DDIMScheduler.from_pretrained(path / "scheduler")
    _prepare(second)


def _add_lora(second: DiffusionPipeline, path: Path) -> None:
    """Load a LoRA in diffusers' or kohya's layout onto the network and, where it has parts for them, text encoders."""
    file = checkpoints.lora_file(path)
    names = checkpoints.keys(file)
    with _reading(file):
        second.load_lora_weights(file.parent, weight_name=file.name, adapter_name="default", local_files_only=True)
    _check_lora(second, file, names)
    of_text = [name for name in names if name.startswith(("text_encoder", "lora_te"))]
    if of_text and not any(getattr(part, "_hf_peft_config_loaded", False) for part in text_encoders(second)):
        raise ValueError(
            f"{file}: its text-encoder part fits no text encoder of {type(second).__name__} ({of_text[0]})"
        )


def _add_peft(second: DiffusionPipeline, path: Path) -> None:
    """Load adapters as PeftModel.save_pretrained leaves them: of the network in the folder itself or in a part of it."""
    name = network_name(second)
    targets = {path: network(second), path / name: network(second)}
    targets |= {path / part: getattr(second, part, None) for part in TEXT_PARTS}
    for folder, model in targets.items():
        if model is None or not (folder / "adapter_config.json").is_file():
            continue
        file = folder / "adapter_model.safetensors"
        if not file.is_file():
            raise FileNotFoundError(f"{folder} has an adapter_config.json but no adapter_model.safetensors")
        with _reading(file):
            model.add_adapter(LoraConfig.from_pretrained(str(folder)), adapter_name="default")
            result = set_peft_model_state_dict(model, load_file(file), "default")
        if result.unexpected_keys:
            raise ValueError(_no_match(second, file, result.unexpected_keys))
        model.requires_grad_(False).eval()
    _check_lora(second, path, [])


def _check_lora(second: DiffusionPipeline, file: Path, names: list[str]) -> None:
    """ValueError unless the adapter sits on the network and changes its weights."""
    layers = [layer for layer in network(second).modules() if isinstance(layer, LoraLayer)]
    if not layers:
        raise ValueError(_no_match(second, file, names))
    pairs = [(layer.lora_A[name], layer.lora_B[name]) for layer in layers for name in layer.lora_A]
    if not all(torch.isfinite(part.weight).all() for pair in pairs for part in pair):
        raise ValueError(f"{file}: a LoRA weight is not finite (NaN or infinite): the file is damaged")
    if not any(down.weight.any() and up.weight.any() for down, up in pairs):
        raise ValueError(f"{file}: the LoRA changes nothing, one factor of every layer is zero: theta' would be theta")


def _no_match(second: DiffusionPipeline, file: Path, names: list[str]) -> str:
    return (
        f"{file} holds no adapter for the {network_name(second)} of a {type(second).__name__}: "
        f"its first keys are {', '.join(sorted(names)[:3]) or 'none'}"
    )


def check_fit(first: DiffusionPipeline, second: DiffusionPipeline, base: str, tuned: Path) -> None:
    """ValueError, naming both sides, unless theta and theta' can be asked about the same latents."""
    if type(first) is not type(second):
        raise ValueError(
            f"{base} is a {type(first).__name__}, {tuned} a {type(second).__name__}: name the base it was made of"
        )
    one, other = network(first), network(second)
    if type(one) is not type(other):
        raise ValueError(f"{base} denoises with a {type(one).__name__}, {tuned} with a {type(other).__name__}")
    for key in SHAPES:
        if (mine := one.config.get(key)) != (theirs := other.config.get(key)):
            raise ValueError(
                f"{base} and {tuned} do not fit: {key} is {mine} and {theirs}; name the base it was made of"
            )
    if other.config.in_channels != second.vae.config.latent_channels:
        raise ValueError(
            f"{tuned} takes {other.config.in_channels} latent channels, its autoencoder makes "
            f"{second.vae.config.latent_channels}: inpainting and other image-conditioned models are not supported"
        )
    kinds = prediction_type(first), prediction_type(second)
    for name, kind in zip((base, tuned), kinds, strict=True):
        if kind not in guidance.PARAMETRISATIONS:
            raise ValueError(
                f"{name} has the unknown prediction type {kind!r}: known are {', '.join(guidance.PARAMETRISATIONS)}"
            )
    ends = [float(getattr(p.scheduler, "alphas_cumprod", torch.ones(1))[-1]) for p in (first, second)]
    if ends[1] == 0 != ends[0]:
        raise ValueError(
            f"{tuned} starts from pure noise (zero terminal SNR), {base} at alpha-bar {ends[0]:.4f}: they have no first "
            "timestep in common; name the base it was made of"
        )
