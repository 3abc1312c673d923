"""`dermfm records`: sources → checked, grouped, split records → records.parquet."""

from __future__ import annotations

import csv
import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dermfm.config import REQUIRED, InputError, check_choice, check_range, key, nearest, short_hash, to_dict
from dermfm.records.adapters import ADAPTERS
from dermfm.records.csvtable import looks_like, read_text
from dermfm.records.duplicates import HASH_BITS, Looks, duplicate_pairs, looks_of
from dermfm.records.groups import assign_groups, count_lesion_conflicts, drop_copies
from dermfm.records.images import all_image_facts
from dermfm.records.measure.job import measure_records
from dermfm.records.parts import Place
from dermfm.records.preprocess.config import PreprocessConfig
from dermfm.records.preprocess.job import preprocess_records
from dermfm.records.source import AtlasConfig, Losses, Reading, SourceConfig
from dermfm.records.splits import assign_splits
from dermfm.records.table import Record, read_records, to_table, write_records

COPIES = ("group", "drop")
UNREADABLE = "unreadable images"
CONFLICTS = "records whose label and diagnosis text name different classes"
FINGERPRINT, LOSSES = b"dermfm_inputs", b"dermfm_losses"  # metadata of the file


@dataclass(kw_only=True)
class RecordsConfig(SourceConfig):
    """Which sources to read and how to split them. Without `sources`, the top level itself is the one source."""

    out: str = key(REQUIRED, "file to write, for example runs/demo/records.parquet")
    sources: list[SourceConfig] = key([], "several sources; layout, images and table are inherited where empty")
    seed: int = key(0, "seed of the splits")
    valid: float = key(0.1, "share of images (by group) for validation, per data set and class")
    test: float = key(0.2, "share of images (by group) for testing, per data set and class")
    duplicate_distance: int = key(8, "compare images whose perceptual hashes differ in at most so many bits; -1: none")
    duplicate_matches: int = key(7, "local features that must agree for two pictures to be copies (keypoints.py)")
    copies: str = key("group", "copies of one photograph: group (kept, on one side) | drop (one of them is kept)")
    drop_conflicts: bool = key(True, "leave out records whose label and diagnosis text name different classes")
    drop_unlabelled: bool = key(False, "leave out records whose diagnosis maps to no class")
    workers: int = key(0, "processes that read or draw images; 0: one a core")
    preprocess: PreprocessConfig = key(PreprocessConfig, "image preprocessing; see configs/data/preprocess/")
    measure: bool = key(False, "measure the lesion's attributes from the pixels: columns measured_*")
    address: str | None = key(None, "Ray cluster for images, for example auto; null: this machine's own cores")
    overwrite: bool = key(False, "build again even where the file is up to date")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("valid", self.valid, 0, 1)
        check_range("test", self.test, 0, 1)
        if self.valid + self.test > 1:
            raise ValueError(f"valid + test: {self.valid + self.test:g} is not valid; together at most 1")
        check_choice("copies", self.copies, COPIES)
        check_range("duplicate_distance", self.duplicate_distance, -1, HASH_BITS // 2)
        check_range("duplicate_matches", self.duplicate_matches, 4, 100)
        check_range("workers", self.workers, 0)


@dataclass(frozen=True)
class Built:
    """The outcome: the table, what was left out, and whether the file was already there."""

    table: pa.Table
    losses: Losses
    was_there: bool = False


def resolved_sources(config: RecordsConfig) -> list[SourceConfig]:
    """The sources with what they inherit from the top level; InputError for one without a layout."""
    names = [field.name for field in dataclasses.fields(SourceConfig)]
    own = SourceConfig(**{name: getattr(config, name) for name in names})
    sources = []
    for source in config.sources or [own]:
        inherited = {name: getattr(source, name) or getattr(own, name) for name in ("layout", "images", "table")}
        sources.append(dataclasses.replace(source, **inherited))
        if not inherited["layout"]:
            raise InputError(f"layout is required{_hint(inherited['table'])}; one of {', '.join(ADAPTERS)}")
    return sources


def check_inputs(config: RecordsConfig) -> None:
    """InputError where a table or folder of images that the settings name is not there; nothing is read."""
    for source in resolved_sources(config):
        for name in ("table", "images", "split_tables"):
            path = Path(getattr(source, name) or ".")
            if not path.exists():
                beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
                hint = nearest(path.name, beside) if beside else f"the folder {path.parent} does not exist or is empty"
                raise InputError(f"{name}: {path} does not exist; {hint}")


def _hint(table: str) -> str:
    if not Path(table).is_file() or Path(table).suffix.lower() not in (".csv", ".txt", ".tsv"):
        return ""
    kind = looks_like(next(csv.reader(read_text(Path(table)).splitlines()[:1]), []))
    return f"; {table} looks like {kind}" if kind else ""


def build_records(config: RecordsConfig, dry_run: bool = False) -> Built:
    """Read all sources and write `config.out`, unless it is already there for the same config and tables.

    A dry run opens no image and writes nothing; it counts what the tables and folders say.
    Raises InputError for bad tables, duplicate ids, or when no record is left.
    """
    out = Path(config.out)
    _check_out(out)
    sources = resolved_sources(config)
    inputs = inputs_fingerprint(config, sources)
    if not config.overwrite and not dry_run and _is_current(out, inputs):
        there = read_records(out)
        return Built(there, Losses.from_json((there.schema.metadata or {}).get(LOSSES, b"")), was_there=True)
    reading = Reading(out.parent, config.workers, dry_run)
    losses = reading.losses
    records = _read_sources(sources, reading)
    count_lesion_conflicts(records, losses)
    records = _drop(records, config, losses)
    looks = looks_of([])
    originals = {(record.dataset, record.source_id): record.path for record in records}
    if not dry_run:
        records, looks = image_work(records, config, reading)
    if not records:
        raise InputError(f"{out}: no record is left; {'; '.join(losses.lines()) or 'the sources are empty'}")
    hashes = [record.phash or "" for record in records]
    distance = -1 if dry_run else config.duplicate_distance
    paths = [originals[record.dataset, record.source_id] for record in records]
    pairs = duplicate_pairs(paths, hashes, looks, distance, config.duplicate_matches, config.workers)
    assign_groups(records, pairs, losses)
    if config.copies == "drop":
        records = drop_copies(records, pairs, losses)
    assign_splits(records, config.seed, config.valid, config.test, losses)
    table = to_table(records, out.parent).replace_schema_metadata(
        {FINGERPRINT: inputs.encode(), LOSSES: losses.to_json()}
    )
    if not dry_run:
        write_records(table, out)
    return Built(table, losses)


def inputs_fingerprint(config: RecordsConfig, sources: list[SourceConfig]) -> str:
    """Hash of everything that decides the records: settings, and size and time of the tables and images."""
    settings = {k: v for k, v in to_dict(config).items() if k not in ("out", "workers", "address", "overwrite")}
    # Tables beside the named one may be read as well (MILK10k has three), or below a folder (the reference study's).
    named = [Path(name) for source in sources for name in (source.table, source.split_tables) if name]
    folders = [table if table.is_dir() else table.parent for table in named]
    tables = {*named, *(f for folder in folders for f in (*folder.glob("*.csv"), *folder.glob("*/*.csv")))}
    images = {f for source in sources if source.images for f in Path(source.images).rglob("*")}
    stats = [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(tables | images) if f.is_file()]
    return short_hash([settings, stats])


def _check_out(out: Path) -> None:
    """InputError where `out` cannot be written, before hours of work are done for it."""
    if out.is_dir():
        raise InputError(f"out={out}: is a folder; name the file, for example {out / 'records.parquet'}")
    nearest_there = next(folder for folder in out.absolute().parents if folder.exists())
    if not nearest_there.is_dir():
        raise InputError(f"out={out}: {nearest_there} is a file, a folder is needed there")
    if not os.access(nearest_there, os.W_OK):
        raise InputError(f"out={out}: {nearest_there} cannot be written to; give another path")


def _is_current(out: Path, inputs: str) -> bool:
    if not out.is_file():
        return False
    try:
        return (pq.read_schema(out).metadata or {}).get(FINGERPRINT) == inputs.encode()
    except pa.ArrowInvalid:
        return False


def _read_sources(sources: list[SourceConfig], reading: Reading) -> list[Record]:
    records: list[Record] = []
    seen: dict[tuple[str, str], str] = {}
    for source in sources:
        for record in ADAPTERS[source.layout](source, reading):
            name = (record.dataset, record.source_id)
            if name in seen:
                raise InputError(
                    f"{source.table}: {'/'.join(name)} is already in {seen[name]}; use datasets= to choose"
                )
            seen[name] = source.table
            records.append(record)
    return records


def _drop(records: list[Record], config: RecordsConfig, losses: Losses) -> list[Record]:
    kept = []
    for record in records:
        if record.has_conflict:
            losses.add(CONFLICTS, f"{record.dataset}: {record.subclass_text}, label {record.label}")
        dropped = (config.drop_conflicts and record.has_conflict) or (config.drop_unlabelled and record.label is None)
        if not dropped:
            kept.append(record)
    return kept


def image_work(records: list[Record], config: RecordsConfig, reading: Reading) -> tuple[list[Record], Looks]:
    """Everything that opens the images, and the only place that does; not called in a dry run.

    Fills width, height, phash (and `measured`) of every record; `path` changes where a new image is made. Returns the
    records whose image can be read, in order, and their looks; the others are counted.
    """
    place = Place(config.workers, config.address)
    originals = {id(record): record.path for record in records}
    if config.preprocess.enabled:
        records = preprocess_records(records, config.preprocess, reading.folder, place, reading.losses)
    kept: list[Record] = []

    def thumbnails() -> Iterator[bytes]:
        # Copies are looked for on the originals: removed hairs and other sizes would hide the texture that tells them.
        facts_of_all = all_image_facts([originals[id(record)] for record in records], config.workers)
        for record, facts in zip(records, facts_of_all, strict=True):
            if facts.error:
                reading.losses.add(UNREADABLE, f"{record.path.name}: {facts.error}")
                continue
            record.phash = facts.phash
            if not config.preprocess.enabled:
                record.width, record.height = facts.width, facts.height
            kept.append(record)
            yield facts.thumbnail

    looks = looks_of(thumbnails())
    if config.measure:
        measure_records(kept, reading.folder, place, reading.losses)
    return kept, looks


__all__ = ["AtlasConfig", "Built", "RecordsConfig", "SourceConfig", "build_records", "resolved_sources"]
