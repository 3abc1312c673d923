"""Retrieval metrics against scikit-learn, against loops over every pair, and against all orders of tied items."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from dermfm.evaluate import ranking
from dermfm.evaluate.ranking import Pool, rank_classes, rank_targets

KS = (1, 2, 5, 100)


def coarse(rng: np.random.Generator, rows: int, width: int = 6, levels: int = 2) -> np.ndarray:
    """Vectors of small whole numbers: every product is exact, so ties are ties in any arithmetic."""
    return rng.integers(-levels, levels + 1, (rows, width)).astype(np.float32)


def fine(rng: np.random.Generator, rows: int, width: int = 24) -> np.ndarray:
    """Vectors without ties, in float32."""
    vectors = rng.normal(size=(rows, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def all_orders(scores: np.ndarray, hits: np.ndarray) -> list[np.ndarray]:
    """`hits` sorted by falling score, once for every order within ties."""
    blocks = [np.flatnonzero(scores == s) for s in sorted(set(scores), reverse=True)]
    ways = itertools.product(*(itertools.permutations(block) for block in blocks))
    return [hits[np.concatenate([np.array(part) for part in way])] for way in ways]


def naive_ap(hits: np.ndarray) -> float:
    """Average precision of one order."""
    seen, total = 0, 0.0
    for place, hit in enumerate(hits, start=1):
        if hit:
            seen += 1
            total += seen / place
    return total / seen


def test_average_precision_is_that_of_scikit_learn_where_nothing_ties() -> None:
    rng = np.random.default_rng(0)
    vectors, labels, groups = fine(rng, 300), rng.integers(0, 5, 300), rng.integers(0, 150, 300)
    found = rank_classes(vectors, labels, groups, Pool(vectors, labels, groups), KS)
    for q in range(300):
        others = groups != groups[q]
        scores = vectors[others].astype(float) @ vectors[q].astype(float)
        truth = labels[others] == labels[q]
        assert found.ap[q] == pytest.approx(average_precision_score(truth, scores), abs=1e-6)
        best = np.argsort(-scores)
        for column, k in enumerate(KS):
            assert found.precision[q, column] == pytest.approx(truth[best[:k]].mean(), abs=1e-12)
        assert (found.num_relevant[q], found.pool_size[q]) == (truth.sum(), others.sum())


@pytest.mark.parametrize("seed", range(6))
def test_ties_count_as_the_mean_over_all_their_orders(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pool, queries = coarse(rng, 7, 2, 1), coarse(rng, 5, 2, 1)
    labels, groups = rng.integers(0, 2, 7), np.arange(7)
    query_labels, query_groups = rng.integers(0, 2, 5), np.arange(5)
    found = rank_classes(queries, query_labels, query_groups, Pool(pool, labels, groups), KS)
    for q in range(5):
        others = groups != query_groups[q]
        truth = (labels == query_labels[q])[others]
        orders = all_orders((pool @ queries[q])[others], truth)
        if truth.any():
            assert found.ap[q] == pytest.approx(np.mean([naive_ap(o) for o in orders]), abs=1e-12)
            for column, k in enumerate(KS):
                assert found.precision[q, column] == pytest.approx(np.mean([o[:k].mean() for o in orders]), abs=1e-12)
        else:
            assert np.isnan(found.ap[q])
            assert np.isnan(found.precision[q]).all()


def test_ties_among_distinct_vectors_and_among_equal_ones_count_alike() -> None:
    """The same scores once from repeated vectors, once from vectors that differ where the queries are zero."""
    rng = np.random.default_rng(1)
    queries = np.concatenate([coarse(rng, 40, 3), np.zeros((40, 1), np.float32)], axis=1)
    repeated = np.concatenate([coarse(rng, 60, 3, 1), np.zeros((60, 1), np.float32)], axis=1)
    distinct = repeated.copy()
    distinct[:, 3] = np.arange(60)
    labels, groups = rng.integers(0, 3, 60), rng.integers(0, 30, 60)
    asked = rng.integers(0, 3, 40), rng.integers(0, 30, 40)
    a = rank_classes(queries, *asked, Pool(repeated, labels, groups), KS)
    b = rank_classes(queries, *asked, Pool(distinct, labels, groups), KS)
    assert Pool(repeated, labels, groups).is_repetitive
    assert not Pool(distinct, labels, groups).is_repetitive
    np.testing.assert_allclose(a.ap, b.ap, atol=1e-12)
    np.testing.assert_allclose(a.precision, b.precision, atol=1e-12)


def test_a_few_equal_notes_among_many_are_ties() -> None:
    rng = np.random.default_rng(6)
    queries, some, labels, groups = coarse(rng, 30, 8), coarse(rng, 40, 8), rng.integers(0, 2, 50), np.arange(50)
    pool = np.concatenate([some, some[:10]])
    found = rank_classes(queries, labels[:30], groups[:30], Pool(pool, labels, groups), (5,))
    assert not Pool(pool, labels, groups).is_repetitive
    for q in range(30):
        others = groups != q
        scores, truth = (pool @ queries[q])[others], (labels == labels[q])[others]
        fifth = np.sort(scores)[-5]
        above, tied = scores > fifth, scores == fifth
        expected = truth[above].sum() + (5 - above.sum()) * truth[tied].mean()
        assert found.precision[q, 0] == pytest.approx(expected / 5)


@pytest.mark.parametrize("group_targets", [False, True])
def test_rank_of_the_own_item_is_that_of_counting_every_pair(group_targets: bool) -> None:
    rng = np.random.default_rng(2)
    vectors, groups, items = coarse(rng, 80, 4), rng.integers(0, 40, 80), np.arange(80)
    queries = vectors if group_targets else coarse(rng, 80, 4)
    found = rank_targets(queries, items, groups, Pool(vectors, groups * 0, groups), items, group_targets=group_targets)
    for q in range(80):
        family = groups == groups[q]
        own = items == q
        target = family & ~own if group_targets else own
        allowed = ~(own if group_targets else family & ~own)
        scores = vectors @ queries[q]
        assert found.pool_size[q] == allowed.sum()
        assert found.num_targets[q] == target.sum()
        if target.any():
            best = scores[target].max()
            assert found.better[q] == (allowed & (scores > best)).sum()
            assert found.tied[q] == (allowed & (scores == best)).sum()
            assert found.tied_targets[q] == (target & (scores == best)).sum()


def test_recall_and_mid_rank_are_means_over_all_orders_of_ties() -> None:
    for better, tied, hits in [(0, 1, 1), (2, 3, 1), (1, 5, 2), (0, 4, 4), (3, 6, 3)]:
        ranks = ranking.TargetRank(*(np.array([v]) for v in (better, tied, hits, hits, 20)))
        orders = list(itertools.permutations([True] * hits + [False] * (tied - hits)))
        firsts = np.array([better + 1 + order.index(True) for order in orders])
        assert ranking.mid_rank(ranks)[0] == pytest.approx(firsts.mean())
        for k in (1, 2, 4, 8):
            assert ranking.recall_at(ranks, k)[0] == pytest.approx((firsts <= k).mean())


def test_a_query_without_target_has_no_rank() -> None:
    ranks = ranking.TargetRank(*(np.array([v]) for v in (0, 0, 0, 0, 20)))
    assert np.isnan(ranking.mid_rank(ranks)[0])
    assert np.isnan(ranking.recall_at(ranks, 5)[0])


def test_chance_levels_are_those_of_random_orders() -> None:
    hits = np.array([True, True, False, False, False])
    orders = [np.array(o) for o in itertools.permutations(hits)]
    expected = np.mean([naive_ap(o) for o in orders])
    assert ranking.chance_ap(np.array([2]), np.array([5]))[0] == pytest.approx(expected)
    ranks = ranking.random_order(ranking.TargetRank(*(np.array([v]) for v in (3, 1, 1, 1, 50))))
    assert ranking.recall_at(ranks, 10)[0] == pytest.approx(10 / 50)
    assert ranking.mid_rank(ranks)[0] == pytest.approx(25.5)


def test_scores_of_any_size_keep_their_order_exactly() -> None:
    """Vectors that are not of unit length are scaled by a power of two, which moves no bit."""
    rng = np.random.default_rng(5)
    vectors, labels, groups = coarse(rng, 90, 5, 40), rng.integers(0, 3, 90), np.arange(90)
    large = rank_classes(vectors, labels, groups, Pool(vectors, labels, groups), KS)
    scaled = vectors / np.float32(2**14)
    small = rank_classes(scaled, labels, groups, Pool(scaled, labels, groups), KS)
    assert np.abs(vectors @ vectors.T).max() > 2
    np.testing.assert_array_equal(large.ap, small.ap)
    np.testing.assert_array_equal(large.precision, small.precision)


def test_equal_scores_of_both_signs_and_zeros_are_ties() -> None:
    scores = np.array([0.0, -0.0, 0.5, -0.5, 0.5, 1.0, -1.0, 1e-30], np.float32)
    keys = ranking._falling(scores).astype(np.int64)
    np.testing.assert_array_equal(np.sign(np.subtract.outer(keys, keys)), -np.sign(np.subtract.outer(scores, scores)))
    assert not (keys & 1).any()


@pytest.mark.parametrize("world", [2, 3, 4])
def test_sharding_over_ranks_gives_the_same_bits(world: int) -> None:
    rng = np.random.default_rng(3)
    count = 5 * ranking.CHUNK + 17
    vectors, labels, groups = fine(rng, count), rng.integers(0, 4, count), rng.integers(0, 200, count)
    pool = Pool(vectors, labels, groups)
    whole = rank_classes(vectors, labels, groups, pool, KS)
    rows = [ranking.shard_rows(count, rank, world) for rank in range(world)]
    assert sorted(np.concatenate(rows)) == list(range(count))
    for own in rows:
        part = rank_classes(vectors, labels, groups, pool, KS, own)
        np.testing.assert_array_equal(part.ap, whole.ap[own])


def test_equal_rows_are_merged_in_order_of_first_appearance() -> None:
    vectors = np.array([[1, 0], [0, 1], [1, -0.0], [0, 1]], np.float32)
    distinct, of = ranking.unique_rows(vectors)
    np.testing.assert_array_equal(distinct, [[1, 0], [0, 1]])
    np.testing.assert_array_equal(of, [0, 1, 0, 1])
