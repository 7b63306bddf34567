"""Published forms: each loads as a download and predicts what was trained, and says what it is asked to say."""

import json
from dataclasses import replace

import pytest
import tiny
import torch
from safetensors import safe_open

from fx import checkpoints, results
from fx.families import encode
from fx.finetune import FineTune, TrainingItem
from fx.inspect import inspect
from fx.models import load_pair
from fx.publishing import FORMS, Published, published
from fx.tuned import load_tuned

CASES = [("dreambooth", form, {}) for form in FORMS["dreambooth"]]
CASES += [("dreambooth", form, {"text_encoder": True}) for form in ("parts", "pipeline", "fp16")]
CASES += [("lora", form, {}) for form in FORMS["lora"]]
CASES += [("lora", form, {"text_encoder": True}) for form in FORMS["lora"]]
CASES += [("lora", form, {"adapter": "dora"}) for form in FORMS["lora"]]
CASES += [("lora", "kohya", {"adapter": "loha", "text_encoder": True})]


@pytest.fixture
def made(picture_folder, tmp_path, runs):
    """A function that gives a short fine-tuning of a tiny model of a family."""

    def make(method: str, family: str = "sd1", **options) -> FineTune:
        base = tmp_path / family
        if not base.exists():
            tiny.save(family, base)
        fields = {"base": str(base), "method": method, "learning_rate": 2e-2, "steps_per_image": 3, "batch_size": 2}
        fields |= {"rank": 2, "alpha": 6} if method == "lora" else {}
        return FineTune((TrainingItem(str(picture_folder), "a sks dog"),), **fields | options)

    return make


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize(("method", "form", "options"), CASES, ids=[f"{m} {f} {list(o)}" for m, f, o in CASES])
def test_every_form_loads_as_a_download_and_predicts_what_was_trained(made, method, form, options, family):
    model = made(method, family, **options)
    x, t = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor(300)
    pairs = load_tuned(model), load_pair(model.base, published(Published(model, form)))
    with torch.no_grad():
        found = [pair.predict("tuned", x, t, pair.condition("tuned", "a sks dog")) for pair in pairs]
        base = pairs[1].predict("base", x, t, encode(pairs[1].base, "a sks dog"))
    half = form in ("fp16", "single file")
    assert torch.allclose(*found, atol=2e-2 if half else 1e-4)
    assert (found[1] - base).abs().max() > 10 * (found[0] - found[1]).abs().max()


@pytest.mark.parametrize(
    ("method", "form"), [("dreambooth", "parts"), ("dreambooth", "fp16"), ("lora", "diffusers"), ("lora", "peft")]
)
def test_a_model_card_tells_base_and_caption_if_it_is_to(made, method, form):
    model = made(method)
    told, silent = (inspect(str(published(Published(model, form, says)))) for says in (True, False))
    assert ("a sks dog", "the model card") in told.leads
    assert model.base in told.base_names
    assert not silent.leads
    assert (published(Published(model, form)) / "README.md").exists() is False


def test_kohyas_header_tells_base_caption_and_number_of_images_if_it_is_to(made):
    model = made("lora")
    told, silent = (published(Published(model, "kohya", says)) for says in (True, False))
    found = checkpoints.metadata(told)
    assert (found.base, found.images, found.images_with_repeats) == (model.base, 4, 40)
    assert ("a sks dog", "a folder of training images") in inspect(str(told)).leads
    assert checkpoints.metadata(silent) == checkpoints.Metadata()
    content = told.read_bytes()
    entries = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    assert list(entries) == sorted(entries), "in any other order the same model would be another file"
    with safe_open(told, "pt") as one, safe_open(silent, "pt") as other:
        assert set(one.keys()) == set(other.keys())
        assert all(name.startswith("lora_unet_") for name in one.keys())  # noqa: SIM118 - it is no dictionary


def test_the_kinds_of_published_files_are_what_they_are_called(made):
    kinds = {"parts": "parts", "pipeline": "pipeline", "fp16": "pipeline", "single file": "single file"}
    kinds |= {"diffusers": "lora", "kohya": "lora", "peft": "peft"}
    for method, forms in FORMS.items():
        for form in forms:
            assert checkpoints.kind_of(published(Published(made(method), form))) == kinds[form]
    half = checkpoints.dtypes(published(Published(made("dreambooth"), "fp16")) / "unet")
    assert set(half.values()) == {"F16"}


def test_what_is_published_follows_the_model_the_form_and_what_it_says(made):
    model = made("lora")
    specs = [Published(model, "kohya"), Published(model, "kohya", True), Published(model, "peft")]
    assert (
        len({results.digest(spec) for spec in specs} | {results.digest(Published(made("lora", seed=1), "peft"))}) == 4
    )


def test_a_published_pipeline_is_a_base_that_models_made_on_it_name(made):
    base = published(Published(made("dreambooth"), "pipeline", name="sd-animals"))
    assert base.name == "sd-animals"
    own = replace(made("lora"), base=str(base))
    assert checkpoints.metadata(published(Published(own, "kohya", True))).base == str(base)
    assert published(Published(own, "kohya", name="a_dog.v2")).name == "a_dog.v2.safetensors"
    for name in ("", "..", "a/b", "a b"):
        with pytest.raises(ValueError, match="must be of letters, digits, points, dashes and underscores"):
            Published(own, "kohya", name=name)


def test_a_single_file_that_is_to_say_something_is_refused(made):
    with pytest.raises(ValueError, match="a single file brings no model card along"):
        Published(made("dreambooth"), "single file", says=True)


@pytest.mark.parametrize(
    ("method", "options", "form", "message"),
    [
        ("lora", {}, "pipeline", "unknown form 'pipeline' of a lora fine-tuning: choose from diffusers, kohya, peft"),
        ("dreambooth", {}, "kohya", "unknown form 'kohya' of a dreambooth fine-tuning: choose from parts, pipeline"),
        ("dreambooth", {"text_encoder": True}, "single file", "publish a trained text encoder as parts"),
        ("lora", {"adapter": "loha"}, "peft", "a LoHa has no layout of the form peft: publish it as kohya"),
    ],
)
def test_impossible_forms_are_refused(made, method, options, form, message):
    with pytest.raises(ValueError, match=message):
        Published(made(method, **options), form)
