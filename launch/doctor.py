"""Check this node, or all nodes of an allocation, before a job burns hours.

  dermfm doctor run=runs/my shards=runs/my/shards
  srun dermfm doctor run=runs/my            # in an allocation: every node, and the network between them

A table with a row a check: green is fine, yellow runs badly, red does not run. Exit code 1 where anything is red.
"""

from __future__ import annotations

import socket
from typing import Any

from cluster.process import close_group, from_environment, start_group
from dermfm.doctor import DoctorConfig, examine, show


def schema(_: Any) -> type[DoctorConfig]:
    """The job's configuration."""
    return DoctorConfig


def run(config: DoctorConfig, _: Any) -> int:
    """Examine every node; the first process prints. 0, or 1 where anything is red."""
    import torch.distributed as dist

    process = from_environment(config.device)
    if process.world > 1:
        start_group(process)
    try:
        found = [(f"{socket.gethostname()}:{process.local_rank}", examine(config, process))]
        if process.world > 1:
            parts: list[Any] = [None] * process.world
            dist.all_gather_object(parts, found[0])
            found = parts
        code = show(found) if process.is_first else int(any(colour == "red" for _, colour, _ in found[process.rank][1]))
    finally:
        close_group()
    return code
