"""The atlas is the ruler that the measured attributes are checked against: it was frozen before they were tuned.

A change of the drawing needs a new VERSION, new numbers here, and new checks of the measures.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dermfm.records.atlas import VERSION
from dermfm.records.atlas_draw import lesion_layers, photograph
from dermfm.records.atlas_lesion import DOMAINS, draw_lesion

SOURCES = {
    "atlas_camera.py": "a449a894e27ca51d036e07a080e54e1359f1bf3d02f5dde9d363abe3ad09a704",
    "atlas_draw.py": "f443ab24fde67545da1c124e877ef4051587d20aa125345a8ad5046f3be12a66",
    "atlas_lesion.py": "af4ce039e2c72db33ad931ed2ca6afefe7d3cc39e969de1a7bf2d40b7e04ebf4",
}
# (domain, number) → sharpness, asymmetry, diameter over frame, lesion's share, colours, mean colour of 3 × 3 tiles
DRAWN = {
    ("Atlas_dermo", 0): (
        (0.7242, 0.0386, 0.4880, 0.1858), ("dark brown", "light brown"),
        [109.3, 78.7, 68.8, 168.7, 119.8, 103.2, 107.1, 77.9, 68.0, 165.7, 112.9, 97.9, 131.4, 81.5, 61.9,
         172.7, 121.8, 105.9, 107.5, 77.6, 67.5, 166.7, 118.7, 102.1, 110.1, 80.5, 70.0],
    ),
    ("Atlas_dermo", 7): (
        (0.7880, 0.1425, 0.9259, 0.6664), ("light brown", "dark brown"),
        [144.3, 113.0, 94.9, 144.9, 113.3, 96.3, 149.2, 115.3, 101.9, 144.4, 110.0, 84.9, 149.0, 113.3, 88.3,
         132.4, 98.5, 75.1, 158.7, 124.5, 111.5, 135.6, 103.5, 82.0, 142.8, 109.4, 89.0],
    ),
    ("Atlas_clinic", 3): (
        (0.8827, 0.0541, 0.3737, 0.1089), ("dark brown", "light brown"),
        [164.8, 124.6, 92.0, 151.0, 114.5, 83.9, 137.9, 103.8, 76.8, 159.6, 123.2, 89.2, 120.5, 81.5, 57.6,
         138.5, 105.8, 77.5, 171.4, 130.1, 95.9, 154.9, 119.7, 87.2, 145.6, 109.3, 80.9],
    ),
}  # fmt: skip


def test_the_code_that_draws_the_atlas_is_the_frozen_one(root: Path) -> None:
    folder = root / "dermfm" / "records"
    found = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in SOURCES}
    assert VERSION == 1
    assert found == SOURCES


@pytest.mark.parametrize(("domain", "number"), DRAWN)
def test_truth_and_picture_are_the_frozen_ones(domain: str, number: int) -> None:
    truth, colours, tiles = DRAWN[domain, number]
    lesion = draw_lesion(20, DOMAINS[domain], number, 0, 0.08)
    layers = lesion_layers(lesion)
    view = photograph(lesion, layers, 0, 96, 90)
    size = lesion.diameter_mm / view.field_mm
    shown = (lesion.sharpness, layers.asymmetry, size, (view.regions > 0).mean())
    assert shown == pytest.approx(truth, abs=1e-3)
    assert lesion.colours == colours
    # Means of tiles and not bytes: libjpeg and vector units of other machines round a pixel now and then.
    pixels = np.asarray(Image.open(io.BytesIO(view.jpeg)), float).reshape(3, 32, 3, 32, 3)
    assert pixels.mean((1, 3)).ravel() == pytest.approx(tiles, abs=0.3)
