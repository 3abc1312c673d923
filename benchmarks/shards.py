"""Reading shards: our loader against the bare decode, plain webdataset, and open_clip's own training pipeline.

    python benchmarks/shards.py [--quick]

All sides read the same shards of 600 × 450 JPEGs (about 37 kB, upscaled from the real images, or from drawn ones where
those are absent) to 224 pixels, in one process that is bound to one core, in alternating rounds; the figures are
medians of the rounds. Each comparison comes twice: by the clock, and by the processor time of the whole process, which
other work on the machine disturbs less. The side of open_clip is left out where that package is not installed.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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

from benchmarks.shared.figures import figure, show
from dermfm.images import AugmentConfig
from dermfm.records.atlas import draw_atlas
from dermfm.records.source import AtlasConfig
from dermfm.samples import Collate, SampleFn
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
    """JPEGs of 600 × 450 pixels and about 37 kB, from the real images of HAM10000 or else from the embedded atlas."""
    root = Path(os.environ.get("DERMFM_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    with tempfile.TemporaryDirectory() as drawn:
        paths = sorted((root / "images" / "HAM10000").glob("*.jpg"))
        if not paths:
            print(f"no real images at {root} (DERMFM_DATA names their folder): drawn ones are read")
            draw_atlas(AtlasConfig(num_dermo=64, num_clinic=0, size=450, quality=95), Path(drawn), 1, False)
            paths = sorted(Path(drawn).rglob("*.jpg"))
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
    """The fastest decode known, in a loop over bytes in memory: scaled JPEG decode and resize, nothing else.

    To write into memory of its own that is used again, or to cut out the centre square as our loader does, was measured
    and makes it no faster.
    """
    reader = ShardReader(manifest.folder, manifest.shards)
    data = [reader.read(s, r)["jpg"] for s, info in enumerate(manifest.shards) for r in range(info.num_samples)]

    def epoch() -> int:
        for one in data:
            array = simplejpeg.decode_jpeg(
                one, "RGB", fastdct=False, fastupsample=False, min_height=SIZE, min_width=SIZE
            )
            pixels = torch.from_numpy(array)[None].permute(0, 3, 1, 2)  # known as channels-last: resized faster
            F.interpolate(pixels, (SIZE, SIZE), mode="bicubic", antialias=True)
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


def open_clip_epoch(manifest: Manifest) -> Callable[[], int] | None:
    """One epoch through open_clip's own training reader and transform; None where it is not installed."""
    if importlib.util.find_spec("open_clip") is None or importlib.util.find_spec("open_clip_train") is None:
        return None
    import open_clip
    import open_clip_train.data
    from webdataset.tariterators import tar_file_expander

    # it is written for webdataset up to 0.2.86, which put no marks between shards
    open_clip_train.data.tar_file_expander = functools.partial(tar_file_expander, eof_value=None)
    transform = open_clip.image_transform(SIZE, is_train=True)
    tars = "::".join(str(manifest.path(shard)) for shard in manifest.shards)
    num_samples = sum(shard.num_samples for shard in manifest.shards)
    arguments = argparse.Namespace(
        train_data=tars, train_num_samples=num_samples, train_data_upsampling_factors=None, dataset_resampled=False,
        seed=0, workers=0, batch_size=BATCH, world_size=1,
    )  # fmt: skip
    tokenizer = ByteTokenizer()

    def tokens(text: str) -> torch.Tensor:
        return torch.tensor(tokenizer([text], True, 64, False)["input_ids"])

    def epoch() -> int:
        data = open_clip_train.data.get_wds_dataset(arguments, transform, is_train=True, tokenizer=tokens)
        return sum(len(pixels) for pixels, _ in data.dataloader)

    return epoch


@dataclass(frozen=True)
class Rate:
    """Samples per second of one side: by the clock, and of the process's processor time."""

    clock: float
    cpu: float


def alternate(sides: dict[str, Callable[[], int]], rounds: int) -> dict[str, Rate]:
    """The rates of each side: medians over rounds in which the sides take turns."""
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for name in sides:
        sides[name]()  # warm caches, of the disk too
    for _ in range(rounds):
        for name, epoch in sides.items():
            began, began_cpu = time.perf_counter(), time.process_time()
            count = epoch()
            rates[name].append((count / (time.perf_counter() - began), count / (time.process_time() - began_cpu)))
    return {name: Rate(*map(statistics.median, zip(*values, strict=True))) for name, values in rates.items()}


def addressing_ms(cold: bool) -> tuple[float, float, str, float]:
    """(milliseconds, the 50 allowed, unit, goal) to address a batch of 4,096 in 1.03 M samples far into the run.

    `cold`: by an order that has addressed nothing yet; else the step after one that it has. Medians of nine.
    """
    times = []
    for i in range(9):
        order, start = SampleOrder([4000] * 258, seed=i), 987_654_321
        if not cold:
            order.locate(np.arange(4096) + start - 4096)
        began = time.perf_counter()
        order.locate(np.arange(4096) + start)
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times), 50.0, "ms", 1.0


def measure(quick: bool) -> list[dict[str, Any]]:
    """All figures, as rows of the benchmarks' common form."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = make_shards(Path(folder), 256 if quick else 512)
        sides = {
            "ours": ours(manifest, None),
            "bare": bare_decode(manifest),
            "webdataset": webdataset_epoch(manifest, resized),
        }
        other = open_clip_epoch(manifest)
        if other is not None:
            sides |= {"ours, crop and flip": ours(manifest, CROP_AND_FLIP), "open_clip": other}
        rates = alternate(sides, 3 if quick else 9)
    rows = compared("loader / bare scaled decode", rates["ours"], rates["bare"], 0.95)
    rows += compared("loader / webdataset with pil", rates["ours"], rates["webdataset"], 3.0)
    if other is not None:
        rows += compared("crop and flip / open_clip's loader", rates["ours, crop and flip"], rates["open_clip"], 2.5)
    rows.append(figure("addressing 4,096 of 1.03 M, next step", *addressing_ms(cold=False), better="lower"))
    rows.append(figure("addressing 4,096 of 1.03 M, cold jump", *addressing_ms(cold=True), better="lower"))
    return rows


def compared(name: str, mine: Rate, other: Rate, goal: float) -> list[dict[str, Any]]:
    """Two rows of one comparison: by the clock and by processor time."""
    return [
        figure(name, mine.clock, other.clock, "images/s", goal),
        figure(f"{name}, processor time", mine.cpu, other.cpu, "images/s", goal),
    ]


def main() -> None:
    """Print a table for people and one JSON object a line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer images and rounds")
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # no side gets a second core for its threads
    rows = measure(parser.parse_args().quick)
    show(rows)
    if importlib.util.find_spec("open_clip") is None:
        print("open_clip is not installed: its comparison is left out")


if __name__ == "__main__":
    main()
