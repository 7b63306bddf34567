"""mini-sdxl: StableDiffusionXLPipeline's own classes on mini-vae's latents.

Two text encoders, of which the last but one hidden states are used side by side; the second one's pooled embedding and six
numbers about size and crop enter through the timestep (Podell et al., 2023). The first is mini-clip's text tower, the
second is trained against mini-clip's finished image tower (as in LiT, Zhai et al., 2022).
"""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from fx.mini import sd
from fx.mini.clip import MAX_TOKENS, tokenize

WHOLE = (64, 64, 0, 0, 64, 64)  # original height and width, top and left of the crop, target height and width


def build() -> UNet2DConditionModel:
    """An untrained U-Net: mini-sd's blocks, cross-attention twice as wide, and what SDXL adds to the timestep."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=32,
        out_channels=32,
        layers_per_block=1,
        block_out_channels=(128, 256),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=2 * 192,
        attention_head_dim=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=128 + 6 * 32,
    )


def start_from(unet: UNet2DConditionModel, other: UNet2DConditionModel) -> int:
    """Give `unet` mini-sd's weights; the number of parameters that it took.

    Cross-attention to the first encoder's half is mini-sd's, to the second half zero, and so is what is added to the
    timestep: training starts from what mini-sd draws. Only those parts learn (`sd.learns_apart`).
    """
    given, taken = other.state_dict(), 0
    for name, tensor in unet.state_dict().items():
        if name in given:
            tensor.zero_()[tuple(map(slice, given[name].shape))].copy_(given[name])
            taken += given[name].numel()
        elif name.startswith("add_embedding.linear_2"):
            tensor.zero_()
    return taken


def build_text(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """The second text encoder, untrained: three layers, 192 wide, projected to mini-clip's 128."""
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    size = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 3, "num_attention_heads": 6}
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), max_position_embeddings=MAX_TOKENS, projection_dim=128, **size, **special
    )
    return CLIPTextModelWithProjection(config)


def text_loss(features: Tensor, captions: list[list[str]], tokenizer: CLIPTokenizer, scale: float, batch: int = 256):
    """The loss function for `training.train` of the second encoder: contrast with finished image features.

    features: [n, 128] of the pictures, of unit length; captions: the variants of each; scale: CLIP's logit scale.
    """

    def loss(model: CLIPTextModelWithProjection, rng: torch.Generator) -> dict[str, Tensor]:
        chosen = torch.randint(len(features), (batch,), generator=rng).tolist()
        draws = torch.rand(batch, generator=rng).tolist()
        texts = [captions[i][int(u * len(captions[i]))] for i, u in zip(chosen, draws, strict=True)]
        found = F.normalize(model(tokenize(tokenizer, texts)).text_embeds.float(), dim=1)
        logits, same = scale * features[chosen] @ found.T, torch.arange(batch)
        value = (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2
        return {"loss": value, "accuracy": (logits.argmax(1) == same).float().mean()}

    return loss


@torch.no_grad()
def encode_captions(
    first: CLIPTextModel, second: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer, captions: list[str]
) -> tuple[Tensor, Tensor]:
    """As StableDiffusionXLPipeline does: states float16 [n, 32, 384] of both encoders, and the pooled embedding [n, 128]."""
    states, pooled = [], []
    for start in range(0, len(captions), 256):
        tokens = tokenize(tokenizer, captions[start : start + 256])
        both = [encoder(tokens, output_hidden_states=True) for encoder in (first, second)]
        states.append(torch.cat([one.hidden_states[-2] for one in both], dim=2).half())
        pooled.append(both[1].text_embeds.half())
    return torch.cat(states), torch.cat(pooled)


def diffusion_loss(
    latents: Tensor, sizes: Tensor, choices: list[list[int]], states: Tensor, pooled: Tensor, batch: int = 64
):
    """The loss function for `training.train`: as `sd.diffusion_loss`; a dropped caption is zeros, as the pipeline has it.

    latents: [n, 32, 8, 8], scaled; sizes: [n, 6], the numbers in WHOLE for each of them; choices[i]: rows of `states` and
    `pooled` that caption picture i.
    """

    def loss(model: UNet2DConditionModel, rng: torch.Generator) -> dict[str, Tensor]:
        chosen, rows, dropped = sd.draw_captions(choices, batch, rng)
        context, embeds = states[rows].float(), pooled[rows].float()
        context[dropped], embeds[dropped] = 0.0, 0.0
        added = {"text_embeds": embeds, "time_ids": sizes[chosen].float()}
        return sd.denoising_terms(
            lambda x, t: model(x, t, context, added_cond_kwargs=added).sample, latents[chosen], rng
        )

    return loss


def crop(pictures: Tensor, rng: torch.Generator, side: int = 64, largest: int = 96) -> tuple[Tensor, Tensor]:
    """Square crops of enlarged pictures and what the U-Net is told of them: uint8 [n, 3, side, side] and [n, 6].

    pictures: uint8 [n, 3, h, h], h at least `largest`. Each is resized to between `side` and `largest` pixels, and a square
    of `side` pixels is cut out anywhere.
    """
    cut, told = [], []
    for picture in pictures:
        size = int(torch.randint(side, largest + 1, (), generator=rng))
        top, left = torch.randint(size - side + 1, (2,), generator=rng).tolist()
        resized = F.interpolate(picture[None].float(), size=(size, size), mode="bicubic", antialias=True)
        part = resized[0, :, top : top + side, left : left + side]
        cut.append(part.round().clamp(0, 255).byte())
        told.append([size, size, top, left, side, side])
    return torch.stack(cut), torch.tensor(told)


def assemble(
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    clip: CLIPModel,
    second: CLIPTextModelWithProjection,
    tokenizer: CLIPTokenizer,
) -> StableDiffusionXLPipeline:
    """The stock pipeline of these parts (no watermark)."""
    first = CLIPTextModel(clip.config.text_config)
    first.load_state_dict(clip.text_model.state_dict())
    return StableDiffusionXLPipeline(
        vae=vae.eval(),
        text_encoder=first.eval(),
        text_encoder_2=second.eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet.eval(),
        scheduler=sd.scheduler(),
        add_watermarker=False,
    )
