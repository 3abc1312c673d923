"""Progress of long work: a bar on a terminal, a plain line with ETA every few seconds otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")
LINE_INTERVAL_S = 10.0


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def track(items: Iterable[T], total: int, what: str, unit: str = "", start: int = 0) -> Iterator[T]:
    """Yield `items` while reporting progress. `total` counts all of them, `start` those done by an earlier run."""
    meter = Meter(total, what, unit, start)
    with meter:
        for item in items:
            yield item
            meter.advance(1)


class Meter:
    """Progress of `total` units; `advance(n)` as they are done. Used as a context manager."""

    def __init__(self, total: int, what: str, unit: str = "", start: int = 0) -> None:
        self.total, self.what, self.unit, self.done, self.start = total, what, unit, start, start
        self.told = ""  # more to say beside the count, a rate for example
        self._bar: Progress | None = None
        self._began = self._last = time.monotonic()

    def __enter__(self) -> Meter:
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            told = TextColumn("{task.fields[told]}")
            self._bar = Progress(*columns, TimeRemainingColumn(), told, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(self.what, total=self.total, completed=self.start, told="")
        return self

    def advance(self, count: int = 1) -> None:
        """Count `count` more units as done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, told=self.told)
        elif time.monotonic() - self._last >= LINE_INTERVAL_S:
            self._last = time.monotonic()
            print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        """One plain line: what, done/total, rate, ETA."""
        rate = (self.done - self.start) / max(time.monotonic() - self._began, 1e-9)
        eta = duration((self.total - self.done) / rate) if rate > 0 else "?"
        told = f" {self.told}" if self.told else ""
        return f"{self.what}: {self.done}/{self.total} {self.unit} {rate:.1f}/s ETA {eta}{told}".replace("  ", " ")

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
