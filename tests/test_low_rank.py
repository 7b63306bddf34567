"""A difference cut to a low rank is the best there is, loads as a LoRA, and says what it keeps."""

import copy
import json

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from fx import results
from fx.families import network
from fx.finetune import FineTune, TrainingItem
from fx.low_rank import LowRank, strongest
from fx.models import load_pair, load_pipeline
from fx.tuned import load_tuned


@pytest.fixture
def model(picture_folder, tmp_path, runs) -> FineTune:
    base = tmp_path / "base"
    tiny.save("sd1", base)
    return FineTune((TrainingItem(str(picture_folder), "a dog"),), str(base), learning_rate=1e-2, steps_per_image=2)


def networks() -> tuple[nn.Module, nn.Module]:
    """Two of a linear layer, a convolution, a norm and a layer that stays."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5), nn.Conv2d(3, 4, 3), nn.LayerNorm(5), nn.Linear(4, 4))
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for layer in tuned[:3]:
            for weight in layer.parameters():
                weight += torch.randn_like(weight)
    return base, tuned


@pytest.mark.parametrize("rank", [1, 3, 100])
def test_each_layer_has_its_best_approximation_of_that_rank(rank):
    base, tuned = networks()
    found, kept = strongest(base, tuned, rank)
    assert {name.rpartition(".lora_")[0] for name in found} == {"0", "1"}
    inside = 0.0
    for name in ("0", "1"):
        down, up = found[f"{name}.lora_A.weight"], found[f"{name}.lora_B.weight"]
        difference = (tuned.get_submodule(name).weight - base.get_submodule(name).weight).detach()
        assert down.shape[1:] == difference.shape[1:]
        product = (up.flatten(1) @ down.flatten(1)).numpy()
        left, sizes, right = np.linalg.svd(difference.flatten(1).numpy(), full_matrices=False)
        r = min(rank, len(sizes))
        np.testing.assert_allclose(product, (left[:, :r] * sizes[:r]) @ right[:r], atol=1e-5)
        inside += (sizes[:r] ** 2).sum()
    total = sum(((b - a) ** 2).sum().item() for a, b in zip(base.parameters(), tuned.parameters(), strict=True))
    assert kept == pytest.approx(inside / total, rel=1e-5)


def test_networks_that_are_equal_give_nothing():
    base, _ = networks()
    assert strongest(base, base, 2) == ({}, 0.0)


def test_the_step_is_a_lora_of_one_network_and_at_full_rank_all_but_biases_and_norms(model):
    x, t = torch.randn(2, 4, 4, 4), torch.tensor(300)
    whole, base = load_tuned(model), load_pipeline(model.base)

    def predict(pair):
        with torch.no_grad():
            return pair.predict("tuned", x, t, pair.condition("tuned", "a dog"))

    full = load_pair(model.base, results.complete(LowRank(model, 10_000)))
    assert full.one_network
    with torch.no_grad():  # the matrices of theta', everything else of theta
        for name, layer in network(base).named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.weight.copy_(network(whole.tuned).get_submodule(name).weight)
    expected = load_pair(model.base, results.complete(model))
    expected.tuned = base
    assert torch.allclose(predict(full), predict(expected), atol=1e-4)
    kept = [
        json.loads((results.complete(LowRank(model, r)) / "scores.json").read_text())["kept"] for r in (1, 4, 10_000)
    ]
    assert 0 < kept[0] < kept[1] < kept[2] <= 1
    errors = [
        float((predict(load_pair(model.base, results.complete(LowRank(model, r)))) - predict(full)).norm())
        for r in (1, 8)
    ]
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    ("changes", "rank", "message"),
    [
        ({"method": "lora", "rank": 2, "alpha": 2}, 2, "DreamBooth fine-tunings of the network alone"),
        ({"text_encoder": True}, 2, "of the network alone"),
        ({}, 0, "rank 0 must be at least 1"),
    ],
)
def test_what_cannot_be_cut_is_refused(changes, rank, message):
    with pytest.raises(ValueError, match=message):
        LowRank(FineTune((TrainingItem("style/mimooh"),), **changes), rank)
