"""fx.perturbation: items whose images were changed before training, learned as changed and scored as they were."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from fx import defenses, families, finetune, perturbation, results
from fx.datasets import load_images, load_item, to_uint8
from fx.defenses import Draws, denoising_error
from fx.evaluation import Score, known_items, scored_images
from fx.extraction import Extract
from fx.finetune import FineTune, TrainingItem, learned_from, load_training
from fx.models import load_pipeline
from fx.perturbation import Perturb, Purify, changed_images
from fx.sampling import Generate


@pytest.fixture
def perturb(tiny_sd, picture_folder):
    """A function that gives a short Perturb of the four pictures; options replace its fields."""

    def make(**options) -> Perturb:
        return Perturb(**({"item": str(picture_folder), "base": str(tiny_sd), "steps": 3, "step_size": 4.0} | options))

    return make


@pytest.fixture
def pictures(picture_folder) -> np.ndarray:
    """The four pictures, uint8 [4, 16, 16, 3]."""
    return to_uint8(load_images(load_item(str(picture_folder), "any").training, 16))


def shown(changed) -> np.ndarray:
    """The changed images as they lie on disk, uint8 [n, 16, 16, 3]."""
    return to_uint8(load_images(changed_images(changed), 16))


@pytest.mark.parametrize("method", defenses.PERTURBATIONS)
def test_images_are_changed_within_the_budget_one_by_one_in_the_order_of_the_item(
    perturb, pictures, tiny_pipeline, runs, method
):
    spec = perturb(method=method, eps=5, seed=3)
    found = shown(spec)
    assert [path.name for path in changed_images(spec)] == [f"{n:05d}.png" for n in range(4)]
    apart = np.abs(found.astype(int) - pictures)
    assert 3 <= apart.max() <= 5
    for number, picture in enumerate(pictures):
        own = defenses.perturb(
            tiny_pipeline, picture[None], method, eps=5, steps=3, step_size=4.0, seed=3, numbers=[number]
        )
        assert np.array_equal(own[0], found[number])


def test_more_than_a_hundred_images_keep_the_order_of_the_item(tmp_path, runs, tiny_sd):
    """Each picture is of a grey of its own, so that one in another's place would be seen; JPEG keeps plain ones."""
    (folder := tmp_path / "many").mkdir()
    greys = [40 + n for n in range(103)]
    for number, grey in enumerate(greys):
        Image.new("RGB", (16, 16), (grey,) * 3).save(folder / f"{number:03d}.png")
    found = shown(Purify(str(folder), "jpeg", str(tiny_sd)))
    assert np.abs(found[:, 8, 8, 0].astype(int) - greys).max() <= 1
    assert found[:, 8, 8, 0].tolist() == sorted(found[:, 8, 8, 0].tolist())


def test_an_interrupted_perturbation_goes_on_with_the_images_that_are_missing(perturb, runs, monkeypatch):
    real, calls = perturbation.perturb, []

    def counted(*arguments, **options):
        calls.append(options["numbers"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(perturbation, "perturb", counted)
    with pytest.raises(KeyboardInterrupt):
        results.complete(perturb())
    found = shown(perturb())
    assert calls == [[0], [1], [2], [2], [3]]
    monkeypatch.setattr(results, "RUNS", runs / "elsewhere")
    assert np.array_equal(shown(perturb()), found)


@pytest.mark.parametrize("how", [*defenses.PURIFICATIONS, "jpeg:20", "blur:2", "regenerate:0.5"])
def test_purification_is_of_what_was_perturbed_or_of_the_item_itself(perturb, pictures, tiny_sd, runs, how):
    pipeline = load_pipeline(str(tiny_sd))
    item = perturb().item
    for of, before in ((item, pictures), (perturb(), shown(perturb()))):
        assert np.array_equal(shown(Purify(of, how, str(tiny_sd))), defenses.purify(how, before, pipeline))


def test_a_strength_is_that_of_the_purification(tiny_pipeline, pictures):
    assert np.array_equal(defenses.purify("jpeg", pictures, tiny_pipeline), defenses.jpeg(pictures, 75))
    assert np.array_equal(defenses.purify("jpeg:20", pictures, tiny_pipeline), defenses.jpeg(pictures, 20))
    assert np.array_equal(defenses.purify("blur:3", pictures, tiny_pipeline), defenses.blur(pictures, 3.0))
    noisy = defenses.noise_and_resize(pictures, 30.0)
    assert np.array_equal(defenses.purify("noise and resize:30", pictures, tiny_pipeline), noisy)
    again = defenses.regenerate(tiny_pipeline, pictures, 0.4)
    assert np.array_equal(defenses.purify("regenerate:0.4", pictures, tiny_pipeline), again)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "sharpen",
            "unknown purification 'sharpen': choose from jpeg, blur, noise and resize, autoencoder, regenerate",
        ),
        ("jpeg:0", "purification 'jpeg:0': the strength of jpeg is a whole number from 1 to 95"),
        ("jpeg:50.5", "a whole number from 1 to 95"),
        ("blur:strong", "the strength of blur is a number from 0.1 to 50"),
        ("regenerate:2", "the strength of regenerate is a number from 0.02 to 1"),
    ],
)
def test_unknown_purifications_are_refused(how, message):
    with pytest.raises(ValueError, match=message):
        Purify("style/mimooh", how)


# in a fine-tuning


@pytest.fixture
def fine_tune(tiny_sd, perturb):
    """A function from a changed (or None) and further fields of the TrainingItem to a FineTune on the four pictures."""

    def make(changed=None, **fields) -> FineTune:
        part = TrainingItem(perturb().item, "a dog", changed=changed, **fields)
        return FineTune((part,), base=str(tiny_sd), steps_per_image=1, batch_size=2, learning_rate=1e-3)

    return make


def test_the_changed_images_are_learned_and_those_as_they_were_are_scored(
    perturb, fine_tune, pictures, runs, monkeypatch
):
    learned, real = [], finetune.train

    def recorded(pipeline, images, *arguments):
        learned.append(to_uint8(images))
        return real(pipeline, images, *arguments)

    monkeypatch.setattr(finetune, "train", recorded)
    for changed in (None, perturb(eps=30), Purify(perturb(eps=30), "blur", perturb().base)):
        model = fine_tune(changed)
        results.complete(model)
        assert np.array_equal(learned[-1], shown(changed) if changed else pictures)
        originals = load_item(perturb().item, "any").training
        assert [item.training for item in known_items((), model)] == [originals]
        score = Score(Extract(Generate(model, "direct", 1.0, n_generated=4), 4))
        assert tuple(scored_images(score)[0]) == originals
    assert not np.array_equal(learned[0], learned[1])


def test_first_takes_the_first_of_the_changed_images(perturb, fine_tune, runs):
    (part,) = fine_tune(perturb(), first=2).training
    assert learned_from(part) == changed_images(perturb())[:2]
    assert load_training(part).n_training == 2


def test_an_address_asks_for_no_work_and_changes_with_what_was_changed_only(perturb, fine_tune, runs):
    plain = fine_tune()
    others = [fine_tune(perturb()), fine_tune(perturb(eps=9)), fine_tune(Purify(perturb(), "jpeg", perturb().base))]
    assert len({results.digest(spec) for spec in (plain, *others)}) == 4
    assert not (runs / "perturb").exists()
    (part,) = results._asked(plain)["spec"]["fields"]["training"]
    assert "changed" not in part["fields"]


def test_the_changed_images_are_made_on_the_way_when_a_fine_tuning_asks_for_them(perturb, fine_tune, runs):
    rows = results.run([fine_tune(perturb())])
    assert len(rows) == 1
    assert len(list((runs / "perturb").iterdir())) == 1


@pytest.mark.parametrize("wrong", ["jpeg", Perturb("style/mimooh")], ids=["a word", "another item"])
def test_what_was_changed_must_be_of_the_same_item(wrong):
    with pytest.raises(ValueError, match="changed must be a Perturb or a Purify of 'style/abiclipart'"):
        TrainingItem("style/abiclipart", changed=wrong)


def test_first_beyond_the_changed_images_is_refused(picture_folder, perturb, monkeypatch):
    part = TrainingItem(perturb().item, "a dog", first=5, changed=perturb())
    works = load_item(perturb().item, "a dog")
    monkeypatch.setattr(finetune, "load_item", lambda *_: replace(works, more=works.training))
    with pytest.raises(ValueError, match=r"changed are the 4 training images of .*: first 5 goes beyond"):
        load_training(part)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_flow_model_perturbs_too(tmp_path, perturb, runs, family):
    """Its own loss on the changed images rises: the velocity at the noise levels of its schedule."""
    asked = perturb(base=str(tiny.save(family, tmp_path / family)), steps=20)
    pipeline = load_pipeline(asked.base)
    known = load_item(asked.item, "any").training
    before, after = (load_images(paths, 16) for paths in (known, changed_images(asked)))
    draw = torch.Generator().manual_seed(1)
    draws = Draws(torch.arange(100, 900, 200), torch.randn(4, 4, 4, 4, generator=draw), torch.zeros(4, 4, 4, 4))
    condition = families.encode(pipeline, asked.caption)
    with torch.no_grad():
        losses = [denoising_error(pipeline, x, condition, draws).mean() for x in (before, after)]
    assert losses[1] > losses[0]
    assert (before - after).abs().max() <= asked.eps / 127.5 + 1e-6
