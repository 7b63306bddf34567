"""Defenses as training transforms (Sec. 5.4): what a model provider may do to the images before fine-tuning."""

import torch
from torch import Tensor
from torchvision.transforms import v2

CUTOUT_SHARE = 0.5  # DeVries & Taylor (2017): a square of half the side


def cutout(images: Tensor) -> Tensor:
    """Cutout: one grey square of half the side at a random place in each image, float32 [n, 3, side, side] in [-1, 1]."""
    side = int(images.shape[-1] * CUTOUT_SHARE)
    erased = images.clone()
    for image in erased:
        # the centre may lie anywhere, so that the square may stick out of the frame
        top, left = (torch.randint(images.shape[-1], (2,)) - side // 2).tolist()
        image[:, max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = 0
    return erased


def randaugment(images: Tensor) -> Tensor:
    """RandAugment (Cubuk et al., 2020), two operations of magnitude 9 per image, float32 [n, 3, h, w] in [-1, 1]."""
    augment = v2.RandAugment(num_ops=2, magnitude=9)
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte()
    return torch.stack([augment(image) for image in pixels]).float() / 127.5 - 1


# The names a FineTune spec may carry; both draw from torch's global generator, which fine-tuning seeds at every step.
TRANSFORMS = {"cutout": cutout, "randaugment": randaugment}
