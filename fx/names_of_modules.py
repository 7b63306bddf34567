"""Every name under which an adapter file may speak of a module: diffusers', peft's, kohya's, the original code's."""

from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import nn

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
    original = original_names(model) if isinstance(model, UNet2DConditionModel) else {}
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
