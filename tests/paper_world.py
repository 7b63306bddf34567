"""What the profile paper needs, in small: tiny random models of the real classes in a cache of the Hub as it lies on disk,
SSCD as a TorchScript file, and WikiArt and DreamBooth in their homes' layouts.
"""

import hashlib
from pathlib import Path

import numpy as np
import tiny
import torch
from PIL import Image

from fx import quality, tables, zoo
from fx.cost import Cost, make

REVISION = "0" * 40
TOKENS = 128  # a tiny tokenizer has a token per letter
WORDS = ("purple", "window", "garden", "yellow", "basket", "silver", "rabbit", "winter")  # but for these
BASES = {
    "CompVis/stable-diffusion-v1-4": "sd1",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd1",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "BAAI/AltDiffusion": "alt",
}
ARTISTS = {"Fauvism/henri-matisse": 24, "Impressionism/claude-monet": 24} | {
    f"Cubism/artist-{i}": 14 for i in range(20)
}
SUBJECTS = {"dog": "dog", "dog2": "dog", "can": "can", "vase": "vase"}


def build(folder: Path) -> dict[str, str]:
    """Everything below `folder`; the environment variables that make it be found."""
    cache, external = folder / "hub", folder / "external"
    for number, (name, family) in enumerate(BASES.items()):
        tiny.save(family, snapshot(cache, name), seed=number, tokens=TOKENS, words=WORDS)
    tiny.save_judge("clip", snapshot(cache, quality.CLIP))
    tiny.save_judge("vit", snapshot(cache, quality.DINO))
    for row in tables.paper(7).itertuples():
        base, place = snapshot(cache, zoo.HUB[row.base_model]), snapshot(cache, row.checkpoint)
        make(place.parent, Cost(str(base), row.method, rank=2))
        place.rmdir()
        (place.parent / "tuned").rename(place)
        paint(external / "checkpoints" / row.checkpoint.rpartition("/")[2], [f"{i}.png" for i in range(5)], 200)
        (place / "README.md").write_text(f"---\ninstance_prompt: {row.checkpoint[-12:]}\n---\n")
    descriptor(external / "sscd_disc_mixup.torchscript.pt")
    for number, (where, works) in enumerate(ARTISTS.items()):
        style, artist = where.split("/")
        paint(external / "wikiart" / style, [f"{artist}_work-{i}.jpg" for i in range(works)], number)
    for number, subject in enumerate(SUBJECTS):
        paint(external / "dreambooth" / subject, [f"{i:02d}.jpg" for i in range(5)], 100 + number)
    lines = ["Classes", "", "subject_name,class", *(f"{name},{kind}" for name, kind in SUBJECTS.items()), ""]
    (external / "dreambooth/prompts_and_classes.txt").write_text("\n".join(lines))
    return {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "FX_EXTERNAL": str(external)}


def snapshot(cache: Path, name: str) -> Path:
    """The folder of a repository's files ("name" or "name@revision") in a cache of the Hub, made if it is missing."""
    name, _, revision = name.partition("@")
    repository = cache / f"models--{name.replace('/', '--')}"
    (pointer := repository / "refs" / (revision or "main")).parent.mkdir(parents=True, exist_ok=True)
    pointer.write_text(REVISION)
    (place := repository / "snapshots" / REVISION).mkdir(parents=True, exist_ok=True)
    return place


def descriptor(file: Path) -> None:
    """A TorchScript file that describes an image by its colours on a grid, and its SHA-256 beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    grid = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten())
    torch.jit.trace(grid, torch.zeros(1, 3, 32, 32)).save(str(file))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    file.with_name(f"{file.name}.sha256").write_text(f"{digest}  {file.name}\n")


def paint(folder: Path, names: list[str], seed: int) -> None:
    """Pictures of coloured tiles under these names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, pixels in zip(names, tiny.pictures(len(names), seed), strict=True):
        Image.fromarray(np.asarray(pixels)).save(folder / name, quality=95)
