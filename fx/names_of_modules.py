"""Every name under which an adapter file may speak of a module: diffusers', peft's, kohya's, the original code's."""

import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from fx.families import TEXT_PARTS, network_name

# before the module's name, once "." and "_" are the same
NETWORK_PREFIXES = ("unet_", "transformer_", "lora_unet_", "lora_transformer_", "lycoris_", "lycoris_unet_")
NETWORK_PREFIXES += ("diffusion_model_", "model_diffusion_model_", "")
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"}
RESNET |= {"conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
}
OUTSIDE |= {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
OUTSIDE |= {"conv_norm_out": "out.0", "conv_out": "out.2"}
OUTSIDE |= {
    f"mid_block.{name}": f"middle_block.{i}" for i, name in enumerate(("resnets.0", "attentions.0", "resnets.1"))
}


def plain(name: str) -> str:
    """A name in which kohya's "_" and everybody else's "." are the same."""
    return name.replace(".", "_")


def places(pipeline: DiffusionPipeline) -> dict[str, tuple[str, str]]:
    """Every (`plain`) name of every module that has a weight -> the pipeline's part and the module's path in it."""
    found: dict[str, tuple[str, str]] = {}
    part = network_name(pipeline)
    model = getattr(pipeline, part)
    original = {}
    if isinstance(model, UNet2DConditionModel):
        original = original_names(model)
    elif isinstance(model, FluxTransformer2DModel):
        original = {p[0][0]: name for name, p in flux_originals(model).items() if p[0][1] is None}
    for path in weighted(model):
        for name in (path, *filter(None, [original.get(path)])):
            found |= {prefix + plain(name): (part, path) for prefix in NETWORK_PREFIXES}
    for number, part in enumerate(TEXT_PARTS, 1):
        prefixes = [f"{part}_", f"lora_te{number}_", *(["lora_te_"] if number == 1 else [])]
        for path in weighted(getattr(pipeline, part, None) or nn.Identity()):
            bare = path.removeprefix("text_model.")
            for name in (bare, f"text_model.{bare}"):
                found |= {prefix + plain(name): (part, path) for prefix in prefixes}
    return found


def weighted(model: nn.Module) -> list[str]:
    """The paths of the modules that have a weight of their own."""
    return [path for path, module in model.named_modules() if isinstance(getattr(module, "weight", None), nn.Parameter)]


def original_names(unet: UNet2DConditionModel) -> dict[str, str]:
    """The name of each module of a U-Net in the original code of Stable Diffusion and SDXL (kohya's "sgm" names)."""
    levels, n = len(unet.config.block_out_channels), unet.config.layers_per_block
    if not isinstance(n, int):
        return {}
    blocks = dict(OUTSIDE)
    for level in range(levels):
        start = 1 + level * (n + 1)
        for i in range(n):
            blocks[f"down_blocks.{level}.resnets.{i}"] = f"input_blocks.{start + i}.0"
            blocks[f"down_blocks.{level}.attentions.{i}"] = f"input_blocks.{start + i}.1"
        blocks[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{start + n}.0.op"
        for i in range(n + 1):
            blocks[f"up_blocks.{level}.resnets.{i}"] = f"output_blocks.{level * (n + 1) + i}.0"
            blocks[f"up_blocks.{level}.attentions.{i}"] = f"output_blocks.{level * (n + 1) + i}.1"
        after = 2 if hasattr(unet.up_blocks[level], "attentions") else 1
        blocks[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{level * (n + 1) + n}.{after}.conv"
    names = {path: _renamed(path, blocks) for path in weighted(unet)}
    return {path: name for path, name in names.items() if name}


def _renamed(path: str, blocks: dict[str, str]) -> str | None:
    """A module's original name, from those of the blocks; None where the original code has no such module."""
    for block, original in blocks.items():
        if path == block or path.startswith(f"{block}."):
            inside = path[len(block) + 1 :]
            inside = RESNET[inside] if ".resnets." in path else inside
            return f"{original}.{inside}" if inside else original
    return None


# FLUX.1, whose original code keeps in one module what diffusers keeps in several

FLUX_DOUBLE = {"img_attn.proj": "attn.to_out.0", "txt_attn.proj": "attn.to_add_out"}
FLUX_DOUBLE |= {"img_mlp.0": "ff.net.0.proj", "img_mlp.2": "ff.net.2", "img_mod.lin": "norm1.linear"}
FLUX_DOUBLE |= {
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "txt_mod.lin": "norm1_context.linear",
}
FLUX_DOUBLE |= {"img_attn.norm.query_norm": "attn.norm_q", "img_attn.norm.key_norm": "attn.norm_k"}
FLUX_DOUBLE |= {"txt_attn.norm.query_norm": "attn.norm_added_q", "txt_attn.norm.key_norm": "attn.norm_added_k"}
FLUX_FUSED = {"img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v")}
FLUX_FUSED |= {"txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")}
FLUX_SINGLE = {"linear2": "proj_out", "modulation.lin": "norm.linear"}
FLUX_SINGLE |= {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}
FLUX_LINEAR1 = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
FLUX_OUTSIDE = {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}
for _original, _name in {"time_in": "timestep", "vector_in": "text", "guidance_in": "guidance"}.items():
    FLUX_OUTSIDE |= {f"{_original}.in_layer": f"time_text_embed.{_name}_embedder.linear_1"}
    FLUX_OUTSIDE |= {f"{_original}.out_layer": f"time_text_embed.{_name}_embedder.linear_2"}
FLUX_LAST, FLUX_LAST_ORIGINAL = "norm_out.linear", "final_layer.adaLN_modulation.1"
Pieces = list[tuple[str, Tensor | None]]  # (path, its rows among those of the original module; None for all of them)


def flux_originals(model: FluxTransformer2DModel) -> dict[str, Pieces]:
    """Every module of the original code that has a weight -> the modules of diffusers that it became, with their rows.

    The last modulation's halves, shift and scale, stand the other way round.
    """
    found: dict[str, Pieces] = {original: [(path, None)] for original, path in FLUX_OUTSIDE.items()}
    half = model.norm_out.linear.weight.shape[0] // 2
    found[FLUX_LAST_ORIGINAL] = [(FLUX_LAST, torch.cat([torch.arange(half, 2 * half), torch.arange(half)]))]
    for blocks, original, single, fused in (
        ("transformer_blocks", "double_blocks", FLUX_DOUBLE, FLUX_FUSED),
        ("single_transformer_blocks", "single_blocks", FLUX_SINGLE, {"linear1": FLUX_LINEAR1}),
    ):
        for number in range(len(getattr(model, blocks))):
            here, there = f"{blocks}.{number}", f"{original}.{number}"
            found |= {f"{there}.{name}": [(f"{here}.{path}", None)] for name, path in single.items()}
            found |= {f"{there}.{name}": _one_below_the_other(model, here, paths) for name, paths in fused.items()}
    own = set(weighted(model))
    return {name: pieces for name, pieces in found.items() if all(path in own for path, _ in pieces)}


def _one_below_the_other(model: nn.Module, block: str, paths: tuple[str, ...]) -> Pieces:
    pieces, first = [], 0
    for path in (f"{block}.{path}" for path in paths):
        rows = model.get_submodule(path).weight.shape[0]
        pieces.append((path, torch.arange(first, first + rows)))
        first += rows
    return pieces


def fused(pipeline: DiffusionPipeline) -> dict[str, tuple[str, Pieces]]:
    """Every (`plain`) original name of a module that is several here, or one with rows in another order -> part, pieces."""
    part = network_name(pipeline)
    model = getattr(pipeline, part)
    if not isinstance(model, FluxTransformer2DModel):
        return {}
    several = {name: pieces for name, pieces in flux_originals(model).items() if pieces[0][1] is not None}
    return {prefix + plain(name): (part, pieces) for name, pieces in several.items() for prefix in NETWORK_PREFIXES}
