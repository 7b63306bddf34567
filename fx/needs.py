"""What experiments need that is not in the repository, and whether it is here: models, descriptor, judges, images.

    python -m fx.reproduce --profile paper --dry-run

Nothing is fetched here, and nobody is asked on the network. A Hub model is here if it lies in the local cache or at a path.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from huggingface_hub import try_to_load_from_cache

from fx import originals, settings
from fx.paths import EXTERNAL, MODELS
from fx.similarity import descriptor_path

# what a person must know before fetching: gigabytes of the weights that are read (float32), and the licence
KNOWN = {
    "CompVis/stable-diffusion-v1-4": (4.3, "CreativeML OpenRAIL-M"),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (4.3, "CreativeML OpenRAIL-M"),
    "stabilityai/stable-diffusion-xl-base-1.0": (13.9, "CreativeML OpenRAIL++-M"),
    "BAAI/AltDiffusion": (6.1, "CreativeML OpenRAIL-M"),
    "openai/clip-vit-base-patch16": (0.6, "MIT"),
    "facebook/dino-vits16": (0.1, "Apache-2.0"),
    "sscd_disc_mixup.torchscript.pt": (0.1, "MIT"),
    "sscd_disc_large.torchscript.pt": (0.2, "MIT"),
}
HUB = "from the Hugging Face Hub: hf download {}"
SSCD = "from facebookresearch/sscd-copy-detection on GitHub; into {}, with its SHA-256 in {}.sha256 beside it"


@dataclass(frozen=True)
class Need:
    """Something that must be here. role: what for; how: where to get it and where to put it; gigabytes: None if unknown."""

    name: str
    role: str
    here: bool
    how: str
    gigabytes: float | None = None
    licence: str = ""

    @property
    def on_hub(self) -> bool:
        """Whether it is a model that loading it would fetch from the Hub."""
        return "judge" in self.role or self.role in ("base model", "checkpoint")


def needs(sections: Iterable[str], changes: str = "") -> list[Need]:
    """What these sections of fx/settings.yaml need, with `change` as `settings.load` takes it; each thing once.

    What is shipped is not listed. ValueError for an unknown section or change.
    """
    found: dict[str, Need] = {}
    shipped = {path.name for path in MODELS.iterdir()}
    for section in dict.fromkeys(sections):
        for own in settings.load(section, changes).values():
            asked = {own.base: "base model", own.descriptor: "descriptor", own.judge: "judge"}
            asked |= {own.fidelity_judge: "judge of fidelity"} if own.fidelity_judge else {}
            for name, role in asked.items():
                if name not in shipped:
                    found.setdefault(name, _need(name, role))
        for name in settings.sets(section).values():
            if name in originals.SOURCES:
                source, place = originals.SOURCES[name], originals.place(name)
                how = f"{source.what}; into {place}, as {source.layout}"
                found.setdefault(name, Need(name, "images", place.is_dir(), how, source.gigabytes, source.licence))
    return list(found.values())


def published() -> list[Need]:
    """What the paper's Table 7 needs: two base models, and its checkpoints unless one at least is here."""
    from fx import tables, zoo

    found = dict.fromkeys(zoo.HUB.values(), "base model")
    checkpoints = dict.fromkeys(tables.paper(7).checkpoint, "checkpoint")  # which may vanish from the Hub one by one
    found |= {} if any(map(has_model, checkpoints)) else checkpoints
    return [_need(name, role) for name, role in found.items()]


def _need(name: str, role: str) -> Need:
    gigabytes, licence = KNOWN.get(name.partition("@")[0], (None, ""))
    if role == "descriptor":
        return Need(name, role, _has_descriptor(name), SSCD.format(EXTERNAL, Path(name).name), gigabytes, licence)
    repository, _, revision = name.partition("@")
    how = HUB.format(f"{repository} --revision {revision}" if revision else repository)
    return Need(name, role, has_model(name), how, gigabytes, licence)


def _has_descriptor(name: str) -> bool:
    try:
        descriptor_path(name)
    except FileNotFoundError:
        return False
    return True


def has_model(name: str) -> bool:
    """Whether a model is at a path or in the local cache of the Hub, as far as a look at its first file tells."""
    if Path(name).expanduser().exists():
        return True
    repository, _, revision = name.partition("@")
    files = ("model_index.json", "config.json", "pytorch_lora_weights.safetensors")
    if repository.count("/") != 1:
        return False
    return any(isinstance(try_to_load_from_cache(repository, file, revision=revision or None), str) for file in files)


def table(found: Iterable[Need]) -> pd.DataFrame:
    """The needs as a table: what, for what, GB, licence, and whether it is here."""
    columns = ["what", "for", "GB", "licence", "here"]
    return pd.DataFrame(
        [(need.name, need.role, need.gigabytes, need.licence, "yes" if need.here else "no") for need in found],
        columns=columns,
    )


def check(found: Iterable[Need]) -> None:
    """FileNotFoundError, in one message, if anything is missing: what, how large, and where to put it."""
    if missing := [need for need in found if not need.here]:
        lines = []
        for need in missing:
            size = f", {need.gigabytes:g} GB" if need.gigabytes else ""
            licence = f", {need.licence}" if need.licence else ""
            lines.append(f"  {need.name} ({need.role}{size}{licence}): {need.how}")
        raise FileNotFoundError("\n".join([f"{len(missing)} things are not here that this run needs:", *lines]))
