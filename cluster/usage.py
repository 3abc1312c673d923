"""What a process and all that descend from it use: proportional memory, sampled while a block runs."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil

INTERVAL_S = 1.0


class PeakMemory:
    """Largest memory of this process and its descendants together while the `with` block runs, in bytes.

    Counts proportional set size, so that pages which processes share count once; sampled once a second.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        me = psutil.Process()
        while not self._done.wait(INTERVAL_S):
            self.peak = max(self.peak, sum(map(_memory, [me, *me.children(recursive=True)])))


def _memory(process: psutil.Process) -> int:
    try:
        full = process.memory_full_info()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0  # it ended meanwhile
    return int(getattr(full, "pss", full.rss))
