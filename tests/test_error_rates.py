"""How often an audit errs: what is asked about which images, and how answers are counted."""

from dataclasses import replace
from math import sqrt
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
from scipy.stats import median_abs_deviation, rankdata

from fx import audit, datasets, error_rates, settings, verdict
from fx.audit import WITNESSES, Audit, Findings
from fx.error_rates import (
    COMBINATIONS,
    Case,
    asked_in,
    calibration,
    first,
    in_a_ring,
    interval,
    outcomes,
    rates,
    single_images,
    weighed,
)
from fx.finetune import FineTune
from fx.leads import Leads
from fx.publishing import published

CAMERA, CASTLE = "object/camera", "object/castle"  # of six and of four images


def case(**changes) -> Case:
    own = settings.load("mini-sd", "steps_per_image=10")["dreambooth"]
    return Case(**{"own": own, "item": CAMERA, "other": CASTLE} | changes)


# models and questions


@pytest.mark.parametrize(("method", "form"), [("dreambooth", "fp16"), ("lora", "kohya")])
def test_the_first_half_of_an_item_is_trained_on_and_published_with_what_it_is(method, form):
    own = settings.load("mini-sd", "steps_per_image=10")[method]
    made = case(own=own, length=0.25)
    files = datasets.load_item(CAMERA).training
    assert made.trained == [file.name for file in files[:3]]
    assert (made.model.form, made.model.says) == (form, True)
    tuned = made.model.model
    assert isinstance(tuned, FineTune)
    assert (tuned.method, tuned.steps_per_image, [part.item for part in tuned.training]) == (method, 2, [CAMERA])
    assert tuned.training[0].first == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"other": CAMERA}, "must be another than object/camera"),
        ({"length": 0}, "length 0 above 0"),
        (
            {"item": "style/jonathan-dietrich"},
            "style/jonathan-dietrich needs two training images or more and a control",
        ),
        ({"most": 0}, "most 0 at least 1"),
    ],
)
def test_a_case_that_cannot_be_made_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        case(**changes)


def test_images_are_laid_out_by_item_and_no_more_controls_than_asked_for(tmp_path):
    item = datasets.load_item("style/benji-park")
    suspects, controls = map(Path, error_rates.lay_out(tmp_path, item.name, 12))
    assert {path.name: path.read_bytes() for path in suspects.iterdir()} == {
        path.name: path.read_bytes() for path in item.training
    }
    wanted = [
        path.read_bytes() for path in (item.controls + item.more)[:12]
    ]  # further works have the names of controls
    assert sorted(path.read_bytes() for path in controls.iterdir()) == sorted(wanted)
    assert len(wanted) == len(set(wanted)) == 12
    error_rates.lay_out(tmp_path, item.name, 2)
    assert [path.read_bytes() for path in sorted(controls.iterdir())] == wanted[:2], "what lay there before is gone"


def test_items_are_taken_in_order_if_they_have_controls_enough():
    names = [CAMERA, "object/trophy", CASTLE]  # of 10, 1 and 10 controls
    assert error_rates.with_controls(names, 9) == [CAMERA, CASTLE]
    assert error_rates.with_controls(names, 1) == names
    assert error_rates.with_controls(["style/benji-park"], 33) == ["style/benji-park"], "further works count too"
    assert first(names, 2) == names[:2]
    with pytest.raises(ValueError, match="4 items: there are 3"):
        first(names, 4)


def test_every_item_has_the_next_one_beside_it():
    own = settings.load()["dreambooth"]
    ring = in_a_ring(own, [CAMERA, CASTLE, "object/dog"], length=2.0)
    assert [(c.item, c.other) for c in ring] == [(CAMERA, CASTLE), (CASTLE, "object/dog"), ("object/dog", CAMERA)]
    assert {c.length for c in ring} == {2.0}
    assert in_a_ring(own, []) == []
    with pytest.raises(ValueError, match="object/camera alone has no other item"):
        in_a_ring(own, [CAMERA])


def test_the_audits_are_those_of_the_file_alone_and_say_what_each_would_say_by_itself(tiny_sd, runs, tmp_path):
    judge = tiny.save_judge("clip", tmp_path / "judge")
    change = f"sampling_steps=1 steps_per_image=1 judge={judge}"
    own = replace(settings.load("mini-sd", change)["dreambooth"], base=str(tiny_sd))
    asked = case(own=own, most=2)
    options = {"n_generated": 6, "recovery_steps": 1, "refining_steps": 0, "change": change, "scale": 2.0}
    ((mine, other),) = error_rates.ask([asked], tmp_path / "work", **options)
    assert mine.asked.checkpoint == other.asked.checkpoint == str(published(asked.model))
    assert (mine.asked.caption, mine.known.caption) == (None, "a camera")
    assert mine.images.file.tolist() == [path.name for path in datasets.load_item(CAMERA).training]
    assert other.images.file.tolist() == [path.name for path in datasets.load_item(CASTLE).training]
    assert len(mine.controls) == len(other.controls) == 2
    alone = audit.investigate(other.asked)
    pd.testing.assert_frame_equal(alone.images, other.images)
    images, sets = outcomes([asked], [(mine, other)])
    assert sets.question.tolist() == list(error_rates.QUESTIONS)
    assert sets.trained.tolist() == [3, 3, 0, 0, 0]
    assert set(sets["w'"]) == {2.0}
    pd.testing.assert_frame_equal(
        images[images.question == "half trained on"][mine.images.columns].reset_index(drop=True), mine.images
    )


# answers


def findings(n: int, m: int, seed: int) -> Findings:
    """Made up: scores of n suspects, named 0.png, 1.png, …, and of m controls."""
    draw = np.random.default_rng(seed)
    tables = [
        pd.DataFrame(
            {"file": [f"{kind}{i}.png" for i in range(count)]} | {w: draw.normal(size=count) for w in WITNESSES}
        )
        for kind, count in (("", n), ("control ", m))
    ]
    known = Leads("c", "mini-sd", "its weights", "a dog", "the model card", None, "estimated")
    nothing = np.zeros((0, 4, 4, 3), np.uint8)
    found = Findings(Audit("c"), known, 1, pd.DataFrame(), nothing, nothing, *tables)
    audit.weigh(found)
    return found


@pytest.fixture
def answered(monkeypatch) -> tuple[Case, Findings, Findings]:
    """Three of six suspects were trained on."""
    monkeypatch.setattr(Case, "trained", ["0.png", "2.png", "5.png"])
    return case(), findings(6, 9, 1), findings(4, 7, 2)


def test_the_questions_are_weighed_as_the_audit_weighs_them(answered):
    asked, own, other = answered
    found = asked_in(asked, own, other)
    others = [*other.images.file, *other.controls.file]
    wanted = {
        "half trained on": (own.images.file.tolist(), own.controls.file.tolist()),
        "half, other controls": (own.images.file.tolist(), others),
        "none trained on": (["1.png", "3.png", "4.png"], own.controls.file.tolist()),
        "none, other controls": (["1.png", "3.png", "4.png"], others),
        "another's model": (other.images.file.tolist(), other.controls.file.tolist()),
    }
    assert {q: (a.images.file.tolist(), a.controls.file.tolist()) for q, a in found.items()} == wanted
    for question, source in {"half trained on": own, "another's model": other}.items():
        pd.testing.assert_frame_equal(found[question].images, source.images)
        assert found[question].p == source.p
    ours, theirs = (
        pd.concat(parts)[list(WITNESSES)].to_numpy() for parts in ([own.images], [other.images, other.controls])
    )
    np.testing.assert_array_equal(found["half, other controls"].images.p, verdict.combined(ours, theirs))
    assert found["half, other controls"].p == verdict.of_the_set(ours, theirs)
    assert own.images.columns.tolist() == findings(6, 9, 1).images.columns.tolist(), "what was found stays as it is"


def test_one_image_among_many_controls_is_named_by_what_is_asked_of_it_alone():
    found = findings(40, 399, 3)
    clear = found.images.assign(**{name: np.where(np.arange(40) < 4, 50.0, found.images[name]) for name in WITNESSES})
    again = weighed(found, clear, found.controls)
    assert again.images.named.tolist() == [True] * 4 + [False] * 36
    assert not found.images.named.any()


def test_a_row_says_what_was_asked_and_how_right_the_answer_is(answered):
    asked, own, other = answered
    images, sets = outcomes([asked], [(own, other)])
    assert images.groupby("question", sort=False).size().tolist() == [6, 6, 3, 3, 4]
    assert images.groupby("question", sort=False).trained.sum().tolist() == [3, 3, 0, 0, 0]
    assert images.groupby("question", sort=False).m.first().tolist() == [9, 11, 9, 11, 7]
    assert sets.suspects.tolist() == [6, 6, 3, 3, 4]
    assert sets.controls.tolist() == [9, 11, 9, 11, 7]
    half = sets.iloc[0]
    assert (half.kind, half["item"], half.method, half.length) == ("object", CAMERA, "dreambooth", 1.0)
    assert half.p == own.p
    assert half.evidence == audit.evidence(own)
    trained = own.images[own.images.file.isin(asked.trained)]
    for name in WITNESSES:
        above = trained[name].to_numpy()[:, None] > own.controls[name].to_numpy()[None, :]
        assert half[f"AUC ({name})"] == pytest.approx(above.mean())
        assert half[f"p ({name})"] == verdict.of_the_set(own.images[name].to_numpy(), own.controls[name].to_numpy())
        everyone = other.images[name].to_numpy()[:, None] > other.controls[name].to_numpy()[None, :]
        assert sets[f"AUC ({name})"].iloc[4] == pytest.approx(everyone.mean())


def test_combinations_are_counted_by_the_audits_own_test_of_one_score(answered):
    asked, mine, other = answered
    cases, found = [asked, replace(asked, length=0.5)], [(mine, other), (other, mine)]
    table = error_rates.by_combination(cases, found, level=0.5)
    assert len(table) == 2 * len(COMBINATIONS)
    assert table.audits.tolist() == [1] * len(table)
    of_each = table.set_index(["length", "combination"])
    for case_, (own, others) in zip(cases, found, strict=True):
        answers = asked_in(case_, own, others)
        half = answers["half trained on"]
        trained = half.images[half.images.file.isin(case_.trained)]
        answers["all trained on"] = replace(half, images=trained)
        answers["all, few controls"] = replace(half, images=trained, controls=half.controls[: len(trained)])
        for question in (
            "half trained on",
            "all trained on",
            "all, few controls",
            "none trained on",
            "another's model",
        ):
            answer = answers[question]
            pool = pd.concat([answer.images, answer.controls])
            n, scores = len(answer.images), pool[list(WITNESSES)].to_numpy()
            ranks = sum(rankdata(scores[:, i]) for i in range(3))
            away = [(scores[:, i] - np.median(scores[:, i])) / median_abs_deviation(scores[:, i]) for i in range(3)]
            for name, out in {
                "by set and by image": scores,
                "ranks added": ranks,
                "deviations added": sum(away),
                "largest deviation": np.max(away, axis=0),
                "deviations above 0 added": sum(np.where(one > 0, one, 0) for one in away),
                f"{list(WITNESSES)[1]} alone": scores[:, 1],
            }.items():
                expected = int(verdict.of_the_set(out[:n], out[n:]) <= 0.5)
                assert of_each.loc[(case_.length, name), question] == expected, (name, question)


def test_rates_are_shares_of_the_audits_that_can_reach_the_level():
    sets = pd.DataFrame(
        {
            "question": ["a"] * 5 + ["b"],
            "suspects": [3, 3, 3, 3, 2, 1],
            "controls": [
                9,
                9,
                9,
                9,
                10,
                9,
            ],  # of 12 images three can be chosen in 220 ways, two of 12 in 66, one of ten in 10
            "p": [0.01, 0.03, 0.05, 0.2, 0.02, 1.0],
        }
    )
    found = rates(sets, ["question"]).set_index("question")
    assert found.loc["a", ["audits", "p <= 0.01 able", "p <= 0.05 able"]].tolist() == [5, 4, 5]
    assert found.loc["a", ["p <= 0.01", "p <= 0.05"]].tolist() == [0.25, 0.8]
    assert found.loc["a", ["p <= 0.01 95%", "p <= 0.05 95%"]].tolist() == [interval(1, 4), interval(4, 5)]
    assert found.loc["b", ["audits", "p <= 0.05 able", "p <= 0.05 95%"]].tolist() == [1, 0, ""]
    assert np.isnan(found.loc["b", "p <= 0.05"])


def test_audits_are_counted_by_each_witness():
    sets = pd.DataFrame({"of": ["a", "a", "b"], "p": [0.05, 0.06, 0.5]} | {f"p ({name})": 1.0 for name in WITNESSES})
    sets["p (loss)"] = [0.01, 0.02, 0.05]
    found = error_rates.by_witness(sets, ["of"]).set_index("of")
    assert found.columns.tolist() == ["audits", "together", *WITNESSES]
    assert found.loc["a"].tolist() == [2, 1, 2, 0, 0]
    assert found.loc["b"].tolist() == [1, 0, 1, 0, 0]


@pytest.mark.parametrize(("suspects", "controls"), [(1, 9), (2, 10), (3, 4)])
def test_no_set_has_a_lower_p_value_than_the_lowest(suspects, controls):
    ours, theirs = np.full((suspects, 1), 5.0) + np.arange(suspects)[:, None], np.arange(controls)[:, None] / controls
    assert verdict.of_the_set(ours, theirs) == pytest.approx(error_rates.lowest(suspects, controls))


@pytest.mark.parametrize(("count", "n"), [(0, 10), (3, 7), (10, 10)])
def test_the_interval_is_wilsons(count, n):
    z, p = 1.959963984540054, count / n
    middle, half = p + z**2 / (2 * n), z * sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = ((middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n))
    assert interval(count, n) == f"{abs(low):.2f}..{high:.2f}"


def test_single_images_count_only_where_their_p_can_be_so_low():
    columns = {f"p ({name})": 0.5 for name in WITNESSES}
    images = pd.DataFrame({"of": ["a", "a", "b", "b"], "m": [19, 19, 18, 99], "p": [0.05, 0.1, 0.01, 0.2]} | columns)
    images.loc[0, "p (loss)"] = 0.05
    found = single_images(images, ["of"]).set_index("of")
    assert found.suspects.tolist() == [2, 1], "18 controls cannot give .05"
    assert found.together.tolist() == [0.5, 0.0]
    assert found.loss.tolist() == [0.5, 0.0]
    assert found.recovery.tolist() == [0.0, 0.0]
    assert single_images(images, ["of"], level=0.1).set_index("of").together.tolist() == [1.0, 0.5]


def test_calibration_is_the_share_of_p_values_up_to_each_level():
    p = np.arange(1, 11) / 10  # what ranks among nine controls would be
    np.testing.assert_allclose(calibration(p, np.array([0.05, 0.1, 0.55, 1.0])), [0, 0.1, 0.5, 1])
