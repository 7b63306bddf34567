"""What lies on disk: which kind of checkpoint it is, whether it is whole, and what it says about its own training.

Only safetensors are read. Everything here happens before a model is built, so that a wrong file costs seconds.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError, safe_open

from fx.paths import MODELS

LORA_FILE = "pytorch_lora_weights.safetensors"
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
WEIGHT_PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae")
LORA_MARKS = ("lora_down", "lora_up", "lora_A", "lora_B", "lora.down", "lora.up", "lora_linear_layer")


def find(name: str) -> Path:
    """The local file or folder of a model: a shipped name, a path, or a Hub id with an optional "@revision".

    A Hub id ("owner/name" or "owner/name@v1") is looked up in the local cache and downloaded where that is possible.
    Raises FileNotFoundError, with the shipped names, for what is none of these.
    """
    for place in (MODELS / str(name), Path(name).expanduser()):
        if place.exists() and str(name):
            return place
    repository, _, revision = str(name).partition("@")
    if repository.count("/") == 1 and not repository.startswith((".", "/", "~")):
        return _snapshot(repository, revision or None)
    shipped = ", ".join(sorted(path.parent.name for path in MODELS.glob("*/model_index.json")))
    raise FileNotFoundError(
        f"unknown model {str(name)!r}: it is no file or folder, no Hub id (owner/name or owner/name@revision) and no "
        f"shipped model (shipped models: {shipped or 'none'})"
    )


def _snapshot(repository: str, revision: str | None) -> Path:
    """The folder of a Hub repository; of a pipeline only the parts that are read, not the same weights once more."""
    kinds = ("json", "txt", "model", "safetensors")
    try:
        hf_hub_download(repository, "model_index.json", revision=revision)
        wanted = {"allow_patterns": ["model_index.json", *(f"*/*.{kind}" for kind in kinds)]}
        wanted["ignore_patterns"] = ["safety_checker/*", "*.fp16.*", "*.non_ema.*"]
    except (LocalEntryNotFoundError, EntryNotFoundError, RepositoryNotFoundError, HFValidationError, OSError):
        wanted = {"allow_patterns": [f"*.{kind}" for kind in kinds]}
    try:
        return Path(snapshot_download(repository, revision=revision, **wanted))
    except (LocalEntryNotFoundError, RepositoryNotFoundError, HFValidationError, OSError) as error:
        asked = repository + (f" at revision {revision}" if revision else "")
        raise FileNotFoundError(
            f"{asked} is no path on this machine, and the Hub did not give it: {str(error).splitlines()[0]}"
        ) from error


def kind_of(path: Path) -> str:
    """What kind of checkpoint a path is, once its weights are known to be whole safetensors.

    pipeline: a diffusers folder with model_index.json; parts: a folder with unet/ or transformer/; network: a folder that
    is one itself; lora: a file, or a folder with one, in diffusers' or kohya's layout; peft: a folder as
    PeftModel.save_pretrained leaves it; single file: a whole model in one file. Raises FileNotFoundError or ValueError,
    naming the file, for anything else: nothing there, several candidates, pickles, truncated files.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: check the path")
    if path.is_file():
        return "lora" if is_lora(path) else "single file"
    refuse_pickles(path)
    check_folder(path)
    if (path / "model_index.json").is_file():
        return "pipeline"
    if any((path / part / "config.json").is_file() for part in ("unet", "transformer")):
        return "parts"
    if (path / "config.json").is_file() and "_class_name" in _read_json(path / "config.json"):
        return "network"
    if any((folder / "adapter_config.json").is_file() for folder in (path, path / "unet", path / "transformer")):
        return "peft"
    if lora_file(path):
        return "lora"
    raise FileNotFoundError(
        f"{path} holds no model: neither model_index.json, nor a unet/ or transformer/ folder, nor a LoRA "
        f"({LORA_FILE}, adapter_config.json or a single .safetensors file with LoRA weights)"
    )


def lora_file(path: Path) -> Path | None:
    """The LoRA file that a path is or that a folder holds; ValueError if a folder holds several."""
    if path.is_file():
        return path
    if (path / LORA_FILE).is_file():
        return path / LORA_FILE
    found = [file for file in sorted(path.glob("*.safetensors")) if is_lora(file)]
    if len(found) > 1:
        raise ValueError(f"{path} holds several LoRA files ({', '.join(f.name for f in found)}): name one of them")
    return found[0] if found else None


def is_lora(file: Path) -> bool:
    """Whether a safetensors file holds LoRA weights, by the names of its tensors."""
    return any(mark in key for key in keys(file) for mark in LORA_MARKS)


def keys(file: Path) -> list[str]:
    """Names of the tensors in a safetensors file; ValueError for a pickle, or a file that is truncated or no safetensors."""
    if file.suffix in PICKLES:
        raise ValueError(_pickle(file))
    if file.suffix != ".safetensors":
        raise ValueError(
            f"{file} is no model: weights are read from .safetensors files and from folders that hold them"
        )
    try:
        with safe_open(file, "pt") as tensors:
            return list(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is truncated or no safetensors file ({error}): fetch it again") from error


def refuse_pickles(folder: Path) -> None:
    """ValueError if a folder, or a part of the model in it, has its weights as a pickle only."""
    for part in (folder, *(folder / name for name in WEIGHT_PARTS)):
        pickles = [file for file in sorted(part.glob("*")) if file.suffix in PICKLES and "scheduler" not in file.name]
        if pickles and not any(part.glob("*.safetensors")):
            raise ValueError(_pickle(pickles[0]))


def _pickle(file: Path) -> str:
    return (
        f"{file} is a pickle, which can run code when it is read: only safetensors are; "
        "convert it where it can be trusted (save_pretrained writes safetensors)"
    )


def check_folder(folder: Path) -> None:
    """ValueError for a truncated safetensors file in a folder or in a part of the model, or one that its index misses."""
    for part in (folder, *(folder / name for name in WEIGHT_PARTS)):
        for file in sorted(part.glob("*.safetensors")):
            keys(file)
        for index in sorted(part.glob("*.safetensors.index.json")):
            shards = set(_read_json(index).get("weight_map", {}).values())
            if missing := sorted(shard for shard in shards if not (part / shard).is_file()):
                raise FileNotFoundError(f"{index} names {missing[0]}, which is not there: fetch the folder again")
        if (part / "config.json").is_file():
            _read_json(part / "config.json")


def _read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no valid JSON ({error}): fetch it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds {type(content).__name__} instead of settings: fetch it again")
    return content


@dataclass(frozen=True)
class Metadata:
    """What a checkpoint says about its training; None where it says nothing.

    base: name of the base model; clip_skip: layers left out at the end of the text encoder; images: number of different
    training images; images_with_repeats: every image counted as often as an epoch repeats it; tags: caption tags, most
    frequent first, with the number of images that carry each.
    """

    base: str | None = None
    clip_skip: int | None = None
    images: int | None = None
    images_with_repeats: int | None = None
    tags: tuple[tuple[str, int], ...] = ()


def metadata(path: Path) -> Metadata:
    """The `ss_*` entries that kohya's scripts leave in a file's header, as far as they can be read.

    `ss_num_train_images` counts images times repeats, so the number of images is taken from the folders in
    `ss_dataset_dirs` or `ss_datasets`. Raises ValueError for a file that is no whole safetensors file.
    """
    file = lora_file(path) if path.is_dir() else path
    if file is None:
        return Metadata()
    keys(file)
    with safe_open(file, "pt") as tensors:
        entries = tensors.metadata() or {}
    folders = _folders(entries)
    counts = [int(entry["img_count"]) for entry in folders if "img_count" in entry]
    tags: dict[str, int] = {}
    for frequencies in (_json_entry(entries, "ss_tag_frequency") or {}).values():
        for tag, count in frequencies.items():
            tags[tag.strip()] = tags.get(tag.strip(), 0) + int(count)
    clip_skip = entries.get("ss_clip_skip", "None")
    return Metadata(
        base=entries.get("ss_sd_model_name") or entries.get("ss_base_model_version") or None,
        clip_skip=int(clip_skip) if clip_skip.isdigit() else None,
        images=sum(counts) if counts else None,
        images_with_repeats=_whole_number(entries.get("ss_num_train_images")),
        tags=tuple(sorted(tags.items(), key=lambda entry: (-entry[1], entry[0]))),
    )


def _json_entry(entries: dict[str, str], name: str) -> dict | list | None:
    try:
        return json.loads(entries.get(name, "null"))
    except json.JSONDecodeError:
        return None


def _folders(entries: dict[str, str]) -> list[dict]:
    """One dictionary per folder of training images."""
    if directories := _json_entry(entries, "ss_dataset_dirs"):
        return list(directories.values())
    datasets = _json_entry(entries, "ss_datasets") or []
    return [subset for dataset in datasets for subset in dataset.get("subsets", [])]


def _whole_number(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None
