"""Each rank's watchdog: a thread that tells the others of a failure, hears of theirs, and shows where a stall is.

A rank that waits in a collective for one that has failed cannot be told by the collective. So every rank has a thread
with a connection of its own to the job's TCP store: a failing rank posts its reason there, the others' threads see it
within seconds and end their process with the same code. The first rank is the one that says so on the terminal.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cluster.process import FAILED, Process

T = TypeVar("T")
POLL_S = 1.0
GRACE_S = 4.0  # what a rank's main thread gets to end by itself once another has failed
HEAR_S = 15.0  # how long the first rank, which holds the store, waits for the others to have heard
LEAVE_S = 20.0  # after which a failed process that has not ended by itself is ended
LOST_S = 60.0  # silence of a rank's thread after which its process counts as gone
PHASES = ("start", "data", "border", "forward and backward", "optimizer step", "validation", "log", "checkpoint")
_log = logging.getLogger(__name__)
QUIET = {"quiet": True}  # of a log entry: for the file only


class Unwatched:
    """The null watchdog: nobody is told anything."""

    def phase(self, name: str) -> None:
        """What this rank does from now on."""

    def border(self, step: int) -> None:
        """Step `step` is done on this rank."""

    def failed(self, error: BaseException, code: int, agreed: bool = False) -> int | None:
        """This rank's main thread ends with an error. The code of an earlier failure of another rank, or None.

        `agreed`: all ranks end with this error, and its text names the rank that it is of.
        """
        return None

    def close(self) -> None:
        """The job is done."""

    def first_decides(self, name: str, decide: Callable[[], Any], timeout_s: float) -> Any:
        """What `decide()` gives on the first rank, on every rank."""
        return decide()


@dataclass
class _Beat:
    """What rank `rank` last said, and when (this process's clock) it last said something new."""

    count: int = -1
    step: int = 0
    phase: str = PHASES[0]
    phase_s: float = 0.0
    heard: float = 0.0


class Watch(Unwatched):
    """The watchdog of one rank. `store` is a connection of its own to the job's store; `log` takes the stacks.

    After `stall_s` without a step border every rank writes its threads' stacks to `log` and the first rank names the
    slowest one; after `end_s` the job ends with code 1 (0: it goes on waiting).
    """

    def __init__(self, process: Process, store: Any, log: Path, stall_s: float = 600.0, end_s: float = 1800.0) -> None:
        self._process, self._store, self._log = process, store, log
        self._stall_s, self._end_s = stall_s, end_s
        self._beat = _Beat()
        self._phase_began = self._border = time.monotonic()
        self._peers = {r: _Beat(heard=time.monotonic()) for r in self._watched()}
        self._dumped, self._decisions, self._deciding = False, 0, False
        self._found: dict[str, Any] | None = None  # another rank's failure
        self._leaving, self._told = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def phase(self, name: str) -> None:
        """See Unwatched."""
        self._beat.phase, self._phase_began = name, time.monotonic()

    def border(self, step: int) -> None:
        """See Unwatched."""
        self._beat.step, self._border, self._dumped = step, time.monotonic(), False

    def failed(self, error: BaseException, code: int, agreed: bool = False) -> int | None:
        """See Unwatched. Posts the reason; the first rank then waits until the others have heard."""
        self._leaving.set()
        where = (
            f"in step {self._beat.step + 1} ({self._beat.phase})" if self._beat.phase != PHASES[0] else "at its start"
        )
        text = " ".join(str(error).split())
        reason = f": {text}" if code == 2 else f" failed {where}: {type(error).__name__}: {text}"
        reason = text if agreed else f"rank {self._process.rank}{reason}"
        found = self._found  # heard before: the rank that holds the store may have left since
        if found is None:
            try:
                found = self._post(reason, code)
                self._await_hearers()
            except RuntimeError:
                found = self._found
        if found is None:
            return None  # the store is gone: nobody can be told, and nobody has told us
        if self._process.world > 1:  # leaving a group whose peers hang can hang itself
            last = threading.Timer(LEAVE_S, lambda: os._exit(code))
            last.daemon = True
            last.start()
        if found["reason"] == reason:
            return None  # this rank's own failure, which it raises itself
        self._tell(found)
        return int(found["code"])

    def first_decides(self, name: str, decide: Callable[[], Any], timeout_s: float) -> Any:
        """See Unwatched. Needs no process group; what is decided travels as JSON, an error as a failure."""
        self._decisions += 1  # every rank asks in the same order
        self._deciding = True
        try:
            return self._decided(f"{name}/{self._decisions}", decide, timeout_s)
        finally:
            self._deciding = False

    def _decided(self, name: str, decide: Callable[[], Any], timeout_s: float) -> Any:
        if self._process.is_first:
            value = decide()
            self._store.set(f"decided/{name}", json.dumps(value))
            return value
        deadline = time.monotonic() + timeout_s
        while not self._store.check([f"decided/{name}"]):
            if time.monotonic() > deadline:
                raise RuntimeError(f"the first rank has not decided '{name}' in {timeout_s:.0f} s")
            time.sleep(0.1)
        return json.loads(self._store.get(f"decided/{name}"))

    def close(self) -> None:
        """See Unwatched. The first rank, which holds the store, leaves last."""
        self._leaving.set()
        self._thread.join(2 * POLL_S)
        try:
            if not self._process.is_first:
                self._store.add("watch/left", 1)
            else:
                self._wait_for(lambda: self._store.add("watch/left", 0) >= self._process.world - 1, HEAR_S)
        except RuntimeError:
            pass  # the others have gone already

    def _watched(self) -> list[int]:
        """The first rank listens to everyone, everyone to the first."""
        everyone = range(1, self._process.world)
        return list(everyone) if self._process.is_first else [0]

    def _post(self, reason: str, code: int, rank: int | None = None) -> dict[str, Any]:
        own = {"rank": self._process.rank if rank is None else rank, "reason": reason, "code": code}
        return json.loads(self._store.compare_set("watch/failure", "", json.dumps(own)))

    def _await_hearers(self) -> None:
        if self._process.is_first:
            self._wait_for(lambda: self._store.add("watch/heard", 0) >= self._process.world - 1, HEAR_S)
        else:
            self._store.add("watch/heard", 1)

    def _wait_for(self, done: Callable[[], bool], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not done() and time.monotonic() < deadline:
            time.sleep(0.1)

    def _tell(self, found: dict[str, Any]) -> None:
        """Once a process: why it ends. On the terminal by the first rank only."""
        if not self._told.acquire(blocking=False):
            return
        line = found["reason"]
        _log.error("%s; this rank ends with it", line, extra=QUIET)
        if self._process.is_first:
            print(f"dermfm train: {line}", file=sys.stderr, flush=True)

    def _watch(self) -> None:
        while not self._leaving.wait(POLL_S):
            try:
                self._say()
                if self._store.check(["watch/failure"]):
                    return self._end(json.loads(self._store.get("watch/failure")))
                self._listen()
            except RuntimeError as error:
                if self._leaving.wait(GRACE_S):
                    return None
                return self._end(
                    {
                        "rank": 0,
                        "reason": f"rank 0 is gone, its store does not answer ({_first_line(error)})",
                        "code": FAILED,
                    }
                )
            self._look_for_stall()
        return None

    def _say(self) -> None:
        beat = self._beat
        beat.count += 1
        told = [beat.count, beat.step, beat.phase, round(time.monotonic() - self._phase_began, 1)]
        self._store.set(f"watch/beat/{self._process.rank}", json.dumps(told))

    def _listen(self) -> None:
        now = time.monotonic()
        for rank, peer in self._peers.items():
            name = f"watch/beat/{rank}"
            if self._beat.count % 5 == 0 and self._store.check([name]):
                count, peer.step, peer.phase, peer.phase_s = json.loads(self._store.get(name))
                if count != peer.count:
                    peer.count, peer.heard = count, now
            if now - peer.heard > LOST_S and peer.count >= 0:
                last = f"last in step {peer.step + 1} ({peer.phase})"
                self._post(f"rank {rank} is gone: no sign of life for {LOST_S:.0f} s, {last}", FAILED, rank)

    def _look_for_stall(self) -> None:
        if self._deciding:  # hashing and converting a checkpoint has a time limit of its own
            self._border = time.monotonic()
        age = time.monotonic() - self._border
        if age > self._stall_s and not self._dumped:
            self._dumped = True
            self._dump(age)
        if self._end_s and age > self._end_s and self._process.is_first:
            rank, beat = self._slowest()
            place = f"in step {beat.step + 1} ({beat.phase})"
            text = f"rank {rank} is the slowest of a job without a step border for {age:.0f} s: {place}"
            self._post(text, FAILED, rank)

    def _dump(self, age: float) -> None:
        _log.warning("no step border for %.0f s; the stacks of all threads follow in %s", age, self._log, extra=QUIET)
        with self._log.open("a") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        if self._process.is_first:
            rank, beat = self._slowest()
            _log.warning(
                "no step border for %.0f s; the slowest is rank %d, in step %d (%s for %.0f s); all ranks' stacks: %s",
                age, rank, beat.step + 1, beat.phase, beat.phase_s, self._log.parent,
            )  # fmt: skip

    def _slowest(self) -> tuple[int, _Beat]:
        """The rank that is least far; among equals the one that has been longest in its phase."""
        own = self._beat
        own.phase_s = time.monotonic() - self._phase_began
        beats = {self._process.rank: own, **self._peers}
        rank = min(beats, key=lambda r: (beats[r].step, _place(beats[r].phase), -beats[r].phase_s))
        return rank, beats[rank]

    def _end(self, found: dict[str, Any]) -> None:
        """Another rank has failed: tell, let the main thread go by itself for a while, then end this process."""
        self._found = found
        with contextlib.suppress(RuntimeError):
            self._await_hearers()
        if self._leaving.wait(GRACE_S):
            return  # the main thread is on its way out and has seen the same failure
        self._tell(found)
        logging.shutdown()
        sys.stdout.flush()
        os._exit(int(found["code"]))


def _place(phase: str) -> int:
    return PHASES.index(phase) if phase in PHASES else len(PHASES)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
