"""What will be packed where: the settings, notes grouped by record, and records spread over shards."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dermfm.config import InputError, canonical_json, check_range, check_share, key, nearest, short_hash
from dermfm.notes.store import done_parts, read_notes
from dermfm.records.table import SPLITS, read_records
from shards.manifest import FILE_NAME

PLAN = "plan.json"
NOTE_FIELDS = ("note_id", "strategy", "engine", "label_access", "text")


@dataclass(kw_only=True)
class ShardsConfig:
    """What `dermfm shards` packs, and how."""

    records: str = key("records.parquet", "the table of records; image paths are relative to its folder")
    notes: str | None = key(None, "folder of notes/part-*.parquet; null packs images without notes")
    out: str = key("shards", "folder for the tars, their indexes, rows.parquet and manifest.json")
    shard_bytes: int = key(256_000_000, "aimed-at size of a shard, in bytes")
    max_side: int = key(0, "encode images anew whose shorter side is longer than this many pixels; 0: never")
    jpeg_quality: int = key(92, "quality (1 to 100) where an image has to be encoded anew")
    txt_strategy: str | None = key(
        None, "store this strategy's first note as <key>.txt too, as open_clip's reader wants"
    )
    share: list[int] = key([0, 1], "[k, n]: pack every n-th shard from the k-th, as one of n jobs on the same folder")
    workers: int = key(0, "processes that pack shards side by side; 0: one for each core, at most 8")

    def __post_init__(self) -> None:
        check_range("shard_bytes", self.shard_bytes, 10_000)
        check_range("max_side", self.max_side, 0)
        check_range("jpeg_quality", self.jpeg_quality, 1, 100)
        check_range("workers", self.workers, 0)
        check_share(self.share)


@dataclass(frozen=True)
class NotesByRecord:
    """Notes sorted by record: those of record r are rows starts[r] to starts[r + 1] of `table`."""

    table: pa.Table
    starts: np.ndarray
    num_left_out: int
    strategies: dict[str, int]

    def of(self, record: int) -> list[dict[str, Any]]:
        """The notes of one record as a sample stores them."""
        start, end = int(self.starts[record]), int(self.starts[record + 1])
        return self.table.slice(start, end - start).to_pylist()


@dataclass(frozen=True)
class Plan:
    """What will be packed: the identity of the inputs, and which rows of `records` each shard holds."""

    records: pa.Table
    notes: NotesByRecord
    root: Path
    identity: dict[str, str]
    shards: dict[str, np.ndarray]
    image_sizes: np.ndarray  # bytes of each record's image file; 0 where there is none

    def images_of(self, shard: str) -> str:
        """A hash that changes when the image files of a shard do."""
        return short_hash(self.image_sizes[self.shards[shard]].tolist())


def make_plan(config: ShardsConfig) -> Plan:
    """Read the inputs, see that the output folder is theirs, and spread the records over shards."""
    records = read_records(config.records)
    if records.num_rows == 0:
        raise InputError(f"{config.records}: holds no records; there is nothing to pack")
    notes = group_notes(config.notes, records)
    if config.txt_strategy and config.txt_strategy not in notes.strategies:
        hint = nearest(config.txt_strategy, notes.strategies) if notes.strategies else "there are no notes"
        raise InputError(f"txt_strategy: no note of strategy '{config.txt_strategy}'; {hint}")
    root = Path(config.records).resolve().parent
    sizes = np.asarray([_file_size(root / image) for image in records["image"].to_pylist()], dtype=np.int64)
    identity = {
        "records": table_hash(records),
        "notes": table_hash(notes.table),
        "settings": short_hash(settings(config)),
    }
    counts = _known_counts(Path(config.out), identity) or _count_shards(records, sizes, config.shard_bytes)
    return Plan(records, notes, root, identity, spread(records, counts), sizes)


def check_inputs(config: ShardsConfig) -> None:
    """InputError where the records cannot be read, or the folder of notes holds none; no image is looked at."""
    read_records(config.records)
    if config.notes and not done_parts(config.notes):
        raise InputError(f"{config.notes}: holds no part-*.parquet; `dermfm notes out={config.notes}` makes them")


def group_notes(folder: str | None, records: pa.Table) -> NotesByRecord:
    """Notes with a text, by record. Notes without text, or of records that are not packed, are left out and counted."""
    if folder is None:
        empty = pa.table({name: pa.array([], pa.string()) for name in NOTE_FIELDS})
        return NotesByRecord(empty, np.zeros(records.num_rows + 1, dtype=np.int64), 0, {})
    notes = read_notes(folder)
    record = pc.index_in(notes["record_id"], value_set=records["record_id"].combine_chunks())
    table = notes.select(list(NOTE_FIELDS)).append_column("record", record)
    # 32-bit offsets of string columns overflow at two gigabytes of notes
    table = table.set_column(table.schema.get_field_index("text"), "text", table["text"].cast(pa.large_string()))
    table = table.filter(pc.and_(pc.is_valid(table["record"]), pc.greater(pc.utf8_length(table["text"]), 0)))
    if table.num_rows == 0:
        raise InputError(f"{folder}: none of its {notes.num_rows} notes belongs to a record that is packed")
    table = table.sort_by([("record", "ascending"), ("strategy", "ascending"), ("note_id", "ascending")])
    starts = np.searchsorted(table["record"].to_numpy(), np.arange(records.num_rows + 1))
    counts = {row["values"]: row["counts"] for row in pc.value_counts(table["strategy"]).to_pylist()}
    table = table.drop_columns(["record"])
    return NotesByRecord(table, starts, notes.num_rows - table.num_rows, dict(sorted(counts.items())))


def spread(records: pa.Table, counts: dict[str, int]) -> dict[str, np.ndarray]:
    """Shard name → rows of `records`: each split sorted by a hash of record_id and cut into equal shards.

    So classes and data sets mix in every shard, whatever order the table has.
    """
    ids = records["record_id"].to_pylist()
    splits = np.asarray(records["split"].to_pylist())
    digests = np.asarray([hashlib.sha256(i.encode()).digest()[:8] for i in ids], dtype="S8").view(">u8")
    shards = {}
    for split in SPLITS:
        rows = np.flatnonzero(splits == split)
        rows = rows[np.argsort(digests[rows], kind="stable")]
        for i, piece in enumerate(np.array_split(rows, counts.get(split, 0)) if len(rows) else []):
            shards[f"{split}-{i:05d}.tar"] = piece
    return shards


def _count_shards(records: pa.Table, sizes: np.ndarray, shard_bytes: int) -> dict[str, int]:
    splits = np.asarray(records["split"].to_pylist())
    counts = {}
    for split in SPLITS:
        of_split = sizes[splits == split]
        counts[split] = min(max(1, math.ceil(int(of_split.sum()) / shard_bytes)), len(of_split))
    return counts


def _known_counts(out: Path, identity: dict[str, str]) -> dict[str, int] | None:
    """Shards of each split as an earlier run planned them; InputError where the folder holds shards of other inputs."""
    remedy = "give another out=, or delete the folder to pack anew"
    if not (out / PLAN).is_file():
        foreign = sorted(p.name for p in out.glob("*.tar")) if out.is_dir() else []
        if foreign or (out / FILE_NAME).is_file():
            raise InputError(f"{out}: holds shards that another program or version wrote; {remedy}")
        return None
    try:
        plan = json.loads((out / PLAN).read_text(encoding="utf-8"))
        known, counts = dict(plan["identity"]), dict(plan["shards"])
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{out / PLAN}: cannot be read; {remedy}") from None
    changed = [name for name in identity if known.get(name) != identity[name]]
    if changed:
        raise InputError(f"{out}: holds shards of other inputs ({' and '.join(changed)} differ); {remedy}")
    return counts


def settings(config: ShardsConfig) -> dict[str, Any]:
    """What decides about the bytes of the shards, beside records and notes."""
    names = ("shard_bytes", "max_side", "jpeg_quality", "txt_strategy")
    return {name: getattr(config, name) for name in names}


def table_hash(table: pa.Table) -> str:
    """A hash of a table's values in their order, whatever its chunks or the file it came from."""
    digest = hashlib.sha256(canonical_json(table.column_names).encode())
    for start in range(0, table.num_rows, 10_000):
        for column in table.slice(start, 10_000).columns:
            digest.update(json.dumps(column.to_pylist(), ensure_ascii=False).encode())
    return digest.hexdigest()[:16]


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
