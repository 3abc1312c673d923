"""Shape of a lesion's mask: asymmetry, size, irregularity of the outline."""

from __future__ import annotations

import cv2
import numpy as np

NUM_POINTS = 384  # of an outline


def asymmetry(mask: np.ndarray) -> float:
    """Share of the lesion that does not fold onto itself: 1 - IoU with its mirror image, mean over both principal axes.

    The overlap of folded halves of Stoecker et al. 1992 (Comput Med Imaging Graph 16:191), about the principal axes
    through the centroid; 0 for an ellipse, at most 1.
    """
    shown = mask.astype(np.uint8)
    moments = cv2.moments(shown, binaryImage=True)
    centre = np.array([moments["m10"], moments["m01"]]) / moments["m00"]
    spread = np.array([[moments["mu20"], moments["mu11"]], [moments["mu11"], moments["mu02"]]]) / moments["m00"]
    _, axes = np.linalg.eigh(spread + 1e-9 * np.eye(2))
    left, top, width, height = cv2.boundingRect(shown)
    reach = np.maximum(centre - (left, top), (left + width, top + height) - centre)
    # The mask in its own axes, larger, so that a mirror image is a plain flip.
    half = int(np.ceil(np.hypot(*reach))) + 2
    turn = np.concatenate([axes.T, (half - axes.T @ centre)[:, None]], axis=1)
    upright = cv2.warpAffine(255 * shown, turn, (2 * half + 1, 2 * half + 1), flags=cv2.INTER_LINEAR) > 127
    flips = (upright[::-1], upright[:, ::-1])
    return float(np.mean([1 - (upright & flip).sum() / max(int((upright | flip).sum()), 1) for flip in flips]))


def radius(mask: np.ndarray) -> float:
    """Radius in pixels of the disc of the mask's area."""
    return float(np.sqrt(mask.sum() / np.pi))


def relative_size(mask: np.ndarray) -> float:
    """Diameter of the disc of the mask's area over the picture's shorter side."""
    return 2 * radius(mask) / min(mask.shape)


def outline(mask: np.ndarray, smooth: float) -> np.ndarray:
    """The longest outline as [NUM_POINTS, 2] points (x, y), evenly spaced, smoothed by `smooth` of its length."""
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    points = max(outlines, key=len)[:, 0].astype(np.float64)
    steps = np.linalg.norm(np.diff(points, axis=0, append=points[:1]), axis=1)
    along = np.concatenate([[0], np.cumsum(steps)])
    closed = np.concatenate([points, points[:1]])
    places = np.linspace(0, along[-1], NUM_POINTS, endpoint=False)
    even = np.stack([np.interp(places, along, closed[:, i]) for i in (0, 1)], axis=1)
    spectrum = np.fft.fft(even, axis=0)
    frequency = np.fft.fftfreq(len(even), 1 / len(even))
    return np.fft.ifft(spectrum * np.exp(-2 * (np.pi * frequency * smooth)[:, None] ** 2), axis=0).real


def irregularity(mask: np.ndarray) -> float:
    """1 - 4 pi A / P^2 of the lightly smoothed outline: 0 for a disc, towards 1 for a notched or lobed border.

    Compactness (Golston et al. 1992, Comput Med Imaging Graph 16:163: irregularity index P^2 / 4 pi A), inverted so
    that it stays below 1.
    """
    points = outline(mask, 0.006)
    following = np.roll(points, -1, axis=0)
    perimeter = float(np.linalg.norm(following - points, axis=1).sum())
    area = 0.5 * abs(float((points[:, 0] * following[:, 1] - points[:, 1] * following[:, 0]).sum()))
    return max(0.0, 1 - 4 * np.pi * area / max(perimeter, 1e-6) ** 2)
