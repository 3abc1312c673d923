"""Proof that two pictures show the same skin: local features that agree on one rotation, scale and shift.

SIFT (Lowe 2004, doi:10.1023/B:VISI.0000029664.99615.94) with square-rooted descriptors (Arandjelović and Zisserman
2012) on small grey pictures of equalised contrast, matched by Lowe's ratio test, and a similarity transform by RANSAC.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from PIL import Image, ImageOps

from dermfm.progress import track
from dermfm.records.processes import mapping

SIDE = 128  # shorter side in pixels of the picture that is described
FEATURES = 100  # at most so many an image
RATIO = 0.72  # nearest over second-nearest descriptor distance, squared
REACH = 4.0  # pixels that a feature may lie beside its place
SCALES = (0.4, 2.5)
CHUNK = 64  # images described, or pairs compared, by one call of a process
EQUAL = 255.0**2  # product of a descriptor with itself
_ROW = np.dtype(
    [("count", np.int32), ("places", np.float32, (FEATURES, 2)), ("descriptors", np.uint8, (FEATURES, 128))]
)


@dataclass(frozen=True)
class Features:
    """places float32 [n, 2] in pixels of the small picture; descriptors [n, 128], whole numbers 0…255 of any type."""

    places: np.ndarray
    descriptors: np.ndarray


def confirmed(paths: Sequence[Path], pairs: np.ndarray, min_matches: int, workers: int = 0) -> np.ndarray:
    """Of which of the pairs (places in `paths`, [P, 2]) at least `min_matches` features agree: bool [P].

    The features lie in a temporary file that is written and read image by image, not mapped: the pages of a map count
    as the process's memory, half a gigabyte for 36,000 images.
    """
    used, place = np.unique(pairs, return_inverse=True)
    both = place.reshape(-1, 2)
    with tempfile.TemporaryDirectory(prefix="dermfm-") as folder, mapping(workers, len(used) + len(pairs)) as mapped:
        file = Path(folder, "features")
        blocks = [[paths[i] for i in used[k : k + CHUNK]] for k in range(0, len(used), CHUNK)]
        found = chain.from_iterable(mapped(_describe, blocks))
        _save(track(found, len(used), "describing images", "images"), file)
        compare = functools.partial(_compare, file=file, enough=min_matches)
        agreeing = chain.from_iterable(mapped(compare, [both[k : k + CHUNK] for k in range(0, len(both), CHUNK)]))
        return np.fromiter(track(agreeing, len(both), "comparing images", "pairs"), bool, len(both))


def _describe(paths: Sequence[Path]) -> list[Features]:
    return [features_of(path) for path in paths]


def _save(found: Iterable[Features], file: Path) -> None:
    """Write the features of images in order to a file of _ROW."""
    with open(file, "wb") as out:
        for features in found:
            row = np.zeros((), _ROW)
            row["count"] = count = len(features.places)
            row["places"][:count] = features.places
            row["descriptors"][:count] = features.descriptors
            out.write(row.tobytes())


def _compare(pairs: np.ndarray, file: Path, enough: int) -> list[bool]:
    """Whether `enough` features of each pair of images of a file of _ROW agree."""
    with open(file, "rb", buffering=0) as rows:
        features = {i: _read(rows, i) for i in np.unique(pairs).tolist()}
    return [num_agreeing(features[i], features[j], enough) >= enough for i, j in pairs.tolist()]


def _read(rows: BinaryIO, image: int) -> Features:
    rows.seek(image * _ROW.itemsize)
    row = np.frombuffer(rows.read(_ROW.itemsize), _ROW)[0]
    return Features(row["places"][: row["count"]], row["descriptors"][: row["count"]].astype(np.float32))


def features_of(path: Path) -> Features:
    """Features of an image file, the strongest first."""
    with Image.open(path) as image:
        if image.format == "JPEG":
            image.draft("L", (2 * SIDE, 2 * SIDE))
        grey = ImageOps.exif_transpose(image).convert("L")
        scale = SIDE / min(grey.size)
        size = (max(1, round(grey.width * scale)), max(1, round(grey.height * scale)))
        return describe(np.asarray(grey.resize(size, Image.Resampling.BOX, reducing_gap=2.0)))


def describe(grey: np.ndarray) -> Features:
    """Features of a small grey picture, uint8 [H, W]."""
    cv2.setNumThreads(1)  # processes already share the cores
    level = cv2.createCLAHE(4.0, (6, 6)).apply(grey)
    points, descriptors = cv2.SIFT.create(FEATURES, contrastThreshold=0.01).detectAndCompute(level, None)
    if descriptors is None:
        return Features(np.empty((0, 2), np.float32), np.empty((0, 128), np.uint8))
    order = np.argsort([-point.response for point in points], kind="stable")[:FEATURES]
    share = descriptors[order] / np.maximum(descriptors[order].sum(1, keepdims=True), 1e-6)
    places = np.array([points[i].pt for i in order], np.float32)
    return Features(places, np.rint(255 * np.sqrt(share)).astype(np.uint8))


def num_agreeing(one: Features, two: Features, enough: int = 0) -> int:
    """Features of two pictures that agree on one similarity transform; 0 where fewer than `enough` match at all."""
    if min(len(one.places), len(two.places)) < max(enough, 3):
        return 0
    # Sums of products of whole numbers below 2^24: exact in float32, whatever the order of the sum.
    likeness = one.descriptors.astype(np.float32, copy=False) @ two.descriptors.astype(np.float32, copy=False).T
    rows = np.arange(len(likeness))
    best = likeness.argmax(1)
    first = likeness[rows, best].copy()
    likeness[rows, best] = -1
    is_match = (EQUAL - first) < RATIO * (EQUAL - likeness.max(1))
    if is_match.sum() < max(enough, 3):
        return 0
    transform, agree = cv2.estimateAffinePartial2D(
        one.places[is_match], two.places[best[is_match]], ransacReprojThreshold=REACH, maxIters=500
    )
    if transform is None or not SCALES[0] < np.hypot(transform[0, 0], transform[0, 1]) < SCALES[1]:
        return 0
    # Several features of one picture may claim the same place of the other; it counts once.
    return len(set(best[is_match][agree.ravel().astype(bool)].tolist()))
