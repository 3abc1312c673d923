"""Batches of one rank from a position in the stream. The only module of `shards` that imports torch.

What a batch holds depends on (manifest, order, seed, stream indices) alone: not on ranks, workers or the time. Step
counts are arithmetic; no rank can run dry before another.
"""

from __future__ import annotations

import functools
import itertools
import logging
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset

from shards.index import ShardError
from shards.order import SampleOrder, rank_indices
from shards.reader import ShardReader
from shards.storage import StorageError

# (sample, rng) → item; one that also has `prepare(sample, rng)`, returning a call for the item, works in two steps; one
# that has `allocate(count)`, too, gives memory of a batch: each call gets its row of it, the collate gets it whole
SampleFunction = Callable[[dict[str, bytes], np.random.Generator], Any]
CollateFunction = Callable[..., Any]  # (items, stream indices[, memory]) → batch
BAD_SAMPLE = (OSError, ValueError, UnidentifiedImageError, KeyError)
_log = logging.getLogger(__name__)
BAD_GRACE = 1000  # samples over which the bad fraction is at least measured: one bad one in a first batch stops nothing


@dataclass
class _Made:
    """A batch with what went wrong in it: samples that became None, and the message of the last; or, instead of a
    batch, why there can be none (a message: exceptions that cross processes drag their traceback along)."""

    batch: Any
    num_samples: int
    num_bad: int
    last_bad: str
    failure: str = ""

    def pin_memory(self) -> _Made:
        """The same with the batch in page-locked memory, where it knows how; DataLoader calls this on CUDA."""
        pin = getattr(self.batch, "pin_memory", None)
        return replace(self, batch=pin()) if pin is not None else self


def sample_rng(seed: int, index: int) -> np.random.Generator:
    """The generator of everything random about stream index `index`: augmentation and the choice of a note."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, index])))


def stream(
    reader: ShardReader,
    order: SampleOrder,
    *,
    start: int,
    global_batch: int,
    rank: int,
    world: int,
    seed: int,
    sample_fn: SampleFunction,
    collate_fn: CollateFunction,
    num_workers: int = 0,
    num_steps: int | None = None,
    max_bad_fraction: float = 0.01,
) -> Iterator[Any]:
    """This rank's batches of global_batch / world samples, endless or `num_steps` of them.

    `start`: samples that the whole job has seen. Each sample becomes `sample_fn(bytes, rng of (seed, stream index))`;
    one that raises an error of reading or decoding becomes None and keeps its place, and
    `collate_fn(items, stream indices [b])` gives it weight 0. ShardError naming shard and key of the last bad sample
    when more than `max_bad_fraction` of this rank's samples are bad, StorageError when a remote storage does not give
    its bytes after all attempts. With workers, batches are made in processes, in
    order; without, a thread prepares the next batch while this one is used.
    """
    if start < 0:
        raise ShardError(f"stream: start ({start}) must be at least 0")
    if order.num_samples != sum(reader.shard_sizes):
        raise ShardError(f"stream: the order is of {order.num_samples} samples, the shards of {reader.folder} are not")
    rank_indices(start, global_batch, rank, world)
    make = _TrainBatches(reader, order, start, global_batch, rank, world, seed, sample_fn, collate_fn)
    steps = itertools.count() if num_steps is None else range(num_steps)
    return _counted(_ordered(make, steps, num_workers), max_bad_fraction)


def passes(
    reader: ShardReader,
    shard_sizes: Sequence[int],
    *,
    batch_size: int,
    rank: int,
    world: int,
    sample_fn: SampleFunction,
    collate_fn: CollateFunction,
    num_workers: int = 0,
    max_bad_fraction: float = 0.01,
) -> Iterator[tuple[np.ndarray, Any]]:
    """One pass over all samples in manifest order: batch k of `batch_size` consecutive rows on rank k mod world.

    Yields (global rows [batch_size], batch). The last batch is padded: its rows repeat the last one and the collate
    gets None, so that those have weight 0. The same batches on any world.
    """
    num_samples = sum(shard_sizes)
    num_batches = -(-num_samples // batch_size)
    make = _EvaluationBatches(reader, list(shard_sizes), batch_size, sample_fn, collate_fn)
    batches = _counted(_ordered(make, range(rank, num_batches, world), num_workers), max_bad_fraction)
    for k, batch in zip(range(rank, num_batches, world), batches, strict=True):
        yield np.minimum(np.arange(k * batch_size, (k + 1) * batch_size), num_samples - 1), batch


@dataclass
class _TrainBatches(Dataset):
    """Step number → this rank's batch of the step."""

    reader: ShardReader
    order: SampleOrder
    start: int
    global_batch: int
    rank: int
    world: int
    seed: int
    sample_fn: SampleFunction
    collate_fn: CollateFunction

    def __getitem__(self, step: int) -> _Made:
        indices = rank_indices(self.start + step * self.global_batch, self.global_batch, self.rank, self.world)
        _, shards, rows = self.order.locate(indices)
        if self.reader.wants_prefetch:
            self.reader.prefetch(self.order.shards_ahead(indices))
        return _make(self, shards, rows, indices, self.seed)


@dataclass
class _EvaluationBatches(Dataset):
    """Batch number → the batch of consecutive rows."""

    reader: ShardReader
    shard_sizes: list[int]
    batch_size: int
    sample_fn: SampleFunction
    collate_fn: CollateFunction

    def __getitem__(self, number: int) -> _Made:
        borders = np.concatenate([[0], np.cumsum(self.shard_sizes)])
        indices = np.arange(number * self.batch_size, min((number + 1) * self.batch_size, borders[-1]))
        shards = np.searchsorted(borders, indices, side="right") - 1
        if self.reader.wants_prefetch:
            self.reader.prefetch(range(shards[0], min(shards[-1] + 2, len(self.shard_sizes))))
        return _make(self, shards, indices - borders[shards], indices, 0, pad_to=self.batch_size)


def _make(
    source: _TrainBatches | _EvaluationBatches,
    shards: np.ndarray,
    rows: np.ndarray,
    indices: np.ndarray,
    seed: int,
    pad_to: int = 0,
) -> _Made:
    """Two passes over the samples: what is short (reading, choosing) and then what is long (decoding). In between each
    other, decoding would leave the processor's caches cold for the rest, which then takes several times as long."""
    prepare = getattr(source.sample_fn, "prepare", None) or functools.partial(functools.partial, source.sample_fn)
    places = list(zip(shards.tolist(), rows.tolist(), strict=True))
    works: list[Callable[..., Any] | str] = []  # or what is wrong: an error kept would keep its frame, and the batch
    for (shard, row), index, read in zip(places, indices.tolist(), source.reader.reads(places), strict=True):
        try:
            works.append(prepare(read(), sample_rng(seed, index)))
        except StorageError as error:  # the storage is at fault, not the sample: no gap in the stream, but an end
            return _Made(None, len(rows), 0, "", f"{error}; asked for row {row} of {source.reader.shards[shard].name}")
        except BAD_SAMPLE as error:
            works.append(_describe(source.reader, shard, row, error))
    allocate = getattr(source.sample_fn, "allocate", None)
    memory = (allocate(max(len(works), pad_to)),) if allocate is not None else ()
    items: list[Any] = []
    num_bad, last_bad = 0, ""
    for (shard, row), work in zip(places, works, strict=True):
        if not isinstance(work, str):
            try:
                items.append(work(*(whole[len(items)] for whole in memory)))
                continue
            except BAD_SAMPLE as error:
                work = _describe(source.reader, shard, row, error)
        items.append(None)
        num_bad, last_bad = num_bad + 1, work
    padding = max(0, pad_to - len(items))
    indices = np.concatenate([indices, np.repeat(indices[-1:], padding)])
    batch = source.collate_fn(items + [None] * padding, indices, *memory)
    return _Made(batch, len(rows), num_bad, last_bad)


def _describe(reader: ShardReader, shard: int, row: int, error: Exception) -> str:
    try:
        key = reader.key(shard, row)
    except BAD_SAMPLE:
        key = "unknown"
    return f"{reader.shards[shard].name}: sample {key} (row {row}): {error}"


def _ordered(make: Dataset, numbers: Iterable[int], num_workers: int) -> Iterator[_Made]:
    """make[number] for each number, in order, ahead of use."""
    return _in_workers(make, numbers, num_workers) if num_workers > 0 else _in_thread(make, numbers)


def _in_workers(make: Dataset, numbers: Iterable[int], num_workers: int) -> Iterator[_Made]:
    # forkserver: forking a process that runs CUDA, gloo or Ray threads can hang; a hang is what must not happen
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["shards.loader"])
    loader = DataLoader(
        make,
        sampler=_Numbers(numbers),
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=2,
        multiprocessing_context=context,
        pin_memory=torch.cuda.is_available(),
        collate_fn=_unchanged,
    )
    yield from loader


@dataclass
class _Numbers:
    """A sampler of given numbers, endless ones too."""

    numbers: Iterable[int]

    def __iter__(self) -> Iterator[int]:
        return iter(self.numbers)


def _unchanged(made: Any) -> Any:
    return made


def _in_thread(make: Dataset, numbers: Iterable[int]) -> Iterator[_Made]:
    on_cuda = torch.cuda.is_available()

    def prepare(number: int) -> _Made:
        return make[number].pin_memory() if on_cuda else make[number]

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as pool:
        ahead = None
        for number in numbers:
            ready, ahead = ahead, pool.submit(prepare, number)
            if ready is not None:
                yield ready.result()
        if ahead is not None:
            yield ahead.result()


def _counted(batches: Iterator[_Made], max_bad_fraction: float) -> Iterator[Any]:
    """The batches, until too many of their samples were bad; fewer are told each time that their number has doubled."""
    num_samples = num_bad = 0
    tell_at = 1
    for made in batches:
        if made.failure:
            raise StorageError(made.failure)
        num_samples += made.num_samples
        num_bad += made.num_bad
        if num_bad > max_bad_fraction * max(num_samples, BAD_GRACE):
            raise ShardError(
                f"{num_bad} of {num_samples} samples could not be used (at most {max_bad_fraction:.2%} may be bad); "
                f"the last: {made.last_bad}"
            )
        if num_bad >= tell_at:
            tell_at = 2 * num_bad
            _log.warning("%d of %d samples could not be used; the last: %s", num_bad, num_samples, made.last_bad)
        yield made.batch
