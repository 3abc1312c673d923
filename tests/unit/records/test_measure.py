"""Measured attributes: closed forms for plain shapes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy.stats import spearmanr

from dermfm.records.measure.attributes import MIN_CONFIDENCE, measure
from dermfm.records.measure.background import nearby_skin, skin_distance, whitener
from dermfm.records.measure.border import border
from dermfm.records.measure.colour import colour_words
from dermfm.records.measure.columns import COLOURS, SCHEMA
from dermfm.records.measure.contour import refined
from dermfm.records.measure.hair import hair_mask
from dermfm.records.measure.mask import find_lesion, otsu, to_lab, whole_lesion
from dermfm.records.measure.shape import asymmetry, irregularity, relative_size
from dermfm.records.measure.skin import band, fitzpatrick, typology_angle
from dermfm.records.measure.texture import texture

SKIN, BROWN = np.array([214, 170, 150.0]), np.array([112, 70, 52.0])
Y, X = np.mgrid[:200, :240].astype(float)


def disc(radius: float = 50, at: tuple[float, float] = (120, 100)) -> np.ndarray:
    return np.hypot(X - at[0], Y - at[1]) < radius


def drawn(alpha: np.ndarray, colour: np.ndarray = BROWN, seed: int = 0) -> np.ndarray:
    """A lesion on slightly grainy skin, RGB uint8."""
    grain = np.random.default_rng(seed).normal(0, 2, (*alpha.shape, 1))
    return (SKIN + alpha[..., None] * (colour - SKIN) + grain).clip(0, 255).astype(np.uint8)


def soft_disc(scale: float, radius: float = 60) -> np.ndarray:
    """A disc whose border is a logistic of `scale` radii."""
    return 1 / (1 + np.exp(np.clip((np.hypot(X - 120, Y - 100) - radius) / (scale * radius), -50, 50)))


def test_the_mask_of_a_disc_is_the_disc_whatever_its_colour() -> None:
    for colour in (BROWN, np.array([60, 45, 45.0]), np.array([240, 225, 220.0]), np.array([120, 125, 150.0])):
        found = find_lesion(drawn(cv2.GaussianBlur(disc().astype(float), (0, 0), 1), colour))
        mask = cv2.resize(found.mask.astype(np.uint8), (240, 200), interpolation=cv2.INTER_NEAREST) > 0
        assert (mask & disc()).sum() / (mask | disc()).sum() > 0.85
        assert found.confidence > 0.4


def lit(alpha: np.ndarray, height: float) -> np.ndarray:
    """Light from the left on a lesion that is raised as `alpha` says: above 1 on its left side, below on its right."""
    return 1 + height * np.gradient(cv2.GaussianBlur(alpha, (0, 0), 4), axis=1)


def test_light_on_a_raised_lesion_is_not_taken_for_its_colour() -> None:
    alpha = soft_disc(0.03, 40)
    colour = SKIN + alpha[..., None] * (np.array([176, 118, 84.0]) - SKIN)
    grain = np.random.default_rng(0).normal(0, 2, colour.shape)
    photograph = (colour * lit(alpha, 3.5)[..., None] + grain).clip(0, 255).astype(np.uint8)
    found = find_lesion(photograph)
    mask = cv2.resize(found.mask.astype(np.uint8), (240, 200), interpolation=cv2.INTER_NEAREST) > 0
    assert (mask & disc(40)).sum() / (mask | disc(40)).sum() > 0.9
    assert asymmetry(found.mask) < 0.06


def test_a_pale_rim_belongs_to_a_lesion_and_a_stalk_or_other_skin_does_not() -> None:
    stalk = (np.abs(Y - 100) < 4) & (X > 120) & (X < 180)
    speck = disc(20, (210, 30))
    core, rim = disc(28), disc(55)

    def overlap(mask: np.ndarray, unlike: np.ndarray, expected: np.ndarray) -> float:
        whole = whole_lesion(mask, (0.45 * unlike).astype(np.float32))
        return float((whole & expected).sum() / (whole | expected).sum())

    assert overlap(core | stalk, stalk, core) > 0.93
    assert overlap(core, rim | speck, rim) > 0.95
    assert overlap(core, np.ones_like(core), core) > 0.93  # much larger, and it touches the picture's border


def test_patches_of_skin_are_continued_and_moles_are_not() -> None:
    surface = np.tile(np.array([65, 12, 18], np.float32), (80, 96, 1))
    patch = surface + np.array([0, 3, 0], np.float32)
    everywhere = np.ones((80, 96), bool)
    assert nearby_skin(patch, surface, everywhere)[40, 48, 1] == pytest.approx(12 + 3 / 1.05, abs=0.05)
    mole = surface.copy()
    mole[36:44, 44:52] -= 30
    assert nearby_skin(mole, surface, everywhere)[40, 48, 0] == pytest.approx(65, abs=0.5)
    assert nearby_skin(patch, surface, ~everywhere) is surface


def test_other_light_on_the_same_skin_is_nearer_than_another_colour() -> None:
    """In the closed form of one direction: difference^2 / (NOISE^2 + shading^2) along it, / NOISE^2 across it."""
    skin = np.tile(np.array([60, 12, 16], np.float32), (20, 20, 1))
    outside = np.ones((20, 20), bool)
    lighter = np.array([76, 12, 16]) / np.linalg.norm([76, 12, 16])
    across = np.cross(lighter, [0, 0, 1]) / np.linalg.norm(np.cross(lighter, [0, 0, 1]))
    for direction, variance in ((lighter, 2.0**2 + 5.0**2), (across, 2.0**2)):
        moved = (skin + 6 * direction).astype(np.float32)
        assert skin_distance(moved, skin, whitener(skin, skin, outside, 5.0))[0, 0] == pytest.approx(
            36 / variance, 1e-3
        )


def test_bare_skin_has_no_lesion_and_tells_only_its_tone() -> None:
    row = measure(drawn(np.zeros((200, 240))))
    assert row["measured_mask_confidence"] < MIN_CONFIDENCE
    assert row["measured_asymmetry"] is row["measured_colours"] is None
    assert row["measured_skin_tone"] is not None
    assert set(row) == set(SCHEMA.names)


def test_a_black_picture_has_no_lesion() -> None:
    row = measure(np.zeros((96, 96, 3), np.uint8))
    assert row["measured_mask_confidence"] == 0
    assert row["measured_size"] is None


def test_asymmetry_of_ellipse_and_half_disc_are_those_of_the_closed_form() -> None:
    turned = np.cos(0.6) * (X - 120) + np.sin(0.6) * (Y - 100), np.cos(0.6) * (Y - 100) - np.sin(0.6) * (X - 120)
    ellipse = (turned[0] / 80) ** 2 + (turned[1] / 40) ** 2 < 1
    assert asymmetry(ellipse) < 0.03
    # A half disc of radius 1 folds exactly about its middle, and about the line through its centroid at 4 / (3 pi) its
    # two parts overlap in twice the smaller of the slices: computed by summing chords.
    half = disc(80) & (Y > 100)
    depth = np.linspace(0, 1, 200_001)
    chord, centroid = np.sqrt(1 - depth**2), 4 / (3 * np.pi)
    mirror = np.interp(2 * centroid - depth, depth, chord, left=0, right=0)
    overlap, union = np.minimum(chord, mirror).sum(), np.maximum(chord, mirror).sum()
    extra = np.interp(np.linspace(2 * centroid - 1, 0, 50_000), 2 * centroid - depth[::-1], chord[::-1])
    union += extra.mean() * abs(2 * centroid - 1) / (depth[1] - depth[0])
    assert asymmetry(half) == pytest.approx((1 - overlap / union) / 2, abs=0.02)


def test_size_and_irregularity_follow_their_formulas() -> None:
    assert relative_size(disc(50)) == pytest.approx(100 / 200, abs=0.01)
    assert irregularity(disc(60)) < 0.02
    # Perimeter of an ellipse with half axes 80 and 40 by Ramanujan's formula.
    ellipse = ((X - 120) / 80) ** 2 + ((Y - 100) / 40) ** 2 < 1
    h = (40 / 120) ** 2
    perimeter = np.pi * 120 * (1 + 3 * h / (10 + np.sqrt(4 - 3 * h)))
    assert irregularity(ellipse) == pytest.approx(1 - 4 * np.pi * np.pi * 3200 / perimeter**2, abs=0.02)
    angle = np.arctan2(Y - 100, X - 120)
    notched = np.hypot(X - 120, Y - 100) < 60 * (1 + 0.15 * np.cos(11 * angle))
    assert irregularity(notched) > irregularity(ellipse) + 0.1


def test_an_outline_lies_halfway_on_each_side_of_an_unevenly_coloured_lesion() -> None:
    # Left half strong, right half faint: one threshold for both would cut the faint side off or swell the strong one.
    soft = cv2.GaussianBlur(disc(60).astype(np.float32), (0, 0), 4)
    unlike = soft * np.where(X < 120, 1.0, 0.35).astype(np.float32)
    ragged = disc(60) ^ (disc(12, (180, 100)) & ~disc(60)) ^ (disc(8, (120, 45)) & disc(60))
    again = refined(unlike, ragged, np.ones((200, 240), bool))
    assert (again & disc(60)).sum() / (again | disc(60)).sum() > 0.95
    assert asymmetry(again) < asymmetry(ragged)


def test_border_width_is_the_scale_of_the_logistic() -> None:
    skin = to_lab(SKIN.astype(np.uint8)[None, None])
    widths = []
    for scale in (0.02, 0.03, 0.05, 0.08):
        for colour in (BROWN, SKIN + (BROWN - SKIN) * (1.3 - np.hypot(X - 120, Y - 100) / 100)[..., None]):
            seen = border(to_lab(drawn(soft_disc(scale), colour)) - skin, disc(60), np.ones((200, 240), bool), edge=0)
            assert seen is not None
            assert seen.width == pytest.approx(scale, rel=0.12)
            widths.append(seen.width)
    assert widths[::2] == sorted(widths[::2])
    assert widths[1::2] == sorted(widths[1::2])


def test_colours_have_the_names_that_people_give_them() -> None:
    shown = {
        "white": (240, 232, 226), "red": (190, 70, 75), "light brown": (176, 128, 92), "dark brown": (95, 60, 42),
        "blue-gray": (105, 115, 140), "black": (32, 27, 28),
    }  # fmt: skip
    lab = to_lab(np.array([list(shown.values())], np.uint8))
    assert [COLOURS[i] for i in colour_words(lab, 70.0)[0]] == list(shown)


def test_skin_bands_and_types_change_where_the_literature_says() -> None:
    assert typology_angle(65, 15) == pytest.approx(45)
    angles = (56, 54, 42, 40, 29, 27, 11, 9, -29, -31)
    names = ["very light", "light", "intermediate", "tan", "brown", "dark"]
    assert [names.index(band(angle)) + 1 for angle in angles] == [1, 2, 2, 3, 3, 4, 4, 5, 5, 6]
    assert [fitzpatrick(angle) for angle in angles] == [1, 2, 2, 3, 3, 4, 4, 5, 5, 6]


def test_dots_are_counted_and_plain_areas_are_structureless() -> None:
    plain = np.full((200, 240), 40, np.float32)
    assert texture(plain, disc(80)).flat == 1
    spots = plain.copy()
    for i in range(12):
        cv2.circle(spots, (int(120 + 55 * np.cos(i * 0.52)), int(100 + 55 * np.sin(i * 0.52))), 2, 20, -1)
    seen = texture(spots, disc(80))
    assert seen.dots == 12
    assert seen.flat < 0.9


def test_otsu_agrees_with_opencv() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(60, 9, 3000), rng.normal(170, 12, 900)]).clip(0, 255).astype(np.uint8)
    expected, _ = cv2.threshold(values[None], 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    assert np.mean((values > otsu(values.astype(float))) == (values > expected)) > 0.999


def test_hairs_are_lines_and_not_dots() -> None:
    canvas = drawn(np.zeros((200, 240)))
    cv2.line(canvas, (20, 30), (210, 160), (45, 32, 30), 2)
    cv2.circle(canvas, (60, 150), 5, (45, 32, 30), -1)
    mask = hair_mask(canvas)
    assert mask[95 - 2 : 95 + 3, 115 - 2 : 115 + 3].any()
    assert not mask[140:160, 50:70].any()


@pytest.mark.parametrize("shape", [(8, 8), (9, 40), (33, 250)])
def test_tiny_and_narrow_pictures_of_anything_give_finite_numbers(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (*shape, 3)).astype(np.uint8)
    halves = np.repeat(np.where(rng.random((*shape, 1)) < 0.5, 30, 200), 3, axis=2).astype(np.uint8)
    for pixels in (noise, halves, np.full((*shape, 3), 200, np.uint8)):
        row = measure(pixels)
        assert all(np.isfinite(value) for value in row.values() if isinstance(value, float))


def test_measuring_twice_gives_the_same_row() -> None:
    one = partial(measure, drawn(soft_disc(0.05)))
    assert one() == one()


def test_a_real_photograph_out_of_focus_keeps_its_border(shared_data: Path) -> None:
    """The camera's blur is taken off: a border is no softer for it."""
    sharpness = []
    for dataset in ("HAM10000", "MSK", "Milk10k_dermo"):
        paths = sorted((shared_data / "images" / dataset).glob("*.jpg"))
        for path in paths[:: len(paths) // 12][:12]:
            pixels = np.asarray(Image.open(path))
            pair = [
                measure(one)["measured_border_sharpness"] for one in (pixels, cv2.GaussianBlur(pixels, (0, 0), 1.6))
            ]
            sharpness.append(pair)
    known = np.array([pair for pair in sharpness if None not in pair], float)
    assert len(known) > 30
    assert spearmanr(*known.T).statistic > 0.9
    assert abs(np.subtract(*known.T).mean()) < 0.02
