"""A caption that explains a change, without candidates (App. A.4): by gradient (Algorithm 1) and token by token.

    change = fx.captions.change_of(pair)
    found = TokenSearch(change, pair.tuned, prefix="art style of").run()
    found = GradientSearch(change, pair.tuned, prefix="art style of", tokens=3).run()      # the paper's

As a step of the runner a search is a `CaptionSearch`. Token by token the smoothness of the likelihood decides where it ends,
so it is done `twice`, and the better of the two ends is taken (`best_of`). None of them sees the true caption.
"""

import json
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from fx import results
from fx.captions import (
    NOISE,
    PRICE,
    Change,
    change_of,
    check_objective,
    check_tokenizers,
    encoders,
    objective_of,
    rank,
    score,
    states,
    token_numbers,
    usual_price,
    vocabulary,
)
from fx.tuned import Tuned, load_tuned


@dataclass(frozen=True)
class Found:
    """A caption that a search ended with, its tokens, its score by the objective of the search, and what it took.

    evaluations: encoded captions; one that a gradient was taken of counts three times.
    """

    caption: str
    tokens: tuple[int, ...]
    score: float
    evaluations: int


class TokenSearch:
    """A search for the caption of the highest score, token by token, from nothing but the change and the vocabulary.

    prefix: what the caption is known to begin with, "" for nothing; most: tokens to find at most; beam: how many captions
    are kept at each length; proposals: how many are scored with all padding, of those that come first with little; price:
    what a token must add to the score to be worth it, None for `usual_price`; noise: of the likelihood. evaluations counts
    encoded captions.
    ValueError where most, beam or proposals is below 1, for an unknown objective and where two tokenizers differ.

    A rare token leaves a trace wherever it stands, a common one ("of") hardly any, and with CLIP, which reads from left to
    right, the same trace whatever follows. So captions grow at their end and, by the tokens that score highest alone, at
    any other place; then tokens are replaced, left out and put in. Only what the tokenizer itself would write is a caption:
    in between, a caption may end within a word.
    """

    def __init__(
        self,
        change: Change,
        pipeline: DiffusionPipeline,
        prefix: str = "",
        most: int = 8,
        beam: int = 2,
        proposals: int = 64,
        price: float | None = None,
        objective: str = "likelihood",
        noise: float = NOISE,
    ):
        if min(most, beam, proposals) < 1:
            raise ValueError(f"most {most}, beam {beam} and proposals {proposals} must be at least 1")
        check_tokenizers(pipeline)
        check_objective(objective)
        self.change, self.pipeline, self.objective, self.noise = change, pipeline, objective, noise
        self.price = usual_price(objective) if price is None else price
        self.beam, self.proposals = beam, proposals
        self.tokenizer = encoders(pipeline)[0][0]
        self.prefix = tuple(token_numbers(pipeline, [prefix])[0]) if prefix else ()
        self.longest = min(len(self.prefix) + most, self.tokenizer.model_max_length - 2)
        self.words = vocabulary(pipeline)
        self.rare: list[int] = []
        self.evaluations, self._known = 0, {}

    def run(self) -> Found:
        """The best caption found."""
        best = self.refined(self.grown())
        return Found(self.written(best), best, self.values([best])[0] + self.price * len(best), self.evaluations)

    def grown(self) -> tuple[int, ...]:
        """A beam search that adds one token at a time; of all that are captions the best."""
        kept, best = [self.prefix], self.prefix
        for _ in tqdm(range(self.longest - len(self.prefix)), desc="caption", leave=False):
            longer = [more for tokens in kept for more in self.longer(tokens)]
            if not self.rare:
                self.rare = [tokens[-1] for tokens in longer]
            ranked = self.best(longer)
            kept, whole = ranked[: self.beam], [tokens for tokens in ranked[:8] if self.is_caption(tokens)]
            better = self.best([best, *whole])[0]
            if better == best and self.values(kept[:1]) < self.values([best]):
                break
            best = better
        return best

    def longer(self, tokens: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Promising captions of one token more: any at the end, the rare ones at any other place."""
        longer = self.proposed([(*tokens, word) for word in self.words])
        for place in range(len(self.prefix), len(tokens)):
            longer += self.proposed([(*tokens[:place], word, *tokens[place:]) for word in self.rare])
        return longer

    def refined(self, tokens: tuple[int, ...], rounds: int = 2) -> tuple[int, ...]:
        """The best caption with tokens replaced, left out or put in, place after place: until none is better, or twice."""
        for _ in range(rounds):
            before = tokens
            for place in tqdm(range(len(self.prefix), self.longest), desc="tokens", leave=False):
                if place > len(tokens):
                    break
                tried = [tokens, tokens[:place] + tokens[place + 1 :]]
                tried += self.proposed([(*tokens[:place], word, *tokens[place + 1 :]) for word in self.words])
                if len(tokens) < self.longest:
                    tried += self.proposed([(*tokens[:place], word, *tokens[place:]) for word in self.words])
                tokens = next(one for one in self.best(tried) if one == tokens or self.is_caption(one))
            if tokens == before:
                break
        return tokens

    def written(self, tokens: Sequence[int]) -> str:
        """Tokens as text."""
        return self.tokenizer.decode(list(tokens)).strip()

    def is_caption(self, tokens: tuple[int, ...]) -> bool:
        """Whether the tokenizer writes the text of these tokens by these tokens."""
        return tuple(token_numbers(self.pipeline, [self.written(tokens)])[0]) == tokens

    def proposed(self, tried: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Of captions of equal length the most promising, encoded with little padding."""
        if not tried:
            return []
        length = min(len(tried[0]) + 3, self.tokenizer.model_max_length)
        found = score(self.change, self.pipeline, tried, self.objective, length, noise=self.noise)
        self.evaluations += len(tried)
        return [tried[i] for i in np.argsort(-found, kind="stable")[: self.proposals]]

    def best(self, tried: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Different captions, the best first, with all padding and each token's price."""
        tried = list(dict.fromkeys(tried))
        values = self.values(tried)
        return [tried[i] for i in np.argsort(-np.array(values), kind="stable")]

    def values(self, tried: list[tuple[int, ...]]) -> list[float]:
        """The score less the price of the tokens, computed once for each caption."""
        new = [tokens for tokens in tried if tokens not in self._known]
        if new:
            self.evaluations += len(new)
            found = score(self.change, self.pipeline, new, self.objective, price=self.price, noise=self.noise)
            self._known |= dict(zip(new, map(float, found), strict=True))
        return [self._known[tokens] for tokens in tried]


class GradientSearch:
    """Algorithm 1: hard prompts made easy (Wen et al., 2023), for any objective.

    One soft embedding per token goes up the gradient that the objective has at the nearest real tokens (by cosine, in the
    token embeddings of all text encoders side by side); of all real prompts on the way the best is kept.

    prefix: what the caption is known to begin with; tokens: how many are sought, neither fewer nor more; iterations: of each
    of the `restarts`, which start from random tokens; step: length of a step of one restart, in mean lengths of a token's
    embedding; noise: of the likelihood. ValueError where tokens, iterations or restarts is below 1, for an
    unknown objective, for more tokens than the model reads, and where two tokenizers differ.
    """

    def __init__(
        self,
        change: Change,
        pipeline: DiffusionPipeline,
        prefix: str = "",
        tokens: int = 7,
        iterations: int = 1000,
        restarts: int = 4,
        step: float = 0.1,
        objective: str = "difference of PCAs",
        seed: int = 0,
        noise: float = NOISE,
    ):
        if min(tokens, iterations, restarts) < 1:
            raise ValueError(f"tokens {tokens}, iterations {iterations} and restarts {restarts} must be at least 1")
        check_tokenizers(pipeline)
        self.change, self.pipeline = change, pipeline
        self.objective = objective_of(pipeline, objective, noise=noise)
        self.iterations, self.restarts, self.seed = iterations, restarts, seed
        self.prefix = tuple(token_numbers(pipeline, [prefix])[0]) if prefix else ()
        self.tokenizer, self.tokens = encoders(pipeline)[0][0], tokens
        fits = self.tokenizer.model_max_length - 2 - len(self.prefix)
        if tokens > fits:
            raise ValueError(f"{tokens} tokens after {prefix!r} are too many: this model reads {fits}")
        self.words = np.array(vocabulary(pipeline))
        embeddings = [encoder.get_input_embeddings().weight.detach() for _, encoder in encoders(pipeline)]
        self.widths = [part.shape[1] for part in embeddings]
        self.known = torch.cat([part.float().cpu() for part in embeddings], dim=1)[self.words]
        self.step = step * float(self.known.norm(dim=1).mean())

    def run(self) -> Found:
        """The best of all prompts on the way of all restarts."""
        draw, best = np.random.default_rng(self.seed), (-np.inf, ())
        soft = self.known[draw.integers(len(self.words), size=(self.restarts, self.tokens))]
        for _ in tqdm(range(self.iterations), desc="hard prompts", mininterval=2, leave=False):
            chosen = self.nearest(soft)
            values, gradient = self.gradient(chosen)
            first = int(values.argmax())
            if float(values[first]) > best[0]:
                best = float(values[first]), (*self.prefix, *map(int, self.words[chosen[first]]))
            soft = soft + self.step * normalize(gradient.flatten(1), dim=1).reshape(gradient.shape)
        value, tokens = best
        return Found(self.tokenizer.decode(tokens).strip(), tokens, value, 3 * self.iterations * self.restarts)

    def nearest(self, soft: Tensor) -> np.ndarray:
        """The words whose embeddings are nearest to soft ones [r, tokens, width] by cosine: indices [r, tokens]."""
        return (normalize(soft, dim=2) @ normalize(self.known, dim=1).T).argmax(dim=2).numpy()

    def gradient(self, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        """The objective of real prompts, [r], and its gradient in the embeddings of their tokens, [r, tokens, width]."""
        embedded = self.known[chosen].requires_grad_()
        first = 1 + len(self.prefix)
        with self.replaced(embedded, slice(first, first + self.tokens)):
            numbers = [[*self.prefix, *row] for row in self.words[chosen].tolist()]
            values = self.objective(self.change, states(self.pipeline, numbers).cpu())
        return values.detach(), torch.autograd.grad(values.sum(), embedded)[0]

    @contextmanager
    def replaced(self, embedded: Tensor, places: slice):
        """While it lasts, the text encoders read these embeddings [r, tokens, width] at these places."""
        with ExitStack() as hooks:
            for (_, encoder), part in zip(encoders(self.pipeline), embedded.split(self.widths, dim=2), strict=True):

                def instead(module, given, output, part=part):
                    output = output.clone()
                    output[:, places] = part.to(output)
                    return output

                handle = encoder.get_input_embeddings().register_forward_hook(instead)
                hooks.callback(handle.remove)
            yield


# as a step of the runner


SEARCHES = ("tokens", "gradient")
SHARP = {"noise": 0.03, "price": 1.0}  # ranks captions less well than NOISE and PRICE, and leads a search elsewhere


@dataclass(frozen=True)
class CaptionSearch:
    """A search for the caption that a model was fine-tuned with, from its weights and its base model's.

    by: "tokens" (TokenSearch) or "gradient" (GradientSearch); objective: of fx.captions; prefix: what the caption is known
    to begin with; most: tokens to find, of a TokenSearch at most, of a GradientSearch exactly; price: of a token in nats,
    and noise, with the likelihood only; the other fields are those of one of the two, and the other ignores them.
    """

    VERSION: ClassVar[int] = 1

    model: Tuned
    by: str = "tokens"
    objective: str = "likelihood"
    prefix: str = ""
    most: int = 8
    beam: int = 2
    proposals: int = 64
    price: float = PRICE
    noise: float = field(default=NOISE, metadata={"absent": 0.03})  # what it was before it was a field
    iterations: int = 1000
    restarts: int = 4
    step: float = 0.1
    seed: int = 0

    def __post_init__(self):
        if self.by not in SEARCHES:
            raise ValueError(f"unknown search {self.by!r}: choose from {', '.join(SEARCHES)}")
        check_objective(self.objective)
        if (
            min(self.most, self.beam, self.proposals, self.iterations, self.restarts) < 1
            or min(self.step, self.noise) <= 0
        ):
            raise ValueError(
                f"most {self.most}, beam {self.beam}, proposals {self.proposals}, iterations {self.iterations} and "
                f"restarts {self.restarts} must be at least 1, step {self.step} above 0, noise {self.noise} above 0"
            )


@results.perform.register
def _(spec: CaptionSearch, folder: Path) -> None:
    """Write scores.json: caption, score and evaluations; tokens.json: the numbers of its tokens."""
    pair = load_tuned(spec.model)
    found = search(spec, change_of(pair), pair.tuned).run()
    told = asdict(found)
    (folder / "tokens.json").write_text(json.dumps(told.pop("tokens")))
    (folder / "scores.json").write_text(json.dumps({"found": told.pop("caption"), **told}, ensure_ascii=False))


def twice(model: Tuned, **options) -> tuple[CaptionSearch, CaptionSearch]:
    """The two searches, token by token, whose better end is taken: by NOISE and PRICE, and by SHARP; `options`: fields."""
    return CaptionSearch(model, **options), CaptionSearch(model, **options | SHARP)


def best_of(specs: Sequence[CaptionSearch]) -> tuple[str, float]:
    """Of the captions that searches of one model have ended with, the one of the highest likelihood, and that.

    The likelihood is that of NOISE less PRICE for each token, whatever the searches had. Searches that are not finished are
    done now. ValueError without a search or for searches of several models.
    """
    if len({spec.model for spec in specs}) != 1:
        raise ValueError("name one search or more, all of one model")
    captions = [json.loads((results.complete(spec) / "scores.json").read_text())["found"] for spec in specs]
    pair = load_tuned(specs[0].model)
    best = rank(change_of(pair), pair.tuned, captions).iloc[0]
    return best.caption, float(best.score)


def search(spec: CaptionSearch, change: Change, pipeline: DiffusionPipeline) -> TokenSearch | GradientSearch:
    """The search that a spec describes, ready to run."""
    common = _fields(spec, "prefix", "objective", "noise")
    if spec.by == "tokens":
        price = spec.price if spec.objective == "likelihood" else None
        return TokenSearch(change, pipeline, **common, price=price, **_fields(spec, "most", "beam", "proposals"))
    rest = _fields(spec, "iterations", "restarts", "step", "seed")
    return GradientSearch(change, pipeline, **common, tokens=spec.most, **rest)


def _fields(spec, *names: str) -> dict:
    return {name: getattr(spec, name) for name in names}
