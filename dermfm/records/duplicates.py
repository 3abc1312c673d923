"""Pictures that are the same photograph: copies, other crops, other colours, other compression.

A 64-bit perceptual hash finds candidates, but a dark spot on pale skin has much the same hash as another one: among
6,032 real images 10 of 14 pairs within 2 bits show different lesions, while true copies differ in up to 18 bits (other
crop and colours). So the candidates' fine texture (hairs, skin lines, pigment) is compared as well: the largest
correlation over small shifts after local contrast normalisation. On those images (candidates within 20 bits, the 100
most similar pairs looked at as thumbnails) all 31 pairs from 0.84 on showed the same lesion, mostly the same
photograph, and the most similar pair of different lesions had 0.836. The threshold was chosen on these images and
favours precision: at least seven copies with other crops (0.76 to 0.835) and one beyond 16 bits are known to be missed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np
from scipy.ndimage import gaussian_filter

HASH_BITS = 64
THUMBNAIL = 64  # side of the grey thumbnails in pixels
MAX_SHIFT = 8  # thumbnail pixels
COARSE = 16
MIN_COARSE = 0.6  # correlation of 16 × 16 versions below which the texture is not compared
ROWS = 512  # images compared with all later ones at a time


def duplicate_pairs(
    hashes: Sequence[str], thumbnails: Sequence[bytes], max_distance: int, min_similarity: float
) -> Iterator[tuple[int, int]]:
    """Pairs i < j of the same photograph.

    `hashes` are 16 hex digits or empty (pairs with nothing), `thumbnails` THUMBNAIL² grey bytes. Candidates differ in
    at most `max_distance` bits; `min_similarity` is that of `similarity`.
    """
    if max_distance < 0 or len(hashes) < 2:
        return
    coarse = coarse_vectors(thumbnails)

    @functools.lru_cache(maxsize=8192)
    def spectrum(i: int) -> np.ndarray:
        return texture_spectrum(as_picture(thumbnails[i]))

    for i, j in near_hashes(hashes, max_distance):
        is_copy = thumbnails[i] == thumbnails[j]
        if not is_copy and coarse[i] @ coarse[j] >= MIN_COARSE:
            is_copy = similarity(spectrum(i), spectrum(j)) >= min_similarity
        if is_copy:
            yield i, j


def near_hashes(hashes: Sequence[str], max_distance: int) -> Iterator[tuple[int, int]]:
    """All pairs i < j of non-empty hashes that differ in at most `max_distance` bits, in order."""
    index = np.array([i for i, text in enumerate(hashes) if text], dtype=np.int64)
    bits = np.array([int(hashes[i], 16) for i in index], dtype=np.uint64)
    for start in range(0, len(bits), ROWS):
        block = bits[start : start + ROWS]
        distance = np.bitwise_count(block[:, None] ^ bits[None, start:])
        rows, columns = np.nonzero(distance <= max_distance)
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
            if column > row:
                yield int(index[start + row]), int(index[start + column])


def as_picture(thumbnail: bytes) -> np.ndarray:
    """Thumbnail bytes as float32 [64, 64]."""
    return np.frombuffer(thumbnail, np.uint8).reshape(THUMBNAIL, THUMBNAIL).astype(np.float32)


def coarse_vectors(thumbnails: Sequence[bytes]) -> np.ndarray:
    """[N, 256] float32: 16 × 16 means of each thumbnail, centred, unit length; their dot product is a correlation."""
    step = THUMBNAIL // COARSE
    pictures = np.frombuffer(b"".join(thumbnails), np.uint8).reshape(-1, COARSE, step, COARSE, step)
    vectors = pictures.mean((2, 4), dtype=np.float32).reshape(len(thumbnails), -1)
    vectors -= vectors.mean(1, keepdims=True)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)


def texture_spectrum(picture: np.ndarray) -> np.ndarray:
    """Fourier transform of a picture's locally normalised texture, windowed, centred, unit energy."""
    detail = gaussian_filter(picture, 0.7) - gaussian_filter(picture, 3)
    local = detail / (np.sqrt(gaussian_filter(detail * detail, 5)) + 1.5)
    edge = np.hanning(THUMBNAIL)
    window = np.minimum(1, 2 * edge[:, None] * edge[None, :])
    texture = local * window
    texture -= texture.mean()
    texture /= np.linalg.norm(texture) + 1e-6
    return np.fft.rfft2(texture).astype(np.complex64)


def similarity(one: np.ndarray, two: np.ndarray) -> float:
    """Largest correlation of two textures over shifts of up to MAX_SHIFT pixels, from their spectra; at most 1."""
    correlation = np.fft.irfft2(one * np.conj(two), s=(THUMBNAIL, THUMBNAIL))
    near = np.roll(correlation, (MAX_SHIFT, MAX_SHIFT), (0, 1))[: 2 * MAX_SHIFT + 1, : 2 * MAX_SHIFT + 1]
    return float(near.max())
