"""What a run tells: TensorBoard scalars, `metrics.jsonl` with the same, one terminal line a log step."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
from torch.utils.tensorboard import SummaryWriter

from dermfm.progress import duration

JSONL = "metrics.jsonl"
_log = logging.getLogger(__name__)


class MetricsLog:
    """Writes rows of scalars on the first rank; on the others every call does nothing.

    `start_step` is the checkpoint's step on resume: later rows of a stopped run are cut off both outputs, so that no
    step appears twice.
    """

    def __init__(self, run: Path, start_step: int, active: bool) -> None:
        self._file: Any = None
        if not active:
            return
        keep_rows(run / JSONL, start_step)
        self._file = (run / JSONL).open("a")
        self._board = SummaryWriter(str(run / "tb"), purge_step=start_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One row: scalars of a step."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **{k: _finite(v) for k, v in values.items()}}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close both outputs."""
        if self._file is not None:
            self._file.close()
            self._board.close()


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line cut short by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            _log.warning("%s: a broken line is left out", path)
    return rows


def keep_rows(path: Path, last_step: int) -> None:
    """Cut rows after `last_step` off a metrics.jsonl, in one step."""
    if not path.is_file():
        return
    kept = [r for r in read_rows(path) if r["step"] <= last_step]
    partial = path.with_name(path.name + ".tmp")
    partial.write_text("".join(json.dumps(r) + "\n" for r in kept))
    partial.replace(path)


class Speed:
    """Time and samples between two log lines: speed, share of time waiting for data, memory, time left."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start a new interval."""
        self._began, self._waited, self._samples, self._steps = time.monotonic(), 0.0, 0, 0

    def add(self, num_samples: int, waited_s: float) -> None:
        """Count one step."""
        self._samples += num_samples
        self._waited += waited_s
        self._steps += 1

    def values(self) -> dict[str, float]:
        """samples_per_s of the whole job, step_s, data_wait (share of time), memory_gb of this process."""
        spent = max(time.monotonic() - self._began, 1e-9)
        return {
            "samples_per_s": self._samples / spent,
            "step_s": spent / max(self._steps, 1),
            "data_wait": self._waited / spent,
            "memory_gb": psutil.Process().memory_info().rss / 1e9,
        }


def line(step: int, total_steps: int, values: Mapping[str, float]) -> str:
    """The terminal line of a log step."""
    left = duration((total_steps - step) * values["step_s"])
    parts = " ".join(f"{k.removeprefix('loss/')} {v:.3f}" for k, v in values.items() if k.startswith("loss/"))
    return (
        f"step {step}/{total_steps} loss {values['loss']:.4f} ({parts}) lr {values['lr']:.2e} "
        f"norm {values['grad_norm']:.2f} {values['samples_per_s']:.1f} samples/s wait {values['data_wait']:.1%} "
        f"{values['memory_gb']:.1f} GB ETA {left}"
    )
