"""The order of samples as a pure function: stream index → (epoch, shard, row).

Nothing here knows ranks, workers or nodes, and nothing has state that a resume would need: a job stores how many
samples it has seen, and every rank computes the rest. All randomness is integer arithmetic of its own (splitmix64), so
that an upgrade of numpy cannot change the order of a run that is resumed.

Terms. N samples make an epoch. The *sequence* concatenates the epochs, each with its shards in an order of its own.
*Segment* e holds the sequence positions [⌊eN/L⌋·L, ⌊(e+1)N/L⌋·L) for L *lanes*; each lane is a contiguous piece of the
segment, shuffled in windows. The *stream* takes one sample from each lane in turn.
"""

from __future__ import annotations

import functools
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from shards.index import ShardError

MAX_LANES = 64
WEIGHT_BITS = 30  # weights are fixed-point numbers, so that resampling is exact integer arithmetic
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_TAG_SHARDS, _TAG_WINDOW, _TAG_OFFSET = 1, 2, 3


class SampleOrder:
    """Where stream index i finds its sample.

    `shard_sizes`: samples of each shard, in the manifest's order. `num_lanes=None`: the largest power of two up to 64
    with N ≥ lanes · window, at least 1. `weights` [N]: how often each sample (in manifest order) shall come in an
    epoch, relative to the mean of 1; by systematic resampling it comes ⌊w⌋ or ⌈w⌉ times. Raises ShardError for
    impossible arguments.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        seed: int = 0,
        num_lanes: int | None = None,
        window: int = 4096,
        weights: Sequence[float] | np.ndarray | None = None,
    ) -> None:
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        if sizes.ndim != 1 or len(sizes) == 0 or (sizes < 0).any() or sizes.sum() == 0:
            raise ShardError("sample order: the shards hold no sample")
        if window < 1 or (num_lanes is not None and num_lanes < 1):
            raise ShardError(f"sample order: window ({window}) and num_lanes ({num_lanes}) must be at least 1")
        self.num_samples = int(sizes.sum())
        self.seed = int(seed)
        self.window = int(window)
        self.num_lanes = default_lanes(self.num_samples, window) if num_lanes is None else int(num_lanes)
        self._first_row = np.concatenate([[0], np.cumsum(sizes)])
        self._cumulative = None if weights is None else _cumulative_weights(weights, self.num_samples)
        self._windows: _Recent = _Recent(4 * self.num_lanes + 4)
        self._epochs: _Recent = _Recent(4)
        self._spans: _Recent = _Recent(8 * self.num_lanes)

    def __getitem__(self, index: int) -> tuple[int, int, int]:
        """(epoch, shard, row) of one stream index."""
        epochs, shards, rows = self.locate(np.asarray([index]))
        return int(epochs[0]), int(shards[0]), int(rows[0])

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(epochs, shards, rows), int64 arrays of the shape of `indices` [n] (any non-negative stream indices)."""
        positions = self._sequence_positions(np.asarray(indices, dtype=np.int64))
        epochs, slots = np.divmod(positions, self.num_samples)
        shards, rows = np.empty_like(slots), np.empty_like(slots)
        for epoch in np.unique(epochs):
            of_epoch = epochs == epoch
            shards[of_epoch], rows[of_epoch] = self._samples_of_slots(int(epoch), slots[of_epoch])
        return epochs, shards, rows

    def shards_ahead(self, indices: np.ndarray) -> list[int]:
        """Shards of the windows that `indices` [n] lie in, then those of the next windows of the same lanes; each once.

        What a reader of these indices needs now and soon, and should have near.
        """
        starts, sizes, _ = self._windows_of(np.asarray(indices, dtype=np.int64))
        now, where = np.unique(starts, return_index=True)
        lanes, n = self.num_lanes, self.num_samples
        segments, lane_of, window_of, _ = self._places(np.asarray(indices, dtype=np.int64)[where])
        begins, ends = (segments * n // lanes * lanes), ((segments + 1) * n // lanes * lanes)
        following = begins + lane_of + lanes * (window_of + 1) * self.window
        following = np.where(following < ends, following, ends + lane_of)  # past its end a lane goes on in the next
        next_starts, next_sizes, _ = self._windows_of(following)
        found: dict[int, None] = {}
        spans = zip([*now, *next_starts], [*sizes[where], *next_sizes], strict=True)
        for start, size in spans:
            span = int(start), int(size)
            found |= dict.fromkeys(self._spans.get(span, functools.partial(self._shards_of_span, *span)))
        return list(found)

    def identity(self) -> dict[str, Any]:
        """What must be equal for a resumed run to continue the same stream (beside manifest and batch)."""
        weights = None
        if self._cumulative is not None:
            weights = hashlib.sha256(self._cumulative.tobytes()).hexdigest()[:16]
        return {"seed": self.seed, "num_lanes": self.num_lanes, "window": self.window, "weights": weights}

    def _places(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(segment, lane, window of the lane, offset in the window) of stream indices."""
        if len(indices) and indices.min() < 0:
            raise ShardError(f"sample order: stream index {indices.min()} is negative")
        lanes, n = self.num_lanes, self.num_samples
        segments = ((indices // lanes + 1) * lanes - 1) // n  # the largest e with ⌊eN/L⌋ ≤ i div L
        places, lane_of = np.divmod(indices - segments * n // lanes * lanes, lanes)
        window_of, offsets = np.divmod(places, self.window)
        return segments, lane_of, window_of, offsets

    def _windows_of(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(first sequence position, size, name (segment, lane, window, size) [n, 4]) of the windows of the indices."""
        segments, lane_of, window_of, _ = self._places(indices)
        lanes, n = self.num_lanes, self.num_samples
        begins = segments * n // lanes * lanes
        lane_lengths = ((segments + 1) * n // lanes * lanes - begins) // lanes
        starts = begins + lane_of * lane_lengths + window_of * self.window
        sizes = np.minimum(self.window, lane_lengths - window_of * self.window)
        return starts, sizes, np.stack([segments, lane_of, window_of, sizes], axis=1)

    def _sequence_positions(self, indices: np.ndarray) -> np.ndarray:
        offsets = self._places(indices)[3]
        starts, _, names = self._windows_of(indices)
        order = np.argsort(starts, kind="stable")  # a window is named by where it starts
        borders = np.flatnonzero(np.diff(starts[order])) + 1
        for group in np.split(order, borders):
            if len(group) == 0:
                continue
            offsets[group] = self._shuffled_window(*map(int, names[group[0]]))[offsets[group]]
        return starts + offsets

    def _shards_of_span(self, start: int, size: int) -> list[int]:
        """The shards of `size` consecutive sequence positions, in the order of the sequence."""
        found: list[int] = []
        n = self.num_samples
        for epoch in range(start // n, (start + size - 1) // n + 1):
            first, last = max(start, epoch * n) - epoch * n, min(start + size, (epoch + 1) * n) - 1 - epoch * n
            shard_order, _ = self._epochs.get(epoch, functools.partial(self._shards_of_epoch, epoch))
            shards, _ = self._samples_of_slots(epoch, np.asarray([first, last]))
            low, high = (int(np.argmax(shard_order == shard)) for shard in shards)
            found += shard_order[low : high + 1].tolist()
        return found

    def _shuffled_window(self, segment: int, lane: int, window: int, size: int) -> np.ndarray:
        name = (segment, lane, window)
        return self._windows.get(name, lambda: permutation(size, self.seed, _TAG_WINDOW, *name))

    def _samples_of_slots(self, epoch: int, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shard, row) of the slots of one epoch."""
        shard_order, borders = self._epochs.get(epoch, lambda: self._shards_of_epoch(epoch))
        if self._cumulative is None:
            place = np.searchsorted(borders, slots, side="right") - 1
            shards = shard_order[place]
            return shards, slots - borders[place]
        shift = mix(self.seed, _TAG_OFFSET, epoch) >> (64 - WEIGHT_BITS)
        points = (slots << WEIGHT_BITS) + shift
        place = np.searchsorted(borders, points, side="right") - 1
        shards = shard_order[place]
        points = points - borders[place] + self._cumulative[self._first_row[shards]]
        samples = np.searchsorted(self._cumulative, points, side="right") - 1
        return shards, samples - self._first_row[shards]

    def _shards_of_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's shard order, and where each of them begins in it: in samples, or in fixed-point weight."""
        shard_order = permutation(len(self._first_row) - 1, self.seed, _TAG_SHARDS, epoch)
        scale = self._first_row if self._cumulative is None else self._cumulative[self._first_row]
        return shard_order, np.concatenate([[0], np.cumsum(np.diff(scale)[shard_order])])


def default_lanes(num_samples: int, window: int) -> int:
    """The largest power of two up to 64 with num_samples ≥ lanes · window, at least 1."""
    lanes = MAX_LANES
    while lanes > 1 and num_samples < lanes * window:
        lanes //= 2
    return lanes


def rank_indices(samples_seen: int, global_batch: int, rank: int, world: int) -> np.ndarray:
    """Stream indices [global_batch / world] of one rank in the step that begins after `samples_seen` samples."""
    if global_batch < 1 or global_batch % world:
        valid = max(1, round(global_batch / world)) * world
        raise ShardError(f"batch of {global_batch} samples: not divisible by {world} ranks; nearest valid: {valid}")
    return np.arange(samples_seen + rank, samples_seen + global_batch, world, dtype=np.int64)


def mix(*words: int) -> int:
    """A 64-bit hash of integers (splitmix64, Steele et al. 2014, chained)."""
    state = 0
    for word in words:
        state = _finalise(((state ^ (word & _MASK)) + _GOLDEN) & _MASK)
    return state


def permutation(size: int, *words: int) -> np.ndarray:
    """A pseudo-random permutation [size] of 0 … size − 1, a function of the integers `words` alone."""
    bits = max(1, (size - 1).bit_length())
    counters = np.arange(size, dtype=np.uint64)
    keys = _finalise_array((counters + np.uint64(1)) * np.uint64(_GOLDEN) + np.uint64(mix(*words)))
    # the number itself in the low bits makes all keys different: whatever sorts them, the result is one
    keys = (keys >> np.uint64(bits) << np.uint64(bits)) | counters
    return (np.sort(keys) & np.uint64((1 << bits) - 1)).astype(np.int64)


def _finalise(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _finalise_array(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _cumulative_weights(weights: Sequence[float] | np.ndarray, num_samples: int) -> np.ndarray:
    """[N + 1] int64: cumulative weights in units of 2^−30, ending at exactly N."""
    given = np.asarray(weights, dtype=np.float64)
    if given.shape != (num_samples,):
        raise ShardError(f"sample order: {len(given)} weights for {num_samples} samples")
    if not np.isfinite(given).all() or (given < 0).any() or given.sum() <= 0:
        raise ShardError("sample order: weights must be finite, not negative, and not all zero")
    exact = given * (num_samples / given.sum()) * (1 << WEIGHT_BITS)
    units = np.rint(exact).astype(np.int64)
    missing = (num_samples << WEIGHT_BITS) - int(units.sum())
    # rounding is made good where it was done: whole numbers and zeros stay what they are
    open_ones = np.flatnonzero((units & ((1 << WEIGHT_BITS) - 1)) != 0)
    if len(open_ones) == 0:
        open_ones = np.flatnonzero(units)
    each, rest = divmod(abs(missing), len(open_ones))
    sign = 1 if missing > 0 else -1
    units[open_ones] += sign * each
    units[open_ones[:rest]] += sign
    return np.concatenate([[0], np.cumsum(units)])


class _Recent:
    """The `size` results asked for last; they are pure functions of their names, so forgetting is harmless."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._known: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, name: Hashable, compute: Callable[[], Any]) -> Any:
        if name not in self._known:
            self._known[name] = compute()
            if len(self._known) > self._size:
                self._known.popitem(last=False)
        return self._known[name]
