"""Stopping on request: the signal handler only sets a flag; the step border agrees on it and acts."""

from __future__ import annotations

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopFlag:
    """Set by SIGTERM, SIGINT (Ctrl-C) or SIGUSR1 once `install` was called; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def install(self) -> StopFlag:
        """Take over the signals; call from the main thread."""
        for number in SIGNALS:
            signal.signal(number, self._set)
        return self

    @classmethod
    def of_process(cls) -> StopFlag:
        """The flag that this process's signals set already, or a new one that they set from now on."""
        own = getattr(signal.getsignal(signal.SIGUSR1), "__self__", None)
        return own if isinstance(own, cls) else cls().install()

    def ask(self, name: str) -> None:
        """Set the flag from another thread of this process; `name` tells who asked."""
        self.signal_name = name

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def _set(self, number: int, _: FrameType | None) -> None:
        if self.signal_name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
