"""The embedded atlas as a source: drawn, not read."""

from __future__ import annotations

from dermfm.records.atlas import draw_atlas
from dermfm.records.source import Reading, SourceConfig
from dermfm.records.table import Record


def read(source: SourceConfig, reading: Reading) -> list[Record]:
    """Draw what is missing below `<folder of records.parquet>/records/` and return the records."""
    records = draw_atlas(source.atlas, reading.folder, reading.workers, reading.dry_run)
    for record in records:
        record.test_only = source.is_test_only(record.dataset)
    return [record for record in records if source.is_wanted(record.dataset)]
