"""Fine-tuned models in the forms in which people publish them, with what they say of themselves and what they do not.

    made = Published(model, "kohya", says=True)         # a step: the file is written once
    known = Checkpoint(str(published(made)), "mini-sd") # and from here on it is somebody else's

Notebook 08 makes a zoo of these and then treats each as a download.
"""

import json
import shutil
import string
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fx import adapters, checkpoints, results
from fx.families import TEXT_PARTS, network, network_name
from fx.finetune import FineTune, load_training
from fx.models import LORA_FILE, load_pipeline
from fx.names_of_modules import original_names
from fx.single_files import NETWORK
from fx.tuned import load_tuned, own_caption

FORMS = {
    "dreambooth": ("parts", "pipeline", "fp16", "single file"),
    "lora": ("diffusers", "kohya", "peft"),
}
NAME = set(string.ascii_letters + string.digits + "-_.")
REPEATS = 10  # how often kohya's scripts are said to have shown each image in an epoch


@dataclass(frozen=True)
class Published:
    """A fine-tuning as its maker hands it on.

    form, of DreamBooth: "parts" (a training script's folder: what was trained and nothing else), "pipeline" (the whole
    model as a diffusers folder), "fp16" (the same in half precision, by that variant's file names), "single file" (the
    network in the original code's names, in half precision); of a LoRA and its relatives: "diffusers", "kohya", "peft".
    says: whether the header (kohya) or the model card (all others) tells the base model, the caption and, in kohya's
    header, the number of images. name: of the file or folder, by which a model made on this one will call its base.
    """

    VERSION: ClassVar[int] = 1

    model: FineTune
    form: str
    says: bool = False
    name: str = field(default="model", metadata={"absent": "model"})

    def __post_init__(self):
        if self.form not in FORMS[self.model.method]:
            raise ValueError(
                f"unknown form {self.form!r} of a {self.model.method} fine-tuning: choose from "
                f"{', '.join(FORMS[self.model.method])}"
            )
        if not self.name.strip(".") or not set(self.name) <= NAME:
            raise ValueError(f"name {self.name!r} must be of letters, digits, points, dashes and underscores")
        if self.form == "single file" and self.model.text_encoder:
            raise ValueError("a single file is written of the network only: publish a trained text encoder as parts")
        if self.form == "single file" and self.says:
            raise ValueError("a single file brings no model card along: publish one that says something as parts")
        if self.form in ("diffusers", "peft") and self.model.adapter == "loha":
            raise ValueError(f"a LoHa has no layout of the form {self.form}: publish it as kohya")


def published(spec: Published) -> Path:
    """The file or folder to hand on, written now if it is missing."""
    return _target(spec, results.complete(spec))


def _target(spec: Published, folder: Path) -> Path:
    return folder / (f"{spec.name}.safetensors" if spec.form in ("single file", "kohya") else spec.name)


@results.perform.register
def _(spec: Published, folder: Path) -> None:
    """Write a folder or a .safetensors file of that name."""
    target = _target(spec, folder)
    {
        "parts": _parts,
        "pipeline": _pipeline,
        "fp16": _pipeline,
        "single file": _single_file,
        "diffusers": _diffusers,
        "kohya": _kohya,
        "peft": _peft,
    }[spec.form](spec, target)
    if spec.says and target.is_dir():
        entries = {"base_model": spec.model.base, "instance_prompt": own_caption(spec.model) or ""}
        lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in entries.items() if value]
        (target / "README.md").write_text("\n".join(["---", *lines, "---", ""]), encoding="utf-8")


def _parts(spec: Published, target: Path) -> None:
    made = results.complete(spec.model)
    shutil.copytree(made, target, ignore=shutil.ignore_patterns(results.MANIFEST, "losses.npy", "sigma.safetensors"))


def _pipeline(spec: Published, target: Path) -> None:
    pipeline = load_tuned(spec.model).tuned
    half = spec.form == "fp16"
    (pipeline.to(torch.float16) if half else pipeline).save_pretrained(target, variant="fp16" if half else None)


def _single_file(spec: Published, target: Path) -> None:
    unet = network(load_tuned(spec.model).tuned)
    if network_name(load_pipeline(spec.model.base)) != "unet":
        raise ValueError(f"{spec.model.base} has no U-Net, of which alone the original names are written here")
    names = original_names(unet)
    found = {}
    for name, value in unet.state_dict().items():
        module, _, kind = name.rpartition(".")
        if module not in names:
            raise ValueError(f"{name} has no name in the original code")
        found[f"{NETWORK}{names[module]}.{kind}"] = value.half().contiguous()
    save_file(found, target)


def _diffusers(spec: Published, target: Path) -> None:
    target.mkdir()
    shutil.copy(results.complete(spec.model) / LORA_FILE, target)


def layers_of(model: FineTune) -> dict[str, dict[str, adapters.Layer]]:
    """The layers of a finished LoRA or one of its relatives by part and module, each with its alpha."""
    file = results.complete(model) / LORA_FILE
    found = adapters.read(load_pipeline(model.base), load_file(file), file)
    for layers in found.values():
        for layer in layers.values():
            layer.setdefault("alpha", torch.tensor(float(model.alpha)))
    return found


KOHYA = {"down": "lora_down.weight", "up": "lora_up.weight", "magnitude": "dora_scale"}


def _kohya(spec: Published, target: Path) -> None:
    found = layers_of(spec.model)
    second = "text_encoder_2" in found
    tensors: dict[str, Tensor] = {}
    for part, layers in found.items():
        stem = {"text_encoder": "lora_te1" if second else "lora_te", "text_encoder_2": "lora_te2"}.get(
            part, "lora_unet"
        )
        for path, layer in layers.items():
            path = f"text_model.{path.removeprefix('text_model.')}" if part in TEXT_PARTS else path
            module = f"{stem}_{path.replace('.', '_')}"
            for word, value in layer.items():
                value = value[:, None] if word == "magnitude" and value.ndim == 1 else value
                tensors[f"{module}.{KOHYA.get(word, word)}"] = value.clone().contiguous()
    save_file(tensors, target, header_of(spec.model) if spec.says else None)
    if spec.says:
        checkpoints.settle(target)


def header_of(model: FineTune) -> dict[str, str]:
    """What kohya's scripts leave in the header of a file: base, rank, alpha, and a folder per item with its images."""
    items = [load_training(part) for part in model.training]
    folders = {f"{REPEATS}_{item.caption}": {"n_repeats": REPEATS, "img_count": item.n_training} for item in items}
    return {
        "ss_sd_model_name": model.base,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(model.rank),
        "ss_network_alpha": str(model.alpha),
        "ss_num_train_images": str(REPEATS * sum(item.n_training for item in items)),
        "ss_dataset_dirs": json.dumps(folders, ensure_ascii=False),
        "ss_learning_rate": str(model.learning_rate),
    }


def _peft(spec: Published, target: Path) -> None:
    """As PeftModel.save_pretrained leaves it: the network's adapter in the folder, a text encoder's in one below."""
    file = results.complete(spec.model) / LORA_FILE
    for part, layers in layers_of(spec.model).items():
        place = target / part if part in TEXT_PARTS else target
        place.mkdir(parents=True, exist_ok=True)
        settings = adapters.header_settings(file, part)
        endings = {"down": "lora_A.weight", "up": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
        tensors = {
            f"{adapters.PEFT_PREFIX}{path}.{endings[word]}": value.contiguous()
            for path, layer in layers.items()
            for word, value in layer.items()
            if word in endings
        }
        save_file(tensors, place / "adapter_model.safetensors")
        (place / "adapter_config.json").write_text(json.dumps(settings, default=sorted))
