"""Guidance: the printed equations, their limits and what they do to affine maps."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fx import guidance

predictions = hnp.arrays(np.float64, (2, 3, 2, 2), elements=st.floats(-10, 10)).map(torch.from_numpy)
scales = st.floats(-5, 20)
BOTH = (guidance.model_guidance, guidance.finextract)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-9, atol=1e-8)


@settings(max_examples=40)
@given(predictions, predictions, scales)
def test_eq_6_as_printed(base, tuned, w):
    assert close(guidance.model_guidance(base, tuned, w), tuned + (w - 1) * (tuned - base))


@settings(max_examples=40)
@given(predictions, predictions, scales)
def test_eq_8_is_eq_6_within_one_model_and_the_formula_of_diffusers(unconditional, conditional, w):
    found = guidance.model_guidance(unconditional, conditional, w)
    assert close(found, unconditional + w * (conditional - unconditional))  # StableDiffusionPipeline.__call__


@settings(max_examples=40)
@given(predictions, predictions, scales, st.floats(-2, 2))
def test_eq_13_as_printed(base, tuned, w, k):
    assert close(guidance.finextract(base, tuned, w, k), tuned + (w - 1) * (tuned - base) + k * base)


@settings(max_examples=40)
@given(predictions, predictions, st.floats(0.1, 1), st.floats(0.1, 1))
def test_eq_13_solves_eq_12(base, searched, weight, conditional_weight):
    """eps_theta'(c) mixed by Eq. 12 gives eps_q(c) back, for w' = 1 / lambda' and k = (w' - 1) / w."""
    tuned = (1 - weight) * (1 - conditional_weight) * base + conditional_weight * searched
    w, w_caption = 1 / weight, 1 / conditional_weight
    assert close(guidance.finextract(base, tuned, w_caption, k=(w_caption - 1) / w), searched)


@settings(max_examples=40)
@given(predictions, predictions)
def test_scale_1_is_the_second_prediction_and_scale_0_the_first(first, second):
    for combine in BOTH:
        assert close(combine(first, second, 1.0), second)
        assert close(combine(first, second, 0.0), first)


@settings(max_examples=40)
@given(predictions, scales)
def test_equal_predictions_are_left_alone_at_every_scale(prediction, w):
    for combine in BOTH:
        assert torch.equal(combine(prediction, prediction, w), prediction)


@settings(max_examples=40)
@given(predictions, predictions, scales, st.floats(-3, 3), st.floats(-3, 3))
def test_affine_maps_commute_with_guidance_but_for_the_correction_term(first, second, w, slope, shift):
    def mapped(x):
        return slope * x + shift

    for combine in BOTH:
        assert close(combine(mapped(first), mapped(second), w), mapped(combine(first, second, w)))
    k = -0.02
    corrected = guidance.finextract(mapped(first), mapped(second), w, k)
    assert close(corrected, mapped(guidance.finextract(first, second, w, k)) + k * shift)


# parametrisations

POINTS = {  # alpha, sigma: three of a variance-preserving schedule, three of a flow
    "vp": [(0.9**0.5, 0.1**0.5), (0.5**0.5, 0.5**0.5), (0.005**0.5, 0.995**0.5)],
    "flow": [(0.9, 0.1), (0.5, 0.5), (0.02, 0.98)],
}
KINDS = [("epsilon", "vp"), ("sample", "vp"), ("v_prediction", "vp"), ("flow_prediction", "flow")]
CASES = [(kind, *point) for kind, schedule in KINDS for point in POINTS[schedule]]


def defined(kind: str, x0: torch.Tensor, eps: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    """What a network of this type learns to predict, from the definitions."""
    return {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": alpha * eps - sigma * x0,
        "flow_prediction": eps - x0,
    }[kind]


def point(alpha: float, sigma: float, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """x0, eps and x = alpha x0 + sigma eps."""
    generator = torch.Generator().manual_seed(seed)
    x0, eps = (torch.randn(2, 3, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    return x0, eps, alpha * x0 + sigma * eps


@pytest.mark.parametrize(("kind", "alpha", "sigma"), CASES)
def test_every_type_is_converted_to_eps_and_back(kind, alpha, sigma):
    x0, eps, x = point(alpha, sigma)
    prediction = defined(kind, x0, eps, alpha, sigma)
    assert close(guidance.to_epsilon(prediction, kind, x, alpha, sigma), eps)
    assert close(guidance.from_epsilon(eps, kind, x, alpha, sigma), prediction)


@pytest.mark.parametrize(("kind", "alpha", "sigma"), CASES)
@pytest.mark.parametrize("k", [0.0, -0.02, 0.3])
def test_eq_13_on_any_type_is_eq_13_on_eps(kind, alpha, sigma, k):
    _, first, x = point(alpha, sigma)
    second = point(alpha, sigma, seed=1)[1]  # two predictions of the noise in the same x
    predictions = [guidance.from_epsilon(eps, kind, x, alpha, sigma) for eps in (first, second)]
    found = guidance.finextract(*predictions, 3.0, k, kind, x, alpha, sigma)
    eps = second + 2 * (second - first) + k * first
    assert close(guidance.to_epsilon(found, kind, x, alpha, sigma), eps)
    found = guidance.model_guidance(*predictions, 3.0)
    assert close(guidance.to_epsilon(found, kind, x, alpha, sigma), second + 2 * (second - first))


@pytest.mark.parametrize(("kind", "alpha", "sigma"), CASES)
def test_the_noise_term_is_what_a_prediction_grows_by_when_eps_doubles(kind, alpha, sigma):
    _, eps, x = point(alpha, sigma)
    once, twice = (guidance.from_epsilon(factor * eps, kind, x, alpha, sigma) for factor in (1, 2))
    assert close(guidance.noise_term(once, kind, x, alpha, sigma), twice - once)


def test_v_and_flow_are_finite_where_the_network_is_asked_for_pure_noise():
    x = prediction = torch.ones(1, 1, 2, 2)
    assert torch.equal(guidance.to_epsilon(prediction, "v_prediction", x, 0.0, 1.0), x)
    assert torch.equal(guidance.to_epsilon(prediction, "flow_prediction", x, 0.0, 1.0), x)
    assert torch.equal(guidance.finextract(prediction, prediction, 3.0, 0.0, "v_prediction", x, 0.0, 1.0), prediction)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda p: guidance.to_epsilon(p, "eps", p, 0.5, 0.5),
            "unknown prediction type 'eps': choose from epsilon, sample",
        ),
        (lambda p: guidance.from_epsilon(p, "velocity", p, 0.5, 0.5), "unknown prediction type 'velocity'"),
        (lambda p: guidance.finextract(p, p, 3.0, 0.0, "x0"), "unknown prediction type 'x0'"),
        (
            lambda p: guidance.finextract(p, p, 3.0, 0.1, "v_prediction"),
            "v_prediction takes x, alpha and sigma",
        ),
        (lambda p: guidance.finextract(p, p, 3.0, 0.1, "v_prediction", p, 0.0, 1.0), r"at alpha = 0 .*use k = 0"),
        (
            lambda p: guidance.from_epsilon(p, "v_prediction", p, 0.0, 1.0),
            "at alpha = 0 no v_prediction follows from eps",
        ),
        (lambda p: guidance.to_epsilon(p, "sample", p, 1.0, 0.0), "says nothing about eps at sigma = 0"),
    ],
)
def test_what_has_no_answer_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(1, 1, 2, 2))
