"""Reading shards: our loader against the bare decode, plain webdataset, and open_clip's training transform.

    python benchmarks/shards.py [--quick]

All sides read the same shards of 600 × 450 JPEGs (about 37 kB, upscaled from the real images) to 224 pixels, on one
thread, in alternating rounds; the figures are medians of the rounds. The side of open_clip is left out where that
package is not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this script's own folder would shadow `shards`

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
import webdataset
from PIL import Image
from rich.console import Console
from rich.table import Table

from dermfm.samples import AugmentConfig, Collate, SampleFn
from shards.loader import stream
from shards.manifest import Manifest, write_manifest
from shards.order import SampleOrder
from shards.reader import ShardReader
from shards.writer import write_shard

SIZE, BATCH = 224, 64
CROP_AND_FLIP = AugmentConfig(
    crop_area_min=0.9, rotate90=False, brightness=0, contrast=0, saturation=0, hue=0, white_balance=0, blur=0
)


class ByteTokenizer:
    """Notes are not what is measured: their bytes are their tokens."""

    pad_token_id = 0

    def __call__(self, texts: list[str], truncation: bool, max_length: int, padding: bool) -> dict[str, Any]:
        """Token ids of each text."""
        return {"input_ids": [[1, *text.encode()][:max_length] for text in texts]}


def images(count: int) -> Iterator[bytes]:
    """JPEGs of 600 × 450 pixels and about 37 kB, from the real images of HAM10000."""
    root = Path(os.environ.get("DERMFM_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    paths = sorted((root / "images" / "HAM10000").glob("*.jpg"))
    if not paths:
        raise SystemExit(f"no real images at {root}; set DERMFM_DATA to their folder")
    for i in range(count):
        with Image.open(paths[i % len(paths)]) as image:
            encoded = io.BytesIO()
            image.convert("RGB").resize((600, 450), Image.Resampling.BICUBIC).save(encoded, "JPEG", quality=93)
        yield encoded.getvalue()


def make_shards(folder: Path, count: int) -> Manifest:
    """Two shards of real images with a short note each."""
    note = {"note_id": "n", "strategy": "template", "engine": "template", "label_access": "given", "text": "a note"}
    fields = json.dumps({"label": 2, "group_id": "g", "notes": [note]}).encode()
    samples: list[dict[str, str | bytes]] = [
        {"__key__": f"{i:08d}", "jpg": data, "json": fields, "txt": b"a note"} for i, data in enumerate(images(count))
    ]
    half = count // 2
    parts = (samples[:half], samples[half:])
    infos = [write_shard(folder, f"train-{i:05d}.tar", "train", part) for i, part in enumerate(parts)]
    write_manifest(folder, infos, {})
    return Manifest.load(folder)


def ours(manifest: Manifest, augment: AugmentConfig | None) -> Callable[[], int]:
    """One epoch through our loader: reading, decoding, choosing a note, tokenising, collating."""
    reader = ShardReader(manifest.folder, manifest.split("train"))
    order = SampleOrder(reader.shard_sizes)
    num_steps = order.num_samples // BATCH

    def epoch() -> int:
        batches = stream(
            reader, order, start=0, global_batch=BATCH, rank=0, world=1, seed=0, num_steps=num_steps,
            sample_fn=SampleFn(SIZE, {"template": 1.0}, augment), collate_fn=Collate(ByteTokenizer(), 64, SIZE),
        )  # fmt: skip
        return sum(len(batch) for batch in batches)

    return epoch


def bare_decode(manifest: Manifest) -> Callable[[], int]:
    """The fastest decode known, in a loop over bytes in memory: scaled JPEG decode and resize, nothing else."""
    reader = ShardReader(manifest.folder, manifest.shards)
    data = [reader.read(s, r)["jpg"] for s, info in enumerate(manifest.shards) for r in range(info.num_samples)]

    def epoch() -> int:
        for one in data:
            array = simplejpeg.decode_jpeg(
                one, "RGB", fastdct=False, fastupsample=False, min_height=SIZE, min_width=SIZE
            )
            F.interpolate(torch.from_numpy(array).permute(2, 0, 1)[None], (SIZE, SIZE), mode="bicubic", antialias=True)
        return len(data)

    return epoch


def webdataset_epoch(manifest: Manifest, transform: Callable[[Image.Image], Any]) -> Callable[[], int]:
    """One epoch through plain webdataset with its `pil` decode, `transform`, and batches of the same size."""
    tars = [str(manifest.path(shard)) for shard in manifest.shards]

    def epoch() -> int:
        samples = webdataset.WebDataset(tars, shardshuffle=False).decode("pil").to_tuple("jpg", "txt")
        batches = samples.map_tuple(transform, str).batched(BATCH)
        return sum(len(batch[1]) for batch in batches)

    return epoch


def resized(image: Image.Image) -> np.ndarray:
    """The same resize as ours, with PIL: the centre square at 224 pixels, uint8."""
    left = (image.width - image.height) // 2
    square = (left, 0, left + image.height, image.height)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=square)).transpose(2, 0, 1)


def open_clip_transform() -> Callable[[Image.Image], Any] | None:
    """open_clip's own transform for training; None where it is not installed."""
    if importlib.util.find_spec("open_clip") is None:
        return None
    import open_clip

    return open_clip.image_transform(SIZE, is_train=True)


def alternate(sides: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Samples per second of each side: the median over rounds in which the sides take turns."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for name in sides:
        sides[name]()  # warm caches, of the disk too
    for _ in range(rounds):
        for name, epoch in sides.items():
            began = time.perf_counter()
            count = epoch()
            rates[name].append(count / (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in rates.items()}


def addressing_ms() -> float:
    """Milliseconds to address a batch of 4,096 in 1.03 M samples, cold, far into the run; the median of nine."""
    times = []
    for i in range(9):
        order = SampleOrder([4000] * 258, seed=i)
        began = time.perf_counter()
        order.locate(np.arange(4096) + 987_654_321)
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)


def measure(quick: bool) -> list[dict[str, Any]]:
    """All figures, as rows of the benchmarks' common form."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = make_shards(Path(folder), 256 if quick else 1024)
        sides = {
            "ours": ours(manifest, None),
            "bare": bare_decode(manifest),
            "webdataset": webdataset_epoch(manifest, resized),
        }
        transform = open_clip_transform()
        if transform is not None:
            sides["ours, crop and flip"] = ours(manifest, CROP_AND_FLIP)
            sides["open_clip"] = webdataset_epoch(manifest, transform)
        rates = alternate(sides, 2 if quick else 5)
    rows = [
        figure("loader / bare scaled decode", rates["ours"], rates["bare"], "images/s", 0.95),
        figure("loader / webdataset with pil", rates["ours"], rates["webdataset"], "images/s", 3.0),
    ]
    if transform is not None:
        ours_rate, other = rates["ours, crop and flip"], rates["open_clip"]
        rows.append(figure("crop and flip / open_clip's transform", ours_rate, other, "images/s", 2.5))
    taken = addressing_ms()
    rows.append(figure("addressing 4,096 of 1.03 M, cold", taken, 50.0, "ms", 1.0, better="lower"))
    return rows


def figure(name: str, mine: float, other: float, unit: str, goal: float, better: str = "higher") -> dict[str, Any]:
    """One row; `ratio` is ours over the other."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread"
    return {
        "figure": name, "ours": round(mine, 2), "other": round(other, 2), "unit": unit,
        "ratio": round(mine / other, 3), "goal": goal, "better": better, "machine": machine,
    }  # fmt: skip


def main() -> None:
    """Print a table for people and one JSON object a line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer images and rounds")
    torch.set_num_threads(1)
    rows = measure(parser.parse_args().quick)
    columns = ("figure", "ours", "other", "unit", "ratio", "goal")
    table = Table(*columns)
    for row in rows:
        table.add_row(*(str(row[name]) for name in columns))
    Console().print(table)
    if importlib.util.find_spec("open_clip") is None:
        print("open_clip is not installed: its comparison is left out")
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
