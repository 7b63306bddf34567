"""Metrics against closed forms, plain loops and scipy's tests."""

import itertools

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from fx.metrics import (
    average_similarity,
    best_match,
    copy_threshold,
    extraction_success_rate,
    holm,
    mean_interval,
    paired_interval,
    paired_p_value,
    psnr,
    random_choice_similarity,
)


def at_angles(*degrees):
    """Unit vectors in the plane, so that cosines are known."""
    radians = np.radians(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1)


def test_best_match_is_the_cosine_of_the_smallest_angle():
    found = best_match(at_angles(0, 90, 200), at_angles(60, 350))
    assert found == pytest.approx(np.cos(np.radians([10, 30, 140])))


def test_best_match_ignores_lengths_and_never_leaves_the_range_of_a_cosine():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((50, 7))
    scaled = rows * rng.uniform(0.1, 1e3, (50, 1))
    found = best_match(rows, scaled)
    assert found == pytest.approx(np.ones(50))
    assert found.max() <= 1


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 100))
@settings(max_examples=40)
def test_best_match_equals_a_plain_loop_in_any_order(m, k, seed):
    rng = np.random.default_rng(seed)
    training, extracted = rng.standard_normal((m, 5)), rng.standard_normal((k, 5))
    expected = [max(t @ e / np.sqrt((t @ t) * (e @ e)) for e in extracted) for t in training]
    assert best_match(training, extracted) == pytest.approx(expected)
    assert best_match(training, extracted[rng.permutation(k)]) == pytest.approx(expected)
    more = np.concatenate([extracted, rng.standard_normal((1, 5))])
    assert (best_match(training, more) >= best_match(training, extracted) - 1e-12).all()


@given(st.integers(1, 4), st.integers(1, 7), st.integers(0, 100))
@settings(max_examples=40)
def test_a_random_choice_scores_the_mean_over_all_sets_of_its_size(m, of, seed):
    rng = np.random.default_rng(seed)
    training, generated = rng.standard_normal((m, 3)), rng.standard_normal((of, 3))
    for n in range(1, of + 1):
        sets = itertools.combinations(range(of), n)
        expected = np.mean([average_similarity(training, generated[list(some)]) for some in sets])
        assert random_choice_similarity(training, generated, n) == pytest.approx(expected)
    for n in (0, of + 1):
        with pytest.raises(ValueError, match=f"{n} images cannot be drawn from {of}"):
            random_choice_similarity(training, generated, n)


def test_average_similarity_counts_negative_best_matches_as_zero():
    training, extracted = at_angles(0, 60, 180), at_angles(0, 30)
    assert average_similarity(training, extracted) == pytest.approx((1 + np.cos(np.radians(30)) + 0) / 3)
    assert average_similarity(training, training) == pytest.approx(1)


def test_success_rate_is_strict_and_averages_over_training_images():
    training = np.array([[1.0, 0, 0], [0.6, 0.8, 0], [0, 0, 1]])
    extracted = np.array([[1.0, 0, 0]])
    match = best_match(training, extracted)
    assert match == pytest.approx([1, 0.6, 0])
    assert extraction_success_rate(training, extracted, match[1]) == pytest.approx(1 / 3)
    assert extraction_success_rate(training, extracted, 0.59) == pytest.approx(2 / 3)
    assert extraction_success_rate(training, np.tile(extracted, (4, 1)), 0.59) == pytest.approx(2 / 3)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 200))
@settings(max_examples=60)
def test_one_to_one_match_equals_the_best_of_all_assignments(m, k, seed):
    rng = np.random.default_rng(seed)
    training, extracted = rng.standard_normal((m, 4)), rng.standard_normal((k, 4))
    cosine = [[t @ e / np.sqrt((t @ t) * (e @ e)) for e in extracted] for t in training]
    candidates = []
    slots = [*range(k), *[None] * m]  # None: no extracted image is left
    for chosen in set(itertools.permutations(slots, m)):
        if sum(j is not None for j in chosen) == min(m, k):
            candidates.append([-1 if j is None else cosine[i][j] for i, j in enumerate(chosen)])
    best = max(candidates, key=lambda c: sum(x for x in c if x != -1))
    assert best_match(training, extracted, one_to_one=True) == pytest.approx(best)
    assert (best_match(training, extracted, one_to_one=True) <= best_match(training, extracted) + 1e-12).all()


def test_one_extracted_image_counts_once_when_matched_one_to_one():
    training, extracted = at_angles(0, 10, 90), at_angles(2, 180)
    assert extraction_success_rate(training, extracted, 0.9) == pytest.approx(2 / 3)
    assert extraction_success_rate(training, extracted, 0.9, one_to_one=True) == pytest.approx(1 / 3)
    assert average_similarity(training, extracted, one_to_one=True) == pytest.approx(np.cos(np.radians(2)) / 3)


def test_psnr_of_every_pair_is_that_of_its_mean_squared_error():
    flat = np.zeros((3, 2, 2, 3), np.uint8)
    flat[1] += 10  # every value is off by ten
    flat[2, 0, 0, 0] = 255  # one of twelve values is off by all
    expected = [[10 * np.log10(255**2 * 12), 20 * np.log10(25.5), 10 * np.log10(12)]]
    assert psnr(flat[:1], flat) == pytest.approx(np.array(expected))
    assert psnr(flat, flat[1:2])[:, 0] == pytest.approx(psnr(flat[1:2], flat)[0])  # unsigned differences do not wrap
    assert psnr(flat, flat[:2]).shape == (3, 2)


def test_interval_contains_exactly_the_means_that_a_t_test_does_not_reject():
    values = np.random.default_rng(3).gamma(2, size=9)
    for level in (0.5, 0.9, 0.95):
        for bound in mean_interval(values, level):
            assert scipy.stats.ttest_1samp(values, bound).pvalue == pytest.approx(1 - level)
    low, high = mean_interval(values)
    assert low + high == pytest.approx(2 * values.mean())
    assert mean_interval([0.0, 1.0]) == pytest.approx(
        (0.5 - 12.706 / 2, 0.5 + 12.706 / 2), abs=1e-3
    )  # t table, 1 d.o.f.
    assert mean_interval(3 * values - 1) == pytest.approx((3 * low - 1, 3 * high - 1))
    assert mean_interval(np.full(4, 0.25)) == (0.25, 0.25)


@pytest.mark.parametrize("n", [3, 5, 20])
def test_interval_covers_the_true_mean_as_often_as_it_says(n):
    """4,000 samples of few items: 3.5 standard errors of the share are 1.2%. A percentile bootstrap has 84% at n = 5."""
    samples = np.random.default_rng(6).standard_normal((4000, n))
    hits = [low <= 0 <= high for low, high in map(mean_interval, samples)]
    assert np.mean(hits) == pytest.approx(0.95, abs=0.012)


def test_interval_and_p_value_of_a_single_item_are_unknown():
    assert np.isnan(mean_interval([0.5])).all()
    assert np.isnan(paired_p_value([0.5], [0.25]))


def test_paired_interval_is_that_of_the_differences():
    rng = np.random.default_rng(7)
    item, noise = rng.normal(0, 10, 20), rng.normal(0, 0.1, 20)
    a, b = item + 1 + noise - noise.mean(), item
    low, high = paired_interval(a, b)
    assert (low, high) == pytest.approx(mean_interval(a - b))
    assert 0.9 < low < 1 < high < 1.1  # the large spread between items cancels
    assert paired_interval(b, a) == pytest.approx((-high, -low))


def test_paired_p_value_is_the_t_tests_and_agrees_with_the_interval():
    rng = np.random.default_rng(8)
    for gain in (0, 0.3, 0.6):
        a, b = rng.normal(gain, 1, 15), rng.normal(0, 1, 15)
        p = paired_p_value(a, b)
        assert p == pytest.approx(scipy.stats.ttest_rel(a, b).pvalue)
        low, high = paired_interval(a, b)
        assert (p < 0.05) == (low > 0 or high < 0)
    level = rng.random(5)
    assert paired_p_value(level, level) == 1
    assert paired_p_value(level + 0.1, level) == 0


def test_holm_multiplies_the_smallest_by_n_the_next_by_n_minus_1_and_keeps_the_order():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1, 1])
    assert holm([0.2]) == pytest.approx([0.2])


def test_copy_threshold_is_exceeded_at_the_given_rate():
    negatives = np.random.default_rng(8).permutation(np.arange(1000) / 1000)
    assert copy_threshold(negatives, 0.01) == 0.989
    assert copy_threshold(negatives, 0.25) == 0.749
    assert copy_threshold(negatives.reshape(10, 100), 0.01) == 0.989


@given(st.lists(st.integers(0, 5), min_size=10, max_size=60), st.sampled_from([0.1, 0.2, 0.3, 0.7]))
def test_copy_threshold_is_the_lowest_that_keeps_the_rate_even_with_ties(negatives, rate):
    negatives = np.array(negatives)
    threshold = copy_threshold(negatives, rate)
    assert (negatives > threshold).mean() <= rate + 1e-12
    lower = negatives[negatives < threshold]
    assert lower.size == 0 or (negatives > lower.max()).mean() > rate + 1e-12


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: best_match(np.ones((2, 3)), np.ones((2, 4))), "3 dimensions, extracted ones 4"),
        (lambda: best_match(np.ones((2, 3)), np.empty((0, 3))), r"extracted descriptors must be \[n, d\]"),
        (lambda: best_match(np.ones(3), np.ones((1, 3))), "training descriptors must be"),
        (lambda: best_match(np.ones((2, 3)), np.array([[1, 0, 0], [0, 0, 0]])), "extracted descriptor 1 is all zero"),
        (lambda: average_similarity(np.array([[1, np.nan]]), np.ones((1, 2))), "training descriptor 0"),
        (lambda: mean_interval([]), "non-empty"),
        (lambda: mean_interval([0.1, np.nan]), "finite"),
        (lambda: mean_interval([0.1, 0.2], level=95), "it is 95"),
        (
            lambda: extraction_success_rate(np.eye(2), np.eye(2), np.nan),
            "between -1 and 1, like a similarity; it is nan",
        ),
        (lambda: extraction_success_rate(np.eye(2), np.eye(2), 60), "it is 60"),
        (lambda: extraction_success_rate(np.eye(2), np.eye(2), np.array([0.5, 0.6])), "one number"),
        (lambda: holm([0.5, 1.5]), r"in \[0, 1\], not"),
        (lambda: holm([np.nan]), "not .nan"),
        (lambda: paired_p_value([1, 2], [1]), r"not \(2,\) and \(1,\)"),
        (lambda: psnr(np.zeros((1, 2, 2, 3)), np.zeros((1, 2, 2, 3), np.uint8)), "images are float64"),
        (
            lambda: psnr(np.zeros((1, 2, 2, 3), np.uint8), np.zeros((1, 4, 4, 3), np.uint8)),
            r"others are uint8 \[1, 4, 4, 3\]",
        ),
        (lambda: paired_interval([1, 2], [1, 2, 3]), r"not \(2,\) and \(3,\)"),
        (lambda: copy_threshold(np.zeros(50), 0.01), "at least 100 .* there are 50 of 50"),
        (lambda: copy_threshold(np.zeros(50), 1.5), "it is 1.5"),
    ],
)
def test_wrong_input_is_refused_with_the_reason(call, message):
    with pytest.raises(ValueError, match=message):
        call()
