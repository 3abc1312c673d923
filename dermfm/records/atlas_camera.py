"""The embedded atlas, part 3: skin, hair, and the two cameras.

Dermoscopic: contact, even cool light, a vignette, sharp. Clinical: at a distance, warm light from one side, highlights,
skin relief, out of focus. Pictures are [3, S, S] float32 in 0…255 sRGB.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

Camera = Callable[[np.random.Generator, np.ndarray, np.ndarray, float], tuple[np.ndarray, np.ndarray, int]]


def smooth_noise(rng: np.random.Generator, side: int, cells: float) -> np.ndarray:
    """Noise [side, side] float32 of mean 0 and deviation 1 whose features are about side / cells wide."""
    coarse = max(4, round(cells * 2))
    small = Image.fromarray(rng.standard_normal((coarse, coarse), dtype=np.float32))
    field = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC))
    return (field - field.mean()) / max(float(field.std()), 1e-6)


def lab_to_srgb(lightness: float, a: float, b: float) -> np.ndarray:
    """CIELAB (D65) to sRGB 0…255, [3] (IEC 61966-2-1; CIE 15)."""
    fy = (lightness + 16) / 116
    f = np.array([fy + a / 500, fy, fy - b / 200])
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * np.array([0.95047, 1.0, 1.08883])
    matrix = np.array([[3.2406, -1.5372, -0.4986], [-0.9689, 1.8758, 0.0415], [0.0557, -0.2040, 1.0570]])
    linear = np.clip(matrix @ xyz, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def skin_lab(ita: float) -> tuple[float, float, float]:
    """A skin colour with the individual typology angle `ita` in degrees: ITA = atan((L* − 50) / b*)."""
    b = 15.0 + 3.0 * np.cos(np.radians(ita - 15))
    a = 11.0 - 0.03 * (ita - 30)
    return 50 + b * float(np.tan(np.radians(ita))), a, b


def skin_picture(rng: np.random.Generator, ita: float, modality: str, side: int) -> np.ndarray:
    """Bare skin of a tone: blotches, fine relief, and on some pictures freckles."""
    base = lab_to_srgb(*skin_lab(ita)).astype(np.float32)[:, None, None]
    blotch = smooth_noise(rng, side, 4)
    red = smooth_noise(rng, side, 3)
    relief = _relief(rng, side, 0.9 if modality == "clinical" else 0.5)
    picture = base * (1 + 0.025 * blotch + relief)
    picture[0] += 3.0 * red
    picture[1] -= 2.0 * red
    if rng.random() < 0.35:
        spots = np.clip(smooth_noise(rng, side, 22) - 2.0, 0, 1) * 0.35
        picture *= 1 - spots
    return picture


def dermoscope(
    rng: np.random.Generator, picture: np.ndarray, alpha: np.ndarray, hairs: float
) -> tuple[np.ndarray, np.ndarray, int]:
    """Picture through a dermatoscope; the hair's weight [S, S] and the number of hairs."""
    picture, hair, number = _hair(rng, picture, hairs)
    picture = picture * np.array([1.02, 0.98, 1.03], np.float32)[:, None, None]
    picture = picture * rng.normal(1, 0.035, (3, 1, 1)) * rng.uniform(0.95, 1.12)
    picture = 128 + (picture - 128) * rng.uniform(1.0, 1.12)
    picture = picture * (1 - rng.uniform(0.08, 0.4) * _distance(picture.shape[1]) ** 3)
    if rng.random() < 0.06:
        picture = picture * _round_frame(rng, picture.shape[1])
    return _blur(picture, rng.uniform(0.3, 0.8)), hair, number


def phone_camera(
    rng: np.random.Generator, picture: np.ndarray, alpha: np.ndarray, hairs: float
) -> tuple[np.ndarray, np.ndarray, int]:
    """Picture through a camera at a distance; the hair's weight [S, S] and the number of hairs."""
    side = picture.shape[1]
    height = gaussian_filter(alpha, 4) * rng.uniform(0, 9)
    turn = rng.uniform(0, 2 * np.pi)
    slope_y, slope_x = np.gradient(height)
    light = slope_x * np.cos(turn) + slope_y * np.sin(turn)
    picture = picture * np.clip(1 - 0.35 * light, 0.6, 1.4)
    picture, hair, number = _hair(rng, picture, hairs)
    axis = np.linspace(-1, 1, side, dtype=np.float32)
    gradient = np.cos(turn) * axis[None, :] + np.sin(turn) * axis[:, None]
    picture = picture * (1 - rng.uniform(0.05, 0.22) * gradient)
    shine = np.clip(smooth_noise(rng, side, 18) + 1.5 * light - 2.1, 0, 1) * rng.uniform(0.1, 0.5)
    picture = picture + shine * (235 - picture)
    warm = np.array([rng.uniform(1.04, 1.13), 1.0, rng.uniform(0.78, 0.92)], np.float32)[:, None, None]
    picture = 255 * np.clip(picture * warm / 255, 0, 1) ** rng.uniform(0.85, 1.15)
    picture = picture.mean(0) + (picture - picture.mean(0)) * rng.uniform(0.75, 0.95)
    return _blur(picture, rng.uniform(0.9, 2.2)), hair, number


CAMERAS: dict[str, Camera] = {"dermoscopic": dermoscope, "clinical": phone_camera}


def _relief(rng: np.random.Generator, side: int, strength: float) -> np.ndarray:
    """Skin lines: two sets of fine parallel furrows, broken up."""
    white = rng.standard_normal((2, side, side), dtype=np.float32)
    one, two = gaussian_filter(white[0], (0.7, 4.0)), gaussian_filter(white[1], (4.0, 0.7))
    return strength * 0.07 * (one + two)


def _hair(rng: np.random.Generator, picture: np.ndarray, mean: float) -> tuple[np.ndarray, np.ndarray, int]:
    """Curved hairs of one colour over the picture."""
    side = picture.shape[1]
    number = int(rng.poisson(mean * rng.gamma(0.7, 1 / 0.7)))
    ink = Image.new("L", (side, side))
    pen = ImageDraw.Draw(ink)
    main = rng.uniform(0, np.pi)
    steps = np.linspace(-1, 1, 14)
    for _ in range(number):
        angle, bend = main + rng.normal(0, 0.5), rng.normal(0, 0.22)
        length, centre = side * rng.uniform(0.15, 0.7), rng.uniform(0, side, 2)
        along, across = steps * length, bend * length * steps**2
        x = centre[0] + along * np.cos(angle) - across * np.sin(angle)
        y = centre[1] + along * np.sin(angle) + across * np.cos(angle)
        pen.line(list(zip(x.tolist(), y.tolist(), strict=True)), fill=255, width=int(rng.integers(1, 4)))
    weight = gaussian_filter(np.asarray(ink, np.float32) / 255, 0.5)
    tone = np.array([38, 28, 24], np.float32) + rng.uniform(0, 1) * np.array([55, 35, 18], np.float32)
    return picture + 0.9 * weight * (tone[:, None, None] - picture), weight, number


def _distance(side: int) -> np.ndarray:
    """Distance from the centre, 1 at the corners."""
    axis = np.linspace(-1, 1, side, dtype=np.float32)
    return np.hypot(axis[None, :], axis[:, None]) / np.sqrt(2)


def _round_frame(rng: np.random.Generator, side: int) -> np.ndarray:
    """The black surround of some dermatoscopes."""
    return 1 / (1 + np.exp((_distance(side) - rng.uniform(0.74, 0.85)) * 60))


def _blur(picture: np.ndarray, sigma: float) -> np.ndarray:
    return np.stack([gaussian_filter(channel.astype(np.float32), sigma, truncate=3) for channel in picture])
