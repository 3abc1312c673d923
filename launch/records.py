"""dermfm records: read data sets' own tables and images into records.parquet.

  dermfm records configs/data/ham10000.yaml images=HAM10000/ table=HAM10000_metadata.csv out=runs/ham/records.parquet
  dermfm records configs/data/atlas.yaml out=runs/demo/records.parquet

Images stay where they are; only the embedded atlas draws new ones, beside the file. A second call with the same
settings and tables does nothing. --dry-run reads everything and prints the counts, but writes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dermfm.records.build import RecordsConfig, build_records
from dermfm.records.summary import print_summary

if TYPE_CHECKING:
    from launch.cli import Call


def schema(call: Call) -> type[RecordsConfig]:
    """The job's configuration."""
    return RecordsConfig


def run(config: RecordsConfig, call: Call) -> int:
    """Build the records and print the summary."""
    built = build_records(config, dry_run=call.dry_run)
    print_summary(built, config.out)
    return 0
