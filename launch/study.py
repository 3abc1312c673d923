"""Compare ways of writing notes, with their controls: notes → shards → train → evaluate for each cell, then the tables.

  dermfm study configs/study/real-small.yaml data=<folder>
  dermfm study configs/study/real-small.yaml data=<folder> tier=2
  dermfm study configs/study/real-small.yaml data=<folder> cells=[0,8] only=[image-only,label,template]
  dermfm study configs/study/real-small.yaml data=none tables=true

A cell is a strategy × engine × objective × seed; a finished one is a small JSON under <out>/cells, and the same command
does what is missing. Writes <out>/study.parquet, effects.parquet, study.json, table.md and the page report.html.
tables=true writes these again from finished cells alone, without images. --dry-run prints the cells.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dermfm.study.config import StudyConfig
from dermfm.study.run import check as check_study
from dermfm.study.run import describe, run_study
from launch.demo import run_job

if TYPE_CHECKING:
    from launch.cli import Call


def schema(call: Call) -> type[StudyConfig]:
    """The job's configuration."""
    return StudyConfig


def check(config: StudyConfig, _: int) -> None:
    """What the job would refuse at its start, for `submit`."""
    check_study(config)


def run(config: StudyConfig, call: Call) -> int:
    """Run the missing cells of this share."""
    if call.dry_run:
        print("\n".join(describe(config)))
        return 0
    return run_study(config, run_job)
