"""The notes folder: part-NNNNN.parquet files, one row a note, and the plan that says which note is in which part.

A part is written under a temporary name and renamed: it is done when its file is there. The plan (plan.parquet) is
kept so that an interrupted part is made again with the same notes in the same order, whatever is asked for later.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dermfm.config import InputError
from shards.files import replacing

SOURCES = ("generated", "regenerated", "repaired", "template")
NOTE_SCHEMA = pa.schema(
    [
        pa.field("note_id", pa.string(), nullable=False),
        pa.field("record_id", pa.string(), nullable=False),
        pa.field("strategy", pa.string(), nullable=False),
        pa.field("engine", pa.string(), nullable=False),
        pa.field("model", pa.string(), nullable=False),
        pa.field("prompt_version", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("attempt", pa.int32(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("label_access", pa.string(), nullable=False),
        pa.field("facts_source", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("faults", pa.list_(pa.string()), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("first_faults", pa.list_(pa.string())),
        pa.field("seconds", pa.float32()),
    ]
)
# Faults of the model's first answer, and the seconds that all tries took (a note's share of its batches); null in
# notes of earlier versions and where no model wrote.
LATER_COLUMNS = ("first_faults", "seconds")
NOTE_COLUMNS: list[str] = NOTE_SCHEMA.names
PLAN_SCHEMA = pa.schema([pa.field("note_id", pa.string()), pa.field("part", pa.int32())])
PART_NAME = re.compile(r"part-(\d{5,})\.parquet")


def read_notes(folder: str | Path) -> pa.Table:
    """All notes of the folder, in the order of parts, each note_id once (the first one counts).

    Raises InputError where the folder holds no finished part, or one that cannot be read or has other columns.
    """
    parts = done_parts(folder)
    if not parts:
        raise InputError(f"{folder}: holds no part-*.parquet; `dermfm notes out={folder}` makes them")
    table = pa.concat_tables([_read_part(parts[index], NOTE_COLUMNS) for index in sorted(parts)])
    ids = table.column("note_id").to_pylist()
    if len(set(ids)) == len(ids):
        return table
    first: dict[str, int] = {}
    for row, note_id in enumerate(ids):
        first.setdefault(note_id, row)
    return table.take(pa.array(first.values()))


def done_parts(folder: str | Path) -> dict[int, Path]:
    """Part number → file, of all finished parts."""
    folder = Path(folder)
    names = folder.iterdir() if folder.is_dir() else ()
    return {int(m[1]): path for path in names if (m := PART_NAME.fullmatch(path.name))}


def part_ids(path: Path) -> list[str]:
    """The note ids of one finished part."""
    return _read_part(path, ["note_id"]).column("note_id").to_pylist()


def strategies_in(folder: str | Path) -> set[str]:
    """The strategies that the folder holds notes of."""
    parts = done_parts(folder).values()
    return {name for path in parts for name in _read_part(path, ["strategy"]).column("strategy").unique().to_pylist()}


def write_part(folder: str | Path, index: int, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write one part (rows as NOTE_SCHEMA) and rename it into place; InputError where the disk refuses."""
    path = Path(folder) / f"part-{index:05d}.parquet"
    _write(pa.Table.from_pylist([dict(r) for r in rows], schema=NOTE_SCHEMA), path)
    return path


def read_plan(folder: str | Path) -> dict[int, list[str]]:
    """Part number → its note ids in order; empty where nothing was planned yet."""
    path = Path(folder) / "plan.parquet"
    if not path.is_file():
        return {}
    try:
        table = pq.read_table(path, schema=PLAN_SCHEMA)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: is damaged ({error}); remove it, and missing notes are planned anew") from error
    plan: dict[int, list[str]] = {}
    for note_id, part in zip(table.column("note_id").to_pylist(), table.column("part").to_pylist(), strict=True):
        plan.setdefault(part, []).append(note_id)
    return plan


def write_plan(folder: str | Path, plan: Mapping[int, Sequence[str]]) -> None:
    """Store part number → note ids, under a temporary name first."""
    ids = [note_id for index in sorted(plan) for note_id in plan[index]]
    parts = [index for index in sorted(plan) for _ in plan[index]]
    _write(pa.table({"note_id": ids, "part": parts}, schema=PLAN_SCHEMA), Path(folder) / "plan.parquet")


def _read_part(path: Path, columns: list[str]) -> pa.Table:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: cannot be read ({error}); delete it and run `dermfm notes` again") from error
    with file:
        absent = [name for name in columns if name not in file.schema_arrow.names]
        missing = [name for name in absent if name not in LATER_COLUMNS]
        if missing:
            raise InputError(f"{path}: lacks the column '{missing[0]}'; it was not written by `dermfm notes`")
        schema = pa.schema([NOTE_SCHEMA.field(name) for name in columns])
        table = file.read([name for name in columns if name not in absent])
        for name in absent:
            table = table.append_column(name, pa.nulls(table.num_rows, NOTE_SCHEMA.field(name).type))
        return table.select(columns).cast(schema)


def _write(table: pa.Table, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:  # several jobs may write the plan at a time
            pq.write_table(table, temporary, compression="zstd")
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}); free space or choose another out="
        ) from error
