"""A rank of the failure tests: one training job through `run_rank`, with a fault of its own.

Arguments: a JSON file of the configuration, a fault, and the rank and step that it strikes in. The faults: `raise` (an
error in the step), `loader` (the loader's data are broken), `stall` (the rank sleeps in the step), `kill-<place>`
(SIGKILL at a named place of saving a checkpoint).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import dermfm.checkpoint
import dermfm.train
import dermfm.writer
from cluster import watchdog
from cluster.process import from_environment
from dermfm.config import from_dict
from dermfm.plan import TrainConfig
from dermfm.rank import run_rank
from launch.cli import is_first_rank
from shards.manifest import ShardError

# Where a checkpoint can be cut: the module, the function, and whether it strikes before or after it.
PLACES: dict[str, tuple[Any, str, bool]] = {
    "before-writing": (dermfm.checkpoint, "begin", True),
    "while-writing": (dermfm.writer, "write_file", True),
    "before-commit": (dermfm.checkpoint, "_commit", True),
    "before-latest": (dermfm.checkpoint, "_sync_folder", False),
    "before-pruning": (dermfm.checkpoint, "prune", True),
}


def now() -> None:
    """The end that no handler sees."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(place: str, times: int) -> None:
    """Die in the `times`-th call of the function that the place names."""
    module, name, before = PLACES[place]
    plain = getattr(module, name)
    calls = 0

    def struck(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if before and calls == times:
            half_write(place, arguments)
            now()
        value = plain(*arguments)
        if calls == times:
            now()
        return value

    setattr(module, name, struck)


def half_write(place: str, arguments: tuple[Any, ...]) -> None:
    """What a writer that dies in its work leaves: half a file."""
    if place == "while-writing":
        path, buffer = arguments
        path.write_bytes(bytes(buffer.getbuffer()[:100]))


def strike(fault: str, step: int) -> None:
    """Put the fault into this rank."""
    plain, fetch = dermfm.train.optimizer_step, dermfm.train.Feed.fetch
    count = {"step": 0, "fetch": 0}

    def stepped(*arguments: Any) -> Any:
        count["step"] += 1
        if count["step"] == step:
            Path(sys.argv[1]).with_suffix(".struck").write_text(str(time.time()))
            if fault == "raise":
                raise RuntimeError("made to fail")
            time.sleep(600)
        return plain(*arguments)

    def fetched(feed: Any) -> None:
        fetch(feed)
        count["fetch"] += 1
        if count["fetch"] == step:
            feed.error = ShardError("train-00000.tar: sample r007 is not what its index says")

    if fault == "loader":
        dermfm.train.Feed.fetch = fetched  # type: ignore[method-assign]
    else:
        dermfm.train.optimizer_step = stepped


def main() -> int:
    """Run the rank."""
    config, fault, rank, step = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    process = from_environment("cpu")
    watchdog.POLL_S = 0.2
    if process.rank == rank and fault.startswith("kill-"):
        kill_at(fault.removeprefix("kill-"), step)
    elif process.rank == rank and fault != "none":
        strike(fault, step)
    try:
        return run_rank(from_dict(TrainConfig, json.loads(Path(config).read_text()), config), process)
    except ValueError as error:  # as the command line does
        if is_first_rank():
            print(f"dermfm train: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
