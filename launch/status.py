"""State of what was submitted for a folder, or runs in it: `dermfm status runs/my`.

Shows every submission with its scheduler's state and restarts, a training run's step, speed and time left, and the last
lines of the newest log.
"""

from __future__ import annotations

from typing import Any

from dermfm.status import StatusConfig, show


def schema(_: Any) -> type[StatusConfig]:
    """The job's configuration."""
    return StatusConfig


def run(config: StatusConfig, _: Any) -> int:
    """Print the state; 0."""
    show(config)
    return 0
