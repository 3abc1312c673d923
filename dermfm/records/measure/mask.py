"""The lesion's mask: pixels whose colour is far from the skin's, smoothed, thresholded, one central piece.

Skin is a smooth surface of CIELAB colour over the picture (light falls off towards a side or the corners); what
deviates from it in any direction, darker, redder, bluer or whiter, belongs to the lesion. So nothing is assumed about
the lesion's colour.

How often it fails: attributes.JUDGED. What fails is faint (pink lesions on reddened skin, skin with furrows), fills the
picture, or lies beside something that stands out as much: ink of a pen, a shadow, hair, the black beyond the skin.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from dermfm.records.measure.background import (
    SHADING,
    above_skin,
    fit_skin,
    nearby_skin,
    skin_distance,
    unlikeness,
    whitener,
)
from dermfm.records.measure.border import sharpest_edge
from dermfm.records.measure.contour import COARSE, FINE, refined
from dermfm.records.measure.hair import hair_mask, remove_hair
from dermfm.records.measure.shape import radius

WORKING_SIDE = 224  # the longer side is reduced to it
SEARCH_SIDE = 112  # and for the search
RING = 0.1  # width of the border ring that first stands for skin, of the shorter side
BLACK = 26  # brightest channel of a pixel of the black surround
SMOOTH = 0.012  # deviation of the smoothing, of the shorter side
ROUNDS = 2
OUTLINES = ((3.0, COARSE), (6.0, FINE))  # deviations from skin that count one half for outlining, first and again
STALK = 0.3  # of the lesion's radius: what is narrower is a hair or a patch of skin that hangs on to it
FAINT = 0.36  # how unlike skin a lesion's pale parts are at least, in the first outlining
MAX_GROWTH, SOLID = 4.0, 0.8  # a lesion is at most so many times its core, and so much of its convex hull
MAX_TOUCHING = 0.25  # of the picture's border
OUTLINE_SMOOTH = 0.006  # deviation of the smoothing before outlining, of the shorter side
AREA_POWER = 0.2
LEVELS = (0.3, 0.4, 0.5, 0.6, 0.7)
MIN_AREA, MAX_AREA = 0.002, 0.9


@dataclass(frozen=True)
class LesionMask:
    """What was found. Pictures are of the working size.

    pixels: RGB uint8 [H, W, 3] without hair; lab: CIELAB float32 [H, W, 3] of it; skin: the same of the skin expected
    everywhere; white: the `whitener` [3, 3] of its skin in any light; mask: bool [H, W]; valid: bool [H, W], false in a
    black surround and on hairs; edge: `sharpest_edge` of the picture with its hairs; confidence: 0…1.
    """

    pixels: np.ndarray
    lab: np.ndarray
    skin: np.ndarray
    white: np.ndarray
    mask: np.ndarray
    valid: np.ndarray
    edge: float
    confidence: float


def to_lab(pixels: np.ndarray) -> np.ndarray:
    """CIELAB (D65) float32 of RGB uint8: L* 0…100, a* and b* around 0."""
    return cv2.cvtColor(pixels.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)


def working_size(pixels: np.ndarray) -> np.ndarray:
    """The picture reduced so that its longer side is at most WORKING_SIDE."""
    longer = max(pixels.shape[:2])
    if longer <= WORKING_SIDE:
        return pixels
    size = [max(1, round(n * WORKING_SIDE / longer)) for n in (pixels.shape[1], pixels.shape[0])]
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)


def find_lesion(pixels: np.ndarray) -> LesionMask:
    """The lesion of RGB uint8 [H, W, 3]; an empty mask with confidence 0 where nothing stands out.

    It is searched for in a reduced picture, and the outline of its hull drawn anew, twice, at the working size, where
    brightness counts less than colour.
    """
    pixels = working_size(pixels)
    hair = hair_mask(pixels)
    clean = remove_hair(pixels, hair)
    valid = inside_frame(clean)
    lab = to_lab(clean)
    mask, skin, outside, score = _search(lab, valid)
    seen = valid & ~hair
    fine = cv2.GaussianBlur(lab, (0, 0), max(0.6, OUTLINE_SMOOTH * min(lab.shape[:2])))
    skin = nearby_skin(fine, skin, outside & seen)
    white = whitener(fine, skin, outside, SHADING)
    distance = skin_distance(fine, skin, white)
    for certain, pen in OUTLINES:
        unlike = above_skin(unlikeness(distance, certain), outside)
        mask = refined(unlike, whole_lesion(mask, unlike) if pen is COARSE else mask, seen, pen)
    edge = sharpest_edge((lab if clean is pixels else to_lab(pixels))[..., 0])
    return LesionMask(clean, lab, skin, white, mask, seen, edge, score)


def whole_lesion(mask: np.ndarray, unlike: np.ndarray) -> np.ndarray:
    """Where the outline is looked for first: the convex hull of the mask without its stalks, or of that with the pale
    parts around it; found at half the size.

    A patch of the skin's own colour at the rim, missed by a threshold, lies within the hull; a notch is found again.
    """
    size = tuple(max(1, side // 2) for side in mask.shape[::-1])
    small = cv2.resize(mask.view(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    if not small.any():
        return mask
    core, _ = _hull(_without_stalks(small, STALK * radius(small)))
    smooth = cv2.GaussianBlur(cv2.resize(unlike, size, interpolation=cv2.INTER_AREA), (0, 0), 0.6)
    whole = _with_faint_parts(core, (smooth > FAINT).astype(np.uint8))
    return cv2.resize(whole, mask.shape[::-1], interpolation=cv2.INTER_LINEAR) > 0


def _with_faint_parts(core: np.ndarray, faint: np.ndarray) -> np.ndarray:
    """The core with the pale rim or patch that a lesion with a strong core has around it, as a hull; uint8 all.

    Hysteresis (Canny 1986, IEEE Trans PAMI 8:679): what is faint and hangs together with the core other than by stalks
    belongs to it, if all of it is compact and not much larger.
    """
    faint = cv2.morphologyEx(faint, cv2.MORPH_CLOSE, _disc(3)) | core
    outlines, _ = cv2.findContours(faint, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(faint, outlines, -1, 1, cv2.FILLED)
    count, labels = cv2.connectedComponents(_without_stalks(faint, STALK * radius(core)))
    common = np.bincount(labels[core > 0], minlength=count)[1:]
    if not common.any():
        return core
    whole = (labels == 1 + int(common.argmax())).astype(np.uint8)
    hull, area = _hull(whole)
    num_pixels, edge = cv2.countNonZero(whole), outermost(np.ones_like(whole))
    is_larger = cv2.countNonZero(core) < num_pixels < MAX_GROWTH * cv2.countNonZero(core)
    touching = cv2.countNonZero(whole & edge) / cv2.countNonZero(edge)
    return hull if is_larger and num_pixels >= SOLID * area and touching <= MAX_TOUCHING else core


def _without_stalks(piece: np.ndarray, width: float) -> np.ndarray:
    """A uint8 mask opened by a disc of radius `width`; as it is where nothing would be left."""
    size = 2 * max(1, round(width)) + 1
    padded = cv2.copyMakeBorder(piece, size, size, size, size, cv2.BORDER_CONSTANT, value=0)
    plain = np.ascontiguousarray(cv2.morphologyEx(padded, cv2.MORPH_OPEN, _disc(size))[size:-size, size:-size])
    return plain if plain.any() else piece


def _hull(piece: np.ndarray) -> tuple[np.ndarray, float]:
    """Convex hull of the largest piece of a uint8 mask, drawn, and its area."""
    outlines, _ = cv2.findContours(piece, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    points = cv2.convexHull(max(outlines, key=cv2.contourArea))
    drawn = np.zeros_like(piece)
    cv2.fillPoly(drawn, [points], 1)
    return drawn, float(cv2.contourArea(points))


def _search(lab: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """(mask, skin surface, what is surely skin, score) at the size of `lab`, found at SEARCH_SIDE.

    Otsu's threshold (Otsu 1979, IEEE Trans SMC 9:62) and others on the Mahalanobis distance from skin; the skin is
    fitted again without the lesion, ROUNDS times.
    """
    height, width = valid.shape
    scale = min(1.0, SEARCH_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = cv2.resize(lab, size, interpolation=cv2.INTER_AREA)
    valid = cv2.resize(valid.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
    smooth = cv2.GaussianBlur(small, (0, 0), max(0.6, SMOOTH * min(size)))
    outside = border_ring(valid)
    mask, score = np.zeros_like(valid), 0.0
    for turn in range(ROUNDS):
        skin = fit_skin(smooth, outside, degree=1 if turn == 0 else 2)
        distance = unlikeness(skin_distance(smooth, skin, whitener(smooth, skin, outside)))
        mask, score = best_piece(distance, valid, LEVELS if turn == ROUNDS - 1 else LEVELS[::2])
        outside = valid & ~_grown(mask, 0.06)
        if outside.sum() < 0.02 * outside.size:
            outside = border_ring(valid) & ~mask
    grown, skin, around = (
        cv2.resize(part.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
        for part in (mask, skin, outside)
    )
    return grown > 0.5, skin, around > 0.5, score


def best_piece(distance: np.ndarray, valid: np.ndarray, shares: Sequence[float]) -> tuple[np.ndarray, float]:
    """The piece that stands out best among several thresholds of the distance from skin, and its score 0…1.

    One threshold takes only the core of a lesion with a dark core, or all the blotches of uneven skin.
    """
    if not valid.any():  # a black picture
        return np.zeros_like(valid), 0.0
    values = np.sort(distance[valid])
    low, high = (float(values[int(share * (len(values) - 1))]) for share in (0.3, 0.995))
    levels = [otsu(values), *(low + (high - low) * share for share in shares)]
    shown = valid.astype(np.uint8)
    best, best_score = np.zeros_like(shown), 0.0
    for level in levels:
        piece, perimeter = central_piece((distance > level).astype(np.uint8) & shown)
        score = piece_score(piece, perimeter, distance, shown)
        if score > best_score:
            best, best_score = piece, score
    return best > 0, best_score


def piece_score(piece: np.ndarray, perimeter: float, distance: np.ndarray, valid: np.ndarray) -> float:
    """0…1: how far the piece's rim lies above all that is outside, times how little of the picture's border it
    touches, times how compact (4 pi area / perimeter^2) and central it is. 0 outside of MIN_AREA…MAX_AREA.

    `piece` and `valid` are uint8, 0 and 1.
    """
    num_pixels, total = cv2.countNonZero(piece), max(cv2.countNonZero(valid), 1)
    area = num_pixels / total
    if not MIN_AREA <= area <= MAX_AREA:
        return 0.0
    rim, outside = piece & ~_shrunk(piece, 0.03), valid & ~piece
    if not cv2.countNonZero(outside):
        return 0.0
    (inner, inner_deviation), (outer, outer_deviation) = (
        (float(part[0, 0]) for part in cv2.meanStdDev(distance, mask=mask)) for mask in (rim, outside)
    )
    gap = (inner - outer) / np.sqrt(inner_deviation**2 + outer_deviation**2 + 0.005)
    edge = outermost(valid)
    touching = cv2.countNonZero(piece & edge) / max(cv2.countNonZero(edge), 1)
    central = cv2.mean(centre_weight(piece.shape), piece)[0] / _best_centrality(piece.shape, num_pixels)
    compact = min(1.0, 4 * np.pi * num_pixels / max(perimeter, 1.0) ** 2)
    return float(
        np.clip((gap - 0.5) / 3, 0, 1) * max(0.0, 1 - 1.5 * touching) * compact**0.25 * central**0.5 * area**AREA_POWER
    )


def inside_frame(pixels: np.ndarray) -> np.ndarray:
    """False where a black surround that reaches the picture's border lies; bool [H, W]."""
    brightest = np.maximum(np.maximum(pixels[..., 0], pixels[..., 1]), pixels[..., 2])
    dark = (brightest < BLACK).astype(np.uint8)
    if not dark.any():
        return np.ones(dark.shape, bool)
    _, labels = cv2.connectedComponents(dark)
    edge = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    sizes = np.bincount(edge[edge > 0], minlength=labels.max() + 1)
    # A lesion or hair that leaves the picture touches a short stretch of the border, a surround a long one.
    frame = np.flatnonzero(sizes > 0.05 * len(edge))
    return ~_grown(np.isin(labels, frame), 0.015) if len(frame) else np.ones(dark.shape, bool)


def border_ring(valid: np.ndarray) -> np.ndarray:
    """The valid pixels near the border of what is valid."""
    width = max(2, round(RING * min(valid.shape)))
    padded = cv2.copyMakeBorder(valid.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    inner = cv2.erode(padded, np.ones((2 * width + 1, 2 * width + 1), np.uint8))[1:-1, 1:-1]
    ring = valid & (inner == 0)
    return ring if ring.any() else np.ones_like(valid)


def otsu(values: np.ndarray) -> float:
    """The threshold that divides `values` into two classes of the largest variance between them."""
    lowest, highest = float(values.min()), float(values.max())
    width = max(highest - lowest, 1e-9) / 256
    counts = np.bincount(np.minimum((values - lowest) / width, 255).astype(np.int32), minlength=256)
    centres = lowest + width * (np.arange(256) + 0.5)
    below = np.cumsum(counts)
    above = below[-1] - below
    sums = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    between[~np.isfinite(between)] = -1
    return lowest + width * (1 + int(between.argmax()))


def central_piece(mask: np.ndarray) -> tuple[np.ndarray, float]:
    """The piece of a uint8 mask with the most weight near the centre, closed and without holes, as uint8 0 and 1 (all
    0 for an empty mask), and its perimeter in pixels."""
    side = min(mask.shape)
    tidy = cv2.morphologyEx(mask, cv2.MORPH_OPEN, _disc(_odd(0.02 * side)))
    tidy = cv2.morphologyEx(tidy, cv2.MORPH_CLOSE, _disc(_odd(0.05 * side)))
    count, labels = cv2.connectedComponents(tidy)
    if count < 2:
        return np.zeros_like(mask), 0.0
    scores = np.bincount(labels.ravel(), weights=centre_weight(mask.shape).ravel(), minlength=count)
    scores[0] = 0
    piece = (labels == int(scores.argmax())).astype(np.uint8)
    outlines, _ = cv2.findContours(piece, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    whole = np.zeros_like(piece)
    cv2.drawContours(whole, outlines, -1, 1, cv2.FILLED)
    return whole, sum(cv2.arcLength(outline, True) for outline in outlines)


@functools.lru_cache(maxsize=8)
def centre_weight(shape: tuple[int, ...]) -> np.ndarray:
    """1 in the centre, falling off as a Gaussian of a quarter of the side."""
    y, x = np.mgrid[-1 : 1 : shape[0] * 1j, -1 : 1 : shape[1] * 1j]
    return np.exp(-(x * x + y * y) / (2 * 0.5**2)).astype(np.float32)


@functools.lru_cache(maxsize=8)
def _centralities(shape: tuple[int, ...]) -> np.ndarray:
    """Largest possible mean weight of 1, 2, … pixels."""
    weight = np.sort(centre_weight(shape).ravel())[::-1]
    return np.cumsum(weight, dtype=np.float64) / np.arange(1, weight.size + 1)


def _best_centrality(shape: tuple[int, ...], num_pixels: int) -> float:
    return float(_centralities(shape)[num_pixels - 1])


def outermost(valid: np.ndarray) -> np.ndarray:
    """The outermost pixels of a uint8 mask of 0 and 1."""
    inner = cv2.erode(valid, _disc(3, cv2.MORPH_RECT), borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return valid & np.bitwise_not(inner.astype(np.uint8))


def _grown(mask: np.ndarray, share: float) -> np.ndarray:
    """A bool or uint8 mask grown by `share` of the shorter side; of the same type."""
    grown = cv2.dilate(mask.view(np.uint8), _disc(2 * max(1, round(share * min(mask.shape))) + 1))
    return grown.view(mask.dtype)


def _shrunk(mask: np.ndarray, share: float) -> np.ndarray:
    shrunk = cv2.erode(mask.view(np.uint8), _disc(2 * max(1, round(share * min(mask.shape))) + 1))
    return shrunk.view(mask.dtype)


@functools.lru_cache(maxsize=32)
def _disc(size: int, shape: int = cv2.MORPH_ELLIPSE) -> np.ndarray:
    return cv2.getStructuringElement(shape, (size, size))


def _odd(value: float) -> int:
    return max(3, round(value) | 1)
