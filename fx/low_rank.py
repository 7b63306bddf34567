"""A fine-tuned network as its base and a difference of low rank: one network in memory serves both (Table 6).

    spec = LowRank(model, rank=16)           # a step: its folder holds a LoRA
    pair = load_pair(model.base, results.complete(spec))

The difference of each layer is cut to its strongest singular directions, as tools do that extract a LoRA from a whole model.
What does not fit is lost, and so are biases and norms; the scores say how much is kept.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fx import results
from fx.families import network, network_name
from fx.finetune import FineTune
from fx.models import LORA_FILE
from fx.tuned import load_tuned


@dataclass(frozen=True)
class LowRank:
    """A DreamBooth fine-tuning cut to a difference of this rank in every linear and convolutional layer.

    The step writes a LoRA in diffusers' layout. Its score `kept` is the share of the squared difference that is in it.
    """

    VERSION: ClassVar[int] = 1

    model: FineTune
    rank: int

    def __post_init__(self):
        if self.model.method != "dreambooth" or self.model.text_encoder:
            raise ValueError("cut to a low rank are DreamBooth fine-tunings of the network alone")
        if self.rank < 1:
            raise ValueError(f"rank {self.rank} must be at least 1")


@results.perform.register
def _(spec: LowRank, folder: Path) -> None:
    pair = load_tuned(spec.model)
    tensors, kept = strongest(network(pair.base), network(pair.tuned), spec.rank)
    if not tensors:
        raise ValueError(f"fine-tuning changed no layer of {spec.model.base}: there is nothing to cut")
    prefix = network_name(pair.base)
    save_file({f"{prefix}.{name}": tensor for name, tensor in tensors.items()}, folder / LORA_FILE)
    (folder / results.SCORES).write_text(json.dumps({"kept": kept}))


@torch.no_grad()
def strongest(base: nn.Module, tuned: nn.Module, rank: int) -> tuple[dict[str, Tensor], float]:
    """LoRA factors of the difference of two networks of one architecture, by peft's names, and the share that they keep.

    "<layer>.lora_A.weight" is [r, in, …] and "<layer>.lora_B.weight" [out, r, …], r the rank or the layer's own if that is
    lower; their product is the best approximation of rank r (Eckart and Young, 1936). Layers that did not change are left
    out. The share is of the sum of squares over all parameters.
    """
    found, inside = {}, 0.0
    for name, layer in base.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        after = tuned.get_submodule(name).weight
        difference = (after.float() - layer.weight.float()).cpu()
        if not difference.any():
            continue
        left, sizes, right = torch.linalg.svd(difference.flatten(1), full_matrices=False)
        r = min(rank, len(sizes))
        root, ones = sizes[:r].sqrt(), [1] * (difference.ndim - 2)
        found[f"{name}.lora_A.weight"] = (root[:, None] * right[:r]).reshape(r, *difference.shape[1:]).contiguous()
        found[f"{name}.lora_B.weight"] = (left[:, :r] * root).reshape(len(difference), r, *ones).contiguous()
        inside += float(sizes[:r].double().square().sum())
    pairs = zip(base.parameters(), tuned.parameters(), strict=True)
    everything = sum(float((after.double() - before.double()).square().sum()) for before, after in pairs)
    return found, inside / everything if everything else 0.0
