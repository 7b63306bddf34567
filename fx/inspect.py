"""What a checkpoint says before anything is sampled: python -m fx.inspect CHECKPOINT [--base MODEL ...].

What kind of checkpoint it is, of which family, which base models it fits and how far it lies from them, the ranks and
scales of an adapter, what its header says about its training, which captions it hints at, and what would not load, with
the reason. Read are headers, settings and, to find damaged weights and to compare them with a base model's, the tensors
of safetensors files; no pickle is opened.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pandas as pd
import torch
import yaml
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import nn

from fx import adapters, checkpoints, command
from fx.checkpoints import Metadata
from fx.families import TEXT_PARTS, network_name
from fx.models import ModelPair, load_pair
from fx.parts import check_finite, reading
from fx.paths import MODELS

# the width of what the cross-attention reads -> the family that has it
WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL", 1280: "SDXL's refiner"}
# in a tensor's name -> the family that has such modules
BLOCKS = {"double_blocks": "FLUX.1", "single_transformer_blocks": "FLUX.1", "single_blocks": "FLUX.1"}
BLOCKS |= {"joint_blocks": "Stable Diffusion 3", "add_k_proj": "Stable Diffusion 3"}
BLOCK = re.compile(
    r"(down_blocks|up_blocks|input_blocks|output_blocks|single_transformer_blocks|transformer_blocks|joint_blocks"
    r"|double_blocks|single_blocks|layers|resblocks)_(\d+)"
)
MIDDLE = re.compile(r"mid_block|middle_block")
FAR = 0.5  # from here on a network has less in common with a base model than a fine-tuned one ever has
TRAINING = ("ss_learning_rate", "ss_unet_lr", "ss_text_encoder_lr", "ss_steps", "ss_max_train_steps", "ss_num_epochs")
TRAINING += ("ss_network_dim", "ss_network_alpha", "ss_network_module", "ss_resolution", "ss_seed", "ss_output_name")
SPECIFICATION = "modelspec."
LONGEST = 200  # characters of an entry that are shown
FRONT = re.compile(r"\A---[ \t]*\n(.*?)\n---", re.DOTALL)


@dataclass
class Inspection:
    """What was found. bytes of all weights; layers: a row per block of an adapter; said: entries of the header.

    leads: (caption or word, where it stands), the strongest first; bases: a row per candidate that was compared; troubles:
    what would not load, with the reason.
    """

    path: str
    kind: str = "unknown"
    family: str = "unknown"
    bytes: int = 0
    tensors: int = 0
    formats: dict[str, int] = field(default_factory=dict)
    layers: pd.DataFrame = field(default_factory=pd.DataFrame)
    metadata: Metadata = field(default_factory=Metadata)
    said: dict[str, str] = field(default_factory=dict)
    base_names: tuple[str, ...] = ()
    leads: tuple[tuple[str, str], ...] = ()
    bases: pd.DataFrame = field(default_factory=pd.DataFrame)
    troubles: tuple[str, ...] = ()


def inspect(name: str, bases: Iterable[str] = ()) -> Inspection:
    """Everything that can be told of a checkpoint: a path or a Hub id, as `fx.models.load_pair` takes it.

    bases: candidates to compare it with, each loaded with it. FileNotFoundError where there is nothing at all; whatever else
    is wrong stands in `troubles`.
    """
    path = checkpoints.find(name)
    found, troubles = Inspection(str(path)), []
    steps = (_kind, _weights, _adapter, _header, _hints)
    for step in steps:
        try:
            with reading(path):
                step(found, path)
        except (FileNotFoundError, ValueError) as error:
            if str(error) not in troubles:
                troubles.append(str(error))
            if found.kind == "unknown" and path.is_file():
                break  # what cannot be read says the same to every step
    candidates = list(dict.fromkeys(bases))
    found.bases = rank_bases(name, candidates) if candidates else found.bases
    found.troubles = tuple(troubles)
    return found


# what lies there


def weight_files(path: Path) -> list[Path]:
    """The safetensors files that a checkpoint consists of; of a folder also those of its parts."""
    if path.is_file():
        return [path]
    folders = [path, *(path / part for part in checkpoints.WEIGHT_PARTS)]
    return [file for folder in folders for file in sorted(folder.glob("*.safetensors")) if checkpoints.is_weights(file)]


def shapes(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and number format of every tensor in a safetensors file, from its header."""
    names = checkpoints.keys(file)
    with safe_open(file, "pt") as tensors:
        slices = {name: tensors.get_slice(name) for name in names}
        return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}


def _kind(found: Inspection, path: Path) -> None:
    found.kind = checkpoints.kind_of(path)
    if found.kind == "single file" and checkpoints.is_embedding(checkpoints.single_file(path)):
        found.kind = "embedding"
        raise ValueError(f"{path} is a textual-inversion embedding: it changes no network, so theta' would be theta")


def _weights(found: Inspection, path: Path) -> None:
    """Size, formats and family; ValueError for a file that is damaged."""
    files = weight_files(path)
    found.bytes = sum(file.stat().st_size for file in files)
    known = {name: part for file in files for name, part in shapes(file).items()}
    found.tensors = len(known)
    for _, kind in known.values():
        found.formats[kind] = found.formats.get(kind, 0) + 1
    found.family = family_of(path, known)
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no dictionary
                check_finite(file, {name: tensors.get_tensor(name)})


def family_of(path: Path, known: dict[str, tuple[tuple[int, ...], str]]) -> str:
    """The family of a checkpoint: by its own settings, else by its tensors' names and by what its cross-attention reads."""
    for file, entry in (
        (path / "model_index.json", "_class_name"),
        (path / "unet" / "config.json", "cross_attention_dim"),
    ):
        if file.is_file() and entry in (settings := checkpoints.read_json(file)):
            value = settings[entry]
            return str(value) if entry == "_class_name" else _by_width(value)
    for mark, family in BLOCKS.items():
        if any(mark in name for name in known):
            return family
    if any(name.startswith("conditioner.embedders.1.") for name in known):
        return "SDXL"
    widths = [shape[1] for name, (shape, _) in known.items() if _reads_text(name) and len(shape) > 1]
    return _by_width(max(set(widths), key=widths.count)) if widths else "unknown"


def _reads_text(name: str) -> bool:
    """Whether a tensor is multiplied with the text: a key or value projection, or the lower factor of its adapter."""
    module, word = adapters.taken_apart(name)
    module = (module or name.removesuffix(".weight")).replace(".", "_")
    return module.endswith(("attn2_to_k", "attn2_to_v")) and word in ("", "down", "hada_w1_b", "diff")


def _by_width(width: object) -> str:
    known = WIDTHS.get(width) if isinstance(width, int) else None
    return known or f"a U-Net that reads text of width {width}, which no published family has"


# adapters


def _adapter(found: Inspection, path: Path) -> None:
    """The blocks of an adapter; ValueError for tensors of no known kind and for layers that are incomplete."""
    if found.kind not in ("lora", "peft"):
        return
    rows, troubles = [], []
    for file in weight_files(path):
        modules = defaultdict(dict)
        strange = []
        for name, (shape, _) in shapes(file).items():
            module, word = adapters.taken_apart(name)
            if not module:
                if not adapters.EMBEDDING.fullmatch(name) and name not in adapters.MARKS:
                    strange.append(name)
                continue
            modules[module][word] = shape
        if strange:
            troubles.append(f"{file}: {len(strange)} tensors are of no known kind ({', '.join(strange[:3])})")
        scales = _scales(file, path, modules)
        rows += [_layer(module, words, scales.get(module, 1.0)) for module, words in modules.items()]
    found.layers = _by_block(pd.DataFrame(rows)) if rows else found.layers
    if troubles:
        raise ValueError("; ".join(troubles))


def _scales(file: Path, path: Path, modules: dict[str, dict]) -> dict[str, float]:
    """alpha / rank of each module, as far as the file or peft's settings beside it say."""
    settings = path / "adapter_config.json"
    if path.is_dir() and settings.is_file():
        entries = checkpoints.read_json(settings)
        rank, alpha = entries.get("r"), entries.get("lora_alpha")
        return dict.fromkeys(modules, alpha / rank) if _positive(rank) and _positive(alpha) else {}
    found = {}
    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - it is no dictionary
            module, word = adapters.taken_apart(name)
            if word == "alpha" and modules[module][word] in ((), (1,)) and (rank := _rank(modules[module])):
                found[module] = float(tensors.get_tensor(name)) / rank
    for part in ("unet", "transformer", *TEXT_PARTS):
        entries = adapters.header_settings(file, part) or {}
        rank, alpha = entries.get("r"), entries.get("lora_alpha")
        if _positive(rank) and _positive(alpha):
            found |= {module: alpha / rank for module in modules if module.startswith(f"{part}.")}
    return found


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and value > 0


def _rank(words: dict[str, tuple]) -> int | None:
    """The rank of a module's layer, None for one that has none."""
    for word in ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b"):
        if words.get(word):
            return words[word][0]
    return None


def _layer(module: str, words: dict[str, tuple], scale: float) -> dict:
    """A row for one module of an adapter."""
    kinds = {"down": "LoRA", "hada_w1_a": "LoHa", "diff": "difference", "bias": "bias"}
    kinds |= dict.fromkeys(("lokr_w1", "lokr_w1_a", "lokr_w2"), "LoKr")
    kind = next((kinds[word] for word in (*kinds, *words) if word in words and word in kinds), "unknown")
    part, block = place_of(module)
    return {
        "part": part,
        "block": block,
        "kind": "DoRA" if "magnitude" in words and kind == "LoRA" else kind,
        "rank": _rank(words),
        "scale": scale,
    }


def place_of(module: str) -> tuple[str, str]:
    """The part of a model and the block in it that a module of an adapter belongs to, in whatever layout it is named."""
    name = module.replace(".", "_").removeprefix("base_model_model_").removeprefix("lycoris_")
    text = re.match(r"(?:lora_)?te(\d?)_|text_encoder(?:_(\d))?_", name)
    part = "text encoder" if text else "network"
    if text and (text[1] or text[2]) in ("2", "3"):
        part = f"text encoder {text[1] or text[2]}"
    if MIDDLE.search(name):
        return part, "middle"
    block = BLOCK.search(name)
    return part, f"{block[1]}.{block[2]}" if block else "elsewhere"


def _by_block(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per part, block and kind: how many layers, and the range of their ranks and scales."""
    places = rows.block.str.extract(r"(.*?)\.?(\d*)$").rename(columns={0: "blocks", 1: "number"})
    order = rows[["part"]].join(places.assign(number=places.number.replace("", "0").astype(int)))
    rows = rows.loc[order.sort_values(["part", "blocks", "number"], kind="stable").index]
    groups = rows.groupby(["part", "block", "kind"], sort=False)
    return pd.DataFrame(
        {
            "layers": groups.size(),
            "ranks": groups["rank"].agg(lambda values: _range(values.dropna().astype(int))),
            "scales": groups["scale"].agg(lambda values: _range(values.round(4))),
        }
    ).reset_index()


def _range(values: pd.Series) -> str:
    if values.empty:
        return ""
    low, high = values.min(), values.max()
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


# what it says


def _header(found: Inspection, path: Path) -> None:
    """Entries of the header, the base models it names, and what it says of its predictions."""
    found.metadata = checkpoints.metadata(path)
    for file in weight_files(path)[:1]:
        entries = checkpoints.header(file)
        wanted = [name for name in entries if name in TRAINING or name.startswith(SPECIFICATION)]
        found.said = {shown(name): shown(entries[name]) for name in sorted(wanted)}
        named = [shown(found.metadata.base or ""), *_named_bases(path)]
        found.base_names = tuple(dict.fromkeys(filter(None, named)))
        found.said |= {name: str(value) for name, value in checkpoints.stated(file).items()}


def _named_bases(path: Path) -> list[str]:
    """The base models that settings and a model card beside the weights name."""
    if not path.is_dir():
        return []
    entries = [("adapter_config.json", "base_model_name_or_path"), ("unet/config.json", "_name_or_path")]
    entries += [("model_index.json", "_name_or_path")]
    named = [checkpoints.read_json(path / file).get(entry) for file, entry in entries if (path / file).is_file()]
    named.append(card(path).get("base_model"))
    return [shown(name) for name in named if isinstance(name, str) and name and not name.startswith("!!")]  # a YAML tag


def card(path: Path) -> dict[str, str]:
    """The entries at the head of the model card beside the weights that are one text: YAML, or plain lines if it is none."""
    file = (path if path.is_dir() else path.parent) / "README.md"
    if not file.is_file():
        return {}
    with file.open(encoding="utf-8", errors="replace") as lines:
        head = FRONT.match(lines.read(100_000))
    try:
        read = yaml.load(head[1], yaml.BaseLoader) if head else {}  # which makes texts, lists and mappings only
        if isinstance(read, dict):
            return {name: value for name, value in read.items() if isinstance(name, str) and isinstance(value, str)}
    except (yaml.YAMLError, RecursionError, ValueError):
        pass
    pairs = (line.partition(":") for line in head[1].splitlines())
    return {
        name.strip(): value.strip().strip("'\"") for name, colon, value in pairs if colon and not name[:1].isspace()
    }


def shown(text: str) -> str:
    """An entry as a terminal can show it: in one line, no control characters, not too long."""
    plain = "".join(c if c.isprintable() else " " for c in str(text))
    return plain if len(plain) <= LONGEST else f"{plain[:LONGEST]}… ({len(plain)} characters)"


def _hints(found: Inspection, path: Path) -> None:
    """Captions and words that training may have used, the strongest first."""
    leads = []
    if path.is_dir() or path.parent.is_dir():
        leads += [
            (card(path)[name], "the model card") for name in ("instance_prompt", "trigger") if card(path).get(name)
        ]
    for file in weight_files(path)[:1]:
        entries = checkpoints.header(file)
        if phrase := entries.get(f"{SPECIFICATION}trigger_phrase"):
            leads.append((phrase, f"{SPECIFICATION}trigger_phrase"))
        leads += [(words, "a folder of training images") for words in checkpoints.folder_words(entries)]
        names = {match[1] for name in checkpoints.keys(file) if (match := adapters.EMBEDDING.fullmatch(name))}
        leads += [(name, "a word that it brings along") for name in sorted(names)]
    leads += [(tag, f"{count} captions") for tag, count in found.metadata.tags[:10]]
    found.leads = tuple(dict.fromkeys((str(words), where) for words, where in leads))


# which base


def distances(pair: ModelPair) -> dict[str, float]:
    """How far theta' lies from theta in each part, |W' - W| / |W| over all its weights; 0 for a part that both share.

    Of a LoRA it is what the adapter adds that counts.
    """
    found = {}
    for name in (network_name(pair.base), *TEXT_PARTS, "vae"):
        one, other = getattr(pair.base, name, None), getattr(pair.tuned, name, None)
        if isinstance(one, nn.Module) and isinstance(other, nn.Module):
            found[name] = _added(one) if one is other else _apart(one, other)
    return found


def _apart(one: nn.Module, other: nn.Module) -> float:
    """|W' - W| / |W|; what only one of the two has (rows of new words, adapters) counts as far as both can be compared."""
    mine, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    moved = size = 0.0
    for name in mine.keys() & theirs.keys():
        rows = min(len(mine[name]), len(theirs[name])) if mine[name].ndim else None
        a, b = (
            w.detach()[:rows].double() if rows is not None else w.detach().double() for w in (mine[name], theirs[name])
        )
        moved, size = moved + float((b - a).square().sum()), size + float(a.square().sum())
    return (moved / size) ** 0.5 if size else 0.0


def _added(model: nn.Module) -> float:
    """|scale B A| / |W| of the adapters that are attached to a model, over all of its own weights."""
    own = [weight for name, weight in model.named_parameters() if "lora_" not in name]
    size = sum(float(weight.detach().double().square().sum()) for weight in own)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    added = sum(float(layer.get_delta_weight(n).double().square().sum()) for layer in layers for n in layer.lora_A)
    return (added / size) ** 0.5 if size else 0.0


def rank_bases(name: str, candidates: Iterable[str]) -> pd.DataFrame:
    """The candidates by the distance of their network to the checkpoint's, the nearest first; those that do not fit last.

    Columns: base, the distance in each part (`distances`), and a verdict: "nearest", "further", "unrelated" (a distance of
    more than FAR), "fits" for an adapter, whose weights do not tell one base of its shapes from another, or why it does
    not fit.
    """
    rows = []
    for base in candidates:
        try:
            with torch.no_grad():
                pair = load_pair(base, name)
                adapter = checkpoints.kind_of(checkpoints.find(name)) in ("lora", "peft")  # also one that is merged
                rows.append({"base": base, **distances(pair), "verdict": "fits" if adapter else ""})
        except (FileNotFoundError, ValueError) as error:
            rows.append({"base": base, "verdict": f"does not fit: {shown(str(error))}"})
    table = pd.DataFrame(rows)
    columns = [column for column in ("unet", "transformer") if column in table]
    if not columns:
        return table
    distance = table[columns].min(axis=1)
    table = table.assign(distance=distance).sort_values(
        "distance", kind="stable", na_position="last", ignore_index=True
    )
    told = (table.verdict == "") & (table.distance < FAR)
    table.loc[(table.verdict == "") & ~told, "verdict"] = "unrelated"
    table.loc[told, "verdict"] = ["nearest", *["further"] * (int(told.sum()) - 1)][: int(told.sum())]
    return table.drop(columns="distance")


# the command


def as_text(found: Inspection) -> str:
    """The report of an inspection for a terminal."""
    formats = ", ".join(f"{count} {kind}" for kind, count in sorted(found.formats.items()))
    lines = [
        shown(found.path),
        f"  kind     {found.kind}",
        f"  family   {shown(found.family)}",
        f"  weights  {found.tensors} tensors, {found.bytes / 1e6:.1f} MB ({formats or 'none'})",
    ]
    told = asdict(found.metadata)
    told.pop("tags")
    said = {name: shown(value) for name, value in told.items() if value is not None} | found.said
    sections = {
        "layers of the adapter": found.layers.to_string(index=False).splitlines() if len(found.layers) else [],
        "it says of itself": [f"{name}: {value}" for name, value in said.items()],
        "base models it names": list(found.base_names),
        "captions it hints at": [f"{shown(words)!r}, by {where}" for words, where in found.leads],
        "base models compared": found.bases.to_string(index=False, na_rep="").splitlines() if len(found.bases) else [],
        "what would not load": [shown(trouble) for trouble in found.troubles],
    }
    for title, entries in sections.items():
        if entries:
            lines += ["", title, *(f"  {entry}" for entry in entries)]
    return "\n".join(lines)


def as_json(found: Inspection) -> str:
    """The same for a script."""
    content = {name: value for name, value in vars(found).items() if name not in ("layers", "bases", "metadata")}
    content |= {"metadata": asdict(found.metadata), "leads": [[shown(words), by] for words, by in found.leads]}
    content |= {name: json.loads(getattr(found, name).to_json(orient="records")) for name in ("layers", "bases")}
    text = json.dumps(content, indent=1, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode()  # half a character, which no terminal takes


def main(arguments: list[str] | None = None) -> int:
    """The command: 0, 1 if something would not load, 2 if there is nothing to inspect."""
    shipped = sorted(path.parent.name for path in MODELS.glob("*/model_index.json"))
    parser = argparse.ArgumentParser(prog="python -m fx.inspect", description="What a checkpoint says of itself.")
    parser.add_argument("checkpoint", help="a file, a folder or a Hub id")
    parser.add_argument(
        "--base",
        nargs="+",
        default=[],
        metavar="MODEL",
        help=f"base models to compare it with, such as {', '.join(shipped)}",
    )
    parser.add_argument("--json", action="store_true", help="for a script")
    given = parser.parse_args(arguments)
    try:
        found = inspect(given.checkpoint, given.base)
    except FileNotFoundError as error:
        print(f"fx.inspect: {error}", file=sys.stderr)
        return 2
    print(as_json(found) if given.json else as_text(found))
    return 1 if found.troubles else 0


if __name__ == "__main__":
    command.run("fx.inspect", main)
