"""Fine-tuned models as people make and publish them, to be treated as downloads (Sec. 5.5, App. F; notebook 08).

    related = relatives(chosen)                      # two more base models, each a relative of the first, to be published
    models = members(chosen, ["style/mimooh", "object/cactus"], ["mini-sd", *map(str, map(published, related))])
    known = gathered(models[0].lookup(["mini-sd"]))  # base, caption and N0, as an outsider knows them

What a `Member` holds beside its path is for whoever evaluates the attack: how it was made, of what base, on which images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

import pandas as pd

from fx import checkpoints, datasets, tables
from fx.finetune import TrainingItem, load_training
from fx.leads import Lookup
from fx.models import model_folder
from fx.paths import EXTERNAL
from fx.publishing import Published, published
from fx.settings import Settings
from fx.tuned import own_caption

RARE = "sks"  # the word without a meaning that DreamBooth's users put before the class


def with_rare(caption: str) -> str:
    """ "a sks dog" of "a dog"."""
    article, *rest = caption.split()
    return " ".join([article, RARE, *rest])


@dataclass(frozen=True)
class Kind:
    """A way to make and publish a model.

    form, says: as in `Published`; length: how many times the usual training steps; rare: whether it learns the caption
    "a sks …"; changes: other fields of the FineTune.
    """

    method: str
    form: str
    says: bool = False
    length: float = 1.0
    rare: bool = False
    changes: Mapping[str, object] = field(default_factory=dict)


def _lora(form: str, rank: int, says: bool = False, length: float = 1.0, rare: bool = False, **changes) -> Kind:
    return Kind("lora", form, says, length, rare, {"rank": rank, "alpha": rank} | changes)


KINDS = {
    "folder": Kind("dreambooth", "parts", says=True),
    "LoRA rank 64": _lora("diffusers", 64, says=True),
    "single file": Kind("dreambooth", "single file"),
    "kohya": _lora("kohya", 16, says=True),
    "half precision": Kind("dreambooth", "fp16", says=True),
    "kohya, no header": _lora("kohya", 16),
    "rare token": Kind("dreambooth", "pipeline", rare=True),
    "LoRA rank 4": _lora("peft", 4),
    "few steps": Kind("dreambooth", "pipeline", says=True, length=0.5),
    "LoRA rank 128": _lora("diffusers", 128),
    "many steps": Kind("dreambooth", "parts", length=2.0),
    "kohya, few steps": _lora("kohya", 32, says=True, length=0.5),
    "text encoder": Kind("dreambooth", "pipeline", changes={"text_encoder": True}),
    "kohya, text encoder": _lora("kohya", 16, text_encoder=True),
    "whole pipeline": Kind("dreambooth", "pipeline", says=True),
    "DoRA": _lora("kohya", 16, says=True, adapter="dora"),
    "half precision, no card": Kind("dreambooth", "fp16"),
    "LoHa": _lora("kohya", 16, adapter="loha"),
    "rare token, says so": Kind("dreambooth", "parts", says=True, rare=True),
    "LoRA, rare token": _lora("peft", 32, rare=True),
}


@dataclass(frozen=True)
class Member:
    """A model of the zoo, or one that others have published.

    kind: in words; method: "dreambooth" or "lora"; base: the model it was made of; training: the images it was fine-tuned
    on, None where they are not at hand; model: how it was made, None for somebody else's; online: its Hub id, "" for one of
    ours; n_training: N0 where its maker has told it outside of the file.
    """

    kind: str
    method: str
    base: str
    training: TrainingItem | None
    model: Published | None = None
    online: str = ""
    n_training: int | None = None

    @property
    def path(self) -> str:
        """The file or folder, which is made now if it is missing, or the Hub id."""
        return self.online or str(published(self.model))

    @property
    def caption(self) -> str | None:
        """The caption it was fine-tuned with; None for somebody else's."""
        return own_caption(self.model.model) if self.model else None

    def lookup(self, bases: Sequence[str], candidates: Sequence[str] = ()) -> Lookup:
        """What an outsider asks of it: which of these base models, and which of these captions if it does not say."""
        return Lookup(self.path, tuple(bases), tuple(candidates))


def relatives(chosen: Mapping[str, Settings], artists: int = 4, objects: int = 6) -> list[Published]:
    """Two base models made of the first: one fine-tuned on development artists, one on development objects, so many each."""
    s = chosen["dreambooth"]
    sets = {
        "drawings": datasets.names("style", "development", artists),
        "things": datasets.names("object", "development", objects),
    }
    stem = model_folder(s.base).name
    return [Published(s.fine_tune(*items), "pipeline", name=f"{stem}-{name}") for name, items in sets.items()]


def members(
    chosen: Mapping[str, Settings], items: Sequence[str], bases: Sequence[str], kinds: Sequence[str] = tuple(KINDS)
) -> list[Member]:
    """One model of each kind, of an item and a base each.

    Within a method artists and objects take turns, and so do the bases, the first of which comes twice as often; a rare
    token takes an object. Items are used again where there are fewer than kinds. ValueError for an unknown kind, without
    any item or base, and for a rare token without an object.
    """
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"unknown kind {unknown[0]!r}: choose from {', '.join(KINDS)}")
    if not items or not bases:
        raise ValueError("no item or no base model: name at least one of each")
    objects = [item for item in items if datasets.kind(item) == "object"]
    others = [item for item in items if item not in objects]
    if not objects and (rare := [kind for kind in kinds if KINDS[kind].rare]):
        raise ValueError(f"{rare[0]!r} takes an object, and among the items is none")
    queues = {True: cycle(objects or others), False: cycle(others or objects)}
    next_base = {method: cycle([bases[0], *bases]) for method in chosen}
    turn = {method: cycle((False, True)) for method in chosen}
    found = []
    for name in kinds:
        kind = KINDS[name]
        item = next(queues[next(turn[kind.method]) or kind.rare])
        training = TrainingItem(item, with_rare(datasets.load_item(item).caption) if kind.rare else None)
        s, base = chosen[kind.method], next(next_base[kind.method])
        steps = max(1, round(kind.length * s.steps_per_image))
        made = s.fine_tune(training, base=base, steps_per_image=steps, **kind.changes)
        found.append(Member(name, kind.method, base, training, Published(made, kind.form, kind.says)))
    return found


HUB = {
    "sd-v1.5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl-v1.0": "stabilityai/stable-diffusion-xl-base-1.0",
}


def online(training: str | Path = "") -> list[Member]:
    """The six checkpoints that the paper names (Table 7), by Hub id, with N0 as it stands there.

    training: a folder with their training images ("" for data/external/checkpoints), for each a folder by the last part of
    its id ("mau-cat"); those that are not there can be attacked but not scored.
    """
    found = []
    for row in tables.paper(7).itertuples():
        place = Path(training).expanduser() if str(training) else EXTERNAL / "checkpoints"
        folder = place / row.checkpoint.rpartition("/")[2]
        images = TrainingItem(str(folder), "unknown") if folder.is_dir() else None
        base, n_training = HUB[row.base_model], int(row.N0)
        found.append(Member("on the Hub", row.method, base, images, online=row.checkpoint, n_training=n_training))
    return found


def reachable(models: Sequence[Member]) -> tuple[list[Member], list[str]]:
    """Those whose checkpoint and base model can be had, and for each other a line that says why not."""
    found, lines = [], []
    for member in models:
        try:
            for name in filter(None, (member.online, member.base)):
                checkpoints.kind_of(checkpoints.find(name))
            found.append(member)
        except (FileNotFoundError, ValueError) as error:
            lines.append(f"{member.online or member.kind} is left out: {error}")
    return found, lines


def suspects() -> list[str]:
    """The captions to try for somebody who suspects the shipped artists and objects: theirs, and "a sks …" of objects."""
    artists, objects = ([item["caption"] for item in datasets.shipped(name).values()] for name in datasets.SETS)
    return [*artists, *objects, *map(with_rare, objects)]


def listing(models: Sequence[Member]) -> pd.DataFrame:
    """Table 7 of these models: kind, base, method, N0 and the megabytes of the weights, a row each."""
    columns = ["checkpoint", "base", "method", "N0", "MB"]
    rows = [
        (
            member.online or member.kind,
            Path(member.base).name,
            member.method,
            member.n_training if member.training is None else load_training(member.training).n_training,
            megabytes(member.path),
        )
        for member in models
    ]
    return pd.DataFrame(rows, columns=columns)


def megabytes(path: str) -> float:
    """The weights at a path or Hub id, in 10^6 bytes."""
    place = checkpoints.find(path)
    files = [place] if place.is_file() else place.rglob("*.safetensors")
    return sum(file.stat().st_size for file in files) / 1e6
