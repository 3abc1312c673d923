"""Exact rankings of a pool by similarity, in chunks of queries: average precision, P@K, ranks; ties by expectation.

Identical pool vectors are scored once, so that equal notes are exact ties whatever the blocking of the matrix product
does to the last bit. Nothing larger than [chunk, pool] is ever held. One sort of 32-bit integers a query is all that
class-level metrics need: the key is the score's bits, made monotone, with relevance in the bit that scores below 2 in
absolute value leave free.

Expected average precision and precision within tie blocks: McSherry and Najork, "Computing information retrieval
performance measures efficiently in the presence of tied scores", ECIR 2008.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

CHUNK = 128  # queries scored together; fixed, because the blocking of a matrix product moves last bits
_LAST = np.iinfo(np.int32).max
NOBODY = np.zeros(0, np.int64)
# (number of the query, its scores [vectors], items that are out) → scores, the first of them in another order
Rerank = Callable[[int, np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Class-level results of Q queries: expected precision [Q, K] and ap [Q] (both NaN where the pool holds no relevant
    item), num_relevant [Q], pool_size [Q]."""

    precision: np.ndarray
    ap: np.ndarray
    num_relevant: np.ndarray
    pool_size: np.ndarray


@dataclasses.dataclass(frozen=True)
class TargetRank:
    """Instance-level results of Q queries. `better` pool items score above the best target; `tied` items share its
    score, `tied_targets` of them are targets (0: the query has no target); `pool_size` counts all admitted items."""

    better: np.ndarray
    tied: np.ndarray
    tied_targets: np.ndarray
    num_targets: np.ndarray
    pool_size: np.ndarray


class Pool:
    """Items that can be retrieved: vectors [N, d] float32 (equal rows merged), a class [N] and a group [N] each."""

    def __init__(self, vectors: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> None:
        self.labels, self.size = np.asarray(labels), len(labels)
        self.vectors, self.vector_of = unique_rows(vectors)
        self.counts = np.bincount(self.vector_of, minlength=len(self.vectors)).astype(np.int32)
        self._class_counts: dict[int, np.ndarray] = {}
        self._of_class: dict[int, np.ndarray] = {}
        self.in_order = bool(len(self.vectors) == self.size)
        self._by_group = np.argsort(groups, kind="stable")
        self._groups = np.asarray(groups)[self._by_group]

    def members(self, group: int) -> np.ndarray:
        """Item numbers of one group."""
        low, high = np.searchsorted(self._groups, group, "left"), np.searchsorted(self._groups, group, "right")
        return self._by_group[low:high]

    @property
    def is_repetitive(self) -> bool:
        """Whether the pool is much smaller counted in distinct vectors than in items."""
        return 2 * len(self.vectors) <= self.size

    def of_class(self, label: int) -> np.ndarray:
        """1 for items of the class, else 0: int32 [N]."""
        if label not in self._of_class:
            self._of_class[label] = (self.labels == label).astype(np.int32)
        return self._of_class[label]

    def class_counts(self, label: int) -> np.ndarray:
        """Items of one class behind each vector, int32 [vectors]."""
        if label not in self._class_counts:
            inside = self.vector_of[self.labels == label]
            self._class_counts[label] = np.bincount(inside, minlength=len(self.vectors)).astype(np.int32)
        return self._class_counts[label]

    def num_of_class(self, label: int) -> int:
        """Items of one class."""
        return int(self.class_counts(label).sum())

    def scores(self, queries: np.ndarray, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(rows of one chunk, their similarities [chunk, vectors] float32)."""
        for start in range(0, len(rows), CHUNK):
            part = rows[start : start + CHUNK]
            block = queries[part]
            if len(part) < CHUNK:  # the shape of the product stays the same, so that the bits do
                block = np.concatenate([block, np.zeros((CHUNK - len(part), block.shape[1]), block.dtype)])
            yield part, (block @ self.vectors.T)[: len(part)]


def unique_rows(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(distinct rows [U, d] in order of first appearance, number of each input row's distinct row [N])."""
    vectors = np.ascontiguousarray(vectors, dtype=np.float32) + np.float32(0)  # −0 and 0 are the same number
    as_bytes = vectors.view(np.dtype((np.void, vectors.dtype.itemsize * vectors.shape[1]))).ravel()
    _, first, inverse = np.unique(as_bytes, return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return vectors[first[order]], place[inverse.ravel()]


def shard_rows(num_queries: int, rank: int = 0, world: int = 1) -> np.ndarray:
    """Query rows of one rank: chunk k of consecutive rows belongs to rank k mod world."""
    return np.flatnonzero((np.arange(num_queries) // CHUNK) % world == rank)


def rank_classes(
    queries: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    pool: Pool,
    ks: tuple[int, ...],
    rows: np.ndarray | None = None,
    own_group: bool = False,
    rerank: Rerank | None = None,
) -> Ranking:
    """Relevance is the same class. Queries [Q, d] with labels [Q] and groups [Q]; `rows` limits the work (default all).

    The query's own group is out of the pool unless `own_group`. P@K of a pool smaller than K is over the whole pool.
    """
    rows = np.arange(len(queries)) if rows is None else rows
    counted = _Counted(pool.size, ks)
    precision, ap = np.full((len(rows), len(ks)), np.nan), np.full(len(rows), np.nan)
    relevant, sizes = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
    place = 0
    for part, scores in pool.scores(queries, rows):
        for query, score in zip(part, scores, strict=True):
            out, label = NOBODY if own_group else pool.members(groups[query]), int(labels[query])
            score = score if rerank is None else rerank(query, score, out)
            if pool.size == len(out):
                found = NOTHING
            elif pool.is_repetitive:
                found = _rank_repetitive(score, pool, label, out, counted)
            else:
                found = _rank_items(score, pool, label, out, counted)
            sizes[place], relevant[place], ap[place], precision[place] = pool.size - len(out), *found
            place += 1
    return Ranking(precision, ap, relevant, sizes)


def rank_targets(
    queries: np.ndarray,
    items: np.ndarray,
    groups: np.ndarray,
    pool: Pool,
    pool_items: np.ndarray,
    rows: np.ndarray | None = None,
    group_targets: bool = False,
    labels: np.ndarray | None = None,
    rerank: Rerank | None = None,
) -> TargetRank:
    """Rank of each query's own item. Queries [Q, d] with item ids [Q] and groups [Q]; pool items carry ids [N].

    Targets are the pool items of the same id and the rest of the group is out; with `group_targets` the others of the
    group are the targets and the item itself is out (image to image of the same lesion). With `labels` [Q] only pool
    items of the query's own class take part: what is left when the class tells nothing.
    """
    rows = np.arange(len(queries)) if rows is None else rows
    out = np.zeros((5, len(rows)), np.int64)
    place = 0
    for part, scores in pool.scores(queries, rows):
        for query, score in zip(part, scores, strict=True):
            family, counts, size = pool.members(groups[query]), pool.counts, pool.size
            if labels is not None:
                family = family[pool.labels[family] == labels[query]]
                counts = pool.class_counts(int(labels[query]))
                size = pool.num_of_class(int(labels[query]))
            own = pool_items[family] == items[query]
            targets, excluded = (family[~own], family[own]) if group_targets else (family[own], family[~own])
            out[3:, place] = len(targets), size - len(excluded)
            if len(targets):
                score = score if rerank is None else rerank(query, score, excluded)
                in_target, in_excluded = score[pool.vector_of[targets]], score[pool.vector_of[excluded]]
                best = in_target.max()
                out[0, place] = counts[score > best].sum() - (in_excluded > best).sum()
                out[1, place] = counts[score == best].sum() - (in_excluded == best).sum()
                out[2, place] = (in_target == best).sum()
            place += 1
    return TargetRank(*out)


def recall_at(ranks: TargetRank, k: int) -> np.ndarray:
    """Probability [Q] that a target is among the first k, over random order within its tie block; NaN without one."""
    t, r = ranks.tied.astype(float), ranks.tied_targets.astype(float)
    slots = np.clip(k - ranks.better, 0, ranks.tied)
    miss = np.ones(len(t))
    for j in range(int(r.max(initial=0))):  # no target among `slots` draws: prod_j (t − slots − j) / (t − j)
        live = r > j
        miss[live] *= np.clip(t[live] - slots[live] - j, 0, None) / (t[live] - j)
    return np.where(r > 0, 1.0 - miss, np.nan)


def mid_rank(ranks: TargetRank) -> np.ndarray:
    """Expected rank [Q] of the first target, from 1, over random order within its tie block; NaN without one."""
    middle = ranks.better + (ranks.tied + 1.0) / (ranks.tied_targets + 1.0)
    return np.where(ranks.tied_targets > 0, middle, np.nan)


def random_order(ranks: TargetRank) -> TargetRank:
    """The same queries where every admitted item scores alike: `recall_at` and `mid_rank` of it are chance levels."""
    targets, zero = ranks.num_targets, np.zeros_like(ranks.better)
    return TargetRank(zero, ranks.pool_size, targets, targets, ranks.pool_size)


def chance_ap(relevant: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Expected average precision [Q] of a random order with `relevant` among `sizes` items; NaN without relevant."""
    n, r = sizes.astype(float), relevant.astype(float)
    harmonic = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, int(sizes.max(initial=0)) + 1))])[sizes]
    slope = np.divide(r - 1, n - 1, out=np.zeros_like(n), where=n > 1)
    value = (harmonic + slope * (n - harmonic)) / np.maximum(n, 1)
    return np.where(relevant > 0, value, np.nan)


class _Counted:
    """What all queries of one pool share: cut-offs [K], harmonic numbers [N + 1], 1 … N."""

    def __init__(self, size: int, ks: tuple[int, ...]) -> None:
        self.ks = np.array(ks)
        self.counts = np.arange(1, size + 1, dtype=float)
        self.harmonic = np.concatenate([[0.0], np.cumsum(1.0 / self.counts)])


Found = tuple[int, float, np.ndarray | float]  # relevant items, average precision, precision [K]
NOTHING: Found = (0, float("nan"), float("nan"))


def _falling(score: np.ndarray) -> np.ndarray:
    """int32 [U] that rises as the score falls, equal where scores are; the lowest bit is free."""
    top = float(np.abs(score).max(initial=0))
    if top >= 2:
        score = np.ldexp(score, -int(np.frexp(top)[1]))  # a power of two moves no bit of the mantissa
    bits = np.subtract(np.float32(0), score).view(np.int32)  # 0 − x, so that there is no −0
    bits ^= (bits >> 31) & np.int32(0x7FFFFFFF)
    bits <<= 1
    return bits


def _rank_items(score: np.ndarray, pool: Pool, label: int, out: np.ndarray, counted: _Counted) -> Found:
    """One query over a pool whose ties are rare: excluded items sort to the end and are cut off."""
    keys = _falling(score)
    if not pool.in_order:
        keys = keys[pool.vector_of]
    keys |= pool.of_class(label)
    keys[out] = _LAST
    keys.sort()
    keys = keys[: len(keys) - len(out)]
    relevant = (keys & 1).astype(bool)
    place = np.flatnonzero(relevant)
    if not len(place):
        return NOTHING
    ap = float(np.sum(counted.counts[: len(place)] / (place + 1)))
    hits = np.searchsorted(place, counted.ks).astype(float)
    # Within a tie block the irrelevant items come first. Only blocks with both kinds need an expectation.
    mixed = np.flatnonzero((np.diff(keys) == 1) & ~relevant[:-1])
    if len(mixed):
        more_ap, more_hits = _mixed_blocks(keys, place, mixed, counted)
        ap, hits = ap + more_ap, hits + more_hits
    return len(place), ap / len(place), hits / np.minimum(counted.ks, len(keys))


def _mixed_blocks(
    keys: np.ndarray, place: np.ndarray, mixed: np.ndarray, counted: _Counted
) -> tuple[float, np.ndarray]:
    """What tie blocks change: expectation minus what irrelevant-first gave, of the summed precisions and hits [K].

    `mixed`: the last irrelevant item of each block that holds both kinds.
    """
    split = mixed + 1
    low, high = np.searchsorted(keys, keys[mixed]), np.searchsorted(keys, keys[split], "right")
    t, r, before = high - low, high - split, np.searchsorted(place, low)
    worst = r + (before - split) * (counted.harmonic[split + r] - counted.harmonic[split])
    expected = _expected_sum(low, before, t, r, counted.harmonic)
    inside = np.clip(counted.ks[None, :] - low[:, None], 0, t[:, None])
    hits = inside * (r / t)[:, None] - np.clip(inside - (t - r)[:, None], 0, None)
    return float(np.sum(expected - worst)), hits.sum(axis=0)


def _rank_repetitive(score: np.ndarray, pool: Pool, label: int, out: np.ndarray, counted: _Counted) -> Found:
    """One query over a pool of few distinct vectors: sorts these, and counts the items behind them."""
    counts, hits = pool.counts.copy(), pool.class_counts(label).copy()
    np.subtract.at(counts, pool.vector_of[out], 1)
    np.subtract.at(hits, pool.vector_of[out[pool.labels[out] == label]], 1)
    keys = _falling(score)
    order = np.argsort(keys, kind="stable")
    starts = np.concatenate([[0], np.flatnonzero(np.diff(keys[order])) + 1])
    size, relevant = np.add.reduceat(counts[order], starts), np.add.reduceat(hits[order], starts)
    before, relevant_before = np.cumsum(size) - size, np.cumsum(relevant) - relevant
    live = np.flatnonzero(relevant)
    if not len(live):
        return NOTHING
    n0, r0, t, r = before[live], relevant_before[live], size[live], relevant[live]
    ap = float(np.sum(_expected_sum(n0, r0, t, r, counted.harmonic)))
    inside = np.clip(counted.ks[None, :] - n0[:, None], 0, t[:, None])
    found = (inside * (r / t)[:, None]).sum(axis=0) / np.minimum(counted.ks, size.sum())
    return int(r.sum()), ap / r.sum(), found


def _expected_sum(n0: np.ndarray, r0: np.ndarray, t: np.ndarray, r: np.ndarray, harmonic: np.ndarray) -> np.ndarray:
    """Expected sum of precisions at the relevant items of tie blocks: items before, relevant before, size, relevant."""
    inverse = harmonic[n0 + t] - harmonic[n0]
    slope = np.divide(r - 1, t - 1, out=np.zeros(len(t)), where=t > 1)
    return r / t * ((r0 + 1) * inverse + slope * (t - (n0 + 1) * inverse))
