"""The order of samples is a pure function that covers every epoch exactly once, whatever reads it."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.manifest import ShardError
from shards.order import SampleOrder, default_lanes, permutation, rank_indices

PINNED = [(0, 0, 1), (0, 2, 3), (0, 0, 0), (0, 2, 1), (0, 0, 2), (0, 2, 2), (0, 0, 4), (0, 1, 1)]
PINNED_WEIGHTED = (83333333, 2, 3)

layouts = st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) > 0)
large_layouts = st.one_of(layouts, st.lists(st.integers(0, 900), min_size=1, max_size=6).filter(lambda s: sum(s) > 0))
lanes = st.one_of(st.none(), st.integers(1, 9))
windows = st.sampled_from([1, 2, 7, 64, 4096])


def samples_of(order: SampleOrder, start: int, stop: int) -> list[tuple[int, int, int]]:
    epochs, shards, rows = order.locate(np.arange(start, stop))
    return list(zip(epochs.tolist(), shards.tolist(), rows.tolist(), strict=True))


@settings(max_examples=60, deadline=None)
@given(large_layouts, lanes, windows, st.integers(0, 2**40), st.integers(1, 2))
def test_every_sample_of_every_epoch_comes_exactly_once(sizes, num_lanes, window, seed, num_epochs):
    order = SampleOrder(sizes, seed, num_lanes, window)
    n, num_lanes = sum(sizes), order.num_lanes
    end = num_epochs * num_lanes * n  # a whole number of segments and of epochs
    found = samples_of(order, 0, end)
    every = {(e, s, r) for e in range(num_epochs * num_lanes) for s, size in enumerate(sizes) for r in range(size)}
    assert len(found) == len(set(found)) == len(every)
    assert set(found) == every


@settings(max_examples=100, deadline=None)
@given(layouts, lanes, windows, st.integers(0, 99), st.integers(0, 20))
def test_at_most_lanes_minus_one_samples_of_an_epoch_come_after_its_segment(sizes, num_lanes, window, seed, epoch):
    order = SampleOrder(sizes, seed, num_lanes, window)
    n, num_lanes = sum(sizes), order.num_lanes
    segment_end = (epoch + 1) * n // num_lanes * num_lanes
    late = [f for f in samples_of(order, segment_end, segment_end + n + 2 * num_lanes) if f[0] <= epoch]
    assert len(late) <= num_lanes - 1


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 30), windows, st.integers(0, 99), st.integers(0, 50))
def test_where_lanes_divide_the_set_each_run_of_n_indices_is_one_epoch(num_lanes, multiple, window, seed, epoch):
    n = num_lanes * multiple
    order = SampleOrder([n // 2, n - n // 2], seed, num_lanes, window)
    found = samples_of(order, epoch * n, (epoch + 1) * n)
    assert {f[0] for f in found} == {epoch}
    assert len(set(found)) == n


@settings(max_examples=80, deadline=None)
@given(large_layouts, lanes, windows, st.integers(1, 16), st.integers(1, 6), st.integers(0, 10_000), st.integers(0, 99))
def test_any_world_reads_the_same_global_sequence_in_equal_shares(
    sizes, num_lanes, window, world, per_rank, start, seed
):
    batch = world * per_rank
    order = SampleOrder(sizes, seed, num_lanes, window)
    whole = samples_of(order, start, start + 3 * batch)
    for step in range(3):
        shares = []
        for rank in range(world):
            cold = SampleOrder(sizes, seed, num_lanes, window)  # every rank of a resumed job begins from nothing
            indices = rank_indices(start + step * batch, batch, rank, world)
            assert len(indices) == per_rank
            shares.append(list(zip(*(a.tolist() for a in cold.locate(indices)), strict=True)))
        joined = [shares[i % world][i // world] for i in range(batch)]
        assert joined == whole[step * batch : (step + 1) * batch]


@settings(max_examples=100, deadline=None)
@given(layouts, st.integers(0, 99), st.data())
def test_weighted_sampling_takes_each_sample_floor_or_ceil_of_its_weight_times(sizes, seed, data):
    n = sum(sizes)
    raw = data.draw(st.lists(st.integers(0, 40), min_size=n, max_size=n).filter(lambda w: sum(w) > 0))
    weights = np.asarray(raw) * (n / sum(raw))
    order = SampleOrder(sizes, seed, num_lanes=1, weights=weights)
    borders = np.concatenate([[0], np.cumsum(sizes)])
    for epoch in range(3):
        counts = Counter(int(borders[s]) + r for _, s, r in samples_of(order, epoch * n, (epoch + 1) * n))
        for sample, weight in enumerate(weights):
            assert np.floor(weight - 1e-6) <= counts[sample] <= np.ceil(weight + 1e-6)


def test_weights_of_one_are_the_plain_case():
    plain = SampleOrder([30, 7, 60], seed=5, num_lanes=4, window=8)
    weighted = SampleOrder([30, 7, 60], seed=5, num_lanes=4, window=8, weights=np.ones(97))
    assert samples_of(plain, 0, 1000) == samples_of(weighted, 0, 1000)


def test_whole_weights_are_exact_in_every_epoch():
    order = SampleOrder([2, 2], seed=1, weights=[2, 0, 1, 1])
    for epoch in range(200):
        counts = Counter(f[1:] for f in samples_of(order, epoch * 4, epoch * 4 + 4))
        assert counts == {(0, 0): 2, (1, 0): 1, (1, 1): 1}


def test_mean_frequency_over_epochs_is_the_weight():
    weights = np.asarray([0.25, 0.5, 1.75, 1.5])
    order = SampleOrder([4], seed=2, weights=weights)
    rows = np.asarray([f[2] for f in samples_of(order, 0, 4 * 2000)])
    assert np.bincount(rows, minlength=4) / 2000 == pytest.approx(weights, abs=0.04)


@settings(max_examples=50, deadline=None)
@given(layouts, lanes, windows, st.lists(st.integers(0, 10**12), min_size=1, max_size=30))
def test_addressing_one_by_one_and_all_at_once_agree(sizes, num_lanes, window, indices):
    order = SampleOrder(sizes, 3, num_lanes, window)
    together = list(zip(*(a.tolist() for a in order.locate(np.asarray(indices))), strict=True))
    assert together == [SampleOrder(sizes, 3, num_lanes, window)[i] for i in indices]


def test_epochs_are_shuffled_differently_and_seeds_differ():
    orders = [[f[1:] for f in samples_of(SampleOrder([200], seed), 0, 400)] for seed in (0, 1)]
    assert orders[0][:200] != orders[0][200:]
    assert orders[0] != orders[1]
    assert orders[0][:200] != sorted(orders[0][:200])


def test_a_permutation_has_no_favourite_places():
    counts = np.zeros((6, 6))
    for word in range(6000):
        counts[np.arange(6), permutation(6, word)] += 1
    expected = 1000
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 60  # 25 degrees of freedom: 99.99 % lie below 60


def test_the_order_of_a_seed_never_changes_between_versions():
    order = SampleOrder([5, 3, 4], seed=7, num_lanes=2, window=3)
    assert samples_of(order, 0, 8) == PINNED
    assert SampleOrder([5, 3, 4], seed=7, weights=[3, *[9 / 11] * 11])[10**9] == PINNED_WEIGHTED


def test_default_lanes_are_a_power_of_two_that_leaves_every_lane_a_window():
    assert [default_lanes(n, 4096) for n in (1, 4096, 8191, 8192, 64 * 4096 - 1, 64 * 4096, 10**9)] == [
        1, 1, 1, 2, 32, 64, 64,
    ]  # fmt: skip


def test_a_batch_of_4096_in_a_million_samples_is_addressed_within_50_ms_wherever_it_lies():
    best = {}
    for start in (0, 10**6, 123_456_789, 10**11):
        times = []
        for _ in range(3):
            order = SampleOrder([4000] * 258, seed=3)
            began = time.perf_counter()
            order.locate(np.arange(start, start + 4096))
            times.append(time.perf_counter() - began)
        best[start] = min(times)
    assert max(best.values()) < 0.05, best


def test_a_batch_that_the_world_does_not_divide_is_refused_with_the_nearest_valid():
    with pytest.raises(ShardError, match="not divisible by 3 ranks; nearest valid: 99"):
        rank_indices(0, 100, 0, 3)


@pytest.mark.parametrize("sizes", [[], [0, 0]])
def test_shards_without_samples_are_refused(sizes):
    with pytest.raises(ShardError, match="no sample"):
        SampleOrder(sizes)


@pytest.mark.parametrize("weights", [[1.0], [1, -1, 1], [0, 0, 0], [1, float("nan"), 1]])
def test_impossible_weights_are_refused(weights):
    with pytest.raises(ShardError, match="weights"):
        SampleOrder([3], weights=weights)


@settings(max_examples=80, deadline=None)
@given(layouts, lanes, windows, st.integers(0, 3), st.integers(0, 5000), st.integers(1, 40), st.data())
def test_the_shards_ahead_hold_every_sample_of_this_window_and_of_the_next(
    sizes, num_lanes, window, seed, start, count, data
):
    weights = data.draw(st.one_of(st.none(), st.just(np.arange(1, sum(sizes) + 1))))
    order = SampleOrder(sizes, seed, num_lanes, window, weights)
    indices = np.arange(start, start + count)
    ahead = order.shards_ahead(indices)
    assert len(ahead) == len(set(ahead))
    assert {s for _, s, _ in samples_of(order, start, start + count)} <= set(ahead)
    following = indices + order.num_lanes  # the next sample of each lane lies in this window or in the next
    assert set(order.locate(following)[1].tolist()) <= set(ahead)


def test_the_shards_ahead_of_a_large_set_are_few():
    order = SampleOrder([4000] * 258, seed=3)
    assert order.num_lanes == 64
    indices = np.arange(10**8, 10**8 + 4096, 8)  # rank 0 of 8 reads 8 of the 64 lanes
    ahead = order.shards_ahead(indices)
    assert 8 <= len(ahead) <= 8 * 5  # a window is one shard long: two windows of a lane touch at most four or five
    a_window_on = order.locate(indices + 64 * (order.window - 64))[1]
    assert set(a_window_on.tolist()) <= set(ahead)
