"""Small tables and images for the tests of dermfm.records."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Row = dict[str, object]


def write_csv(path: Path, rows: list[Row], delimiter: str = ",") -> Path:
    """A CSV file with the columns of the first row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def textured(seed: int, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """A picture with its own texture, RGB, `size` = (width, height)."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(60, 220, (size[1] // 4, size[0] // 4, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def save_images(tmp_path: Path) -> Callable[..., Path]:
    """Write one textured JPEG per name (relative to the folder, without suffix) below tmp_path/images."""

    def save(*names: str) -> Path:
        folder = tmp_path / "images"
        for name in names:
            path = folder / f"{name}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            textured(sum(map(ord, name)) * 7919 % 100003).save(path, quality=90)
        return folder

    return save
