"""The compiled part of fx.cliques: largest cliques by a lazy exact branch and bound on bit rows.

Greedy colouring bounds a search as in BBMC (San Segundo et al., 2011). Vertices are numbered in reverse degeneracy order,
the one removed last first. A set of vertices is a row of 64-bit words: vertex v is bit v % 64 of word v // 64.

numba compiles a function when it is first called and keeps the result beside this file (or in NUMBA_CACHE_DIR). Its import
alone takes a second, so fx.cliques imports this module when it is first needed.
"""

from typing import NamedTuple

import numba
import numpy as np

SLACK = 8  # how much smaller cliques are sought than needed, which tightens bounds for later rounds,
PATIENCE = 50_000  # for this number of steps per vertex
ONE = np.uint64(1)
EMPTY = np.uint64(0)


class Search(NamedTuple):
    """What is known of a graph while cliques are removed from it; n vertices, rows of w words.

    rows uint64 [n, w]: the neighbours of each vertex; alive uint64 [w]: the vertices that are left;
    weights int32 [n, n]: similarities by image; order int64 [n]: the image of each vertex;
    bounds int64 [n]: never below the size of the largest clique that has v as its highest vertex. Removing vertices cannot
        invalidate a bound, so work done for one clique serves all later ones;
    known uint64 [n + 1, w] with sizes and totals int64 [n + 1]: the best clique with highest vertex v while it is whole
        (size 0: not known); row n is the best clique of all;
    steps int64 [1]: how many vertices were branched on or coloured for the present clique, a measure of the work done.
    """

    rows: np.ndarray
    alive: np.ndarray
    weights: np.ndarray
    order: np.ndarray
    bounds: np.ndarray
    known: np.ndarray
    sizes: np.ndarray
    totals: np.ndarray
    steps: np.ndarray


def new_search(rows: np.ndarray, weights: np.ndarray, order: np.ndarray, bounds: np.ndarray) -> Search:
    """The search before any clique is removed (shapes as in Search)."""
    n, words = rows.shape
    alive = np.zeros(words * 64, np.uint8)
    alive[:n] = 1
    return Search(
        rows,
        np.packbits(alive, bitorder="little").view(np.uint64),
        weights,
        order,
        bounds,
        known=np.zeros((n + 1, words), np.uint64),
        sizes=np.zeros(n + 1, np.int64),
        totals=np.zeros(n + 1, np.int64),
        steps=np.zeros(1, np.int64),
    )


@numba.njit(cache=True)
def partition(search: Search, at_most: int, budget: int, tie_budget: int) -> tuple:
    """Remove the largest clique until nothing, or `at_most` cliques, are left.

    Of equally large cliques the one of highest total weight is taken, then the one with the lowest images. After
    `tie_budget` steps for one clique, equally large ones are no longer sought; after `budget` the search for it ends.
    Returns int64 [n], the number of the clique that each image belongs to (-1: none), and bool [cliques], whether each
    was proven to be the largest.
    """
    n = len(search.rows)
    labels, proven = np.full(n, -1, np.int64), np.zeros(n, np.bool_)
    count, left = 0, n
    while left > 0 and count < at_most:
        proven[count] = find_largest(search, budget, tie_budget)
        clique = search.known[n]
        labels[search.order[vertices_of(clique)]] = count
        for v in range(n):
            if search.sizes[v] > 0 and meet(search.known[v], clique):
                search.sizes[v] = 0
        search.alive[:] &= ~clique
        left -= search.sizes[n]
        count += 1
    return labels, proven[:count]


@numba.njit(cache=True)
def find_largest(search: Search, budget: int, tie_budget: int) -> bool:
    """Put the preferred largest clique into the last row of `known`; whether it is proven to be a largest one."""
    n = len(search.rows)
    search.sizes[n] = search.totals[n] = search.steps[0] = 0
    level = 0
    for v in range(n):
        if contains(search.alive, v):
            level = max(level, search.bounds[v])
            if search.sizes[v] > 0:
                keep_preferred(search, search.known[v], search.sizes[v], search.totals[v], n)
    while level >= sought(search, search.sizes[n], tie_budget):
        for v in range(n):
            if search.bounds[v] != level or search.sizes[v] > 0 or not contains(search.alive, v):
                continue
            if level < sought(search, search.sizes[n], tie_budget):
                break
            finished = search_from(search, v, budget, tie_budget)
            if search.sizes[v] > 0:
                keep_preferred(search, search.known[v], search.sizes[v], search.totals[v], n)
            if not finished:
                search.sizes[v] = 0  # its bound stands: another clique may be larger
                return False
        level -= 1
    return True


@numba.njit(cache=True)
def sought(search: Search, size: int, tie_budget: int) -> int:
    """The least size of interest when a clique of `size` is known: the same while ties are compared."""
    return max(1, size + (1 if search.steps[0] > tie_budget else 0))


@numba.njit(cache=True)
def search_from(search: Search, first: int, budget: int, tie_budget: int) -> bool:
    """Put the best clique with highest vertex `first`, if it is of interest, into its row of `known`; tighten its bound.

    Returns whether that was finished within the budget.
    """
    candidates = search.rows[first] & search.alive
    keep_below(candidates, first)
    missing = sought(search, search.sizes[-1], tie_budget) - 1
    coloured, colours = colour(candidates, search.rows, missing - 1, np.empty_like(candidates))
    search.steps[0] += coloured
    if missing > 0 and colours < missing and coloured == size_of(candidates):
        search.bounds[first] = min(search.bounds[first], colours + 1)
        return True
    size, finished = search_among(search, first, vertices_of(candidates), budget, tie_budget)
    if finished and search.sizes[first] == size:
        search.bounds[first] = size
    elif finished:
        search.sizes[first] = 0
        search.bounds[first] = min(search.bounds[first], sought(search, size, tie_budget) - 1)
    return finished


@numba.njit(cache=True)
def search_among(search: Search, first: int, members, budget: int, tie_budget: int) -> tuple:
    """Search the cliques of `first` and its neighbours `members`, depth first, for the preferred of those of interest.

    The members are renumbered, so that their rows are short. At each depth there is a set of candidates and those of them
    that are worth branching on. Returns the size above which nothing is left, and whether the search was finished.
    """
    rows = rows_among(search.rows, members)
    best, patience = search.sizes[-1], search.steps[0] + PATIENCE
    size, depth, depths = max(best - SLACK, 0), 0, search.bounds[first] + 1
    sets, branches = np.zeros((depths, rows.shape[1]), np.uint64), np.zeros((depths, rows.shape[1]), np.uint64)
    wanted, chosen = np.full(depths, -1, np.int64), np.full(depths, first, np.int64)
    for i in range(len(members)):
        add(sets[0], i)
    while depth >= 0:
        if search.steps[0] > patience:
            size = max(size, best)
        missing = max(sought(search, size, tie_budget) - depth - 1, 0)
        if missing == 0 and last_of(sets[depth]) < 0:
            offer(search, chosen[: depth + 1], first)
            size = max(size, depth + 1)
            depth -= 1
            continue
        if wanted[depth] != missing:
            wanted[depth] = missing
            search.steps[0] += colour(sets[depth], rows, missing - 1, branches[depth])[0]
        i = last_of(branches[depth])
        if i < 0:
            depth -= 1
            continue
        if search.steps[0] >= budget:
            return size, False
        search.steps[0] += 1
        remove(branches[depth], i)
        remove(sets[depth], i)
        depth += 1
        chosen[depth], wanted[depth] = members[i], -1
        sets[depth] = sets[depth - 1] & rows[i]
    return size, True


@numba.njit(cache=True)
def colour(candidates, rows, limit: int, rest) -> tuple:
    """Colour candidates greedily with at most `limit` colours, no two of one colour being joined; `rest` are the others.

    A clique takes one vertex of each colour at most, so one of more than `limit` vertices has a vertex of the rest.
    Returns how many vertices and how many colours.
    """
    rest[:] = candidates
    same = np.empty_like(rest)
    coloured = 0
    for colours in range(limit):
        same[:] = rest
        before = coloured
        for word in range(len(same)):
            while same[word] != EMPTY:
                coloured += 1
                v = 64 * word + lowest(same[word])
                remove(rest, v)
                remove(same, v)
                for later in range(word, len(same)):
                    same[later] &= ~rows[v, later]
        if coloured == before:
            return coloured, colours
    return coloured, max(limit, 0)


@numba.njit(cache=True)
def vertices_of(row):
    """The vertices of a set, ascending."""
    vertices = np.empty(size_of(row), np.int64)
    count = 0
    for v in range(64 * len(row)):
        if contains(row, v):
            vertices[count] = v
            count += 1
    return vertices


@numba.njit(cache=True)
def rows_among(rows, members):
    """Which of the vertices `members` are joined, as bit rows over their positions."""
    n = len(members)
    among = np.zeros((n, (n + 63) // 64), np.uint64)
    for i in range(n):
        row, mine = rows[members[i]], among[i]
        for j in range(n):
            if contains(row, members[j]):
                add(mine, j)
    return among


@numba.njit(cache=True)
def offer(search: Search, vertices, slot: int) -> None:
    """Keep the clique of these vertices in row `slot` of `known` if it is preferred to the one there."""
    clique = np.zeros(search.rows.shape[1], np.uint64)
    total = np.int64(0)
    for i in range(len(vertices)):
        add(clique, vertices[i])
        for j in range(i):
            total += search.weights[search.order[vertices[i]], search.order[vertices[j]]]
    keep_preferred(search, clique, len(vertices), total, slot)


@numba.njit(cache=True)
def keep_preferred(search: Search, clique, size: int, total: int, slot: int) -> None:
    """Put a clique into row `slot` of `known` if it is larger, then heavier, then of lower images than the one there."""
    if size < search.sizes[slot] or (size == search.sizes[slot] and total < search.totals[slot]):
        return
    if size == search.sizes[slot] and total == search.totals[slot]:
        one = np.sort(search.order[vertices_of(clique)])
        other = np.sort(search.order[vertices_of(search.known[slot])])
        for i in range(size):
            if one[i] != other[i]:
                if one[i] > other[i]:
                    return
                break
    search.known[slot] = clique
    search.sizes[slot], search.totals[slot] = size, total


@numba.njit(cache=True)
def count_maximal_cliques(rows, limit: int) -> int:
    """How many maximal cliques a graph has, or limit + 1 if they are more (Bron and Kerbosch; pivot of Tomita et al.)."""
    n, words = rows.shape
    candidates, done = np.zeros((n + 1, words), np.uint64), np.zeros((n + 1, words), np.uint64)
    branches = np.zeros((n + 1, words), np.uint64)
    for v in range(n):
        add(candidates[0], v)
    apart_from_pivot(candidates[0], done[0], rows, branches[0])
    count, depth = 0, 0
    while depth >= 0 and count <= limit:
        v = last_of(branches[depth])
        if v < 0:
            depth -= 1
            continue
        candidates[depth + 1] = candidates[depth] & rows[v]
        done[depth + 1] = done[depth] & rows[v]
        remove(branches[depth], v)
        remove(candidates[depth], v)
        add(done[depth], v)
        depth += 1
        if last_of(candidates[depth]) < 0:
            count += last_of(done[depth]) < 0
            depth -= 1
        else:
            apart_from_pivot(candidates[depth], done[depth], rows, branches[depth])
    return count


@numba.njit(cache=True)
def apart_from_pivot(candidates, done, rows, branches) -> None:
    """Into `branches`: the candidates not joined to the vertex of either set that is joined to most candidates."""
    most, pivot = -1, 0
    for u in range(len(rows)):
        if contains(candidates, u) or contains(done, u):
            joined = size_of(candidates & rows[u])
            if joined > most:
                most, pivot = joined, u
    branches[:] = candidates & ~rows[pivot]


@numba.njit(cache=True)
def popcount(word) -> int:
    """The number of bits set in a 64-bit word."""
    word -= (word >> np.uint64(1)) & np.uint64(0x5555555555555555)
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((word * np.uint64(0x0101010101010101)) >> np.uint64(56))


@numba.njit(cache=True)
def size_of(row) -> int:
    total = 0
    for word in row:
        total += popcount(word)
    return total


@numba.njit(cache=True)
def lowest(word) -> int:
    """The number of the lowest bit set in a word that is not zero."""
    return popcount((word & (~word + ONE)) - ONE)


@numba.njit(cache=True)
def last_of(row) -> int:
    """The highest vertex of a set, -1 if it is empty."""
    for index in range(len(row) - 1, -1, -1):
        word = row[index]
        if word != EMPTY:
            for shift in (1, 2, 4, 8, 16, 32):
                word |= word >> np.uint64(shift)
            return 64 * index + popcount(word) - 1
    return -1


@numba.njit(cache=True)
def contains(row, v: int) -> bool:
    return (row[v >> 6] >> np.uint64(v & 63)) & ONE != EMPTY


@numba.njit(cache=True)
def meet(one, other) -> bool:
    """Whether two sets have a vertex in common."""
    common = EMPTY
    for i in range(len(one)):
        common |= one[i] & other[i]
    return common != EMPTY


@numba.njit(cache=True)
def add(row, v: int) -> None:
    row[v >> 6] |= ONE << np.uint64(v & 63)


@numba.njit(cache=True)
def remove(row, v: int) -> None:
    row[v >> 6] &= ~(ONE << np.uint64(v & 63))


@numba.njit(cache=True)
def keep_below(row, v: int) -> None:
    """Keep the vertices of a set that are lower than v."""
    row[v >> 6] &= (ONE << np.uint64(v & 63)) - ONE
    row[(v >> 6) + 1 :] = EMPTY
