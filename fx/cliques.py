"""From similarities of generated images to extracted images (Sec. 4.3).

Images i and j are joined when sim(i, j) >= phi; the largest clique is removed again and again, and each clique's
central image is extracted. Only the largest clique is ever needed, so the (exponentially many) others are not
enumerated: a lazy branch and bound on bit rows finds it (greedy colouring bounds as in San Segundo et al., 2011).

All comparisons are made on similarities rounded to integer millionths, so results do not depend on the last bits of
floating-point sums.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

MILLION = 1_000_000
STEP = 10_000  # the sweep over phi rises by 0.01
TIE_NODES = 20_000  # search nodes per clique after which equally large cliques are no longer compared
NODES = 250_000  # search nodes per clique (some seconds) after which the largest clique found so far is taken
RULES = ("paper", "tightest", "peaks")


@dataclass(frozen=True)
class Extraction:
    """What a rule extracted from n generated images: one centre per clique, both as indices into the n images.

    threshold: the phi at which the rule ended, in [-1, 1] or one step of 0.01 beyond the highest similarity.
    """

    cliques: tuple[tuple[int, ...], ...]
    centres: tuple[int, ...]
    threshold: float
    rule: str


def extract(similarity: np.ndarray, n_training: int, rule: str = "paper") -> Extraction:
    """Extract N0 = `n_training` of n >= 2 generated images from their similarities [n, n] by one of three rules.

    paper: phi starts at the 25% quantile of all pairs, rounded down to 0.01, and rises by 0.01 until there are at least
        N0 cliques, single images included (Sec. 4.3 asks for exactly N0, a number that the sweep can jump over; the
        start is the published code's). The N0 largest are kept, among equally large ones those of highest similarity.
    tightest: phi is the 75% quantile; of the cliques of 3 images or more, the N0 of highest mean internal similarity.
        If those are too few, the pairs follow (by similarity), then single images (by index). If all cliques together
        are too few, phi rises by 0.01 until they are enough.
    peaks: no cliques. The image with the highest mean of its 5 highest similarities is a centre, it and all images at
        least as similar to it as the 75% quantile are set aside (this group is reported in place of the clique), and so
        on. If the images are used up before N0 centres are found, phi rises by 0.01 and the search starts anew.

    Raises ValueError for another rule, for N0 outside 1..n and for a matrix that is not a similarity matrix.
    """
    weights = _millionths(similarity)
    if rule not in RULES:
        raise ValueError(f"Unknown rule '{rule}': choose one of {', '.join(RULES)}.")
    if not 1 <= n_training <= len(weights):
        raise ValueError(
            f"n_training must lie in 1..{len(weights)}, the number of generated images; it is {n_training}."
        )
    if len(weights) < 2:
        raise ValueError("One generated image has no similarities to cluster: generate at least 2.")
    pairs = weights[np.triu_indices(len(weights), 1)]
    phi = int(np.quantile(pairs, 0.25) // STEP) * STEP if rule == "paper" else round(np.quantile(pairs, 0.75))
    groups = _GROUPINGS[rule](weights, phi, n_training)
    while len(groups) < n_training:
        phi += STEP
        groups = _GROUPINGS[rule](weights, phi, n_training)
    centres = [group[0] if rule == "peaks" else _centre(weights, group) for group in groups]
    return Extraction(tuple(tuple(sorted(group)) for group in groups), tuple(centres), phi / MILLION, rule)


def largest_cliques(similarity: np.ndarray, threshold: float, at_most: int | None = None) -> list[tuple[int, ...]]:
    """The greedy partition of the graph with an edge where `similarity` [n, n] >= `threshold`, largest clique first.

    Every image belongs to one clique, which may be that image alone; `at_most` ends after that many cliques. Of equally
    large cliques the one with the highest sum of similarities is taken, then the one with the lowest indices. Two
    limits, both counted in search nodes and never in seconds, keep hard graphs tractable:
    - after TIE_NODES, the best of the equally large cliques found so far is taken. The search order follows from the
      similarities, so this too is independent of the order of the images unless their rows have equal sums;
    - after NODES, the clique may not be the largest, and one warning counts the cliques concerned.
    """
    weights = _millionths(similarity)
    return _partition(weights, round(threshold * MILLION), at_most)


def _millionths(similarity: np.ndarray) -> np.ndarray:
    """Check that `similarity` is a finite symmetric [n, n] matrix; return it as integer millionths, diagonal 0."""
    similarity = np.asarray(similarity, dtype=np.float64)
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ValueError(f"The similarity matrix must be square, not {similarity.shape}.")
    if not np.isfinite(similarity).all():
        i, j = np.argwhere(~np.isfinite(similarity))[0]
        raise ValueError(f"The similarity of images {i} and {j} is {similarity[i, j]}: check their descriptors.")
    gap = np.abs(similarity - similarity.T)
    if gap.max(initial=0) > 2e-6:
        i, j = np.unravel_index(gap.argmax(), gap.shape)
        raise ValueError(f"The similarity matrix is not symmetric: entries ({i}, {j}) and ({j}, {i}) differ.")
    upper = np.triu(np.rint(similarity * MILLION).astype(np.int64), 1)
    return upper + upper.T


def _partition(weights: np.ndarray, phi: int, at_most: int | None) -> list[tuple[int, ...]]:
    search = _Search(weights, phi)
    cliques, unproven = [], 0
    while search.alive and (at_most is None or len(cliques) < at_most):
        clique, proven = search.remove_largest()
        cliques.append(clique)
        unproven += not proven
    if unproven:
        warnings.warn(
            f"{unproven} of {len(cliques)} cliques at phi = {phi / MILLION:.2f} may not be the largest: "
            f"the search ended at {NODES:,} nodes each. Use a higher phi or fewer images for a proof.",
            stacklevel=3,
        )
    return cliques


def _tightest(weights: np.ndarray, phi: int, count: int) -> list[tuple[int, ...]]:
    """The `count` cliques of rule `tightest`, all of them if they are fewer."""

    def rank(clique):
        size, inside = len(clique), int(weights[np.ix_(clique, clique)].sum())
        return -min(size, 3), -inside / max(size * (size - 1), 1), clique

    return sorted(_partition(weights, phi, None), key=rank)[:count]


def _peaks(weights: np.ndarray, phi: int, count: int) -> list[tuple[int, ...]]:
    """Up to `count` groups of rule `peaks`: the centre first, then the images that it sets aside."""
    others = weights - 2 * MILLION * np.eye(len(weights), dtype=np.int64)  # below any similarity: no image is its own
    score = np.sort(others, axis=1)[:, 1:][:, -5:].mean(axis=1)
    free, groups = np.ones(len(weights), bool), []
    while free.any() and len(groups) < count:
        centre = int(np.argmax(np.where(free, score, -np.inf)))
        near = np.flatnonzero(free & (others[centre] >= phi))
        groups.append((centre, *near.tolist()))
        free[[centre, *near]] = False
    return groups


_GROUPINGS = {"paper": _partition, "tightest": _tightest, "peaks": _peaks}


def _centre(weights: np.ndarray, clique: tuple[int, ...]) -> int:
    """The image of highest mean similarity to its clique (Sec. 4.3), the lowest index of several.

    In a pair both images have the same mean, so the one with the lower index is its centre.
    """
    members = sorted(clique)
    return members[int(weights[np.ix_(members, members)].sum(axis=1).argmax())]


class _Search:
    """Lazy search for the largest clique of a graph from which cliques are removed.

    Vertices are renumbered in degeneracy order and a set of them is an int with one bit each. `bounds[v]` is never
    below the size of the largest clique whose first vertex is v. Removing vertices cannot invalidate it, so work done
    for one clique serves all later ones. `known[v]` is the best clique with first vertex v while it is intact. A clique
    is held as (size, sum of similarities, negated indices, vertices): the greatest tuple is the preferred clique.
    """

    def __init__(self, weights: np.ndarray, phi: int):
        joined = (weights >= phi) & ~np.eye(len(weights), dtype=bool)
        self.order, later = _degeneracy_order(joined, weights.sum(axis=1))
        self.weights = weights[np.ix_(self.order, self.order)]
        rows = np.packbits(joined[np.ix_(self.order, self.order)], axis=1, bitorder="little")
        self.alive = (1 << len(rows)) - 1
        self.joined = [int.from_bytes(row.tobytes(), "little") for row in rows]
        self.apart = [self.alive ^ row ^ (1 << v) for v, row in enumerate(self.joined)]
        self.bounds = [degree + 1 for degree in later]
        self.known = {}
        self.nodes = 0

    def remove_largest(self) -> tuple[tuple[int, ...], bool]:
        """Remove the largest clique; return its images in ascending order and whether it is proven the largest."""
        self.nodes, proven = 0, True
        self.known = {v: c for v, c in self.known.items() if all(self.alive >> u & 1 for u in c[3])}
        best = max([self.greedy_clique(), *self.known.values()])
        for v in sorted(_bits(self.alive), key=lambda v: (-self.bounds[v], -v)):
            if not proven or self.bounds[v] < best[0] + (self.nodes > TIE_NODES):
                break
            if v not in self.known:
                found, proven = self.best_clique_from(v, best[0])
                if proven:
                    self.note(v, found, best[0])
                best = max(best, found or best)
        for v in best[3]:
            self.alive ^= 1 << v
        return tuple(sorted(self.order[v] for v in best[3])), proven

    def note(self, v: int, found: tuple | None, size: int) -> None:
        """Keep the result of a finished search from v: `found`, or no clique of `size` (larger, once ties are cut)."""
        if found:
            self.known[v], self.bounds[v] = found, found[0]
        else:
            self.bounds[v] = min(self.bounds[v], size - (self.nodes <= TIE_NODES))

    def greedy_clique(self) -> tuple:
        """A large clique to start from: a quick dive from every vertex, and a careful one from the ten best of them."""
        dives = sorted((self.dive(v, careful=False) for v in _bits(self.alive)), key=len, reverse=True)
        return max(map(self.describe, dives[:1] + [self.dive(dive[0], careful=True) for dive in dives[:10]]))

    def dive(self, v: int, careful: bool) -> list[int]:
        """Extend v to a maximal clique: by the last vertex in order, or carefully by the one that keeps most others."""
        chosen, candidates = [v], self.joined[v] & self.alive
        while candidates:
            if careful:
                _, v = max(((self.joined[u] & candidates).bit_count(), u) for u in _bits(candidates))
            else:
                v = candidates.bit_length() - 1
            chosen.append(v)
            candidates &= self.joined[v]
        return chosen

    def best_clique_from(self, first: int, size: int) -> tuple[tuple | None, bool]:
        """The best clique of at least `size` with first vertex `first`, if any, and whether the search was finished.

        After TIE_NODES nodes only cliques larger than the largest so far are sought.
        """
        found, chosen = None, [first]
        frames = [self.frame(self.joined[first] >> first + 1 << first + 1 & self.alive, size - 1)]
        while frames:
            candidates, branches = frames[-1]
            missing = size + (self.nodes > TIE_NODES) - len(chosen)
            if not candidates and missing <= 0:
                clique = self.describe(chosen)
                found, size = max(found or clique, clique), clique[0]
            if not branches or branches[-1][1] < missing:
                frames.pop()
                chosen.pop()
                continue
            if self.nodes >= NODES:
                return found, False
            self.nodes += 1
            v, _ = branches.pop()
            frames[-1][0] ^= 1 << v
            chosen.append(v)
            frames.append(self.frame(candidates & self.joined[v], missing - 1))
        return found, True

    def frame(self, candidates: int, missing: int) -> list:
        """[candidates, branches]: the candidates (vertex, colour) worth adding when `missing` more vertices are needed.

        Candidates are coloured greedily, no two of a colour being joined, so a clique among those up to colour k has at
        most k vertices. Those of a colour below `missing` are left out. The last branch has the highest colour.
        """
        branches, uncoloured, colour = [], candidates, 0
        while uncoloured:
            colour += 1
            independent = uncoloured
            while independent:
                v = independent.bit_length() - 1
                independent &= self.apart[v]
                uncoloured ^= 1 << v
                if colour >= missing:
                    branches.append((v, colour))
        return [candidates, branches]

    def describe(self, vertices: list[int]) -> tuple:
        """A clique as the tuple described above."""
        total = int(self.weights[np.ix_(vertices, vertices)].sum()) // 2
        return len(vertices), total, tuple(sorted((-self.order[v] for v in vertices), reverse=True)), tuple(vertices)


def _degeneracy_order(joined: np.ndarray, sums: np.ndarray) -> tuple[list[int], list[int]]:
    """Vertices in the order of removal of the one of lowest degree (ties: `sums`, then index), and its degree then."""
    n = len(joined)
    key = joined.sum(axis=1) + np.argsort(np.argsort(sums, kind="stable")) / max(n, 1)
    order, degrees = [], []
    for _ in range(n):
        v = int(key.argmin())
        order.append(v)
        degrees.append(int(key[v]))
        key -= joined[v]
        key[v] = np.inf
    return order, degrees


def _bits(members: int) -> Iterator[int]:
    """The positions of the bits set in `members`, highest first."""
    while members:
        v = members.bit_length() - 1
        members ^= 1 << v
        yield v
