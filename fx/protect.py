"""Change the images of a folder so that a diffusion model learns less of them (fx.defenses.perturb).

python -m fx.protect drawings --out protected --method advdm --eps 8

Every image keeps its name, its size and its colour profile and is written as PNG, since a lossy format would undo a part of
the change. A transparent one becomes opaque, on white.
Interrupted and called again, the same command goes on with the images that are missing.
"""

import argparse
import json
import os
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm import tqdm

from fx import command
from fx.datasets import load_item, open_image
from fx.defenses import PERTURBATIONS, check_perturbation, perturb
from fx.families import image_size, noising, size_factor
from fx.models import check_fits, load_pipeline
from fx.results import sha256_of

RECORD = "protected.json"
LIMITS = """No such change protects for certain. It is made against one base model and tried against no other. Saving as
JPEG, blurring, resizing, a round trip through an autoencoder or regeneration by a model undo a part of it. Whoever has the
unchanged image already is not kept from anything. Keep the originals."""


@dataclass(frozen=True)
class Settings:
    """How images are changed; the record in the output folder holds it, so that a run goes on with the same."""

    base: str
    method: str
    eps: int
    steps: int
    step_size: float
    caption: str
    seed: int


def working_size(size: tuple[int, int], side: int, multiple: int) -> tuple[int, int]:
    """Width and height that an image of `size` is worked on at: the shorter side `side`, the other in proportion.

    Both are multiples of `multiple`, which divides `side`.
    """
    width, height = size
    longer = max(side, round(side * max(size) / min(size) / multiple) * multiple)
    return (longer, side) if width >= height else (side, longer)


def protected(
    pipeline: DiffusionPipeline, image: Image.Image, settings: Settings, number: int, progress=lambda: None
) -> Image.Image:
    """The changed image, RGB of the same size, no value further than settings.eps grey levels from that of `image`.

    number: by which the image owns its draws. The change is computed at the size of the model's training images and, where
    the image is larger or smaller, enlarged or shrunk with it.
    """
    size = working_size(image.size, image_size(pipeline), size_factor(pipeline))
    seen = np.asarray(image.resize(size, Image.Resampling.LANCZOS) if size != image.size else image)
    options = {name: getattr(settings, name) for name in ("method", "eps", "steps", "step_size", "caption", "seed")}
    changed = perturb(pipeline, seen[None], **options, numbers=[number], progress=progress)[0]
    change = changed.astype(np.float32) - seen
    if size != image.size:
        layers = [Image.fromarray(change[..., c]).resize(image.size, Image.Resampling.BICUBIC) for c in range(3)]
        change = np.stack([np.asarray(layer) for layer in layers], axis=2)
    change = change.round().clip(-settings.eps, settings.eps)
    return Image.fromarray((np.asarray(image) + change).clip(0, 255).astype(np.uint8))


def plan(folder: Path, out: Path, settings: Settings) -> dict[str, Path]:
    """Images by the name that they are written under; errors for whatever could go wrong later.

    ValueError for images that cannot be read, two that would be written under one name, and an output folder that holds
    anything but the results of the same command.
    """
    images = load_item(str(folder), "any").training
    names: dict[str, Path] = {}
    for path in images:
        if (name := f"{path.stem}.png") in names:
            raise ValueError(f"{names[name].name} and {path.name} would both become {name}: rename one of them")
        names[name] = path
    if out.resolve() == folder.resolve():
        raise ValueError(f"--out {out} is the folder of the originals: name another one")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a folder")
    known = record(out)
    if known and known["settings"] != asdict(settings):
        raise ValueError(f"{out} holds images that were changed with {known['settings']}: name another folder")
    present = {path.name for path in out.iterdir() if not path.name.startswith(".")} if out.is_dir() else set()
    if foreign := sorted(present - {RECORD} - set(known.get("images", {}))):
        raise ValueError(f"{out} holds {foreign[0]}, which is not overwritten: name another folder")
    return names


def record(out: Path) -> dict:
    """What the output folder says about itself; empty where it says nothing. ValueError for a record that is not ours."""
    if not (file := out / RECORD).is_file():
        return {}
    try:
        read = json.loads(file.read_bytes())
    except ValueError:
        read = None
    if not isinstance(read, dict) or not all(isinstance(read.get(part), dict) for part in ("settings", "images")):
        raise ValueError(f"{file} is not what fx.protect wrote: name another folder")
    return read


def run(folder: Path, out: Path, settings: Settings) -> list[Path]:
    """Change the images of `folder` that are not done yet; the paths of all changed images."""
    check_perturbation(settings.method, settings.eps, settings.steps, settings.step_size, settings.seed)
    names, known = plan(folder, out, settings), record(out)
    done = known.get("images", {})
    sources = {name: sha256_of(path) for name, path in names.items()}
    waiting = [name for name in names if done.get(name) != sources[name] or not (out / name).is_file()]
    if not waiting:
        return [out / name for name in names]
    check_fits(settings.base, settings.caption)
    pipeline = load_pipeline(settings.base)
    noising(pipeline)
    out.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(waiting) * settings.steps, desc=settings.method, unit="step", mininterval=1) as bar:
        for name in waiting:
            number = zlib.crc32(os.fsencode(name))
            image = protected(pipeline, open_image(names[name]), settings, number, bar.update)
            image.save(part := out / ".next.part", "PNG", icc_profile=colour_profile(names[name]))
            (out / name).unlink(missing_ok=True)  # of an original that has changed: it must not count as this one
            done |= {name: sources[name]}
            _write(out, {"settings": asdict(settings), "images": done})
            os.replace(part, out / name)
    return [out / name for name in names]


def colour_profile(path: Path) -> bytes | None:
    """The ICC profile that tells what an RGB image's values mean; None for none, and for an image of other colours."""
    with Image.open(path) as file:
        return file.info.get("icc_profile") if file.mode in ("RGB", "RGBA") else None


def _write(out: Path, content: dict) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    (part := out / f".{RECORD}.part").write_bytes(text.encode("utf-8", "surrogatepass"))  # names need not be UTF-8
    os.replace(part, out / RECORD)


def main(words: list[str] | None = None) -> None:
    """Read the arguments, change the images, say how much."""
    kinds = "; ".join(f"{name}: {kind.meaning}" for name, kind in PERTURBATIONS.items())
    parser = argparse.ArgumentParser("python -m fx.protect", description=__doc__.split("\n\n")[0], epilog=LIMITS)
    parser.add_argument("folder", type=Path, help="of images; it is not changed")
    parser.add_argument("--out", type=Path, required=True, help="folder for the changed images; nothing is overwritten")
    parser.add_argument("--method", default="advdm", choices=PERTURBATIONS, help=kinds)
    parser.add_argument("--eps", type=int, default=8, help="budget in grey levels of 255 (default 8)")
    parser.add_argument("--steps", type=int, default=100, help="of gradient ascent (default 100)")
    parser.add_argument("--step-size", type=float, default=1.0, help="in grey levels (default 1)")
    parser.add_argument(
        "--base",
        default="mini-sd",
        help="base model to protect against: a name, folder or Hub id (default mini-sd, a small model of drawings)",
    )
    parser.add_argument("--caption", default="a picture", help="what the base model is told of the images")
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args(words))
    folder, out = options.pop("folder"), options.pop("out")
    settings = Settings(**options)
    written = run(folder, out, settings)
    print(f"{len(written)} images in {out}, each within {settings.eps} of 255 grey levels of its original")
    print(LIMITS)


if __name__ == "__main__":
    command.run("fx.protect", main)
