"""Structure inside a lesion: dots and globules found as blobs, and how textured or structureless it is."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from dermfm.records.measure.shape import radius

DOT_RADIUS = (0.012, 0.045)  # of the lesion's radius
GLOBULE_RADIUS = (0.045, 0.13)
MIN_PIXELS = 0.7  # smallest blob radius that the picture can show
FLAT = 2.2  # local deviation of L* below which an area is structureless


@dataclass(frozen=True)
class Texture:
    """dots, globules: blobs per lesion; contrast: deviation of L* from its surroundings, in L* units; flat: share of
    the lesion without structure; resolution: 0…1, whether the picture is large enough to show dots."""

    dots: int
    globules: int
    contrast: float
    flat: float
    resolution: float


def texture(lightness: np.ndarray, mask: np.ndarray) -> Texture:
    """Texture of L* float32 [H, W] in the mask.

    Blobs are local extremes of the scale-normalised Laplacian of Gaussian (Lindeberg 1998, Int J Comput Vis 30:79) of
    either sign; local deviation is taken in a window of an eighth of the radius.
    """
    size = radius(mask)
    lightness, mask = _around(mask, lightness, size)
    inner = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8), iterations=max(1, round(0.06 * size))) > 0
    if not inner.any():
        return Texture(0, 0, 0.0, 1.0, 0.0)
    local = max(1.0, size / 8)
    detail = lightness - cv2.GaussianBlur(lightness, (0, 0), local)
    deviation = np.sqrt(cv2.GaussianBlur(detail * detail, (0, 0), local))
    return Texture(
        dots=_blobs(lightness, inner, DOT_RADIUS, size),
        globules=_blobs(lightness, inner, GLOBULE_RADIUS, size),
        contrast=float(np.sqrt((detail[inner] ** 2).mean())),
        flat=float((deviation[inner] < FLAT).mean()),
        resolution=min(1.0, DOT_RADIUS[1] * size / (3 * MIN_PIXELS)),
    )


def _around(mask: np.ndarray, lightness: np.ndarray, size: float) -> tuple[np.ndarray, np.ndarray]:
    """Lightness and mask, cut to the lesion with half a radius around it: nothing farther away counts."""
    left, top, width, height = cv2.boundingRect(mask.astype(np.uint8))
    room = int(size / 2) + 2
    rows, columns = slice(max(0, top - room), top + height + room), slice(max(0, left - room), left + width + room)
    return np.ascontiguousarray(lightness[rows, columns]), mask[rows, columns]


def _blobs(lightness: np.ndarray, inner: np.ndarray, radii: tuple[float, float], size: float) -> int:
    """Number of blobs whose radius lies in `radii` (of the lesion's radius `size`)."""
    low, high = max(MIN_PIXELS, radii[0] * size), radii[1] * size
    if high <= low:
        return 0
    sigma = np.sqrt(low * high) / np.sqrt(2)
    smooth = cv2.GaussianBlur(lightness, (0, 0), sigma)
    response = np.abs(sigma**2 * cv2.Laplacian(smooth, cv2.CV_32F, ksize=1))
    # A blob's response has a ring of the other sign around it: only the largest within it counts.
    window = 2 * round(3 * sigma) + 1
    peak = response == cv2.dilate(response, np.ones((window, window), np.uint8))
    return int((peak & inner & (response > 2.0)).sum())
