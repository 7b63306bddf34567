"""p-values of suspects among controls: valid whatever the scores are, and small where suspects were trained on."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fx import verdict


def test_a_p_value_counts_the_controls_that_score_as_high():
    found = verdict.p_values([3.0, 2.0, 9.0, -1.0], [1.0, 2.0, 3.0, 4.0])
    assert found.tolist() == [3 / 5, 4 / 5, 1 / 5, 1.0]
    assert verdict.p_values([5.0], np.zeros(99)).tolist() == [0.01]


@pytest.mark.parametrize("kind", ["normal", "ties"])
@pytest.mark.parametrize("witnesses", [1, 3])
def test_p_values_of_images_like_the_controls_are_below_alpha_in_at_most_alpha_of_cases(kind, witnesses):
    """Images of one population, with witnesses that agree with one another."""
    draw, cases = np.random.default_rng(0), 1500
    found, sets = [], []
    for _ in range(cases):
        pool = draw.normal(size=(13, 1)) + 0.5 * draw.normal(size=(13, witnesses))
        pool = pool.round() if kind == "ties" else pool
        found.append(verdict.combined(pool[:1], pool[1:])[0])
        sets.append(verdict.of_the_set(pool[:4], pool[4:], draws=99, seed=int(draw.integers(10**6))))
    for alpha in (0.1, 0.25, 0.5):
        assert np.mean(np.array(found) <= alpha) <= alpha + 3 * (alpha * (1 - alpha) / cases) ** 0.5
        assert np.mean(np.array(sets) <= alpha) <= alpha + 3 * (alpha * (1 - alpha) / cases) ** 0.5


def test_one_witness_combined_is_itself():
    draw = np.random.default_rng(1)
    suspects, controls = draw.normal(size=7), draw.normal(size=11)
    np.testing.assert_allclose(verdict.combined(suspects, controls), verdict.p_values(suspects, controls))


def test_several_weak_witnesses_are_stronger_together():
    draw = np.random.default_rng(2)
    suspects, controls = draw.normal(1.2, 1, (40, 3)), draw.normal(0, 1, (60, 3))
    together = np.mean(verdict.combined(suspects, controls) <= 0.1)
    alone = [np.mean(verdict.p_values(suspects[:, i], controls[:, i]) <= 0.1) for i in range(3)]
    assert together > max(alone)


def deviations(pool: np.ndarray) -> np.ndarray:
    """Each image's distances above the medians, in median absolute deviations, added witness after witness."""
    found = np.zeros(len(pool))
    for column in np.asarray(pool, float).T:
        spread = stats.median_abs_deviation(column) or np.mean([abs(x - np.median(column)) for x in column]) or 1.0
        found += [(x - np.median(column)) / spread for x in column]
    return found


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(-9, 9)), min_size=1, max_size=12))
def test_an_image_stands_out_by_its_deviations_added(pool):
    np.testing.assert_allclose(verdict.standing_out(pool), deviations(np.array(pool)), atol=1e-9)


def test_a_witness_that_says_the_same_of_all_says_nothing_and_its_scale_does_not_matter():
    draw = np.random.default_rng(6)
    scores = draw.normal(size=(9, 2))
    out = verdict.standing_out(scores)
    np.testing.assert_allclose(verdict.standing_out(scores * [1e-3, 50] + [7, -2]), out)
    np.testing.assert_allclose(verdict.standing_out(np.column_stack([scores, np.full(9, 0.3)])), out)
    assert (verdict.standing_out(np.zeros((4, 3))) == 0).all()


def test_what_differs_by_rounding_is_no_scale():
    nearly = np.array([0.5, 0.5 + 1e-16, 0.5 - 1e-16, 0.5, 0.9])
    np.testing.assert_allclose(verdict.standing_out(nearly), [0, 0, 0, 0, 5], atol=1e-9)  # .4 over a mean of .08


def test_a_witness_that_knows_is_not_drowned_by_two_that_do_not():
    """Five of ten suspects far above everything by one witness, two others at random: as good as if that one were alone."""
    draw, together, ranks = np.random.default_rng(7), [], []
    for _ in range(20):
        suspects, controls = draw.normal(size=(10, 3)), draw.normal(size=(10, 3))
        suspects[:5, 1] += 12
        together.append(verdict.of_the_set(suspects, controls))
        total = stats.rankdata(np.vstack([suspects, controls]), axis=0).sum(axis=1)
        ranks.append(verdict.of_the_set(total[:10], total[10:]))
    assert max(together) <= 0.05
    assert np.median(ranks) > 2 * np.median(together), "what adding ranks gives"


def test_a_set_that_was_all_trained_on_is_found_even_among_fewer_controls():
    """Then the median image was trained on too, and nothing stands out."""
    draw, found = np.random.default_rng(8), []
    for _ in range(10):
        suspects, controls = draw.normal(size=(10, 3)), draw.normal(size=(6, 3))
        suspects[:, 1] += 6
        found.append(verdict.of_the_set(suspects, controls))
    assert max(found) <= 0.01


def by_hand(suspects: list, controls: list) -> float:
    """The set's p-value over all choices: by the best witness's mean, the mean of what stands out, and Simes' p-value."""
    pool = np.array([*suspects, *controls], float)
    out = deviations(pool)
    every = [np.array(c) for c in itertools.combinations(range(len(pool)), len(suspects))]
    means = np.array([pool[chosen].mean(axis=0) for chosen in every])
    apart = np.max([stats.zscore(column) if np.ptp(column) > 1e-9 else 0 * column for column in means.T], axis=0)
    found = []
    for chosen, best in zip(every, apart, strict=True):
        theirs = np.delete(out, chosen)
        simes = stats.false_discovery_control(verdict.p_values(out[chosen], theirs)).min()
        found.append((round(-best, 8), round(-out[chosen].mean(), 9), round(simes, 9)))
    shares = [[sum(other[k] <= one[k] for other in found) / len(found) for k in range(3)] for one in found]
    smallest = [min(each) for each in shares]
    return sum(value <= smallest[0] for value in smallest) / len(found)


SCORES = st.tuples(st.integers(0, 6), st.integers(0, 6))


@given(st.lists(SCORES, min_size=1, max_size=3), st.lists(SCORES, min_size=1, max_size=5))
def test_the_sets_test_is_exact_where_all_choices_can_be_made(suspects, controls):
    assert verdict.of_the_set(suspects, controls) == pytest.approx(by_hand(suspects, controls))


SCORE = st.floats(-5, 5).map(lambda score: round(score, 6))  # what differs by less than rounding is the same


@given(SCORE, st.lists(SCORE, min_size=1, max_size=30))
def test_a_set_of_one_image_has_the_images_p_value(suspect, controls):
    assert verdict.of_the_set([suspect], controls) == pytest.approx(verdict.p_values([suspect], controls)[0])


def test_of_too_many_choices_some_are_tried():
    draw = np.random.default_rng(3)
    suspects, controls = draw.normal(0.7, 1, 5), draw.normal(0, 1, 9)
    assert verdict.of_the_set(suspects, controls, draws=2001) == verdict.of_the_set(suspects, controls)  # all there are
    assert verdict.of_the_set(suspects + 100, controls, draws=999) == pytest.approx(1 / 1000, abs=1e-3)
    assert verdict.of_the_set(suspects - 100, controls, draws=999) == 1.0


def test_one_of_many_is_found_where_it_stands_out():
    draw = np.random.default_rng(5)
    suspects, controls = draw.normal(0, 1, 40), draw.normal(0, 1, 1999)
    suspects[7] = 100
    assert verdict.discoveries(verdict.p_values(suspects, controls)).sum() == 1
    assert verdict.of_the_set(suspects, controls) <= 0.05
    assert stats.mannwhitneyu(suspects, controls, alternative="greater").pvalue > 0.05


def test_a_part_of_the_set_is_enough():
    draw = np.random.default_rng(4)
    suspects = np.concatenate([draw.normal(3, 1, 5), draw.normal(0, 1, 15)])
    assert verdict.of_the_set(suspects, draw.normal(0, 1, 40)) < 0.05


def test_discoveries_are_benjamini_and_hochbergs():
    p = np.array([0.01, 0.02, 0.04, 0.2, 0.9])
    assert verdict.discoveries(p, 0.05).tolist() == [True, True, False, False, False]  # .05 i / 5: .01, .02, .03
    assert verdict.discoveries(p, 0.1).tolist() == [True, True, True, False, False]
    assert verdict.discoveries(np.zeros(0)).tolist() == []


@given(st.integers(1, 60), st.integers(1, 40))
def test_the_smallest_set_says_when_few_controls_can_name_nothing(n_controls, n):
    share = verdict.smallest_set(0.05, n_controls)
    floor = 1 / (n_controls + 1)
    for r in range(1, n + 1):
        p = np.concatenate([np.full(r, floor), np.ones(n - r)])
        assert verdict.discoveries(p).any() == (100 * r / n >= 100 / (0.05 * (n_controls + 1)) - 1e-6)
        if verdict.discoveries(p).any():
            assert 100 * r / n >= share - 1


def test_auc_is_the_share_of_pairs():
    assert verdict.auc([1.0, 3.0], [0.0, 2.0]) == 0.75
    assert verdict.auc([1.0], [1.0]) == 0.5


@pytest.mark.parametrize("bad", [[], [np.nan], [[1.0, np.inf]]])
def test_scores_that_are_none_are_refused(bad):
    for call in (lambda: verdict.p_values(bad, [1.0]), lambda: verdict.of_the_set([1.0], bad)):
        with pytest.raises(ValueError, match="finite numbers"):
            call()
    with pytest.raises(ValueError, match="of one witness are asked for, not of 2"):
        verdict.p_values([[1.0, 2.0]], [[1.0, 2.0]])
    with pytest.raises(ValueError, match="2 scores each and controls 1"):
        verdict.combined([[1.0, 2.0]], [[1.0]])
