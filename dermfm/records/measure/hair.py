"""Hairs: found by a black-hat, kept apart from dots and globules by their shape, removed by inpainting."""

from __future__ import annotations

import cv2
import numpy as np

KERNEL_SHARE = 0.04  # of the shorter side: wider than a hair, narrower than a lesion
MIN_KERNEL = 7
CONTRAST = 12  # grey levels by which a hair is darker than what lies beside it
MIN_LENGTH = 0.14  # of the shorter side
MIN_THINNESS = 5.0  # length over mean width
INPAINT_RADIUS = 3


def hair_mask(pixels: np.ndarray) -> np.ndarray:
    """Where hairs lie: bool [H, W] of RGB uint8 [H, W, 3].

    Black-hat (closing minus image; Lee et al. 1997, DullRazor, Comput Biol Med 27:533) finds what is dark and narrow;
    of it only connected pieces that are long and thin are hairs: dots, globules and network meshes stay.
    """
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    side = min(grey.shape)
    size = max(MIN_KERNEL, round(KERNEL_SHARE * side) | 1)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))
    hat = cv2.morphologyEx(grey, cv2.MORPH_BLACKHAT, kernel)
    # Rough skin has dark furrows everywhere; a hair stands out from them too.
    dark = hat > max(CONTRAST, 3 * float(hat.mean()))
    count, labels, stats, _ = cv2.connectedComponentsWithStats(dark.astype(np.uint8), connectivity=8)
    length = np.hypot(stats[:, cv2.CC_STAT_WIDTH], stats[:, cv2.CC_STAT_HEIGHT])
    width = stats[:, cv2.CC_STAT_AREA] / np.maximum(length, 1)
    is_hair = (length >= MIN_LENGTH * side) & (length >= MIN_THINNESS * width)
    is_hair[0] = False
    return is_hair[labels] if count > 1 else np.zeros_like(dark)


def remove_hair(pixels: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """The picture with its hairs filled from their surroundings (Telea 2004, J Graphics Tools 9:23); RGB uint8.

    The very array is returned where there is no hair.
    """
    mask = hair_mask(pixels) if mask is None else mask
    if not mask.any():
        return pixels
    wide = cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8))
    return cv2.inpaint(pixels, wide, INPAINT_RADIUS, cv2.INPAINT_TELEA)
