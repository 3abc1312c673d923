"""Measure the attributes of many records' images; a second run measures only new or changed images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import cv2
import pyarrow as pa

from dermfm.config import short_hash
from dermfm.records.measure.attributes import VERSION, measure
from dermfm.records.measure.columns import SCHEMA
from dermfm.records.measure.mask import WORKING_SIDE
from dermfm.records.parts import Place, Row, Task, run_parts
from dermfm.records.preprocess.decode import ImageError, decode
from dermfm.records.source import Losses
from dermfm.records.table import MEASURED, Record

PARTS = "measured"  # folder below `records/`
NOT_FOUND = "images in which no lesion was found; nothing of it was measured"
MAX_PIXELS = 200_000_000
_ROW_SCHEMA = pa.schema([pa.field("key", pa.string(), nullable=False), *SCHEMA, pa.field("error", pa.string())])


def measure_records(records: Sequence[Record], folder: Path, place: Place, losses: Losses) -> None:
    """Fill `measured` of the records; what could not be measured is counted and stays null."""
    tasks = [_task(record.path) for record in records]
    rows = run_parts(tasks, measure_part, folder / "records" / PARTS, _ROW_SCHEMA, place, "measuring")
    for record, task in zip(records, tasks, strict=True):
        row = rows[task.key]
        if row["error"]:
            losses.add("images that could not be measured", f"{record.dataset}/{record.source_id}: {row['error']}")
        elif row["measured_size"] is None:
            losses.add(NOT_FOUND, f"{record.dataset}/{record.source_id}")
        record.measured = {name.removeprefix(MEASURED): row[name] for name in SCHEMA.names}


def measure_part(tasks: Sequence[Task]) -> list[Row]:
    """Measure the images of one part; a row each."""
    cv2.setNumThreads(1)
    return [_measure_one(task) for task in tasks]


def _measure_one(task: Task) -> Row:
    row: Row = dict.fromkeys(_ROW_SCHEMA.names) | {"key": task.key}
    try:
        with open(task.source, "rb") as file:
            decoded = decode(file.read(), MAX_PIXELS, WORKING_SIDE)
    except (ImageError, OSError) as error:
        return row | {"error": str(error)}
    return row | measure(decoded.pixels)


def _task(path: Path) -> Task:
    stat = os.stat(path)
    source = str(path.resolve())
    return Task(short_hash([source, stat.st_size, stat.st_mtime_ns, VERSION]), source)
