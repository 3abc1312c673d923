"""ZeRO stage 1 in host memory: gradients packed once by the rank that owns them, and nothing sent that nobody needs.

DeepSpeed's own way is made for GPUs: it copies every gradient into a bucket, sums whole buckets on all ranks (twice
what a share needs), copies what a rank owns out of them and flattens that once more; gloo's all-gather of the updated
weights copies them twice. On a CPU each pass over the gradients is a percent of a step, and so is each time that they
travel. Layout, master weights, AdamW and checkpoints stay DeepSpeed's.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        self._optimizer = optimizer
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
        rank = dist.get_rank()
        own: Tensor | None = None
        for to, source in rounds():
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

    def step(self, gradients: Tensor) -> None:
        """AdamW on this rank's share; then all ranks have all weights. Collective.

        `gradients`: this rank's share, as `take_sums` gives it. A group travels while the next one is stepped.
        """
        optimizer, pending = self._optimizer, []
        for i, gradient in enumerate(gradients.split(self.sizes)):
            master = optimizer.single_partition_of_fp32_groups[i]
            master.grad = gradient
            optimizer._optimizer_step(i)
            master.grad = None
            shares = optimizer.bit16_groups_flat[i].split(self.sizes[i])
            shares[dist.get_rank()].copy_(master.detach())
            pending += exchange(shares, i)
        for work in pending:
            work.wait()

    def _pack(self, rank: int) -> Tensor:
        return torch.cat([piece.gradient() for piece in self._pieces[rank]])


def rounds() -> list[tuple[int, int]]:
    """(to, from): this rank's partners in each of N − 1 rounds, after which it has met all others both ways."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return [((rank + step) % world, (rank - step) % world) for step in range(1, world)]


def exchange(shares: Sequence[Tensor], tag: int) -> list[dist.Work]:
    """Give this rank's tensor of `shares` to all others and get theirs, in place; what to wait for."""
    own = shares[dist.get_rank()]
    operations = []
    for to, source in rounds():
        operations += [
            dist.P2POp(dist.isend, own, to, tag=tag),
            dist.P2POp(dist.irecv, shares[source], source, tag=tag),
        ]
    return dist.batch_isend_irecv(operations) if operations else []


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
    """Whether this is DeepSpeed's optimizer of stage 1 over float32 parameters in host memory, not offloaded, whose
    gradients lie at the parameters and travel in float32."""
    if getattr(optimizer, "partition_gradients", True) or optimizer.cpu_offload or optimizer.use_grad_accum_attribute:
        return False
    plain = all(flat.dtype == torch.float32 and flat.device.type == "cpu" for flat in optimizer.bit16_groups_flat)
    return plain and optimizer.communication_data_type == torch.float32


def square(flat: Tensor) -> Tensor:
    """Sum of squares, float64 [1]: chunk by chunk, without a copy."""
    return torch.stack([torch.dot(part, part) for part in flat.split(CHUNK)]).double().sum()
