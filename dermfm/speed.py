"""How fast a run is and which rank holds it up: measured between two log steps."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist


class Forwards:
    """Seconds that this rank's device spends in the model's forward passes of one step.

    In a synchronous job every rank's step takes equally long; what differs is the part without collectives.
    """

    def __init__(self, module: Any) -> None:
        self._on_cuda = next(module.parameters()).is_cuda
        self._marks: list[Any] = []
        module.register_forward_pre_hook(lambda *_: self._mark())
        module.register_forward_hook(lambda *_: self._mark())
        self.active = False

    def _mark(self) -> None:
        if not self.active:
            return
        if self._on_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.monotonic())

    def seconds(self) -> float:
        """The sum since the last call."""
        marks, self._marks = self._marks, []
        pairs = list(zip(marks[::2], marks[1::2], strict=False))
        if self._on_cuda:
            torch.cuda.synchronize()
            return sum(a.elapsed_time(b) for a, b in pairs) / 1e3
        return sum(b - a for a, b in pairs)


class Speed:
    """Time and samples between two log lines: speed, share of time waiting for data, memory, utilization."""

    def __init__(
        self, flops_per_sample: float = 0.0, peak_tflops: float = 0.0, forwards: Forwards | None = None
    ) -> None:
        self._flops, self._peak, self._forwards = flops_per_sample, peak_tflops, forwards
        self.reset()

    def reset(self) -> None:
        """Start a new interval."""
        self._began = self._last = time.monotonic()
        self._waited, self._samples = 0.0, 0
        self._steps: list[float] = []

    def next_is_logged(self, logged: bool) -> None:
        """Whether the coming step ends in a log line: only then its forward passes are timed."""
        if self._forwards is not None:
            self._forwards.active = logged

    def add(self, num_samples: int, waited_s: float) -> None:
        """Count one step of `num_samples` over all ranks, of which this rank waited `waited_s` for its data."""
        now = time.monotonic()
        self._steps.append(now - self._last)
        self._last = now
        self._samples += num_samples
        self._waited += waited_s

    def values(self) -> dict[str, float]:
        """Scalars of the interval, the same on every rank. Collective where there is a group of more than one.

        samples_per_s of the job and of one process, step_s (mean, median, 95 %), data_wait (share of time, mean over
        ranks), memory_gb (host) and device_memory_gb (the most of any rank), slowest_rank and how many seconds more it
        needs for data and forward passes than the median rank, mfu where the device's peak is known.
        """
        spent = max(time.monotonic() - self._began, 1e-9)
        steps = self._steps or [spent]
        own = [self._waited / spent, psutil.Process().memory_info().rss / 1e9, *self._own_work(), _device_gb()]
        ranks = _all_ranks(own)
        busy = ranks[:, 2]
        rate = self._samples / spent
        told = {
            "samples_per_s": rate,
            "samples_per_s_per_gpu": rate / len(ranks),
            "step_s": spent / len(steps),
            "step_s_p50": float(np.median(steps)),
            "step_s_p95": float(np.quantile(steps, 0.95)),
            "data_wait": float(ranks[:, 0].mean()),
            "memory_gb": float(ranks[:, 1].max()),
            "slowest_rank": float(busy.argmax()),
            "slowest_lag_s": float(busy.max() - np.median(busy)),
        }
        if ranks[:, 3].max() > 0:
            told["device_memory_gb"] = float(ranks[:, 3].max())
        if self._peak:
            told["mfu"] = rate / len(ranks) * self._flops / (self._peak * 1e12)
        return told

    def _own_work(self) -> list[float]:
        forward = self._forwards.seconds() if self._forwards is not None else 0.0
        return [self._waited / max(len(self._steps), 1) + forward]


def _device_gb() -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0


def _all_ranks(own: list[float]) -> np.ndarray:
    """[world, len(own)]."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return np.array([own])
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    parts = [torch.zeros(len(own), dtype=torch.float64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, torch.tensor(own, dtype=torch.float64, device=device))
    return torch.stack(parts).cpu().numpy()


class Laps:
    """Seconds of starting, by phase, from the launcher's start (DERMFM_STARTED, in Unix time) or the process's."""

    def __init__(self) -> None:
        born = psutil.Process().create_time()
        started = float(os.environ.get("DERMFM_STARTED") or born)
        self._last = max(born, started)  # a worker that waited for work was born before it was launched
        self._laps = {"launch": self._last - started}
        self.lap("imports")

    def lap(self, name: str) -> None:
        """What came since the last lap was `name`, or more of it."""
        now = time.time()
        self._laps[name] = self._laps.get(name, 0.0) + now - self._last
        self._last = now

    def __str__(self) -> str:
        total = sum(self._laps.values())
        parts = ", ".join(f"{name} {s:.1f}" for name, s in self._laps.items())
        return f"started in {total:.1f} s, {total - self._laps['imports']:.1f} of them beyond imports: {parts}"
