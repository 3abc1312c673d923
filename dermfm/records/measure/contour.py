"""The lesion's outline, drawn anew where it is halfway between the lesion's and the skin's look on that very side.

One threshold for the whole lesion puts the outline of a dark side too far out and that of a pale side too far in, and
follows hairs and furrows. Here each direction has its own level, and the outline is the closed path that divides best
without jumps.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import cv2
import numpy as np

NUM_ANGLES = 120
STEP = 0.02  # along a ray, in lesion radii
MAX_MOVE = 3  # steps by which neighbouring angles may differ
OVERLAP = 16  # angles
LEAST_CONTRAST = 0.15  # of `unlike`, the least that a lesion differs from skin
MIN_OVERLAP = 0.7  # of the outline with the first mask; below, the first one stays


@dataclass(frozen=True)
class Pen:
    """How freely an outline is drawn. Lengths are in lesion radii, deviations in angles.

    reach: how far the outline may move; depth: where the lesion's look is read, inside of the first outline; sector:
    deviation over which it is averaged; profile_sector: and the profile; stiffness: cost of a step between neighbours,
    in steps of a ray on the wrong side.
    """

    reach: float
    depth: tuple[float, float]
    sector: float
    profile_sector: float
    stiffness: float


COARSE = Pen(0.3, (0.08, 0.4), 7.0, 1.0, 0.7)  # finds the border where one threshold missed it
FINE = Pen(0.12, (0.04, 0.2), 4.0, 0.6, 0.3)  # follows its lobes and notches


def refined(unlike: np.ndarray, mask: np.ndarray, valid: np.ndarray, pen: Pen = COARSE) -> np.ndarray:
    """The mask with its outline moved to where `unlike` is halfway: bool [H, W].

    Chan–Vese's two constants taken locally (Lankton and Tannenbaum 2008, IEEE Trans Image Process 17:2029) and the
    best closed path in polar coordinates by dynamic programming. A mask that such a path cannot follow, because it is
    not seen whole from its centre, is left as it is. `unlike`: float32 [H, W], 0 on skin, up to 1; `valid`: false on
    hairs and in a surround.
    """
    if not mask.any():
        return mask
    size = float(np.sqrt(mask.sum() / np.pi))
    rows, columns = np.nonzero(mask)
    centre = np.array([columns.mean(), rows.mean()])
    depth = np.arange(0, _farthest(mask, centre) / size + pen.reach, STEP)
    x, y = _places(centre, size * depth)
    border = _border_of(mask, x, y)
    seen = cv2.remap(valid.astype(np.float32), x, y, cv2.INTER_LINEAR, borderValue=0)
    values = cv2.remap(unlike, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    path = _closed_path(_cost(_lesion_share(values, seen, border, pen), seen, border, pen), pen.stiffness)
    points = centre + size * depth[path][:, None] * _directions()
    out = np.zeros(mask.shape, np.uint8)
    cv2.fillPoly(out, [np.rint(points * 16).astype(np.int32)], 1, shift=4)
    again = out > 0
    return again if (again & mask).sum() >= MIN_OVERLAP * (again | mask).sum() else mask


def _lesion_share(values: np.ndarray, seen: np.ndarray, border: np.ndarray, pen: Pen) -> np.ndarray:
    """How far each value [A, D] lies on the way from skin (0) to that side's lesion (1)."""
    below = STEP * (border[:, None] - np.arange(values.shape[1])[None])
    weight = seen * ((below > pen.depth[0]) & (below < pen.depth[1])) + 1e-4 * (below > 0)
    total = round_blur((values * weight).sum(axis=1), pen.sector)
    lesion = np.maximum(total / np.maximum(round_blur(weight.sum(axis=1), pen.sector), 1e-6), LEAST_CONTRAST)
    scaled = values / lesion[:, None]
    return round_blur(scaled * seen, pen.profile_sector) / np.maximum(round_blur(seen, pen.profile_sector), 1e-3)


def _cost(share: np.ndarray, seen: np.ndarray, border: np.ndarray, pen: Pen) -> np.ndarray:
    """[A, D]: cost of putting the outline there; what is not seen costs nothing on either side."""
    known = (seen > 0.5).astype(np.float32)
    inside = np.clip(share - 1, -1, 0) ** 2 * known
    outside = np.clip(share, 0, 1) ** 2 * known
    before = np.cumsum(inside - outside, axis=1)
    away = np.abs(np.arange(share.shape[1])[None] - border[:, None]) * STEP
    return before + np.where(away > pen.reach, 1e3, 0.0)


def _closed_path(cost: np.ndarray, stiffness: float) -> np.ndarray:
    """Index of the cheapest path [A] through [A, D] whose neighbours differ by at most MAX_MOVE; found on one turn and
    OVERLAP angles before and after it, which are cut off, so that its ends meet."""
    num_angles, num_depths = cost.shape
    turns = np.concatenate([cost[-OVERLAP:], cost, cost[:OVERLAP]])
    moves = np.arange(-MAX_MOVE, MAX_MOVE + 1)
    padded = np.full(num_depths + 2 * MAX_MOVE, np.inf)
    options = np.lib.stride_tricks.sliding_window_view(padded, num_depths)
    current = padded[MAX_MOVE:-MAX_MOVE]
    penalty = stiffness * np.abs(moves)[:, None]
    back = np.empty(turns.shape, np.int64)
    total = np.empty((len(moves), num_depths))
    current[:] = turns[0]
    for i in range(1, len(turns)):
        np.add(options, penalty, out=total)
        total.argmin(axis=0, out=back[i])
        np.add(total.min(axis=0), turns[i], out=current)
    steps = (back + np.arange(num_depths) - MAX_MOVE).tolist()
    place = int(current.argmin())
    path = [place]
    for i in range(len(turns) - 1, OVERLAP, -1):
        place = steps[i][place]
        path.append(place)
    return np.array(path[::-1][:num_angles])


def _border_of(mask: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Index [A] at which each ray leaves the mask for the last time."""
    inside = cv2.remap(mask.astype(np.uint8), x, y, cv2.INTER_NEAREST, borderValue=0) > 0
    return np.where(inside.any(axis=1), inside.shape[1] - 1 - inside[:, ::-1].argmax(axis=1), 0)


def _farthest(mask: np.ndarray, centre: np.ndarray) -> float:
    rows, columns = np.nonzero(mask)
    return float(np.hypot(columns - centre[0], rows - centre[1]).max())


@functools.lru_cache(maxsize=1)
def _directions() -> np.ndarray:
    """Unit vectors (x, y), [A, 2]."""
    angle = 2 * np.pi * np.arange(NUM_ANGLES) / NUM_ANGLES
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _places(centre: np.ndarray, depth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x and y, float32 [A, D] each, of the rays' points."""
    points = centre + depth[None, :, None] * _directions()[:, None]
    return np.ascontiguousarray(points[..., 0], np.float32), np.ascontiguousarray(points[..., 1], np.float32)


def round_blur(values: np.ndarray, deviation: float) -> np.ndarray:
    """Gaussian mean along the first axis [A, …], which is a circle."""
    half = int(np.ceil(3 * deviation))
    table = values.reshape(len(values), -1).astype(np.float32)
    wide = np.concatenate([table[-half:], table, table[:half]])
    kernel = cv2.getGaussianKernel(2 * half + 1, deviation, cv2.CV_32F)
    return cv2.sepFilter2D(wide, cv2.CV_32F, np.ones(1, np.float32), kernel)[half:-half].reshape(values.shape)
