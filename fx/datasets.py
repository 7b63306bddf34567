"""Items: one artist or one object with its training images, its caption and its never-trained controls (Sec. 5)."""

import difflib
import json
import mimetypes
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fx import originals
from fx.paths import DATASETS

SETS = ("style", "object")
SPLITS = ("reported", "development")
Image.init()
NO_PICTURES = ("BUFR", "GRIB", "HDF5", "MPEG")  # Pillow knows their suffixes, but has no pictures of them
SUFFIXES = {s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN and kind not in NO_PICTURES}
# pictures that Pillow does not open here; the image types of the mimetypes module come on top
OTHER_PICTURES = (".heic", ".heif", ".hif", ".avif", ".jxl", ".svg", ".psb", ".xcf", ".exr", ".hdr")
OTHER_PICTURES += (
    ".dng",
    ".raw",
    ".cr2",
    ".cr3",
    ".crw",
    ".nef",
    ".nrw",
    ".arw",
    ".orf",
    ".rw2",
    ".raf",
    ".pef",
    ".srw",
)
MANY_IN_ONE = ("MPO", "PSD")  # one picture with its previews or layers


@dataclass(frozen=True)
class Item:
    """Training images (sorted by name), the caption they are trained with, and controls: same artist, never trained.

    more: further works of the same artist, for larger training sets (fx.finetune.TrainingItem, first).
    """

    name: str
    caption: str
    training: tuple[Path, ...]
    controls: tuple[Path, ...] = ()
    more: tuple[Path, ...] = ()

    @property
    def n_training(self) -> int:
        """N0 of the paper."""
        return len(self.training)


@cache
def shipped(dataset: str) -> dict[str, dict]:
    """The index of a shipped set ("style" or "object"): slug -> name, caption, split, training, controls, perhaps more."""
    if dataset not in SETS:
        raise ValueError(f"unknown dataset {dataset!r}: choose from {', '.join((*SETS, *originals.SOURCES))}")
    return json.loads((DATASETS / dataset / "items.json").read_text("utf-8"))


def index(dataset: str) -> dict[str, dict]:
    """The index of a set, a shipped one (`shipped`) or one of the paper's (`fx.originals.index`, which needs the images)."""
    return originals.index(dataset) if dataset in originals.SOURCES else shipped(dataset)


def kind(name: str) -> str:
    """What a set or an item of one is, "style" (an artist) or "object"; of a folder what its name begins with."""
    dataset = str(name).partition("/")[0]
    return originals.SOURCES[dataset].kind if dataset in originals.SOURCES else dataset


def names(dataset: str, split: str = "reported", limit: int | None = None) -> list[str]:
    """Names of a set's items, "style/mimooh" and so on, in a fixed order; the first `limit` of them.

    dataset: "style" or "object", which are shipped, or the paper's "wikiart" or "dreambooth", whose images must be here.
    "reported" items are those of the tables; "development" items are for choosing settings, and in no table. ValueError
    for an unknown set or split and for a limit beyond its items, FileNotFoundError for images that are not here.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose from {', '.join(SPLITS)}")
    chosen = [f"{dataset}/{slug}" for slug, item in index(dataset).items() if item["split"] == split]
    if limit is not None and not 0 <= limit <= len(chosen):
        raise ValueError(f"{dataset} has {len(chosen)} {split} items: a number from 0 to {len(chosen)}, not {limit}")
    return chosen[:limit]


def load_item(name: str, caption: str = "") -> Item:
    """The item of a set ("style/mimooh", "dreambooth/cat"), or of a folder of images, which needs a `caption`.

    Every image is opened, once in a process, so that what cannot be used is refused here, before any training:
    FileNotFoundError for a name that is neither, ValueError for an empty folder, an unreadable image, one that would be left
    out, or a missing caption. Captions and other files beside the images are no matter; of images in sub-folders a warning
    is given.
    """
    dataset, _, slug = (name := str(name)).partition("/")
    if dataset in SETS and slug in shipped(dataset):
        entry = shipped(dataset)[slug]
        files = {role: tuple(DATASETS / dataset / image["file"] for image in entry.get(role, [])) for role in ROLES}
        item = Item(name, caption or entry["caption"], **files)
    elif slug and dataset in originals.SOURCES and slug in originals.index(dataset):
        entry = originals.index(dataset)[slug]
        item = Item(name, caption or entry["caption"], **{role: tuple(entry[role]) for role in ROLES})
    else:
        try:
            item = _folder_item(Path(name).expanduser(), caption)
        except FileNotFoundError:
            raise
        except (OSError, RuntimeError) as error:  # too long, not to be listed, of no known user
            raise FileNotFoundError(f"no item {name!r}: no folder can be read there ({error})") from error
    for path in (*item.training, *item.controls, *item.more):
        _check_opens(path)
    return item


def _check_opens(path: Path) -> None:
    """Open an image once in this process, and again when its file has changed."""
    try:
        now = path.stat()
    except OSError:
        open_image(path)  # which says what is wrong
        return
    _opened(path, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)


@cache
def _opened(path: Path, *_: int) -> None:
    open_image(path)


ROLES = ("training", "controls", "more")


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
    images = _images(folder)
    if not images:
        raise ValueError(f"no images in {folder}: it needs files ending in .jpg, .png, .webp or another image suffix")
    if not caption:
        raise ValueError(f'{folder} needs a caption, such as "a dog" or "art style of Claude Monet"')
    return Item(folder.name, caption, images)


def _images(folder: Path) -> tuple[Path, ...]:
    """The images in a folder, sorted by name; ValueError for a picture that would be left out, a warning for sub-folders."""
    visible = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    for path in visible:
        if path.is_dir() and any(file.suffix.lower() in SUFFIXES for file in path.glob("[!.]*")):
            warnings.warn(
                f"{path} holds images too, which are left out: {folder} is read without sub-folders", stacklevel=4
            )
        if reason := unusable(path):
            raise ValueError(f"{path} {reason}, or remove it; it would be left out otherwise")
    return tuple(path for path in visible if path.suffix.lower() in SUFFIXES and path.is_file())


def unusable(path: Path) -> str:
    """Why a file that is, or seems to be, a picture cannot be taken, and what to do; "" for all other files."""
    suffix = path.suffix.lower()
    pictured = suffix in OTHER_PICTURES or (mimetypes.guess_type(path.name)[0] or "").startswith("image/")
    if path.is_symlink() and not path.exists():
        return "is a link whose target is not there: mend it" if suffix in SUFFIXES or pictured else ""
    if not path.is_file() or suffix in SUFFIXES:
        return ""
    if pictured:
        return f"is an image of a kind ({suffix}) that Pillow cannot open here: convert it to PNG or JPEG"
    kind = _kind_by_content(path) if suffix not in TEXTS else None
    return (
        f"is an image ({kind}) by its content, but not by its name: give it the suffix .{kind.lower()}" if kind else ""
    )


TEXTS = (".txt", ".json", ".caption", ".csv", ".md", ".yaml", ".yml", ".toml", ".xml", ".html")


def _kind_by_content(path: Path) -> str | None:
    """Pillow's name of the format that a file begins as; None for no image."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            return None if image.format in NO_PICTURES else image.format
    except Image.DecompressionBombError:
        return "PNG"
    except Exception:  # any other file, in a reader that is not made for it
        return None


def open_image(path: Path) -> Image.Image:
    """The image as RGB, upright (EXIF orientation applied) and, where it is transparent, on white.

    FileNotFoundError for no file; ValueError, with the file and the reason, for whatever else Pillow says of it, and for a
    file that holds several pictures.
    """
    try:
        with Image.open(path) as file:
            if (n := getattr(file, "n_frames", 1)) > 1 and file.format not in MANY_IN_ONE:
                raise ValueError(
                    f"it holds {n} pictures, and only the first would be seen: save those meant as single files"
                )
            return _rgb(_upright(file, path))
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {path}") from None
    except Exception as error:  # broken files make Pillow raise errors of every kind
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is not an image that can be read ({reason}): remove or replace it") from None


def _upright(file: Image.Image, path: Path) -> Image.Image:
    """The image turned as its EXIF data say; as it is stored, with a warning, where they cannot be read."""
    file.load()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            image = ImageOps.exif_transpose(file)
        except Exception as error:  # as in open_image
            image, said = file, [warnings.WarningMessage(error, UserWarning, "", 0)]
    if said:
        reason = " ".join(str(said[0].message).split())
        warnings.warn(f"{path}: its EXIF data are broken ({reason}): the image is taken as it is stored", stacklevel=3)
    return image


def _rgb(image: Image.Image) -> Image.Image:
    """Pixels of 8 or 16 bits, of any of Pillow's modes, as RGB."""
    if image.mode.startswith("I;16"):  # 16-bit grey, which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are of Pillow's type {image.mode!r}, not of 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


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
