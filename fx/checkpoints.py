"""What lies on disk: which kind of checkpoint it is, whether it is whole, and what it says about its own training.

Only safetensors are read. Everything here happens before a model is built, so that a wrong file costs seconds.
"""

import functools
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, snapshot_download
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
NOT_WEIGHTS = ("optimizer", "scheduler", "scaler", "sampler", "random_states", "rng_state", "training_args")
LORA_MARKS = ("lora_down", "lora_up", "lora_A", "lora_B", "lora.down", "lora.up", "lora_linear_layer", "_lora.")
LORA_MARKS += (".hada_w", ".lokr_w", ".oft_", ".lora_mid", ".dora_scale", "lora_magnitude_vector", "bundle_emb.")
LORA_MARKS += ("lora_unet_", "lora_te", "lycoris_", "base_model.model.")
DIFFERENCES = (".diff", ".diff_b", ".w_norm", ".b_norm")
PREDICTION_ENTRIES = ("modelspec.prediction_type", "modelspec.predict_key")
PREDICTIONS = {"epsilon": "epsilon", "eps": "epsilon", "noise": "epsilon", "sample": "sample", "x0": "sample"}
PREDICTIONS |= dict.fromkeys(("v", "v_prediction", "v-prediction", "v_pred", "velocity"), "v_prediction")
PREDICTIONS |= dict.fromkeys(("flow", "flow_prediction", "rectified_flow"), "flow_prediction")
V_ARCHITECTURE = "stable-diffusion-v2-768-v"
# a part's weights: diffusers' or transformers' name, a variant, a shard
WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|model)(?:\.([\w-]+?))?(?:-\d+-of-\d+)?\.safetensors")


def find(name: str) -> Path:
    """The local file or folder of a model: a shipped name, a path, or a Hub id with an optional "@revision".

    A Hub id ("owner/name" or "owner/name@v1") is looked up in the local cache and downloaded where that is possible.
    Raises FileNotFoundError, with the shipped names, for what is none of these. A missing file of weights is not asked for
    at the Hub, which would learn its name.
    """
    try:
        for place in (MODELS / str(name), Path(name).expanduser()):
            if place.exists() and str(name):
                return place
    except (OSError, RuntimeError, ValueError) as error:  # too long, of no known user, with a zero byte
        raise FileNotFoundError(f"unknown model {str(name)!r}: it cannot be a path ({error})") from error
    if Path(name).suffix.lower() in (".safetensors", *PICKLES):
        raise FileNotFoundError(f"unknown model {str(name)!r}: there is no such file, check the path")
    repository, _, revision = str(name).partition("@")
    if repository.count("/") == 1 and not repository.startswith((".", "/", "~")):
        return _snapshot(repository, revision or None)
    shipped = ", ".join(sorted(path.parent.name for path in MODELS.glob("*/model_index.json")))
    raise FileNotFoundError(
        f"unknown model {str(name)!r}: it is no file or folder, no Hub id (owner/name or owner/name@revision) and no "
        f"shipped model (shipped models: {shipped or 'none'})"
    )


_FETCHED: dict[tuple, Path] = {}


def _snapshot(repository: str, revision: str | None) -> Path:
    """The folder of a Hub repository, which a process asks the Hub for once.

    A run needs it a thousand times, and of a branch that moved meanwhile it would take two models for one.
    """
    asked = repository, revision, constants.HF_HUB_CACHE
    if asked not in _FETCHED or not _FETCHED[asked].is_dir():
        _FETCHED[asked] = _fetch(repository, revision)
    return _FETCHED[asked]


def _fetch(repository: str, revision: str | None) -> Path:
    """The folder of a Hub repository; of a pipeline only the parts that are read, not the same weights once more.

    Variants ("…fp16.safetensors") are fetched only where a part of the model has no other weights.
    """
    kinds = ("json", "txt", "model", "safetensors")
    try:
        hf_hub_download(repository, "model_index.json", revision=revision)
        wanted = {"allow_patterns": ["model_index.json", *(f"*/*.{kind}" for kind in kinds)]}
        wanted["ignore_patterns"] = ["safety_checker/*", "*.fp16.*", "*.fp16-*", "*.non_ema.*", "*.non_ema-*"]
    except (LocalEntryNotFoundError, EntryNotFoundError, RepositoryNotFoundError, HFValidationError, OSError):
        wanted = {"allow_patterns": [f"*.{kind}" for kind in kinds]}
    try:
        folder = Path(snapshot_download(repository, revision=revision, **wanted))
        if bare := [part for part in _weight_folders(folder) if not any(part.glob("*.safetensors"))]:
            more = [f"{part.name}/*.safetensors*" for part in bare]
            folder = Path(snapshot_download(repository, revision=revision, allow_patterns=more))
    except (LocalEntryNotFoundError, RepositoryNotFoundError, HFValidationError, OSError) as error:
        asked = repository + (f" at revision {revision}" if revision else "")
        raise FileNotFoundError(
            f"{asked} is no path on this machine, and the Hub did not give it: {str(error).splitlines()[0]}"
        ) from error
    return folder


NOTHING = (
    "{} holds no model: neither model_index.json, nor a unet/ or transformer/ folder, nor a LoRA "
    f"({LORA_FILE}, adapter_config.json or a single .safetensors file with LoRA weights)"
)


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
    check_folder(path)
    if kind := _model_kind(path):
        adapters = [path / LORA_FILE, *(place / "adapter_config.json" for place in (path, *_weight_folders(path)))]
        if there := [file for file in adapters if file.is_file()]:
            raise ValueError(
                f"{path} holds a model and an adapter ({there[0]}), of which one would be left out: name one"
            )
        return kind
    if any((folder / "adapter_config.json").is_file() for folder in (path, path / "unet", path / "transformer")):
        return "peft"
    if lora_file(path):
        return "lora"
    if single_file(path):
        return "single file"
    if pickles := [file for file in sorted(path.glob("*")) if file.suffix in PICKLES and is_weights(file)]:
        raise ValueError(_pickle(pickles[0]))
    raise FileNotFoundError(NOTHING.format(path))


def _model_kind(path: Path) -> str | None:
    """Whether a folder is a pipeline, parts of one or a network; None if it is none of these."""
    if (path / "model_index.json").is_file():
        return "pipeline"
    if any((path / part / "config.json").is_file() for part in ("unet", "transformer")):
        return "parts"
    network = (path / "config.json").is_file() and "_class_name" in read_json(path / "config.json")
    return "network" if network else None


def is_weights(file: Path) -> bool:
    """Whether a pickle holds a model, by its name; training scripts leave others beside it, which nobody reads."""
    return not file.name.startswith(NOT_WEIGHTS)


def lora_file(path: Path) -> Path | None:
    """The file with an adapter (`is_lora`) that a path is or that a folder holds; ValueError if a folder holds several."""
    if path.is_file():
        return path
    if (path / LORA_FILE).is_file():
        return path / LORA_FILE
    return _only([file for file in sorted(path.glob("*.safetensors")) if is_lora(file)], path, "LoRA files")


def single_file(path: Path) -> Path | None:
    """The whole model that a path is or that a folder holds as its only safetensors file; ValueError for several."""
    return path if path.is_file() else _only(sorted(path.glob("*.safetensors")), path, "safetensors files")


def _only(found: list[Path], path: Path, what: str) -> Path | None:
    if len(found) > 1:
        raise ValueError(f"{path} holds several {what} ({', '.join(f.name for f in found)}): name one of them")
    return found[0] if found else None


def is_lora(file: Path) -> bool:
    """Whether a safetensors file holds an adapter (LoRA, LoHa, LoKr, differences, …), by the names of its tensors."""
    names = keys(file)
    return any(mark in name for name in names for mark in LORA_MARKS) or any(
        name.endswith(DIFFERENCES) for name in names
    )


def is_embedding(file: Path) -> bool:
    """Whether a safetensors file holds a textual-inversion embedding and nothing else."""
    names = keys(file)
    with safe_open(file, "pt") as tensors:
        flat = all(len(tensors.get_slice(name).get_shape()) <= 2 for name in names)
    return flat and 0 < len(names) <= 2 and not any("." in name for name in names)


def keys(file: Path) -> list[str]:
    """Names of the tensors in a safetensors file; ValueError for a pickle, or a file that is truncated or no safetensors."""
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist: check the path")
    if file.suffix in PICKLES:
        raise ValueError(_pickle(file))
    if file.suffix != ".safetensors":
        raise ValueError(
            f"{file} is no model: weights are read from .safetensors files and from folders that hold them"
        )
    try:
        stat = file.stat()
        return list(_keys(file.absolute(), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is truncated or no safetensors file ({error}): fetch it again") from error


@functools.lru_cache(maxsize=256)
def _keys(file: Path, size: int, modified: int, changed: int) -> tuple[str, ...]:
    """The names, read again only when the file's size or one of its time stamps (ns) has changed."""
    with safe_open(file, "pt") as tensors:
        return tuple(tensors.keys())


def dtypes(folder: Path) -> dict[str, str]:
    """The number format ("F32", "I8", …) of every tensor in a folder's safetensors files."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        names = keys(file)
        with safe_open(file, "pt") as tensors:
            found |= {name: tensors.get_slice(name).get_dtype() for name in names}
    return found


def variant(folder: Path) -> str | None:
    """The variant ("fp16") of the weights to read from a part's folder; None where there are plain ones.

    ValueError if there are several variants and none of them is fp16.
    """
    found = {match[1] for file in folder.glob("*.safetensors") if (match := WEIGHTS.fullmatch(file.name))}
    if not found or None in found or "fp16" in found:
        return None if not found or None in found else "fp16"
    if len(found) > 1:
        raise ValueError(f"{folder} holds the variants {', '.join(sorted(found))} of its weights: leave one of them")
    return found.pop()


def refuse_pickles(part: Path) -> None:
    """ValueError if a part of a model has its weights as a pickle only."""
    pickles = [file for file in sorted(part.glob("*")) if file.suffix in PICKLES and is_weights(file)]
    if pickles and not any(part.glob("*.safetensors")):
        raise ValueError(_pickle(pickles[0]))


def _weight_folders(folder: Path) -> list[Path]:
    """The parts of a model in a folder that have weights: those with a config.json."""
    return [folder / name for name in WEIGHT_PARTS if (folder / name / "config.json").is_file()]


def _pickle(file: Path) -> str:
    return (
        f"{file} is a pickle, which can run code when it is read: only safetensors are; "
        "convert it where it can be trusted (save_pretrained writes safetensors)"
    )


def check_folder(folder: Path) -> None:
    """ValueError for what is truncated, missing or a pickle among the weights in a folder and in its parts of a model."""
    for part in (folder, *(folder / name for name in WEIGHT_PARTS)):
        if part != folder or (folder / "config.json").is_file():
            refuse_pickles(part)
        for file in sorted(part.glob("*.safetensors")):
            keys(file)
        for index in sorted(part.glob("*.safetensors.index*.json")):
            weights = read_json(index).get("weight_map")
            if not isinstance(weights, dict):
                raise ValueError(f"{index} holds no weight_map: fetch it again")
            shards = set(map(str, weights.values()))
            if missing := sorted(shard for shard in shards if not (part / shard).is_file()):
                raise FileNotFoundError(f"{index} names {missing[0]}, which is not there: fetch the folder again")
        if (part / "config.json").is_file():
            read_json(part / "config.json")


def read_json(file: Path) -> dict:
    """The settings in a JSON file; FileNotFoundError or ValueError if it is not there or holds something else."""
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is not there: fetch the folder again") from None
    except (ValueError, RecursionError, OSError) as error:
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
    path = Path(path)
    file = (lora_file(path) or single_file(path)) if path.is_dir() else path
    if file is None:
        return Metadata()
    entries = header(file)
    counts = [count for entry in _folders(entries) if (count := _whole_number(entry.get("img_count"))) is not None]
    return Metadata(
        base=entries.get("ss_sd_model_name") or entries.get("ss_base_model_version") or None,
        clip_skip=_whole_number(entries.get("ss_clip_skip")),
        images=sum(counts) if counts else None,
        images_with_repeats=_whole_number(entries.get("ss_num_train_images")),
        tags=_tags(_json_entry(entries, "ss_tag_frequency")),
    )


def header(file: Path) -> dict[str, str]:
    """The text entries in a safetensors file's header; ValueError for a file that is no whole safetensors file."""
    keys(file)
    with safe_open(file, "pt") as tensors:
        return tensors.metadata() or {}


def settle(file: Path) -> None:
    """Put the text entries in the header of a safetensors file that we wrote into the order of their names.

    The library leaves the order to chance, and the same model would be another file, with another SHA-256, each time.
    """
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    entries = json.loads(content[8:start])
    entries["__metadata__"] = dict(sorted(entries["__metadata__"].items()))
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the numbers behind it begin at a multiple of eight bytes
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[start:])


def folder_words(entries: dict[str, str]) -> list[str]:
    """What kohya's scripts read out of the names of folders with training images: "10_sks dog" stands for "sks dog"."""
    directories, datasets = (_json_entry(entries, name) for name in ("ss_dataset_dirs", "ss_datasets"))
    subsets = [part for dataset in _dictionaries(datasets) for part in _dictionaries(dataset.get("subsets"))]
    folders = [*directories] if isinstance(directories, dict) else [part.get("image_dir") for part in subsets]
    found = [part.get("class_tokens") for part in subsets]
    for folder in (re.split(r"[\\/]", name)[-1] for name in folders if isinstance(name, str)):
        found += [match[1]] if (match := re.fullmatch(r"\d+_(.+)", folder)) else []
    return list(dict.fromkeys(text.strip() for text in found if isinstance(text, str) and text.strip()))


def _json_entry(entries: dict[str, str], name: str) -> object:
    try:
        return json.loads(entries.get(name, "null"))
    except (ValueError, RecursionError):  # also a whole number of too many digits
        return None


def _folders(entries: dict[str, str]) -> list[dict]:
    """One dictionary per folder of training images."""
    directories = _json_entry(entries, "ss_dataset_dirs")
    if isinstance(directories, dict) and directories:
        return _dictionaries(directories.values())
    datasets = _json_entry(entries, "ss_datasets")
    subsets = [dataset.get("subsets") for dataset in _dictionaries(datasets)]
    return [subset for listed in subsets for subset in _dictionaries(listed)]


def _dictionaries(listed: object) -> list[dict]:
    """The dictionaries in a list, or in what else was found in its place."""
    return [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, Iterable) else []


def _tags(frequencies: object) -> tuple[tuple[str, int], ...]:
    """Tags with the number of images that carry each, from {folder: {tag: number}}; what has another shape is left out."""
    tags: Counter[str] = Counter()
    for counts in _dictionaries(frequencies.values() if isinstance(frequencies, dict) else None):
        for tag, count in counts.items():
            if (number := _whole_number(count)) is not None:
                tags[tag.strip()] += number
    return tuple(sorted(tags.items(), key=lambda entry: (-entry[1], entry[0])))


def _whole_number(value: object) -> int | None:
    """A whole number, from 0, or its digits as text; None for anything else."""
    if isinstance(value, str):
        return int(value) if value.isascii() and value.isdigit() and len(value) < 16 else None
    return value if type(value) is int and value >= 0 else None


# what a file says about its predictions and its schedule


def stated(file: Path) -> dict[str, object]:
    """What a safetensors file says of how its network predicts, under the names of a scheduler's settings.

    Read are Stability's `modelspec.*` and kohya's `ss_*` entries in the header, and the empty tensors `v_pred` and
    `ztsnr`. prediction_type is one of fx.guidance.PARAMETRISATIONS, rescale_betas_zero_snr is True or absent. ValueError
    for a word that is not known, for two that contradict each other, and for EDM's preconditioning (`edm_*`).
    """
    entries, marks = header(file), {name for name in keys(file) if "." not in name or name.startswith("edm_")}
    if edm := sorted(mark for mark in marks if mark.startswith("edm_")):
        raise ValueError(f"{file} says by {edm[0]} that it is an EDM model, whose preconditioning is not supported")
    said = {name: entries[name].strip().lower() for name in PREDICTION_ENTRIES if entries.get(name, "").strip()}
    if unknown := [name for name, word in said.items() if word not in PREDICTIONS]:
        raise ValueError(f"{file}: {unknown[0]} is {said[unknown[0]]!r}; known are {', '.join(PREDICTIONS)}")
    kinds = {name: PREDICTIONS[word] for name, word in said.items()}
    kinds |= {"the tensor v_pred": "v_prediction"} if "v_pred" in marks else {}
    if _true(entries, "ss_v_parameterization") or entries.get("modelspec.architecture", "").startswith(V_ARCHITECTURE):
        kinds["its header"] = "v_prediction"
    if len(set(kinds.values())) > 1:
        raise ValueError(f"{file} contradicts itself: {', '.join(f'{kind} by {name}' for name, kind in kinds.items())}")
    zero_snr = "ztsnr" in marks or _true(entries, "ss_zero_terminal_snr")
    found = {"prediction_type": next(iter(kinds.values()))} if kinds else {}
    return found | ({"rescale_betas_zero_snr": True} if zero_snr else {})


def _true(entries: dict[str, str], name: str) -> bool:
    return entries.get(name, "").strip().lower() in ("true", "1")
