"""When checkpoints are written, what is kept of them, and that a full disk costs none that is good."""

from __future__ import annotations

import copy
import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from cluster.watchdog import Unwatched
from dermfm import checkpoint
from dermfm.border import RunError
from dermfm.checkpoint import State
from dermfm.config import InputError

SPARE = 1.1  # free space that a checkpoint must find, in its own size
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Keeping:
    """What is kept: the last `last`, every step that is a multiple of `every` (0: none)."""

    last: int
    every: int


class Saver:
    """Writes a run's checkpoints. `in_background`: files are written while training goes on, committed at a border.

    Every method is called by every rank at the same step. `seconds` sums up what saving has cost since it was read.
    """

    def __init__(self, engine: Any, folder: Path, keeping: Keeping, in_background: bool, watch: Unwatched) -> None:
        self._engine, self.folder, self._keeping, self._watch = engine, folder, keeping, watch
        self._in_background = in_background
        self._pending: tuple[Path, State] | None = None
        self.seconds, self._since = 0.0, time.monotonic()

    @property
    def is_writing(self) -> bool:
        """Whether a file of this rank is not on disk yet."""
        return self._pending is not None and bool(self._engine.checkpoint_engine.is_writing)

    def start(self, state: State) -> None:
        """Set aside what lies after `state`; InputError on every rank where the disk cannot hold one checkpoint."""
        error = None
        if dist.get_rank() == 0:
            checkpoint.set_aside(self.folder, state.step)
            checkpoint.point_best(self.folder, state.best_step)
            error = self._lack_of_room()
        told = [error]
        dist.broadcast_object_list(told, src=0)
        if told[0]:
            raise InputError(f"run: {told[0]}")

    def is_best(self, state: State, value: float | None) -> bool:
        """Whether the value of the validation metric is the best so far; `state` remembers it."""
        if value is None or (state.best is not None and value <= state.best):
            return False
        state.best, state.best_step = value, state.step
        return True

    def border(self, state: State, *, writing: bool, save: bool, last: bool) -> None:
        """At a step border: commit what all ranks have written, begin a checkpoint where `save`, wait for it if `last`.

        A periodic checkpoint that finds no room is left out, loudly; RunError if it is the last one.
        """
        began = time.monotonic()
        if self._pending is None and not save:
            return
        self._watch.phase("checkpoint")
        if self._pending is not None and (save or not writing):
            self._commit(last)
        if save and self._has_room(last):
            now = time.monotonic()
            state.meter["seconds"] = state.meter.get("seconds", 0.0) + now - self._since
            self._since = now
            frozen = copy.deepcopy(state)
            self._pending = checkpoint.begin(self._engine, self.folder, frozen), frozen
            if last or not self._in_background:
                self._commit(last)
        self.seconds += time.monotonic() - began

    def cost(self) -> dict[str, float]:
        """`checkpoint_s` since the last call, where there was any."""
        spent, self.seconds = self.seconds, 0.0
        return {"checkpoint_s": spent} if spent else {}

    def _commit(self, last: bool) -> None:
        """Commit and prune. No rank goes on, or ends, before the first one has pruned."""
        assert self._pending is not None
        (partial, state), self._pending = self._pending, None
        try:
            checkpoint.commit(self._engine, partial, state)
        except OSError as error:
            self._without(str(error), last)
        if dist.get_rank() == 0:
            checkpoint.prune(self.folder, self._keeping.last, self._keeping.every)
        dist.barrier()

    def _has_room(self, last: bool) -> bool:
        """Whether the disk holds one checkpoint more, as the first rank sees it."""
        told = [self._lack_of_room() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(told, src=0)
        if told[0]:
            self._without(told[0], last)
        return told[0] is None

    def _without(self, why: str, last: bool) -> None:
        kept = checkpoint.complete_steps(self.folder)
        good = f"the last good one is {checkpoint.step_name(kept[-1])}" if kept else "there is none yet"
        if last:
            raise RunError(f"{why}; {good}; make room, and the same command goes on from there")
        if dist.get_rank() == 0:
            _log.error("%s; training goes on without this checkpoint; %s", why, good)

    def _lack_of_room(self) -> str | None:
        need = self.expected_bytes() * SPARE
        free = shutil.disk_usage(self.folder).free
        return (
            f"{self.folder} has {free / 1e9:.2f} GB free, a checkpoint needs {need / 1e9:.2f}" if free < need else None
        )

    def expected_bytes(self) -> float:
        """Size of a checkpoint: the last one's; else every parameter as it is trained, and 12 bytes if it learns."""
        if steps := checkpoint.complete_steps(self.folder):
            return checkpoint.num_bytes(self.folder / checkpoint.step_name(steps[-1]))
        total = 0.0
        for parameter in self._engine.module.parameters():
            count = getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3's parameters look empty
            total += count * (parameter.element_size() + 12 * parameter.requires_grad)
        return total
