"""From scores of suspected images and of controls to p-values and one answer for the whole set.

Controls are images of the same kind that were certainly not trained on. If the suspects were not trained on either, both are
draws of one population, and every p-value here is at most alpha with probability at most alpha, whatever the scores are:
they are ranks among exchangeable things (Vovk et al., 2005). Scores are higher for images that look trained on.
"""

import numpy as np
from scipy import stats


def p_values(suspects: np.ndarray, controls: np.ndarray) -> np.ndarray:
    """For each of the scores `suspects` [n] its conformal p-value among `controls` [m]: [n], none below 1 / (m + 1).

    (1 + how many controls score as high or higher) / (m + 1). Raises ValueError without controls and for scores that are
    not finite.
    """
    suspects, controls = _scores(suspects)[:, 0], _scores(controls)[:, 0]
    return (1 + (controls[None, :] >= suspects[:, None]).sum(axis=1)) / (len(controls) + 1)


def combined(suspects: np.ndarray, controls: np.ndarray) -> np.ndarray:
    """One p-value for each suspect from several witnesses, scores [n, k] and [m, k]: [n].

    Each suspect is ranked among the controls by every witness; its p-value is its place, among itself and the controls, by
    the sum of these ranks. Suspect and controls enter alike, so it is as valid as that of one witness.
    """
    suspects, controls = _same_witnesses(suspects, controls)
    found = []
    for suspect in suspects:
        pool = np.vstack([suspect, controls])
        total = stats.rankdata(pool, axis=0).sum(axis=1)
        found.append((total >= total[0]).mean())
    return np.array(found)


def of_the_set(suspects: np.ndarray, controls: np.ndarray, draws: int = 9999, seed: int = 0) -> float:
    """The p-value of "none of these was trained on", from scores [n, k] and [m, k] of k witnesses.

    A permutation test: the suspects' mean rank, summed over witnesses, against that of `draws` random choices of n among all
    n + m images. It has power where a part of the suspects was trained on, and none is below 1 / (draws + 1).
    """
    suspects, controls = _same_witnesses(suspects, controls)
    pool = np.vstack([suspects, controls])
    total, n = stats.rankdata(pool, axis=0).sum(axis=1), len(suspects)
    draw = np.random.default_rng(seed)
    null = np.array([draw.permutation(total)[:n].sum() for _ in range(draws)])
    return float((1 + (null >= total[:n].sum() - 1e-9).sum()) / (draws + 1))


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
    suspects, controls = _scores(suspects)[:, 0], _scores(controls)[:, 0]
    return float(stats.mannwhitneyu(suspects, controls).statistic / (len(suspects) * len(controls)))


def _same_witnesses(suspects: np.ndarray, controls: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    suspects, controls = _scores(suspects), _scores(controls)
    if suspects.shape[1] != controls.shape[1]:
        raise ValueError(f"suspects have {suspects.shape[1]} scores each and controls {controls.shape[1]}")
    return suspects, controls


def _scores(values: np.ndarray) -> np.ndarray:
    """Scores as float64 [n, k]; ValueError for none and for any that is not finite."""
    values = np.asarray(values, float)
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"scores must be finite numbers, at least one, [n] or [n, witnesses], not {values.shape}")
    return values
