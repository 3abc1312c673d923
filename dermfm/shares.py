"""Gradients at ZeRO stage 1 in host memory: packed once by the rank that owns them, and each rank is sent its own only.

DeepSpeed's own way is made for GPUs: it copies every gradient into a bucket, sums whole buckets on all ranks (twice
what a share needs), copies what a rank owns out of them and flattens that once more. On a CPU each pass over the
gradients is a percent of a step, and so is each time that they travel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK = 1 << 16  # elements that are summed up at a time: in the cache still, and rounding stays small


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of a parameter, or as many zeros where a share is filled up."""

    parameter: Tensor | None
    start: int
    stop: int

    def gradient(self) -> Tensor:
        """Flat; zeros where the parameter has no gradient."""
        if self.parameter is None or self.parameter.grad is None:
            return torch.zeros(self.stop - self.start)
        return self.parameter.grad.reshape(-1)[self.start : self.stop]


class Shares:
    """How DeepSpeed's optimizer of stage 1 divides its parameter groups among ranks. `sizes`: a share's, by group."""

    def __init__(self, optimizer: Any) -> None:
        self._groups = [list(group) for group in optimizer.bit16_groups]
        self.sizes = [int(size) for size in optimizer.partition_size]
        self._pieces: list[list[Piece]] = [[] for _ in range(dist.get_world_size())]
        for group, flat, size in zip(self._groups, optimizer.bit16_groups_flat, self.sizes, strict=True):
            for rank, found in enumerate(self._pieces):
                found += pieces_within(group, flat, rank * size, (rank + 1) * size)

    def take_sums(self) -> Tensor:
        """The sums over ranks of this rank's share of all gradients, group after group; takes the gradients away.

        Collective. In N − 1 rounds a rank sends each of the others what is theirs, so memory is needed for three shares
        and a rank sends (N − 1) / N of its gradients; the order of summation is fixed.
        """
        rank, world = dist.get_rank(), dist.get_world_size()
        own: Tensor | None = None
        for step in range(1, world):
            to, source = (rank + step) % world, (rank - step) % world
            sent = self._pack(to)
            got = torch.empty_like(sent)
            pending = dist.batch_isend_irecv([dist.P2POp(dist.isend, sent, to), dist.P2POp(dist.irecv, got, source)])
            own = self._pack(rank) if own is None else own  # while the first ones travel
            for work in pending:
                work.wait()
            own.add_(got)
        own = self._pack(rank) if own is None else own
        for group in self._groups:
            for parameter in group:
                parameter.grad = None
        return own

    def _pack(self, rank: int) -> Tensor:
        return torch.cat([piece.gradient() for piece in self._pieces[rank]])


def pieces_within(group: list[Tensor], flat: Tensor, start: int, stop: int) -> list[Piece]:
    """What lies at [start, stop) of `flat`, of which the parameters of `group` are views; gaps are zeros."""
    found: list[Piece] = []
    here = start
    for parameter in sorted(group, key=lambda p: p.data_ptr()):
        first = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
        low, high = max(first, start), min(first + parameter.numel(), stop)
        if low < high:
            if here < low:
                found.append(Piece(None, here, low))
            found.append(Piece(parameter, low - first, high - first))
            here = high
    return [*found, Piece(None, here, stop)] if here < stop else found


def is_for(optimizer: Any) -> bool:
    """Whether this is DeepSpeed's optimizer of stage 1 over float32 parameters in host memory, not offloaded."""
    if getattr(optimizer, "partition_gradients", True) or optimizer.cpu_offload:
        return False
    plain = all(flat.dtype == torch.float32 and flat.device.type == "cpu" for flat in optimizer.bit16_groups_flat)
    return plain and optimizer.communication_data_type == torch.float32


def square(flat: Tensor) -> Tensor:
    """Sum of squares, float64 [1]: chunk by chunk, without a copy."""
    return torch.stack([torch.dot(part, part) for part in flat.split(CHUNK)]).double().sum()
