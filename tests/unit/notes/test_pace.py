"""What the job tells while it runs."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from dermfm.notes.pace import _keep_full_disks_quiet


class _AsyncWriterThread:
    """Named as TensorBoard's own thread that writes its files."""


@pytest.mark.parametrize(
    ("thread", "error", "told"),
    [
        (_AsyncWriterThread(), OSError(28, "No space left on device"), False),
        (_AsyncWriterThread(), ValueError("a mistake"), True),
        (threading.current_thread(), OSError(28, "No space left on device"), True),
    ],
)
def test_only_tensorboards_thread_is_silent_about_a_full_disk(monkeypatch, thread, error, told):
    seen: list[object] = []
    monkeypatch.setattr(threading, "excepthook", seen.append)
    _keep_full_disks_quiet()
    failed = SimpleNamespace(exc_value=error, thread=thread)
    threading.excepthook(failed)
    assert seen == ([failed] if told else [])
