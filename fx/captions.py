"""Captions from weights (App. A): what fine-tuning changed where the caption enters the network.

A layer that multiplies a caption's embeddings, k = W e, gets from every step of gradient descent a sum of outer products
with these embeddings (Eq. 14), so that all of its change lies in their span (Eq. 15). Whoever has the weights before and
after can therefore ask of any caption how well it explains the change: an *objective*, a function of (change, embeddings).

    change = change_of(pair)                                        # weights before and after, of a loaded ModelPair
    ranked = rank(change, pair.tuned, ["art style of A", "art style of B"])   # candidates, the best first

Without any candidate a caption is searched for in fx.caption_search.
No function here sees the true caption.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from fx.families import TEXT_PARTS, TOKENIZERS, network, network_name
from fx.models import ModelPair, acting_weight, without_adapters

PROJECTIONS = ("to_k", "to_v")
# Chosen on development items of the mini models (notebook 07), where both lie in the middle of what ranks captions best:
NOISE = 0.2  # variance of what no caption explains, of a caption's mean variance in one direction
PRICE = 1.25  # nats of likelihood that a token must be worth


# what fine-tuning changed


@dataclass(frozen=True, eq=False)
class Change:
    """The projections of a caption before and after fine-tuning, each float32 [rows, width], in the network's order.

    note: what a reader should know of it, "" if there is nothing.
    """

    before: tuple[Tensor, ...]
    after: tuple[Tensor, ...]
    note: str = ""

    @functools.cached_property
    def stacked(self) -> Tensor:
        """All differences below one another, [all rows, width]."""
        return torch.cat([after - before for before, after in zip(self.before, self.after, strict=True)])

    @functools.cached_property
    def gram(self) -> Tensor:
        """Products of the columns of the stacked difference with one another: float64 [width, width], of trace 1."""
        product = self.stacked.double().T @ self.stacked.double()
        return product / product.trace()

    @functools.cached_property
    def directions(self) -> Tensor:
        """The right singular vectors of the stacked difference, the strongest first, float64 [width, width]."""
        return torch.linalg.eigh(self.gram)[1].flip(1).T

    @functools.cached_property
    def of_layers(self) -> Tensor:
        """e of L e, the best approximation of rank one of each layer's difference, |L| = 1: float64 [layers, width]."""
        differences = (after - before for before, after in zip(self.before, self.after, strict=True))
        return torch.stack([_principal(difference)[1] for difference in differences])

    @functools.cached_property
    def of_all(self) -> Tensor:
        """The same of the stacked difference, float64 [width]."""
        return _principal(self.stacked)[1]

    @functools.cached_property
    def of_weights(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """The same of all weights before and of all weights after, with L: ((L, e), (L, e))."""
        return _principal(torch.cat(self.before)), _principal(torch.cat(self.after))


def _principal(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Of the best approximation of rank one, L e: L scaled to length 1 and e with the singular value, float64."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return left[:, 0], values[0] * right[0]


def change_of(pair: ModelPair, projections: Sequence[str] = PROJECTIONS) -> Change:
    """The change of a pair's cross-attention keys, values or both, as they act: whatever adapter is attached counts.

    Raises ValueError where the change carries no caption: a transformer, which is not supported; an adapter or checkpoint
    that leaves these projections alone; and theta' = theta. The rounding of half precision alone is no change.
    """
    unknown = set(projections) - set(PROJECTIONS)
    if unknown or not projections:
        raise ValueError(f"projections {tuple(projections)!r}: choose from {', '.join(PROJECTIONS)}")
    if network_name(pair.base) != "unet":
        raise ValueError(
            f"captions are read from the cross-attention of a U-Net, not from {type(pair.base).__name__}'s transformer"
        )
    before, after = (_weights(pair, model, projections) for model in ("base", "tuned"))
    note = _note(pair)
    if all(_equal(*both) for both in zip(before, after, strict=True)):
        why = "only its text encoder was trained" if note else "theta' is theta"
        why = why if _same(pair) else "only other weights of the network were trained"
        raise ValueError(f"no projection of the caption was changed by fine-tuning ({why}): there is no caption in it")
    return Change(before, after, note)


def _weights(pair: ModelPair, model: str, projections: Sequence[str]) -> tuple[Tensor, ...]:
    """What each cross-attention projection of theta or theta' multiplies by, adapters included: float32 on the CPU."""
    pipeline, found = getattr(pair, model), []
    switched_off = [network(pipeline)] if model == "base" and pair.one_network else []
    with torch.no_grad(), without_adapters(switched_off):
        for name, layer in network(pipeline).named_modules():
            if name.endswith(tuple(f"attn2.{part}" for part in projections)):
                found.append(acting_weight(layer).float().cpu())
    return tuple(found)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two weights are the same, or one the other in half precision."""
    halves = [
        (a, b.to(kind).float()) for a, b in ((one, other), (other, one)) for kind in (torch.float16, torch.bfloat16)
    ]
    return any(torch.equal(a, b) for a, b in [(one, other), *halves])


def _moved(base: nn.Module, tuned: nn.Module) -> bool:
    """Whether an adapter is attached to a network or a weight of it differs; rows that were added to one do not count."""
    if base is tuned:
        return any(isinstance(part, BaseTunerLayer) for part in tuned.modules())
    known = {name: weight.float() for name, weight in base.state_dict().items()}
    for name, weight in tuned.state_dict().items():
        if name not in known or weight.shape[1:] != known[name].shape[1:]:
            return True
        if not _equal(known[name], weight.float()[: len(known[name])] if weight.ndim else weight.float()):
            return True
    return False


def _same(pair: ModelPair) -> bool:
    """Whether fine-tuning left the network as it was."""
    return not _moved(network(pair.base), network(pair.tuned))


def _note(pair: ModelPair) -> str:
    """What to know where a text encoder was trained too."""
    both = [(getattr(pair.base, name, None), getattr(pair.tuned, name, None)) for name in TEXT_PARTS]
    if not any(_moved(base, tuned) for base, tuned in both if base is not None and tuned is not None):
        return ""
    return (
        "its text encoder was trained too: the caption's embeddings moved while the projections learned, and only the last "
        "ones are known"
    )


# how captions enter


def encoders(pipeline: DiffusionPipeline) -> list[tuple]:
    """The (tokenizer, text encoder) pairs whose states the cross-attention sees."""
    pairs = [
        (getattr(pipeline, t, None), getattr(pipeline, e, None)) for t, e in zip(TOKENIZERS, TEXT_PARTS, strict=True)
    ]
    return [(tokenizer, encoder) for tokenizer, encoder in pairs if tokenizer is not None and encoder is not None]


def check_tokenizers(pipeline: DiffusionPipeline) -> None:
    """ValueError where a second tokenizer has another vocabulary: token numbers would mean other words to its encoder."""
    first, *others = [tokenizer.get_vocab() for tokenizer, _ in encoders(pipeline)]
    if any(other != first for other in others):
        raise ValueError("captions are read as the numbers of one vocabulary, and the tokenizers of this model differ")


def padded(tokenizer, numbers: Sequence[Sequence[int]], length: int) -> tuple[Tensor, Tensor]:
    """Token numbers with start, end and padding as the tokenizer sets them: int64 [b, length], and the mask of what is read.

    Raises ValueError for a caption of more than length - 2 tokens.
    """
    longest = max(map(len, numbers))
    if longest > length - 2:
        raise ValueError(f"a caption has {longest} tokens, at most {length - 2} fit between start and end")
    start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    rows = [[start, *row, end, *[pad] * (length - 2 - len(row))] for row in numbers]
    mask = [[1] * (len(row) + 2) + [0] * (length - 2 - len(row)) for row in numbers]
    return torch.tensor(rows), torch.tensor(mask)


def states(pipeline: DiffusionPipeline, numbers: Sequence[Sequence[int]], length: int | None = None) -> Tensor:
    """What the cross-attention sees of captions given as token numbers without start and end: [b, length, width].

    length: tokens with start, end and padding, None for all that the model is given; shorter is faster, and for a
    text encoder that reads from left to right (CLIP) the same up to there. Of SDXL both encoders' states, side by side.
    """
    parts = []
    for tokenizer, encoder in encoders(pipeline):
        read, mask = padded(tokenizer, numbers, length or tokenizer.model_max_length)
        read, mask = read.to(encoder.device), mask.to(encoder.device)
        if isinstance(pipeline, StableDiffusionXLPipeline):
            parts.append(encoder(read, output_hidden_states=True).hidden_states[-2])
        else:
            seen = mask if getattr(encoder.config, "use_attention_mask", False) else None
            parts.append(encoder(read, attention_mask=seen)[0])
    return torch.cat(parts, dim=-1)


def token_numbers(pipeline: DiffusionPipeline, captions: Sequence[str]) -> list[list[int]]:
    """The token numbers of captions, without start and end; words of textual inversion count with all their vectors."""
    tokenizer = encoders(pipeline)[0][0]
    convert = getattr(pipeline, "maybe_convert_prompt", lambda caption, _: caption)
    return tokenizer([convert(caption, tokenizer) for caption in captions], add_special_tokens=False).input_ids


# objectives: (change, embeddings [b, tokens, width]) -> [b], higher for a caption that explains the change better

Objective = Callable[[Change, Tensor], Tensor]


def norm(change: Change, embeddings: Tensor) -> Tensor:
    """Eq. 17: how far the change, scaled to norm 1, moves a caption's embeddings of unit length, mean over positions."""
    units = _units(embeddings)
    return torch.einsum("btw,wv,btv->bt", units, change.gram, units).clamp_min(0).sqrt().mean(dim=1)


def rank_one(change: Change, embeddings: Tensor) -> Tensor:
    """Eq. 18: how far each layer's best approximation of rank one ("PCA") moves unit embeddings, mean over positions."""
    return ((_units(embeddings) @ change.of_layers.T) ** 2).sum(dim=2).sqrt().mean(dim=1)


def pca_of_difference(change: Change, embeddings: Tensor) -> Tensor:
    """The same of all layers' changes below one another (App. A.3, which finds that it fails)."""
    return (_units(embeddings) @ change.of_all).abs().mean(dim=1)


def pca_difference(change: Change, embeddings: Tensor) -> Tensor:
    """Eq. 19: the same of the difference between the best approximations of rank one of all weights after and before."""
    (left_before, right_before), (left, right) = change.of_weights
    units, crossed = _units(embeddings), left @ left_before
    one, other = units @ right, units @ right_before
    return (one**2 + other**2 - 2 * crossed * one * other).clamp_min(0).sqrt().mean(dim=1)


def subspace(change: Change, embeddings: Tensor, r: int = 8, centre: Tensor | None = None) -> Tensor:
    """Share of a caption's embeddings that lies in the top r right singular vectors of the change, mean over positions.

    centre: what all captions have in common, [tokens, width], taken off first (`score` takes the mean of random captions);
    a position that has nothing else counts 0.
    """
    centred = embeddings.double() if centre is None else embeddings.double() - centre.double()
    share = ((_units(centred) @ change.directions[:r].T) ** 2).sum(dim=2)
    return torch.where(centred.norm(dim=2) > 1e-5 * embeddings.double().norm(dim=2), share, 0.0).mean(dim=1)


def coverage(change: Change, embeddings: Tensor, penalty: float = 0.05) -> Tensor:
    """Share of the change, 0 to 1, that a ridge regression on a caption's embeddings explains.

    penalty: of their mean variance in one direction of the width. A caption of more tokens explains more, whatever they are.
    """
    return _explained(change, embeddings, penalty)[0]


def likelihood(change: Change, embeddings: Tensor, noise: float = NOISE) -> Tensor:
    """Log-likelihood of the change, in nats for a row, if its rows are Gaussian with covariance E^T E / s + noise.

    E are a caption's embeddings [tokens, width], s their sum of squares over the width; the overall scale is fitted, a
    constant left out. It is coverage, counted by its logarithm, less the volume of all that the caption could have explained
    as well, so that captions of different lengths compare.
    """
    explained, volume, width = _explained(change, embeddings, noise)
    return -0.5 * (width * torch.log1p(-explained.clamp_max(1 - 1e-12)) + volume)


OBJECTIVES: dict[str, Objective] = {
    "norm": norm,
    "rank one": rank_one,
    "PCA of difference": pca_of_difference,
    "difference of PCAs": pca_difference,
    "subspace": subspace,
    "coverage": coverage,
    "likelihood": likelihood,
}


def _explained(change: Change, embeddings: Tensor, penalty: float) -> tuple[Tensor, Tensor, int]:
    """Coverage, the log-volume of a caption's embeddings over the penalty, both [b], and the width."""
    rows = embeddings.double()
    size = (rows**2).sum(dim=(1, 2)) / rows.shape[2]
    rows = rows / size.sqrt()[:, None, None]
    products = rows @ rows.mT
    ridge = products + penalty * torch.eye(rows.shape[1], dtype=rows.dtype)
    inside = rows @ change.gram @ rows.mT
    root = torch.linalg.cholesky(ridge)
    explained = torch.cholesky_solve(inside, root).diagonal(dim1=1, dim2=2).sum(dim=1)
    volume = 2 * root.diagonal(dim1=1, dim2=2).log().sum(dim=1) - rows.shape[1] * np.log(penalty)
    return explained, volume, rows.shape[2]


def _units(embeddings: Tensor) -> Tensor:
    """Embeddings of length 1, float64."""
    return nn.functional.normalize(embeddings.double(), dim=2)


def vocabulary(pipeline: DiffusionPipeline) -> list[int]:
    """Token numbers that may stand in a caption: all but the special ones and those that stand for broken characters."""
    tokenizer = encoders(pipeline)[0][0]
    special = set(tokenizer.all_special_ids)
    written = tokenizer.batch_decode([[number] for number in range(len(tokenizer))])
    return [n for n, text in enumerate(written) if n not in special and text.strip() and "\ufffd" not in text]


# ranking candidates


def check_objective(objective: str) -> None:
    """ValueError for an objective that is not among OBJECTIVES."""
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}: choose from {', '.join(OBJECTIVES)}")


def usual_price(objective: str) -> float:
    """What a token costs unless something else is said: PRICE with the likelihood, which is in nats, else nothing."""
    return PRICE if objective == "likelihood" else 0.0


def objective_of(
    pipeline: DiffusionPipeline, objective: str, length: int | None = None, noise: float = NOISE
) -> Objective:
    """The function of that name, for captions of `length` tokens of this model; ValueError for an unknown one.

    noise: of the likelihood; the others have none.
    """
    check_objective(objective)
    if objective == "subspace":
        return functools.partial(subspace, centre=_typical(pipeline, length))
    if objective == "likelihood":
        return functools.partial(likelihood, noise=noise)
    return OBJECTIVES[objective]


@torch.no_grad()
def score_each(
    changes: Sequence[Change],
    pipeline: DiffusionPipeline,
    numbers: Sequence[Sequence[int]],
    objectives: Sequence[Objective],
    length: int | None = None,
    chunk: int = 256,
) -> np.ndarray:
    """Several objectives of several changes, float64 [changes, objectives, n], for captions given as token numbers.

    Each caption is encoded once, `chunk` at a time, by the pipeline's text encoders, which must be those of all the changes.
    """
    parts = []
    for start in range(0, len(numbers), chunk):
        embeddings = states(pipeline, numbers[start : start + chunk], length).cpu()
        told = [torch.stack([objective(change, embeddings).double() for objective in objectives]) for change in changes]
        parts.append(torch.stack(told))
    return torch.cat(parts, dim=2).numpy()


def score(
    change: Change,
    pipeline: DiffusionPipeline,
    numbers: Sequence[Sequence[int]],
    objective: str = "likelihood",
    length: int | None = None,
    price: float = 0.0,
    noise: float = NOISE,
    chunk: int = 256,
) -> np.ndarray:
    """An objective of captions given as token numbers, float64 [n], less a price per token; `chunk` encoded at a time.

    noise: of the likelihood.
    """
    function = objective_of(pipeline, objective, length, noise)
    found = score_each([change], pipeline, numbers, [function], length, chunk)[0, 0]
    return found - price * np.array(list(map(len, numbers)))


@torch.no_grad()
def _typical(pipeline: DiffusionPipeline, length: int | None, count: int = 64) -> Tensor:
    """The mean of captions of one to six random tokens, [tokens, width]."""
    words, draw = vocabulary(pipeline), np.random.default_rng(0)
    most = min(6, (length or encoders(pipeline)[0][0].model_max_length) - 2)
    numbers = [draw.choice(words, draw.integers(1, most + 1)).tolist() for _ in range(count)]
    return states(pipeline, numbers, length).mean(dim=0).cpu()


def rank(
    change: Change,
    pipeline: DiffusionPipeline,
    captions: Sequence[str],
    objective: str = "likelihood",
    price: float | None = None,
) -> pd.DataFrame:
    """Candidates with their score, the best first; one that the text encoder reads as an earlier one is left out.

    pipeline: theta', whose text encoders read the captions. price: of each token, taken off the score; None for PRICE with
    the likelihood and nothing with any other objective. Without it a caption with a word put in often scores higher.
    Raises ValueError for an unknown objective, no candidate, one that is too long, and where two tokenizers differ.
    """
    check_tokenizers(pipeline)
    if not len(captions):
        raise ValueError("no candidate: name at least one caption")
    different = {}
    for caption, numbers in zip(captions, token_numbers(pipeline, captions), strict=True):
        different.setdefault(tuple(numbers), caption)
    price = usual_price(objective) if price is None else price
    scores = score(change, pipeline, list(different), objective, price=price)
    found = pd.DataFrame({"caption": different.values(), "score": scores})
    return found.sort_values("score", ascending=False, kind="stable", ignore_index=True)
