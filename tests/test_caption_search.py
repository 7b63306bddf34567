"""Searching captions: token by token and by gradient, from planted changes; the step of the runner."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

from fx import captions, results
from fx.caption_search import CaptionSearch, GradientSearch, TokenSearch, best_of, search, twice
from fx.captions import NOISE, PRICE, change_of, score, states, token_numbers
from fx.finetune import FineTune, TrainingItem
from fx.models import load_pipeline
from fx.tuned import Checkpoint, load_tuned


@pytest.mark.parametrize(("prefix", "true"), [("", "a dog"), ("a", "a dog"), ("", "in a dog")])
def test_a_search_finds_a_planted_caption_without_candidates(reader, prefix, true):
    change = tiny.explained_by(reader, true)
    search = TokenSearch(change, reader, prefix, most=6)
    found = search.run()
    assert found.caption == true
    own = tuple(token_numbers(reader, [true])[0])
    assert found.tokens == own
    assert found.score == pytest.approx(float(score(change, reader, [own])[0]))
    assert search.evaluations > len(search.words)


@pytest.mark.parametrize("start", ["b dog", "a b dog", "dog"])
def test_a_search_mends_a_caption_by_one_token_replaced_left_out_or_put_in(reader, start):
    search = TokenSearch(tiny.explained_by(reader, "a dog"), reader, most=6)
    tokens = [tuple(numbers) for numbers in token_numbers(reader, [start, "a dog"])]
    assert search.refined(tokens[0]) == tokens[1]


def test_what_a_token_must_add_keeps_the_caption_short(reader):
    change = tiny.explained_by(reader, "a dog")
    assert TokenSearch(change, reader, price=1e6).run().caption == ""
    model = Checkpoint("somewhere")
    assert search(CaptionSearch(model, price=7.0), change, reader).price == 7.0
    assert search(CaptionSearch(model, objective="coverage"), change, reader).price == 0, "a share of 0 to 1, not nats"
    assert TokenSearch(change, reader, objective="coverage", most=4).run().caption != ""
    with pytest.raises(ValueError, match=r"step 0\.1 above 0, noise 0\.0 above 0"):
        CaptionSearch(model, noise=0.0)
    with pytest.raises(ValueError, match="most 0, beam 2 and proposals 64 must be at least 1"):
        TokenSearch(change, reader, most=0)
    with pytest.raises(ValueError, match="unknown objective 'magic'"):
        TokenSearch(change, reader, objective="magic")


@pytest.mark.parametrize("objective", ["likelihood", "coverage"])
def test_hard_prompts_find_a_planted_caption(reader, objective):
    """Of as many tokens as it has, the first known."""
    change, words = tiny.explained_by(reader, "a dog"), token_numbers(reader, ["a dog"])[0]
    options = {"tokens": len(words) - 1, "iterations": 60, "restarts": 8, "objective": objective}
    found = GradientSearch(change, reader, "a", **options).run()
    assert found.tokens == tuple(words)
    assert found.caption == "a dog"
    assert found.score == pytest.approx(float(score(change, reader, [words], objective)[0]))
    assert found.evaluations == 3 * 60 * 8


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "alt"])
def test_the_gradient_is_that_of_the_embeddings_of_the_tokens(family, tmp_path):
    """Against finite differences, in every text encoder, and the values are those of the tokens themselves."""
    pipeline = load_pipeline(str(tiny.save(family, tmp_path / family)))
    for _, encoder in captions.encoders(pipeline):
        tiny.spread(encoder.double())
    change = tiny.explained_by(pipeline, "a dog", noise=0.5)
    made = GradientSearch(change, pipeline, "a", tokens=2, objective="coverage")
    made.known = made.known.double()
    chosen = np.array([[3, 7], [20, 11]])
    values, gradient = made.gradient(chosen)
    numbers = [[*made.prefix, *row] for row in made.words[chosen].tolist()]
    np.testing.assert_allclose(values.numpy(), score(change, pipeline, numbers, "coverage"), rtol=1e-6)
    step = 1e-5 * torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0)).double()
    moved = []
    for sign in (1, -1):
        first = 1 + len(made.prefix)
        with torch.no_grad(), made.replaced(made.known[chosen] + sign * step, slice(first, first + 2)):
            moved.append(captions.coverage(change, states(pipeline, numbers)))
    expected = (moved[0] - moved[1]) / 2
    found = (gradient * step).sum(dim=(1, 2))
    assert expected.abs().min() > 1e-9
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    after = states(pipeline, numbers)  # and nothing stays behind
    torch.testing.assert_close(captions.coverage(change, after), values, rtol=1e-6, atol=0)


def test_the_nearest_words_are_those_of_the_largest_cosine(reader):
    made = GradientSearch(tiny.explained_by(reader, "a dog"), reader, tokens=2)
    chosen = np.array([[1, 2], [30, 4]])
    np.testing.assert_array_equal(made.nearest(3 * made.known[chosen]), chosen)


def test_hard_prompts_go_up_the_gradient_and_repeat_with_their_seed(reader):
    """More iterations never end lower; the same seed says the same, another seed starts elsewhere."""
    change = tiny.explained_by(reader, "in a dog")
    ends = [
        GradientSearch(change, reader, tokens=4, iterations=n, restarts=2, objective="likelihood", seed=seed).run()
        for n, seed in ((1, 0), (80, 0), (80, 0), (1, 1))
    ]
    assert ends[0].score < ends[1].score
    assert ends[1] == ends[2]
    assert ends[0].tokens != ends[3].tokens


@pytest.mark.parametrize("by", ["tokens", "gradient"])
def test_a_search_scores_with_the_noise_of_its_spec(reader, by):
    """Of captions given as tokens it says what `score` says with that noise, in the middle of a search and at its end."""
    change = tiny.explained_by(reader, "a dog", noise=0.3)
    made = search(CaptionSearch(Checkpoint("somewhere"), by=by, noise=0.9, most=2, iterations=1), change, reader)
    tokens = token_numbers(reader, ["a dog"])[0][:2]
    expected = score(change, reader, [tokens], noise=0.9, price=getattr(made, "price", 0.0))[0]
    if by == "tokens":
        found = made.values([tuple(tokens)])[0]
        words = [(word,) for word in made.words]
        made.proposals = len(words)
        order, usual = [
            [words[n] for n in np.argsort(-score(change, reader, words, length=4, **noise), kind="stable")]
            for noise in ({"noise": 0.9}, {})
        ]
        assert made.proposed(words) == order != usual
    else:
        place = {word: number for number, word in enumerate(made.words)}
        found = float(made.gradient(np.array([[place[token] for token in tokens]]))[0][0])
    assert found == pytest.approx(expected, rel=1e-6)
    ended = made.run()
    assert ended.score == pytest.approx(score(change, reader, [ended.tokens], noise=0.9)[0], rel=1e-6)


def test_of_several_searches_the_end_of_the_highest_likelihood_is_taken(tiny_sd, picture_folder, runs):
    """Whatever noise and price the searches had themselves."""
    options = {"learning_rate": 1e-3, "steps_per_image": 4, "batch_size": 2}
    model = FineTune((TrainingItem(str(picture_folder), "a dog"),), str(tiny_sd), **options)
    both = twice(model, most=2, proposals=4)
    assert [(spec.noise, spec.price, spec.most) for spec in both] == [(NOISE, PRICE, 2), (0.03, 1.0, 2)]
    specs = [*both, CaptionSearch(model, prefix="a dog", most=1, proposals=4), CaptionSearch(model, price=1e6)]
    pair = load_tuned(model)
    change = change_of(pair)
    ends = [search(spec, change, pair.tuned).run().caption for spec in specs]
    assert len(set(ends)) > 1
    worth = score(change, pair.tuned, token_numbers(pair.tuned, ends), price=PRICE)
    caption, likelihood = best_of(specs)
    assert caption == ends[worth.argmax()]
    assert likelihood == pytest.approx(worth.max(), rel=1e-6)
    for wrong in ([], [both[0], CaptionSearch(replace(model, seed=1))]):
        with pytest.raises(ValueError, match="name one search or more, all of one model"):
            best_of(wrong)


def test_hard_prompts_refuse_what_cannot_be(reader):
    change = tiny.explained_by(reader, "a dog")
    with pytest.raises(ValueError, match="tokens 0, iterations 1000 and restarts 4 must be at least 1"):
        GradientSearch(change, reader, tokens=0)
    with pytest.raises(ValueError, match="14 tokens after 'a' are too many: this model reads 13"):
        GradientSearch(change, reader, "a", tokens=14)
    with pytest.raises(ValueError, match="unknown objective 'magic'"):
        GradientSearch(change, reader, objective="magic")


@pytest.mark.parametrize("by", ["tokens", "gradient"])
def test_a_search_as_a_step_is_that_search(runs, tiny_sd, picture_folder, by):
    model = FineTune((TrainingItem(str(picture_folder), "a dog"),), str(tiny_sd), "dreambooth", 1e-3, 20)
    options = {"most": 2, "beam": 1, "proposals": 4, "iterations": 3, "restarts": 2}
    spec = CaptionSearch(model, by, prefix="a", **options)
    row = results.run([spec]).iloc[0]
    pair = load_tuned(model)
    found = search(spec, change_of(pair), pair.tuned).run()
    assert (row.found, row.score, row.evaluations) == (found.caption, pytest.approx(found.score), found.evaluations)
    assert tuple(json.loads((results.folder(spec) / "tokens.json").read_text())) == found.tokens
    manifest = (results.folder(spec) / "manifest.json").read_text()
    assert "a dog" not in manifest


def test_a_search_of_a_foreign_checkpoint_needs_no_training(runs, tiny_sd, picture_folder):
    made = FineTune((TrainingItem(str(picture_folder), "a dog"),), str(tiny_sd), "dreambooth", 1e-3, 20)
    options = {"most": 1, "beam": 1, "proposals": 2}
    own = results.run([CaptionSearch(made, **options)]).iloc[0]
    foreign = results.run([CaptionSearch(Checkpoint(str(results.folder(made)), str(tiny_sd)), **options)]).iloc[0]
    assert (own.found, own.score) == (foreign.found, foreign.score)


def test_a_spec_refuses_what_it_cannot_search(tiny_sd):
    model = Checkpoint("somewhere", str(tiny_sd))
    for wrong, message in (
        ({"by": "magic"}, "unknown search 'magic': choose from tokens, gradient"),
        ({"objective": "magic"}, "unknown objective 'magic'"),
        ({"most": 0}, "most 0, beam 2"),
        ({"step": 0.0}, "step 0.0 above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            CaptionSearch(model, **wrong)
