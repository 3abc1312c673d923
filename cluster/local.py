"""Start the ranks of a job as processes of this machine: for one node without a scheduler."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

import psutil

from cluster.process import RESUMABLE

GRACE_S = 30.0  # how long the others may take to end once one has failed
POLL_S = 0.1
PR_SET_PDEATHSIG = 1


def run_ranks(command: Sequence[str], num_ranks: int) -> int:
    """Run `command` as `num_ranks` processes with RANK, WORLD_SIZE, … set; returns the job's exit code.

    Signals are forwarded. Once a rank fails the others are ended within 30 seconds. The code is that of the first rank
    that failed, else 75 if any stopped resumably, else 0. A rank that a forwarded signal ends before it has taken the
    signal over (it was starting) has stopped resumably.
    """
    env = {
        **os.environ,
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "DERMFM_STARTED": os.environ.get("DERMFM_STARTED") or str(psutil.Process().create_time()),
    }
    ranks: list[subprocess.Popen] = []
    sent: set[int] = set()
    # A terminal sends Ctrl-C to its whole process group: own sessions make the forwarding below the only source.
    handlers = {
        s: signal.signal(s, lambda n, _: _send(ranks, n, sent)) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    }
    try:
        for rank in range(num_ranks):
            own = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen(command, env=own, start_new_session=True, preexec_fn=_end_with_parent))
        return _wait(ranks, sent)
    finally:
        _end(ranks)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _end_with_parent() -> None:
    """Ask the kernel to send SIGTERM to this process when its parent dies, however it dies (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _send(ranks: Sequence[subprocess.Popen], number: int, sent: set[int]) -> None:
    sent.add(number)
    for process in ranks:
        if process.poll() is None:
            process.send_signal(number)


def _wait(ranks: Sequence[subprocess.Popen], sent: set[int]) -> int:
    failed: int | None = None
    since = 0.0
    while None in [process.poll() for process in ranks]:  # every one: an end that is not asked for is not seen
        if failed is None:
            failed, since = _failure(ranks), time.monotonic()
        elif time.monotonic() - since > GRACE_S:
            print("a rank has failed; ending the others", file=sys.stderr)
            break
        time.sleep(POLL_S)
    if failed is None:
        failed = _failure(ranks)
    if failed is None:
        return RESUMABLE if any(process.returncode == RESUMABLE for process in ranks) else 0
    if -failed in sent:
        return RESUMABLE
    return failed if failed > 0 else 1


def _failure(ranks: Sequence[subprocess.Popen]) -> int | None:
    """The exit code of a rank that has ended neither done nor stopped; negative where a signal ended it."""
    return next((p.returncode for p in ranks if p.returncode not in (None, 0, RESUMABLE)), None)


def _end(ranks: Sequence[subprocess.Popen]) -> None:
    for process in ranks:
        if process.poll() is None:
            process.kill()
    for process in ranks:
        process.wait()
