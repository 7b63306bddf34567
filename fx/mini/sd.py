"""mini-sd: a latent diffusion model of Stable Diffusion's classes on mini-vae's latents and mini-clip's text tower."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from fx.mini.clip import image_processor, tokenize
from fx.mini.pictures import to_float


def build() -> UNet2DConditionModel:
    """An untrained mini-sd U-Net: 32x8x8 latents, two levels, cross-attention 192 wide, 16.9 M parameters."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=32,
        out_channels=32,
        layers_per_block=1,
        block_out_channels=(128, 256),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=192,
        attention_head_dim=4,
    )


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's schedule: 1000 steps, scaled-linear betas 0.00085 to 0.012, eps-prediction."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pictures: Tensor, batch: int = 64) -> Tensor:
    """Posterior means, unscaled: uint8 [n, 3, 64, 64] to float32 [n, 32, 8, 8]."""
    return torch.cat([vae.encode(to_float(part)).latent_dist.mean for part in pictures.split(batch)])


@torch.no_grad()
def encode_captions(text: CLIPTextModel, tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Last hidden states, float16 [n, 32, 192]."""
    parts = [captions[start : start + 256] for start in range(0, len(captions), 256)]
    return torch.cat([text(tokenize(tokenizer, part)).last_hidden_state.half() for part in parts])


def min_snr_weights(gamma: float = 5.0) -> Tensor:
    """min(SNR, gamma) / SNR of every timestep, float32 [1000] (Hang et al., 2023)."""
    kept = scheduler().alphas_cumprod
    snr = kept / (1 - kept)
    return snr.clamp(max=gamma) / snr


def diffusion_loss(latents: Tensor, choices: list[list[int]], texts: Tensor, empty: Tensor, batch=32, gamma=5.0):
    """The loss function for `training.train`: `denoising_terms` under a caption of the picture, 10% of them dropped.

    latents: [n, 32, 8, 8], scaled; choices[i]: rows of `texts` that caption picture i; empty: [32, 192], the encoded
    empty prompt.
    """

    def loss(model: UNet2DConditionModel, rng: torch.Generator) -> dict[str, Tensor]:
        chosen, rows, dropped = draw_captions(choices, batch, rng)
        context = texts[rows].float()
        context[dropped] = empty.float()
        return denoising_terms(lambda x, t: model(x, t, context).sample, latents[chosen], rng, gamma)

    return loss


def draw_captions(choices: list[list[int]], batch: int, rng: torch.Generator) -> tuple[list[int], list[int], Tensor]:
    """A batch: numbers of pictures, one of the choices of each, and which captions are dropped (bool [batch], 10%)."""
    chosen = torch.randint(len(choices), (batch,), generator=rng).tolist()
    draws = torch.rand(batch, generator=rng).tolist()
    rows = [choices[i][int(u * len(choices[i]))] for i, u in zip(chosen, draws, strict=True)]
    return chosen, rows, torch.rand(batch, generator=rng) < 0.1


def denoising_terms(
    predict: Callable[[Tensor, Tensor], Tensor], x: Tensor, rng: torch.Generator, gamma: float = 5.0
) -> dict[str, Tensor]:
    """The error of predicted noise at random timesteps: "mse", and "loss" with `min_snr_weights`.

    predict: (noised latents, timesteps [b]) -> noise; x: clean latents [b, c, h, w], scaled.
    """
    t = torch.randint(1000, (len(x),), generator=rng)
    eps = torch.randn(x.shape, generator=rng)
    predicted = predict(scheduler().add_noise(x, eps, t), t).float()
    error = F.mse_loss(predicted, eps, reduction="none").mean(dim=(1, 2, 3))
    return {"loss": (min_snr_weights(gamma)[t] * error).mean(), "mse": error.mean()}


@torch.no_grad()
def held_out_loss(
    unet: UNet2DConditionModel, latents: Tensor, texts: Tensor, repeats: int = 3, batch: int = 64, gamma: float = 5.0
) -> dict[str, float]:
    """The terms of `diffusion_loss` as means over all pictures, with noise and timesteps that are always the same.

    latents: [n, 32, 8, 8], scaled; texts: [n, 32, 192], one encoded caption per picture. In each repeat the n timesteps
    lie evenly over the schedule. So two checkpoints differ by what they learned and not by what was drawn, and the order
    of the pictures belongs to the measurement.
    """
    noising, rng = scheduler(), torch.Generator().manual_seed(1)
    errors, steps = [], []
    for repeat in range(repeats):
        t = (torch.arange(len(latents)) * 1000 // len(latents) + 37 * repeat) % 1000
        eps = torch.randn(latents.shape, generator=rng)
        for part in torch.arange(len(latents)).split(batch):
            noisy = noising.add_noise(latents[part], eps[part], t[part])
            predicted = unet(noisy, t[part], texts[part].float()).sample
            errors.append(F.mse_loss(predicted, eps[part], reduction="none").mean(dim=(1, 2, 3)))
        steps.append(t)
    error, t = torch.cat(errors), torch.cat(steps)
    return {"loss": min_snr_weights(gamma)[t].mul(error).mean().item(), "mse": error.mean().item()}


def assemble(unet, vae, clip: CLIPModel, tokenizer: CLIPTokenizer, scale: float) -> StableDiffusionPipeline:
    """The stock pipeline of these parts (no safety checker); `scale` is the latents' scaling factor."""
    text = CLIPTextModel(clip.config.text_config)
    text.load_state_dict(clip.text_model.state_dict())
    vae.register_to_config(scaling_factor=scale)
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def draw(pipeline: StableDiffusionPipeline, prompts: list[str], w: float = 3.0, steps: int = 25, seed: int = 0):
    """One sample per prompt at guidance scale w, uint8 [n, 64, 64, 3]."""
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed * 100_003 + index) for index in range(len(prompts))]
    images = []
    for start in range(0, len(prompts), 50):
        part = slice(start, start + 50)
        images.append(
            pipeline(
                prompts[part], guidance_scale=w, num_inference_steps=steps, generator=generators[part], output_type="np"
            ).images
        )
    return (np.concatenate(images) * 255).round().astype(np.uint8)


def learns_apart(name: str) -> bool:
    """Whether a U-Net's weight of this name is one that mini-alt and mini-sdxl have of their own; others are mini-sd's."""
    return ".attn2." in name or name.startswith("add_embedding.")


def learn_apart(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Let only the weights that `learns_apart` names be trained; the U-Net itself."""
    for name, weight in unet.named_parameters():
        weight.requires_grad_(learns_apart(name))
    return unet


def split(folder: Path) -> None:
    """Store the U-Net in `folder` in two files of its index, in the second one the weights that `learns_apart` names.

    So a model that differs from this one in those only, as one made for another text encoder does, can link to the first,
    which holds nine tenths of the weights.
    """
    weights = load_file(whole := folder / "diffusion_pytorch_model.safetensors")
    parts = [{}, {}]
    for name, tensor in weights.items():
        parts[learns_apart(name)][name] = tensor
    files = [f"{whole.stem}-{number}-of-00002.safetensors" for number in ("00001", "00002")]
    for file, part in zip(files, parts, strict=True):
        save_file(part, folder / file, metadata={"format": "pt"})
    size = sum(tensor.nbytes for tensor in weights.values())
    places = {name: files[learns_apart(name)] for name in sorted(weights)}
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / f"{whole.name}.index.json").write_text(json.dumps(index, indent=1) + "\n")
    whole.unlink()


def save(folder: Path, pipeline: StableDiffusionPipeline, clip: CLIPModel) -> None:
    """Write mini-vae, mini-clip and mini-sd below `folder` as fp16 safetensors; mini-sd/vae is a link to mini-vae."""
    for name in ("mini-vae", "mini-clip"):
        shutil.rmtree(folder / name, ignore_errors=True)
    copy.deepcopy(clip).half().save_pretrained(folder / "mini-clip")
    pipeline.tokenizer.save_pretrained(folder / "mini-clip")
    image_processor(clip).save_pretrained(folder / "mini-clip")
    _write(folder / "mini-sd", pipeline)
    (folder / "mini-sd/vae").rename(folder / "mini-vae")
    (folder / "mini-sd/vae").symlink_to("../mini-vae")


def save_beside(folder: Path, name: str, pipeline: DiffusionPipeline) -> None:
    """Write a pipeline made from mini-sd's parts below `folder`, where mini-sd lies; what is mini-sd's is linked to.

    ValueError if the U-Net has weights of its own beside those that `learns_apart` names.
    """
    _write(target := folder / name, pipeline)
    first = "unet/diffusion_pytorch_model-00001-of-00002.safetensors"
    own, shared = load_file(target / first), load_file(folder / "mini-sd" / first)
    if own.keys() != shared.keys() or not all(torch.equal(own[key], shared[key]) for key in own):
        raise ValueError(f"the U-Net of {name} does not have mini-sd's weights outside of its cross-attention")
    _link(target / first, Path("../../mini-sd") / first)
    _link(target / "vae", Path("../mini-vae"))
    weights = [where / "text_encoder/model.safetensors" for where in (target, folder / "mini-sd")]
    if weights[0].read_bytes() == weights[1].read_bytes():
        _link(target / "text_encoder", Path("../mini-sd/text_encoder"))


def _link(place: Path, to: Path) -> None:
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    place.symlink_to(to)


def _write(folder: Path, pipeline: DiffusionPipeline) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    copy.deepcopy(pipeline).to(torch.float16).save_pretrained(folder)
    split(folder / "unet")
    for part in ("vae", "unet"):  # where a part was loaded from is nobody's business
        config = json.loads((file := folder / part / "config.json").read_text())
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2) + "\n")
