"""The compiled part of fx.cliques: largest cliques by a lazy exact branch and bound on bit rows.

Greedy colouring bounds a search as in BBMC (San Segundo et al., 2011). Vertices are numbered in reverse degeneracy order,
the one removed last first. A set of vertices is a row of 64-bit words: vertex v is bit v % 64 of word v // 64.

numba compiles a function when it is first called and keeps the result beside this file (or in NUMBA_CACHE_DIR). Its import
alone takes some tenths of a second, so fx.cliques imports this module when it is first needed.
"""

from typing import NamedTuple

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

ONE = np.uint64(1)
EMPTY = np.uint64(0)


def compiled(function):
    """Have numba compile the function, and keep the result on disk where a folder for that can be written."""
    try:
        return numba.njit(cache=True)(function)
    except RuntimeError:  # numba found no such folder
        return numba.njit(function)


class Search(NamedTuple):
    """What is known of a graph while cliques are removed from it; n vertices, rows of w words.

    rows uint64 [n, w]: the neighbours of each vertex; alive uint64 [w]: the vertices that are left;
    weights int32 [n, n]: similarities by image; sums int64 [n]: their sum over all other images; order int64 [n]: the image
        of each vertex;
    bounds int64 [n]: never below the size of the largest clique that has v as its highest vertex. Removing vertices cannot
        invalidate a bound, so work done for one clique serves all later ones;
    known uint64 [n + 1, w] with sizes and totals int64 [n + 1]: the best clique with highest vertex v while it is whole
        (size 0: not known); row n is the best clique of all;
    steps int64 [1]: how many vertices were branched on or coloured for the present clique (and a 16th of the similarities
        that were added up), a measure of the work done.
    """

    rows: np.ndarray
    alive: np.ndarray
    weights: np.ndarray
    sums: np.ndarray
    order: np.ndarray
    bounds: np.ndarray
    known: np.ndarray
    sizes: np.ndarray
    totals: np.ndarray
    steps: np.ndarray


@compiled
def new_search(weights: np.ndarray, phi: int) -> Search:
    """The search before any clique is removed, for the graph with an edge where weights [n, n] >= phi."""
    n = len(weights)
    order, bounds, sums = degeneracy_order(weights, phi)
    rows = np.zeros((n, (n + 63) // 64), np.uint64)
    for v in range(n):
        for u in range(v):
            if weights[order[v], order[u]] >= phi:
                rows[v, u >> 6] |= ONE << np.uint64(u & 63)
                rows[u, v >> 6] |= ONE << np.uint64(v & 63)
    alive = np.zeros(rows.shape[1], np.uint64)
    for v in range(n):
        add(alive, v)
    known = np.zeros((n + 1, rows.shape[1]), np.uint64)
    sizes, totals, steps = np.zeros(n + 1, np.int64), np.zeros(n + 1, np.int64), np.zeros(1, np.int64)
    return Search(rows, alive, weights, sums, order, bounds, known, sizes, totals, steps)


@compiled
def degeneracy_order(weights: np.ndarray, phi: int) -> tuple:
    """Images in reverse order of removal of the one of lowest degree, one more than its degree then, and the images' sums.

    Of several of the lowest degree the one whose similarities have the lowest sum is removed, then the lowest index.
    """
    n = len(weights)
    degrees, sums = np.zeros(n, np.int64), np.zeros(n, np.int64)
    for i in range(n):
        for j in range(n):
            degrees[i] += weights[i, j] >= phi
            sums[i] += weights[i, j]
        degrees[i] -= weights[i, i] >= phi
        sums[i] -= weights[i, i]
    left, order, bounds = np.arange(n), np.zeros(n, np.int64), np.zeros(n, np.int64)
    for position in range(n - 1, -1, -1):
        at = 0
        for place in range(1, position + 1):
            i, lowest_one = left[place], left[at]
            if degrees[i] < degrees[lowest_one] or (degrees[i] == degrees[lowest_one] and sums[i] < sums[lowest_one]):
                at = place
        removed = left[at]
        order[position], bounds[position] = removed, degrees[removed] + 1
        for place in range(at, position):
            left[place] = left[place + 1]
        for place in range(position):
            degrees[left[place]] -= weights[removed, left[place]] >= phi
    return order, bounds, sums


@compiled
def partition(search: Search, at_most: int, budget: int, tie_budget: int) -> tuple:
    """Remove the largest clique until nothing, or `at_most` cliques, are left.

    Of equally large cliques the one of highest total weight is taken, then the one whose images are most similar to all
    images, then the one with the lowest images. After
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


@compiled
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
    while level >= least(search.sizes[n], search.steps[0] > tie_budget):
        for v in range(n):
            if search.bounds[v] == level and search.sizes[v] == 0 and contains(search.alive, v):
                if level < least(search.sizes[n], search.steps[0] > tie_budget):
                    break
                if not search_from(search, v, budget, tie_budget):
                    return False
        level -= 1
    return True


@compiled
def least(size: int, larger: bool) -> int:
    """The least size of interest when a clique of `size` is known: a larger one, or an equally large one too."""
    return max(size + larger, 1)


@compiled
def search_from(search: Search, first: int, budget: int, tie_budget: int) -> bool:
    """Search the cliques with highest vertex `first` for one preferred to the best; tighten the bound of `first`.

    Returns whether that was finished within the budget.
    """
    n = len(search.rows)
    sets, branches = np.zeros((1, search.rows.shape[1]), np.uint64), np.zeros((2, search.rows.shape[1]), np.uint64)
    sets[0] = search.rows[first] & search.alive
    keep_below(sets[0], first)
    missing = least(search.sizes[n], search.steps[0] > tie_budget) - 1
    coloured, colours = colour(sets, 0, search.rows, missing - 1, branches)
    search.steps[0] += coloured
    if colours < missing and last_of(branches[0]) < 0:
        search.bounds[first] = min(search.bounds[first], colours + 1)
        return True
    size, finished = search_among(search, first, vertices_of(sets[0]), budget, tie_budget)
    found, exact = search.sizes[first], search.steps[0] <= tie_budget
    if found > 0:
        keep_preferred(search, search.known[first], found, search.totals[first], n)
    if found < size or not finished or not exact:
        search.sizes[first] = 0  # there may be a larger or heavier one
    if finished:
        search.bounds[first] = size if found == size else min(search.bounds[first], least(size, not exact) - 1)
    return finished


@compiled
def search_among(search: Search, first: int, members, budget: int, tie_budget: int) -> tuple:
    """Search the cliques of `first` and its neighbours `members`, depth first, for the preferred of those of interest.

    The members are renumbered, so that their rows are short. At each depth there is a set of candidates and those of them
    that are worth branching on. Returns the size above which nothing is left, and whether the search was finished.
    """
    rows, order, weights, n = rows_among(search.rows, members), search.order, search.weights, len(search.rows)
    words, depths = rows.shape[1], min(search.bounds[first], len(members) + 1) + 1
    sets, branches = np.zeros((depths, words), np.uint64), np.zeros((depths + 1, words), np.uint64)
    wanted, chosen, images = np.full(depths, -1, np.int64), np.full(depths, first), np.full(depths, order[first])
    for i in range(len(members)):
        add(sets[0], i)
    steps, size, depth, found, heaviest = search.steps[0], search.sizes[n], 0, 0, 0
    while depth >= 0 and (steps < budget or size == 0):  # the first clique is always found
        missing = max(least(size, steps > tie_budget) - depth - 1, 0)
        if wanted[depth] != missing:
            wanted[depth] = missing
            steps += colour(sets, depth, rows, missing - 1, branches)[0]
        i = last_in(branches, depth)
        if i >= 0:
            steps += 1
            branches[depth, i >> 6] ^= ONE << np.uint64(i & 63)
            sets[depth, i >> 6] ^= ONE << np.uint64(i & 63)
            candidates = 0
            for word in range(words):
                sets[depth + 1, word] = sets[depth, word] & rows[i, word]
                candidates += popcount(sets[depth + 1, word])
            if candidates >= missing - 1:
                depth += 1
                chosen[depth], images[depth], wanted[depth] = members[i], order[members[i]], -1
            continue
        if missing == 0 and last_in(sets, depth) < 0:
            total = 0
            steps += depth * (depth + 1) // 32
            for one in range(depth + 1):
                for other in range(one):
                    total += weights[images[one], images[other]]
            if depth + 1 > found or total >= heaviest:
                size = found = depth + 1
                heaviest = total
                clique = np.zeros(search.rows.shape[1], np.uint64)
                for one in range(found):
                    add(clique, chosen[one])
                keep_preferred(search, clique, found, total, first)
        depth -= 1
    search.steps[0] = steps
    return size, depth < 0


@compiled
def colour(sets, at: int, rows, limit: int, branches) -> tuple:
    """Colour the vertices of sets[at] greedily, no two of one colour being joined, until there are `limit` colours.

    A clique has one vertex of each colour at most, so one of more than `limit` vertices has a vertex that is left without
    colour: those go into branches[at]. The last row of `branches` is scratch space. Returns how many vertices were
    coloured, and with how many colours.
    """
    words, scratch, start = sets.shape[1], len(branches) - 1, 0
    coloured, colours, left = 0, 0, 0
    for word in range(words):
        branches[at, word] = sets[at, word]
        left += popcount(sets[at, word])
    if left <= limit:
        coloured, colours, left = left, left, 0
        for word in range(words):
            branches[at, word] = EMPTY
    while left > 0 and colours < limit:
        while branches[at, start] == EMPTY:
            start += 1
        for word in range(start, words):
            branches[scratch, word] = branches[at, word]
        for word in range(start, words):
            free, taken = branches[scratch, word], EMPTY
            while free != EMPTY:
                left -= 1
                coloured += 1
                bit = lowest(free)
                v = 64 * word + bit
                taken |= ONE << np.uint64(bit)
                free &= ~(rows[v, word] | ONE << np.uint64(bit))
                for later in range(word + 1, words):
                    branches[scratch, later] &= ~rows[v, later]
            branches[at, word] ^= taken
        colours += 1
    return coloured, colours


@compiled
def vertices_of(row):
    """The vertices of a set, ascending."""
    vertices = np.empty(size_of(row), np.int64)
    count = 0
    for word in range(len(row)):
        left = row[word]
        while left != EMPTY:
            vertices[count] = 64 * word + lowest(left)
            left &= left - ONE
            count += 1
    return vertices


@compiled
def rows_among(rows, members):
    """Which of the vertices `members`, ascending, are joined, as bit rows over their positions."""
    n = len(members)
    among, before = np.zeros((n, (n + 63) // 64), np.uint64), np.zeros(rows.shape[1], np.uint64)
    position = np.empty(64 * rows.shape[1], np.int64)
    for i in range(n):
        v = members[i]
        for word in range((v >> 6) + 1):
            joined = rows[v, word] & before[word]
            while joined != EMPTY:
                j = position[64 * word + lowest(joined)]
                joined &= joined - ONE
                among[i, j >> 6] |= ONE << np.uint64(j & 63)
                among[j, i >> 6] |= ONE << np.uint64(i & 63)
        add(before, v)
        position[v] = i
    return among


@compiled
def keep_preferred(search: Search, clique, size: int, total: int, slot: int) -> None:
    """Put a clique into row `slot` of `known` if it is preferred (see `partition`) to the one there."""
    if size < search.sizes[slot] or (size == search.sizes[slot] and total < search.totals[slot]):
        return
    if size == search.sizes[slot] and total == search.totals[slot]:
        one = np.sort(search.order[vertices_of(clique)])
        other = np.sort(search.order[vertices_of(search.known[slot])])
        ahead = search.sums[one].sum() - search.sums[other].sum()
        if ahead < 0:
            return
        for i in range(size if ahead == 0 else 0):
            if one[i] != other[i]:
                if one[i] > other[i]:
                    return
                break
    search.known[slot] = clique
    search.sizes[slot], search.totals[slot] = size, total


@compiled
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
        intersect(candidates[depth], rows[v], candidates[depth + 1])
        intersect(done[depth], rows[v], done[depth + 1])
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


@compiled
def apart_from_pivot(candidates, done, rows, branches) -> None:
    """Into `branches`: the candidates not joined to the vertex of either set that is joined to most candidates."""
    words, most, pivot = len(candidates), -1, 0
    for index in range(words):
        left = candidates[index] | done[index]
        while left != EMPTY:
            u = 64 * index + lowest(left)
            left &= left - ONE
            joined = 0
            for word in range(words):
                joined += popcount(candidates[word] & rows[u, word])
            if joined > most:
                most, pivot = joined, u
    for word in range(words):
        branches[word] = candidates[word] & ~rows[pivot, word]


@intrinsic
def popcount(typing_context, word):
    """The number of bits set in a 64-bit word."""
    return types.int64(types.uint64), lambda context, builder, signature, arguments: builder.ctpop(arguments[0])


@intrinsic
def lowest(typing_context, word):
    """The number of the lowest bit set in a 64-bit word, 64 if there is none."""

    def generate(context, builder, signature, arguments):
        return builder.cttz(arguments[0], context.get_constant(types.boolean, False))

    return types.int64(types.uint64), generate


@intrinsic
def unused_above(typing_context, word):
    """How many bits of a 64-bit word lie above the highest bit set, 64 if there is none."""

    def generate(context, builder, signature, arguments):
        return builder.ctlz(arguments[0], context.get_constant(types.boolean, False))

    return types.int64(types.uint64), generate


@compiled
def size_of(row) -> int:
    total = 0
    for word in row:
        total += popcount(word)
    return total


@compiled
def last_of(row) -> int:
    """The highest vertex of a set, -1 if it is empty."""
    return last_in(row.reshape(1, -1), 0)


@compiled
def last_in(sets, at: int) -> int:
    """The highest vertex of sets[at], -1 if it is empty."""
    for index in range(sets.shape[1] - 1, -1, -1):
        if sets[at, index] != EMPTY:
            return 64 * index + 63 - unused_above(sets[at, index])
    return -1


@compiled
def contains(row, v: int) -> bool:
    return (row[v >> 6] >> np.uint64(v & 63)) & ONE != EMPTY


@compiled
def meet(one, other) -> bool:
    """Whether two sets have a vertex in common."""
    common = EMPTY
    for i in range(len(one)):
        common |= one[i] & other[i]
    return common != EMPTY


@compiled
def intersect(one, other, target) -> None:
    for i in range(len(target)):
        target[i] = one[i] & other[i]


@compiled
def add(row, v: int) -> None:
    row[v >> 6] |= ONE << np.uint64(v & 63)


@compiled
def remove(row, v: int) -> None:
    row[v >> 6] &= ~(ONE << np.uint64(v & 63))


@compiled
def keep_below(row, v: int) -> None:
    """Keep the vertices of a set that are lower than v."""
    row[v >> 6] &= (ONE << np.uint64(v & 63)) - ONE
    row[(v >> 6) + 1 :] = EMPTY
