"""Model pairs (Sec. 3.1): the base model theta and the fine-tuned model theta' behind one interface."""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from transformers import CLIPTokenizer
from transformers.utils import logging as transformers_logging

from fx.paths import MODELS

LORA_FILE = "pytorch_lora_weights.safetensors"
PICKLES = ("diffusion_pytorch_model*.bin", "pytorch_model*.bin", "pytorch_lora_weights*.bin")
diffusers_logging.disable_progress_bar()
transformers_logging.disable_progress_bar()


def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def model_folder(name: str) -> Path:
    """The folder of a shipped pipeline ("mini-sd") or of a path to a diffusers pipeline folder."""
    for folder in (MODELS / name, Path(name).expanduser()):
        if (folder / "model_index.json").is_file():
            return folder
    shipped = sorted(path.parent.name for path in MODELS.glob("*/model_index.json"))
    raise FileNotFoundError(
        f"unknown model {name!r}: it is no folder with a model_index.json; shipped models: {', '.join(shipped) or 'none'}"
    )


def load_pipeline(name: str) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline in float32 with the deterministic DDIM scheduler; only safetensors are read."""
    _refuse_pickles(folder := model_folder(name))
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder,
        dtype=torch.float32,
        use_safetensors=True,
        safety_checker=None,
        requires_safety_checker=False,
        local_files_only=True,
    )
    # a scheduler of another class may not name clip_sample, and DDIM's default would clip latents to [-1, 1]
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        part.requires_grad_(False).eval()
    return pipeline.to(device())


def _refuse_pickles(folder: Path) -> None:
    """ValueError if `folder` or a part of the model in it has weights as a pickle only."""
    for pickle in (path for part in (folder, *folder.glob("*/")) for name in PICKLES for path in part.glob(name)):
        if not any(pickle.parent.glob("*.safetensors")):
            raise ValueError(
                f"{pickle} is a pickle, which can run code when it is read: only safetensors are; "
                "convert it where it can be trusted (save_pretrained writes safetensors)"
            )


@functools.cache
def load_tokenizer(name: str) -> CLIPTokenizer:
    """The tokenizer of a pipeline (see `model_folder`)."""
    return CLIPTokenizer.from_pretrained(model_folder(name) / "tokenizer")


def check_caption(tokenizer: CLIPTokenizer, caption: str) -> None:
    """ValueError if a caption has more tokens than the text encoder reads; it would be cut off silently otherwise."""
    limit, n = tokenizer.model_max_length, len(tokenizer(caption).input_ids)
    if n > limit:
        raise ValueError(f"the caption {caption!r} has {n} tokens, the text encoder reads at most {limit}: shorten it")


def encode_caption(pipeline: StableDiffusionPipeline, caption: str) -> Tensor:
    """Last hidden state of the text encoder, [1, tokens, width]; ValueError if the caption does not fit."""
    tokenizer = pipeline.tokenizer
    check_caption(tokenizer, caption)
    ids = tokenizer(caption, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt").input_ids
    with torch.no_grad():
        return pipeline.text_encoder(ids.to(pipeline.device))[0]


@dataclass
class ModelPair:
    """theta and theta': two U-Nets, or (LoRA) one U-Net whose adapter is switched off and on.

    pipeline: the fine-tuned model. base_unet: theta's U-Net, None where `pipeline.unet` carries the LoRA adapter.
    """

    pipeline: StableDiffusionPipeline
    base_unet: UNet2DConditionModel | None

    def base(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """eps_theta(x_t, t, text): latents [n, c, h, w], one timestep, text [1, tokens, width]."""
        if self.base_unet is not None:
            return _predict(self.base_unet, x, t, text)
        self.pipeline.unet.disable_adapters()
        try:
            return _predict(self.pipeline.unet, x, t, text)
        finally:
            self.pipeline.unet.enable_adapters()

    def tuned(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """eps_theta'(x_t, t, text), shapes as in `base`."""
        return _predict(self.pipeline.unet, x, t, text)


def _predict(unet: UNet2DConditionModel, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    return unet(x, t, encoder_hidden_states=text.expand(len(x), -1, -1)).sample


def load_pair(base: str, tuned: Path) -> ModelPair:
    """The pair of a base model and a folder that holds a fine-tuned `unet/`, or a LoRA in diffusers' layout."""
    _refuse_pickles(tuned)
    pipeline = load_pipeline(base)
    if (tuned / LORA_FILE).is_file():
        pipeline.load_lora_weights(tuned, weight_name=LORA_FILE, adapter_name="default")
        if "unet" not in pipeline.get_list_adapters():
            raise ValueError(f"{tuned / LORA_FILE} holds no adapter for the U-Net of {base}")
        return ModelPair(pipeline, None)
    if not (tuned / "unet/config.json").is_file():
        raise FileNotFoundError(f"{tuned} holds neither a unet/ folder nor {LORA_FILE}")
    base_unet = pipeline.unet
    unet = UNet2DConditionModel.from_pretrained(tuned / "unet", use_safetensors=True, dtype=torch.float32)
    pipeline.unet = unet.requires_grad_(False).eval().to(pipeline.device)
    return ModelPair(pipeline, base_unet)
