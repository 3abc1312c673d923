"""The embedded atlas, part 2: one lesion as layers, and a photograph of it.

`lesion_layers` draws the lesion in its own frame (radius 1, centre 0) from its seed alone; `photograph` puts it on skin
under a camera, so that two images of a lesion show the same lesion. Only numpy, scipy and Pillow, only float32 and
seeded generators: the same bytes every run.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from scipy.ndimage import gaussian_filter

from dermfm.records.atlas_camera import CAMERAS, skin_picture, smooth_noise
from dermfm.records.atlas_lesion import COLOURS, DOMAINS, Lesion

OVERSAMPLE = 1.25  # pictures are drawn larger and reduced
FRAME = 1.55  # half width of the lesion's own frame in radii
CANVAS = 240  # its side in pixels
MARK_TONE = 0.94  # dots, globules and streaks are a little darker than areas of their colour
PALETTE = {  # sRGB, before the camera
    "white": (226, 204, 194),
    "red": (184, 88, 84),
    "light brown": (168, 118, 84),
    "dark brown": (104, 66, 48),
    "blue-gray": (112, 118, 138),
    "black": (46, 36, 36),
}


@dataclass(frozen=True)
class Layers:
    """A lesion in its own frame: colour [3, C, C] and alpha [C, C] float32; regions [C, C] uint8, 0 outside, else
    1 + index of COLOURS; shape truth measured on them."""

    colour: np.ndarray
    alpha: np.ndarray
    regions: np.ndarray
    asymmetry: float
    shares: tuple[float, ...]


@dataclass(frozen=True)
class View:
    """One photograph: JPEG bytes, regions [S, S] uint8 in its pixels, and what is true of this picture only."""

    jpeg: bytes
    regions: np.ndarray
    hair_share: float
    num_hairs: int
    field_mm: float


def lesion_layers(lesion: Lesion) -> Layers:
    """Draw a lesion from its truth and seed."""
    rng = np.random.default_rng((*lesion.seed, 1))
    axis = np.linspace(-FRAME, FRAME, CANVAS, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    outline = _outline(rng, lesion, angle).astype(np.float32)
    depth = outline - radius
    width = 0.02 + 0.3 * (1 - lesion.sharpness) ** 1.5
    width = width * np.exp(1.6 * lesion.sharpness_varies * np.cos(angle - rng.uniform(0, 2 * np.pi)))
    alpha = 1 / (1 + np.exp(-np.clip(depth / (width / 4), -30, 30)))
    inside = depth > 0
    regions = _regions(rng, lesion, radius / outline, inside)
    colour = _colour(rng, regions)
    colour, alpha = _texture(rng, lesion, colour, alpha, (x, y), depth)
    for weight, name in _marks(rng, lesion, outline):
        colour = _paint(colour, 0.92 * weight, tuple(MARK_TONE * c for c in PALETTE[name]))
        alpha = np.maximum(alpha, 0.85 * weight)
        regions = np.where(weight > 0.5, 1 + COLOURS.index(name), regions)
    regions = np.where(inside, regions, 0).astype(np.uint8)
    counts = np.bincount(regions.ravel(), minlength=len(COLOURS) + 1)[1:]
    return Layers(
        colour.astype(np.float32),
        alpha.astype(np.float32),
        regions,
        shape_asymmetry(inside),
        tuple((counts / max(counts.sum(), 1)).tolist()),
    )


def shape_asymmetry(mask: np.ndarray) -> float:
    """Share of a mask that a mirror image does not cover: mean of 1 − IoU over its two principal axes, in [0, 1]."""
    rows, columns = np.nonzero(mask)
    points = np.stack([columns - columns.mean(), rows - rows.mean()])
    _, axes = np.linalg.eigh(points @ points.T / points.shape[1])
    along = axes.T @ points
    values = []
    for flip in (np.array([[-1.0], [1.0]]), np.array([[1.0], [-1.0]])):
        mirrored = axes @ (along * flip)
        column = np.rint(mirrored[0] + columns.mean()).astype(int)
        row = np.rint(mirrored[1] + rows.mean()).astype(int)
        valid = (row >= 0) & (row < mask.shape[0]) & (column >= 0) & (column < mask.shape[1])
        common = int(mask[row[valid], column[valid]].sum())
        values.append(1 - common / (2 * points.shape[1] - common))
    return float(np.mean(values))


def _outline(rng: np.random.Generator, lesion: Lesion, angle: np.ndarray) -> np.ndarray:
    """Radius of the border in every direction: ellipse, lobes (asymmetry), notches (irregularity)."""
    turn = rng.uniform(0, 2 * np.pi, 16)
    around = np.linspace(-np.pi, np.pi, 721)
    outline = 1 + lesion.elongation * np.cos(2 * (around - turn[0]))
    for k, strength in ((1, 0.16), (3, 0.2), (5, 0.1)):
        outline = outline + lesion.asymmetry * strength * rng.uniform(0.5, 1.1) * np.cos(k * around + turn[k])
    for k in range(6, 14):
        outline = outline + lesion.irregularity * 0.045 * rng.normal() * np.cos(k * around + turn[k])
    outline = np.clip(outline, 0.45, 1.45) / max(1.0, float(outline.max()) / 1.4)
    return np.interp(angle, around, outline)


def _regions(rng: np.random.Generator, lesion: Lesion, depth: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Colour regions with the lesion's shares, everywhere (outside they are continued), as 1 + index of COLOURS."""
    noise = smooth_noise(rng, CANVAS, rng.uniform(2.5, 5.0))
    rings = (depth - depth[inside].mean()) / depth[inside].std()
    field = lesion.radial * rings + (1 - lesion.radial) * noise
    borders = np.quantile(field[inside], np.cumsum(lesion.shares)[:-1]) if len(lesion.shares) > 1 else []
    codes = np.array([1 + COLOURS.index(name) for name in lesion.colours])
    return codes[np.searchsorted(borders, field)]


def _colour(rng: np.random.Generator, regions: np.ndarray) -> np.ndarray:
    """[3, C, C]: the regions' colours, jittered for the lesion, with soft transitions and mottling."""
    palette = np.zeros((len(COLOURS) + 1, 3), np.float32)
    palette[1:] = np.array([PALETTE[name] for name in COLOURS]) + rng.normal(0, 6, (len(COLOURS), 3))
    sharp = Image.fromarray(palette[regions].clip(0, 255).astype(np.uint8))
    soft = sharp.filter(ImageFilter.GaussianBlur(float(rng.uniform(3.0, 7.0))))
    mottle = 0.06 * smooth_noise(rng, CANVAS, 9) + 0.04 * smooth_noise(rng, CANVAS, 30)
    return np.moveaxis(np.asarray(soft, np.float32), 2, 0) * (1 + mottle)


def _texture(
    rng: np.random.Generator,
    lesion: Lesion,
    colour: np.ndarray,
    alpha: np.ndarray,
    grid: tuple[np.ndarray, np.ndarray],
    depth: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Granular where no structureless areas are named; a pigment network of dark lines."""
    if "structureless areas" not in lesion.structures:
        colour = colour * (1 + 0.07 * smooth_noise(rng, CANVAS, 22))
    if "pigment network" in lesion.structures:
        line = _network(rng, grid) * np.clip(depth * 6 + 0.8, 0, 1) * _patch(rng)
        pale = np.clip(colour.mean(0) / 150, 0.35, 1.0)
        colour = _paint(colour, 0.62 * line * pale, tuple(0.85 * c for c in PALETTE["dark brown"]))
        alpha = np.maximum(alpha * (1 - 0.1 * (1 - line) * (depth < 0.25)), 0.5 * line * (depth > -0.06))
    return colour, alpha


def _marks(rng: np.random.Generator, lesion: Lesion, outline: np.ndarray) -> Iterator[tuple[np.ndarray, str]]:
    """(weight [C, C], colour name) of the globules, dots and streaks that the lesion has; streaks cross the border."""
    if "globules" in lesion.structures:
        yield _spots(rng, int(rng.integers(14, 34)), 0.055, 0.1, outline), _accent(rng, lesion, "globules")
    if "dots" in lesion.structures:
        yield _spots(rng, int(rng.integers(22, 60)), 0.02, 0.034, outline), _accent(rng, lesion, "dots")
    if "branched streaks" in lesion.structures:
        yield _streaks(rng, outline), "red" if lesion.accent in ("blue-gray", "red", "white") else "dark brown"


def _accent(rng: np.random.Generator, lesion: Lesion, name: str) -> str:
    """Colour of dots and globules: the class's accent mostly, else dark brown; never that of most of the lesion."""
    main = lesion.colours[int(np.argmax(lesion.shares))]
    choice = lesion.accent if rng.random() < 0.88 else "dark brown"
    if name == "globules" and choice == "white":
        choice = "dark brown"
    return {"light brown": "dark brown", "dark brown": "black"}.get(main, "dark brown") if choice == main else choice


def _paint(colour: np.ndarray, strength: np.ndarray, ink: tuple[float, ...]) -> np.ndarray:
    return colour + strength * (np.array(ink, np.float32)[:, None, None] - colour)


def _patch(rng: np.random.Generator) -> np.ndarray:
    """A smooth weight in [0.25, 1]: structures are rarely everywhere."""
    return 0.25 + 0.75 / (1 + np.exp(-3 * (smooth_noise(rng, CANVAS, 2.5) + 0.5)))


def _network(rng: np.random.Generator, grid: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Honeycomb lines in [0, 1]: three plane waves 60° apart, bent by noise."""
    bend = rng.uniform(0.03, 0.06)
    x = grid[0] + bend * smooth_noise(rng, CANVAS, 6)
    y = grid[1] + bend * smooth_noise(rng, CANVAS, 6)
    wave = 2 * np.pi * rng.uniform(6.0, 9.0)
    turn = rng.uniform(0, np.pi)
    total = np.zeros_like(x)
    for k in range(3):
        direction = turn + k * np.pi / 3 * 2
        total += np.cos(wave * (np.cos(direction) * x + np.sin(direction) * y))
    return np.clip(1.1 - (total + 1.5) / 1.6, 0, 1)


def _spots(rng: np.random.Generator, number: int, small: float, large: float, outline: np.ndarray) -> np.ndarray:
    picture = Image.new("L", (CANVAS, CANVAS))
    pen = ImageDraw.Draw(picture)
    unit = CANVAS / (2 * FRAME)
    cluster = rng.uniform(0, 2 * np.pi)
    for _ in range(number):
        angle = cluster + rng.normal(0, 1.6)
        distance = np.sqrt(rng.uniform(0.02, 0.92)) * _reach(outline, angle)
        cx, cy = (CANVAS / 2 + unit * distance * f(angle) for f in (np.cos, np.sin))
        a, b = unit * rng.uniform(small, large), unit * rng.uniform(small, large)
        pen.ellipse((cx - a, cy - b, cx + a, cy + b), fill=int(rng.integers(170, 256)))
    return gaussian_filter(np.asarray(picture, np.float32) / 255, 0.8)


def _reach(outline: np.ndarray, angle: float) -> float:
    """The outline's radius in a direction, read off its [C, C] map."""
    half = (CANVAS - 1) / 2
    row, column = round(half + 0.8 * half * np.sin(angle)), round(half + 0.8 * half * np.cos(angle))
    return float(outline[row, column])


def _streaks(rng: np.random.Generator, outline: np.ndarray) -> np.ndarray:
    """Branching lines from inside the border outwards."""
    picture = Image.new("L", (CANVAS, CANVAS))
    pen = ImageDraw.Draw(picture)
    unit = CANVAS / (2 * FRAME)
    first = rng.uniform(0, 2 * np.pi)
    for _ in range(int(rng.integers(7, 16))):
        angle = first + rng.normal(0, 1.3)
        start = _reach(outline, angle) * rng.uniform(0.35, 0.85)
        x, y = start * np.cos(angle), start * np.sin(angle)
        heading, length = angle + rng.normal(0, 0.4), rng.uniform(0.08, 0.16)
        _branch(rng, pen, unit, (x, y, heading, length), 3)
    return gaussian_filter(np.asarray(picture, np.float32) / 255, 0.6)


def _branch(
    rng: np.random.Generator,
    pen: ImageDraw.ImageDraw,
    unit: float,
    start: tuple[float, float, float, float],
    depth: int,
) -> None:
    x, y, heading, length = start
    for _ in range(2):
        heading += rng.normal(0, 0.3)
        to_x, to_y = x + length * np.cos(heading), y + length * np.sin(heading)
        ends = [CANVAS / 2 + unit * value for value in (x, y, to_x, to_y)]
        pen.line(ends, fill=150 + 35 * depth, width=depth)
        x, y = to_x, to_y
    if depth > 1:
        for side in (-0.55, 0.55):
            if rng.random() < 0.75:
                _branch(rng, pen, unit, (x, y, heading + side, length * 0.7), depth - 1)


def photograph(lesion: Lesion, layers: Layers, number: int, size: int, quality: int) -> View:
    """Image `number` of a lesion: `size` × `size` pixels through its domain's camera."""
    rng = np.random.default_rng((*lesion.seed, 2, number))
    domain = DOMAINS[lesion.domain]
    side = round(size * OVERSAMPLE)
    field_mm = max(float(rng.uniform(*domain.field_mm)), 1.08 * lesion.diameter_mm)
    scale = lesion.diameter_mm / field_mm * side / 2  # pixels per radius
    matrix = _placing(rng, side, scale)
    rgba = np.concatenate([np.clip(layers.colour, 0, 255), layers.alpha[None] * 255]).astype(np.uint8)
    drawn = Image.fromarray(np.moveaxis(rgba, 0, 2), "RGBA")
    shrunk = 0.4 * (CANVAS / (2 * FRAME) / scale - 1)  # avoids aliasing where the lesion is small
    if shrunk > 0.1:
        drawn = drawn.filter(ImageFilter.GaussianBlur(shrunk))
    placed = drawn.transform((side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    layer = np.moveaxis(np.asarray(placed, np.float32), 2, 0)
    colour, alpha = layer[:3], layer[3] / 255 * np.float32(rng.uniform(0.86, 0.97))
    skin = skin_picture(rng, lesion.ita, domain.modality, side)
    picture = skin + alpha * (colour - skin)
    picture, hair, num_hairs = CAMERAS[domain.modality](rng, picture, alpha, domain.hairs)
    regions = Image.fromarray(layers.regions).transform(
        (side, side), Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST
    )
    reduced = Image.fromarray(np.moveaxis(np.clip(picture, 0, 255), 0, 2).astype(np.uint8)).resize(
        (size, size), Image.Resampling.LANCZOS
    )
    grain = 2.0 if domain.modality == "dermoscopic" else 3.5
    pixels = np.asarray(reduced, np.float32) + grain * rng.standard_normal((size, size, 3)).astype(np.float32)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=quality, subsampling=0)
    small = np.asarray(regions.resize((size, size), Image.Resampling.NEAREST))
    return View(buffer.getvalue(), small, float((hair > 0.4).mean()), num_hairs, field_mm)


def _placing(rng: np.random.Generator, side: int, scale: float) -> tuple[float, ...]:
    """Pillow's affine map from picture (x, y) to lesion canvas (x, y): turn, scale and shift, lesion in frame."""
    turn = rng.uniform(0, 2 * np.pi)
    room = max(0.0, side / 2 - scale * 1.1)
    centre = side / 2 + np.clip(rng.normal(0, 0.35, 2), -1, 1) * min(room, 0.2 * side)
    factor = CANVAS / (2 * FRAME) / scale
    cosine, sine = factor * np.cos(turn), factor * np.sin(turn)
    shift_x = CANVAS / 2 - cosine * centre[0] + sine * centre[1]
    shift_y = CANVAS / 2 - sine * centre[0] - cosine * centre[1]
    return tuple(float(v) for v in (cosine, -sine, shift_x, sine, cosine, shift_y))
