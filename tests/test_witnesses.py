"""The witnesses: each against a twin written out by hand, and what must hold of them whatever the models are."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from fx import quality, results, witnesses
from fx.datasets import load_images, to_uint8
from fx.extraction import Extract
from fx.families import decode, network, noising
from fx.finetune import FineTune
from fx.models import ModelPair, load_pipeline
from fx.sampling import Generate, picture_file
from fx.tuned import Checkpoint, load_tuned
from fx.witnesses import Contrast, Recovery, Resemblance, scores


@pytest.fixture
def images(tmp_path) -> tuple[str, ...]:
    """Files of five pictures."""
    (tmp_path / "images").mkdir()
    for number, picture in enumerate(tiny.pictures(5)):
        Image.fromarray(picture).save(tmp_path / f"images/{number}.png")
    return tuple(str(tmp_path / f"images/{number}.png") for number in range(5))


def same(model: FineTune) -> Checkpoint:
    """theta in the place of theta'."""
    return Checkpoint(model.base, model.base, "a dog")


def test_the_contrast_is_the_difference_of_the_logarithms_of_both_losses(model, images):
    spec = Contrast(model, images[:2], levels=(0.2, 0.6), draws=2, seed=3)
    pair = load_tuned(model)
    x0, schedule = witnesses.latents_of(pair, spec.images), noising(pair.tuned)
    expected = np.zeros((2, 2))
    for row, level in enumerate(spec.levels):
        for draw in range(2):
            generator = torch.Generator().manual_seed(3 * 1_000_003 + 1_009 * row + draw)
            eps = torch.randn(x0.shape[1:], generator=generator)
            for i in range(2):
                t = torch.tensor([round(level * (schedule.levels - 1))])
                x = schedule.add(x0[i : i + 1], eps[None], t)
                target = schedule.target(x0[i : i + 1], eps[None], t)
                with torch.no_grad():
                    base, tuned = (
                        pair.predict(m, x, schedule.timestep(t)[0], pair.condition(m, "a dog"))
                        for m in ("base", "tuned")
                    )
                ratio = ((base - target) ** 2).mean().log() - ((tuned - target) ** 2).mean().log()
                expected[row, i] += float(ratio) / 2
    np.testing.assert_allclose(np.load(results.complete(spec) / "levels.npy"), expected, atol=1e-5)
    np.testing.assert_allclose(scores(spec), expected.mean(axis=0), atol=1e-5)


def test_a_model_that_is_its_own_base_has_no_contrast_and_restores_nothing(model, images):
    assert np.abs(scores(Contrast(same(model), images, draws=1))).max() < 1e-6
    pair = load_tuned(same(model))
    x0 = witnesses.latents_of(pair, images)
    keep = witnesses.kept(tuple(x0.shape[1:]))
    found = witnesses.recover(pair, x0, "a dog", 3, 0.1, 1.0)
    start = torch.where(keep, x0, witnesses._encoded_again(pair, torch.where(keep, x0, 0.0)))
    assert torch.allclose(found, start, atol=1e-5)


def test_an_images_score_does_not_depend_on_the_others(model, images):
    for spec in (Contrast(model, images, draws=1, levels=(0.3, 0.7)), Recovery(model, images, steps=2)):
        alone = np.concatenate([scores(replace(spec, images=(path,))) for path in reversed(images)])[::-1]
        np.testing.assert_allclose(scores(spec), alone, atol=5e-3)  # a batch's rounding, and that of pixels


def test_the_caption_is_the_models_own_or_the_one_that_is_named(model, images):
    own, named, none = (scores(Contrast(model, images, caption, draws=1)) for caption in (None, "a dog", ""))
    np.testing.assert_array_equal(own, named)
    assert not np.allclose(own, none)


def test_half_of_a_latent_is_removed_in_cells_of_two_by_two():
    keep = witnesses.kept((3, 8, 4))
    assert keep.shape == (3, 8, 4)
    assert keep.float().mean() == 0.5
    assert torch.equal(keep[0], keep[2])
    assert keep[0, :4].int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]


def test_a_step_of_recovery_is_a_normalised_step_down_the_difference_of_the_losses(model, images):
    pair = load_tuned(model)
    x0, schedule = witnesses.latents_of(pair, images[:2]), noising(pair.tuned)
    keep, unit = witnesses.kept(tuple(x0.shape[1:])), x0[0].numel() ** 0.5
    start = torch.where(keep, x0, witnesses._encoded_again(pair, torch.where(keep, x0, 0.0)))
    found = witnesses.recover(pair, x0, "a dog", 1, 0.05, 10.0, seed=4)
    draw = torch.Generator().manual_seed(4)
    t = torch.randint(1, schedule.levels, (1,), generator=draw)
    eps = torch.randn(x0.shape[1:], generator=draw)[None]
    for i in range(2):
        x = start[i : i + 1].clone().requires_grad_()
        loss = {}
        for m in ("base", "tuned"):
            noisy = schedule.add(x, eps, t)
            predicted = pair.predict(m, noisy, schedule.timestep(t)[0], pair.condition(m, "a dog"))
            loss[m] = ((predicted - schedule.target(x, eps, t)) ** 2).mean()
        (loss["tuned"] - loss["base"]).backward()
        gradient = torch.where(keep, 0.0, x.grad[0])
        expected = start[i] - 0.05 * unit * gradient / gradient.norm()
        assert torch.allclose(found[i], expected, atol=1e-4)
    assert torch.equal(found[:, keep], x0[:, keep])


def test_recovery_stays_within_its_radius(model, images):
    pair = load_tuned(model)
    x0 = witnesses.latents_of(pair, images)
    keep, unit = witnesses.kept(tuple(x0.shape[1:])), x0[0].numel() ** 0.5
    start = torch.where(keep, x0, witnesses._encoded_again(pair, torch.where(keep, x0, 0.0)))
    found = witnesses.recover(pair, x0, "a dog", 4, 0.1, 0.15)
    lengths = (found - start).flatten(1).norm(dim=1)
    assert (lengths <= 0.15 * unit * 1.0001).all()
    assert (lengths > 0.1 * unit).all()
    assert not any(weight.requires_grad for weight in network(pair.tuned).parameters())


def test_the_recoverys_score_is_the_cosine_of_what_was_restored_with_the_original(model, images, tmp_path):
    judge = str(tiny.save_judge("clip", tmp_path / "judge"))
    spec = Recovery(model, images, steps=2, judge=judge)
    pair = load_tuned(model)
    found = witnesses.recover(pair, witnesses.latents_of(pair, images), "a dog", 2, spec.step_size, spec.radius)
    pictures = to_uint8(decode(pair.tuned, found))
    original = to_uint8(load_images(tuple(map(witnesses.Path, images)), 16))
    one, other = (quality.features(quality.load_judge(judge), part) for part in (pictures, original))
    np.testing.assert_allclose(scores(spec), [a @ b for a, b in zip(one, other, strict=True)], atol=1e-5)
    np.testing.assert_array_equal(np.load(results.folder(spec) / "recovered.npy"), pictures)


def test_an_image_resembles_the_extracted_image_that_it_is(model, images, monkeypatch):
    extract = Extract(Generate(model, "direct", 1.0, n_generated=6, steps=1, sampler=sampler_of(model)), 3)
    results.complete(extract)
    centres = witnesses.extraction_sets(results.folder(extract))["centres"]
    copy = str(picture_file(results.folder(extract.generate), centres[1]))
    spec = Resemblance(extract, (copy, *images))
    found = scores(spec)
    assert found[0] == pytest.approx(1.0, abs=1e-4)
    assert found[0] >= found.max() - 1e-6
    nearest = np.load(results.folder(spec) / "nearest.npy")
    assert set(nearest) <= set(centres)


def sampler_of(model: FineTune) -> str:
    return "euler" if model.base.endswith("sd3") else "ddim"


def test_changed_images_and_models_are_other_steps(model, images):
    specs = [Contrast(model, images), Recovery(model, images)]
    before = [results.digest(spec) for spec in specs]
    Image.fromarray(tiny.pictures(6)[5]).save(images[0])
    assert all(results.digest(spec) != old for spec, old in zip(specs, before, strict=True))
    assert results.digest(replace(specs[0], caption="")) != results.digest(specs[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m, i: Contrast(m, ()), "at least one"),
        (lambda m, i: Contrast(m, list(i)), "a tuple of paths as text"),
        (lambda m, i: Contrast(m, i, draws=0), "draws 0 must be at least 1"),
        (lambda m, i: Contrast(m, i, levels=(0.5, 1.5)), "shares from 0 to 1"),
        (lambda m, i: Recovery(m, i, steps=0), "must be positive"),
    ],
)
def test_what_cannot_be_asked_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(Checkpoint("theirs"), ("a.png",))


def test_without_a_known_caption_one_must_be_named(images, tiny_sd, runs):
    unknown = Checkpoint(str(tiny_sd), str(tiny_sd))
    with pytest.raises(ValueError, match="no single caption is known"):
        scores(Contrast(unknown, images))
    assert isinstance(load_tuned(unknown), ModelPair)
    assert np.abs(scores(Contrast(unknown, images, caption="", draws=1))).max() < 1e-6
    assert load_pipeline(str(tiny_sd))
