"""Ranks that start within a second: forked from a server that has imported once what every rank needs.

They are processes of their own as a launcher's are (own process groups, signals, exit codes); only the seconds of
imports are shared. Tests of the launcher and of the command line start theirs with `subprocess`.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import time
from collections.abc import Sequence
from multiprocessing import forkserver, get_context
from pathlib import Path
from typing import ClassVar
from unittest import mock

from cluster.local import RESUMABLE, free_port

HERE = Path(__file__).parent
GRACE_S = 30.0  # what the other ranks get to end by themselves once one has failed


def start_server(environment: dict[str, str]) -> None:
    """Start the server, if this process has none yet, in this environment: libraries read it while they load."""
    path = os.pathsep.join([environment["PYTHONPATH"], str(HERE)])
    with mock.patch.dict(os.environ, {**environment, "PYTHONPATH": path}, clear=True):
        forkserver.set_forkserver_preload(["warm_imports"])
        forkserver.ensure_running()


def end_all() -> None:
    """Kill every rank that is still there, also one whose test ended while it was being started."""
    for rank in Rank.started:
        rank.kill()


class Rank:
    """A forked process that runs `script`; its methods are those of `subprocess.Popen`."""

    started: ClassVar[list[Rank]] = []

    def __init__(self, script: Path, arguments: Sequence[str], env: dict[str, str], out: Path, err: Path) -> None:
        job = {"script": str(script), "arguments": list(arguments), "env": env, "out": str(out), "err": str(err)}
        self._out, self._err = out, err
        self._process = get_context("forkserver").Process(
            target=runpy.run_path, args=(str(HERE / "warm_rank.py"),), kwargs={"init_globals": {"JOB": job}}
        )
        self._process.start()
        Rank.started.append(self)

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, negative where a signal ended it; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self.returncode

    def kill(self) -> None:
        """SIGKILL, if it is alive."""
        self._process.kill()

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for the end; what was written to its output files."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired([], timeout)
        return self.told()

    def told(self) -> tuple[str, str]:
        """What its output files hold."""
        return tuple(p.read_text() if p.exists() else "" for p in (self._out, self._err))  # type: ignore[return-value]


def places(world: int) -> list[dict[str, str]]:
    """The environment variables of each rank of a job on this machine."""
    job = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    job["MASTER_PORT"] = str(free_port())
    return [{**job, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def run_job(ranks: Sequence[Rank], timeout_s: float) -> int | None:
    """Wait for all; once one has failed, the others are ended soon. The code of the job; None where time was up."""
    failed_at, end = None, time.monotonic() + timeout_s
    try:
        while None in (codes := [rank.poll() for rank in ranks]):
            now = time.monotonic()
            failed_at = failed_at or (now if any(code not in (None, 0, RESUMABLE) for code in codes) else None)
            if now > end:
                return None
            if failed_at and now > failed_at + GRACE_S:
                break
            time.sleep(0.05)
    finally:
        for rank in ranks:
            rank.kill()
    return max((code for code in codes if code is not None), key=lambda code: (code not in (0, RESUMABLE), abs(code)))
