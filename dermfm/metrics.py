"""What a run tells: TensorBoard scalars, `metrics.jsonl` with the same, one terminal line a log step."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dermfm.progress import duration
from shards.files import write_text

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
        from torch.utils.tensorboard import SummaryWriter  # `dermfm status` reads rows without waiting for torch

        self._board = SummaryWriter(str(run / "tb"), purge_step=start_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One row: scalars of a step."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **{k: _finite(v) for k, v in values.items()}}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def picture(self, step: int, name: str, pixels: np.ndarray, text: str) -> None:
        """An image, uint8 [H, W, 3], and the text that belongs to it; TensorBoard only."""
        if self._file is not None:
            self._board.add_image(name, pixels, step, dataformats="HWC")
            self._board.add_text(name, text, step)

    def summary(self, config: Mapping[str, Any], values: Mapping[str, float]) -> None:
        """Hyperparameters (nested) beside the run's last metrics, for TensorBoard's comparison of runs."""
        if self._file is None:
            return
        told = {k: v if isinstance(v, bool | int | float | str) else json.dumps(v) for k, v in flat(config).items()}
        final = {f"final/{k}": v for k, v in values.items() if math.isfinite(v)}
        self._board.add_hparams(told, final, run_name=".")

    def close(self) -> None:
        """Flush and close both outputs."""
        if self._file is not None:
            self._file.close()
            self._board.close()


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


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
    write_text(path, "".join(json.dumps(r) + "\n" for r in kept))


def line(step: int, total_steps: int, values: Mapping[str, float]) -> str:
    """The terminal line of a log step."""
    left = duration((total_steps - step) * values["step_s"])
    parts = " ".join(f"{k.removeprefix('loss/')} {v:.3f}" for k, v in values.items() if k.startswith("loss/"))
    mfu = f"MFU {values['mfu']:.1%} " if "mfu" in values else ""
    device = f"+{values['device_memory_gb']:.1f}" if "device_memory_gb" in values else ""
    return (
        f"step {step}/{total_steps} loss {values['loss']:.4f} ({parts}) lr {values['lr']:.2e} "
        f"norm {values['grad_norm']:.2f} {values['samples_per_s']:.1f} samples/s {mfu}wait {values['data_wait']:.1%} "
        f"{values['memory_gb']:.1f}{device} GB ETA {left}"
    )
