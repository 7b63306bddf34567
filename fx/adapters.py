"""Adapters: LoRA and its relatives, in every layout that is published, put on a base model that stays as it is.

A file's tensors are sorted by the module they belong to and by what they are (`read`); each must have a place. From there

- a plain LoRA becomes peft's layers in the network itself, so that theta and theta' share it in memory (`attached`),
- everything else (LoHa, LoKr, differences, DoRA, …) is added to the weights of a copy (`merged`),
- what comes with peft's settings is put there by peft (`from_settings`), on a copy if it is more than a plain LoRA.

| layout | module names | scale |
|---|---|---|
| diffusers | unet.down_blocks.0… | peft's settings in the header, alpha / rank, or 1 |
| kohya, LyCORIS | lora_unet_down_blocks_0… or lora_unet_input_blocks_1_1…, lora_te_… | alpha / rank, 1 without alpha |
| kohya for FLUX.1 | lora_unet_double_blocks_0_img_attn_qkv…: one layer for several modules, by rows | the same |
| peft | base_model.model.down_blocks.0…, a folder per part | adapter_config.json |
"""

import copy
import json
import re
from collections import defaultdict
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from fx import checkpoints, names_of_modules
from fx.families import TEXT_PARTS, TOKENIZERS, network, network_name, prediction_type
from fx.parts import check_finite, check_floating, reading

SETTINGS_ENTRY = "lora_adapter_metadata"  # diffusers keeps peft's settings in the header under this name
PEFT_PREFIX = "base_model.model."
Layer = dict[str, Tensor]  # what a file holds for one module, by the words below

LORA = {"down", "up", "mid"}
LOHA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"}
LOKR = {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}
# the ending of a tensor's name -> what it is
WORDS = {"lora_down.weight": "down", "lora_up.weight": "up", "lora_mid.weight": "mid"}
WORDS |= {"lora.down.weight": "down", "lora.up.weight": "up", "lora.up.bias": "up_bias"}
WORDS |= {"lora_linear_layer.down.weight": "down", "lora_linear_layer.up.weight": "up"}
WORDS |= {"lora_A.weight": "down", "lora_B.weight": "up", "lora_B.bias": "up_bias"}
WORDS |= {"lora_A.default.weight": "down", "lora_B.default.weight": "up"}
WORDS |= {"dora_scale": "magnitude", "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude"}
WORDS |= {name: name for name in LOHA | LOKR}
WORDS |= {"alpha": "alpha", "scalar": "scalar", "diff": "diff", "w_norm": "diff", "diff_b": "bias", "b_norm": "bias"}
ENDING = re.compile(rf"(.+)\.({'|'.join(map(re.escape, WORDS))})")
# how diffusers named its attention layers before it used peft
OLD_ENDING = re.compile(r"(.+?)(?:\.processor)?\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight")
OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
# what else may be met, to be named in a refusal
FOREIGN = {".oft_": "OFT", ".on_input": "IA3", ".a1.weight": "GLoRA", ".lora_embedding_": "an embedding's LoRA"}
EMBEDDING = re.compile(r"bundle_emb\.(.+)\.(string_to_param\.\*|emb_params|clip_l|clip_g)")
MARKS = ("v_pred", "ztsnr")


def add(first: DiffusionPipeline, path: Path, kind: str) -> DiffusionPipeline:
    """theta' from the base model and the adapter at a path of this kind ("lora" or "peft"); the base model stays as it is.

    Raises ValueError, with the names, for a tensor that has no place, a layer that is incomplete, of another shape or not
    finite, an adapter that changes nothing in the network, and one that says it was made for another kind of prediction.
    """
    second = copy.copy(first)
    if kind == "peft":
        _add_folders(second, path)
    else:
        file = checkpoints.lora_file(path)
        check_stated(first, file)
        _add_file(second, file)
    if not changes(network(first), network(second)):
        raise ValueError(
            f"{path}: the LoRA changes nothing in the {network_name(first)}, its layers are zero: theta' would be theta"
        )
    return second


def changes(before: nn.Module, after: nn.Module) -> bool:
    """Whether an adapter does anything: in the layers that it has of its own, or to the weights of a copy."""
    if after is not before:
        return any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    layers = [module for module in after.modules() if isinstance(module, LoraLayer)]
    pairs = [(layer.lora_A[name].weight, layer.lora_B[name].weight) for layer in layers for name in layer.lora_A]
    pairs += [
        (layer.lora_embedding_A[n], layer.lora_embedding_B[n]) for layer in layers for n in layer.lora_embedding_A
    ]
    return any(bool(down.any()) and bool(up.any()) for down, up in pairs)


def check_stated(first: DiffusionPipeline, file: Path) -> None:
    """ValueError if the file says that it was made for another kind of prediction or schedule than the base model's."""
    said = checkpoints.stated(file)
    base = {"prediction_type": prediction_type(first)}
    base["rescale_betas_zero_snr"] = bool(first.scheduler.config.get("rescale_betas_zero_snr"))
    for name, value in said.items():
        if value != base[name]:
            raise ValueError(
                f"{file} says that {name} is {value}, but the base model's is {base[name]}: name the base it was made for"
            )


# a file


def _add_file(second: DiffusionPipeline, file: Path) -> None:
    """Put the adapter in a file, whatever its layout, on the parts it has layers for."""
    with reading(file):
        tensors = {name: value for name, value in load_file(file).items() if name not in MARKS}
    check_floating(file, {name: value for name, value in tensors.items() if not name.endswith(".alpha")})
    check_finite(file, tensors)
    words = {match[0]: match.groups() for name in tensors if (match := EMBEDDING.fullmatch(name))}
    embeddings = {names: tensors.pop(key) for key, names in words.items()}
    if embeddings and not tensors:
        raise ValueError(f"{file} holds an embedding and nothing else: it changes no network, so theta' would be theta")
    found = read(second, tensors, file)
    for part, layers in found.items():
        model = getattr(second, part)
        settings = header_settings(file, part)
        with reading(file):
            if settings is not None:
                model = from_settings(model, settings, _peft_names(layers, file), file)
            else:
                plain = all(is_plain(layer, model.get_submodule(name)) for name, layer in layers.items())
                model = (attached if plain else merged)(model, layers, file)
        setattr(second, part, model)
    _add_embeddings(second, embeddings, file)


def read(pipeline: DiffusionPipeline, tensors: dict[str, Tensor], file: Path) -> dict[str, dict[str, Layer]]:
    """A file's tensors by the pipeline's part, the module in it and what they are.

    Every tensor is in it: ValueError, with the names, for one that is of no known kind, belongs to no module of the
    pipeline or is there twice, and for a module whose tensors are no complete layer.
    """
    places, fused = names_of_modules.places(pipeline), names_of_modules.fused(pipeline)
    found, strange, several = defaultdict(lambda: defaultdict(dict)), [], defaultdict(dict)
    for name in sorted(tensors):
        module, word = taken_apart(name)
        place = places.get(names_of_modules.plain(module)) if module else None
        if place is None and names_of_modules.plain(module) in fused:
            several[module][word] = tensors[name]
            continue
        if place is None:
            strange.append(name)
            continue
        part, path = place
        if word in found[part][path]:
            raise ValueError(f"{file} has {word} of {part}.{path} twice, the second time as {name}")
        found[part][path][word] = tensors[name]
    for module, layer in several.items():
        check_complete(layer, f"{file}: the layer of {module}")
        part, pieces = fused[names_of_modules.plain(module)]
        for path, rows in pieces:
            if path in found[part]:
                raise ValueError(f"{file} has {part}.{path} twice, the second time in {module}")
            found[part][path] = piece(layer, rows, sum(len(each) for _, each in pieces), f"{file}: {module}")
    if network_name(pipeline) not in found or strange:
        raise ValueError(_no_place(pipeline, file, sorted(tensors), strange))
    for part, layers in found.items():
        for path, layer in layers.items():
            check_complete(layer, f"{file}: the layer of {part}.{path}")
    return found


def piece(layer: Layer, rows: Tensor, total: int, where: str) -> Layer:
    """What a layer on a module of `total` rows does to some of them, as a layer; ValueError if it cannot be cut there."""
    two = next((layer[name] for name in ("lokr_w2", "lokr_w2_a") if name in layer), None)
    first = next(layer[name] for name in ("up", "diff", "hada_w1_a", "lokr_w1", "lokr_w1_a", "bias") if name in layer)
    n = first.shape[0] * (1 if two is None else two.shape[0])
    if n != total or layer.keys() & {"mid", "hada_t1", "hada_t2", "lokr_t2"}:
        raise ValueError(f"{where} cannot be loaded: size mismatch, a layer of {n} rows for {total}")
    cut = {word: rows for word in ("up", "up_bias", "diff", "bias", "hada_w1_a", "hada_w2_a") if word in layer}
    if "magnitude" in layer:
        if layer["magnitude"].shape[0] != total:
            raise ValueError(
                f"{where} cannot be loaded: its DoRA measures columns, which go through several modules here"
            )
        cut["magnitude"] = rows
    if two is not None:
        blocks = rows.reshape(-1, height) if len(rows) % (height := two.shape[0]) == 0 else rows[:, None]
        if not torch.equal(blocks, blocks[:, :1] + torch.arange(height)) or (blocks[:, 0] % height).any():
            raise ValueError(f"{where} cannot be loaded: its Kronecker blocks of {height} rows lie across two modules")
        cut |= dict.fromkeys(layer.keys() & {"lokr_w1", "lokr_w1_a"}, blocks[:, 0] // height)
    return {word: tensor[cut[word]] if word in cut else tensor for word, tensor in layer.items()}


def taken_apart(name: str) -> tuple[str, str]:
    """The module's name and what the tensor is to it; two empty texts for a kind of tensor that is not known."""
    if match := OLD_ENDING.fullmatch(name):
        module, layer, word = match.groups()
        if module.endswith("self_attn"):
            return f"{module}.{OLD_TEXT[layer]}", word
        return f"{module}.{layer}" + (".0" if layer == "to_out" else ""), word
    if match := ENDING.fullmatch(name):
        return match[1], WORDS[match[2]]
    return "", ""


def _no_place(pipeline: DiffusionPipeline, file: Path, names: list[str], strange: list[str]) -> str:
    """What is wrong with a file of these tensors, of which the strange ones have no place in the pipeline."""
    base = f"a {type(pipeline).__name__}"
    if kinds := sorted({kind for name in strange for mark, kind in FOREIGN.items() if mark in name}):
        return (
            f"{file} holds {' and '.join(kinds)} ({strange[0]}), which is not supported: merge it into its base model "
            "where it was made, and name the result"
        )
    if len(strange) < len(names) and strange:
        return (
            f"{file} fits only in part: {len(strange)} of {len(names)} tensors belong to no module of {base} "
            f"({', '.join(strange[:3])}); name the base it was made for"
        )
    first_keys = ", ".join(names[:3]) or "none"
    return f"{file} holds no adapter for the {network_name(pipeline)} of {base}: its first keys are {first_keys}"


def check_complete(layer: Layer, where: str) -> None:
    """ValueError unless a module's tensors are one layer of a known kind, with all its factors and nothing unknown to it."""
    words = layer.keys()
    kinds = [kind for kind in (LORA, LOHA, LOKR, {"diff"}) if words & kind] or [set()]
    beside = {"bias"} if kinds[0] <= {"diff"} else {"bias", "alpha", "magnitude", "scalar"}
    beside |= {"up_bias"} if kinds == [LORA] else set()
    if len(kinds) > 1 or words - kinds[0] - beside:
        raise ValueError(f"{where} is no layer of a known kind: it has {', '.join(sorted(words))}")
    if not is_whole(words & kinds[0]):
        raise ValueError(f"{where} is incomplete: it has {', '.join(sorted(words))} only; fetch the file again")
    check_ranks(layer, where)


def check_ranks(layer: Layer, where: str) -> None:
    """ValueError unless factors are matrices that can be multiplied, of a rank from 1, and alpha is one number."""
    shapes = {word: list(tensor.shape) for word, tensor in layer.items()}
    factors = [shape for word, shape in shapes.items() if word in LORA | LOHA | LOKR]
    if any(len(shape) < 2 or 0 in shape for shape in factors):
        raise ValueError(f"{where} cannot be loaded: its factors are no matrices, their shapes are {shapes}")
    if "up" in layer and "mid" not in layer and shapes["up"][1] != shapes["down"][0]:
        raise ValueError(f"{where} cannot be loaded: up {shapes['up']} and down {shapes['down']} are of two ranks")
    if any(layer[word].numel() != 1 for word in ("alpha", "scalar") if word in layer):
        raise ValueError(
            f"{where} cannot be loaded: its alpha is {shapes.get('alpha', shapes.get('scalar'))}, not one number"
        )


def is_whole(factors: set[str]) -> bool:
    """Whether the factors of a layer of one kind are all there; a layer without any changes a bias only."""
    if factors & LOHA:
        return factors in (LOHA, LOHA - {"hada_t1", "hada_t2"})
    if factors & LOKR:
        low_rank = [{f"lokr_{name}_a", f"lokr_{name}_b"} for name in ("w1", "w2")]
        one, two = ({name for name in factors if name.startswith(f"lokr_{half}")} for half in ("w1", "w2"))
        return one in ({"lokr_w1"}, low_rank[0]) and two in ([low_rank[1]] + [{"lokr_w2"}] * ("lokr_t2" not in factors))
    return {"down", "up"} <= factors or factors <= {"diff"}


# what a layer does to a weight


def is_plain(layer: Layer, module: nn.Module) -> bool:
    """Whether it is a LoRA and nothing else, on a module that peft has a layer for."""
    return layer.keys() <= {"down", "up", "alpha"} and isinstance(module, nn.Linear | nn.Conv2d)


def scale(layer: Layer) -> float:
    """alpha / rank, the factor of a layer's product; 1 without alpha, and for LoKr without low-rank factors."""
    ranks = ("down", "hada_w1_b", "lokr_t2", "lokr_w1_b", "lokr_w2_b")
    rank = next((layer[name].shape[0] for name in ranks if name in layer), None)
    return float(layer["alpha"]) / rank if "alpha" in layer and rank else 1.0


def product(layer: Layer) -> Tensor | float:
    """A layer's unscaled difference [out, in, …] or [out, in * …], in float32; 0 for one that changes a bias only.

    LoRA: up down (Hu et al., 2022), with a core: Tucker. LoHa: (w1a w1b) * (w2a w2b), LoKr: w1 (x) w2 (Yeh et al., 2024).
    """
    part = {name: tensor.float() for name, tensor in layer.items()}
    if "mid" in part:
        return torch.einsum("o p, p q ..., q i -> o i ...", part["up"].flatten(1), part["mid"], part["down"].flatten(1))
    if "up" in part:
        return part["up"].flatten(1) @ part["down"].flatten(1)
    if "hada_w1_a" in part:
        return _factor(part, "hada_w1", "hada_t1") * _factor(part, "hada_w2", "hada_t2")
    if part.keys() & LOKR:
        one, two = _factor(part, "lokr_w1", ""), _factor(part, "lokr_w2", "lokr_t2")
        return torch.kron(one.reshape(*one.shape, *[1] * (two.ndim - 2)), two.contiguous())
    return part.get("diff", 0.0)


def _factor(part: Layer, name: str, core: str) -> Tensor:
    """One of a product's two matrices: as it is, of low rank, or of low rank with a Tucker core [rank, rank, …]."""
    if name in part:
        return part[name]
    if core in part:
        return torch.einsum("p q ..., p o, q i -> o i ...", part[core], part[f"{name}_a"], part[f"{name}_b"])
    return part[f"{name}_a"] @ part[f"{name}_b"]


def new_weight(layer: Layer, weight: Tensor, where: str) -> Tensor:
    """The weight [out, in, …] that a layer makes of the base model's, in float32; ValueError for another shape."""
    found = product(layer)
    if isinstance(found, Tensor):
        if found.numel() != weight.numel() or found.shape[0] != weight.shape[0]:
            raise ValueError(f"{where} cannot be loaded: size mismatch, {list(found.shape)} for {list(weight.shape)}")
        found = found.reshape(weight.shape) * scale(layer) * float(layer.get("scalar", 1.0))
    changed = weight.float() + found
    return decomposed(changed, layer["magnitude"].float(), where) if "magnitude" in layer else changed


def decomposed(weight: Tensor, magnitude: Tensor, where: str) -> Tensor:
    """DoRA (Liu et al., 2024): the weight's rows, or columns, brought to the lengths in `magnitude`.

    magnitude: [out], [out, 1, …], or, as older files have it, [1, in, 1, …]; lengths are taken over the axes of size 1.
    """
    if magnitude.ndim == 1:
        magnitude = magnitude.reshape(-1, *[1] * (weight.ndim - 1))
    if magnitude.ndim != weight.ndim or any(
        m not in (1, n) for m, n in zip(magnitude.shape, weight.shape, strict=True)
    ):
        raise ValueError(f"{where} cannot be loaded: size mismatch, magnitude {list(magnitude.shape)}")
    axes = [axis for axis, size in enumerate(magnitude.shape) if size == 1]
    return weight * magnitude / torch.linalg.vector_norm(weight, dim=axes, keepdim=True).clamp_min(1e-12)


@torch.no_grad()
def merged(model: nn.Module, layers: dict[str, Layer], file: Path) -> nn.Module:
    """A copy of the model with the layers in its weights."""
    model = copy.deepcopy(model)
    for name, layer in layers.items():
        module, where = model.get_submodule(name), f"{file}: {name}"
        module.weight.copy_(new_weight(layer, module.weight, where))
        added = [
            layer[word].float() * factor for word, factor in (("bias", 1.0), ("up_bias", scale(layer))) if word in layer
        ]
        if added and (module.bias is None or any(bias.shape != module.bias.shape for bias in added)):
            raise ValueError(
                f"{where} cannot be loaded: size mismatch, a bias {list(added[0].shape)} for {module.bias}"
            )
        for bias in added:
            module.bias += bias
    return model


def attached(model: nn.Module, layers: dict[str, Layer], file: Path) -> nn.Module:
    """The model itself with peft's LoRA layers, each of its own rank and scale."""
    state, ranks, scales = {}, defaultdict(list), {}
    for name, layer in layers.items():
        weight, (down, up) = model.get_submodule(name).weight, (layer["down"].float(), layer["up"].float())
        new_weight(layer, weight, f"{file}: {name}")  # refuses other shapes
        ones = [1] * (weight.ndim - 2)
        state[f"{name}.lora_A.weight"] = down.reshape(len(down), *weight.shape[1:])
        state[f"{name}.lora_B.weight"] = up.reshape(len(weight), len(down), *ones)
        ranks[len(down)].append(name)
        scales[name] = scale(layer)
    patterns = {rank: f"^(?:{'|'.join(map(re.escape, names))})" for rank, names in ranks.items()}
    config = LoraConfig(
        target_modules="|".join(map(re.escape, layers)),
        rank_pattern={pattern: rank for rank, pattern in patterns.items()},
    )
    _put(model, config, state, file)
    for name, factor in scales.items():
        model.get_submodule(name).scaling["default"] = factor
    return model


# peft's settings


def header_settings(file: Path, part: str) -> dict | None:
    """peft's settings for a part of the model, as diffusers leaves them in a file's header; None if there are none."""
    entry = checkpoints.header(file).get(SETTINGS_ENTRY)
    if entry is None:
        return None
    with reading(file):
        entries = dict(json.loads(entry))
    return {name.removeprefix(f"{part}."): entries[name] for name in entries if name.startswith(f"{part}.")} or None


def _peft_names(layers: dict[str, Layer], file: Path) -> dict[str, Tensor]:
    """A file's layers under peft's names; ValueError for what peft's settings do not cover."""
    endings = {"down": "lora_A.weight", "up": "lora_B.weight", "up_bias": "lora_B.bias"}
    endings |= {"magnitude": "lora_magnitude_vector"}
    if other := sorted({word for layer in layers.values() for word in layer} - endings.keys()):
        raise ValueError(f"{file} has peft's settings in its header ({SETTINGS_ENTRY}) and {other[0]} beside them")
    return {
        f"{PEFT_PREFIX}{name}.{endings[word]}": value for name, layer in layers.items() for word, value in layer.items()
    }


# settings of a LoRA that peft's layers in the network itself obey, and those that say nothing about its weights
OBEYED = {"r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "use_rslora"}
OBEYED |= {"layers_to_transform", "layers_pattern", "lora_bias", "init_lora_weights"}
SILENT = {"lora_dropout", "task_type", "peft_type", "auto_mapping", "base_model_name_or_path", "revision"}
SILENT |= {"inference_mode", "peft_version", "eva_config", "loftq_config"}
KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")
REDONE = ("pissa", "olora", "loftq")  # take something out of the base weights, the same at every loading


def peft_config(settings: dict, model: nn.Module, file: Path) -> PeftConfig:
    """Settings as peft's own object; ValueError for a kind or a setting that this peft does not know."""
    kind = PEFT_TYPE_TO_CONFIG_MAPPING.get(str(settings.get("peft_type", "LORA")).rpartition(".")[2])
    if kind is None:
        raise ValueError(f"{file}: peft has no adapters of type {settings.get('peft_type')!r}")
    known = kind().to_dict()
    if unknown := sorted(name for name, value in settings.items() if name not in known and value):
        raise ValueError(
            f"{file}: peft has no setting {unknown[0]} (it is {settings[unknown[0]]!r}) for {kind.__name__}"
        )
    chosen = {name: value for name, value in settings.items() if name in known and name != "peft_type"}
    for name in ("rank_pattern", "alpha_pattern"):
        if isinstance(chosen.get(name), dict):
            chosen[name] = {_own_name(key, model): value for key, value in chosen[name].items()}
    if isinstance(chosen.get("target_modules"), list):
        chosen["target_modules"] = [_own_name(key, model) for key in chosen["target_modules"]]
    return kind(**chosen | {"task_type": None})


def _own_name(name: str, model: nn.Module, prefix: str = "") -> str:
    """A module's name, after a prefix, in this model: transformers 5 has taken "text_model." out of CLIPTextModel's."""
    before = f"{prefix}text_model."
    return prefix + name[len(before) :] if name.startswith(before) and not hasattr(model, "text_model") else name


def is_shared(config: PeftConfig, file: Path) -> bool:
    """Whether an adapter is a plain LoRA, which leaves the base weights alone; the others are put on a copy.

    ValueError for one that was begun by changing the base weights in a way that cannot be repeated.
    """
    if not isinstance(config, LoraConfig) or config.peft_type != "LORA":
        return False
    begun = config.init_lora_weights
    if begun not in (*KEEPS_BASE, *REDONE):
        raise ValueError(
            f"{file} was begun by init_lora_weights={begun!r}, which changes the base weights in a way that is not in it: "
            "save it by save_pretrained(path_initial_model_for_weight_conversion=…)"
        )
    plain, settings = LoraConfig().to_dict(), config.to_dict()
    others = {name for name, value in settings.items() if value != plain.get(name)} - OBEYED - SILENT
    return begun in KEEPS_BASE and not others


def from_settings(model: nn.Module, settings: dict, state: dict[str, Tensor], file: Path) -> nn.Module:
    """The model with an adapter as peft puts it there: the model itself, or a copy with the adapter in its weights."""
    config = peft_config(settings, model, file)
    state = {_own_name(name, model, PEFT_PREFIX): value for name, value in state.items()}
    if is_shared(config, file):
        config.init_lora_weights = True
        return _put(model, config, {name.removeprefix(PEFT_PREFIX): state[name] for name in state}, file)
    with torch.random.fork_rng(devices=[]):  # what is random in the beginning is overwritten
        wrapped = get_peft_model(copy.deepcopy(model), config)
    _fill(wrapped, state, file)
    return wrapped.eval().merge_and_unload(safe_merge=True).requires_grad_(False)


def _put(model: nn.Module, config: LoraConfig, state: dict[str, Tensor], file: Path) -> nn.Module:
    model.add_adapter(config, adapter_name="default")
    _fill(model, state, file)
    return model.requires_grad_(False).eval()


def _fill(model: nn.Module, state: dict[str, Tensor], file: Path) -> None:
    """Give an adapter its weights: all of them and no others, or ValueError."""
    expected = get_peft_model_state_dict(model, adapter_name="default").keys()
    for trouble, names in (("lacks", expected - state.keys()), ("fits only in part, it has", state.keys() - expected)):
        if names:
            raise ValueError(
                f"{file} {trouble} {', '.join(sorted(names)[:3])} ({len(names)} of {len(expected)} tensors)"
            )
    set_peft_model_state_dict(model, state, "default")


def _add_folders(second: DiffusionPipeline, path: Path) -> None:
    """Put adapters on as PeftModel.save_pretrained leaves them: of the network in the folder itself or in a part of it."""
    name = network_name(second)
    targets = {path: name, path / name: name} | {path / part: part for part in TEXT_PARTS}
    there = [path, *sorted(folder for folder in path.iterdir() if folder.is_dir())]
    there = [folder for folder in there if (folder / "adapter_config.json").is_file()]
    for folder in there:
        if getattr(second, targets.get(folder, ""), None) is None or {path, path / name} <= set(there):
            raise ValueError(
                f"{folder} holds an adapter that belongs to no part of a {type(second).__name__}, or to two"
            )
    if not {path, path / name} & set(there):
        raise ValueError(f"{path} holds no adapter for the {name} of a {type(second).__name__}")
    for folder in there:
        file = folder / "adapter_model.safetensors"
        checkpoints.refuse_pickles(folder)
        if not file.is_file():
            raise FileNotFoundError(f"{folder} has an adapter_config.json but no adapter_model.safetensors")
        with reading(file):
            state = load_file(file)
            check_floating(file, state)
            check_finite(file, state)
            settings = checkpoints.read_json(folder / "adapter_config.json")
            setattr(second, targets[folder], from_settings(getattr(second, targets[folder]), settings, state, file))


# embeddings


def _add_embeddings(second: DiffusionPipeline, embeddings: dict[tuple[str, str], Tensor], file: Path) -> None:
    """Teach copies of the tokenizers and text encoders the words that a file brings along ({(word, kind): [n, width]})."""
    parts = {kind: TEXT_PARTS[kind == "clip_g"] for _, kind in embeddings}
    for part in dict.fromkeys(parts.values()):
        tokenizer = TOKENIZERS[TEXT_PARTS.index(part)]
        if getattr(second, part, None) is None:
            raise ValueError(f"{file} brings an embedding for a {part}, which a {type(second).__name__} has not")
        setattr(second, part, copy.deepcopy(getattr(second, part)))
        setattr(second, tokenizer, copy.deepcopy(getattr(second, tokenizer)))
    for (word, kind), vectors in embeddings.items():
        encoder, tokenizer = (
            getattr(second, names[TEXT_PARTS.index(parts[kind])]) for names in (TEXT_PARTS, TOKENIZERS)
        )
        with reading(file):
            second.load_textual_inversion({word: vectors}, token=word, text_encoder=encoder, tokenizer=tokenizer)
