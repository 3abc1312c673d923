"""The loader gives every rank its batches, in order, the same whatever prepares them."""

from __future__ import annotations

import functools
import itertools
import threading

import numpy as np
import pytest

from shards.loader import BAD_GRACE, passes, sample_rng, stream
from shards.manifest import Manifest, ShardError
from shards.order import SampleOrder
from shards.reader import ShardReader

SIZES = [7, 12, 1, 20]


def key_and_draw(sample, rng):
    return sample["__key__"].decode(), float(rng.random())


def fails_for(sample, rng, bad):
    if int(sample["__key__"], 16) in bad:
        raise ValueError("not an image")
    return key_and_draw(sample, rng)


def keep(items, indices):
    return list(items), indices.tolist()


@pytest.fixture
def manifest(make_shards) -> Manifest:
    return make_shards(SIZES)


def read(manifest, *, start=0, batch=8, rank=0, world=1, steps=12, sample_fn=key_and_draw, **options):
    reader = ShardReader(manifest.folder, manifest.split("train"))
    order = SampleOrder(reader.shard_sizes, seed=3, window=8)
    return list(
        stream(
            reader,
            order,
            start=start,
            global_batch=batch,
            rank=rank,
            world=world,
            seed=11,
            sample_fn=sample_fn,
            collate_fn=keep,
            num_steps=steps,
            **options,
        )
    )


def in_stream_order(shares):
    """The items of all ranks of a run in the order of their stream indices."""
    pairs = [pair for share in shares for items, indices in share for pair in zip(indices, items, strict=True)]
    return [item for _, item in sorted(pairs)]


def test_batches_hold_the_samples_that_the_order_names_with_rng_of_the_stream_index(manifest):
    order = SampleOrder(SIZES, seed=3, window=8)
    borders = np.concatenate([[0], np.cumsum(SIZES)])
    for step, (items, indices) in enumerate(read(manifest)):
        assert indices == list(range(8 * step, 8 * step + 8))
        for (key, draw), index in zip(items, indices, strict=True):
            _, shard, row = order[index]
            assert int(key, 16) == borders[shard] + row
            assert draw == sample_rng(11, index).random()


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_together_read_the_single_process_sequence(manifest, world):
    alone = in_stream_order([read(manifest)])
    assert in_stream_order([read(manifest, rank=r, world=world) for r in range(world)]) == alone


def test_a_resume_at_any_step_on_another_world_continues_the_sequence(manifest):
    alone = in_stream_order([read(manifest)])
    for step in (1, 5, 11):
        rest = [read(manifest, start=8 * step, rank=r, world=2, steps=12 - step) for r in range(2)]
        assert in_stream_order(rest) == alone[8 * step :]


def test_batches_larger_than_the_set_span_epochs(manifest):
    ((items, _),) = read(manifest, batch=100, steps=1)
    counts = np.bincount([int(key, 16) for key, _ in items], minlength=40)
    assert counts.min() >= 2
    assert counts.max() <= 3
    assert counts.sum() == 100


def test_a_bad_sample_keeps_its_place_as_none(manifest):
    good = read(manifest, steps=5)
    spotted = read(manifest, steps=5, sample_fn=functools.partial(fails_for, bad={13}))
    for (items, _), (with_gap, _) in zip(good, spotted, strict=True):
        assert [None if int(i[0], 16) == 13 else i for i in items] == with_gap


def test_bad_samples_are_told_with_their_number_and_place_each_time_it_has_doubled(manifest, caplog):
    read(manifest, steps=100, sample_fn=functools.partial(fails_for, bad={5}), max_bad_fraction=1.0)
    told = [record.getMessage() for record in caplog.records]
    numbers = [int(line.split()[0]) for line in told]
    assert numbers[0] == 1
    assert len(numbers) > 1
    assert all(2 * before <= after for before, after in itertools.pairwise(numbers))
    assert all("sample 0000000000000005 (row " in line and "not an image" in line for line in told)


def test_too_many_bad_samples_stop_the_stream_naming_shard_and_key(manifest):
    bad = functools.partial(fails_for, bad=set(range(20, 40)))
    with pytest.raises(ShardError, match=r"train-00003\.tar: sample 00000000000000\w\w \(row \d+\): not an image"):
        read(manifest, steps=100, sample_fn=bad)


def test_few_bad_samples_of_many_do_not_stop_it(manifest):
    steps = 2 * BAD_GRACE // 8
    assert len(read(manifest, steps=steps, sample_fn=functools.partial(fails_for, bad={5}), max_bad_fraction=0.03)) == (
        steps
    )


def test_a_shard_cut_while_training_costs_samples_then_stops_with_its_name(manifest):
    path = manifest.path(manifest.shards[3])
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ShardError, match=r"train-00003\.tar.*truncated"):
        read(manifest, steps=100)


def test_an_error_that_is_not_the_samples_is_not_swallowed(manifest):
    def broken(sample, rng):
        raise TypeError("a mistake in the code")

    with pytest.raises(TypeError, match="a mistake"):
        read(manifest, sample_fn=broken)


def test_a_stream_that_is_left_early_leaves_no_thread(manifest):
    before = threading.active_count()
    reader = ShardReader(manifest.folder, manifest.shards)
    batches = stream(
        reader, SampleOrder(SIZES), start=0, global_batch=4, rank=0, world=1, seed=0, sample_fn=key_and_draw,
        collate_fn=keep,
    )  # fmt: skip
    next(batches)
    batches.close()
    assert threading.active_count() == before


def test_the_order_of_other_shards_is_refused(manifest):
    reader = ShardReader(manifest.folder, manifest.shards)
    with pytest.raises(ShardError, match="the order is of 3 samples"):
        stream(
            reader, SampleOrder([3]), start=0, global_batch=4, rank=0, world=1, seed=0, sample_fn=key_and_draw,
            collate_fn=keep,
        )  # fmt: skip


def evaluate(manifest, *, batch_size=6, rank=0, world=1):
    reader = ShardReader(manifest.folder, manifest.split("train"))
    return list(
        passes(
            reader, SIZES, batch_size=batch_size, rank=rank, world=world, sample_fn=key_and_draw, collate_fn=keep,
        )
    )  # fmt: skip


def test_a_pass_reads_every_row_once_in_manifest_order(manifest):
    batches = evaluate(manifest)
    assert [len(items) for _, (items, _) in batches] == [6] * 7
    rows = [int(item[0], 16) for _, (items, _) in batches for item in items if item]
    assert rows == list(range(40))


def test_the_last_batch_of_a_pass_is_padded_with_a_mask(manifest):
    rows, (items, indices) = evaluate(manifest)[-1]
    assert rows.tolist() == indices == [36, 37, 38, 39, 39, 39]
    assert [item is None for item in items] == [False] * 4 + [True] * 2


@pytest.mark.parametrize("world", [2, 3, 9])
def test_a_pass_has_the_same_batches_on_any_world(manifest, world):
    alone = [(rows.tolist(), batch) for rows, batch in evaluate(manifest)]
    shares = [[(rows.tolist(), batch) for rows, batch in evaluate(manifest, rank=r, world=world)] for r in range(world)]
    assert [shares[k % world][k // world] for k in range(len(alone))] == alone
