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
    hat = cv2.morphologyEx(grey, cv2.MORPH_BLACKHAT, kernel).astype(np.float32)
    line = _line_response(hat, max(9, round(LINE_SHARE * side) | 1))
    limit = max(CONTRAST, NOISE_FACTOR * float(np.median(line)))
    dark = (line > limit) & (hat > limit)
    return _long_and_thin(dark, side)


def _line_response(hat: np.ndarray, length: int) -> np.ndarray:
    """Mean of `hat` along the best direction less its mean over all directions; float32 [H, W]."""
    best, total = np.zeros_like(hat), np.zeros_like(hat)
    for kernel in _lines(length):
        along = cv2.filter2D(hat, cv2.CV_32F, kernel, borderType=cv2.BORDER_REFLECT)
        np.maximum(best, along, out=best)
        total += along
    return best - total / NUM_DIRECTIONS


@functools.lru_cache(maxsize=8)
def _lines(length: int) -> tuple[np.ndarray, ...]:
    """Kernels [length, length] that average along NUM_DIRECTIONS lines through the centre."""
    half = length / 2 - 0.5
    kernels = []
    for angle in np.pi * np.arange(NUM_DIRECTIONS) / NUM_DIRECTIONS:
        x, y = half * np.cos(angle), half * np.sin(angle)
        ends = [tuple(round(16 * (half + sign * value)) for value in (x, y)) for sign in (-1, 1)]
        canvas = np.zeros((length, length), np.uint8)
        cv2.line(canvas, ends[0], ends[1], 255, 1, cv2.LINE_AA, shift=4)
        kernels.append(canvas.astype(np.float32) / float(canvas.sum()))
    return tuple(kernels)


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
