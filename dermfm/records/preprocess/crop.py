"""Black frames and round views: the rectangle of a picture that is worth keeping."""

from __future__ import annotations

import cv2
import numpy as np

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom are outside

SEARCH_SIDE = 160  # pictures are searched at this size of their longer side
DARK = 28  # brightest channel of a black surround, and the share of the usual brightness below which a vignette begins
DARK_SHARE = 0.22
MIN_FRAME = 0.004  # share of the picture that must be dark for a search
EDGE_DARK = 0.04  # share of an edge of the kept rectangle that may be dark
MIN_KEPT = 0.15  # of the picture; a smaller rectangle is no view but a misunderstanding
SPREAD = 1.2  # dark pixels this much brighter than the limit still belong to a vignette that is there


def frame_box(pixels: np.ndarray) -> Box | None:
    """The rectangle inside of a black frame or round view of RGB uint8 [H, W, 3]; None where there is none to cut.

    Dark pieces that hold a corner of the picture are frame; from the whole picture the edge with the largest dark
    share is cut off again and again until every edge is nearly free of frame.
    """
    height, width = pixels.shape[:2]
    if not _corners_dark(pixels):
        return None
    scale = min(1.0, SEARCH_SIDE / max(height, width))
    size = (max(8, round(width * scale)), max(8, round(height * scale)))
    brightest = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA).max(axis=2)
    frame = _frame(brightest)
    if frame.mean() < MIN_FRAME:
        return None
    left, top, right, bottom = _shrink(frame)
    if (right - left) * (bottom - top) < MIN_KEPT * frame.size:
        return None
    scale_x, scale_y = width / size[0], height / size[1]
    # One searched pixel more on the sides that were cut: its neighbour in the frame shines through it.
    box = (
        int(np.ceil((left + (left > 0)) * scale_x)),
        int(np.ceil((top + (top > 0)) * scale_y)),
        int((right - (right < size[0])) * scale_x),
        int((bottom - (bottom < size[1])) * scale_y),
    )
    return box if box != (0, 0, width, height) and box[2] - box[0] > 7 and box[3] - box[1] > 7 else None


def centre_square(width: int, height: int) -> Box:
    """The largest centred square."""
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def without_margin(box: Box, margin: float) -> Box:
    """The box less `margin` of its sides at every edge."""
    left, top, right, bottom = box
    x, y = round(margin * (right - left)), round(margin * (bottom - top))
    return left + x, top + y, right - x, bottom - y


def padded_square(pixels: np.ndarray) -> np.ndarray:
    """The picture in the middle of a square of its border's median colour."""
    height, width = pixels.shape[:2]
    side = max(height, width)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    out = np.empty((side, side, 3), np.uint8)
    out[:] = np.median(edge, axis=0).astype(np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    out[top : top + height, left : left + width] = pixels
    return out


def _corners_dark(pixels: np.ndarray) -> bool:
    """Whether any corner is dark: the quick test that lets most pictures pass."""
    corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]].max(axis=1)
    return bool((corners < 3 * DARK).any())


def _frame(brightest: np.ndarray) -> np.ndarray:
    """Dark pixels connected to a corner; bool [H, W] of the brightest channel uint8 [H, W]."""
    height, width = brightest.shape
    middle = brightest[height // 4 : height - height // 4, width // 4 : width - width // 4]
    limit = max(DARK, DARK_SHARE * float(np.median(middle)))
    _, labels = cv2.connectedComponents((brightest < SPREAD * limit).astype(np.uint8), connectivity=4)
    corners = {int(labels[y, x]) for y in (0, -1) for x in (0, -1)} - {0}
    # A dark corner without anything truly black is shade, not frame.
    black = {label for label in corners if (brightest[labels == label] < limit).mean() > 0.5}
    return np.isin(labels, sorted(black))


def _shrink(frame: np.ndarray) -> Box:
    """Cut the edge with the largest share of frame until none has more than EDGE_DARK."""
    table = cv2.integral(frame.astype(np.uint8))
    left, top, right, bottom = 0, 0, frame.shape[1], frame.shape[0]

    def dark(x0: int, y0: int, x1: int, y1: int) -> float:
        total = int(table[y1, x1]) - int(table[y0, x1]) - int(table[y1, x0]) + int(table[y0, x0])
        return total / max((x1 - x0) * (y1 - y0), 1)

    while right - left > 2 and bottom - top > 2:
        shares = (
            dark(left, top, left + 1, bottom),
            dark(left, top, right, top + 1),
            dark(right - 1, top, right, bottom),
            dark(left, bottom - 1, right, bottom),
        )
        worst = int(np.argmax(shares))
        if shares[worst] <= EDGE_DARK:
            break
        left, top = left + (worst == 0), top + (worst == 1)
        right, bottom = right - (worst == 2), bottom - (worst == 3)
    return left, top, right, bottom
