"""Cliques against brute force, networkx and networkit; the four rules against constructions whose answer is known."""

import itertools
import subprocess
import sys
import warnings

import networkit
import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fx import clique_search, cliques
from fx.cliques import (
    RULES,
    Extraction,
    count_maximal_cliques,
    estimate_n_training,
    extract,
    extract_distinct,
    largest_cliques,
    without_copies,
)


def partition(similarity, threshold, **options):
    """The cliques of `largest_cliques`, all of them proven."""
    found, proven = largest_cliques(similarity, threshold, **options)
    assert proven == [True] * len(found)
    return found


def symmetric(n, pairs):
    """[n, n] with unit diagonal and the given n (n - 1) / 2 similarities above and below it."""
    matrix = np.zeros((n, n))
    matrix[np.triu_indices(n, 1)] = pairs
    return matrix + matrix.T + np.eye(n)


@st.composite
def small_similarities(draw, largest=10):
    """Matrices up to n = `largest` in tenths: many equal similarities, hence many ties."""
    n = draw(st.integers(1, largest))
    count = n * (n - 1) // 2
    return symmetric(n, np.array(draw(st.lists(st.integers(-3, 10), min_size=count, max_size=count))) / 10)


def clustered(n, k, seed=0, noise=1.0, d=32):
    """Similarities of n noisy copies of k random directions, and the direction of each."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % k)
    rows = rng.standard_normal((k, d))[labels] + noise * rng.standard_normal((n, d))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows @ rows.T, labels


def graph(similarity, threshold):
    """The same graph for networkx."""
    n = len(similarity)
    result = networkx.empty_graph(n)
    result.add_edges_from(p for p in itertools.combinations(range(n), 2) if similarity[p] >= threshold - 1e-9)
    return result


def brute_force(similarity, threshold):
    """The greedy partition with its tie rule, by trying all subsets."""
    alive, result = list(range(len(similarity))), []
    thousandths = np.rint(similarity * 1000).astype(int)
    sums = thousandths.sum(axis=1) - thousandths.diagonal()
    while alive:
        for size in range(len(alive), 0, -1):
            found = [
                (-sum(thousandths[p] for p in itertools.combinations(subset, 2)), -sums[list(subset)].sum(), subset)
                for subset in itertools.combinations(alive, size)
                if all(thousandths[p] >= round(threshold * 1000) for p in itertools.combinations(subset, 2))
            ]
            if found:
                result.append(min(found)[2])
                alive = [i for i in alive if i not in result[-1]]
                break
    return result


@pytest.mark.long
@given(small_similarities(largest=12), st.integers(-3, 11))
@settings(max_examples=120, deadline=None)
def test_partition_equals_brute_force(similarity, tenths):
    assert partition(similarity, tenths / 10) == brute_force(similarity, tenths / 10)


def renamed(found, order):
    """The cliques found after image order[i] became image i, under the old names."""
    return [tuple(sorted(int(order[i]) for i in clique)) for clique in found]


@given(small_similarities(), st.integers(-3, 11), st.randoms(use_true_random=False))
@settings(max_examples=50, derandomize=True)
def test_partition_does_not_depend_on_the_order_of_images(similarity, tenths, random):
    n = len(similarity)
    noise = np.triu(np.random.default_rng(n).uniform(-0.01, 0, (n, n)), 1)  # so that no two sums agree
    similarity = similarity + noise + noise.T
    order = random.sample(range(n), n)
    expected = partition(similarity, tenths / 10)
    permuted = partition(similarity[np.ix_(order, order)], tenths / 10)
    assert renamed(permuted, order) == expected


@pytest.mark.parametrize(("n", "quantile"), [(60, 0.3), (60, 0.6), (60, 0.9), (200, 0.75), (200, 0.9)])
def test_partition_equals_networkx_at_each_step(n, quantile):
    similarity, _ = clustered(n, n // 10, noise=1.2)
    threshold = round(np.quantile(similarity, quantile), 2)
    rest = graph(similarity, threshold)
    for clique in partition(similarity, threshold):
        assert all(rest.has_edge(*pair) for pair in itertools.combinations(clique, 2))
        assert len(clique) == networkx.max_weight_clique(rest, weight=None)[1]
        rest.remove_nodes_from(clique)
    assert len(rest) == 0


def test_largest_clique_equals_networkit_on_a_larger_graph():
    similarity, _ = clustered(200, 10, noise=1.5)
    threshold = round(np.quantile(similarity, 0.8), 2)
    edges = np.argwhere(np.triu(similarity >= threshold, 1))
    other = networkit.GraphFromCoo(tuple(np.ascontiguousarray(edges.T)), n=200)
    search = networkit.clique.MaximalCliques(other, maximumOnly=True)
    search.run()
    assert len(partition(similarity, threshold, at_most=1)[0]) == len(search.getCliques()[0])


def test_larger_partition_does_not_depend_on_the_order_of_images():
    similarity, _ = clustered(120, 8, noise=1.3)
    order = np.random.default_rng(1).permutation(120)
    expected = partition(similarity, 0.2)
    permuted = partition(similarity[np.ix_(order, order)], 0.2)
    assert renamed(permuted, order) == expected
    assert partition(similarity, 0.2) == expected


@pytest.mark.parametrize("n", [1, 2, 7, 150])
def test_complete_empty_and_disconnected_graphs(n):
    same = np.ones((n, n))
    assert partition(same, 1.0) == [tuple(range(n))]
    assert partition(same, 1.01, at_most=5) == [(i,) for i in range(min(n, 5))]
    halves = np.kron(np.eye(2), same[: n // 2 + 1, : n // 2 + 1])
    first, second = partition(halves, 0.5)
    assert (first, second) == (tuple(range(n // 2 + 1)), tuple(range(n // 2 + 1, len(halves))))


def test_no_images_have_no_cliques():
    assert partition(np.empty((0, 0)), 0.5) == []


def test_threshold_is_inclusive_in_millionths():
    similarity = symmetric(3, np.float32([0.3, 0.299999, 0.2999999]))
    assert partition(similarity, 0.3) == [(0, 1), (2,)]  # 0.2999999 rounds to 0.3: a tie, so the lower indices
    assert partition(similarity, 0.299999) == [(0, 1, 2)]
    assert sorted(partition(similarity, 0.300001)) == [(0,), (1,), (2,)]


def test_of_two_roundings_of_one_similarity_the_higher_counts_wherever_it_stands():
    similarity = symmetric(3, [0.3, 0.1, 0.2])
    similarity[0, 1] = 0.299999  # as a product of matrices may leave it
    for matrix in (similarity, similarity.T):
        assert partition(matrix, 0.3) == [(0, 1), (2,)]


def test_at_most_gives_the_beginning_of_the_partition():
    similarity, _ = clustered(40, 5)
    assert partition(similarity, 0.3, at_most=3) == partition(similarity, 0.3)[:3]


def test_search_cut_short_says_so_and_still_partitions():
    similarity = symmetric(60, np.random.default_rng(0).random(60 * 59 // 2))
    with pytest.warns(UserWarning, match=r"\d+ cliques may not be the largest: .* ended at 300 steps"):
        found, proven = largest_cliques(similarity, 0.3, budget=300)
    assert sorted(itertools.chain(*found)) == list(range(60))
    assert all(similarity[p] >= 0.3 for clique in found for p in itertools.combinations(clique, 2))
    rest = graph(similarity, 0.3)
    for clique, is_proven in zip(found, proven, strict=True):
        assert not is_proven or len(clique) == networkx.max_weight_clique(rest, weight=None)[1]
        rest.remove_nodes_from(clique)
    assert 0 < sum(proven) < len(proven)  # hard ones first, small graphs are proven in a few steps
    assert all(largest_cliques(similarity, 0.3)[1])


@pytest.mark.parametrize("budget", [1, 30, 1000])
def test_search_cut_short_does_not_depend_on_the_order_of_images(budget):
    similarity = symmetric(50, np.random.default_rng(3).random(50 * 49 // 2))
    order = np.random.default_rng(4).permutation(50)
    with warnings.catch_warnings(action="ignore"):
        found, proven = largest_cliques(similarity, 0.4, budget=budget)
        permuted, same_proven = largest_cliques(similarity[np.ix_(order, order)], 0.4, budget=budget)
    assert sorted(itertools.chain(*found)) == list(range(50))
    assert renamed(permuted, order) == found
    assert same_proven == proven


@pytest.mark.parametrize(("seed", "threshold"), [(20, 0.7), (26, 0.5), (46, 0.5)])
def test_ties_cut_short_still_remove_a_largest_clique_at_each_step(monkeypatch, seed, threshold):
    similarity = symmetric(40, np.random.default_rng(seed).random(40 * 39 // 2))
    monkeypatch.setattr(cliques, "TIE_BUDGET", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = partition(similarity, threshold)
        order = np.random.default_rng(0).permutation(40)
        permuted = partition(similarity[np.ix_(order, order)], threshold)
    assert renamed(permuted, order) == found
    rest = graph(similarity, threshold)
    for clique in found:
        assert all(rest.has_edge(*pair) for pair in itertools.combinations(clique, 2))
        assert len(clique) == networkx.max_weight_clique(rest, weight=None)[1]
        rest.remove_nodes_from(clique)
    assert len(rest) == 0


@pytest.mark.parametrize("rule", ["tightest", "peaks"])
def test_clear_clusters_are_found(rule):
    similarity, labels = clustered(48, 3, noise=0.4)
    result = extract(similarity, 3, rule)
    assert sorted(labels[list(result.centres)]) == [0, 1, 2]
    assert all(len(set(labels[list(clique)])) == 1 for clique in result.cliques)
    assert result.rule == rule


@given(small_similarities(), st.data(), st.sampled_from(RULES))
@settings(max_examples=80)
def test_disjoint_cliques_with_their_centres_as_many_as_training_images(similarity, data, rule):
    if len(similarity) < 2:
        return
    n_training = data.draw(st.integers(1, len(similarity)))
    result = extract(similarity, n_training, rule)
    assert len(result.cliques) == len(result.centres) == result.n_extracted
    assert result.n_extracted == n_training or (rule == "published" and result.n_extracted > n_training)
    assert result.proven == (True,) * result.n_extracted
    members = list(itertools.chain(*result.cliques))
    assert len(members) == len(set(members))
    for clique, centre in zip(result.cliques, result.centres, strict=True):
        assert list(clique) == sorted(clique)
        assert centre in clique
        if rule != "peaks":
            means = similarity[np.ix_(clique, clique)].mean(axis=1).round(9)
            overall = similarity[list(clique)].sum(axis=1).round(9)
            assert centre == max(zip(means, overall, (-i for i in clique), clique, strict=True))[3]


def test_paper_sweep_stops_at_the_first_threshold_with_enough_cliques():
    similarity, _ = clustered(20, 4, noise=0.6)
    start = np.floor(np.quantile(similarity[np.triu_indices(20, 1)], 0.25) * 100) / 100
    for n_training in (2, 6, 9):
        expected = start
        while len(partition(similarity, expected)) < n_training:
            expected = round(expected + 0.01, 2)
        result = extract(similarity, n_training, "paper")
        assert result.threshold == pytest.approx(expected)
        assert list(result.cliques) == partition(similarity, expected)[:n_training]
    assert result.threshold > start


@pytest.mark.parametrize("n", [2, 3, 40, 1500])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.75, 1.0])
def test_the_quantile_is_that_of_all_pairs(n, share):
    """Also at both ends of what a cosine can be."""
    weights = np.random.default_rng(n).integers(-1_001_000, 1_001_001, (n, n), dtype=np.int32)
    weights[0, 1], weights[-2, -1] = 1_001_000, -1_001_000
    pairs = weights[np.triu_indices(n, 1)]
    assert cliques._quantile(weights, share) == pytest.approx(np.quantile(pairs.astype(float), share), abs=1e-6)


def test_paper_starts_at_the_quantile_of_the_pairs_without_the_diagonal():
    similarity = symmetric(5, [0.119] * 3 + [0.5] * 7)
    assert extract(similarity, 1).threshold == pytest.approx(0.21)  # 0.119 + 0.25 * (0.5 - 0.119) = 0.214


def blocks(*sizes_and_similarities):
    """Disjoint blocks of images, each (size, similarity inside), and 0 between them."""
    rows = sum(size for size, _ in sizes_and_similarities)
    matrix, start = np.zeros((rows, rows)), 0
    for size, inside in sizes_and_similarities:
        matrix[start : start + size, start : start + size] = inside
        start += size
    np.fill_diagonal(matrix, 1)
    return matrix


def test_paper_keeps_the_largest_and_tightest_the_most_similar_cliques():
    similarity = blocks((3, 0.9), (5, 0.6), (2, 0.99))
    a, b, pair = (0, 1, 2), (3, 4, 5, 6, 7), (8, 9)
    assert [extract(similarity, n, "tightest").cliques for n in (1, 2, 3)] == [(a,), (a, b), (a, b, pair)]
    assert extract(similarity, 3, "tightest").threshold == pytest.approx(0.6)
    assert [extract(similarity, n, "paper").cliques for n in (2, 3)] == [(b, a), (b, a, pair)]
    assert extract(similarity, 2, "paper").threshold == pytest.approx(0.01)
    assert extract(similarity, 1, "paper").cliques == (tuple(range(10)),)


def test_paper_prefers_the_more_similar_of_equally_large_cliques():
    similarity = blocks((4, 0.5), (4, 0.7), (4, 0.6))
    assert extract(similarity, 2).cliques == ((4, 5, 6, 7), (8, 9, 10, 11))


def test_tightest_raises_phi_when_there_are_too_few_cliques():
    similarity = blocks((3, 0.62), (4, 0.6))
    result = extract(similarity, 4, "tightest")
    assert result.cliques == ((0, 1, 2), (3,), (4,), (5,))
    assert result.threshold == pytest.approx(0.61)


def test_peaks_rank_by_the_mean_of_the_five_highest_similarities():
    similarity = blocks((7, 0.7), (6, 0.8), (5, 0.95))  # means of five: 0.7, 0.8 and 0.76
    result = extract(similarity, 3, "peaks")
    assert result.centres == (7, 13, 0)
    assert result.cliques == (tuple(range(7, 13)), tuple(range(13, 18)), tuple(range(7)))
    assert result.threshold == pytest.approx(0.7)


def test_peaks_raise_phi_when_the_images_are_used_up():
    result = extract(blocks((6, 0.9), (6, 0.8)), 3, "peaks")
    assert result.centres == (0, 6, 7)
    assert result.cliques == (tuple(range(6)), (6,), (7,))
    assert result.threshold == pytest.approx(0.81)


@pytest.mark.parametrize("rule", RULES)
def test_identical_images_and_as_many_training_as_generated_images(rule):
    result = extract(np.ones((6, 6)), 3, rule)
    assert result.centres == tuple(range(6 if rule == "published" else 3))
    assert result.threshold == pytest.approx(1.01)
    similarity, _ = clustered(12, 3)
    assert sorted(extract(similarity, 12, rule).centres) == list(range(12))


@given(small_similarities(largest=12), st.integers(-3, 11))
@settings(max_examples=60, deadline=None)
def test_number_of_maximal_cliques_equals_networkx(similarity, tenths):
    expected = sum(1 for _ in networkx.find_cliques(graph(similarity, tenths / 10)))
    assert count_maximal_cliques(similarity, tenths / 10) == expected
    assert count_maximal_cliques(similarity, tenths / 10, limit=2) == min(expected, 3)


def test_number_of_maximal_cliques_of_larger_graphs():
    similarity, _ = clustered(90, 6, noise=1.2)
    for quantile in (0.6, 0.8, 0.95):
        threshold = round(np.quantile(similarity, quantile), 2)
        expected = sum(1 for _ in networkx.find_cliques(graph(similarity, threshold)))
        assert expected > 50
        assert count_maximal_cliques(similarity, threshold) == expected
    # three of each of n / 3 groups are not joined: 3 ** (n / 3) maximal cliques (Moon and Moser, 1965)
    assert count_maximal_cliques(1 - np.kron(np.eye(7), np.ones((3, 3))), 0.5) == 3**7


@pytest.mark.parametrize("enumerated", [150, 400, 1000])
def test_published_skips_what_takes_too_many_cliques_and_keeps_every_clique(monkeypatch, enumerated):
    similarity, _ = clustered(60, 6, noise=1.2)
    monkeypatch.setattr(cliques, "ENUMERATED", enumerated)
    phi = extract(similarity, 1, "paper").threshold
    while True:
        found = sum(1 for _ in networkx.find_cliques(graph(similarity, phi)))
        if found <= enumerated and len(partition(similarity, phi)) >= 7:
            break
        phi = round(phi + 0.01, 2)
    result = extract(similarity, 7, "published")
    assert result.threshold == pytest.approx(phi)
    assert list(result.cliques) == partition(similarity, phi)
    assert result.n_extracted >= 7


def test_a_given_phi_is_kept():
    similarity = blocks((3, 0.9), (5, 0.6), (2, 0.99))
    a, b, pair = (0, 1, 2), (3, 4, 5, 6, 7), (8, 9)
    assert extract(similarity, 2, "paper", threshold=0.5).cliques == (b, a)
    assert extract(similarity, 2, "published", threshold=0.5).cliques == (b, a, pair)
    assert extract(similarity, 2, "tightest", threshold=0.5).cliques == (a, b)
    assert extract(similarity, 2, "peaks", threshold=0.5).cliques == (b, a)
    few = extract(similarity, 10, "paper", threshold=0.5)
    assert (few.n_extracted, few.threshold) == (3, 0.5)
    with pytest.raises(ValueError, match="between -1 and 1; it is 60"):
        extract(similarity, 2, threshold=60)


def test_number_of_training_images_is_found_where_copies_are_clear():
    similarity = blocks(*[(40, 0.9)] * 7, *[(2, 0.9)] * 3, *[(1, 0)] * 40)
    assert estimate_n_training(similarity, 0.8) == (7, 7, 7)
    assert estimate_n_training(similarity, 0.8, smallest=2)[0] == 10
    assert estimate_n_training(similarity, 0.95) == (0, 0, 0)


def test_interval_of_the_number_of_training_images_follows_the_groups_at_the_limit():
    """A group of m images counts in a half of them if three or more of it are drawn: a hypergeometric count."""
    sizes = [3] * 10 + [5] * 6 + [30] * 2
    n = sum(sizes)
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    counts = [(np.bincount(labels[rng.permutation(n)[: n // 2]]) >= 3).sum() for _ in range(20_000)]
    estimate, low, high = estimate_n_training(blocks(*[(size, 0.9) for size in sizes]), 0.8, draws=2000)
    assert estimate == 18
    assert (high - 18) / 1.96 == pytest.approx(np.std(counts), rel=0.08)
    assert 18 - low == pytest.approx(high - 18)
    narrow = estimate_n_training(blocks(*[(size, 0.9) for size in sizes]), 0.8, draws=2000, level=0.5)
    assert (narrow[2] - 18) / (high - 18) == pytest.approx(0.6745 / 1.96, rel=1e-3)
    draw = np.random.default_rng(2)
    two = [(np.bincount(labels[draw.choice(n, n // 2, replace=False)]) >= 3).sum() for _ in range(2)]
    few = estimate_n_training(blocks(*[(size, 0.9) for size in sizes]), 0.8, draws=2, seed=2)
    assert few[2] - 18 == pytest.approx(1.96 * abs(two[0] - two[1]) / 2**0.5, rel=1e-3)
    assert two[0] != two[1]
    with pytest.raises(ValueError, match="at least 6 generated images; there are 4"):
        estimate_n_training(np.eye(4), 0.8)
    for options, message in (
        ({"draws": 1}, "draws must be at least 2; it is 1"),
        ({"smallest": 0}, "smallest must be at least 1; it is 0"),
        ({"threshold": 60}, "between -1 and 1; it is 60"),
        ({"threshold": float("nan")}, "it is nan"),
    ):
        with pytest.raises(ValueError, match=message):
            estimate_n_training(np.eye(8), **{"threshold": 0.8} | options)
    with pytest.warns(UserWarning, match=r"\d+ cliques may not be the largest"):
        estimate_n_training(symmetric(40, np.random.default_rng(0).random(780)), 0.3, draws=2, budget=50)
    with pytest.raises(ValueError, match="it is 95"):
        estimate_n_training(np.eye(8), 0.8, level=95)


def test_numba_is_not_imported_before_a_graph_is_searched():
    code = (
        "import sys, fx.cliques, fx.extraction, numpy; assert 'numba' not in sys.modules;"
        "fx.cliques.extract(numpy.eye(4), 2); assert 'numba' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("rule", RULES)
def test_extraction_does_not_depend_on_the_order_of_images(rule):
    similarity, _ = clustered(50, 5, noise=0.9)
    order = np.random.default_rng(2).permutation(50)
    for n_training in (6, 20, 35):  # many pairs and single images among them
        expected = extract(similarity, n_training, rule)
        permuted = extract(similarity[np.ix_(order, order)], n_training, rule)
        assert permuted.threshold == expected.threshold
        assert tuple(renamed(permuted.cliques, order)) == expected.cliques
        assert tuple(order[list(permuted.centres)].tolist()) == expected.centres


def test_exact_ties_of_weight_do_not_bring_the_order_of_images_in():
    similarity, _ = clustered(80, 8, noise=1.0)
    similarity = similarity.round(3)  # 3,160 pairs share some 2,000 values
    assert len({*similarity.sum(axis=1).round(6)}) == 80, "but every image differs from every other"
    order = np.random.default_rng(5).permutation(80)
    for threshold in (0.1, 0.3, 0.5):
        permuted = partition(similarity[np.ix_(order, order)], threshold)
        assert renamed(permuted, order) == partition(similarity, threshold)


@pytest.mark.parametrize("rule", RULES)
def test_a_result_without_unproven_cliques_is_that_of_an_unlimited_search(rule):
    """Cliques that decide where the sweep ends count too, not only those that are kept."""
    cut_short = exact = 0
    for seed in range(8):
        similarity, _ = clustered(26, 5, seed=seed, noise=1.4, d=8)
        expected = extract(similarity, 7, rule)
        assert expected.n_unproven == 0
        for budget in (1, 20, 60, 200, 600, 5000):
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                found = extract(similarity, 7, rule, budget=budget)
            assert len(warned) == (found.n_unproven > 0), "one warning for the whole sweep"
            assert found.n_unproven >= found.proven.count(False)
            if found.n_unproven:
                cut_short += 1
            else:
                exact += 1
                assert found == expected
    assert exact
    assert cut_short or rule == "peaks"


def test_no_clique_is_called_proven_that_is_not_the_largest():
    for seed in range(60):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(8, 30))
        similarity = symmetric(n, rng.integers(0, 6, n * (n - 1) // 2) / 10)
        with warnings.catch_warnings(action="ignore"):
            found, proven = largest_cliques(similarity, 0.3, budget=int(10 ** rng.uniform(0, 3)))
        rest = graph(similarity, 0.3)
        for clique, is_proven in zip(found, proven, strict=True):
            assert not is_proven or len(clique) == networkx.max_weight_clique(rest, weight=None)[1]
            rest.remove_nodes_from(clique)


def test_equally_large_cliques_without_end_do_not_take_all_the_time():
    """Of 2 ** 300 largest cliques in a complete graph without a perfect matching, one is taken after TIE_BUDGET steps."""
    joined = np.ones((600, 600)) - np.kron(np.eye(300), 1 - np.eye(2))
    search = clique_search.new_search((joined * 500_000).astype(np.int32) * (1 - np.eye(600, dtype=np.int32)), 400_000)
    assert clique_search.find_largest(search, 10**8, 10**5)
    assert search.sizes[-1] == 300
    assert search.steps[0] < 10**6


def test_published_keeps_every_clique_of_a_threshold_that_is_given(monkeypatch):
    similarity = 1 - np.kron(np.eye(5), np.ones((3, 3)) - np.eye(3))
    monkeypatch.setattr(cliques, "ENUMERATED", 10)  # the graph has 243
    result = extract(similarity, 2, "published", threshold=0.5)
    assert (result.rule, result.threshold, result.n_extracted) == ("published", 0.5, 3)
    assert list(result.cliques) == partition(similarity, 0.5)


def test_numba_compiles_without_a_folder_for_the_result(monkeypatch):
    def njit(function=None, **options):
        if options:
            raise RuntimeError("cannot cache function: no locator available")
        return function

    monkeypatch.setattr(clique_search.numba, "njit", njit)
    assert clique_search.compiled(abs) is abs


@pytest.mark.parametrize("kind", [np.float16, np.float32, list, np.asfortranarray])
def test_any_array_of_similarities_will_do(kind):
    similarity = symmetric(6, np.random.default_rng(0).integers(0, 9, 15) / 8)  # exact in 16 bits
    given = similarity.tolist() if kind is list else kind(similarity)
    assert extract(given, 3) == extract(similarity, 3)
    big = np.zeros((12, 12))
    big[::2, ::2] = similarity
    view = big[::2, ::2]
    view.flags.writeable = False
    assert extract(view, 3) == extract(similarity, 3)


@pytest.mark.parametrize("n", [63, 64, 65, 128, 129])
def test_sets_that_fill_their_last_word_or_just_pass_it(n):
    similarity, _ = clustered(n, 6, noise=1.1)
    rest = graph(similarity, 0.3)
    for clique in partition(similarity.round(6), 0.3):
        assert len(clique) == networkx.max_weight_clique(rest, weight=None)[1]
        rest.remove_nodes_from(clique)
    assert len(rest) == 0


@pytest.mark.parametrize(
    ("similarity", "n_training", "rule", "message"),
    [
        (np.ones((2, 3)), 1, "paper", r"square, not \(2, 3\)"),
        (np.ones(4), 1, "paper", "square"),
        (np.array([[1, np.nan], [np.nan, 1]]), 1, "paper", "images 0 and 1 is nan"),
        (np.array([[1, 0.5, 0.1], [0.5, 1, 0.2], [0.1, 0.3, 1]]), 1, "paper", r"\(1, 2\) is 0\.2, \(2, 1\) 0\.3"),
        (np.ones((3, 3)), 0, "paper", r"1\.\.3.*it is 0"),
        (np.ones((3, 3)), 4, "peaks", r"1\.\.3.*it is 4"),
        (np.ones((1, 1)), 1, "paper", "at least 2"),
        (np.empty((0, 0)), 1, "paper", "0 generated images .* at least 2"),
        (np.ones((3, 3)), 2.5, "tightest", r"n_training must be a whole number; it is 2\.5"),
        (np.full((3, 3), "1"), 1, "paper", "must hold real numbers"),
        (np.full((3, 3), np.float32(1.0010001)), 1, "paper", r"images 0 and 0 is 1\.001.*, beyond -1\.\.1"),
        (np.full((3, 3), np.inf), 1, "paper", r"is inf, beyond -1\.\.1"),
        (np.array([[1, 7.0], [7.0, 1]]), 1, "paper", r"images 0 and 1 is 7\.0, beyond -1\.\.1"),
        (np.ones((3, 3)), 1, "best", "Unknown rule 'best'.*paper, published, tightest, peaks"),
    ],
)
def test_what_cannot_be_clustered_is_refused_with_the_reason(similarity, n_training, rule, message):
    with pytest.raises(ValueError, match=message):
        extract(similarity, n_training, rule)


# without copies


def of_single_images(n: int) -> Extraction:
    """Each of n images extracted by itself, in order."""
    return Extraction(tuple((i,) for i in range(n)), tuple(range(n)), 0.5, "paper", (True,) * n, 0)


def test_copies_of_what_was_kept_come_last_and_in_order():
    similarity = np.eye(5)
    similarity[0, 1] = similarity[1, 0] = 0.7  # a copy: the threshold itself is one
    similarity[1, 2] = similarity[2, 1] = 0.9  # a copy of one that is not kept is none
    similarity[3, 0] = similarity[0, 3] = 0.699
    similarity[4, 3] = similarity[3, 4] = 0.8
    orders = {n: without_copies(of_single_images(5), similarity, n, 0.7).centres for n in range(1, 6)}
    assert orders == {1: (0,), 2: (0, 2), 3: (0, 2, 3), 4: (0, 2, 3, 1), 5: (0, 2, 3, 1, 4)}


@given(small_similarities(), st.integers(1, 10), st.integers(0, 10), st.sampled_from(RULES))
def test_what_is_kept_holds_no_copies_as_long_as_there_is_anything_else(similarity, wanted, strict, rule):
    n, strict = len(similarity), strict / 10
    if n < 2:
        return
    found = extract(similarity, min(2 * wanted, n), rule)
    wanted = min(wanted, found.n_extracted)
    kept = without_copies(found, similarity, wanted, strict)
    places = [found.centres.index(centre) for centre in kept.centres]
    assert kept.n_extracted == len({*places}) == wanted
    assert kept.cliques == tuple(found.cliques[place] for place in places)
    assert kept.proven == tuple(found.proven[place] for place in places)
    assert (kept.threshold, kept.rule, kept.n_unproven) == (found.threshold, found.rule, found.n_unproven)

    def is_copy(place, of):
        return any(similarity[found.centres[place], found.centres[other]] >= strict - 1e-9 for other in of)

    apart = [place for number, place in enumerate(places) if not is_copy(place, places[:number])]
    copies = [place for place in places if place not in apart]
    assert places == sorted(apart) + sorted(copies)
    for place in {*range(found.n_extracted)} - {*places}:
        before = [other for other in apart if other < place]
        assert is_copy(place, before) or (len(apart) == wanted and place > apart[-1])


def test_a_copy_is_passed_over_for_a_further_clique():
    """Two cliques of one image, whose centres are copies, before a single image of another."""
    similarity = np.full((8, 8), 0.1)
    similarity[:6, :6] = 0.62  # copies of one image, in two cliques from phi = .63 on
    for group in ((0, 1, 2), (3, 4, 5)):
        similarity[np.ix_(group, group)] = 0.9
    similarity[1, 4] = similarity[4, 1] = 0.75  # their centres
    similarity[1, [0, 2]] = similarity[[0, 2], 1] = similarity[4, [3, 5]] = similarity[[3, 5], 4] = 0.95
    similarity[6, 7] = similarity[7, 6] = 0.8
    np.fill_diagonal(similarity, 1)
    assert extract(similarity, 3, threshold=0.65).centres == (1, 4, 6)
    assert extract_distinct(similarity, 3, 0.7, threshold=0.65).centres == (1, 6, 4)
    similarity[np.ix_(range(3), range(3, 6))] = similarity[np.ix_(range(3, 6), range(3))] = 0.1
    similarity[1, 4] = similarity[4, 1] = 0.75  # so that two cliques are enough for N0 = 2, and a third is there
    assert extract(similarity, 2).centres == (1, 4)
    assert extract_distinct(similarity, 2, 0.7).centres == (1, 6)
    assert extract_distinct(similarity, 2, 0.76).centres == (1, 4), "no copies"


def test_where_nothing_is_a_copy_the_extraction_is_the_rules_own():
    """Asking for more would raise phi until one image's copies fall apart."""
    similarity = np.full((6, 6), 0.1)
    similarity[:4, :4] = 0.6
    np.fill_diagonal(similarity, 1)
    assert extract_distinct(similarity, 3, 0.7) == extract(similarity, 3)
    assert extract(similarity, 3).centres == (0, 4, 5)


@given(small_similarities(), st.integers(1, 10), st.integers(0, 10), st.sampled_from(RULES))
def test_distinct_images_hold_at_most_as_many_copies_as_the_rules_own(similarity, wanted, strict, rule):
    n, strict = len(similarity), strict / 10
    if n < 2:
        return
    wanted = min(wanted, n)

    def n_apart(centres):
        kept = []
        for centre in centres:
            if all(similarity[centre, other] < strict - 1e-9 for other in kept):
                kept.append(centre)
        return len(kept)

    plain, distinct = extract(similarity, wanted, rule), extract_distinct(similarity, wanted, strict, rule)
    assert n_apart(distinct.centres) >= n_apart(plain.centres[:wanted])
    assert distinct.n_extracted == wanted
    if n_apart(plain.centres[:wanted]) == wanted:
        assert distinct.centres == plain.centres[:wanted]


def test_more_images_than_were_extracted_are_refused():
    with pytest.raises(ValueError, match="n_training"):
        without_copies(of_single_images(3), np.eye(3), 4, 0.7)
