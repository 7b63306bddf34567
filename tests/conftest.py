"""A tiny random pipeline of the stock classes, a folder of pictures and a work area of its own, for all test files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import settings
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fx import results
from fx.mini.sd import scheduler
from fx.models import load_pipeline

MAX_TOKENS = 16

settings.register_profile("fx", deadline=None)  # a busy machine is no failure
settings.load_profile("fx")


def byte_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with one token per byte and the two merges that make "dog" one token; 16 tokens at most."""
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "do", "dog</w>", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[("d", "o"), ("do", "g</w>")], model_max_length=MAX_TOKENS)


def text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained text encoder, 2 layers, 32 wide."""
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return CLIPTextModel(
        CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=MAX_TOKENS, **size, **special)
    )


def autoencoder() -> AutoencoderKL:
    """An untrained autoencoder: 3x16x16 pictures to 4x4x4 latents."""
    return AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )


def unet() -> UNet2DConditionModel:
    """An untrained U-Net for 4x4x4 latents with cross-attention, two levels."""
    return UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
    )


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory) -> Path:
    """A folder with a tiny random StableDiffusionPipeline: 16 px pictures, 4x4x4 latents, captions of 16 tokens."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sd"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = byte_tokenizer()
        parts = {"unet": unet(), "vae": autoencoder(), "text_encoder": text_encoder(tokenizer), "tokenizer": tokenizer}
    absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = StableDiffusionPipeline(**parts, **absent, scheduler=scheduler())
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_sd) -> StableDiffusionPipeline:
    """The pipeline in `tiny_sd`, loaded once: to be read, not to be changed."""
    return load_pipeline(str(tiny_sd))


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory) -> Path:
    """A folder of four PNG files, 24 px, each a different smooth mixture of colours: to be read, not to be changed."""
    folder = tmp_path_factory.mktemp("pictures")
    rows, columns = np.mgrid[0:24, 0:24] / 23
    for number in range(4):
        waves = [np.sin((number + 1) * rows + k * columns * (number + 2)) for k in (1, 2, 3)]
        pixels = (127.5 + 127.5 * np.stack(waves, axis=2)).round().astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """An empty work area; the steps of this test are kept there and nowhere else."""
    monkeypatch.setattr(results, "RUNS", tmp_path / "runs")
    return results.RUNS
