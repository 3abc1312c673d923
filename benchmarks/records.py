"""Preprocessing of the shared images: our job against a bare loop of the same library on as many processes.

    python benchmarks/records.py [--quick]

Both sides read the same JPEG files, decode (reduced while decoding), resize by area, encode and write, on the same
number of cores with one thread each, in alternating rounds; the figures are medians. Start-up is not measured: both
sides are timed once every process has done its first images, ours in the pool that a set of this size gets and as the
Ray Data job of larger ones. The other steps are listed apart, in milliseconds an image on one core. Memory is the
growth of the largest process when four times as many images are done.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this script's own folder would shadow `shards`

import cv2
import pyarrow.parquet as pq
import simplejpeg

from benchmarks.shared.figures import figure, show
from cluster.ray import ray_session
from dermfm.config import to_dict
from dermfm.records import parts
from dermfm.records.images import image_facts
from dermfm.records.keypoints import features_of
from dermfm.records.measure.attributes import measure
from dermfm.records.measure.hair import remove_hair
from dermfm.records.parts import PART, Place, Row, Task, run_parts
from dermfm.records.preprocess.config import PreprocessConfig
from dermfm.records.preprocess.crop import frame_box
from dermfm.records.preprocess.decode import decode
from dermfm.records.preprocess.job import SCHEMA, prepare_part

SIZE, QUALITY, CORES = 128, 90, min(os.cpu_count() or 1, 8)
WARM = 4  # parts a process that come before the images that are timed
SETTINGS = PreprocessConfig(enabled=True, frame=False, square="crop", size=SIZE, quality=QUALITY)


def shared_images() -> list[str]:
    """The real images, all data sets."""
    root = Path(os.environ.get("DERMFM_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    paths = sorted(str(path.resolve()) for path in (root / "images").glob("*/*.jpg"))
    if not paths:
        raise SystemExit(f"no real images at {root}; set DERMFM_DATA to their folder")
    return paths


def bare(paths: Sequence[str], folder: str) -> int:
    """Read, decode, cut the centre square, resize, encode, write: nothing else.

    Every picture gets a new file in the one folder, as in our job: overwriting one makes some file systems write it out
    at once, and folders of few files are quicker than one of many.
    """
    cv2.setNumThreads(1)
    new = uuid.uuid4().hex
    for i, path in enumerate(paths):
        with open(path, "rb") as file:
            data = file.read()
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=SIZE, min_width=SIZE)
        height, width = pixels.shape[:2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = pixels[top : top + side, left : left + side]
        small = cv2.resize(square, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
        with open(f"{folder}/{new}-{i}.jpg", "wb") as file:
            file.write(simplejpeg.encode_jpeg(small, QUALITY, "RGB", "444", False))
    return len(paths)


def bare_rate(pool: ProcessPoolExecutor, paths: list[str], folder: str) -> float:
    """Images per second of the bare loop over a warm pool."""
    pieces = [paths[i : i + PART] for i in range(0, len(paths), PART)]
    began = time.perf_counter()
    count = sum(pool.map(partial(bare, folder=folder), pieces))
    return count / (time.perf_counter() - began)


def prepare_signed(tasks: Sequence[Task], config: dict[str, Any], workers: str) -> list[Row]:
    """`prepare_part`, and a file named after this process when its second part begins: the first one, with all that is
    imported for it, is then written."""
    os.makedirs(workers, exist_ok=True)
    first, second = (Path(workers, f"{os.getpid()}{suffix}") for suffix in (".first", ""))
    mark = second if first.exists() else first
    if not mark.exists():
        mark.touch()
    return prepare_part(tasks, config)


def our_rate(paths: list[str], root: str, on_ray: bool) -> float:
    """Images per second of our job, in a pool or in a Ray session that is already there, in steady state.

    Every round has a new folder below `root`, as the bare loop: removing thousands of files would keep the disk busy.
    """
    folder = Path(tempfile.mkdtemp(dir=root))
    every = [*paths[: WARM * CORES * PART], *paths]
    tasks = [Task(str(i), path, str(folder / "images" / f"{i}.jpg")) for i, path in enumerate(every)]
    work = partial(prepare_signed, config=to_dict(SETTINGS), workers=str(folder / "workers"))
    parts.RAY_FROM = 1 if on_ray else 10**9
    rows = run_parts(tasks, work, folder / "parts", SCHEMA, Place(CORES), "preprocessing")
    assert sum(row["error"] is None for row in rows.values()) == len(every)
    # Steady state: once each process has imported what it needs and written its first part.
    seconds = [mark for mark in (folder / "workers").iterdir() if not mark.suffix]
    began = sorted(mark.stat().st_mtime_ns for mark in seconds)[:CORES][-1]
    files = [file for file in (folder / "parts").glob("*.parquet") if file.stat().st_mtime_ns > began]
    count = sum(pq.read_metadata(file).num_rows for file in files)
    return count / (max(file.stat().st_mtime_ns for file in files) - began) * 1e9


def throughput(paths: list[str], rounds: int) -> tuple[float, float, float]:
    """(ours in a pool, ours on Ray, bare): medians over rounds in which the sides take turns."""
    pooled, other = [], []
    with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(CORES) as pool:
        bare_rate(pool, paths[: 8 * PART], tempfile.mkdtemp(dir=name))
        for _ in range(rounds):
            other.append(bare_rate(pool, paths, tempfile.mkdtemp(dir=name)))
            pooled.append(our_rate(paths, name, on_ray=False))
        with ray_session(None, CORES):
            our_rate(paths[: 16 * PART], name, on_ray=True)
            on_ray = [our_rate(paths, name, on_ray=True) for _ in range(rounds)]
    return statistics.median(pooled), statistics.median(on_ray), statistics.median(other)


def milliseconds(step: Callable[[Any], Any], inputs: Sequence[Any]) -> float:
    """Mean CPU time of a step an image, on one core."""
    cv2.setNumThreads(1)
    step(inputs[0])
    began = time.process_time()
    for one in inputs:
        step(one)
    return 1000 * (time.process_time() - began) / len(inputs)


def steps(paths: list[str], folder: str) -> list[tuple[str, float]]:
    """(step, milliseconds an image), with the files in memory."""
    pixels = [decode(Path(path).read_bytes(), 10**9).pixels for path in paths]
    return [
        ("decode, square, resize, encode and files", milliseconds(lambda path: bare([path], folder), paths)),
        ("perceptual hash and thumbnail", milliseconds(lambda path: image_facts(Path(path)), paths)),
        ("features by which copies are confirmed", milliseconds(lambda path: features_of(Path(path)), paths)),
        ("frame and vignette crop", milliseconds(frame_box, pixels)),
        ("hair removal", milliseconds(remove_hair, pixels)),
        ("attributes", milliseconds(measure, pixels)),
    ]


def peak_mb(count: int) -> float:
    """Largest resident size of a process that preprocesses `count` images by itself, in its own interpreter."""
    command = [sys.executable, __file__, "--peak", str(count)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_peak(count: int) -> None:
    """Preprocess `count` images in this process and print its largest resident size in MB."""
    paths = shared_images()
    repeated = [paths[i % len(paths)] for i in range(count)]
    with tempfile.TemporaryDirectory() as name:
        tasks = [Task(str(i), path, f"{name}/images/{i}.jpg") for i, path in enumerate(repeated)]
        run_parts(tasks, partial(prepare_part, config=to_dict(SETTINGS)), Path(name, "parts"), SCHEMA, Place(1), "")
    # Not getrusage: its maximum is inherited from the process that started this one.
    lines = Path("/proc/self/status").read_text().splitlines()
    print(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024)


def measure_all(quick: bool) -> list[dict[str, Any]]:
    """All figures, as rows of the benchmarks' common form."""
    paths = shared_images()
    sample = paths[:: max(1, len(paths) // (24 if quick else 120))]
    pooled, on_ray, other = throughput(paths[:: 3 if quick else 1], 2 if quick else 5)
    with tempfile.TemporaryDirectory() as folder:
        apart = steps(sample, folder)
    few, many = (500, 2000) if quick else (1500, 6000)
    return [
        figure("preprocessing / bare loop", pooled, other, "images/s", 0.8),
        figure("preprocessing as a Ray Data job / bare loop", on_ray, other, "images/s", 0.8),
        *(figure(name, taken, None, "ms/image", None, "lower") for name, taken in apart),
        figure(f"peak memory, {many} / {few} images", peak_mb(many), peak_mb(few), "MB", 1.1, "lower"),
    ]


def main() -> None:
    """Print a table for people and one JSON object a line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer images and rounds")
    parser.add_argument("--peak", type=int, default=0, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.peak:
        print_peak(chosen.peak)
        return
    show(measure_all(chosen.quick))


if __name__ == "__main__":
    main()
