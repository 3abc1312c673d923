"""Pictures that are the same photograph: copies, other crops and magnifications, other colours, other compression.

Candidates come from two cheap looks: 64-bit perceptual hashes that nearly agree, and, since another crop has another
hash, the most similar pictures of every image by coarse correlation, also of its centre (a zoomed copy shows a part).
Neither is proof: a dark spot on pale skin has much the hash of another one (among 6,032 real images 10 of 14 pairs
within 2 bits show different lesions). So candidates are confirmed by local features that agree on one rotation, scale
and shift (keypoints.py). What that finds on those images is in results/duplicates.json.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dermfm.progress import track
from dermfm.records.keypoints import confirmed

HASH_BITS = 64
THUMBNAIL = 64  # side of the grey thumbnails in pixels
COARSE = 8  # side of what is correlated: 64 numbers an image
CENTRES = (1.0, 0.85, 0.7)  # shares of the side that are compared with whole pictures
NEIGHBOURS = 3  # most similar pictures of an image, for each of CENTRES
MIN_COARSE = 0.9  # correlation below which a neighbour is no candidate
NEAREST = 16  # pictures of an image whose hashes nearly agree with its own: the pairs grow with N, not with its square
BLOCK = 1 << 22  # pairs looked at at a time
NUM_BANDS, BAND_BITS = 4, 16  # of a hash
_BAND_STARTS = BAND_BITS * np.arange(NUM_BANDS, dtype=np.uint64)
BANDS_FROM, BANDS_TO = 4096, 15  # hashes from which, and bits up to which bands are worth their tables


@dataclass(frozen=True)
class Looks:
    """What is kept of the thumbnails of N pictures, less than a kilobyte of each.

    coarse: float32 [CENTRES, N, COARSE²], unit vectors of the pictures' centres; digests: uint64 [N, 2], the same for
    the same thumbnail.
    """

    coarse: np.ndarray
    digests: np.ndarray


def looks_of(thumbnails: Iterable[bytes]) -> Looks:
    """The looks of THUMBNAIL² grey bytes each, taken up as they come so that no thumbnail stays."""
    coarse = [np.empty((len(CENTRES), 0, COARSE * COARSE), np.float32)]
    digests = [b""]
    rest = iter(thumbnails)
    while block := list(itertools.islice(rest, 1024)):
        pictures = np.frombuffer(b"".join(block), np.uint8).reshape(-1, THUMBNAIL, THUMBNAIL)
        coarse.append(np.stack([coarse_vectors(pictures, share) for share in CENTRES]))
        digests.extend(hashlib.blake2b(one, digest_size=16).digest() for one in block)
    return Looks(np.concatenate(coarse, axis=1), np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2))


def duplicate_pairs(
    paths: Sequence[Path],
    hashes: Sequence[str],
    looks: Looks,
    max_distance: int,
    min_matches: int,
    workers: int = 0,
) -> list[tuple[int, int]]:
    """Pairs i < j of the same photograph, in order; none with `max_distance` < 0.

    `hashes` are 16 hex digits or empty. Candidates differ in at most `max_distance` bits (the NEAREST of an image) or
    resemble each other; `min_matches` local features must agree. Equal thumbnails need no proof.
    """
    if max_distance < 0 or len(hashes) < 2:
        return []
    near = nearest_of(near_hashes(hashes, max_distance), hashes)
    candidates = np.unique(np.concatenate([near, neighbours(looks.coarse)]), axis=0)
    equal = (looks.digests[candidates[:, 0]] == looks.digests[candidates[:, 1]]).all(axis=1)
    is_copy = equal.copy()
    is_copy[~equal] = confirmed(paths, candidates[~equal], min_matches, workers)
    return [(i, j) for i, j in candidates[is_copy].tolist()]


def nearest_of(pairs: np.ndarray, hashes: Sequence[str]) -> np.ndarray:
    """Those of the pairs [P, 2] in which one is among the NEAREST of the other by its hash, in order.

    Of equally near ones the first count, so that of many copies of one picture all stay connected to the first.
    """
    bits = np.array([int(text or "0", 16) for text in hashes], dtype=np.uint64)
    distance = np.bitwise_count(bits[pairs[:, 0]] ^ bits[pairs[:, 1]])
    kept = np.zeros(len(pairs), bool)
    for one, other in ((0, 1), (1, 0)):
        order = np.lexsort((pairs[:, other], distance, pairs[:, one]))
        image = pairs[order, one]
        rank = np.arange(len(order)) - np.searchsorted(image, image)
        kept[order] |= rank < NEAREST
    return pairs[kept]


def near_hashes(hashes: Sequence[str], max_distance: int) -> np.ndarray:
    """All pairs i < j [P, 2] of non-empty hashes that differ in at most `max_distance` bits, in order.

    Exact; by bands where that looks at fewer pairs than comparing all. Memory is bounded but for the pairs found.
    """
    index = np.array([i for i, text in enumerate(hashes) if text], dtype=np.int64)
    bits = np.array([int(hashes[i], 16) for i in index], dtype=np.uint64)
    masks = _band_masks(max_distance // NUM_BANDS) if len(bits) >= BANDS_FROM and max_distance <= BANDS_TO else None
    found = _near_by_bands(bits, max_distance, masks) if masks is not None else None
    found = _near_among_all(bits, max_distance) if found is None else found
    return index[found]


def _near_among_all(bits: np.ndarray, max_distance: int) -> np.ndarray:
    """Places [P, 2] of the near pairs among uint64 [N], in order, each compared with each."""
    rows = max(1, BLOCK // 8 // max(len(bits), 1))
    pairs = [np.empty((0, 2), np.int64)]
    for start in range(0, len(bits), rows):
        block = bits[start : start + rows]
        row, column = np.nonzero(np.bitwise_count(block[:, None] ^ bits[None, start:]) <= max_distance)
        pairs.append(start + np.stack([row, column], axis=1)[column > row])
    return np.concatenate(pairs)


def _near_by_bands(bits: np.ndarray, max_distance: int, masks: np.ndarray) -> np.ndarray | None:
    """As `_near_among_all`; None where it would look at as many pairs (many hashes with the same bands).

    Multi-index hashing (Norouzi, Punjani and Fleet 2014, IEEE TPAMI 36:1107): hashes within `max_distance` agree in one
    of NUM_BANDS bands up to a share of it, and a band's 65,536 values are a table. `masks` are the differences of a
    band to look for.
    """
    bands = [
        ((bits >> np.uint64(BAND_BITS * band)) & np.uint64(2**BAND_BITS - 1)).astype(np.int64)
        for band in range(NUM_BANDS)
    ]
    tables = [np.bincount(band, minlength=2**BAND_BITS) for band in bands]
    values = np.arange(2**BAND_BITS)
    looks = sum(float(table @ table[values ^ mask]) for table in tables for mask in masks)
    if looks > len(bits) ** 2 / 4:
        return None
    pairs = [np.empty((0, 2), np.int64)]
    for band, table in zip(bands, tables, strict=True):
        order = np.argsort(band, kind="stable")
        first = np.cumsum(table) - table
        for mask in masks:
            partner = band ^ mask
            asked = np.flatnonzero((table[partner] > 0) & (band <= partner))
            for some in _pieces(asked, table[partner[asked]]):
                count = table[partner[some]]
                left = np.repeat(some, count)
                within = np.arange(len(left)) - np.repeat(np.cumsum(count) - count, count)
                right = order[np.repeat(first[partner[some]], count) + within]
                is_near = np.bitwise_count(bits[left] ^ bits[right]) <= max_distance
                pairs.append(np.stack([left[is_near], right[is_near]], axis=1))
    both = np.sort(np.concatenate(pairs), axis=1)
    return np.unique(both[both[:, 0] != both[:, 1]], axis=0)


def _pieces(items: np.ndarray, counts: np.ndarray) -> Iterator[np.ndarray]:
    """`items` in pieces whose counts sum to about BLOCK / 8 at most."""
    piece = (np.cumsum(counts) - 1) // (BLOCK // 8)
    yield from np.split(items, np.flatnonzero(np.diff(piece)) + 1)


@functools.cache
def _band_masks(radius: int) -> np.ndarray:
    """The differences of two bands in at most `radius` bits."""
    values = np.arange(2**BAND_BITS)
    return values[np.bitwise_count(values.astype(np.uint32)) <= radius]


def neighbours(coarse: np.ndarray) -> np.ndarray:
    """Pairs i < j [P, 2] where one picture, or its centre, is among the most similar to the other; a pair may come
    twice. `coarse`: as in Looks, whole pictures first."""
    whole = coarse[0]
    rows = max(1, BLOCK // max(len(whole), 1))
    pairs = [np.empty((0, 2), np.int64)]
    starts = range(0, len(whole), rows)
    blocks = track(itertools.product(coarse, starts), len(coarse) * len(starts), "looking for alike images", "blocks")
    for part, start in blocks:
        correlation = part[start : start + rows] @ whole.T
        here = np.arange(len(correlation))
        correlation[here, here + start] = -1
        for _ in range(min(NEIGHBOURS, len(whole) - 1)):
            best = correlation.argmax(1)
            is_like = correlation[here, best] >= MIN_COARSE
            correlation[here, best] = -1
            pairs.append(np.stack([start + here, best], axis=1)[is_like])
    return np.sort(np.concatenate(pairs), axis=1)


def coarse_vectors(pictures: np.ndarray, share: float = 1.0) -> np.ndarray:
    """[N, 64] float32 of uint8 [N, 64, 64]: 8 × 8 means of the centre (`share` of the side), centred, unit length.

    Their dot product is a correlation.
    """
    edges = np.linspace(THUMBNAIL * (1 - share) / 2, THUMBNAIL * (1 + share) / 2, COARSE + 1)
    # Weight of every pixel in every mean: the part of it that lies between two edges.
    low, high = np.arange(THUMBNAIL)[:, None], np.arange(1, THUMBNAIL + 1)[:, None]
    weight = np.clip(np.minimum(high, edges[1:]) - np.maximum(low, edges[:-1]), 0, None).astype(np.float32)
    weight /= weight.sum(0)
    vectors = np.empty((len(pictures), COARSE * COARSE), np.float32)
    for start in range(0, len(pictures), 1024):  # floats of all pictures at once would be much
        block = pictures[start : start + 1024].astype(np.float32)
        vectors[start : start + 1024] = (weight.T @ (block @ weight)).reshape(len(block), -1)
    vectors -= vectors.mean(1, keepdims=True)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)
