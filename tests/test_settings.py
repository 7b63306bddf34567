"""fx.settings: the file's numbers arrive in the specs, and nowhere else are they written down."""

import json
import re
from dataclasses import asdict, fields, replace

import pytest
import yaml

from fx import refine, results, sampling, settings
from fx.datasets import load_item
from fx.evaluation import Quality, Reference, Score
from fx.extraction import Extract
from fx.finetune import METHODS, FineTune, TrainingItem
from fx.paths import NOTEBOOKS, ROOT
from fx.sampling import Generate
from fx.settings import Settings
from fx.tuned import Checkpoint

FILE = yaml.safe_load((ROOT / "fx/settings.yaml").read_text())
ITEM = TrainingItem("style/mimooh")

# no value is a default of a spec, none stands twice: a setting that is lost or exchanged shows
ODD = Settings(
    method="lora",
    base="a-base",
    descriptor="a-descriptor",
    judge="a-judge",
    images_per_training=7,
    sampling_steps=11,
    sampler="dpm++",
    precision="bfloat16",
    steps_per_image=13,
    batch_size=17,
    training_precision="float16",
    learning_rate=0.019,
    cfg_scale=2.3,
    finextract_scale=2.9,
    correction_scale=-0.031,
    rank=37,
    alpha=41,
    seed=43,
    fidelity_judge="another-judge",
    preset="published",
    rule="tightest",
)
USUAL = {"fidelity_judge": "", "preset": "sscd", "rule": "paper"}


# the file


@pytest.mark.parametrize("section", FILE)
def test_a_section_is_read_as_it_stands(section):
    chosen = settings.load(section)
    content = FILE[section]
    assert list(chosen) == [method for method in METHODS if method in content]
    common = {name: value for name, value in content.items() if name not in (*METHODS, "sets")}
    for method, found in chosen.items():
        expected = {"rank": 0, "alpha": 0, "seed": 0} | USUAL | common | content[method] | {"method": method}
        assert asdict(found) == expected
        for field in fields(Settings):
            assert type(getattr(found, field.name)) is field.type, field.name


def test_the_default_section_has_both_methods():
    assert settings.load() == settings.load("mini-sd")
    assert list(settings.load()) == ["dreambooth", "lora"]


def test_changes_are_for_one_method_or_for_all():
    plain = settings.load("mini-sd")
    changed = settings.load("mini-sd", "sampling_steps=11 lora.rank=16 dreambooth.learning_rate=0.5 base='a b'")
    common = {"sampling_steps": 11, "base": "a b"}
    assert changed["lora"] == replace(plain["lora"], rank=16, **common)
    assert changed["dreambooth"] == replace(plain["dreambooth"], learning_rate=0.5, **common)
    assert settings.load("mini-sd", "seed=1 seed=2")["lora"].seed == 2
    assert settings.load("mini-sd", "  ") == plain
    assert settings.load("mini-sd", "cfg_scale=4")["lora"].cfg_scale == 4.0
    assert type(settings.load("mini-sd", "cfg_scale=4")["lora"].cfg_scale) is float
    assert settings.load("mini-sd") == plain, "a change is for one call"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sd", "", "no settings 'sd': fx/settings.yaml has mini-sd"),
        ("mini-sd", "steps=10", "unknown setting 'steps': choose from base, descriptor, judge, images_per_training, "),
        ("mini-sd", "lora.steps=10", "unknown setting 'steps'"),
        ("mini-sd", "method=lora", "unknown setting 'method'"),
        (
            "mini-sd",
            "full.rank=10",
            r"'full\.rank=10' in change is not setting=value or method\.setting=value, method: ",
        ),
        ("mini-sd", "rank", "'rank' in change is not setting=value"),
        ("mini-sd", ".rank=3", "in change is not|unknown|method"),
        ("mini-sd", "rank=3.5", "the setting rank takes int values, not '3.5'"),
        ("mini-sd", "rank=", "the setting rank takes int values, not ''"),
        ("mini-sd", "learning_rate=fast", "the setting learning_rate takes float values, not 'fast'"),
    ],
)
def test_what_is_wrong_in_a_change_is_named(name, change, message):
    with pytest.raises(ValueError, match=message):
        settings.load(name, change)


# the specs


def test_fine_tune_has_every_setting_of_training():
    expected = FineTune(
        (ITEM, TrainingItem("folder", "a dog")), "a-base", "lora", 0.019, 13, 17, 37, 41, "none", "float16", 43
    )
    assert ODD.fine_tune("style/mimooh", TrainingItem("folder", "a dog")) == expected
    assert ODD.fine_tune(ITEM, transform="cutout", seed=2).transform == "cutout"
    assert ODD.fine_tune(ITEM, seed=2) == replace(expected, training=(ITEM,), seed=2)


def test_generate_has_every_setting_of_sampling():
    model = Checkpoint("theirs", "a-base")
    expected = Generate(model, "finextract", 2.9, -0.031, 5, None, 11, "dpm++", "bfloat16", 43)
    assert ODD.generate(model, "finextract", 5) == expected
    assert ODD.generate(model, "finextract", 5, caption="", seed=1) == replace(expected, caption="", seed=1)


@pytest.mark.parametrize(
    ("arm", "w", "k"),
    [
        ("direct", 1.0, 0.0),
        ("cfg", 2.3, 0.0),
        ("finextract", 2.9, -0.031),
        ("conditional_only", 2.9, 0.0),
        ("model_guidance", 2.9, 0.0),
    ],
)
def test_every_arm_has_its_own_scales(arm, w, k):
    assert ODD.guidance(arm) == (w, k)
    generate = ODD.generate(Checkpoint("theirs"), arm, 5)
    assert (generate.guidance_scale, generate.correction_scale) == (w, k)


def test_score_extracts_as_many_images_as_were_learned_from_n_over_n0_times_as_many():
    model = ODD.fine_tune(TrainingItem("style/mimooh", first=3), TrainingItem("object/rooster", first=2))
    generate = Generate(model, "cfg", 2.3, 0.0, 35, None, 11, "dpm++", "bfloat16", 43)
    own = {"descriptor": "a-descriptor", "preset": "published", "rule": "tightest"}
    assert ODD.score(model, "cfg") == Score(Extract(generate, 5, **own), judge="a-judge")
    chosen = ODD.score(model, "cfg", n_training=4, n_generated=9, rule="peaks", sampler="ddim")
    extract = Extract(replace(generate, n_generated=9, sampler="ddim"), 4, **own | {"rule": "peaks"})
    assert chosen == Score(extract, judge="a-judge")
    named = (TrainingItem("style/mimooh", first=2),)
    theirs = ODD.score(Checkpoint("theirs"), "cfg", training=named)
    assert (theirs.training, theirs.extract.n_training, theirs.extract.generate.n_generated) == (named, 2, 14)
    assert ODD.score(model, "cfg", n_training=4).extract.generate.n_generated == 28


def test_three_arms_share_everything_but_the_guidance():
    model = ODD.fine_tune(TrainingItem("style/mimooh", first=3))
    specs = ODD.three_arms(model, n_generated=20)
    assert specs == [ODD.score(model, arm, n_generated=20) for arm in ("direct", "cfg", "finextract")]
    same = [
        replace(s.extract, generate=replace(s.extract.generate, arm="direct", guidance_scale=1.0, correction_scale=0.0))
        for s in specs
    ]
    assert same[0] == same[1] == same[2] == specs[0].extract


@pytest.mark.parametrize(
    ("evaluations", "share", "number", "steps"),
    [(500, 0.6, 10, 50), (400, 0.6, 8, 40), (100, 0.5, 2, 8), (505, 0.6, 10, 50)],
)
def test_a_refined_extraction_takes_no_more_than_it_may(evaluations, share, number, steps):
    """Ten sampling steps of two predictions are 20 evaluations, a step of refining 6."""
    own = settings.load("mini-sd", "sampling_steps=10")["lora"]
    model = own.fine_tune("style/mimooh")
    score = own.refined(model, evaluations, share)
    extract = score.extract
    assert extract.n_training == 10
    assert extract.generate == own.generate(model, "finextract", 10 * number)
    assert extract.refine == refine.contrast(evaluations, share) == refine.Contrastive(steps=steps)
    spent = sampling.evaluations(extract.generate) + refine.evaluations(extract.refine, extract.generate, 10)
    assert 10 * (evaluations - 20) < spent <= 10 * evaluations
    assert replace(score, extract=replace(extract, refine=None)) == own.score(
        model, "finextract", n_generated=10 * number
    )
    some = own.refined(model, evaluations, share, n_training=3).extract
    assert (some.n_training, some.generate.n_generated) == (3, 3 * number)


def test_a_refined_extraction_needs_a_step_and_an_image():
    own = settings.load("mini-sd", "sampling_steps=10")["lora"]
    model = own.fine_tune("style/mimooh")
    with pytest.raises(ValueError, match=r"share 1.0 of the evaluations that refine must lie between 0 and 1"):
        own.refined(model, share=1.0)
    with pytest.raises(ValueError, match=r"0.1 of 59 evaluations is no step of refining: take 60 or more"):
        own.refined(model, 59, 0.1)
    assert own.refined(model, 60, 0.1).extract.refine.steps == 1
    with pytest.raises(ValueError, match="43 evaluations less 24 that refine do not generate an image, which takes 20"):
        own.refined(model, 43)
    assert own.refined(model, 44).extract.generate.n_generated == 10


def test_an_extraction_may_be_of_an_unknown_number_and_by_another_rule():
    generate = ODD.generate(Checkpoint("theirs"), "cfg", 9)
    expected = Extract(generate, None, "a-descriptor", "published", "tightest")
    assert ODD.extract(generate, None) == expected
    assert ODD.extract(generate, 3, phi=0.5) == replace(expected, n_training=3, phi=0.5)


def test_quality_is_judged_by_the_chosen_judges_and_their_columns_say_so():
    generate = ODD.generate(Checkpoint("theirs"), "cfg", 5)
    assert ODD.quality(generate) == Quality(generate, (), "a-judge", "another-judge")
    assert replace(ODD, fidelity_judge="").quality(generate) == Quality(generate, (), "a-judge", "a-judge")
    assert (ODD.iqa_column, ODD.fidelity_column) == ("CLIP-IQA (a-judge)", "fidelity (another-judge)")
    assert (ODD.second_as, replace(ODD, fidelity_judge="").fidelity_column) == ("AS (a-judge)", "fidelity (a-judge)")
    assert ODD.quality(generate, (ITEM,)).training == (ITEM,)


def test_every_setting_reaches_a_spec():
    """Changed alone, each changes what is done; so the file holds none that is without effect."""
    model = ODD.fine_tune(TrainingItem("style/mimooh", first=3))

    def everything(chosen: Settings):
        tuned = chosen.fine_tune(TrainingItem("style/mimooh", first=3))
        return [*chosen.three_arms(tuned), chosen.quality(chosen.generate(tuned, "cfg", 3))]

    assert everything(ODD)[0].extract.generate.model == model
    other = {"sampler": "ddim", "precision": "float32", "training_precision": "float32"}
    other |= {"preset": "sscd", "rule": "peaks"}
    for field in fields(Settings):
        if field.name != "method":
            value = getattr(ODD, field.name)
            changed = other.get(field.name, value * 2 if field.type is not str else f"{value}-2")
            assert everything(replace(ODD, **{field.name: changed})) != everything(ODD), field.name
    plain = replace(ODD, method="dreambooth", rank=0, alpha=0)
    assert plain.fine_tune(ITEM).method == "dreambooth"


def test_the_shipped_settings_give_specs_that_can_be_addressed():
    for chosen in settings.load().values():
        for spec in chosen.three_arms(chosen.fine_tune("style/mimooh")):
            assert len(results.digest(spec)) == 16


def test_a_table_of_settings_leaves_out_what_is_usual_in_all_of_them():
    shown = settings.table(settings.load())
    assert list(shown.columns) == ["dreambooth", "lora"]
    assert shown.index.tolist() == [field.name for field in fields(Settings) if field.name not in USUAL]
    odd = settings.table({"one": replace(ODD, rule="paper"), "other": ODD})
    assert odd.loc["rule"].tolist() == ["paper", "tightest"]
    assert {"fidelity_judge", "preset"} <= set(odd.index)


# nowhere else


def written_numbers(text: str) -> set[float]:
    """The numbers in a text that are written with an exponent or as 0.000..."""
    return {float(number) for number in re.findall(r"\b\d+(?:\.\d+)?[eE]-\d+\b|\b0\.000\d+\b", text)}


def chosen_rates() -> set[float]:
    return {section[method]["learning_rate"] for section in FILE.values() for method in METHODS if method in section}


def test_the_chosen_learning_rates_stand_in_no_other_module():
    """But for the default of FineTune, which holds without any settings."""
    assert written_numbers("a 1.0e-5 b 2.5E-4, 0.00025; 3e4 0.5 1.5") == {1e-5, 2.5e-4}
    found = {}
    for path in sorted((ROOT / "fx").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if path.name == "finetune.py":
            text = text.replace("    learning_rate: float = 1.0e-5\n", "")
        rates = "\n".join(line for line in text.splitlines() if re.search(r"rate|\blr\b", line))  # not tolerances
        if repeated := written_numbers(rates) & chosen_rates():
            found[path.name] = repeated
    assert found == {}


PARAMETERS = {
    path.name: "".join(
        "".join(cell["source"])
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if "parameters" in cell["metadata"].get("tags", [])
    )
    for path in sorted(NOTEBOOKS.glob("*.ipynb"))
}


def test_no_notebook_with_a_parameter_change_repeats_a_chosen_number():
    on_settings = {name: cell for name, cell in PARAMETERS.items() if re.search(r"^change = ", cell, re.MULTILINE)}
    repeated = {name: written_numbers(cell) & chosen_rates() for name, cell in on_settings.items()}
    assert not any(repeated.values()), repeated


def test_references_are_the_round_trip_and_the_controls_where_there_are_any():
    found = ODD.references("style/mimooh", TrainingItem("object/rooster", first=2))
    items = (TrainingItem("style/mimooh"), TrainingItem("object/rooster", first=2))
    assert list(found) == ["controls", "round trip"]
    for of, spec in found.items():
        assert spec == Reference(of, items, ODD.base, "a-descriptor", "published", judge="a-judge")
    assert not load_item("style/jonathan-dietrich").controls
    assert list(ODD.references("style/jonathan-dietrich")) == ["round trip"]
