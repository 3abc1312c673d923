"""A torch profiler trace of some steps, for chrome://tracing, Perfetto or TensorBoard's profiler."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

_log = logging.getLogger(__name__)


class Tracer:
    """Traces the steps [first, end) of the first rank into <run>/profile/; without `steps` it does nothing."""

    def __init__(self, run: Path, steps: Sequence[int], active: bool) -> None:
        self._run = run
        self._first, self._end = steps if steps and active else (-1, -1)
        self._profiler: Any = None

    def before(self, step: int) -> None:
        """Step `step` begins."""
        if self._profiler is not None and step >= self._end:
            self.close()
        if self._profiler is None and self._first <= step < self._end:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                kinds.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=kinds, record_shapes=True)
            self._profiler.start()
            self._first = step

    def close(self) -> None:
        """Write the trace, if one is being made."""
        if self._profiler is None:
            return
        self._profiler.stop()
        path = self._run / "profile" / f"steps-{self._first}-{self._end}.json"
        path.parent.mkdir(exist_ok=True)
        self._profiler.export_chrome_trace(str(path))
        self._profiler = None
        self._first = self._end = -1
        _log.info("a trace is in %s", path)
