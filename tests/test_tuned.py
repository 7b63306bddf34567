"""theta' moved beyond itself in the weights: closed forms, and adapters as well as whole networks."""

import gc
import shutil
import weakref
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig

from fx import models, results, sampling
from fx import tuned as tuned_module
from fx.families import network, text_encoders
from fx.finetune import FineTune, TrainingItem
from fx.models import ModelPair, acting_weight, load_pair, load_pipeline
from fx.sampling import Generate, generated_pictures
from fx.tuned import Checkpoint, Extrapolated, extrapolate, kept_pair, load_tuned

KINDS = {
    "dreambooth": {},
    "text encoder": {"text_encoder": True},
    "lora": {"method": "lora", "rank": 2, "alpha": 4},
    "lora of both": {"method": "lora", "rank": 2, "alpha": 2, "text_encoder": True},
    "loha": {"method": "lora", "adapter": "loha", "rank": 2, "alpha": 2},
    "dora": {"method": "lora", "adapter": "dora", "rank": 2, "alpha": 2},
}


def tuned(base: str, folder, kind: str) -> FineTune:
    fields = {"learning_rate": 1e-2, "steps_per_image": 3, "batch_size": 2} | KINDS[kind]
    return FineTune((TrainingItem(str(folder), "a dog"),), base, **fields)


def weights(pair) -> dict[str, torch.Tensor]:
    """What every linear layer of theta' multiplies by, and every number of it that no adapter is on."""
    found = {}
    for part in (network(pair.tuned), *text_encoders(pair.tuned)):
        for name, layer in part.named_modules():
            inner = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
            inside = any(word in name for word in (".base_layer", "lora", "hada"))
            if isinstance(inner, torch.nn.Linear) and not inside:
                found[f"{type(part).__name__} {name}"] = acting_weight(layer)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_moves_along_the_line_through_both_models(tiny_sd, picture_folder, runs, kind):
    model = tuned(str(tiny_sd), picture_folder, kind)
    untouched = Checkpoint(str(tiny_sd), str(tiny_sd))
    base, once, further = (weights(load_tuned(m)) for m in (untouched, model, Extrapolated(model, 2.5)))
    assert base.keys() == once.keys() == further.keys()
    assert any(not torch.allclose(base[name], once[name]) for name in base)
    for name, start in base.items():
        assert torch.allclose(further[name], start + 2.5 * (once[name] - start), atol=1e-5), name


@pytest.mark.parametrize("kind", ["dreambooth", "lora"])
def test_at_the_ends_it_is_theta_and_theta_prime(tiny_sd, picture_folder, runs, kind):
    model = tuned(str(tiny_sd), picture_folder, kind)
    x, t = torch.randn(2, 4, 4, 4), torch.tensor(400)

    def predicted(pair, which="tuned"):
        with torch.no_grad():
            return pair.predict(which, x, t, pair.condition(which, "a dog"))

    plain = load_tuned(model)
    assert torch.allclose(predicted(load_tuned(Extrapolated(model, 1.0))), predicted(plain), atol=1e-6)
    assert torch.allclose(predicted(load_tuned(Extrapolated(model, 0.0))), predicted(plain, "base"), atol=1e-6)
    assert torch.allclose(predicted(load_tuned(Extrapolated(model, 3.0)), "base"), predicted(plain, "base"), atol=1e-6)


def test_near_theta_prime_it_is_guidance_of_the_predictions(tiny_sd, picture_folder, runs):
    """To first order in what fine-tuning changed, which is small here: App. H's arm with w' = scale."""
    model = replace(tuned(str(tiny_sd), picture_folder, "dreambooth"), learning_rate=1e-6)
    pair, x, t = load_tuned(model), torch.randn(2, 4, 4, 4), torch.tensor(400)
    with torch.no_grad():
        base, once = (pair.predict(m, x, t, pair.condition(m, "a dog")) for m in ("base", "tuned"))
        other = load_tuned(Extrapolated(model, 3.0))
        further = other.predict("tuned", x, t, other.condition("tuned", "a dog"))
    guided = base + 3 * (once - base)
    assert (further - guided).norm() < 0.05 * (guided - once).norm()


def test_another_scale_is_another_step_and_the_fine_tuning_the_same(tiny_sd, picture_folder, runs):
    model = tuned(str(tiny_sd), picture_folder, "dreambooth")
    specs = [Generate(Extrapolated(model, a), "direct", 1.0, n_generated=2, steps=2) for a in (1.5, 3.0)]
    rows = results.run(specs)
    assert list(rows["scale"]) == [1.5, 3.0]
    assert len({results.digest(spec) for spec in specs}) == 2
    assert len(list(runs.glob("finetune/*"))) == 1


def test_an_adapter_whose_change_does_not_grow_with_its_scaling_is_refused(tiny_sd):
    base = load_pipeline(str(tiny_sd))
    base.unet.add_adapter(
        LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], use_dora=True, init_lora_weights=False)
    )
    with pytest.raises(ValueError, match="a DoRA cannot be extrapolated"):
        extrapolate(ModelPair(base, base), 2.0)


def test_text_encoders_of_another_kind_are_refused(tmp_path):
    for name in ("one", "other"):
        tiny.save("sd1", tmp_path / name)
    pair = load_pair(str(tmp_path / "one"), tmp_path / "other")
    pair.tuned.text_encoder = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Linear has other weights than the base model's"):
        extrapolate(pair, 2.0)


def test_a_scale_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="must be finite, not nan"):
        Extrapolated(Checkpoint("theirs"), float("nan"))


def test_a_pair_is_kept_until_something_else_is_loaded(tiny_sd, picture_folder, runs, monkeypatch):
    loaded = []
    load = tuned_module.load_tuned
    monkeypatch.setattr(tuned_module, "load_tuned", lambda *asked: loaded.append(asked) or load(*asked))
    one, other = (tuned(str(tiny_sd), picture_folder, kind) for kind in ("dreambooth", "lora"))
    first = kept_pair(one)
    assert kept_pair(one) is first
    assert len(loaded) == 1
    afresh = weights(load(one))
    assert all(torch.equal(value, afresh[name]) for name, value in weights(first).items())
    assert not models.KEPT, "loading it otherwise has let it go"
    again = kept_pair(one)
    assert again is not first
    assert kept_pair(replace(one)) is again, "by what it is, not by the object"
    gone = weakref.ref(network(again.tuned))
    del again, first
    second = kept_pair(other)
    gc.collect()
    assert gone() is None, "there are never two"
    assert kept_pair(other, torch.bfloat16) is not second
    assert network(kept_pair(other, torch.bfloat16).tuned).dtype == torch.bfloat16
    load_pipeline(str(tiny_sd))
    assert not models.KEPT


def test_the_arms_of_a_model_load_it_once_and_fine_tuning_lets_it_go(tiny_sd, picture_folder, runs, monkeypatch):
    loads = []
    monkeypatch.setattr(tuned_module, "load_pair", lambda *asked: loads.append(asked) or load_pair(*asked))
    one = tuned(str(tiny_sd), picture_folder, "dreambooth")
    for arm, w in (("direct", 1.0), ("finextract", 2.0), ("finextract", 3.0)):
        results.complete(Generate(one, arm, w, n_generated=2, steps=2))
    assert len(loads) == 1
    drawn = generated_pictures(asked := Generate(one, "finextract", 3.0, n_generated=2, steps=2))
    results.complete(replace(one, seed=1))
    assert not models.KEPT
    shutil.rmtree(results.folder(asked))
    assert np.array_equal(generated_pictures(asked), drawn), "after other arms and alone"
    assert len(loads) == 2


def test_nothing_is_kept_when_a_run_has_ended_well_or_not(tiny_sd, picture_folder, runs, monkeypatch):
    one = Generate(tuned(str(tiny_sd), picture_folder, "dreambooth"), "finextract", 2.0, n_generated=2, steps=2)
    results.run([one])
    assert not models.KEPT
    results.complete(other := replace(one, seed=1))
    assert models.KEPT
    monkeypatch.setattr(sampling, "save_picture", lambda *_: 1 / 0)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        results.run([replace(other, seed=2)])
    assert not models.KEPT
