"""The steps of a run and the batches that they read: which pieces of the stream, from which position on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.process import Process
from dermfm.samples import Batch
from shards.loader import stream
from shards.order import SampleOrder
from shards.reader import ShardReader


@dataclass(frozen=True)
class Steps:
    """The steps after `done` up to `total`, each reading `batch` stream indices from `position` on.

    Steps that would read any index of `skip` = [a, b) are left out: they keep their numbers, so that the schedule and
    every later step are those of a run that has not left them out.
    """

    done: int
    total: int
    position: int
    batch: int
    skip: Sequence[int] = ()

    def pieces(self) -> list[range]:
        """The steps, as consecutive ranges that are not empty."""
        first, end = self.done + 1, self.total + 1
        if not self.skip:
            return [range(first, end)] if first < end else []
        low = first + (self.skip[0] - self.position) // self.batch
        high = first - (self.position - self.skip[1]) // self.batch
        found = [range(first, min(max(low, first), end)), range(min(max(high, first), end), end)]
        return [piece for piece in found if len(piece)]

    def __iter__(self) -> Iterator[int]:
        return itertools.chain.from_iterable(self.pieces())

    @property
    def last(self) -> int:
        """The number of the last step; `done` where there is none."""
        pieces = self.pieces()
        return pieces[-1][-1] if pieces else self.done

    def start(self, step: int) -> int:
        """The first stream index that a step reads."""
        return self.position + (step - self.done - 1) * self.batch

    def end(self, step: int) -> int:
        """The stream index after a step."""
        return self.start(step) + self.batch


def batches(
    steps: Steps, reader: ShardReader, order: SampleOrder, process: Process, **settings: Any
) -> Iterator[Batch]:
    """This rank's batch of each step, in order. `settings` are those of `shards.loader.stream`."""
    for piece in steps.pieces():
        yield from stream(
            reader,
            order,
            start=steps.start(piece[0]),
            global_batch=steps.batch,
            rank=process.rank,
            world=process.world,
            num_steps=len(piece),
            **settings,
        )
