"""Tiny random models of the real classes, in the layouts that people publish: one builder per family."""

import functools
import json
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTModel,
)

from fx.captions import Change, states, token_numbers
from fx.families import AltConfig, AltTextEncoder

MAX_TOKENS = 16
WORDS: tuple[str, ...] = ()  # beside "dog", that a tokenizer reads as one token each
WIDTH = 32
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FAMILIES = ("sd1", "sd2", "sdxl", "alt", "sd3", "flux")
ORIGINALS, COPIES = 4, 5


def _small(begin):
    """FluxPipeline draws 1024 px, whatever its network; here 16 px."""

    @functools.wraps(begin)
    def begun(self, *parts, **named):
        begin(self, *parts, **named)
        self.default_sample_size = 4

    return begun


FluxPipeline.__init__ = _small(FluxPipeline.__init__)


def byte_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with a token per byte, one for "dog" and one for each of WORDS; 16 tokens at most."""
    letters = sorted(ByteLevel.alphabet())
    merges = [pair for word in ("dog", *WORDS) for pair in merged(word)]
    pieces = list(dict.fromkeys(one + other for one, other in merges))
    words = [*letters, *(letter + "</w>" for letter in letters), *pieces, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=list(dict.fromkeys(merges)), model_max_length=MAX_TOKENS)


def merged(word: str) -> list[tuple[str, str]]:
    """The merges that make one token of a word, letter by letter from the left: ("d", "o"), ("do", "g</w>")."""
    letters = [*word[:-1], f"{word[-1]}</w>"]
    return [("".join(letters[:i]), letters[i]) for i in range(1, len(letters))]


def text_encoder(tokenizer: CLIPTokenizer, kind: type = CLIPTextModel, layers: int = 2, **settings) -> CLIPTextModel:
    """An untrained text encoder, 32 wide unless `settings` say otherwise."""
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    size = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": layers, "num_attention_heads": 4}
    size |= {"vocab_size": len(tokenizer), "max_position_embeddings": MAX_TOKENS, "projection_dim": WIDTH}
    return kind(CLIPTextConfig(**size | special | settings))


def autoencoder(**settings) -> AutoencoderKL:
    """An untrained autoencoder: 3x16x16 pictures to 4x4x4 latents."""
    return AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        **settings,
    )


def unet(**settings) -> UNet2DConditionModel:
    """An untrained U-Net for 4x4x4 latents with cross-attention, two levels."""
    common = {
        "sample_size": 4,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**common | settings)


def roberta_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with XLM-R's special tokens and one token per letter."""
    words = ["<s>", "<pad>", "</s>", "<unk>", "▁", *map(chr, range(33, 127)), "<mask>"]
    tokenizer = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=3))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens(
        [AddedToken(word, special=True) for word in ("<s>", "<pad>", "</s>", "<unk>", "<mask>")]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"}
    names |= {"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=MAX_TOKENS, **names)


def alt_encoder(tokenizer, **settings) -> AltTextEncoder:
    """An untrained XLM-R with a projection to 32."""
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "max_position_embeddings": MAX_TOKENS + 2}
    return AltTextEncoder(
        AltConfig(vocab_size=len(tokenizer), project_dim=WIDTH, type_vocab_size=1, **size, **special, **settings)
    )


def pipeline(family: str):
    """An untrained pipeline of one of FAMILIES: 16 px pictures, 4x4x4 latents, captions of 16 tokens."""
    tokenizer = byte_tokenizer()
    absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pndm = PNDMScheduler(**BETAS, steps_offset=1, skip_prk_steps=True)
    if family == "sd1":
        parts = {"text_encoder": text_encoder(tokenizer), "tokenizer": tokenizer, "scheduler": pndm}
        return StableDiffusionPipeline(vae=autoencoder(), unet=unet(), **parts, **absent)
    if (
        family == "sd2"
    ):  # predicts v; a linear projection in the transformers; zero terminal SNR, as 2.x fine-tunes have
        schedule = DDIMScheduler(
            **BETAS, steps_offset=1, clip_sample=False, prediction_type="v_prediction", rescale_betas_zero_snr=True
        )
        parts = {"text_encoder": text_encoder(tokenizer), "tokenizer": tokenizer, "scheduler": schedule}
        return StableDiffusionPipeline(vae=autoencoder(), unet=unet(use_linear_projection=True), **parts, **absent)
    if family == "alt":
        tokenizer = roberta_tokenizer()
        parts = {"text_encoder": alt_encoder(tokenizer), "tokenizer": tokenizer, "scheduler": pndm}
        return StableDiffusionPipeline(vae=autoencoder(), unet=unet(), **parts, **absent)
    both = {"tokenizer": tokenizer, "tokenizer_2": byte_tokenizer()}
    if family == "sdxl":
        return StableDiffusionXLPipeline(
            vae=autoencoder(force_upcast=True),
            text_encoder=text_encoder(tokenizer),
            text_encoder_2=text_encoder(tokenizer, CLIPTextModelWithProjection),
            unet=unet(
                cross_attention_dim=2 * WIDTH,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + WIDTH,
                use_linear_projection=True,
            ),
            scheduler=DDIMScheduler(**BETAS, steps_offset=1, clip_sample=False),
            add_watermarker=False,
            **both,
        )
    if family == "flux":
        return flux(tokenizer)
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=4,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=2 * WIDTH,
            caption_projection_dim=WIDTH,
            pooled_projection_dim=2 * WIDTH,
            pos_embed_max_size=8,
        ),
        vae=autoencoder(scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=text_encoder(tokenizer, CLIPTextModelWithProjection),
        text_encoder_2=text_encoder(tokenizer, CLIPTextModelWithProjection),
        text_encoder_3=None,
        tokenizer_3=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **both,
    )


def flux(tokenizer: CLIPTokenizer, **settings) -> FluxPipeline:
    """An untrained FLUX.1, distilled as its -dev is: 16 px pictures, two blocks of each kind, 32 wide."""
    words = roberta_tokenizer()
    size = {"d_model": WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            **{"in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 8}
            | {"num_attention_heads": 4, "joint_attention_dim": WIDTH, "pooled_projection_dim": WIDTH}
            | {"guidance_embeds": True, "axes_dims_rope": (2, 2, 4)}
            | settings
        ),
        vae=autoencoder(scaling_factor=0.36, shift_factor=0.12, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(T5Config(vocab_size=len(words), pad_token_id=1, eos_token_id=2, **size)),
        tokenizer_2=words,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


def save(family: str, folder: Path, seed: int = 0, tokens: int = MAX_TOKENS, words: tuple[str, ...] = WORDS) -> Path:
    """The untrained pipeline of a seed as a diffusers folder; AltDiffusion's under its published class names."""
    here = mock.patch.multiple(__name__, MAX_TOKENS=tokens, WORDS=words)
    with torch.random.fork_rng(), here:
        torch.manual_seed(seed)
        made = pipeline(family)
    made.save_pretrained(folder)
    if family == "alt":
        index = folder / "model_index.json"
        text = index.read_text().replace("StableDiffusionPipeline", "AltDiffusionPipeline")
        text = text.replace('"fx.families"', '"alt_diffusion"').replace(
            "AltTextEncoder", "RobertaSeriesModelWithTransformation"
        )
        index.write_text(text)
    return folder


def clip(tokenizer: CLIPTokenizer, **settings) -> CLIPModel:
    """An untrained CLIP of two towers for 32 px images; weights larger than usual, so that images differ."""
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = tower | special | {"vocab_size": len(tokenizer), "max_position_embeddings": MAX_TOKENS}
    vision = tower | {"image_size": 32, "patch_size": 8}
    config = CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=24, logit_scale_init_value=1.6, **settings
    )
    return spread(CLIPModel(config))


def vit(kind: str) -> ViTModel | Dinov2Model:
    """An untrained ViT as DINO ("vit", without pooling layer) or DINOv2 ("dinov2") publishes it, for 32 px images."""
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    size |= {"image_size": 32, "patch_size": 8}
    if kind == "vit":
        return spread(ViTModel(ViTConfig(**size), add_pooling_layer=False))
    return spread(Dinov2Model(Dinov2Config(**size)))


def spread(model):
    """The model with larger weights, so that what goes in shows in what comes out."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(4)
    return model


def save_judge(kind: str, folder: Path, seed: int = 0, **settings) -> Path:
    """A judge of `fx.quality` ("clip", "vit" or "dinov2") with its processor, laid out as the published ones are."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = clip(byte_tokenizer(), **settings) if kind == "clip" else vit(kind)
    model.save_pretrained(folder)
    if kind == "clip":
        byte_tokenizer().save_pretrained(folder)
    if kind == "vit":  # word for word the keys of facebook/dino-vits16, older than today's processors
        values = {"do_normalize": True, "do_resize": True, "feature_extractor_type": "ViTFeatureExtractor"}
        values |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 2, "size": 32}
        (folder / "preprocessor_config.json").write_text(json.dumps(values))
    else:
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return folder


def pictures(n: int, seed: int = 0) -> np.ndarray:
    """Pictures of coloured tiles that have little in common, uint8 [n, 32, 32, 3]."""
    tiles = np.random.default_rng(seed).integers(0, 256, (n, 4, 4, 3)).astype(np.uint8)
    return tiles.repeat(8, axis=1).repeat(8, axis=2)


def copies(n: int = ORIGINALS, times: int = COPIES) -> np.ndarray:
    """Image i is `pictures(n)[i % n]` with a little noise, uint8 [n * times, 32, 32, 3]."""
    noise = np.random.default_rng(1).normal(0, 3, (n * times, 32, 32, 3))
    return (np.concatenate([pictures(n)] * times) + noise).round().clip(0, 255).astype(np.uint8)


def _drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def projections(unet, names=("to_k", "to_v")):
    """The cross-attention projections of a U-Net, in its order."""
    return [module for name, module in unet.named_modules() if name.endswith(tuple(f"attn2.{name}" for name in names))]


@torch.no_grad()
def explained_by(pipeline, caption: str, noise: float = 0.02) -> Change:
    """A change planted into the pipeline's cross-attention by this caption."""
    embeddings = states(pipeline, token_numbers(pipeline, [caption]))[0]
    before = tuple(module.weight.detach().cpu() for module in projections(pipeline.unet))
    after = []
    for number, weight in enumerate(before):
        mixed = _drawn(len(weight), len(embeddings), seed=number) @ embeddings.float().cpu()
        after.append(weight + mixed + noise * _drawn(*weight.shape, seed=50 + number))
    return Change(before, tuple(after))
