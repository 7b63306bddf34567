"""From scores of suspected images and of controls to p-values and one answer for the whole set.

Controls are images of the same kind that were certainly not trained on. If the suspects were not trained on either, both are
draws of one population, and every p-value here is at most alpha with probability at most alpha, whatever the scores are:
they compare exchangeable things (Vovk et al., 2005). Scores are higher for images that look trained on. How witnesses
are combined was chosen on development items (notebook 15).
"""

import itertools
import math

import numpy as np
from scipy import stats


def p_values(suspects: np.ndarray, controls: np.ndarray) -> np.ndarray:
    """For each of the scores `suspects` [n] its conformal p-value among `controls` [m]: [n], none below 1 / (m + 1).

    (1 + how many controls score as high or higher) / (m + 1). Raises ValueError without controls and for scores that are
    not finite.
    """
    suspects, controls = _of_one_witness(suspects), _of_one_witness(controls)
    return (1 + (controls[None, :] >= suspects[:, None]).sum(axis=1)) / (len(controls) + 1)


def standing_out(scores: np.ndarray) -> np.ndarray:
    """How far each image stands out among these by all witnesses together, scores [n, k] of k witnesses: [n].

    The sum over witnesses of (score - median) / (median absolute deviation), of all n images; where more than half have the
    same score, their mean absolute deviation instead. All images enter alike, and no witness has a weight: one that tells a
    few images apart has them far away, and so counts for more than one that cannot.
    """
    away = _scores(scores)
    away = away - np.median(away, axis=0)
    spread = np.median(np.abs(away), axis=0)
    alike = spread <= 1e-9 * np.abs(away).max(axis=0)  # but for rounding
    spread = np.where(alike, np.abs(away).mean(axis=0), spread)
    return (away / np.where(spread > 0, spread, 1)).sum(axis=1)


def combined(suspects: np.ndarray, controls: np.ndarray) -> np.ndarray:
    """One p-value for each suspect from several witnesses, scores [n, k] and [m, k]: [n].

    Its conformal p-value by how far it stands out among itself and the controls. Suspect and controls enter alike, so it is
    as valid as that of one witness.
    """
    suspects, controls = _same_witnesses(suspects, controls)
    found = []
    for suspect in suspects:
        out = standing_out(np.vstack([suspect, controls]))
        found.append((out >= out[0]).mean())
    return np.array(found)


def of_the_set(suspects: np.ndarray, controls: np.ndarray, draws: int = 9999, seed: int = 0) -> float:
    """The p-value of "none of these was trained on", from scores [n, k] and [m, k] of k witnesses.

    A permutation test with three statistics. By the witness that sets the suspects apart most: the largest, over witnesses,
    of the mean score of the suspects, in standard deviations over the choices below; it finds a set all of which was trained
    on, even where there are fewer controls. By how far each image stands out (`standing_out`): the mean over the suspects,
    which grows where a part of them was trained on; and the p-value of Simes (1986), which falls where a few stand out. Each
    is compared with its values for other choices of n among the n + m images, and so is the smallest of the three p-values
    that this gives. Where there are no more than draws + 1 choices all are taken, and the p-value is exact; else `draws`
    random ones and the one that was made, and none is below 1 / (draws + 1).
    """
    suspects, controls = _same_witnesses(suspects, controls)
    pool, n = np.vstack([suspects, controls]), len(suspects)
    out = standing_out(pool)
    choices = _choices(len(out), n, draws, seed)
    sums = np.column_stack([standing_out(scores)[choices].sum(axis=1) for scores in pool.T])
    sums, scatter = sums - sums.mean(axis=0), sums.std(axis=0)
    by_witness = (sums / np.where(scatter > 1e-9, scatter, 1)).max(axis=1)
    statistics = [by_witness.round(9), out[choices].sum(axis=1).round(9), -_simes(out, choices)]  # equal in any order
    smallest = np.min([stats.rankdata(-statistic, method="max") for statistic in statistics], axis=0)
    return float((smallest <= smallest[0]).mean())


def _choices(size: int, n: int, draws: int, seed: int) -> np.ndarray:
    """Choices of n numbers below `size`, [choices, n], the first of them 0 to n - 1: all, or that one and random ones."""
    if math.comb(size, n) <= draws + 1:
        return np.array(list(itertools.combinations(range(size), n)))
    draw = np.random.default_rng(seed)
    return np.stack([np.arange(n), *(draw.permutation(size)[:n] for _ in range(draws))])


def _simes(out: np.ndarray, choices: np.ndarray) -> np.ndarray:
    """For each choice n p_(j) / j at its smallest, but for constants; p_(j): the j-th smallest conformal p-value."""
    n = choices.shape[1]
    as_high = np.sort(len(out) - stats.rankdata(out, method="min")[choices] + 1, axis=1)  # of all images
    place = np.arange(1, n + 1)
    return ((1 + as_high - place) / place).min(axis=1)


def discoveries(p: np.ndarray, level: float = 0.05) -> np.ndarray:
    """Which of the p-values [n] stand out if at most a share `level` of those named is to be wrong on average (bool [n]).

    Benjamini and Hochberg (1995); their condition on dependence holds for conformal p-values (Bates et al., 2023).
    """
    return stats.false_discovery_control(np.asarray(p, float)) <= level if len(p) else np.zeros(0, bool)


def smallest_set(level: float, n_controls: int) -> int:
    """How many of the suspects must reach the lowest p-value there can be, 1 / (n_controls + 1), of n, for any to be named.

    With few controls no single image can stand out: Benjamini and Hochberg name r images whose p-values are below
    level * r / n. Returned is the share r / n in per cent, rounded up; above 100 nothing can be named at all.
    """
    return int(np.ceil(100 / (level * (n_controls + 1)) - 1e-9))


def auc(suspects: np.ndarray, controls: np.ndarray) -> float:
    """The chance that a suspect scores above a control, ties half: .5 where they are alike."""
    suspects, controls = _of_one_witness(suspects), _of_one_witness(controls)
    return float(stats.mannwhitneyu(suspects, controls).statistic / (len(suspects) * len(controls)))


def _same_witnesses(suspects: np.ndarray, controls: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    suspects, controls = _scores(suspects), _scores(controls)
    if suspects.shape[1] != controls.shape[1]:
        raise ValueError(f"suspects have {suspects.shape[1]} scores each and controls {controls.shape[1]}")
    return suspects, controls


def _of_one_witness(values: np.ndarray) -> np.ndarray:
    """Scores of one witness as float64 [n]; ValueError for several."""
    values = _scores(values)
    if values.shape[1] != 1:
        raise ValueError(f"scores of one witness are asked for, not of {values.shape[1]}: see `combined`")
    return values[:, 0]


def _scores(values: np.ndarray) -> np.ndarray:
    """Scores as float64 [n, k]; ValueError for none and for any that is not finite."""
    values = np.asarray(values, float)
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"scores must be finite numbers, at least one, [n] or [n, witnesses], not {values.shape}")
    return values
