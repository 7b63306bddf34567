"""A whole model, or some of its parts, in one safetensors file: the layouts of the original training code.

Which parts there are is told by the tensors' names. Each is converted by diffusers and filled into a copy of the base
model's part, whose settings it takes; every tensor of the file is used, of a known kind that is not read, or refused.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.loaders import single_file_utils as original
from safetensors.torch import load_file
from torch import Tensor, nn

from fx import checkpoints
from fx.families import FLOWS, network, network_name
from fx.names_of_modules import flux_originals
from fx.parts import check_finite, check_floating, fill, reading

NETWORK = "model.diffusion_model."
VAE = "first_stage_model."
MARKS = ("v_pred", "ztsnr")
SIGMAS = "denoiser.sigmas"
BUFFERS = ("alphas_cumprod", "betas", "sqrt_", "log_one_minus", "posterior_", "logvar", "lvlb_weights", SIGMAS)
# copies and helpers that no part reads: a running mean, position numbers, CLIP's temperature, the vae's training loss
UNREAD = ("model_ema.", "first_stage_model.loss.", "first_stage_model.model_ema.")
UNREAD_ENDINGS = (".position_ids", ".logit_scale", "scaled_dot")


TEXT_PREFIXES = {
    StableDiffusionPipeline: {"text_encoder": "cond_stage_model."},
    StableDiffusionXLPipeline: {
        "text_encoder": "conditioner.embedders.0.",
        "text_encoder_2": "conditioner.embedders.1.",
    },
    StableDiffusion3Pipeline: {
        "text_encoder": "text_encoders.clip_l.",
        "text_encoder_2": "text_encoders.clip_g.",
        "text_encoder_3": "text_encoders.t5xxl.",
    },
    FluxPipeline: {"text_encoder": "text_encoders.clip_l.", "text_encoder_2": "text_encoders.t5xxl."},
}


def load(first: DiffusionPipeline, file: Path) -> dict[str, object]:
    """The parts in a file, by name, in the base model's precision, and the schedule it speaks of, if any.

    Raises ValueError, with the names, if the file holds no network, if a part of it lacks weights or has others than the
    base model's, if a tensor fits nothing, and for what `checkpoints.stated` refuses.
    """
    if checkpoints.is_embedding(file):
        raise ValueError(
            f"{file} is a textual-inversion embedding: it holds a word and changes no network, so theta' would be theta; "
            "name the model or the LoRA that was trained"
        )
    with reading(file):
        tensors = load_file(file)
    schedule = stated_schedule(first, tensors, file)
    groups = split(first, tensors, file)
    parts = {name: _part(getattr(first, name), name, group, file) for name, group in groups.items()}
    return parts | ({"scheduler": schedule} if schedule else {})


def split(first: DiffusionPipeline, tensors: dict[str, Tensor], file: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of each part, by the part's name; the prefix is left on. ValueError for what belongs to none."""
    name = network_name(first)
    if not any(key.startswith(NETWORK) for key in tensors) and is_bare(first, tensors):
        known = network(first).state_dict().keys() & tensors.keys()
        return {name: {("" if known else NETWORK) + key: tensors[key] for key in tensors if key not in MARKS}}
    prefixes = {name: NETWORK, "vae": VAE} | TEXT_PREFIXES[type(first)]
    groups = {part: {k: t for k, t in tensors.items() if k.startswith(prefix)} for part, prefix in prefixes.items()}
    used = {key for group in groups.values() for key in group} | set(MARKS)
    over = sorted(k for k in tensors.keys() - used if not k.startswith((*UNREAD, *BUFFERS)))
    if not groups[name]:
        raise ValueError(
            f"{file} holds no {name} of a {type(first).__name__}: its first keys are {', '.join(sorted(tensors)[:3])}"
        )
    if over:
        raise ValueError(
            f"{file} does not fit a {type(first).__name__}: {len(over)} tensors belong to none of its parts "
            f"({', '.join(over[:3])}); name the base it was made of"
        )
    if gone := [part for part, group in groups.items() if group and getattr(first, part, None) is None]:
        raise ValueError(f"{file} holds a {gone[0]}, which the base model has not: name a base model that has it")
    return {part: group for part, group in groups.items() if group}


def is_bare(first: DiffusionPipeline, tensors: dict[str, Tensor]) -> bool:
    """Whether the file is the network alone, without a prefix: as diffusers saves it, or in the original names."""
    starts = tuple({key.partition(".")[0] + "." for key in network(first).state_dict()})
    return all(key.startswith((*starts, *ORIGINAL_STARTS)) or key in MARKS for key in tensors)


ORIGINAL_STARTS = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")
ORIGINAL_STARTS += ("joint_blocks.", "x_embedder.", "t_embedder.", "y_embedder.", "final_layer.")
ORIGINAL_STARTS += ("double_blocks.", "single_blocks.", "img_in.", "txt_in.", "time_in.", "vector_in.", "guidance_in.")


def _part(part: nn.Module, name: str, group: dict[str, Tensor], file: Path) -> nn.Module:
    """A copy of the base model's part with the weights of the file."""
    convert = _converter(part, name, group)
    group = {key: value for key, value in group.items() if not key.startswith(UNREAD) and not unread(part, key)}
    check_floating(file, group)
    check_finite(file, group)
    with reading(file):
        weights, dropped = traced(convert, group)
    if dropped:
        raise ValueError(f"{file} has left over weights of its {name}: {', '.join(sorted(dropped)[:3])}")
    return fill(copy.deepcopy(part), weights, file).requires_grad_(False).eval()


def unread(part: nn.Module, key: str) -> bool:
    """Whether a tensor is of a kind that the part has no use for, as in every published file of its family.

    Stable Diffusion 2 reads OpenCLIP's last layer but one, and a text encoder without a projection has no use for it.
    """
    if key.endswith(UNREAD_ENDINGS):
        return True
    depth = getattr(part.config, "num_hidden_layers", None)
    if depth is None or hasattr(part, "text_projection"):
        return False
    return f".resblocks.{depth}." in key or ".text_projection" in key


def traced(convert: Callable, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """What a conversion makes of the tensors, and the names of those it leaves out.

    To see the latter, the conversion is asked once more with every tensor filled by its own number, in no memory.
    """
    numbered = {name: torch.tensor(float(i)).expand(t.shape) for i, (name, t) in enumerate(tensors.items())}
    kept = {int(t.flatten()[0]) for t in convert(numbered).values()}
    return convert(dict(tensors)), [name for i, name in enumerate(tensors) if i not in kept]


def _converter(part: nn.Module, name: str, group: dict[str, Tensor]) -> Callable[[dict], dict]:
    """The conversion from a part's original names to those of its class."""
    if name in ("unet", "transformer"):
        if not any(key.startswith(NETWORK) for key in group):
            return dict  # saved by diffusers
        if isinstance(part, FluxTransformer2DModel):
            return lambda tensors: renamed_flux(part, tensors)
        if name == "transformer":
            return lambda tensors: original.convert_sd3_transformer_checkpoint_to_diffusers(dict(tensors))
        return lambda tensors: original.convert_ldm_unet_checkpoint(tensors, part.config)
    if name == "vae":
        return lambda tensors: original.convert_ldm_vae_checkpoint(tensors, part.config)
    return lambda tensors: renamed_text(part, tensors)


def renamed_flux(model: FluxTransformer2DModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """FLUX.1's weights under diffusers' names; what is none of them is left out.

    diffusers' own conversion takes every network to be 3,072 wide.
    """
    originals, found = flux_originals(model), {}
    for name, value in tensors.items():
        module, _, kind = name.removeprefix(NETWORK).rpartition(".")
        for path, rows in originals.get(module, ()):
            ending = "weight" if kind == "scale" else kind  # of the normalisation of queries and keys
            found[f"{path}.{ending}"] = value if rows is None else value[rows]
    return found


def renamed_text(encoder: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A text encoder's weights under its class's names, from OpenCLIP's or transformers' own behind a prefix."""
    if resblock := next((key for key in tensors if "transformer.resblocks." in key), None):
        prefix = resblock.partition("transformer.resblocks.")[0]
        bare = original.convert_open_clip_checkpoint(encoder, tensors, prefix)
    else:
        known = [prefix for family in TEXT_PREFIXES.values() for prefix in family.values()]
        prefix = next(prefix for prefix in known if next(iter(tensors)).startswith(prefix))
        bare = {key.removeprefix(prefix).removeprefix("transformer."): value for key, value in tensors.items()}
    bare = {key.removeprefix("text_model."): value for key, value in bare.items()}
    if "shared.weight" in bare:  # T5's, which reads them under two names
        bare.setdefault("encoder.embed_tokens.weight", bare["shared.weight"])
    own = encoder.state_dict().keys()
    return {f"text_model.{key}" if f"text_model.{key}" in own else key: value for key, value in bare.items()}


# the schedule


def stated_schedule(first: DiffusionPipeline, tensors: dict[str, Tensor], file: Path) -> DDIMScheduler | None:
    """The base model's schedule, changed to what the file says of it (`checkpoints.stated`, stored levels).

    None where it says nothing else than the base model. ValueError if it says that a flow model predicts anything else,
    or the other way round.
    """
    settings = checkpoints.stated(file)
    flows = type(first) in FLOWS
    if "prediction_type" in settings and (settings["prediction_type"] == "flow_prediction") != flows:
        raise ValueError(
            f"{file} says that it predicts {settings['prediction_type']}, which a {type(first).__name__} does not: "
            "name the base it was made of"
        )
    if flows:
        return None
    kept = levels(tensors)
    if kept is not None and "rescale_betas_zero_snr" not in settings:
        settings |= _stored_betas(DDIMScheduler.from_config(first.scheduler.config, **settings), kept)
    return DDIMScheduler.from_config(first.scheduler.config, **settings) if settings else None


def levels(tensors: dict[str, Tensor]) -> Tensor | None:
    """alpha-bar [T] of the schedule that a file keeps as `alphas_cumprod` or as `denoiser.sigmas`, if it does."""
    if "alphas_cumprod" in tensors:
        return tensors["alphas_cumprod"].double()
    if SIGMAS in tensors:
        kept = 1 / (1 + tensors[SIGMAS].double() ** 2)
        return kept.flip(0) if kept[0] < kept[-1] else kept
    return None


def _stored_betas(schedule: DDIMScheduler, kept: Tensor) -> dict[str, object]:
    """Settings of the stored schedule alpha-bar [T]; none if it is the base model's within half precision."""
    known = schedule.alphas_cumprod.double()
    if kept.shape == known.shape and torch.allclose(kept, known, rtol=5e-3, atol=5e-4):
        return {}
    betas = 1 - kept / torch.cat([torch.ones(1, dtype=kept.dtype), kept[:-1]])
    return {"trained_betas": betas.tolist(), "num_train_timesteps": len(kept), "rescale_betas_zero_snr": False}
