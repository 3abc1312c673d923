"""What the skin would look like where the lesion lies, and how unlike it a colour is.

Skin is a smooth surface of CIELAB colour (light falls off towards a side or the corners) and, close to the lesion, what
its nearest neighbours are: reddened or paler patches reach under it. Brightness alone says less than colour: light that
falls on a raised lesion from one side brightens one of its rims and darkens the other, and skin beside them with it.
"""

from __future__ import annotations

import functools

import cv2
import numpy as np

NOISE = 2.0  # CIELAB units added to the skin's own spread
CERTAIN = 2.5  # deviations from skin that count one half
SHADING = 5.0  # CIELAB units by which skin may be brighter or darker in other light
NEAR = 0.1  # deviation of the neighbourhood that tells the skin's patches, of the shorter side
NEAR_WEIGHT = 0.05  # of such a neighbourhood, below which the smooth surface is trusted more
COARSER = 4  # the neighbourhoods are looked at in a picture so many times smaller
PATCH = 4.0  # median squared residuals at which a pixel counts half: moles and hairs are no patches


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


def nearby_skin(lab: np.ndarray, skin: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """The skin's surface, brought closer to the skin that is seen around: float32 [H, W, 3].

    Normalised convolution (Knutsson and Westin 1993, CVPR, 515) of what is left after the surface, each pixel of `seen`
    weighted by the Cauchy function of its residual; under the lesion the patches around are continued and fade out.
    """
    size = tuple(max(1, side // COARSER) for side in seen.shape[::-1])
    near, far, shown = (
        cv2.resize(part, size, interpolation=cv2.INTER_AREA) for part in (lab, skin, seen.astype(np.float32))
    )
    if not shown.any():
        return skin
    left = near - far
    squared = cv2.transform(left * left, np.ones((1, 3), np.float32))
    scale = PATCH * float(np.median(squared[shown > 0])) + 1e-6
    weight = shown / (1 + squared / np.float32(scale))
    weighted = np.dstack([left * weight[..., None], weight])
    around = cv2.GaussianBlur(weighted, (0, 0), NEAR * min(size), borderType=cv2.BORDER_CONSTANT)
    patches = around[..., :3] / (around[..., 3:] + np.float32(NEAR_WEIGHT))
    return skin + cv2.resize(patches, lab.shape[1::-1], interpolation=cv2.INTER_LINEAR)


def whitener(lab: np.ndarray, skin: np.ndarray, outside: np.ndarray, shading: float = 0.0) -> np.ndarray:
    """float32 [3, 3]: CIELAB differences times it are in deviations of the skin's own spread and NOISE.

    `shading` is the deviation, in CIELAB units, of other light on the same skin: L* + 16, a* and b* grow together with
    the cube root of the light (CIE 15), a direction in which the spread is larger by that much.
    """
    places = np.flatnonzero(outside)
    places = places[:: max(1, len(places) // 2000)]
    bare = skin.reshape(-1, 3)[places]
    sample = lab.reshape(-1, 3)[places] - bare
    if len(sample) > 4:
        length = (sample * sample).sum(axis=1)
        sample = sample[length <= np.partition(length, int(0.85 * len(length)))[int(0.85 * len(length))]]
    covariance = np.cov(sample.T) if len(sample) > 4 else np.zeros((3, 3))
    covariance = covariance + NOISE**2 * np.eye(3)
    if shading:
        lighter = (bare.mean(axis=0) if len(bare) else np.zeros(3)) + np.array([16.0, 0, 0])
        lighter = lighter / np.linalg.norm(lighter)
        covariance += shading**2 * np.outer(lighter, lighter)
    return np.ascontiguousarray(np.linalg.cholesky(np.linalg.inv(covariance)).T, np.float32)


def skin_distance(lab: np.ndarray, skin: np.ndarray, white: np.ndarray) -> np.ndarray:
    """Squared Mahalanobis distance of every pixel from the skin, by its `whitener`: float32 [H, W]."""
    difference = cv2.transform(lab - skin, white)
    return cv2.transform(difference * difference, np.ones((1, 3), np.float32))


def unlikeness(squared: np.ndarray, half: float = CERTAIN) -> np.ndarray:
    """Squared distance from skin squeezed into 0…1, one half at `half` deviations: a black core counts little more
    than a brown rim."""
    return squared / (squared + np.float32(half**2))


def above_skin(unlike: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """Unlikeness less that of usual skin, 0…1; float32."""
    floor = float(np.median(unlike[outside])) if outside.any() else 0.0
    return np.clip((unlike - floor) / (1 - floor), 0, 1).astype(np.float32)
