"""Preprocess the images of many records into `records/images/`; a second run makes only what is missing."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import pyarrow as pa

from dermfm.config import short_hash, to_dict
from dermfm.records.parts import Place, Row, Task, run_parts
from dermfm.records.preprocess.config import PreprocessConfig
from dermfm.records.preprocess.decode import ImageError
from dermfm.records.preprocess.image import VERSION, prepare
from dermfm.records.source import Losses
from dermfm.records.table import Record
from shards.files import replacing

IMAGES, PARTS = "images", "prepared"  # folders below `records/`
SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("source", pa.string()),
        pa.field("target", pa.string()),
        pa.field("width", pa.int64()),
        pa.field("height", pa.int64()),
        pa.field("bytes", pa.int64()),
        pa.field("kinds", pa.list_(pa.string())),
        pa.field("error", pa.string()),
        pa.field("error_kind", pa.string()),
    ]
)


def preprocess_records(
    records: Sequence[Record], config: PreprocessConfig, folder: Path, place: Place, losses: Losses
) -> list[Record]:
    """Make the images of the records below `folder`/records/images and point `path` at them.

    Images that cannot be used are left out; every kind of oddity is counted in `losses` with the image's name. Width
    and height become those of the result; the perceptual hash and the search for copies stay with the originals.
    """
    images = (folder / "records" / IMAGES).resolve()
    targets = [target_path(record, images) for record in records]
    settings = [VERSION, {k: v for k, v in to_dict(config).items() if k != "enabled"}]
    tasks = [_task(record.path, target, settings) for record, target in zip(records, targets, strict=True)]
    work = partial(prepare_part, config=to_dict(config))
    rows = run_parts(tasks, work, folder / "records" / PARTS, SCHEMA, place, "preprocessing")
    kept = []
    for record, task in zip(records, tasks, strict=True):
        row, name = rows[task.key], f"{record.dataset}/{record.source_id}"
        if row["error"]:
            losses.add(row["error_kind"], f"{name}: {row['error']}")
            continue
        for kind in row["kinds"]:
            losses.add(kind, name)
        record.path, record.width, record.height = Path(task.target), row["width"], row["height"]
        kept.append(record)
    return kept


def target_path(record: Record, images: Path) -> Path:
    """`images`/<dataset>/<source id>.jpg; below `images`/prepared where the image itself lies in `images` (the atlas).

    Characters that a file name should not have are replaced, and a hash then keeps two such ids apart.
    """
    base = images / "prepared" if images in record.path.resolve().parents else images
    return base / safe_name(record.dataset) / f"{safe_name(record.source_id)}.jpg"


def safe_name(name: str) -> str:
    """A file name for an id: itself where it is plain."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip(".")[:150] or "_"
    return name if plain == name else f"{plain}-{short_hash(name)[:8]}"


def prepare_part(tasks: Sequence[Task], config: dict[str, Any]) -> list[Row]:
    """Preprocess and write the images of one part; a row of SCHEMA each."""
    cv2.setNumThreads(1)  # workers are the parallelism; threads below them would only compete
    settings = PreprocessConfig(**config)
    for folder in {os.path.dirname(task.target) for task in tasks}:
        os.makedirs(folder, exist_ok=True)
    return [_prepare_one(task, settings) for task in tasks]


def _prepare_one(task: Task, config: PreprocessConfig) -> Row:
    row: Row = dict.fromkeys(SCHEMA.names) | {"key": task.key, "source": task.source, "target": task.target}
    try:
        with open(task.source, "rb") as file:
            data = file.read()
        result = prepare(data, config)
    except ImageError as error:
        return row | {"error": str(error), "error_kind": error.kind}
    except OSError as error:
        return row | {"error": error.strerror or str(error), "error_kind": "unreadable images"}
    if result.jpeg is None:
        _link(task.source, task.target)
    else:
        _write(result.jpeg, task.target)
    size = len(data if result.jpeg is None else result.jpeg)
    return row | {"width": result.width, "height": result.height, "bytes": size, "kinds": list(result.kinds)}


def _task(source: Path, target: Path, settings: list[Any]) -> Task:
    """Identified by what decides the bytes: the file (path, size, time), the settings, where it goes."""
    try:
        stat = os.stat(source)
        state = [stat.st_size, stat.st_mtime_ns]
    except OSError:
        state = []
    resolved = str(source.resolve())
    return Task(short_hash([resolved, state, settings, str(target)]), resolved, str(target))


def _write(data: bytes, target: str) -> None:
    # Unbuffered: for a small picture the buffer's own system calls cost more than the write.
    with replacing(target, flush=False) as temporary, open(temporary, "wb", buffering=0) as file:
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]


def _link(source: str, target: str) -> None:
    """The very file under another name: a hard link, or a copy where the file system or the rights do not allow one."""
    if os.path.exists(target) and os.path.samefile(source, target):
        return  # renaming a link onto itself would leave the temporary name behind
    with replacing(target, flush=False) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
