"""Guidance: the printed equations, their limits and what they do to affine maps."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fx import guidance

predictions = hnp.arrays(np.float64, (2, 3, 2, 2), elements=st.floats(-10, 10)).map(torch.from_numpy)
scales = st.floats(-5, 20)
ALL = (
    guidance.extrapolate,
    guidance.model_guidance,
    guidance.classifier_free_guidance,
    guidance.finextract,
    guidance.conditional_only,
)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-9, atol=1e-8)


@settings(max_examples=40)
@given(predictions, predictions, scales)
def test_eq_6_as_printed(base, tuned, w):
    assert close(guidance.model_guidance(base, tuned, w), tuned + (w - 1) * (tuned - base))


@settings(max_examples=40)
@given(predictions, predictions, scales)
def test_conditional_only_is_eq_6_for_two_conditional_predictions(base, tuned, w):
    assert close(guidance.conditional_only(base, tuned, w), tuned + (w - 1) * (tuned - base))


@settings(max_examples=40)
@given(predictions, predictions, scales)
def test_eq_8_as_printed_is_the_formula_of_diffusers(unconditional, conditional, w):
    found = guidance.classifier_free_guidance(unconditional, conditional, w)
    assert close(found, conditional + (w - 1) * (conditional - unconditional))
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
    for combine in ALL:
        assert close(combine(first, second, 1.0), second)
        assert close(combine(first, second, 0.0), first)


@settings(max_examples=40)
@given(predictions, scales)
def test_equal_predictions_are_left_alone_at_every_scale(prediction, w):
    for combine in ALL:
        assert torch.equal(combine(prediction, prediction, w), prediction)


@settings(max_examples=40)
@given(predictions, predictions, scales, st.floats(-3, 3), st.floats(-3, 3))
def test_affine_maps_commute_with_guidance_but_for_the_correction_term(first, second, w, slope, shift):
    def mapped(x):
        return slope * x + shift

    for combine in ALL:
        assert close(combine(mapped(first), mapped(second), w), mapped(combine(first, second, w)))
    k = -0.02
    corrected = guidance.finextract(mapped(first), mapped(second), w, k)
    assert close(corrected, mapped(guidance.finextract(first, second, w, k)) + k * shift)
