"""dermfm report: one self-contained HTML page about an evaluated run, or about a study.

  dermfm report run=runs/demo
  dermfm report run=runs/demo out=page.html images=false
  dermfm report study=runs/study

The page needs no network: tables, figures and thumbnails are inside. --dry-run says what would be written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dermfm.report.page import ReportConfig, write_report

if TYPE_CHECKING:
    from launch.cli import Call


def schema(call: Call) -> type[ReportConfig]:
    """The job's configuration."""
    return ReportConfig


def check(config: ReportConfig, _: int) -> None:
    """What the job would refuse at its start, for `submit`."""
    write_report(config, dry_run=True)


def run(config: ReportConfig, call: Call) -> int:
    """Write the page, 0 when done."""
    path = write_report(config, dry_run=call.dry_run)
    print(f"{path}: {'would be written' if call.dry_run else f'{path.stat().st_size / 1e6:.1f} MB'}")
    return 0
