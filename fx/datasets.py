"""Items: one artist or one object with its training images, its caption and its never-trained controls (Sec. 5)."""

import difflib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fx.paths import DATASETS

SETS = ("style", "object")
SPLITS = ("reported", "development")
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


@dataclass(frozen=True)
class Item:
    """Training images (sorted by name), the caption they are trained with, and controls: same artist, never trained."""

    name: str
    caption: str
    training: tuple[Path, ...]
    controls: tuple[Path, ...] = ()

    @property
    def n_training(self) -> int:
        """N0 of the paper."""
        return len(self.training)


@cache
def shipped(dataset: str) -> dict[str, dict]:
    """The index of a shipped set ("style" or "object"): slug -> name, caption, split, training, controls."""
    if dataset not in SETS:
        raise ValueError(f"unknown dataset {dataset!r}: choose from {', '.join(SETS)}")
    return json.loads((DATASETS / dataset / "items.json").read_text("utf-8"))


def names(dataset: str, split: str = "reported", limit: int | None = None) -> list[str]:
    """Names of a set's items, "style/mimooh" and so on, in a fixed order; the first `limit` of them.

    "reported" items are those of the tables; "development" items are for choosing settings, and in no table. ValueError
    for an unknown set or split and for a limit beyond its items.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose from {', '.join(SPLITS)}")
    chosen = [f"{dataset}/{slug}" for slug, item in shipped(dataset).items() if item["split"] == split]
    if limit is not None and not 0 <= limit <= len(chosen):
        raise ValueError(f"{dataset} has {len(chosen)} {split} items: a number from 0 to {len(chosen)}, not {limit}")
    return chosen[:limit]


def load_item(name: str, caption: str = "") -> Item:
    """The item of a shipped name ("style/mimooh"), or of a folder of images, which needs a `caption`.

    Every image is opened once, so that what cannot be used is refused here, before any training: FileNotFoundError
    for a name that is neither, ValueError for an empty folder, an unreadable image or a missing caption.
    """
    dataset, _, slug = name.partition("/")
    if dataset in SETS and slug in shipped(dataset):
        entry = shipped(dataset)[slug]
        files = {role: tuple(DATASETS / dataset / image["file"] for image in entry[role]) for role in ROLES}
        item = Item(name, caption or entry["caption"], files["training"], files["controls"])
    else:
        item = _folder_item(Path(name).expanduser(), caption)
    for path in (*item.training, *item.controls):
        open_image(path)
    return item


ROLES = ("training", "controls")


def _folder_item(folder: Path, caption: str) -> Item:
    if folder.is_file():
        raise FileNotFoundError(f"no item {str(folder)!r}: it is a file; name the folder that holds the images")
    if not folder.is_dir():
        known = [name for dataset in SETS for split in SPLITS for name in names(dataset, split)]
        short = {name.partition("/")[2]: name for name in known}
        near = difflib.get_close_matches(str(folder), known, 1) or [
            short[slug] for slug in difflib.get_close_matches(folder.name, short, 1)
        ]
        raise FileNotFoundError(
            f"no item {str(folder)!r}: it is neither a folder of images nor a shipped item"
            + (f"; did you mean {near[0]}?" if near else f", such as {known[0]}; data/datasets holds them all")
        )
    visible = (path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    images = tuple(sorted(path for path in visible if path.suffix.lower() in SUFFIXES))
    if not images:
        raise ValueError(f"no images in {folder}: it needs files ending in {', '.join(sorted(SUFFIXES))}")
    if not caption:
        raise ValueError(f'{folder} needs a caption, such as "a dog" or "art style of Claude Monet"')
    return Item(folder.name, caption, images)


def open_image(path: Path) -> Image.Image:
    """The image as RGB, upright (EXIF orientation applied) and, where it is transparent, on white."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I;16"):  # 16-bit grey, which Pillow would clip at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode in ("I", "F"):
                raise ValueError(f"its pixels are of Pillow's type {image.mode!r}, not of 8 or 16 bits")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            return image.convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {path}") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is not an image that can be read ({error}): remove or replace it") from None


def load_images(paths: tuple[Path, ...], size: int) -> Tensor:
    """Images as a batch: shorter side resized to `size`, centre crop; float32 [n, 3, size, size] in [-1, 1]."""
    squares = [ImageOps.fit(open_image(path), (size, size), Image.Resampling.LANCZOS) for path in paths]
    return from_uint8(np.stack([np.asarray(square) for square in squares]))


def from_uint8(pictures: np.ndarray) -> Tensor:
    """uint8 [n, h, w, 3] to float32 [n, 3, h, w] in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(images: Tensor) -> np.ndarray:
    """float [n, 3, h, w] in [-1, 1] (clipped) to uint8 [n, h, w, 3]."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
