"""Copy-detection descriptors and their cosine similarity (Sec. 3.2 and 4.3).

sim(x, x') of the paper is the inner product of two unit-length descriptors. The default descriptor network is the
shipped `mini-sscd`, in the role of SSCD (Pizzi et al., 2022), whose published TorchScript files are read too.
"""

import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2
from tqdm import tqdm

from fx.datasets import load_images, open_image
from fx.models import device
from fx.paths import EXTERNAL, MODELS
from fx.results import sha256_of

# How images enter SSCD: "sscd" as its authors recommend (shorter side 288, ImageNet statistics), "published" as the code
# of the paper does.
PRESETS = {
    "sscd": (v2.Resize(288), v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),
    "published": (v2.Resize(256), v2.CenterCrop(224), v2.Normalize((0.5,) * 3, (0.5,) * 3)),
}
SSCD_THRESHOLDS = (0.6, 0.7)  # tau of A-ESR in the paper, Sec. 3.2


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation around a shortcut: [n, c, h, w] -> [n, c2, h / stride, ...]."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class MiniSSCD(nn.Module):
    """Small residual network with SSCD's head: GeM pooling (p = 3), a linear layer, unit length.

    widths, blocks: channels and number of blocks of each stage; every stage but the first halves the resolution.
    dimension: length of the descriptor. size: side in pixels to which images are resized.
    """

    def __init__(self, widths=(32, 64, 128, 192), blocks=(1, 1, 2, 1), dimension: int = 128, size: int = 64):
        super().__init__()
        self.config = {"widths": list(widths), "blocks": list(blocks), "dimension": dimension, "size": size}
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        layers, channels = [], widths[0]
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            for index in range(count):
                layers.append(BasicBlock(channels, width, stride=2 if stage > 0 and index == 0 else 1))
                channels = width
        self.stages = nn.Sequential(*layers)
        self.project = nn.Linear(channels, dimension)

    def forward(self, images: Tensor) -> Tensor:
        """Images [n, 3, h, w] in [-1, 1], any size -> descriptors [n, dimension] of unit length."""
        size = (self.config["size"],) * 2
        if images.shape[-2:] != size:
            images = F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
        features = self.stages(self.stem(images))
        pooled = features.clamp(min=1e-6).pow(3).mean(dim=(2, 3)).pow(1 / 3)
        return F.normalize(self.project(pooled))

    def save_pretrained(self, folder: Path, thresholds: dict[str, float] | None = None) -> None:
        """Write config.json and model.safetensors (floating-point tensors as fp16) into `folder`.

        thresholds: "loose" and "strict", the similarities that `copy_thresholds` gives back.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"architecture": "MiniSSCD", **self.config} | ({"thresholds": thresholds} if thresholds else {})
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        state = {name: t.half() if t.is_floating_point() else t for name, t in self.state_dict().items()}
        save_file({name: t.contiguous().cpu() for name, t in state.items()}, folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: Path) -> "MiniSSCD":
        """The network stored by `save_pretrained`, fp32, in eval mode."""
        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} holds no {name}: name a folder written by MiniSSCD.save_pretrained.")
        config = json.loads((folder / "config.json").read_text())
        config.pop("thresholds", None)
        if config.pop("architecture", None) != "MiniSSCD":
            raise ValueError(f"{folder / 'config.json'} does not describe a MiniSSCD: its 'architecture' must say so.")
        model = cls(**config)
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.eval()


class SSCD(nn.Module):
    """A TorchScript network with the preprocessing of one of PRESETS before it and unit length after it."""

    def __init__(self, network: nn.Module, preset: str):
        super().__init__()
        self.network = network
        self.prepare = v2.Compose(PRESETS[preset])

    def forward(self, images: Tensor) -> Tensor:
        """Images [n, 3, h, w] in [-1, 1], any size -> descriptors [n, d] of unit length."""
        return F.normalize(self.network(self.prepare((images + 1) / 2)))


def descriptor_path(name: str | Path) -> tuple[Path, str | None]:
    """Where a descriptor lies, and the SHA-256 that its name promises (TorchScript files only).

    name: "mini-sscd" (shipped), a folder written by `MiniSSCD.save_pretrained`, or a TorchScript file of SSCD as
    "FILE@sha256:DIGEST" with the 64 hex digits, which may also stand in FILE.sha256. A relative file is looked for in the
    working directory and in data/external. FileNotFoundError if there is nothing, ValueError for a file without digest
    or with another one.
    """
    for folder in (MODELS / name, Path(name).expanduser()):
        if (folder / "config.json").is_file():
            return folder, None
    file, _, digest = str(name).partition("@sha256:")
    path = next((place for place in (Path(file).expanduser(), EXTERNAL / file) if place.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"unknown descriptor {str(name)!r}: it is neither 'mini-sscd' nor a folder with config.json and "
            f"model.safetensors nor a TorchScript file FILE@sha256:DIGEST, here or in {EXTERNAL}"
        )
    beside = path.with_name(f"{path.name}.sha256")
    if not digest and beside.is_file():
        digest = (beside.read_text("utf-8", "replace").split() or [""])[0]  # as sha256sum writes it, the name behind
    if not re.fullmatch("[0-9a-fA-F]{64}", digest):
        raise ValueError(
            f"{path} is a program, not only numbers: name it with the SHA-256 you expect, as {path}@sha256:DIGEST, or write "
            f"that into {beside.name} beside it. The file has {sha256_of(path)}; compare that with a source you trust."
        )
    if (found := sha256_of(path)) != digest.lower():
        raise ValueError(f"{path} has the SHA-256 {found}, not {digest}: it is damaged or another file. Load it again.")
    return path, digest.lower()


def load_descriptor(name: str | Path, preset: str = "sscd") -> nn.Module:
    """The descriptor network `name` (see `descriptor_path`) in eval mode: images [n, 3, h, w] in [-1, 1] -> [n, d].

    It is on the GPU where there is one.

    preset: how images enter a TorchScript SSCD, one of PRESETS; the mini-sscd has its own size and ignores it.
    Raises ValueError for another preset, for a file with another SHA-256 and for one that is not TorchScript.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
    path, digest = descriptor_path(name)
    if digest is None:
        return MiniSSCD.from_pretrained(path).to(device())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch deprecates the format of SSCD's published files
            network = torch.jit.load(path, map_location="cpu")
    except RuntimeError as error:
        raise ValueError(f"{path} is not a TorchScript file: {str(error).splitlines()[0]}") from None
    return SSCD(network, preset).eval().to(device())


def copy_thresholds(name: str | Path) -> tuple[float, float]:
    """The loose and the strict similarity of a descriptor, tau of A-ESR: for SSCD 0.6 and 0.7 (Sec. 3.2).

    Those of a MiniSSCD were measured when it was trained (notebook 00); ValueError if its folder does not hold them.
    """
    path, digest = descriptor_path(name)
    if digest is not None:
        return SSCD_THRESHOLDS
    thresholds = json.loads((path / "config.json").read_text()).get("thresholds")
    if thresholds is None:
        raise ValueError(f"the descriptor {str(name)!r} was saved without thresholds: give them to save_pretrained")
    return thresholds["loose"], thresholds["strict"]


@torch.no_grad()
def descriptors(model: nn.Module, images: Tensor, batch_size: int = 64) -> np.ndarray:
    """Descriptors float32 [n, d] of images [n, 3, h, w] in [-1, 1], computed in eval mode on the model's device.

    A progress bar appears from 2,000 images on. The model is left in the mode (training or eval) in which it came.
    Batches of another size change the last bits (about 1e-7) at most.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be [n, 3, h, w], not {list(images.shape)}.")
    if not images.dtype.is_floating_point or len(images) == 0:
        raise ValueError(f"images must be at least one, of floating point, not {len(images)} of {images.dtype}.")
    parameter = next(model.parameters(), torch.zeros(()))  # a TorchScript file may have none
    batches = tqdm(images.split(batch_size), "descriptors", disable=len(images) < 2000, mininterval=2)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        found = [model(batch.to(parameter.device, parameter.dtype)).float().cpu() for batch in batches]
    finally:
        for module, training in modes.items():
            module.training = training
    return torch.cat(found).numpy()


def describe(model: nn.Module, paths: Sequence[Path], size: int | None = None, batch_size: int = 64) -> np.ndarray:
    """Descriptors float32 [n, d] of image files, of which no more than `batch_size` are in memory at a time.

    size: images are resized and cropped to squares of this side (`fx.datasets.load_images`), those of a fine-tuning as
    they were learned; None for images that are all of one size and squares, which are taken as they are.
    """
    if not paths:
        raise ValueError("there are no images to describe")
    side = size or open_image(paths[0]).width
    parts = range(0, len(paths), batch_size)
    bar = tqdm(parts, "descriptors", disable=len(paths) < 2000, mininterval=2, leave=False)
    return np.concatenate(
        [descriptors(model, load_images(tuple(paths[i : i + batch_size]), side), batch_size) for i in bar]
    )


def similarity_matrix(descriptors: np.ndarray, block: int = 1024) -> np.ndarray:
    """Cosine similarities float32 [n, n] in [-1, 1] of the rows of `descriptors` [n, d]: symmetric, diagonal 1.

    Computed in blocks of `block` rows, in float64, so that nothing but the result grows with n^2 and the order of the rows
    does not matter. Raises ValueError for values that are not finite and for all-zero rows, which have no direction.
    """
    rows = np.asarray(descriptors, dtype=np.float64)
    if rows.ndim != 2 or block < 1:
        raise ValueError(
            f"Descriptors must be [n, d] and block at least 1; they are {list(rows.shape)}, block {block}."
        )
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    bad = np.flatnonzero(~np.isfinite(lengths[:, 0]) | (lengths[:, 0] == 0))
    if len(bad):
        raise ValueError(f"Descriptor {bad[0]} is all zero or not finite: check the image it comes from.")
    rows = rows / lengths
    result = np.empty((len(rows), len(rows)), dtype=np.float32)
    for i in range(0, len(rows), block):
        for j in range(i, len(rows), block):
            tile = np.clip(rows[i : i + block] @ rows[j : j + block].T, -1, 1)
            if i == j:
                tile = np.triu(tile, 1) + np.triu(tile, 1).T
            result[i : i + block, j : j + block] = tile
            result[j : j + block, i : i + block] = tile.T
    np.fill_diagonal(result, 1)
    return result
