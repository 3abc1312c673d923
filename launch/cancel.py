"""End what was submitted for a folder and has not ended: `dermfm cancel runs/my`. What is finished stays.

A SLURM job gets SIGTERM and has the site's KillWait for a checkpoint, a Ray job two minutes; submitted again
it goes on from it. `scancel --signal=USR1 <id>` stops a SLURM job and requeues it.
"""

from __future__ import annotations

from typing import Any

from dermfm.status import CancelConfig, cancel


def schema(_: Any) -> type[CancelConfig]:
    """The job's configuration."""
    return CancelConfig


def run(config: CancelConfig, call: Any) -> int:
    """Cancel every submission that is not over; 0."""
    cancel(config, call.dry_run)
    return 0
