"""The place of a process among those that hold one model together, and how the first tells the others what to do."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from typing import Any

IDLE = datetime.timedelta(days=30)  # the others wait for work as long as it takes; a dead process is told at once


@dataclass(frozen=True)
class Seat:
    """Rank of `world` processes that meet at host:port. Rank 0 gets the requests, the others follow."""

    rank: int
    world: int
    host: str
    port: int


class Table:
    """The joined group of a model's processes: `tell` on rank 0 and `hear` on the others belong together."""

    def __init__(self, seat: Seat, cuda: bool) -> None:
        import torch.distributed as dist

        local = 0 if cuda else seat.rank  # Ray shows an actor its own GPU only
        os.environ |= {"RANK": str(seat.rank), "WORLD_SIZE": str(seat.world), "LOCAL_RANK": str(local)}
        os.environ |= {"MASTER_ADDR": seat.host, "MASTER_PORT": str(seat.port)}
        where = f"tcp://{seat.host}:{seat.port}"
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, init_method=where, rank=seat.rank, world_size=seat.world, timeout=IDLE)
        self.seat = seat
        self._control: Any = dist.new_group(backend="gloo", timeout=IDLE)

    def tell(self, what: Any) -> None:
        """Send an object to all others."""
        import torch.distributed as dist

        dist.broadcast_object_list([what], src=0, group=self._control)

    def hear(self) -> Any:
        """The object that rank 0 tells next."""
        import torch.distributed as dist

        told: list[Any] = [None]
        dist.broadcast_object_list(told, src=0, group=self._control)
        return told[0]

    def agree(self, tokens: Any) -> Any:
        """Rank 0's choice of tokens [b], in place: logits may differ in the last bit, and what follows must not."""
        import torch.distributed as dist

        dist.broadcast(tokens, src=0)
        return tokens
