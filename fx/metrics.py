"""How much of the training set was extracted (Sec. 3.2), and how certain the numbers are.

Training and extracted images enter as descriptors, one row each; sim is their cosine.
"""

import numpy as np
from scipy import stats
from scipy.optimize import linear_sum_assignment
from statsmodels.stats.multitest import multipletests


def best_match(training: np.ndarray, extracted: np.ndarray, one_to_one: bool = False) -> np.ndarray:
    """max_j sim(X0_i, X_j) of Eq. 1 and 2: float64 [m] in [-1, 1] of descriptors [m, d] and [k, d], any length of rows.

    In Eq. 1 and 2 one extracted image can be the best match of several training images. one_to_one: each is given to one
    training image at most, so that the sum of similarities is highest (linear assignment); training images for which none
    is left have -1, the lowest similarity.

    Raises ValueError if a set is empty, if the dimensions differ, or for rows that are all zero or not finite.
    """
    training, extracted = _unit_rows(training, "training"), _unit_rows(extracted, "extracted")
    if training.shape[1] != extracted.shape[1]:
        raise ValueError(
            f"Training descriptors have {training.shape[1]} dimensions, extracted ones {extracted.shape[1]}: "
            "compute both with the same network."
        )
    similarity = np.clip(training @ extracted.T, -1, 1)
    if not one_to_one:
        return similarity.max(axis=1)
    matched = np.full(len(training), -1.0)
    rows, columns = linear_sum_assignment(similarity, maximize=True)
    matched[rows] = similarity[rows, columns]
    return matched


def average_similarity(training: np.ndarray, extracted: np.ndarray, one_to_one: bool = False) -> float:
    """AS, Eq. 1, in [0, 1]; one_to_one as in `best_match`.

    Sec. 3.2 has sim "ranging from 0 to 1" while a cosine can be negative, so a negative best match counts as 0.
    """
    return float(np.clip(best_match(training, extracted, one_to_one), 0, 1).mean())


def extraction_success_rate(
    training: np.ndarray, extracted: np.ndarray, threshold: float, one_to_one: bool = False
) -> float:
    """A-ESR_tau, Eq. 2, in [0, 1]: the share of training images whose best match is above (not at) `threshold`.

    one_to_one as in `best_match`: the matching is the one of highest total similarity, whatever the threshold. Raises
    ValueError for a threshold that is no number in [-1, 1].
    """
    check_threshold(threshold)
    return float((best_match(training, extracted, one_to_one) > threshold).mean())


def random_choice_similarity(training: np.ndarray, generated: np.ndarray, n_extracted: int) -> float:
    """AS in [0, 1] that is expected where the extracted set is drawn at random: all sets of that size are equally likely.

    Exact, without drawing. Of N similarities in rising order the j-th is the highest of n drawn ones with probability
    C(j-1, n-1) / C(N, n). Raises ValueError unless 1 <= n_extracted <= N, and as `best_match` for the descriptors.
    """
    training, generated = _unit_rows(training, "training"), _unit_rows(generated, "generated")
    n, of = n_extracted, len(generated)
    if not 1 <= n <= of:
        raise ValueError(f"{n} images cannot be drawn from {of} generated ones: give a number between 1 and {of}")
    weights = np.zeros(of)
    weights[-1] = n / of
    for j in range(of - 1, n - 1, -1):  # C(j-1, n-1) out of C(j, n-1)
        weights[j - 1] = weights[j] * (j - n + 1) / j
    return float((np.sort(np.clip(training @ generated.T, 0, 1), axis=1) @ weights).mean())


def psnr(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of every pair, in dB: float64 [m, k] of uint8 images [m, h, w, 3] and [k, h, w, 3].

    10 log10(255^2 / MSE). Two images that are equal have 58.9 dB, that of the error 1/12 which rounding to 8 bits makes, so
    that a mean over images is finite. Raises ValueError for images of another type or size.
    """
    for name, given in (("images", images), ("others", others)):
        if given.dtype != np.uint8 or given.ndim != 4 or 0 in given.shape or given.shape[1:] != images.shape[1:]:
            raise ValueError(
                f"PSNR compares uint8 [m, h, w, 3] with images of the same size; {name} are "
                f"{given.dtype} {list(given.shape)}, the first ones {list(images.shape)}."
            )
    errors = np.array(
        [[np.square(np.subtract(one, other, dtype=np.float64)).mean() for other in others] for one in images]
    )
    return 10 * np.log10(255**2 / np.maximum(errors, 1 / 12))


def mean_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Student's t-interval of the mean of `values` [n], one value per item.

    Items, not images, are the sample: the images of one item share a fine-tuned model and are not independent. A single item
    says nothing about the spread between items: its interval is (nan, nan). (A percentile bootstrap is too short for few
    items; notebook 03 shows by how much.)
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"Values must be a non-empty list of finite numbers, one per item; they are {values}.")
    check_level(level)
    if values.size == 1:
        return float("nan"), float("nan")
    half = stats.t.isf((1 - level) / 2, values.size - 1) * values.std(ddof=1) / np.sqrt(values.size)
    return float(values.mean() - half), float(values.mean() + half)


def paired_interval(a: np.ndarray, b: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Student's t-interval of the mean of a - b, where a[i] and b[i] are the scores of two arms on the same item i."""
    return mean_interval(_paired(a, b), level)


def paired_p_value(a: np.ndarray, b: np.ndarray) -> float:
    """Two-sided p-value of the paired t-test that the mean of a - b is 0; nan for a single item.

    It is below 1 - level where `paired_interval` excludes 0. Differences that are all the same but for rounding are beyond
    chance: p is 1 if they are 0, else 0.
    """
    differences = _paired(a, b)
    mean_interval(differences)  # checks them
    if differences.size == 1:
        return float("nan")
    if np.ptp(differences) <= 1e-12 * np.abs(differences).max():
        return float(differences[0] == 0)
    return float(stats.ttest_1samp(differences, 0).pvalue)


def holm(p_values: np.ndarray) -> np.ndarray:
    """p-values [n] corrected for n tests by Holm (1979): the chance of any false rejection stays at the level."""
    p_values = np.asarray(p_values, dtype=np.float64)
    if p_values.ndim != 1 or p_values.size == 0 or not ((p_values >= 0) & (p_values <= 1)).all():
        raise ValueError(f"p-values are a list of numbers in [0, 1], not {p_values}.")
    return multipletests(p_values, method="holm")[1]


def _paired(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"A paired difference needs both arms on the same items, not {a.shape} and {b.shape} values.")
    return a - b


def copy_threshold(negatives: np.ndarray, false_positive_rate: float) -> float:
    """The lowest of the similarities `negatives` of unrelated pairs that at most the given share of them exceed.

    It makes thresholds of different descriptors comparable: the paper's 0.6 and 0.7 hold for SSCD only. Raises ValueError
    unless 0 < rate < 1 and there are at least 1 / rate negatives, below which the rate cannot be seen.
    """
    negatives = np.ravel(negatives)
    if not 0 < false_positive_rate < 1:
        raise ValueError(f"A false-positive rate lies between 0 and 1; it is {false_positive_rate}.")
    if negatives.size < 1 / false_positive_rate - 1e-9 or not np.isfinite(negatives).all():
        raise ValueError(
            f"A false-positive rate of {false_positive_rate:g} takes at least {np.ceil(1 / false_positive_rate):.0f} "
            f"finite similarities of unrelated pairs; there are {np.isfinite(negatives).sum()} of {negatives.size}."
        )
    exceeding = int(false_positive_rate * negatives.size + 1e-9)  # 0.1 * 30 is 3, not 2.9999...
    return float(np.sort(negatives)[negatives.size - exceeding - 1])


def check_threshold(threshold: float) -> None:
    """ValueError unless the threshold is one number in [-1, 1], like the similarities it is compared with."""
    if np.ndim(threshold) or not -1 <= threshold <= 1:
        raise ValueError(f"A threshold is one number between -1 and 1, like a similarity; it is {threshold}.")


def check_level(level: float) -> None:
    """ValueError unless 0 < level < 1, the level of an interval."""
    if not 0 < level < 1:
        raise ValueError(f"The level of an interval lies between 0 and 1, such as 0.95; it is {level}.")


def _unit_rows(descriptors: np.ndarray, name: str) -> np.ndarray:
    """Descriptors [n, d] as float64 with rows of unit length."""
    rows = np.asarray(descriptors, dtype=np.float64)
    if rows.ndim != 2 or len(rows) == 0:
        raise ValueError(f"The {name} descriptors must be [n, d] with n >= 1, not {rows.shape}.")
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not (np.isfinite(lengths) & (lengths > 0)).all():
        bad = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))[0]
        raise ValueError(f"The {name} descriptor {bad} is all zero or not finite: check the image it comes from.")
    return rows / lengths
