"""From similarities of generated images to extracted images (Sec. 4.3).

Images i and j are joined when sim(i, j) >= phi; the largest clique is removed again and again, and each clique's
central image is extracted. Only the largest clique is ever needed, so the (exponentially many) others are not
enumerated: a compiled branch and bound finds it (fx.clique_search).

All comparisons are made on similarities rounded to integer millionths, which the last bits of floating-point sums hardly
ever change. What is equal then is told apart by the sum of the similarities to all images, and only after that by the order
of the images.
"""

import operator
import warnings
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import norm

from fx.metrics import check_level

MILLION = 1_000_000
LARGEST = MILLION + MILLION // 1000  # of a similarity, with rounding
STEP = 10_000  # the sweep over phi rises by 0.01
BUDGET = 100_000_000  # search steps per clique (some seconds) after which the largest clique found so far is taken
TIE_BUDGET = 2_000_000  # search steps per clique after which equally large cliques are no longer compared
ENUMERATED = 1_000_000  # maximal cliques beyond which the rule `published` skips a phi
RULES = ("paper", "published", "tightest", "peaks")


@dataclass(frozen=True)
class Extraction:
    """What a rule extracted from n generated images: one centre per clique, both as indices into the n images.

    threshold: the phi at which the rule ended, in [-1, 1] or one step of 0.01 beyond the highest similarity;
    proven: per clique, whether it was proven to be a largest one when it was removed (always, for the rule peaks);
    n_unproven: how many were not, of all cliques at all thresholds that the rule went through: those too decide where it
    ends. 0 means that the result is exactly the rule's.
    """

    cliques: tuple[tuple[int, ...], ...]
    centres: tuple[int, ...]
    threshold: float
    rule: str
    proven: tuple[bool, ...]
    n_unproven: int

    @property
    def n_extracted(self) -> int:
        """How many images were extracted: N0, unless the rule is published or phi was given."""
        return len(self.centres)


def extract(
    similarity: np.ndarray, n_training: int, rule: str = "paper", threshold: float | None = None, budget: int = BUDGET
) -> Extraction:
    """Extract N0 = `n_training` of n >= 2 generated images from their similarities [n, n] by one of four rules.

    paper: phi starts at the 25% quantile of all pairs, rounded down to 0.01, and rises by 0.01 until there are at least
        N0 cliques, single images included (Sec. 4.3 asks for exactly N0, a number that the sweep can jump over; the
        start is the published code's). The N0 largest are kept, among equally large ones those of highest similarity.
    published: the sweep of the published code, which keeps every clique of the phi at which it ends, so that more than
        N0 images may be extracted. That code enumerates all maximal cliques and skips a phi whose enumeration outlasts
        30 s on the clock; here a phi is skipped whose graph has more than ENUMERATED of them, on any machine. A phi that
        was given is not skipped.
    tightest: phi is the 75% quantile; of the cliques of 3 images or more, the N0 of highest mean internal similarity.
        If those are too few, the pairs follow (by similarity), then single images (by index). If all cliques together
        are too few, phi rises by 0.01 until they are enough.
    peaks: no cliques. The image with the highest mean of its 5 highest similarities is a centre, it and all images at
        least as similar to it as the 75% quantile are set aside (this group is reported in place of the clique), and so
        on. If the images are used up before N0 centres are found, phi rises by 0.01 and the search starts anew.

    threshold: a fixed phi in [-1, 1] instead of the rule's own. Then nothing rises, and fewer than N0 may be extracted.
    budget: search steps per clique, as in `largest_cliques`.

    Raises ValueError for another rule, for N0 outside 1..n and for a matrix that is not a similarity matrix.
    """
    if rule not in RULES:
        raise ValueError(f"Unknown rule '{rule}': choose one of {', '.join(RULES)}.")
    if threshold is not None and not -1 <= threshold <= 1:
        raise ValueError(f"phi is compared with similarities, which lie between -1 and 1; it is {threshold}.")
    phi = None if threshold is None else _phi(threshold)
    weights, budget = _millionths(similarity), _whole(budget, "budget", 1)
    if len(weights) < 2:
        raise ValueError(f"{len(weights)} generated images have no similarities to cluster: generate at least 2.")
    n_training = _whole(n_training, "n_training", 1, len(weights))
    grouping = _GROUPINGS[rule]
    if phi is None:
        phi = _start(weights, rule)
        groups, proven, n_unproven = grouping(weights, phi, n_training, budget)
        while len(groups) < n_training:
            phi += STEP
            groups, proven, more = grouping(weights, phi, n_training, budget)
            n_unproven += more
    elif rule == "published":
        groups, proven, n_unproven = _partition(weights, phi, len(weights), budget)
    else:
        groups, proven, n_unproven = grouping(weights, phi, n_training, budget)
    _warn(n_unproven, budget)
    centres = [group[0] if rule == "peaks" else _centre(weights, group) for group in groups]
    groups = [tuple(sorted(group)) for group in groups]
    return Extraction(tuple(groups), tuple(centres), phi / MILLION, rule, tuple(proven), n_unproven)


def extract_distinct(
    similarity: np.ndarray,
    n_training: int,
    strict: float,
    rule: str = "paper",
    threshold: float | None = None,
    budget: int = BUDGET,
) -> Extraction:
    """As `extract`, but where centres are copies of one another, further cliques are asked for in their place.

    As many more as copies were found, up to 2 N0 in all; of these attempts the one with the most centres that are no copies
    is taken, by `without_copies`. An extraction without copies is that of `extract`. strict: the similarity of copies.
    """
    wanted, best = n_training, None
    most = min(2 * n_training, len(similarity))
    while True:
        found = extract(similarity, wanted, rule, threshold, budget)
        apart = min(len(_apart(found, similarity, strict)), n_training)
        if best is None or apart > best[0]:
            best = apart, found
        if apart == n_training or found.n_extracted < wanted or wanted == most:
            break
        wanted = min(wanted + n_training - apart, most)
    _, found = best
    return without_copies(found, similarity, min(n_training, found.n_extracted), strict)


def _apart(extraction: Extraction, similarity: np.ndarray, strict: float) -> list[int]:
    """The places of the centres that are no copies of one before them that is none either."""
    alike = _millionths(similarity)[np.ix_(extraction.centres, extraction.centres)] >= _phi(strict)
    kept: list[int] = []
    for number in range(extraction.n_extracted):
        if not alike[number, kept].any():
            kept.append(number)
    return kept


def without_copies(extraction: Extraction, similarity: np.ndarray, n_training: int, strict: float) -> Extraction:
    """The first n_training of an extraction, in its order, where centres that are copies of one already kept come last.

    A centre is a copy of another where their similarity is at least `strict`, the similarity of copies (beyond the paper:
    a training image whose cliques are two would be extracted twice). Copies are kept only where the others do not suffice.
    ValueError for fewer cliques than n_training.
    """
    n_training = _whole(n_training, "n_training", 1, extraction.n_extracted)
    kept = _apart(extraction, similarity, strict)
    kept += sorted({*range(extraction.n_extracted)} - {*kept})
    cliques, centres, proven = (
        tuple(of[number] for number in kept[:n_training])
        for of in (extraction.cliques, extraction.centres, extraction.proven)
    )
    return replace(extraction, cliques=cliques, centres=centres, proven=proven)


def largest_cliques(
    similarity: np.ndarray, threshold: float, at_most: int | None = None, budget: int = BUDGET
) -> tuple[list[tuple[int, ...]], list[bool]]:
    """The greedy partition of the graph with an edge where `similarity` [n, n] >= `threshold`, largest clique first.

    Returns the cliques, and for each whether it was proven to be a largest one when it was removed. Every image belongs
    to one clique, which may be that image alone; `at_most` ends after that many cliques. Of equally large cliques the
    one with the highest sum of similarities is taken, then the one whose images are most similar to all images, then the
    one with the lowest indices. Two limits, both counted in search steps (above all vertices branched on or coloured) and
    never in seconds, keep hard graphs tractable:
    - after TIE_BUDGET, the best of the equally large cliques found so far is taken. The search order follows from the
      similarities, so this too is independent of the order of the images unless their rows have equal sums;
    - after `budget`, the clique may not be the largest. It is marked as unproven, and one warning counts such cliques.

    Raises ValueError for a matrix that is not a similarity matrix and for a threshold beyond -2..2.
    """
    weights, budget = _millionths(similarity), _whole(budget, "budget", 1)
    at_most = len(weights) if at_most is None else _whole(at_most, "at_most", 0)
    cliques, proven, n_unproven = _partition(weights, _phi(threshold), at_most, budget)
    _warn(n_unproven, budget)
    return cliques, proven


def count_maximal_cliques(similarity: np.ndarray, threshold: float, limit: int = ENUMERATED) -> int:
    """The number of maximal cliques of the graph of `largest_cliques`, or limit + 1 if there are more than `limit`."""
    weights, phi = _millionths(similarity), _phi(threshold)
    return _count(weights, phi, _whole(limit, "limit", 1)) if len(weights) else 0


def estimate_n_training(
    similarity: np.ndarray,
    threshold: float,
    smallest: int = 3,
    draws: int = 200,
    level: float = 0.95,
    seed: int = 0,
    budget: int = BUDGET,
) -> tuple[int, float, float]:
    """How many images a model was fine-tuned on, if nobody says: an estimate of N0 and its interval.

    An image that is generated again and again was learned, so the estimate is the number of cliques of at least `smallest`
    images at `threshold`, the similarity from which on two images are copies of each other (`copy_thresholds`). It cannot
    count training images that are never generated, and counts one twice whose copies fall apart into two groups. The
    interval says how much the number depends on the images that happened to be generated, nothing else: it is the
    estimate plus and minus normal quantiles of the delete-half jackknife (Shao and Wu, 1989), from `draws` random halves.
    budget: search steps per clique, as in `largest_cliques`.
    """
    check_level(level)
    weights, phi, budget = _millionths(similarity), _phi(threshold), _whole(budget, "budget", 1)
    smallest, draws = _whole(smallest, "smallest", 1), _whole(draws, "draws", 2)
    unproven = []

    def count(images: np.ndarray) -> int:
        cliques, _, n_unproven = _partition(weights[np.ix_(images, images)], phi, len(images), budget)
        unproven.append(n_unproven)
        return sum(len(clique) >= smallest for clique in cliques)

    if len(weights) < 2 * smallest:
        raise ValueError(f"An estimate takes at least {2 * smallest} generated images; there are {len(weights)}.")
    rng, n = np.random.default_rng(seed), len(weights)
    halves = [count(np.sort(rng.choice(n, n // 2, replace=False))) for _ in range(draws)]
    estimate = count(np.arange(n))
    _warn(sum(unproven), budget)
    reach = float(norm.isf((1 - level) / 2) * np.std(halves, ddof=1))
    return estimate, max(estimate - reach, 0.0), estimate + reach


def _millionths(similarity: np.ndarray) -> np.ndarray:
    """Check that `similarity` is a finite symmetric [n, n] matrix; return it as int32 millionths, diagonal 0.

    Works on a few rows at a time: nothing but the result is as large as the matrix.
    """
    similarity = np.asarray(similarity)
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ValueError(f"The similarity matrix must be square, not {similarity.shape}.")
    if similarity.dtype.kind not in "fiub":
        raise ValueError(f"The similarity matrix must hold real numbers, not {similarity.dtype}.")
    weights = np.empty(similarity.shape, dtype=np.int32)
    for start in range(0, len(similarity), 256):
        rows = similarity[start : start + 256] * np.float64(MILLION)
        if not (rows.max() <= 1.001 * MILLION and rows.min() >= -1.001 * MILLION):
            i, j = np.argwhere(~(np.abs(rows) <= 1.001 * MILLION))[0]
            why = "not a number: check their descriptors" if np.isnan(rows[i, j]) else "beyond -1..1"
            raise ValueError(f"The similarity of images {start + i} and {j} is {similarity[start + i, j]}, {why}.")
        weights[start : start + 256] = np.rint(rows, out=rows)
    for start in range(0, len(weights), 256):
        rows, columns = weights[start : start + 256, start:], weights[start:, start : start + 256].T
        apart = rows - columns
        if max(apart.max(), -apart.min()) > 2:
            i, j = start + np.argwhere(np.abs(apart) > 2)[0]
            raise ValueError(
                f"The similarity matrix is not symmetric: ({i}, {j}) is {similarity[i, j]}, ({j}, {i}) {similarity[j, i]}."
            )
        rows[...] = columns[...] = np.maximum(rows, columns)
    np.fill_diagonal(weights, 0)
    return weights


def _phi(threshold: float) -> int:
    """A threshold in millionths; beyond the range of a cosine, where every or no pair is joined, up to -2 and 2."""
    if not -2 <= threshold <= 2:
        raise ValueError(f"phi is compared with similarities, which lie between -1 and 1; it is {threshold}.")
    return round(float(threshold) * MILLION)


def _whole(value: int, name: str, least: int, most: int | None = None) -> int:
    """The value if it is a whole number in least..most; ValueError otherwise."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number; it is {value!r}.") from None
    if number < least or (most is not None and number > most):
        limits = f"at least {least}" if most is None else f"in {least}..{most}, the number of generated images"
        raise ValueError(f"{name} must be {limits}; it is {value}.")
    return number


def _warn(n_unproven: int, budget: int) -> None:
    if n_unproven:
        warnings.warn(
            f"{n_unproven} cliques may not be the largest: the search for each ended at {budget:,} steps. For a proof use "
            "a higher phi, fewer images or a higher budget.",
            stacklevel=3,
        )


def _quantile(weights: np.ndarray, share: float) -> float:
    """The quantile of all pairs of images, interpolated linearly."""
    n = len(weights)
    position = share * (n * (n - 1) // 2 - 1)
    low = int(position)
    first = _kth(weights, low)
    second = first if position == low else _kth(weights, low + 1)
    return float(first + (position - low) * (second - first))


def _kth(weights: np.ndarray, k: int, width: int = 1000) -> int:
    """The pair number k, from 0, of all pairs in rising order; counted in two rounds, so that no copy of them is held."""
    start, bins, size = -LARGEST, 2 * LARGEST // width + 1, width
    while True:
        counts = np.zeros(bins, np.int64)
        for i, row in enumerate(weights):
            places = (row[i + 1 :] - start) // size
            counts += np.bincount(places[(places >= 0) & (places < bins)], minlength=bins)
        upto = counts.cumsum()
        found = int(np.searchsorted(upto, k, side="right"))
        start += found * size
        if size == 1:
            return start
        k, bins, size = k - int(upto[found] - counts[found]), width, 1


def _start(weights: np.ndarray, rule: str) -> int:
    """Where phi starts, in millionths."""
    if rule in ("paper", "published"):
        return int(_quantile(weights, 0.25) // STEP) * STEP
    return round(_quantile(weights, 0.75))


Groups = tuple[list[tuple[int, ...]], list[bool], int]  # groups, whether each is proven, how many of all found are not


def _partition(weights: np.ndarray, phi: int, at_most: int, budget: int) -> Groups:
    from fx import clique_search

    search = clique_search.new_search(weights, phi)
    labels, proven = clique_search.partition(search, at_most, budget, TIE_BUDGET)
    cliques = [tuple(np.flatnonzero(labels == number).tolist()) for number in range(len(proven))]
    return cliques, proven.tolist(), int((~proven).sum())


def _published(weights: np.ndarray, phi: int, count: int, budget: int) -> Groups:
    """Every clique, none where the enumeration would be given up (with phi then rising)."""
    if _count(weights, phi, ENUMERATED) > ENUMERATED:
        return [], [], 0
    return _partition(weights, phi, len(weights), budget)


def _count(weights: np.ndarray, phi: int, limit: int) -> int:
    from fx import clique_search

    return clique_search.count_maximal_cliques(clique_search.new_search(weights, phi).rows, limit)


def _tightest(weights: np.ndarray, phi: int, count: int, budget: int) -> Groups:
    """The `count` cliques of rule `tightest`, all of them if they are fewer."""
    sums = weights.sum(axis=1, dtype=np.int64)

    def rank(found):
        clique, _ = found
        size, inside = len(clique), int(weights[np.ix_(clique, clique)].sum(dtype=np.int64))
        return -min(size, 3), -inside / max(size * (size - 1), 1), -sums[list(clique)].mean(), clique

    cliques, proven, n_unproven = _partition(weights, phi, len(weights), budget)
    kept = sorted(zip(cliques, proven, strict=True), key=rank)[:count]
    return [clique for clique, _ in kept], [proven for _, proven in kept], n_unproven


def _peaks(weights: np.ndarray, phi: int, count: int, budget: int) -> Groups:
    """Up to `count` groups of rule `peaks`: the centre first, then the images that it sets aside."""
    others = (np.delete(row, i) for i, row in enumerate(weights))
    score = np.array([(np.partition(row, -5)[-5:] if len(row) > 5 else row).sum(dtype=np.int64) for row in others])
    free, groups = np.ones(len(weights), bool), []
    for centre in np.lexsort((-weights.sum(axis=1, dtype=np.int64), -score)).tolist():
        if free[centre] and len(groups) < count:
            free[centre] = False
            near = np.flatnonzero(free & (weights[centre] >= phi))
            free[near] = False
            groups.append((centre, *near.tolist()))
    return groups, [True] * len(groups), 0


_GROUPINGS = {
    "paper": _partition,
    "published": _published,
    "tightest": _tightest,
    "peaks": _peaks,
}


def _centre(weights: np.ndarray, clique: tuple[int, ...]) -> int:
    """The image of highest mean similarity to its clique (Sec. 4.3), of several the one most similar to all images.

    That decides in every pair, where both images have the same mean.
    """
    members = np.sort(clique)
    inside, outside = (weights[members][:, columns].sum(axis=1, dtype=np.int64) for columns in (members, slice(None)))
    return int(members[np.lexsort((-outside, -inside))[0]])
