"""The embedded atlas: drawn the same every time, true to what it says, and hard enough."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dermfm.records.atlas import COLOURS, draw_atlas, findings
from dermfm.records.atlas_camera import lab_to_srgb, skin_lab
from dermfm.records.atlas_draw import lesion_layers, photograph, shape_asymmetry
from dermfm.records.atlas_lesion import CLINIC, DERMO, PROFILES, STRUCTURES, Lesion, draw_lesion
from dermfm.records.source import AtlasConfig
from dermfm.records.vocabulary import CLASS_CODES

SMALL = AtlasConfig(num_dermo=40, num_clinic=16, size=96)


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small atlas, drawn in process."""
    folder = tmp_path_factory.mktemp("atlas")
    draw_atlas(SMALL, folder, 1, dry_run=False)
    return folder


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def lesion(number: int, label_is: str | None = None) -> Lesion:
    """The first lesion from `number` on that looks like `label_is`."""
    while True:
        drawn = draw_lesion(0, DERMO, number, 0.0, 0.0)
        if label_is is None or CLASS_CODES[drawn.label] == label_is:
            return drawn
        number += 1


def test_any_number_of_workers_draws_the_same_bytes(atlas: Path, tmp_path: Path) -> None:
    draw_atlas(SMALL, tmp_path, 2, dry_run=False)
    assert digests(tmp_path) == digests(atlas)


def test_only_missing_pictures_are_drawn_again(tmp_path: Path) -> None:
    config = AtlasConfig(num_dermo=6, num_clinic=0, size=64)
    records = draw_atlas(config, tmp_path, 1, dry_run=False)
    before, stamps = digests(tmp_path), {r.path: r.path.stat().st_mtime_ns for r in records}
    draw_atlas(config, tmp_path, 1, dry_run=False)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    records[2].path.unlink()
    draw_atlas(config, tmp_path, 1, dry_run=False)
    assert digests(tmp_path) == before


def test_a_dry_run_draws_nothing(tmp_path: Path) -> None:
    records = draw_atlas(SMALL, tmp_path, 1, dry_run=True)
    assert len(records) == 56
    assert list(tmp_path.iterdir()) == []


def test_records_say_what_the_truth_says(atlas: Path) -> None:
    truth = {row["source_id"]: row for row in pq.read_table(atlas / "atlas_truth.parquet").to_pylist()}
    records = draw_atlas(SMALL, atlas, 1, dry_run=False)
    assert len(truth) == len(records) == 56
    for record in records:
        row = truth[record.source_id]
        assert (record.label, record.lesion_id) == (row["label"], row["lesion_id"])
        assert record.findings == findings(row)
        assert record.skin_tone_value == pytest.approx(row["skin_ita"], abs=0.05)
        assert not record.has_conflict


def test_the_region_map_shows_the_stated_colours_and_size(atlas: Path) -> None:
    for row in pq.read_table(atlas / "atlas_truth.parquet").to_pylist():
        path = atlas / "records" / "truth" / row["dataset"] / f"{row['source_id']}.png"
        regions = np.asarray(Image.open(path))
        with Image.open(atlas / "records" / "images" / row["dataset"] / f"{row['source_id']}.jpg") as image:
            assert image.size == regions.shape[::-1] == (96, 96)
        inside = regions > 0
        assert inside.mean() == pytest.approx(row["area"])
        for code, name in enumerate(COLOURS, start=1):
            share = (regions == code).sum() / inside.sum()
            assert share == pytest.approx(row[f"share_{name.replace(' ', '_').replace('-', '_')}"])
            assert (name in row["colours"]) or share < 0.12
        assert set(row["structures"]) <= set(STRUCTURES)


def test_two_images_of_a_lesion_show_the_same_lesion_in_another_picture() -> None:
    one = lesion(3, "MEL")
    layers = lesion_layers(one)
    first, second = (photograph(one, layers, n, 96, 90) for n in (0, 1))
    assert first.jpeg != second.jpeg
    assert photograph(one, layers, 0, 96, 90).jpeg == first.jpeg
    assert Image.open(io.BytesIO(first.jpeg)).size == (96, 96)


def test_classes_differ_as_their_profiles_say() -> None:
    drawn = [draw_lesion(0, DERMO, i, 0.0, 0.0) for i in range(600)]
    mean = {code: np.mean([d.asymmetry for d in drawn if CLASS_CODES[d.label] == code]) for code in CLASS_CODES}
    assert mean["MEL"] > mean["SCC"] > mean["NEV"]
    for code, profile in PROFILES.items():
        assert mean[code] == pytest.approx(profile.asymmetry[0], abs=0.1)
    black = [("black" in d.colours, CLASS_CODES[d.label]) for d in drawn]
    assert sum(b for b, c in black if c == "MEL") > 4 * sum(b for b, c in black if c == "SK")


def test_the_confused_share_looks_like_a_class_that_resembles_its_own() -> None:
    drawn = [draw_lesion(0, CLINIC, i, 0.15, 0.3) for i in range(400)]
    other = [d for d in drawn if d.looks_like != d.label]
    assert 0.22 < len(other) / len(drawn) < 0.38
    assert all(CLASS_CODES[d.looks_like] in PROFILES[CLASS_CODES[d.label]].resembles for d in other)
    assert 0.08 < np.mean([d.num_images == 2 for d in drawn]) < 0.22


def test_shape_asymmetry_is_zero_for_an_ellipse_and_grows_with_a_lobe() -> None:
    rows, columns = np.mgrid[-100:101, -100:101]
    ellipse = (rows / 40) ** 2 + (columns / 70) ** 2 < 1
    lobe = (rows - 45) ** 2 + (columns - 45) ** 2 < 35**2
    assert shape_asymmetry(ellipse) < 0.02
    assert shape_asymmetry(ellipse | lobe) > 0.15


@pytest.mark.parametrize("ita", [-30, 0, 25, 60])
def test_skin_has_the_individual_typology_angle_it_was_asked_for(ita: float) -> None:
    lightness, _, b = skin_lab(ita)
    assert np.degrees(np.arctan((lightness - 50) / b)) == pytest.approx(ita)


def test_lab_colours_are_those_of_the_standard() -> None:
    # Published sRGB values of CIELAB (D65) colours: white, mid grey, and sRGB's pure red.
    assert lab_to_srgb(100, 0, 0) == pytest.approx([255, 255, 255], abs=1)
    assert lab_to_srgb(53.585, 0, 0) == pytest.approx([128, 128, 128], abs=1)
    assert lab_to_srgb(53.24, 80.09, 67.20) == pytest.approx([255, 0, 0], abs=2)


def test_the_domains_differ_in_camera_and_skin(atlas: Path) -> None:
    def means(name: str) -> tuple[float, float]:
        """(red to blue, texture from pixel to pixel) of a domain's pictures."""
        folder = atlas / "records" / "images" / name
        pictures = [np.asarray(Image.open(path), float) for path in sorted(folder.iterdir())]
        corners = [picture[:8, 40:56].mean((0, 1)) for picture in pictures]
        edges = [np.abs(np.diff(picture[30:66, 30:66].mean(2))).mean() for picture in pictures]
        return float(np.mean([c[0] / c[2] for c in corners])), float(np.mean(edges))

    (dermo_warmth, dermo_detail), (clinic_warmth, clinic_detail) = means("Atlas_dermo"), means("Atlas_clinic")
    assert clinic_warmth > 1.05 * dermo_warmth
    assert clinic_detail < 0.9 * dermo_detail
