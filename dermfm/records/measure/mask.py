"""The lesion's mask: pixels whose colour is far from the skin's, smoothed, thresholded, one central piece.

Skin is a smooth surface of CIELAB colour over the picture (light falls off towards a side or the corners); what
deviates from it in any direction, darker, redder, bluer or whiter, belongs to the lesion. So nothing is assumed about
the lesion's colour.

How often it fails: attributes.JUDGED. What fails is faint: pink lesions on reddened skin, many small spots, skin with
furrows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from dermfm.records.measure.border import sharpest_edge
from dermfm.records.measure.contour import COARSE, FINE, refined
from dermfm.records.measure.hair import hair_mask, remove_hair

WORKING_SIDE = 224  # the longer side is reduced to it
SEARCH_SIDE = 112  # and for the search
RING = 0.1  # width of the border ring that first stands for skin, of the shorter side
BLACK = 26  # brightest channel of a pixel of the black surround
NOISE = 2.0  # CIELAB units added to the skin's own spread
SMOOTH = 0.012  # deviation of the smoothing, of the shorter side
ROUNDS = 2
CERTAIN = 2.5  # deviations from skin that count one half
OUTLINES = ((4.0, COARSE), (6.0, FINE))  # and for outlining, first and again
OUTLINE_SMOOTH = 0.006  # deviation of the smoothing before outlining, of the shorter side
AREA_POWER = 0.2
LEVELS = (0.3, 0.4, 0.5, 0.6, 0.7)
MIN_AREA, MAX_AREA = 0.002, 0.9


@dataclass(frozen=True)
class LesionMask:
    """What was found. Pictures are of the working size.

    pixels: RGB uint8 [H, W, 3] without hair; lab: CIELAB float32 [H, W, 3] of it; mask: bool [H, W]; valid: bool
    [H, W], false in a black surround and on hairs; edge: `sharpest_edge` of the picture with its hairs; confidence:
    0…1.
    """

    pixels: np.ndarray
    lab: np.ndarray
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

    It is searched for in a reduced picture, and its outline drawn anew, twice, at the working size.
    """
    pixels = working_size(pixels)
    hair = hair_mask(pixels)
    clean = remove_hair(pixels, hair)
    valid = inside_frame(clean)
    lab = to_lab(clean)
    mask, skin, outside, score = _search(lab, valid)
    fine = cv2.GaussianBlur(lab, (0, 0), max(0.6, OUTLINE_SMOOTH * min(lab.shape[:2])))
    distance = skin_distance(fine, skin, outside)
    for certain, pen in OUTLINES:
        mask = refined(_above(unlikeness(distance, certain), outside), mask, valid & ~hair, pen)
    edge = sharpest_edge((lab if clean is pixels else to_lab(pixels))[..., 0])
    return LesionMask(clean, lab, mask, valid & ~hair, edge, score)


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
        distance = unlikeness(skin_distance(smooth, skin, outside))
        mask, score = best_piece(distance, valid, LEVELS if turn == ROUNDS - 1 else LEVELS[::2])
        outside = valid & ~_grown(mask, 0.06)
        if outside.sum() < 0.02 * outside.size:
            outside = border_ring(valid) & ~mask
    grown, skin, around = (
        cv2.resize(part.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
        for part in (mask, skin, outside)
    )
    return grown > 0.5, skin, around > 0.5, score


def unlikeness(squared: np.ndarray, half: float = CERTAIN) -> np.ndarray:
    """Squared distance from skin squeezed into 0…1, one half at `half` deviations: a black core counts little more
    than a brown rim."""
    return squared / (squared + np.float32(half**2))


def _above(unlike: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """Unlikeness less that of usual skin, 0…1; float32."""
    floor = float(np.median(unlike[outside])) if outside.any() else 0.0
    return np.clip((unlike - floor) / (1 - floor), 0, 1).astype(np.float32)


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


def fit_skin(lab: np.ndarray, outside: np.ndarray, degree: int) -> np.ndarray:
    """The skin's colour as a polynomial surface: float32 [H, W, 3].

    Least squares on a grid of the pixels `outside`, reweighted four times by the Cauchy function of the residual's
    length so that moles, ink and rulers there do not count.
    """
    height, width = outside.shape
    basis = _polynomials((height, width), degree)
    rows, columns = np.nonzero(outside)
    step = max(1, len(rows) // 800)
    design, colours = basis[rows[::step], columns[::step]], lab[rows[::step], columns[::step]]
    coefficients = np.zeros((basis.shape[2], 3), np.float32)
    coefficients[0] = np.median(colours, axis=0)
    # A small ridge keeps the surface flat where the pixels say nothing about it.
    ridge = np.diag([1e-3] + [0.02 * len(design)] * (basis.shape[2] - 1)).astype(np.float32)
    for _ in range(4):
        residual = ((colours - design @ coefficients) ** 2).sum(axis=1)
        scale = 1.5 * np.sqrt(np.median(residual)) + 0.5
        weight = 1 / (1 + residual / scale**2)
        weighted = design * weight[:, None]
        pull = ridge * weight.mean()
        coefficients = np.linalg.solve(weighted.T @ design + pull, weighted.T @ colours + pull @ _flat(coefficients))
    return basis @ coefficients.astype(np.float32)


@functools.lru_cache(maxsize=8)
def _polynomials(shape: tuple[int, int], degree: int) -> np.ndarray:
    """[H, W, 3 or 6] float32: 1, x, y and for degree 2 also x², xy, y², with x and y in -1…1."""
    y, x = np.mgrid[-1 : 1 : shape[0] * 1j, -1 : 1 : shape[1] * 1j].astype(np.float32)
    return np.stack([np.ones_like(x), x, y, *([x * x, x * y, y * y] if degree == 2 else [])], axis=2)


def _flat(coefficients: np.ndarray) -> np.ndarray:
    """The target of the ridge: the constant as it is, no slopes."""
    target = np.zeros_like(coefficients)
    target[0] = coefficients[0]
    return target


def skin_distance(lab: np.ndarray, skin: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """Squared Mahalanobis distance of every pixel from the skin: float32 [H, W], in squared deviations."""
    difference = lab - skin
    places = np.flatnonzero(outside)
    sample = difference.reshape(-1, 3)[places[:: max(1, len(places) // 2000)]]
    if len(sample) > 4:
        length = (sample * sample).sum(axis=1)
        sample = sample[length <= np.partition(length, int(0.85 * len(length)))[int(0.85 * len(length))]]
    covariance = np.cov(sample.T) if len(sample) > 4 else np.zeros((3, 3))
    whitener = np.linalg.cholesky(np.linalg.inv(covariance + NOISE**2 * np.eye(3))).astype(np.float32)
    white = cv2.transform(difference, whitener.T)
    return cv2.transform(white * white, np.ones((1, 3), np.float32))


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
