"""Exact rankings of a pool by similarity, in chunks of queries: average precision, P@K, ranks; ties by expectation.

Identical pool vectors are scored once and carry a count, so that equal notes are exact ties whatever the blocking of
the matrix product does to the last bit. One sort a query gives order and tie blocks together: the key is the score's
bits, made monotone, above the vector's index. Nothing larger than [chunk, vectors] is ever held.

Expected average precision and precision within tie blocks: McSherry and Najork, "Computing information retrieval
performance measures efficiently in the presence of tied scores", ECIR 2008.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

CHUNK = 128  # queries scored together; fixed, because the blocking of a matrix product moves last bits
_LOW = np.int64(0xFFFFFFFF)


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
        self._is_class: dict[int, np.ndarray] = {}
        self._by_group = np.argsort(groups, kind="stable")
        self._groups = np.asarray(groups)[self._by_group]

    def members(self, group: int) -> np.ndarray:
        """Item numbers of one group."""
        low, high = np.searchsorted(self._groups, group, "left"), np.searchsorted(self._groups, group, "right")
        return self._by_group[low:high]

    def class_counts(self, label: int) -> np.ndarray:
        """Items of one class behind each vector, int32 [vectors]."""
        if label not in self._class_counts:
            inside = self.vector_of[self.labels == label]
            self._class_counts[label] = np.bincount(inside, minlength=len(self.vectors)).astype(np.int32)
        return self._class_counts[label]

    def is_class(self, label: int) -> np.ndarray:
        """Whether an item of the class is behind each vector, bool [vectors]."""
        if label not in self._is_class:
            self._is_class[label] = self.class_counts(label) > 0
        return self._is_class[label]

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
) -> Ranking:
    """Relevance is the same class. Queries [Q, d] with labels [Q] and groups [Q]; `rows` limits the work (default all).

    The query's own group is out of the pool unless `own_group`. P@K of a pool smaller than K is over the whole pool.
    """
    rows = np.arange(len(queries)) if rows is None else rows
    harmonic = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, pool.size + 1))])
    precision, ap = np.full((len(rows), len(ks)), np.nan), np.full(len(rows), np.nan)
    relevant, sizes = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
    sorted_blocks = _single_blocks if int(pool.counts.max(initial=0)) <= 1 else _merged_blocks
    place = 0
    for part, scores in pool.scores(queries, rows):
        for query, key in zip(part, _keys(scores), strict=True):
            out = pool.members(groups[query])[: 0 if own_group else None]
            blocks = sorted_blocks(key, pool, int(labels[query]), out)
            sizes[place], relevant[place] = pool.size - len(out), blocks[3].sum()
            if relevant[place]:
                ap[place] = _expected_ap(*blocks, harmonic) / relevant[place]
                precision[place] = _expected_precision(*blocks, ks, int(sizes[place]))
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
) -> TargetRank:
    """Rank of each query's own item. Queries [Q, d] with item ids [Q] and groups [Q]; pool items carry ids [N].

    Targets are the pool items of the same id and the rest of the group is out; with `group_targets` the others of the
    group are the targets and the item itself is out (image to image of the same lesion).
    """
    rows = np.arange(len(queries)) if rows is None else rows
    out = np.zeros((5, len(rows)), np.int64)
    place = 0
    for part, scores in pool.scores(queries, rows):
        for query, score in zip(part, scores, strict=True):
            family = pool.members(groups[query])
            own = pool_items[family] == items[query]
            targets, excluded = (family[~own], family[own]) if group_targets else (family[own], family[~own])
            out[3:, place] = len(targets), pool.size - len(excluded)
            if len(targets):
                in_target, in_excluded = score[pool.vector_of[targets]], score[pool.vector_of[excluded]]
                best = in_target.max()
                out[0, place] = pool.counts[score > best].sum() - (in_excluded > best).sum()
                out[1, place] = pool.counts[score == best].sum() - (in_excluded == best).sum()
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


Blocks = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Tie blocks that hold a relevant item, in order: items before, relevant before, items in it, relevant in it."""


def _keys(scores: np.ndarray) -> np.ndarray:
    """[chunk, U] int64: high half the descending score as a monotone integer, low half the vector's index."""
    bits = np.ascontiguousarray(np.float32(0) - scores).view(np.int32)  # 0 − x: descending, and no −0
    bits = bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))
    return (bits.astype(np.int64) << 32) | np.arange(scores.shape[1], dtype=np.int64)


def _single_blocks(key: np.ndarray, pool: Pool, label: int, out: np.ndarray) -> Blocks:
    """Blocks where every vector is one item: excluded items sort to the end and are cut off. Ties are rare here."""
    key[pool.vector_of[out]] = np.iinfo(np.int64).max
    key.sort()
    key = key[: len(key) - len(out)]
    place = np.flatnonzero(pool.is_class(label)[key & _LOW])
    score = key >> 32
    ties = np.flatnonzero(score[1:] == score[:-1])
    before, ones = np.arange(len(place)), np.ones(len(place), np.int64)
    if not len(ties):
        return place, before, ones, ones
    first = ties[np.concatenate([[True], np.diff(ties) > 1])]
    last = ties[np.concatenate([np.diff(ties) > 1, [True]])] + 1
    low, high = np.searchsorted(place, first), np.searchsorted(place, last, "right")
    live = high > low
    first, last, low, high = first[live], last[live], low[live], high[live]
    place, size, hits = place.copy(), ones.copy(), ones.copy()
    place[low], size[low], hits[low] = first, last - first + 1, high - low
    keep = np.ones(len(place), bool)  # a block is written at its first relevant item, the others of it go
    change = np.zeros(len(place) + 1, np.int64)
    np.add.at(change, low + 1, 1)
    np.add.at(change, high, -1)
    keep[np.cumsum(change)[:-1] > 0] = False
    return place[keep], before[keep], size[keep], hits[keep]


def _merged_blocks(key: np.ndarray, pool: Pool, label: int, out: np.ndarray) -> Blocks:
    """Blocks where a vector can stand for many items."""
    counts, hits = pool.counts.copy(), pool.class_counts(label).copy()
    np.subtract.at(counts, pool.vector_of[out], 1)
    np.subtract.at(hits, pool.vector_of[out[pool.labels[out] == label]], 1)
    key.sort()
    order, score = key & _LOW, key >> 32
    starts = np.concatenate([[0], np.flatnonzero(score[1:] != score[:-1]) + 1])
    size, relevant = np.add.reduceat(counts[order], starts), np.add.reduceat(hits[order], starts)
    live = np.flatnonzero(relevant)
    size, relevant, before, relevant_before = size[live], relevant[live], np.cumsum(size), np.cumsum(relevant)
    return before[live] - size, relevant_before[live] - relevant, size, relevant


def _expected_ap(n0: np.ndarray, r0: np.ndarray, t: np.ndarray, r: np.ndarray, harmonic: np.ndarray) -> float:
    """Expected sum of the precisions at the relevant items of all blocks."""
    inverse = harmonic[n0 + t] - harmonic[n0]
    slope = np.divide(r - 1, t - 1, out=np.zeros(len(t)), where=t > 1)
    return float(np.sum(r / t * ((r0 + 1) * inverse + slope * (t - (n0 + 1) * inverse))))


def _expected_precision(
    n0: np.ndarray, r0: np.ndarray, t: np.ndarray, r: np.ndarray, ks: tuple[int, ...], size: int
) -> list[float]:
    """Expected share of relevant items among the first K (or the whole pool, where it is smaller)."""
    head = int(np.searchsorted(n0, max(ks)))
    n0, t, r = n0[:head], t[:head], r[:head]
    return [float(np.sum(r * np.clip((k - n0) / t, 0.0, 1.0)) / min(k, size)) for k in ks]
