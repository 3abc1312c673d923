"""How fast notes are made: notes/s, tokens/s and ETA on the terminal, the same in TensorBoard (<out>/tb)."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dermfm.progress import Meter

WRITE_EVERY_S = 5.0


class Pace:
    """Counts finished rows; used as a context manager. `done` were there before, of `total` in the whole folder."""

    def __init__(self, out: str, total: int, done: int) -> None:
        self.folder = Path(out) / "tb"
        self.meter = Meter(total, "notes", "notes", start=done)
        self.made = self.tokens = self.errors = 0
        self.sources: Counter[str] = Counter()
        self._board: Any = None
        self._began = self._last = time.monotonic()
        self._last_made = self._last_tokens = 0

    def __enter__(self) -> Pace:
        self.meter.__enter__()
        return self

    def advance(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Count rows of the store's schema."""
        for row in rows:
            self.tokens += row["num_tokens"]
            self.errors += row["error"] is not None
            self.sources[row["source"]] += 1
        self.made += len(rows)
        self.meter.told = f"{self.tokens / max(time.monotonic() - self._began, 1e-9):.0f} tokens/s"
        self.meter.advance(len(rows))
        if time.monotonic() - self._last >= WRITE_EVERY_S:
            self.write()

    def write(self) -> None:
        """One step of every scalar, at the number of notes in the folder; rates are those since the step before."""
        seconds = max(time.monotonic() - self._last, 1e-9)
        rate = (self.made - self._last_made) / seconds
        values = {"notes_per_s": rate, "tokens_per_s": (self.tokens - self._last_tokens) / seconds}
        if rate:
            values["eta_s"] = (self.meter.total - self.meter.done) / rate
        values["errors"] = float(self.errors)
        values |= {f"share/{source}": count / max(self.made, 1) for source, count in self.sources.items()}
        with contextlib.suppress(OSError):  # a full disk is told where a part is written
            for name, value in values.items():
                self._writer().add_scalar(f"notes/{name}", value, self.meter.done)
        self._last, self._last_made, self._last_tokens = time.monotonic(), self.made, self.tokens

    def __exit__(self, *_: object) -> None:
        self.meter.__exit__()
        if self._board is None and self.made == 0:
            return
        if self.made > self._last_made:
            self.write()
        with contextlib.suppress(OSError):
            self._writer().close()

    def _writer(self) -> Any:
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            _keep_full_disks_quiet()
            self._board = SummaryWriter(str(self.folder))
        return self._board


@functools.cache
def _keep_full_disks_quiet() -> None:
    """Let the thread that writes TensorBoard's files end without a traceback where a disk is full."""
    before = threading.excepthook

    def hook(failed: threading.ExceptHookArgs) -> None:
        if not (isinstance(failed.exc_value, OSError) and type(failed.thread).__name__ == "_AsyncWriterThread"):
            before(failed)

    threading.excepthook = hook
