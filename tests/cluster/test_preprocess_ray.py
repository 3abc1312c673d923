"""The preprocessing as a Ray Data job: the same bytes as in one process and in a pool of two."""

from __future__ import annotations

import hashlib
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dermfm.records import parts, processes
from dermfm.records.parts import Place
from dermfm.records.preprocess.config import PreprocessConfig
from dermfm.records.preprocess.job import preprocess_records
from dermfm.records.source import Losses
from dermfm.records.table import Record

NUM_IMAGES = 150


def fresh(folder: Path) -> list[Record]:
    """Records of NUM_IMAGES images, one of them broken; drawn at the first call."""
    folder.mkdir(exist_ok=True)
    records = []
    for i in range(NUM_IMAGES):
        path = folder / f"{i}.jpg"
        if not path.exists():
            colours = np.random.default_rng(i).integers(0, 255, (5, 5, 3)).astype(np.uint8)
            Image.fromarray(colours).resize((90, 70)).save(path)
            if i == 7:
                path.write_bytes(path.read_bytes()[:-200])
        records.append(Record(dataset="D", source_id=str(i), path=path, modality="clinical"))
    return records


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*.jpg")}


@pytest.mark.timeout(1800)
def test_one_process_a_pool_and_ray_write_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = PreprocessConfig(enabled=True, hair=True, square="crop", size=48)
    outcomes = []
    monkeypatch.setattr(processes, "POOL_FROM", 1)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    for name, workers, ray_from in (("alone", 1, 10**9), ("pool", 2, 10**9), ("ray", 2, 1)):
        monkeypatch.setattr(parts, "RAY_FROM", ray_from)
        losses = Losses()
        kept = preprocess_records(fresh(tmp_path / "in"), settings, tmp_path / name, Place(workers), losses)
        assert len(kept) == NUM_IMAGES - 1
        outcomes.append((digests(tmp_path / name), losses.lines()))
    assert len(outcomes[0][0]) == NUM_IMAGES - 1
    assert outcomes[0] == outcomes[1] == outcomes[2]
    # A stop after the Ray job still reaches Python, not the system's default.
    caught = re.search(r"SigCgt:\s*(\w+)", Path("/proc/self/status").read_text())
    signal.signal(signal.SIGTERM, before)
    assert caught is not None
    assert int(caught[1], 16) >> (signal.SIGTERM - 1) & 1
