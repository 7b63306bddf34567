"""mini-clip: a CLIP text and image tower with its own tokenizer, trained contrastively on the corpus.

Its text tower is the frozen text encoder of mini-sd. Some pictures are captioned "a good picture of ...", and
corrupted ones "a bad picture of ...", so that CLIP-IQA's antonym prompts mean something.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from fx.mini.pictures import corrupt, jitter, to_float
from fx.quality import antonym_scores

MAX_TOKENS = 32
VOCABULARY = 4096
GOOD, BAD = "a good picture", "a bad picture"  # CLIP-IQA's antonym prompts
FREQUENT = ["art style of", "a good picture of", "a bad picture of"]  # words of many prompts, whatever the captions say


def train_tokenizer(captions: list[str], folder: Path) -> CLIPTokenizer:
    """Learn a byte-pair vocabulary with CLIP's own normalisation and splitting; save it to `folder`.

    One that lies there already is kept: token numbers can differ between two trainings on the same captions, and the
    model's weights belong to one of them.
    """
    if (folder / "tokenizer.json").exists():
        return CLIPTokenizer.from_pretrained(folder)
    clip = CLIPTokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer, bpe.pre_tokenizer = clip.normalizer, clip.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    every_letter_ends_a_word = " ".join(map(chr, range(33, 256)))
    bpe.train_from_iterator([*captions, *50 * FREQUENT, every_letter_ends_a_word], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = (Path(path) for path in bpe.model.save(str(folder)))
    tokenizer = CLIPTokenizer(
        vocab=json.loads(vocabulary.read_text("utf-8")),
        merges=[tuple(line.split()) for line in merges.read_text("utf-8").splitlines()[1:]],
        model_max_length=MAX_TOKENS,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def build(tokenizer: CLIPTokenizer) -> CLIPModel:
    """An untrained mini-clip: 64 px images in 16 px patches, 32 tokens, both towers 192 wide."""
    tower = {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 6, "projection_dim": 128}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {
        **tower,
        **special,
        "num_hidden_layers": 3,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": MAX_TOKENS,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**tower, "num_hidden_layers": 5, "image_size": 64, "patch_size": 16}
    prompts = {"quality_prompts": [GOOD, BAD]}  # where fx.quality looks for them
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128, **prompts))


def image_processor(model: CLIPModel) -> CLIPImageProcessor:
    """How images of any size enter a mini-clip: the shorter side resized to its own, centre crop, values in [-1, 1]."""
    side = model.config.vision_config.image_size
    half = [0.5, 0.5, 0.5]
    return CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side, image_mean=half, image_std=half)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids, int64 [n, 32], padded and cut to the encoder's length."""
    return tokenizer(
        captions, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    ).input_ids


def contrastive_loss(
    pictures: Tensor, captions: list[list[str]], tokenizer: CLIPTokenizer, batch: int = 256, bad: float = 0.3
):
    """The loss function for `training.train`: symmetric cross-entropy over `batch` pairs (CLIP, Radford et al. 2021).

    pictures: uint8 [n, 3, 64, 64]; captions: the variants of each picture. A share `bad` of the pictures is corrupted
    and captioned as bad, an equal share is left clean and captioned as good.
    """

    def loss(model: CLIPModel, rng: torch.Generator) -> dict[str, Tensor]:
        chosen = torch.randint(len(pictures), (batch,), generator=rng)
        quality = torch.rand(batch, generator=rng)
        images = jitter(to_float(pictures[chosen]), rng)
        images = torch.where((quality < bad)[:, None, None, None], corrupt(images, rng), images)
        texts = []
        for index, q in zip(chosen.tolist(), quality.tolist(), strict=True):
            variants = captions[index]
            text = variants[int(torch.randint(len(variants), (), generator=rng))]
            word = "bad" if q < bad else "good" if q < 2 * bad else ""
            texts.append(f"a {word} picture of {text}" if word else text)
        out = model(input_ids=tokenize(tokenizer, texts), pixel_values=images, return_dict=True)
        logits, same = out.logits_per_image, torch.arange(batch)
        value = (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2
        return {"loss": value, "accuracy": (logits.argmax(1) == same).float().mean()}

    return loss


@torch.no_grad()
def quality_scores(model: CLIPModel, tokenizer: CLIPTokenizer, pictures: Tensor, seed: int = 0) -> dict[str, float]:
    """Mean CLIP-IQA score (Wang et al., 2023) of pictures as they are and corrupted, each in 0..1.

    The score is that of `fx.quality.clip_iqa`, with a good and a bad picture's prompt.
    """
    prompts = model.get_text_features(tokenize(tokenizer, [GOOD, BAD])).pooler_output
    clean = to_float(pictures)
    scores = {}
    for name, images in (("clean", clean), ("corrupted", corrupt(clean, torch.Generator().manual_seed(seed)))):
        features = model.get_image_features(pixel_values=images).pooler_output
        scores[name] = antonym_scores(features, prompts, model.logit_scale.exp())
    better = (scores["clean"] > scores["corrupted"]).float().mean().item()
    return {name: value.mean().item() for name, value in scores.items()} | {"clean scores higher": better}


@torch.no_grad()
def retrieval(model: CLIPModel, tokenizer: CLIPTokenizer, pictures: Tensor, captions: list[str]) -> dict[str, float]:
    """Caption retrieval: share of pictures whose own caption is the best (or among the best 5) of all n; and chance."""
    images = F.normalize(model.get_image_features(pixel_values=to_float(pictures)).pooler_output, dim=1)
    texts = F.normalize(model.get_text_features(tokenize(tokenizer, captions)).pooler_output, dim=1)
    order = (images @ texts.T).argsort(dim=1, descending=True)
    hit = order == torch.arange(len(order))[:, None]
    top = {f"recall@{k}": hit[:, :k].any(1).float().mean().item() for k in (1, 5)}
    return {**top, "chance@1": 1 / len(order), "chance@5": 5 / len(order)}
