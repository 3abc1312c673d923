"""How sharp a lesion's border is: along rays across it, colour goes from inside to outside as a logistic function."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import cv2
import numpy as np

from dermfm.records.measure.contour import round_blur
from dermfm.records.measure.shape import NUM_POINTS, outline, radius

NUM_RAYS = 96
REACH, MIN_REACH = 0.13, 3.0  # to either side of the border: of the lesion's radius, and at least in pixels
NUM_STEPS = 41
WIDTHS = np.geomspace(0.05, 0.8, 24)  # logistic scales tried, of the reach
SHIFTS = np.linspace(-0.5, 0.5, 17)  # how far the true border may lie from the mask's, of the reach
EDGE_RANGE = 18.0  # L* by which neighbours differ where something sharp may lie
BLUR_FLOOR, BLUR_SHARE = 0.4, 0.2  # pixels of logistic scale, and per pixel of `sharpest_edge`; set on the atlas
HALF_SHARP = 0.03  # logistic scale in radii at which sharpness is one half
SECTOR = 6.0  # deviation of the stretch of border over which rays are taken together, in rays
EVIDENCE = 60.0  # independent samples that such a stretch's mean profile counts as
MISFIT = 0.01  # share of a profile's variance that no logistic explains, at best
PRIOR_SPREAD = 0.8  # deviation of the logarithm of widths in general
LEVEL, SLOPE = 0.1, 0.5  # ridge that holds the outside to the skin expected there, and the lesion to one colour
_WIDTHS = np.geomspace(0.002, 0.4, 64)


@dataclass(frozen=True)
class Border:
    """width: geometric mean of the border's logistic scale in lesion radii, freed of the camera's blur; sharpness: 1
    for a step, one half at a width of HALF_SHARP, towards 0 for a border that fades away; spread: deviation of the
    width's logarithm along the border; fit: how well the rays follow a logistic, 0…1."""

    width: float
    sharpness: float
    spread: float
    fit: float


def border(unlike: np.ndarray, mask: np.ndarray, valid: np.ndarray, edge: float) -> Border | None:
    """The border of a mask on a picture of differences from the skin expected there, float32 [H, W, 3]; `edge` is the
    picture's `sharpest_edge`.

    Differences are best in deviations from skin in any light (`background.whitener`): in CIELAB, the light and dark
    sides of a raised lesion have profiles of light, not of pigment. Each ray's are projected on the line from its inner
    to its outer one, and logistics of many widths are fitted to this profile (a sigmoid across the border: Grana et al.
    2003, Melanoma Res 13:465) whose outer end is near 0, as skin is: a soft border ends beyond the ray, and with a free
    level a short stretch of it looks like a whole sharper one. How likely each width is on a stretch of the border,
    with the camera's blur on top, gives that stretch's width (`_widths`): a side in focus is seen as wide as the blur,
    a side that fades is not. None where fewer than a quarter of the rays stay in what is valid.
    """
    size = radius(mask)
    reach = max(REACH * size, MIN_REACH)
    points, normals = _rays(mask)
    depth = np.linspace(-reach, reach, NUM_STEPS)
    places = (points[:, None] + depth[None, :, None] * normals[:, None]).astype(np.float32)
    x, y = np.ascontiguousarray(places[..., 0]), np.ascontiguousarray(places[..., 1])
    known = cv2.remap(valid.astype(np.uint8), x, y, cv2.INTER_NEAREST, borderMode=cv2.BORDER_CONSTANT, borderValue=0)
    usable = known.mean(axis=1) > 0.9
    if usable.sum() < NUM_RAYS / 4:
        return None
    seen = cv2.remap(unlike, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    likelihood, weight, fit = _likelihood(seen, usable)
    widths = _widths(likelihood, reach, BLUR_FLOOR + BLUR_SHARE * edge, size)
    middle = np.average(widths, weights=weight)
    spread = np.sqrt(np.average((widths - middle) ** 2, weights=weight))
    width = float(np.exp(middle))
    return Border(width, HALF_SHARP / (HALF_SHARP + width), float(spread), fit)


def _widths(likelihood: np.ndarray, reach: float, blur: float, size: float) -> np.ndarray:
    """Logarithms of the border's widths in radii, [NUM_RAYS]: posterior means under a log-normal prior.

    `likelihood` is of the scales WIDTHS * `reach` in pixels, seen through `blur`, a logistic scale in pixels that adds
    in squares; `size` is the lesion's radius. The plain difference of squares would be noise where the blur is as wide
    as the border: there the answer tends to a usual border.
    """
    seen = np.log((_WIDTHS * size) ** 2 + blur**2) / 2 - np.log(reach)
    place = np.interp(seen, np.log(WIDTHS), np.arange(len(WIDTHS)))
    below = np.minimum(place.astype(int), len(WIDTHS) - 2)
    share = place - below
    log = likelihood[:, below] * (1 - share) + likelihood[:, below + 1] * share
    log = log - (np.log(_WIDTHS / HALF_SHARP) / PRIOR_SPREAD) ** 2 / 2
    weight = np.exp(log - log.max(axis=1, keepdims=True))
    return (weight @ np.log(_WIDTHS)) / weight.sum(axis=1)


def sharpest_edge(lightness: np.ndarray) -> float:
    """Width in pixels of the sharpest edges of L* [H, W]: range over steepest gradient, at the steepest hundredth.

    Hairs, dots, ruler marks and borders in focus show how sharp the camera could be; where nothing in the picture has
    contrast the answer is a usual one.
    """
    slope = (
        np.hypot(cv2.Sobel(lightness, cv2.CV_32F, 1, 0, ksize=1), cv2.Sobel(lightness, cv2.CV_32F, 0, 1, ksize=1)) / 2
    )
    window = np.ones((7, 7), np.uint8)
    reach = cv2.dilate(lightness, window) - cv2.erode(lightness, window)
    strong = reach > EDGE_RANGE
    if strong.sum() < 30:
        return 2.6
    return float(1 / max(float(np.quantile(slope[strong] / reach[strong], 0.99)), 0.1))


def _rays(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points on the smoothed outline and their outward normals, [NUM_RAYS, 2] each."""
    points = outline(mask, 0.02)
    tangent = np.roll(points, -2, axis=0) - np.roll(points, 2, axis=0)
    normal = np.stack([tangent[:, 1], -tangent[:, 0]], axis=1)
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-6)
    if ((points - points.mean(axis=0)) * normal).sum() < 0:
        normal = -normal
    step = NUM_POINTS // NUM_RAYS
    return points[::step], normal[::step]


def _likelihood(unlike: np.ndarray, usable: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """(log likelihood of WIDTHS on each ray's SECTOR [NUM_RAYS, WIDTHS], the sectors' weights, fit) from the
    differences from skin [NUM_RAYS, NUM_STEPS, 3] on rays, inside first, of which the `usable` count.

    That of the least squares fit of a logistic at its best shift, (residual over variance)^(-n/2).
    """
    ends = NUM_STEPS // 4
    direction = unlike[:, :ends].mean(axis=1) - unlike[:, -ends:].mean(axis=1)
    contrast = np.linalg.norm(direction, axis=1) * usable
    direction = direction / np.maximum(contrast, 1e-6)[:, None]
    profile = np.einsum("rkc,rc->rk", unlike, direction) * usable[:, None]
    # Neighbouring rays see the same border: their mean has less of the skin's own texture.
    profile = _with_neighbours(profile) / np.maximum(_with_neighbours(usable.astype(float)), 1)[:, None]
    left = _unexplained(profile.astype(np.float32))
    quality = 1 - left.min(axis=1)
    weight = np.sqrt(contrast) * quality + 1e-9
    around = round_blur(weight, SECTOR)
    likelihood = -EVIDENCE / 2 * np.log(left + MISFIT)
    likelihood = round_blur(likelihood * weight[:, None], SECTOR) / around[:, None]
    return likelihood, around, float(np.average(quality, weights=contrast + 1e-6))


def _unexplained(profiles: np.ndarray) -> np.ndarray:
    """Share of the variance of profiles [N, NUM_STEPS] that the logistics of each of WIDTHS leave at their best shift:
    [N, WIDTHS], 0…1."""
    fitted = (profiles @ _fits()) ** 2
    kept = fitted.reshape(len(profiles), -1, len(WIDTHS), len(SHIFTS)).sum(axis=1).max(axis=2)
    total = (profiles**2).sum(axis=1, keepdims=True)
    variance = total - NUM_STEPS * profiles.mean(axis=1, keepdims=True) ** 2
    return np.clip((total - kept) / np.maximum(variance, 1e-6), 0, 1)


@functools.cache
def _fits() -> np.ndarray:
    """[NUM_STEPS, 3 * WIDTHS * SHIFTS] float32: a profile's products with it, squared and summed over the three, are
    the squares that the ridge regression on a logistic, a level and a slope inside explains.

    y'M (M'M + L)^-1 M'y with the columns of M made orthogonal to the logistic, which alone is free.
    """
    places = np.linspace(-1, 1, NUM_STEPS)
    ridge = np.diag([1e-9, LEVEL, SLOPE])
    out = np.empty((NUM_STEPS, 3, len(WIDTHS), len(SHIFTS)), np.float32)
    for i, width in enumerate(WIDTHS):
        for j, shift in enumerate(SHIFTS):
            inside = 1 / (1 + np.exp(np.clip((places - shift) / width, -50, 50)))
            columns = np.stack([inside, np.ones_like(places), inside * (places - shift)], axis=1)
            columns /= np.linalg.norm(columns, axis=0)
            columns[:, 1:] -= columns[:, :1] * (columns[:, 0] @ columns[:, 1:])
            columns[:, 1:] /= np.linalg.norm(columns[:, 1:], axis=0)
            out[:, :, i, j] = columns @ np.linalg.cholesky(np.linalg.inv(columns.T @ columns + ridge))
    return out.reshape(NUM_STEPS, -1)


def _with_neighbours(values: np.ndarray) -> np.ndarray:
    return values + np.roll(values, 1, axis=0) + np.roll(values, -1, axis=0)
