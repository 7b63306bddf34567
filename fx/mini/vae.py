"""mini-vae: diffusers' AutoencoderKL for 64 px pictures, factor 8, 32 latent channels."""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from fx.families import round_trip
from fx.mini.pictures import recolour, to_float, warp


def build() -> AutoencoderKL:
    """An untrained mini-vae: 3x64x64 pictures in [-1, 1] to 32x8x8 latents (6 times fewer numbers)."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=32,
        norm_num_groups=8,
        sample_size=64,
    ).to(memory_format=torch.channels_last)


def reconstruction_loss(pictures: Tensor, batch: int = 8, kl: float = 5e-6):
    """The loss function for `training.train`: L1 + 4 MSE + kl * KL, means over pixels and latents.

    pictures: uint8 [n, 3, 128, 128]. One in eight is zoomed up to four times and recoloured, so that textures other
    than drawings on white are seen too.
    """

    def loss(model: AutoencoderKL, rng: torch.Generator) -> dict[str, Tensor]:
        chosen = to_float(pictures[torch.randint(len(pictures), (batch,), generator=rng)])
        wild = batch // 8
        crops = recolour(warp(chosen[:wild], rng, zoom=(1.0, 4.0), turn=20, shift=0.2), rng)
        images = torch.cat([crops, warp(chosen[wild:], rng)])
        images = F.avg_pool2d(images, 2).contiguous(memory_format=torch.channels_last)
        posterior = model.encode(images).latent_dist
        rebuilt = model.decode(posterior.sample(generator=rng)).sample
        mse, l1 = F.mse_loss(rebuilt, images), F.l1_loss(rebuilt, images)
        rate = 0.5 * (posterior.mean.pow(2) + posterior.var - 1 - posterior.logvar).mean()
        plain = (rebuilt[wild:] - images[wild:]).detach().pow(2).mean(dim=(1, 2, 3))
        return {"loss": l1 + 4 * mse + kl * rate, "psnr": 10 * torch.log10(4 / plain).mean(), "kl": rate}

    return loss


def decoder_only(model: AutoencoderKL) -> AutoencoderKL:
    """The same model with its encoder frozen, so that the latents no longer move."""
    model.requires_grad_(True)
    model.encoder.requires_grad_(False)
    model.quant_conv.requires_grad_(False)
    return model


def rebuild(model: AutoencoderKL, pictures: Tensor, batch: int = 64) -> Tensor:
    """Pictures encoded and decoded again: uint8 [n, 3, 64, 64] to float32 [n, 3, 64, 64] in [-1, 1]."""
    return round_trip(model, to_float(pictures), batch)


def ratio(pictures: Tensor, rebuilt: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture: uint8 and float32 in [-1, 1], both [n, 3, h, w], to float [n]."""
    return 10 * torch.log10(4 / (rebuilt - to_float(pictures)).pow(2).mean(dim=(1, 2, 3)))


def psnr(model: AutoencoderKL, pictures: Tensor, batch: int = 64) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture's reconstruction: uint8 [n, 3, 64, 64] to float [n]."""
    return ratio(pictures, rebuild(model, pictures, batch))


def anatomy(images: Tensor, cell: int = 8) -> dict[str, float]:
    """Mean squares of images [n, 3, h, w] in four parts that are orthogonal, so that their sum is that of the whole.

    Areas: the mean of each cell x cell square, the size of a latent; detail: what is left. Grey: the mean of the three
    channels; colour: what is left. h and w are multiples of `cell`. Of an error, images are differences.
    """
    areas = F.interpolate(F.avg_pool2d(images, cell), scale_factor=cell)
    shares = {}
    for name, part in {"areas": areas, "detail": images - areas}.items():
        grey = part.mean(dim=1, keepdim=True).expand_as(part)
        shares |= {f"{name}, grey": grey.pow(2).mean().item(), f"{name}, colour": (part - grey).pow(2).mean().item()}
    return shares
