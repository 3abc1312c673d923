"""Ids, pixels and notes of the stream are the same on any number of processes and workers, and after a resume."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SIZES = [9, 14, 4]
BATCH, STEPS = 8, 8
SCRIPT = Path(__file__).with_name("stream_rank.py")

pytestmark = pytest.mark.timeout(300)


def jpeg(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).resize((70, 50), Image.Resampling.BICUBIC).save(encoded, "JPEG", quality=90)
    return encoded.getvalue()


def sample_of(number: int) -> dict[str, str | bytes]:
    notes = [{"strategy": s, "text": f"{s} note {k} of {number}"} for s in ("template", "open", "abcd") for k in "12"]
    fields = {"record_id": f"r{number}", "group_id": f"g{number // 2}", "label": number % 8, "notes": notes}
    image = b"this is no image" if number == 17 else jpeg(number)
    return {"__key__": f"r{number}", "jpg": image, "json": json.dumps(fields).encode()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_shards) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), SIZES, sample_of)


def run(root: Path, folder: Path, world: int, workers: int = 0, first_step: int = 0) -> list[dict]:
    """What `world` processes read side by side, in the order of the stream."""
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(world):
        job = {"folder": str(folder), "start": first_step * BATCH, "batch": BATCH, "rank": rank, "world": world}
        job |= {"workers": workers, "steps": STEPS - first_step}
        command = [sys.executable, str(SCRIPT), json.dumps(job)]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    try:
        lines = [line for p in processes for line in p.communicate(timeout=240)[0].splitlines()]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0] * world
    return sorted(map(json.loads, lines), key=lambda line: line["index"])


@pytest.fixture(scope="module")
def alone(root: Path, folder: Path) -> list[dict]:
    return run(root, folder, world=1)


def test_one_process_reads_whole_epochs_with_one_bad_sample_in_its_place(alone):
    assert [line["index"] for line in alone] == list(range(BATCH * STEPS))
    epoch = alone[: sum(SIZES)]
    # the bad sample has weight 0 and no id
    assert sorted(line["id"] for line in epoch) == sorted(["", *(f"r{i}" for i in range(27) if i != 17)])
    assert [line["weight"] for line in epoch].count(0.0) == 1
    assert {line["note"].split()[0] for line in epoch if line["weight"]} == {"template", "open"}


def test_pixels_and_notes_of_a_record_differ_from_epoch_to_epoch(alone):
    n = sum(SIZES)
    first = {line["id"]: line for line in alone[:n] if line["weight"]}
    second = {line["id"]: line for line in alone[n : 2 * n] if line["weight"]}
    assert all(first[i]["pixels"] != second[i]["pixels"] for i in first)
    assert any(first[i]["note"] != second[i]["note"] for i in first)


@pytest.mark.parametrize(("world", "workers"), [(1, 3), (1, 4), (2, 1), (2, 2), (4, 0)])
def test_processes_and_workers_together_read_the_same_ids_pixels_and_notes(root, folder, alone, world, workers):
    assert run(root, folder, world, workers) == alone


@pytest.mark.parametrize(("world", "first_step"), [(2, 3)])
def test_a_resume_on_another_number_of_processes_continues_exactly(root, folder, alone, world, first_step):
    assert run(root, folder, world, first_step=first_step) == alone[first_step * BATCH :]
