"""What every test may use: the repository's root and the shared real data, where it lies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root folder."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images and tables: $DERMFM_DATA, or ../shared/data beside the repository."""
    folder = Path(os.environ.get("DERMFM_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "metadata.csv").is_file():
        pytest.skip(f"no real images at {folder}; set DERMFM_DATA to their folder")
    return folder.resolve()
