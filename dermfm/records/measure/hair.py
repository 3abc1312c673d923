"""Hairs: dark lines found by a black-hat that is averaged along many directions; removed by inpainting."""

from __future__ import annotations

import functools

import cv2
import numpy as np

KERNEL_SHARE = 0.04  # of the shorter side: wider than a hair, narrower than a lesion
MIN_KERNEL = 7
NUM_DIRECTIONS = 16
LINE_SHARE = 0.13  # length of the line along which the black-hat is averaged, of the shorter side
CONTRAST = 5.0  # grey levels by which a line's mean stands out from the mean of all directions
NOISE_FACTOR = 3.0  # and by how many medians of that over the picture: rough skin has furrows everywhere
MIN_LENGTH = 0.14  # of the shorter side
MIN_THINNESS = 5.0  # length over width
INPAINT_RADIUS = 3
_WIDTH = np.array([0.23, 1.54, 0.23], np.float32)  # across a line; sums to 2


def hair_mask(pixels: np.ndarray) -> np.ndarray:
    """Where hairs lie: bool [H, W] of RGB uint8 [H, W, 3].

    Black-hat (closing minus image; Lee et al. 1997, DullRazor, Comput Biol Med 27:533) finds what is dark and narrow.
    A hair is dark along one direction only, so that the mean along the best direction lies above the mean of all;
    dots, globules, network meshes and furrows are dark in many. Of the pixels found, connected pieces that are long
    and thin are hairs; width is read off the distance transform, which crossing hairs do not mislead.
    """
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    side = min(grey.shape)
    size = max(MIN_KERNEL, round(KERNEL_SHARE * side) | 1)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))
    hat = cv2.morphologyEx(grey, cv2.MORPH_BLACKHAT, kernel)
    line = _line_response(hat, max(9, round(LINE_SHARE * side) | 1))
    limit = max(CONTRAST, NOISE_FACTOR * float(np.median(line)))
    dark = (line > limit) & (hat > limit)
    return _long_and_thin(dark, side)


def _line_response(hat: np.ndarray, length: int) -> np.ndarray:
    """Mean of `hat` along the best direction less its mean over all directions; float32 [H, W] of uint8 [H, W].

    Sums along a line are built of sums along its halves (the approximate discrete Radon transform of Brady 1998, SIAM
    J Comput 27:107): a few additions of whole pictures a direction, whatever the length.
    """
    margin = length // 2 + 3
    framed = cv2.copyMakeBorder(hat, margin, margin, margin, margin, cv2.BORDER_REFLECT_101).astype(np.float32)
    smooth = cv2.sepFilter2D(framed, cv2.CV_16U, _WIDTH, _WIDTH)  # in quarters of a level
    wide = smooth.astype(np.uint16 if length <= 64 else np.uint32)  # so that no sum overflows
    best, total = np.zeros(hat.shape, np.float32), np.zeros(hat.shape, np.float32)
    for down, right, num_points in _lines(length):
        along = _line_mean(wide, (down, right), num_points, margin)
        np.maximum(best, along, out=best)
        total += along
    return (best - total / NUM_DIRECTIONS) / 4


@functools.lru_cache(maxsize=8)
def _lines(length: int) -> tuple[tuple[float, float, int], ...]:
    """(down, right, number of points) of NUM_DIRECTIONS lines: the step from point to point, 1 along one axis."""
    lines = []
    for angle in np.pi * np.arange(NUM_DIRECTIONS) / NUM_DIRECTIONS:
        down, right = np.sin(angle), np.cos(angle)
        longer = max(abs(down), abs(right))
        lines.append((down / longer, right / longer, max(3, round(length * longer))))
    return tuple(lines)


def _line_mean(wide: np.ndarray, step: tuple[float, float], num_points: int, margin: int) -> np.ndarray:
    """Mean of unsigned `wide` over a line around every pixel, without the margin; float32."""

    def place(points: float) -> tuple[int, int]:
        return round(points * step[0]), round(points * step[1])

    sums, size, left = wide, 1, 0
    while size < num_points:
        grown = min(size, num_points - size)  # the last two pieces may overlap
        down, right = place(grown)
        height, width = sums.shape[0] - down, sums.shape[1] - abs(right)
        left += max(0, -right)
        start, end = max(0, -right), max(0, right)
        sums = sums[:height, start : start + width] + sums[down:, end : end + width]
        size += grown
    down, right = place((num_points - 1) / 2)
    top, left = margin - down, margin - right - left
    height, width = (side - 2 * margin for side in wide.shape)
    mean = sums[top : top + height, left : left + width].astype(np.float32)
    return mean / np.float32(2 ** int(np.ceil(np.log2(num_points))))


def _long_and_thin(dark: np.ndarray, side: int) -> np.ndarray:
    """The connected pieces of a mask that have the shape of hairs."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(dark.astype(np.uint8), connectivity=8)
    if count < 2:
        return np.zeros_like(dark)
    extent = np.hypot(stats[:, cv2.CC_STAT_WIDTH], stats[:, cv2.CC_STAT_HEIGHT])
    depth = cv2.distanceTransform(dark.astype(np.uint8), cv2.DIST_L2, 3)
    # The mean distance to the outside is a quarter of a line's width.
    area = stats[:, cv2.CC_STAT_AREA]
    width = 4 * np.bincount(labels.ravel(), weights=depth.ravel(), minlength=count) / area - 1
    length = area / np.maximum(width, 1)
    is_hair = (extent >= MIN_LENGTH * side) & (length >= MIN_THINNESS * width)
    is_hair[0] = False
    return is_hair[labels]


def remove_hair(pixels: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """The picture with its hairs filled from their surroundings (Telea 2004, J Graphics Tools 9:23); RGB uint8.

    The very array is returned where there is no hair.
    """
    mask = hair_mask(pixels) if mask is None else mask
    if not mask.any():
        return pixels
    wide = cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8))
    return cv2.inpaint(pixels, wide, INPAINT_RADIUS, cv2.INPAINT_TELEA)
