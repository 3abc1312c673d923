"""The step border: the one place in a step where all ranks agree on what one of them has seen.

A stop that was asked for, an error of one rank's loader, a checkpoint file that is still being written: one small
all-reduce a step tells everyone, so that no rank leaves, raises or commits alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from cluster.watchdog import Unwatched
from dermfm.config import DISK_ERRORS, InputError
from shards.manifest import ShardError


class RunError(RuntimeError):
    """The run ends by agreement of all ranks: one line from the first one, exit code 1."""


@dataclass(frozen=True)
class Agreed:
    """What holds on any rank: a stop was asked for; a checkpoint file is not on disk yet."""

    stop: bool
    writing: bool


class Feed:
    """The batches of this rank, each fetched before the border that lets all ranks go into its step."""

    def __init__(self, batches: Iterator[Any], device: str, watch: Unwatched) -> None:
        self._batches, self._device, self._watch = batches, device, watch
        self._next: Any = None
        self.error: Exception | None = None
        self.waited_s = 0.0

    def fetch(self) -> None:
        """Get the next batch, if there is one; an error is kept for `agree`."""
        self._watch.phase("data")
        began = time.monotonic()
        try:
            self._next = next(self._batches, None)
        except Exception as error:  # told to all ranks at the border that follows
            self.error = error
        self.waited_s = time.monotonic() - began
        self._watch.phase("border")

    def take(self) -> Any:
        """The batch that was fetched, on the device."""
        batch, self._next = self._next, None
        assert batch is not None, "no batch was fetched"
        return batch.to(self._device, non_blocking=True)


def agree(stop: bool, writing: bool, error: Exception | None = None) -> Agreed:
    """What any rank has seen. Collective. An error of any is raised on all: bad input as InputError with its rank."""
    flags = torch.tensor([float(stop), float(writing), float(error is not None)])
    flags = flags.to("cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    stopping, busy, failed = (bool(f) for f in flags.tolist())
    if failed:
        _raise_together(error)
    return Agreed(stopping, busy)


def _raise_together(error: Exception | None) -> None:
    """Raise the first rank's error that there is, on every rank."""
    own = None if error is None else (is_bad_input(error), f"{type(error).__name__}: {error}", str(error))
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, own)
    rank, (bad_input, named, text) = next((r, t) for r, t in enumerate(told) if t is not None)
    if bad_input:
        told_all = InputError(f"rank {rank}: {text}")
        told_all.agreed = True  # type: ignore[attr-defined]
        raise told_all from error
    raise RunError(f"rank {rank}: reading its batch failed: {named}") from error


def is_bad_input(error: BaseException) -> bool:
    """Whether an error is of what the user gave (exit code 2), not of the program."""
    if isinstance(error, OSError):
        return error.errno in DISK_ERRORS and bool(error.filename)
    return isinstance(error, InputError | ShardError)
