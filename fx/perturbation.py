"""An item's training images as an artist may change them before anybody has them, and as whoever trains may clean them."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from fx import results
from fx.datasets import load_images, load_item, to_uint8
from fx.defenses import check_perturbation, check_purification, perturb, purify
from fx.families import check_caption, image_size, noising
from fx.models import check_fits, load_pipeline, model_folder


@dataclass(frozen=True)
class Perturb:
    """The training images of an item, each changed within `eps` of 255 grey levels (fx.defenses.perturb).

    item: as in a TrainingItem; base: the model that they are changed against, which need not be the one that is fine-tuned;
    caption: what it is told of them, since an artist does not know a later caption. The images are those of the base
    model's size, and lie in images/00000.png, ... in the item's order.
    """

    VERSION: ClassVar[int] = 1

    item: str
    method: str = "advdm"
    eps: int = 8
    steps: int = 100
    step_size: float = 1.0
    base: str = "mini-sd"
    caption: str = "a picture"
    seed: int = 0

    def __post_init__(self):
        check_perturbation(self.method, self.eps, self.steps, self.step_size, self.seed)


@dataclass(frozen=True)
class Purify:
    """Images after what is to undo a perturbation (fx.defenses.purify): of a Perturb, or of an item that nobody has changed.

    how: a name of fx.defenses.PURIFICATIONS, with a strength if it is not the usual one ("jpeg:50"); base: the model whose
    autoencoder or network does it, where one does.
    """

    VERSION: ClassVar[int] = 1

    of: Perturb | str
    how: str = "jpeg"
    base: str = "mini-sd"

    def __post_init__(self):
        check_purification(self.how)
        if not isinstance(self.of, Perturb | str):
            raise ValueError(f"of {self.of!r} must be a Perturb or the name of an item")


Changed = Perturb | Purify


def item_of(changed: Changed) -> str:
    """The item whose images were changed."""
    if isinstance(changed, Perturb):
        return changed.item
    return changed.of if isinstance(changed.of, str) else changed.of.item


def changed_images(changed: Changed) -> tuple[Path, ...]:
    """The paths of the changed images, which are made now if they are missing."""
    return tuple(sorted((results.complete(changed) / "images").glob("*.png")))


def _sources(item: str, base: str) -> dict[str, str]:
    found = {"base": results.sha256_of(model_folder(base))}
    return found | {f"image {i}": results.sha256_of(path) for i, path in enumerate(load_item(item, "any").training)}


@results.inputs.register
def _(spec: Perturb) -> dict[str, str]:
    check_fits(spec.base, spec.caption)
    return _sources(spec.item, spec.base)


@results.inputs.register
def _(spec: Purify) -> dict[str, str]:
    if isinstance(spec.of, str):
        return _sources(spec.of, spec.base)
    return {"base": results.sha256_of(model_folder(spec.base))}


@results.perform.register
def _(spec: Perturb, folder: Path) -> None:
    """Write images/NNNNN.png; an interrupted run goes on with the images that are missing."""
    pipeline = load_pipeline(spec.base)
    noising(pipeline)
    check_caption(pipeline, spec.caption)
    pictures = to_uint8(load_images(load_item(spec.item, "any").training, image_size(pipeline)))
    scratch = results.scratch(spec)
    options = {name: getattr(spec, name) for name in ("method", "eps", "steps", "step_size", "caption", "seed")}
    with tqdm(
        total=len(pictures) * spec.steps, desc=f"{spec.method} {spec.item[-40:]}", mininterval=2, leave=False
    ) as bar:
        for number, picture in enumerate(pictures):
            if (kept := scratch / f"{number}.npy").exists():
                bar.update(spec.steps)
            else:
                done = perturb(pipeline, picture[None], **options, numbers=[number], progress=bar.update)[0]
                np.save(part := scratch / "part.npy", done)
                part.replace(kept)
    changed = [np.load(scratch / f"{number}.npy") for number in range(len(pictures))]
    _write(folder, np.stack(changed))


@results.perform.register
def _(spec: Purify, folder: Path) -> None:
    """Write images/NNNNN.png."""
    pipeline = load_pipeline(spec.base)
    paths = load_item(spec.of, "any").training if isinstance(spec.of, str) else changed_images(spec.of)
    _write(folder, purify(spec.how, to_uint8(load_images(paths, image_size(pipeline))), pipeline))


def _write(folder: Path, pictures: np.ndarray) -> None:
    (folder / "images").mkdir()
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"images/{number:05d}.png")
