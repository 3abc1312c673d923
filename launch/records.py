"""dermfm records: read data sets' own tables and images into records.parquet.

  dermfm records configs/data/ham10000.yaml images=HAM10000/ table=HAM10000_metadata.csv out=runs/ham/records.parquet
  dermfm records configs/data/atlas.yaml out=runs/demo/records.parquet

Images stay where they are; preprocess.enabled=true writes cut and resized ones to records/images beside the file, and
the embedded atlas draws its own there. measure=true measures attributes of the lesions. --report writes a page about
the records beside the file (records.html). A second call with the same settings and tables does nothing. --dry-run
reads everything and prints the counts, but writes nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dermfm.records.build import RecordsConfig, build_records, check_inputs
from dermfm.records.summary import print_summary

if TYPE_CHECKING:
    from launch.cli import Call


def schema(call: Call) -> type[RecordsConfig]:
    """The job's configuration."""
    return RecordsConfig


def check(config: RecordsConfig, _: int) -> None:
    """What the job would refuse at its start, for `submit`."""
    check_inputs(config)


def run(config: RecordsConfig, call: Call) -> int:
    """Build the records and print the summary."""
    built = build_records(config, dry_run=call.dry_run)
    print_summary(built, config.out)
    if call.report and not call.dry_run:
        from dermfm.report.records import write_records_page

        out = Path(config.out)
        print(f"page: {write_records_page(built.table, built.losses, out, out.with_suffix('.html'), config.seed)}")
    return 0
