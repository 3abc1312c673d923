"""`dermfm records … --report` from the command line: preprocessed, measured, and shown on one page."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from dermfm.records.table import read_records
from launch.cli import main


def test_the_page_shows_what_was_built_and_needs_no_network(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "records.parquet"
    call = ["records", str(root / "configs/data/atlas.yaml"), f"out={out}", "atlas.num_dermo=24", "atlas.num_clinic=8"]
    call += ["preprocess.enabled=true", "preprocess.size=96", "measure=true"]
    assert main([*call, "--report"]) == 0
    assert "page: " in capsys.readouterr().out
    rows = read_records(out).to_pylist()
    assert {min(row["width"], row["height"]) for row in rows} == {96}
    for row in rows:
        assert "records/images/prepared/" in row["image"]
        with Image.open(tmp_path / row["image"]) as image:
            assert image.size == (row["width"], row["height"])
    assert sum(row["measured_asymmetry"] is not None for row in rows) > 28
    page = (tmp_path / "records.html").read_text(encoding="utf-8")
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    for text in ("Atlas_clinic", "Missing metadata", "Border sharpness", "Lesion masks", "Before and after"):
        assert text in page
    assert page.count("data:image/jpeg") > 60
    # The losses that the page tells are those of the build, also when nothing is built again.
    (tmp_path / "records.html").unlink()
    assert main([*call, "--report"]) == 0
    assert (tmp_path / "records.html").read_text(encoding="utf-8") == page


def test_other_jobs_refuse_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--report"]) == 2
    assert "records" in capsys.readouterr().err
