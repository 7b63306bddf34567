"""mini-alt: AltDiffusion's classes around mini-sd, with captions in nine languages.

AltCLIP (Chen et al., 2022) teaches a multilingual encoder what CLIP's text tower says of the English caption; AltDiffusion
(Ye et al., 2023) lets the U-Net learn with it, its cross-attention first. So here: `distillation_loss` for an XLM-R that was
trained on nothing else, then `diffusion_loss` for it and the cross-attention together. All other weights stay mini-sd's.
"""

import json
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerFast

from fx.families import AltConfig, AltTextEncoder
from fx.mini import sd
from fx.mini.clip import MAX_TOKENS, tokenize
from fx.mini.corpus import FAMILIES

VOCABULARY = 6000
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # numbered as in XLM-R
# How captions are said: an emoji of a family, a thing, clip art, an artist's style. Titles of clip art stay English.
SAID = {
    "en": ("{family} emoji of {title}", "a {title}", "clipart of {title}", "art style of {author}"),
    "de": ("{family} Emoji von {title}", "{title}", "Clipart von {title}", "Kunststil von {author}"),
    "fr": ("emoji {family} de {title}", "{title}", "clipart de {title}", "style artistique de {author}"),
    "es": ("emoji {family} de {title}", "{title}", "clipart de {title}", "estilo artístico de {author}"),
    "it": ("emoji {family} di {title}", "{title}", "clipart di {title}", "stile artistico di {author}"),
    "pt": ("emoji {family} de {title}", "{title}", "clipart de {title}", "estilo de arte de {author}"),
    "ru": ("эмодзи {family} {title}", "{title}", "клипарт {title}", "художественный стиль {author}"),
    "zh": ("{family} 表情符号 {title}", "{title}", "剪贴画 {title}", "{author} 的艺术风格"),
    "ja": ("{family} 絵文字 {title}", "{title}", "クリップアート {title}", "{author} の画風"),
}


def labels(sources: Path) -> dict[str, dict[str, str]]:
    """Per language the names of emoji, by their English name in small letters (CLDR, from the package emojibase-data)."""
    package = sources / "names/package"
    read = {language: json.loads((package / language / "data.json").read_text("utf-8")) for language in SAID}
    english = {entry["hexcode"]: entry["label"].lower() for entry in read["en"]}
    return {
        language: {english[e["hexcode"]]: e["label"] for e in entries if e["hexcode"] in english}
        for language, entries in read.items()
    }


def captions(row: pd.Series, names: dict[str, dict[str, str]]) -> list[dict[str, str]]:
    """What can be said of a picture: a list of captions, each in every language that has a word for it, English first.

    row: of the catalogue; names: `labels`.
    """
    title = row.title or row.folder.replace("/", " ").replace("_", " ")
    clip_art = row.collection == "openclipart"
    family = "" if clip_art else FAMILIES[row.collection].word
    said: list[dict[str, str]] = [{}, {}, {}]
    for language, (emoji, thing, clipart, style) in SAID.items():
        known = title if clip_art or language == "en" else names[language].get(title)
        if known is None:
            continue
        said[0][language] = (clipart if clip_art else emoji).format(family=family, title=known)
        said[1][language] = thing.format(title=known)
        if clip_art and row.author:
            said[2][language] = style.format(author=row.author)
    return [one for one in said if one]


def train_tokenizer(texts: list[str], folder: Path, vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Learn a unigram vocabulary with XLM-R's special tokens, in small letters; save it to `folder`, or read it there."""
    if not (folder / "tokenizer.json").exists():
        learned = Tokenizer(models.Unigram())
        learned.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        learned.pre_tokenizer, learned.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        special = [*SPECIAL, "<mask>"]
        trainer = trainers.UnigramTrainer(
            vocab_size=vocabulary, special_tokens=special, unk_token="<unk>", show_progress=False
        )
        learned.train_from_iterator(texts, trainer)
        learned.add_special_tokens([AddedToken(word, special=True) for word in special])
        ends = [(word, learned.token_to_id(word)) for word in ("<s>", "</s>")]
        learned.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=ends)
        roles = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"}
        roles |= {"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}
        made = PreTrainedTokenizerFast(tokenizer_object=learned, model_max_length=MAX_TOKENS, **roles)
        made.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def build(tokenizer: PreTrainedTokenizerFast) -> AltTextEncoder:
    """An untrained text encoder: XLM-R of four layers, 192 wide, 32 tokens, projected to mini-clip's 192."""
    size = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 6}
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    places = MAX_TOKENS + special["pad_token_id"] + 1  # RoBERTa numbers positions from the padding's number on
    return AltTextEncoder(
        AltConfig(
            vocab_size=len(tokenizer),
            project_dim=192,
            type_vocab_size=1,
            max_position_embeddings=places,
            **size,
            **special,
        )
    )


def numbered(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Token numbers and attention mask, int64 [n, 32] each, padded and cut to the encoder's length."""
    found = tokenizer(texts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    return found.input_ids, found.attention_mask


@torch.no_grad()
def sentence_states(text: CLIPTextModel, tokenizer: CLIPTokenizer, texts: list[str], batch: int = 256) -> Tensor:
    """mini-clip's last hidden state at the end of each caption, the one that its contrast was trained on: [n, 192]."""
    states = []
    for start in range(0, len(texts), batch):
        tokens = tokenize(tokenizer, texts[start : start + batch])
        end = (tokens == tokenizer.eos_token_id).int().argmax(dim=1)
        states.append(text(tokens).last_hidden_state[torch.arange(len(tokens)), end])
    return torch.cat(states)


def distillation_loss(
    pairs: list[tuple[list[str], int]], taught: Tensor, tokenizer: PreTrainedTokenizerFast, batch: int = 128
):
    """The loss function for `training.train`: squared error to what the teacher says of the English caption.

    pairs: translations of a caption, and the row of `taught` [n, 192] that belongs to them. Every position is to say it,
    since CLIP's U-Nets read all positions, and most of those are padding that says what the end of the caption says.
    """

    def loss(model: AltTextEncoder, rng: torch.Generator) -> dict[str, Tensor]:
        chosen = torch.randint(len(pairs), (batch,), generator=rng).tolist()
        draws = torch.rand(batch, generator=rng).tolist()
        texts = [pairs[i][0][int(u * len(pairs[i][0]))] for i, u in zip(chosen, draws, strict=True)]
        wanted = taught[[pairs[i][1] for i in chosen]]
        states = model(*numbered(tokenizer, texts))[0].float()
        value = F.mse_loss(states, wanted[:, None].expand_as(states))
        return {"loss": value, "cosine": F.cosine_similarity(states[:, 0], wanted).mean()}

    return loss


class Learner(nn.Module):
    """A text encoder and a U-Net that learn together: the encoder whole, of the U-Net the cross-attention."""

    def __init__(self, text: AltTextEncoder, unet: UNet2DConditionModel):
        super().__init__()
        self.text, self.unet = text, sd.learn_apart(unet)

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Noised latents [b, c, h, w] at timesteps [b] under captions [b, 32] to the predicted noise."""
        return self.unet(x, t, self.text(tokens, mask)[0]).sample


def diffusion_loss(
    latents: Tensor, choices: list[list[int]], texts: list[str], tokenizer: PreTrainedTokenizerFast, batch: int = 64
):
    """The loss function for `training.train` of a `Learner`: as `sd.diffusion_loss`, the captions encoded as it learns.

    latents: [n, c, h, w], scaled; choices[i]: numbers of the `texts` that caption picture i.
    """
    tokens, mask = numbered(tokenizer, [*texts, ""])

    def loss(model: Learner, rng: torch.Generator) -> dict[str, Tensor]:
        chosen, rows, dropped = sd.draw_captions(choices, batch, rng)
        rows = torch.tensor(rows).masked_fill(dropped, len(texts))
        return sd.denoising_terms(lambda x, t: model(x, t, tokens[rows], mask[rows]), latents[chosen], rng)

    return loss


def assemble(
    unet: UNet2DConditionModel, vae: AutoencoderKL, text: AltTextEncoder, tokenizer: PreTrainedTokenizerFast
) -> StableDiffusionPipeline:
    """The pipeline of these parts: Stable Diffusion's, which is AltDiffusion's but for the text encoder's class."""
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=sd.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
