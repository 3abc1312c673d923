"""DeepSpeed's checkpoint files, written while training goes on: a checkpoint engine of the interface it offers.

DeepSpeed hands every file of a checkpoint to `engine.checkpoint_engine.save(state, path)`. Its own asynchronous engine
(`checkpoint.writer.decoupled`) is no use here: it needs libaio, commits at the next optimizer step by waiting for the
disk there, and leaves files under names that nobody has verified. This one serializes to memory, so that the state is
that of the step border, and a thread writes, syncs and hashes; `files()` then says what lies on disk.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

PIECE = 1 << 24


def install(engine: Any) -> BackgroundWriter:
    """The writer of a DeepSpeed engine, put in the place of the one that it came with."""
    if not isinstance(engine.checkpoint_engine, BackgroundWriter):
        engine.checkpoint_engine = BackgroundWriter(engine.checkpoint_engine)
    return engine.checkpoint_engine


class BackgroundWriter:
    """See the module. All else that DeepSpeed asks of a checkpoint engine is answered by the one in `below`."""

    def __init__(self, below: Any) -> None:
        self._below = below
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: list[Future[dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._below, name)

    def save(self, state_dict: Any, path: str) -> None:
        """Serialize now, write later."""
        buffer = io.BytesIO()
        torch.save(state_dict, buffer)
        self._writing.append(self._pool.submit(write_file, Path(path), buffer))

    @property
    def is_writing(self) -> bool:
        """Whether any file is not on disk yet."""
        return not all(f.done() for f in self._writing)

    def files(self, root: Path) -> list[dict[str, Any]]:
        """Name below `root`, size and sha256 of every file written since the last call; waits for them.

        Raises the first error of writing (a full disk), after all have ended.
        """
        done, self._writing = self._writing, []
        errors = [error for f in done if (error := f.exception()) is not None]
        if errors:
            raise errors[0]
        return [{**f.result(), "name": str(Path(f.result()["name"]).relative_to(root))} for f in done]


def write_file(path: Path, buffer: io.BytesIO) -> dict[str, Any]:
    """Write and sync a file; its path, size and sha256, the latter of what was to be written."""
    digest, content = hashlib.sha256(), buffer.getbuffer()
    with path.open("wb") as file:
        for start in range(0, len(content), PIECE):
            piece = content[start : start + PIECE]
            file.write(piece)
            digest.update(piece)
        file.flush()
        os.fsync(file.fileno())
    return {"name": str(path), "size": len(content), "sha256": digest.hexdigest()}


def in_threads(work: Callable[[Any], Any], items: list[Any]) -> list[Any]:
    """`work` of every item, in a few threads: hashing and reading leave Python's lock."""
    with ThreadPoolExecutor(min(8, max(os.cpu_count() or 1, 1))) as pool:
        return list(pool.map(work, items))
