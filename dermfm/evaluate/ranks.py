"""The seam to the processes of a job: rank, world, and one collective. A single process is the null case."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from dermfm.config import InputError

S = TypeVar("S")
T = TypeVar("T")


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclasses.dataclass(frozen=True)
class Ranks:
    """`gather(value)` gives every rank the list of all ranks' values, in rank order; all ranks must call it."""

    rank: int = 0
    world: int = 1
    gather: Callable[[Any], list[Any]] = _alone

    @property
    def first(self) -> bool:
        """Whether this rank writes and talks."""
        return self.rank == 0


def current_ranks() -> Ranks:
    """The ranks of torch.distributed's default group, or a single process where none was started."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return Ranks()

    def gather(value: Any) -> list[Any]:
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values

    return Ranks(dist.get_rank(), dist.get_world_size(), gather)


def together(ranks: Ranks, work: Callable[[], T]) -> T:
    """Run `work` on every rank; where it fails for a reason of the input on any, raise that on all of them."""
    failure, result = None, None
    try:
        result = work()
    except (ValueError, OSError) as error:
        failure = error
    messages = [m for m in ranks.gather(None if failure is None else str(failure)) if m is not None]
    if failure is not None:
        raise failure
    if messages:
        raise InputError(messages[0])
    return result  # type: ignore[return-value]


def spread(ranks: Ranks, items: Sequence[S], work: Callable[[S], list[T]]) -> list[T]:
    """The lists that `work` makes of `items`, joined in order on every rank; item i is done by rank i mod world."""
    parts = ranks.gather([work(item) for item in items[ranks.rank :: ranks.world]])
    made = [parts[i % ranks.world][i // ranks.world] for i in range(len(items))]
    return [row for part in made for row in part]


def on_first(ranks: Ranks, work: Callable[[], None]) -> None:
    """Run `work` on the first rank only; every rank waits for it and fails with it."""
    together(ranks, work if ranks.first else lambda: None)
