"""Image quality and fidelity (App. I; Tables 8, 9 and 10): CLIP-IQA (Wang et al., 2023) and DINO (Ruiz et al., 2023).

A judge is a network with the way images enter it. A CLIP gives both measures, a DINO ViT gives fidelity. The shipped
`mini-clip` plays both roles on the mini models, and `column` names the judge wherever a score is shown.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, Dinov2Model, ViTModel
from transformers.image_processing_utils import BaseImageProcessor

from fx import checkpoints
from fx.datasets import to_uint8
from fx.models import KEPT, device
from fx.parts import check_finite
from fx.results import sha256_of

# The judges of the paper's models, at revisions with safetensors. App. I names CLIP-IQA without its network. The ResNet-50
# of Wang et al. is published as a TorchScript program that libraries fetch and run, so the ViT-B/16 of CLIP stands here; its
# scores are others. torchmetrics 1.9 takes neither a folder nor this ViT under transformers 5.
CLIP = "openai/clip-vit-base-patch16@refs/pr/10"
DINO = "facebook/dino-vits16@refs/pr/1"  # the ViT-S/16 of Ruiz et al.

# CLIP-IQA's antonym prompts; a CLIP trained with other words names them in its config.json
ANTONYMS = ("Good photo.", "Bad photo.")
KINDS = {"clip": CLIPModel, "vit": ViTModel, "dinov2": Dinov2Model}  # by the model_type of config.json
MEASURES = ("CLIP-IQA", "fidelity", "AS")


@dataclass(frozen=True)
class Judge:
    """A network in eval mode, what makes its input of uint8 [n, 3, h, w], and, of a CLIP, what CLIP-IQA needs.

    prompts: features float32 [2, d] of the good and of the bad prompt. scale: the temperature by which CLIP multiplies
    cosines (100 for the published ones). Both are None for a network without a text tower.
    """

    network: nn.Module
    processor: BaseImageProcessor
    prompts: Tensor | None = None
    scale: float | None = None


def load_judge(name: str | Path) -> Judge:
    """The judge `name` on the GPU where there is one: "mini-clip" (shipped), a folder, or a Hub id with "@revision".

    A folder is laid out as save_pretrained does it: config.json, model.safetensors and preprocessor_config.json of a
    CLIPModel (with its tokenizer), a ViTModel (DINO) or a Dinov2Model. Raises FileNotFoundError for what is not there,
    ValueError for another network and for files that are pickles, truncated, incomplete or not finite.

    It stays in memory for the next score, as a model pair does for the next arm (`fx.models.let_go`): to be read only.
    """
    folder = _folder(name)
    asked = "judge", sha256_of(folder), device()
    if asked not in KEPT:
        KEPT[asked] = _judge(folder)
    return KEPT[asked]


def _judge(folder: Path) -> Judge:
    """The judge in a folder, loaded now."""
    network = _network(folder)
    try:
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except OSError as error:
        raise ValueError(f"{folder / 'preprocessor_config.json'} cannot be read: {error}") from error
    if not isinstance(network, CLIPModel):
        return Judge(network, processor)
    return Judge(network, processor, prompt_features(network, folder), network.logit_scale.exp().item())


@functools.cache
def checked(name: str) -> Path:
    """Where a judge lies, for a step that needs it later: raises now what `load_judge` would raise for its files."""
    return _folder(name)


def _folder(name: str | Path) -> Path:
    """Where a judge lies, once its files are known to be there and to be whole safetensors."""
    try:
        folder = checkpoints.find(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no network to judge images ('mini-clip' is shipped): {error}") from None
    for file in ("config.json", "preprocessor_config.json"):
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"{folder} holds no {file}: name a folder that save_pretrained of a CLIP, ViT or DINOv2 model and of its "
                "image processor has written"
            )
    checkpoints.refuse_pickles(folder)
    checkpoints.check_folder(folder)
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{folder} holds no model.safetensors: fetch it; on the Hub the revision with safetensors may be named "
            "refs/pr/NUMBER (owner/name@refs/pr/1)"
        )
    return folder


@torch.no_grad()
def _network(folder: Path) -> nn.Module:
    """The network of a folder, float32, frozen, in eval mode; ValueError if it is no judge or its weights do not fit."""
    named = json.loads((folder / "config.json").read_text()).get("model_type")
    if named not in KINDS:
        raise ValueError(
            f"{folder} holds a network of type {named!r}, which judges no images: choose one of {', '.join(KINDS)}"
        )
    options = {"add_pooling_layer": False} if named == "vit" else {}  # DINO is the class token; it has no pooling layer
    network, info = KINDS[named].from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
    )
    for trouble in ("missing_keys", "mismatched_keys"):
        if info[trouble]:
            first = ", ".join(map(str, list(info[trouble])[:3]))
            raise ValueError(f"the weights in {folder} do not fit its config.json: {trouble.replace('_', ' ')} {first}")
    check_finite(folder, dict(network.named_parameters()))
    return network.requires_grad_(False).to(device())


@torch.no_grad()
def prompt_features(network: CLIPModel, folder: Path) -> Tensor:
    """Features float32 [2, d], of any length, of a CLIP's good and bad prompt.

    The prompts belong to the network: `quality_prompts` of its config.json, or else ANTONYMS. folder: holds the tokenizer;
    FileNotFoundError where it does not, since transformers would take one that knows no words.
    """
    if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json")):
        raise FileNotFoundError(f"{folder} holds no tokenizer.json: save the tokenizer of this CLIP beside its weights")
    prompts = list(getattr(network.config, "quality_prompts", ANTONYMS))
    tokens = AutoTokenizer.from_pretrained(folder, local_files_only=True)(
        prompts,
        padding="max_length",
        truncation=True,
        max_length=network.config.text_config.max_position_embeddings,
        return_tensors="pt",
    )
    return network.get_text_features(tokens.input_ids.to(network.device)).pooler_output.cpu()


def column(measure: str, name: str | Path) -> str:
    """The name of a score in tables and figures, which says who judged: "CLIP-IQA (mini-clip)", "fidelity (mini-clip)".

    measure: one of MEASURES. name: as for `load_judge`; of a folder its last part stands, of a Hub id all but the revision.
    """
    if measure not in MEASURES:
        raise ValueError(f"unknown measure {measure!r}: choose one of {', '.join(MEASURES)}")
    folder = Path(name).expanduser()
    return f"{measure} ({folder.resolve().name if folder.is_dir() else str(name).partition('@')[0]})"


def check_images(images: np.ndarray | Tensor) -> None:
    """ValueError unless images are uint8 [n, h, w, 3] (array) or floating point [n, 3, h, w] (tensor), at least one."""
    if isinstance(images, Tensor):
        right, channels = images.dtype.is_floating_point, 1
    else:
        right, channels = images.dtype == np.uint8, 3
    if not right or images.ndim != 4 or images.shape[channels] != 3 or 0 in images.shape:
        raise ValueError(
            "images must be at least one, uint8 [n, h, w, 3] as an array or floating point [n, 3, h, w] in [-1, 1] as a "
            f"tensor, not {type(images).__name__} {list(images.shape)} of {images.dtype}"
        )


def pixels(images: np.ndarray | Tensor) -> Tensor:
    """Images as `check_images` takes them -> uint8 [n, 3, h, w]; ValueError for floats that are not in [-1, 1]."""
    if isinstance(images, Tensor):
        if not (images.abs() <= 1 + 1e-3).all():  # NaN is not
            low, high = images.min().item(), images.max().item()
            raise ValueError(f"images of floating point must lie in [-1, 1], these reach from {low:g} to {high:g}")
        images = to_uint8(images.float())
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)


@torch.no_grad()
def features(judge: Judge, images: np.ndarray | Tensor, batch_size: int = 64) -> np.ndarray:
    """Features float32 [n, d] of unit length: a CLIP's image embedding, a ViT's class token behind the last norm.

    images: see `check_images`; an array may be a memory map, since batches are read one by one. The judge's own processor
    resizes, crops and normalises, so that any size may enter. A progress bar appears from 2,000 images on. Batches of
    another size change the last bits (about 1e-6) at most.
    """
    check_images(images)
    starts = tqdm(range(0, len(images), batch_size), "features", disable=len(images) < 2000, mininterval=2)
    found = [_embed(judge, pixels(images[start : start + batch_size])).cpu() for start in starts]
    return torch.cat(found).numpy()


def _embed(judge: Judge, images: Tensor) -> Tensor:
    # resized on the CPU wherever the network is: torchvision rounds otherwise on a GPU
    prepared = judge.processor(images=images, return_tensors="pt")["pixel_values"].to(judge.network.device)
    if isinstance(judge.network, CLIPModel):
        return F.normalize(judge.network.get_image_features(pixel_values=prepared).pooler_output)
    return F.normalize(judge.network(pixel_values=prepared).last_hidden_state[:, 0])


def clip_iqa(judge: Judge, images: np.ndarray | Tensor, batch_size: int = 64) -> np.ndarray:
    """CLIP-IQA of every image (Wang et al., 2023, antonym prompt pairing), float32 [n] in 0..1, larger is better.

    The tables of the paper (8 to 10) give the mean over images. Raises ValueError for a judge without a text tower and for
    images that `check_images` refuses.
    """
    if judge.prompts is None:
        kind = type(judge.network).__name__
        raise ValueError(f"CLIP-IQA compares images with two prompts, and a {kind} reads no text: judge by a CLIP")
    embedded = torch.from_numpy(features(judge, images, batch_size))
    return antonym_scores(embedded, judge.prompts, judge.scale).numpy()


def antonym_scores(images: Tensor, prompts: Tensor, scale: float | Tensor) -> Tensor:
    """The probability [n] in 0..1 that an image goes with the first of two prompts: softmax over two scaled cosines.

    images [n, d], prompts [2, d]: features of any length; scale: the temperature by which their cosines are multiplied.
    """
    cosines = F.normalize(images) @ F.normalize(prompts).T
    return (scale * cosines).softmax(dim=1)[:, 0]


def fidelity(
    judge: Judge, generated: np.ndarray | Tensor, training: np.ndarray | Tensor, batch_size: int = 64
) -> float:
    """Fidelity in -1..1: the mean cosine of features over all pairs of a generated and a training image, n x m pairs.

    App. I measures it by DINO "with respect to the training dataset", after Ruiz et al. (2023): the average cosine
    similarity over pairs of ViT-S/16 DINO embeddings of generated and real images. The two sets may differ in number and in
    size of images. ValueError for images that `check_images` refuses.
    """
    # the mean of all inner products is the inner product of the means
    means = [features(judge, images, batch_size).mean(axis=0, dtype=np.float64) for images in (generated, training)]
    return float(means[0] @ means[1])
