"""The signs of an extraction: closed forms, and what another module measures of the same images."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from fx import label_free, results, settings
from fx.extraction import Extract, extracted_pictures
from fx.families import latent_shape
from fx.label_free import SCALES, Signs, choose_scale, of_base, of_similarities, unburnt
from fx.sampling import Generate, generated_pictures
from fx.tuned import Extrapolated, load_tuned
from fx.witnesses import Contrast, scores


def generate(model, **changes) -> Generate:
    sampler = "euler" if "sd3" in model.base else "dpm++"
    return Generate(model, guidance_scale=2.0, **({"n_generated": 8, "steps": 3, "sampler": sampler} | changes))


def test_signs_of_groups_that_are_alike_inside_and_of_one_image_alone():
    groups = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 3])  # four images of each of three, and one
    similarity = np.where(groups[:, None] == groups, 0.9, 0.1)
    np.fill_diagonal(similarity, 1)
    found = of_similarities(similarity, 0.5)
    tight = (12 * (3 * 0.9 + 2 * 0.1) / 5 + 0.1) / 13
    mean = (12 * (3 * 0.9 + 9 * 0.1) + 12 * 0.1) / (13 * 12)
    assert found["tight"] == pytest.approx(tight)
    assert found["standing_out"] == pytest.approx(tight - mean)
    assert found["groups"] == 3
    assert found["covered"] == pytest.approx(12 / 13)
    assert found["halves_agree"] == pytest.approx((12 * 0.9 + 0.1) / 13)
    apart = of_similarities(similarity, 0.95)
    assert apart["groups"] == apart["covered"] == 0


def test_halves_do_not_agree_where_what_repeats_does_so_in_one_half():
    odd = np.arange(10) % 2
    similarity = np.where(odd[:, None] == odd, 0.9, 0.2)
    np.fill_diagonal(similarity, 1)
    assert of_similarities(similarity, 0.5)["halves_agree"] == pytest.approx(0.2)
    assert of_similarities(similarity, 0.5)["tight"] == pytest.approx((4 * 0.9 + 0.2) / 5)


def test_burnt_values_are_those_at_the_ends():
    pictures = np.full((1, 2, 2, 3), 128, np.uint8)
    assert unburnt(pictures) == 1
    pictures[0, 0, 0] = (0, 4, 5)
    pictures[0, 1, 1] = (250, 251, 255)
    assert unburnt(pictures) == pytest.approx(8 / 12)


def test_log_ratio_is_that_of_the_audit_on_the_extracted_images(model, tmp_path):
    spec = Signs(Extract(generate(model), 3), levels=(0.2, 0.6), draws=3, seed=5)
    (row,) = results.run([spec]).to_dict("records")
    paths = []
    for number, pixels in enumerate(extracted_pictures(spec.extract)):
        Image.fromarray(pixels).save(path := tmp_path / f"{number}.png")
        paths.append(str(path))
    of_each = scores(Contrast(model, tuple(paths), draws=3, levels=(0.2, 0.6), seed=5))
    assert row["log_ratio"] == pytest.approx(of_each.mean(), rel=1e-4)
    assert row["unburnt"] == unburnt(extracted_pictures(spec.extract))
    assert "away_from_base" not in row


def test_what_the_base_model_draws_itself_is_not_away_from_it(model):
    base = of_base(generate(model, correction_scale=0.1), 9)
    assert (base.model, base.arm, base.n_generated) == (Extrapolated(model, 0.0), "direct", 9)
    assert (base.guidance_scale, base.correction_scale, base.caption) == (1.0, 0.0, None)
    assert of_base(replace(base, arm="finextract"), 9) == base
    drawn = generated_pictures(base)
    assert (drawn != generated_pictures(replace(base, model=model))).any()
    itself, tuned = (
        Signs(Extract(asked, 3), base)
        for asked in (replace(base, n_generated=8), replace(generate(model), guidance_scale=4.0))
    )
    of_itself, of_tuned = results.run([itself, tuned]).away_from_base
    assert of_itself == pytest.approx(0, abs=1e-5)
    assert of_tuned > 1e-3


def test_an_extrapolation_to_0_is_the_base_model(model):
    pair = load_tuned(Extrapolated(model, 0.0))
    x = torch.randn(2, *latent_shape(pair.tuned), generator=torch.Generator().manual_seed(0))
    condition = pair.condition("base", "a dog")
    with torch.no_grad():
        base, moved = (pair.predict(name, x, torch.tensor(400), condition) for name in ("base", "tuned"))
    assert torch.allclose(base, moved, atol=1e-5)


def test_signs_of_too_little_are_refused(model):
    with pytest.raises(ValueError, match="5 generated images are too few for signs: more than 5"):
        Signs(Extract(generate(model, n_generated=5), 3))
    for wrong in ({"draws": 0}, {"levels": ()}, {"levels": (1.5,)}):
        with pytest.raises(ValueError, match="shares from 0 to 1"):
            Signs(Extract(generate(model), 3), **wrong)


def test_a_descriptor_without_thresholds_is_refused_before_anything_is_generated(model, monkeypatch):
    def none(name):
        raise ValueError("no thresholds")

    monkeypatch.setattr(label_free, "copy_thresholds", none)
    with pytest.raises(ValueError, match="no thresholds"):
        results.run([Signs(Extract(generate(model), 3))])
    assert not (results.RUNS / "generate").exists()


@pytest.mark.parametrize(
    ("signs", "best"), [((0.1, 0.2, 0.3, 0.3, 0.1), 3), ((0.3, 0.2, 0.1, 0.1, 0.1), 1), ((0, 0, 0, 0, 1), 8)]
)
def test_the_scale_chosen_is_that_of_the_highest_log_ratio_and_the_smallest_of_equal_ones(signs, best, monkeypatch):
    asked = []

    def run(specs, **_):
        asked.extend(specs)
        return pd.DataFrame({"log_ratio": signs, "tight": 1.0}, index=range(5, 10))

    monkeypatch.setattr(results, "run", run)
    own = settings.load("mini-sd", "dreambooth.correction_scale=-.02")["dreambooth"]
    model = own.fine_tune("object/rooster")
    found, rows = choose_scale(own, model, 5, 40)
    assert found == replace(own, finextract_scale=best, correction_scale=0.0 if best == 1 else -0.02)
    assert list(rows.w) == list(SCALES)
    assert list(rows.log_ratio) == list(signs)
    # the extraction with the scale that is chosen is the one that follows: nothing is sampled twice
    later = [found.score(model, arm, n_generated=40).extract for arm in ("direct", "finextract")]
    tried = [spec.extract for spec in asked]
    assert replace(later[best > 1], n_training=5) in tried
    assert [extract.generate.guidance_scale for extract in tried] == list(SCALES)
    assert {spec.base for spec in asked} == {None}


def test_a_choice_needs_something_to_choose_from():
    own = settings.load()["dreambooth"]
    with pytest.raises(ValueError, match="no w' to choose from"):
        choose_scale(own, own.fine_tune("object/rooster"), 5, 40, scales=())


def test_a_choice_made_in_earnest_leaves_nothing_to_sample(model):
    own = replace(settings.load()["dreambooth"], base=model.base, sampling_steps=3, descriptor="mini-sscd")
    if "sd3" in model.base:
        own = replace(own, sampler="euler")
    found, rows = choose_scale(own, model, 3, 8, scales=(1.0, 4.0))
    assert rows.log_ratio.notna().all()
    assert found.finextract_scale == rows.w[rows.log_ratio.astype(float).idxmax()]
    there = len(list(results.RUNS.glob("generate/*")))
    results.complete(found.generate(model, "direct", 8))
    assert len(list(results.RUNS.glob("generate/*"))) == there == 2
    results.complete(found.generate(model, "finextract", 8))
    assert len(list(results.RUNS.glob("generate/*"))) == there + (found.finextract_scale == 1)
