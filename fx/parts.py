"""The parts of a model on disk: networks, autoencoders, text encoders, tokenizers, schedules, all under the same checks."""

import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FluxTransformer2DModel,
    SchedulerMixin,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import AutoTokenizer

from fx import checkpoints
from fx.families import FLOWS, PIPELINES, TEXT_PARTS, TOKENIZERS, AltTextEncoder

NETWORKS = {kind.__name__: kind for kind in (UNet2DConditionModel, SD3Transformer2DModel, FluxTransformer2DModel)}
TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")
NEEDED = ("vae", "unet", "transformer", "scheduler", *TEXT_PARTS[:2], *TOKENIZERS[:2])
ABSENT = ("safety_checker", "feature_extractor", "image_encoder", "text_encoder_3", "tokenizer_3")
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")


@contextlib.contextmanager
def reading(source: Path) -> Iterator[None]:
    """Whatever a library raises over a file becomes a ValueError that names the file.

    FileNotFoundError, and a ValueError that names the file already, pass; so does running out of GPU memory.
    """
    try:
        yield
    except (FileNotFoundError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # other people's files in other people's readers: there is no list of what they raise
        if isinstance(error, ValueError) and str(source) in str(error):
            raise
        reason = " ".join(str(error).split())[:400]
        raise ValueError(f"{source} cannot be loaded: {type(error).__name__}: {reason}") from error


# checks of weights, the same for every part and every file


def check_finite(source: Path, weights: dict[str, Tensor]) -> None:
    """ValueError if a weight is NaN or infinite."""
    for name, weight in weights.items():
        if weight.is_floating_point() and not torch.isfinite(weight.float() if weight.itemsize == 1 else weight).all():
            raise ValueError(f"{source}: the weight {name} is not finite (NaN or infinite): the file is damaged")


def check_floating(source: Path, weights: dict[str, Tensor]) -> None:
    """ValueError if a weight is stored as whole numbers: it is quantised, and its scale is not known here."""
    for name, weight in weights.items():
        if not weight.is_floating_point():
            raise ValueError(
                f"{source}: the weight {name} is stored as {str(weight.dtype).removeprefix('torch.')}: quantised or "
                "other weights than floating-point ones are not supported; save it in float16 or float32"
            )


def check_keys(source: Path, **names: list[str]) -> None:
    """ValueError, with the first names, if weights are missing, left over (unexpected) or misshapen (mismatched)."""
    for trouble, found in names.items():
        if found:
            raise ValueError(
                f"the weights in {source} do not fit its config.json: {trouble} keys {', '.join(map(str, found[:3]))}"
                + (f" and {len(found) - 3} more" if len(found) > 3 else "")
            )


def fill(model: nn.Module, weights: dict[str, Tensor], source: Path) -> nn.Module:
    """The model with these weights, all of them and no others; ValueError, with the first names, otherwise."""
    with reading(source):
        missing, unexpected = model.load_state_dict(weights, strict=False)
    for trouble, found in {"lacks": missing, "has left over": unexpected}.items():
        if found:
            raise ValueError(f"{source} {trouble} weights of {type(model).__name__}: {', '.join(sorted(found)[:3])}")
    return model


# parts in folders


def load_part(kind: type, folder: Path, dtype: torch.dtype) -> nn.Module:
    """A diffusers or transformers model from its folder, frozen by nobody yet.

    ValueError if weights are missing, left over, misshapen, quantised or not finite.
    """
    options = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True, "local_files_only": True}
    if issubclass(kind, diffusers.ModelMixin):
        options["low_cpu_mem_usage"] = False
    else:
        options["ignore_mismatched_sizes"] = True  # named below; the error of its own would not name them
    with reading(folder):
        model, info = kind.from_pretrained(folder, variant=checkpoints.variant(folder), **options)
    keys = ("missing", "unexpected", "mismatched")
    check_keys(folder, **{trouble: sorted(map(str, info[f"{trouble}_keys"])) for trouble in keys})
    stored = checkpoints.dtypes(folder)
    if whole := [name for name, _ in model.named_parameters() if stored.get(name, "F").startswith(("I", "U", "BOOL"))]:
        raise ValueError(f"{folder}: the weight {whole[0]} is stored as {stored[whole[0]]}: quantised is not supported")
    check_finite(folder, dict(model.named_parameters()))
    return model if model.dtype == dtype else model.to(dtype)


def network_class(folder: Path) -> type:
    """The class of the network in a folder, from its config.json; ValueError for one that is not supported."""
    named = checkpoints.read_json(folder / "config.json").get("_class_name")
    if not isinstance(named, str) or named not in NETWORKS:
        raise ValueError(f"{folder} holds {named or 'no network'}; supported networks are {', '.join(NETWORKS)}")
    return NETWORKS[named]


def load_autoencoder(folder: Path) -> AutoencoderKL:
    """The autoencoder in a folder, in float32; ValueError for another class than AutoencoderKL."""
    named = checkpoints.read_json(folder / "config.json").get("_class_name", "AutoencoderKL")
    if named != "AutoencoderKL":
        raise ValueError(f"{folder} holds {named}; the supported autoencoder is AutoencoderKL")
    return load_part(AutoencoderKL, folder, torch.float32)


def load_text_encoder(folder: Path, alt: bool, dtype: torch.dtype) -> nn.Module:
    """A text encoder of the class that its config.json names; AltDiffusion's, whatever it calls itself, if `alt`."""
    named = (checkpoints.read_json(folder / "config.json").get("architectures") or ["CLIPTextModel"])[0]
    if not alt and named not in TEXT_ENCODERS:
        raise ValueError(f"{folder} holds {named}; supported text encoders are {', '.join(TEXT_ENCODERS)}")
    return load_part(AltTextEncoder if alt else getattr(transformers, named), folder, dtype)


def load_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer in a folder; ValueError if it holds no vocabulary."""
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise ValueError(f"{folder} holds no tokenizer (one of {', '.join(VOCABULARIES)}): fetch the folder again")
    with reading(folder):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def load_schedule(folder: Path, flow: bool) -> SchedulerMixin:
    """The scheduler in a folder, of the class it names; ValueError unless it is a flow (`flow`) or a noise schedule."""
    named = checkpoints.read_json(folder / "scheduler_config.json").get("_class_name", DDIMScheduler.__name__)
    kind = getattr(diffusers, named, None) if isinstance(named, str) else None
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise ValueError(f"{folder} holds {named!r}, which is no scheduler that diffusers knows")
    with reading(folder):
        schedule = kind.from_pretrained(folder)
    is_flow = "FlowMatch" in named or bool(schedule.config.get("use_flow_sigmas"))
    if is_flow != flow or not (flow or hasattr(schedule, "alphas_cumprod")):
        wanted = "a flow (FlowMatchEulerDiscreteScheduler)" if flow else "a noise schedule with alphas_cumprod"
        raise ValueError(f"{folder} holds a {named}, but this family's models are supported with {wanted} only")
    return schedule


def load_parts(folder: Path, kind: type, alt: bool, dtype: torch.dtype) -> dict[str, object]:
    """The parts of a pipeline of class `kind` that a folder holds, by name; ValueError for a damaged or foreign one."""
    flow = kind in FLOWS
    loaders = {
        "transformer" if flow else "unet": lambda place: load_part(network_class(place), place, dtype),
        "vae": load_autoencoder,
        "scheduler": lambda place: load_schedule(place, flow),
        **dict.fromkeys(TEXT_PARTS, lambda place: load_text_encoder(place, alt, dtype)),
        **dict.fromkeys(TOKENIZERS, load_tokenizer),
    }
    there = [name for name in loaders if (folder / name).is_dir() and any((folder / name).iterdir())]
    if foreign := [name for name in there if name not in inspect.signature(kind).parameters]:
        raise ValueError(f"{folder} holds {foreign[0]}/, which a {kind.__name__} has not: name the base it was made of")
    return {name: loaders[name](folder / name) for name in there}


# pipelines


def pipeline_class(folder: Path) -> tuple[type, bool, dict]:
    """The class of the pipeline in a folder, whether it is AltDiffusion, and its model_index.json.

    ValueError for a class that is not supported.
    """
    index = checkpoints.read_json(folder / "model_index.json")
    named = index.get("_class_name")
    kinds = {kind.__name__: kind for kind in PIPELINES}
    encoder = index.get("text_encoder")
    alt = named == "AltDiffusionPipeline" or (isinstance(encoder, list) and "AltTextEncoder" in encoder)
    if not isinstance(named, str) or not (alt or named in kinds):
        known = ", ".join([*kinds, "AltDiffusionPipeline"])
        raise ValueError(f"{folder} is a {named}, which is not supported; supported are {known}")
    return (kinds["StableDiffusionPipeline"] if alt else kinds[named]), alt, index


def assemble(kind: type, parts: dict[str, object], settings: dict, source: Path) -> DiffusionPipeline:
    """A pipeline of these parts and of the plain settings (text, numbers) of a model_index.json.

    ValueError for a part that is missing and for a tokenizer that knows more tokens than its text encoder.
    """
    names = inspect.signature(kind).parameters
    if missing := [name for name in names if name in NEEDED and parts.get(name) is None]:
        raise ValueError(f"{source} holds no {missing[0]}/, which a {kind.__name__} needs: fetch the folder again")
    for tokenizer, encoder in zip(TOKENIZERS, TEXT_PARTS, strict=True):
        check_vocabulary(parts.get(tokenizer), parts.get(encoder), source / tokenizer)
    chosen = {name: settings[name] for name in names if isinstance(settings.get(name), str | int | float)}
    absent = {name: None for name in names if name in ABSENT}
    checked = {"requires_safety_checker": False} if "requires_safety_checker" in names else {}
    return kind(**absent | parts | chosen | checked)


def check_vocabulary(tokenizer, encoder: nn.Module | None, source: Path) -> None:
    """ValueError if a text encoder has no tokenizer, or one with tokens that the encoder has no embedding for."""
    if encoder is None:
        return
    if tokenizer is None:
        raise ValueError(f"{source} is not there, but its text encoder is: fetch the folder again")
    rows = encoder.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ValueError(f"{source} knows {len(tokenizer)} tokens, its text encoder {rows}: they are not of one model")
