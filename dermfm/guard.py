"""Guards of a run: losses and gradients that are not finite, and losses that leap."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dermfm import checkpoint
from dermfm.border import RunError
from dermfm.gradients import Gradients, Update
from dermfm.samples import Batch

WINDOW, ENOUGH = 64, 16  # losses that a leap is measured against, and how many of them there must be
NAMED = 4
_log = logging.getLogger(__name__)


class Guard:
    """Takes the optimizer step where everything is finite; stops or skips (at most `max_skips` steps) where it is not.

    `meter` is the part of the run's state that it keeps; `reads_text`: the run's objectives read notes. Every rank
    calls it, with losses that are sums over all ranks.
    """

    def __init__(
        self,
        gradients: Gradients,
        policy: str,
        max_skips: int,
        skips_alone: bool,
        meter: dict[str, Any],
        reads_text: bool = True,
    ) -> None:
        self._reads_text = reads_text
        self._gradients, self._policy, self._max_skips = gradients, policy, max_skips
        self._skips_alone = skips_alone  # fp16 skips a step by itself to find its loss scale
        self._meter = meter
        meter.setdefault("skipped", 0)

    def update(self, engine: Any, step: int, values: dict[str, float], batch: Batch, micro_batch: int) -> Update:
        """The optimizer step. RunError on every rank, naming records, where it must not go on. Collective."""
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        update = self._gradients.step(discard=bool(bad))
        if not bad and not update.applied and not self._skips_alone:
            bad = ["the gradient norm"]
        if bad:
            records = culprits(engine, batch, micro_batch, self._reads_text)
            self._deal_with(f"step {step}: {', '.join(bad)} is not finite", records)
        return update

    def _deal_with(self, what: str, records: str) -> None:
        if self._policy == "stop":
            raise RunError(f"{what}; {records}; on_nonfinite=skip passes over such steps")
        self._meter["skipped"] += 1
        if self._meter["skipped"] > self._max_skips:
            raise RunError(f"{what}; {records}; {self._max_skips} steps were skipped before (max_skips)")
        if dist.get_rank() == 0:
            _log.warning(
                "%s; %s; the step is skipped (%d of %d)", what, records, self._meter["skipped"], self._max_skips
            )


@torch.no_grad()
def culprits(engine: Any, batch: Batch, micro_batch: int, reads_text: bool = True) -> str:
    """The records of all ranks whose embeddings are not finite, as a phrase. Collective."""
    own: list[str] = []
    for start in range(0, len(batch), micro_batch):
        rows = slice(start, start + micro_batch)
        image = engine("image", pixels=batch.pixels[rows])["embedding"]
        fine = torch.isfinite(image).all(1)
        if reads_text:
            text = engine("text", tokens=batch.tokens[rows], lengths=batch.lengths[rows])["embedding"]
            fine &= torch.isfinite(text).all(1)
        own += [r for r, ok in zip(batch.record_ids[rows], fine.tolist(), strict=True) if not ok]
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, (own, batch.record_ids[:NAMED]))
    bad = [record for found, _ in told for record in found]
    if bad:
        return f"{len(bad)} records have embeddings that are not finite: {_shown(bad)}"
    return f"no record's embedding alone is; the step's records: {_shown([r for _, some in told for r in some])}"


def _shown(records: Sequence[str]) -> str:
    return ", ".join(records[:NAMED]) + (", …" if len(records) > NAMED else "")


class Spikes:
    """Losses far above the last ones: a leap is told, and the checkpoint before it is kept for good.

    A leap is a loss over the median of the last 64 by more than `factor` times their median absolute deviation.
    """

    def __init__(self, folder: Path, factor: float, batch: int, meter: dict[str, Any]) -> None:
        self._folder, self._factor, self._batch = folder, factor, batch
        self._losses: list[float] = meter.setdefault("losses", [])

    def look(self, step: int, samples_seen: int, loss: float) -> None:
        """Judge the loss of a step that ended at `samples_seen`; every rank judges alike, the first one acts."""
        if not math.isfinite(loss):
            return
        if self._factor and len(self._losses) >= ENOUGH and self._leaps(loss) and dist.get_rank() == 0:
            self._tell(step, samples_seen, loss)
        self._losses.append(loss)
        del self._losses[:-WINDOW]

    def _leaps(self, loss: float) -> bool:
        middle = statistics.median(self._losses)
        spread = statistics.median(abs(x - middle) for x in self._losses)
        return loss > middle + self._factor * max(spread, 1e-3 * abs(middle))

    def _tell(self, step: int, samples_seen: int, loss: float) -> None:
        found = [s for s in checkpoint.complete_steps(self._folder) if s < step]
        text = f"step {step}: loss {loss:.4g} leaps over the last ones ({statistics.median(self._losses):.4g})"
        if not found:
            _log.warning("%s; no checkpoint lies before it", text)
            return
        before = self._folder / checkpoint.step_name(found[-1])
        checkpoint.keep(before, text)
        _log.warning(
            "%s; %s is kept; resume=%s skip_samples=[%d,%d] passes over this step",
            text, before.name, before, samples_seen - self._batch, samples_seen,
        )  # fmt: skip
