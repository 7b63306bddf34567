"""Refinement against twins written out by hand, and what must hold of it whatever the models are."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fx import refine, results, sampling
from fx.datasets import from_uint8, to_uint8
from fx.evaluation import Score, read_matches
from fx.extraction import Extract, extracted_descriptors, extracted_pictures, extraction_sets
from fx.families import decode, latent_shape, make_scheduler, network, noising
from fx.finetune import FineTune, TrainingItem
from fx.losses import errors, to_latents, told_apart
from fx.models import ModelPair
from fx.refine import Consensus, Contrastive
from fx.sampling import Generate, generated_pictures
from fx.similarity import load_descriptor
from fx.tuned import Checkpoint, load_tuned
from fx.witnesses import Resemblance, scores

WAYS = [Consensus(neighbours=2, draws=2), Contrastive(steps=3)]
WAYS += [Contrastive(steps=2, base_sees_caption=False, after=Consensus(neighbours=1, draws=1))]


def generate(model: FineTune | Checkpoint, **changes) -> Generate:
    sampler = "euler" if "sd3" in model.base else "dpm++"
    return Generate(model, guidance_scale=2.0, **({"n_generated": 6, "steps": 4, "sampler": sampler} | changes))


@pytest.mark.parametrize("how", WAYS)
def test_an_extraction_is_refined_and_everything_else_of_it_stays(model, how):
    plain = Extract(generate(model), 3)
    spec = replace(plain, refine=how)
    folder, before = results.complete(spec), results.complete(plain)
    assert extraction_sets(folder) == extraction_sets(before)
    assert (folder / "descriptors.npy").read_bytes() == (before / "descriptors.npy").read_bytes()
    written = json.loads((folder / "scores.json").read_text())
    assert written.pop("n_evaluations") == refine.evaluations(how, spec.generate, 3)
    assert written == json.loads((before / "scores.json").read_text())
    assert extracted_pictures(spec).shape == extracted_pictures(plain).shape == (3, 16, 16, 3)
    assert (extracted_pictures(spec) != extracted_pictures(plain)).any()
    assert np.array_equal(
        extracted_pictures(plain), generated_pictures(plain.generate, extraction_sets(before)["centres"])
    )


@pytest.mark.parametrize("how", WAYS)
def test_scores_and_resemblance_are_those_of_the_refined_images(model, how, tmp_path):
    spec = Extract(generate(model), 3, refine=how)
    pictures = extracted_pictures(spec)
    with torch.no_grad():
        own = load_descriptor(spec.descriptor)(from_uint8(pictures)).numpy()
    np.testing.assert_allclose(extracted_descriptors(spec), own, atol=1e-5)
    (tmp_path / "known").mkdir()
    Image.fromarray(pictures[1]).save(tmp_path / "known/0.png")
    Image.fromarray(generated_pictures(spec.generate, [5])[0]).save(tmp_path / "known/1.png")
    score = Score(spec, (TrainingItem(str(tmp_path / "known"), "a dog"),), judge="")
    (row,) = results.run([score]).to_dict("records")
    with torch.no_grad():
        two = from_uint8(np.stack([pictures[1], generated_pictures(spec.generate, [5])[0]]))
        known = load_descriptor(spec.descriptor)(two)
    best = (known.numpy() @ own.T).max(axis=1)
    assert row["AS"] == pytest.approx(best.clip(0, 1).mean(), abs=1e-5)
    assert read_matches(score)["similarity"][0] == pytest.approx(1, abs=1e-4)
    assert read_matches(score)["match"][0] == extraction_sets(results.folder(spec))["centres"][1]
    found = scores(Resemblance(spec, (str(tmp_path / "known/0.png"), str(tmp_path / "known/1.png"))))
    np.testing.assert_allclose(found, best, atol=1e-5)


def test_consensus_starts_from_the_mean_of_the_nearest_and_walks_the_last_steps(model):
    how, spec = Consensus(neighbours=1, share=0.5, draws=2), generate(model)
    pair = load_tuned(model)
    latents = to_latents(pair, from_uint8(generated_pictures(spec)))
    similarity = np.full((6, 6), 0.1)
    similarity[2, 4] = similarity[4, 2] = similarity[0, 1] = similarity[1, 0] = 0.9
    np.fill_diagonal(similarity, 1)
    found = refine.refined(how, spec, pair, lambda numbers: latents[list(numbers)], [2, 0], similarity)
    schedule = make_scheduler(pair.tuned, spec.sampler)
    ends = []
    for centre, other in ((2, 4), (0, 1)):
        x0, draws = (latents[centre] + latents[other]) / 2, []
        for draw in range(2):
            schedule.set_timesteps(4)
            t = schedule.timesteps[2]
            alpha, sigma = sampling.noise_level(schedule, 2, t)
            eps = np.random.default_rng([0, 1 + draw, centre]).standard_normal(x0.shape, np.float32)
            x = alpha * x0 + sigma * torch.from_numpy(eps)
            schedule.set_begin_index(2)
            for t in schedule.timesteps[2:]:
                with torch.no_grad():
                    base = pair.predict("base", x[None], t, pair.condition("base", ""))
                    tuned = pair.predict("tuned", x[None], t, pair.condition("tuned", "a dog"))
                x = schedule.step(base + 2 * (tuned - base), t, x[None]).prev_sample[0]
            draws.append(x)
        ends.append(torch.stack(draws).mean(dim=0))
    np.testing.assert_allclose(found, decode(pair.tuned, torch.stack(ends)), atol=1e-4)


def test_contrast_is_adam_on_the_log_ratio_of_both_losses(model):
    how, pair = Contrastive(steps=3, learning_rate=0.1, radius=100.0), load_tuned(model)
    x0 = torch.randn(2, *latent_shape(pair.tuned), generator=torch.Generator().manual_seed(0))
    found = refine.descend(how, pair, x0, "a dog", seed=5)
    schedule, x = noising(pair.tuned), x0[1:].clone()
    draw, first, second = torch.Generator().manual_seed(5), torch.zeros_like(x), torch.zeros_like(x)
    low, high = round(0.1 * (schedule.levels - 1)), round(0.7 * (schedule.levels - 1))
    for step in range(1, 4):
        number = torch.randint(low, high + 1, (1,), generator=draw)
        eps = torch.randn(x.shape[1:], generator=draw)
        x.requires_grad_()
        loss = {
            m: errors(pair, m, schedule, x, eps, number, pair.condition(m, "a dog")).log() for m in ("base", "tuned")
        }
        (gradient,) = torch.autograd.grad(loss["tuned"].sum() - loss["base"].sum(), x)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        step_of = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        x = (x - 0.1 * step_of).detach()
    np.testing.assert_allclose(found[1:], x, atol=1e-3)
    near = refine.descend(replace(how, radius=0.01), pair, x0, "a dog", seed=5)
    assert (near - x0).square().mean(dim=(1, 2, 3)).sqrt().max() <= 0.01 + 1e-6


def test_contrast_may_start_from_the_consensus_and_leave_the_caption_to_the_tuned_model(model):
    first, spec, pair = Consensus(neighbours=1, draws=1), generate(model), load_tuned(model)
    latents = to_latents(pair, from_uint8(generated_pictures(spec)))
    similarity = np.corrcoef(latents.flatten(1).numpy())

    def known(numbers):
        return latents[list(numbers)]

    how = Contrastive(steps=2, base_sees_caption=False)
    found = refine.refined(replace(how, after=first), spec, pair, known, [2, 0], similarity)
    starts = refine.consensus_starts(first, known, [2, 0], similarity)
    agreed = refine.walk_again(first, spec, pair, starts, [2, 0])
    unlike = refine.descend(replace(how, base_sees_caption=True), pair, agreed, "a dog")
    plain = pair.condition

    def without(name, caption):
        return plain(name, "" if name == "base" else caption)

    pair.condition = without
    by_hand = refine.descend(replace(how, base_sees_caption=True), pair, agreed, "a dog")
    np.testing.assert_allclose(found, decode(pair.tuned, by_hand), atol=1e-4)
    assert (by_hand - unlike).abs().max() > 1e-3


@pytest.mark.parametrize("how", WAYS)
def test_an_image_is_refined_as_if_it_were_alone(model, how):
    spec, pair = generate(model), load_tuned(model)
    latents = to_latents(pair, from_uint8(generated_pictures(spec)))
    similarity = np.corrcoef(latents.flatten(1).numpy())

    def of(centres):
        return refine.refined(how, spec, pair, lambda numbers: latents[list(numbers)], centres, similarity)

    np.testing.assert_allclose(of([4, 1, 0])[1], of([1])[0], atol=1e-4)


def test_a_batch_that_does_not_fit_is_halved(model, monkeypatch):
    pair = load_tuned(model)
    x0 = torch.randn(5, *latent_shape(pair.tuned), generator=torch.Generator().manual_seed(3))
    how, at_once, sizes = Contrastive(steps=2), refine.errors, []
    whole = refine.descend(how, pair, x0, "a dog")

    def little_memory(pair, named, schedule, x, *rest):
        sizes.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError
        return at_once(pair, named, schedule, x, *rest)

    monkeypatch.setattr(refine, "errors", little_memory)
    assert torch.allclose(refine.descend(how, pair, x0, "a dog"), whole, atol=1e-5)
    assert set(sizes) == {1, 2, 3, 5}


def test_where_nothing_was_learned_contrast_changes_nothing(model):
    same = Checkpoint(model.base, model.base, "a dog")
    spec = Extract(generate(same), 2, refine=Contrastive(steps=2, learning_rate=0.5))
    pair = load_tuned(same)
    centres = extraction_sets(results.complete(spec))["centres"]
    start = to_latents(pair, from_uint8(generated_pictures(spec.generate, centres)))
    expected = to_uint8(decode(pair.tuned, start))
    assert np.abs(extracted_pictures(spec).astype(int) - expected).max() <= 1


def test_a_difference_counts_where_it_is_more_than_rounding_each_image_by_itself():
    one = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    difference = one * torch.tensor([1e-7, 1e-3, 0.0])[:, None, None, None]
    found = told_apart(difference, one)
    assert torch.equal(found[1], difference[1])
    assert not found[[0, 2]].any()


def test_what_refining_costs_is_what_is_evaluated(model, monkeypatch):
    spec, count = generate(model), 0
    pair = load_tuned(model)
    latents = to_latents(pair, from_uint8(generated_pictures(spec)))
    plain = ModelPair.predict

    def counting(self, which, x, t, condition):
        nonlocal count
        count += len(x) * (3 if x.requires_grad else 1)
        return plain(self, which, x, t, condition)

    monkeypatch.setattr(ModelPair, "predict", counting)
    monkeypatch.setattr(ModelPair, "_both", lambda *_: pytest.fail("two models, two passes"))
    for how in WAYS:
        count = 0
        refine.refined(how, spec, pair, lambda numbers: latents[list(numbers)], [3, 1], np.eye(6))
        assert refine.evaluations(how, spec, 2) == count
    assert sampling.evaluations(spec) == 6 * 4 * 2
    assert sampling.evaluations(replace(spec, arm="direct", guidance_scale=1.0)) == 6 * 4


@pytest.mark.parametrize("how", WAYS)
def test_networks_have_the_precision_of_the_generation(model, how, monkeypatch):
    seen, plain = [], ModelPair.predict

    def noting(self, which, x, t, condition):
        seen.append((network(self.tuned).dtype, x.dtype))
        return plain(self, which, x, t, condition)

    results.complete(plain_one := Extract(generate(model, precision="bfloat16"), 2))
    monkeypatch.setattr(ModelPair, "predict", noting)
    results.complete(replace(plain_one, refine=how))
    assert set(seen) == {(torch.bfloat16, torch.float32)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Consensus(neighbours=-1), "neighbours -1 must be at least 0"),
        (lambda: Consensus(draws=0), "draws 0 at least 1"),
        (lambda: Consensus(share=1.0), "share 1.0 between 0 and 1"),
        (lambda: Contrastive(steps=0), "steps 0, .* must be positive"),
        (lambda: Contrastive(radius=0.0), "radius 0.0 must be positive"),
        (lambda: Contrastive(lowest=0.7, highest=0.7), "0 <= lowest < highest <= 1 must hold, not 0.7 and 0.7"),
    ],
)
def test_what_cannot_be_meant_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_contrast_for_a_cost_takes_its_share_in_whole_steps():
    assert refine.contrast(126, 0.5) == Contrastive(steps=10)
    assert refine.contrast(126, 0.25, base_sees_caption=False) == Contrastive(steps=5, base_sees_caption=False)
    assert refine.evaluations(refine.contrast(500), None, 2) == 2 * 0.6 * 500
    assert refine.contrast(180, 0.7).steps == 21  # of 126, which 180 * .7 is a little less than


def test_consensus_walks_with_the_captions_own_scale(model):
    spec = replace(generate(model), arm="caption_first")
    pair = load_tuned(model)
    latents = to_latents(pair, from_uint8(generated_pictures(spec)))
    one, other = (
        refine.walk_again(Consensus(draws=1), replace(spec, text_scale=scale), pair, latents[:2], [0, 1])
        for scale in (1.0, 4.0)
    )
    plain = refine.walk_again(Consensus(draws=1), replace(spec, arm="conditional_only"), pair, latents[:2], [0, 1])
    np.testing.assert_allclose(one, plain, atol=1e-4)
    assert (one - other).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 1}, "begins in the middle: sample with at least 2 steps"),
        ({"sampler": "published"}, "another sampler"),
    ],
)
def test_what_cannot_begin_in_the_middle_is_refused_at_once(tiny_sd, changes, message):
    asked = Generate(Checkpoint(str(tiny_sd), str(tiny_sd), "a dog"), n_generated=6, **({"steps": 4} | changes))
    with pytest.raises(ValueError, match=message):
        Extract(asked, 2, refine=Consensus())
    with pytest.raises(ValueError, match=message):
        Extract(asked, 2, refine=Contrastive(after=Consensus()))
    Extract(asked, 2, refine=Contrastive())
