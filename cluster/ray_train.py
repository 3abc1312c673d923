"""Ranks on Ray: Ray Train (V2) starts them, gives them a process group, and starts them anew where one is lost.

The driver holds a board, an actor on its own node: what the ranks print comes over it to the driver's terminal, a stop
that the driver is asked for goes over it to the ranks, and a verdict is put up there where to start again cannot help.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from cluster.preemption import SIGNALS, StopFlag
from cluster.process import DONE, FAILED, GROUP_TIMEOUT_S, RESUMABLE, Process, from_environment
from cluster.ray import RayError

POLL_S = 0.5
END_S = 60.0  # how long Ray may take to end the ranks once the run's end is known
# Ray Train's own prints and log files, which say nothing that the run's log does not; and its move of the ranks into a
# folder of its own, in which a configuration's relative paths would mean something else.
QUIET = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}
Verdict = Callable[[int], None]
Main = Callable[[Process, StopFlag, Verdict], int]


@dataclass(frozen=True)
class Ranks:
    """What is asked of Ray: how many ranks (least and most), the resources of one, how often to start them anew."""

    least: int
    most: int
    cpus: float
    gpus: float
    max_failures: int

    @property
    def bundle(self) -> dict[str, float]:
        """The resources of one rank as Ray spells them."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}


class Board:
    """What driver and ranks tell each other; a Ray actor."""

    def __init__(self) -> None:
        self._said: list[tuple[str, str]] = []
        self._stop: str | None = None
        self._code: int | None = None
        self._worlds: list[int] = []

    def begin(self, is_first: bool, world: int) -> int | None:
        """A rank of `world` starts; the run's exit code where that is settled."""
        self._worlds += [world] * is_first
        return self._code

    def exchange(self, said: Sequence[tuple[str, str]]) -> str | None:
        """Put up what a rank has printed, (stream, text); the name of the signal by which the run is to stop."""
        self._said += said
        return self._stop

    def settle(self, code: int) -> None:
        """The run's exit code; the first that failed stays."""
        if self._code in (None, DONE, RESUMABLE):
            self._code = max(code, self._code or DONE) if code in (DONE, RESUMABLE) else code

    def stop(self, name: str) -> None:
        """The driver was told to stop by this signal."""
        self._stop = name

    def take(self) -> tuple[list[tuple[str, str]], int | None, list[int]]:
        """For the driver: what was printed since the last call, the settled exit code, and the ranks of each start."""
        said, self._said = self._said, []
        return said, self._code, self._worlds


def run_on_ray(main: Main, ranks: Ranks, storage: Path) -> int:
    """Run `main(process, stop, verdict)` as ranks of a Ray Train job on the connected cluster; the job's exit code.

    `main` returns 0, or 75 where it has stopped with a checkpoint. What it raises, and a worker that is lost, makes Ray
    start all ranks anew, `max_failures` times; they go on from their own checkpoint. `verdict(code)` ends the run with
    that code instead. SIGTERM, SIGUSR1 and Ctrl-C set `stop` on every rank. `storage` is for Ray's own notes, seen by
    all nodes, and is removed at the end. Raises RayError where no node has the resources of a rank.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    check_room(ranks)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(Board)
    board = actor.options(num_cpus=0, scheduling_strategy=here).remote()
    ended: list[BaseException | None] = []
    fit = threading.Thread(target=_fit, args=(main, ranks, storage, board, ended), daemon=True)
    with _stops(board), _environment(QUIET):
        fit.start()
        try:
            code = _follow(board, fit)
        finally:
            shutil.rmtree(storage, ignore_errors=True)
    if code is not None:
        return code
    _tell_end(ended, len(ray.get(board.take.remote())[2]))
    return FAILED


def check_room(ranks: Ranks) -> None:
    """RayError where no node of the connected cluster could ever hold one rank."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(node.get(name, 0.0) >= need for name, need in ranks.bundle.items()) for node in nodes):
        most = max((f"{n.get('CPU', 0):g} CPUs and {n.get('GPU', 0):g} GPUs" for n in nodes), default="no nodes")
        raise RayError(f"a rank needs {ranks.cpus:g} CPUs and {ranks.gpus:g} GPUs; no node has them ({most})")


def check_all_fit(ranks: Ranks) -> None:
    """RayError where the connected cluster, one that does not grow, cannot hold the least number of ranks at once."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(min(int(node.get(name, 0.0) / need + 1e-9) for name, need in ranks.bundle.items()) for node in nodes)
    if room < ranks.least:
        raise RayError(
            f"{ranks.least} ranks of {ranks.cpus:g} CPUs and {ranks.gpus:g} GPUs are asked for, this machine holds "
            f"{room}; give fewer ray.workers, less to each (ray.cpus, ray.gpus), or a cluster (ray.address)"
        )


def has_gpus() -> bool:
    """Whether the connected cluster has GPUs."""
    import ray

    return ray.cluster_resources().get("GPU", 0) > 0


def _fit(main: Main, ranks: Ranks, storage: Path, board: Any, ended: list[BaseException | None]) -> None:
    """Ray Train's own run to its end, in a thread: in the main one it would take Ctrl-C for itself."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    workers = ranks.most if ranks.least == ranks.most else (ranks.least, ranks.most)
    try:
        TorchTrainer(
            _rank,
            train_loop_config={"main": main, "board": board, "folder": os.getcwd()},
            torch_config=TorchConfig(backend="nccl" if ranks.gpus else "gloo", timeout_s=GROUP_TIMEOUT_S),
            scaling_config=ScalingConfig(
                num_workers=workers,  # type: ignore[arg-type]  # annotated for V1
                use_gpu=bool(ranks.gpus),
                resources_per_worker=ranks.bundle,
            ),
            run_config=RunConfig(
                name="dermfm",
                storage_path=str(storage.absolute()),
                failure_config=FailureConfig(max_failures=ranks.max_failures),
            ),
        ).fit()
        ended.append(None)
    except BaseException as error:  # told by the main thread
        ended.append(error)


def _follow(board: Any, fit: threading.Thread) -> int | None:
    """Print what the ranks say until Ray has ended them; the exit code that they settled, if they did."""
    import ray

    starts, since = 1, None
    while True:
        alive = fit.is_alive()
        said, code, worlds = ray.get(board.take.remote())
        for stream, text in said:
            print(text, end="", file=sys.stderr if stream == "stderr" else sys.stdout, flush=True)
        if len(worlds) > starts and code is None:
            starts = len(worlds)
            print(f"{_why_again(*worlds[-2:])}; Ray has started all of them again (start {starts})", flush=True)
        since = since or (time.monotonic() if code is not None else None)
        if not alive or (since is not None and time.monotonic() - since > END_S):
            return code
        fit.join(POLL_S)


def _why_again(before: int, now: int) -> str:
    return "a rank was lost" if now == before else f"there is room for {now} ranks now, there was for {before}"


def _tell_end(ended: Sequence[BaseException | None], starts: int) -> None:
    """One line on stderr of why Ray has given up."""
    error = ended[0] if ended else None
    failures = getattr(error, "worker_failures", None) or {}
    told = [f"rank {rank}: {_line(failure)}" for rank, failure in sorted(failures.items())]
    reason = "; ".join(told) or _line(error or "Ray has ended the ranks without a result")
    print(f"Ray has given up after {starts} starts: {reason}", file=sys.stderr, flush=True)


def _line(error: BaseException | str) -> str:
    """The line of an error's text that says most: the last of a traceback, the first of anything else."""
    cause = getattr(error, "base_exc", None) or getattr(error, "_base_exc", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
    name = "" if isinstance(cause, str) else f"{type(cause).__name__}: "
    return (name + lines[0])[:300]


@contextlib.contextmanager
def _stops(board: Any) -> Iterator[None]:
    """For the length of the block the stop signals of this process go to the ranks; a second Ctrl-C interrupts."""
    asked: list[str] = []

    def ask(number: int, _: FrameType | None) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(signal.Signals(number).name)
        board.stop.remote(asked[0])

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, ask) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """These environment variables for the length of the block, where they are not set."""
    new = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)


def _rank(job: dict[str, Any]) -> None:
    """One rank, in a thread of Ray's worker, inside the process group that Ray has formed."""
    import ray

    board = job["board"]
    process = from_environment("cuda" if os.environ.get("CUDA_VISIBLE_DEVICES") else "cpu")
    if ray.get(board.begin.remote(process.is_first, process.world)) is not None:
        return
    os.chdir(job["folder"])
    stop = StopFlag()
    with _heard(board, stop, process):
        code = job["main"](process, stop, lambda code: ray.get(board.settle.remote(code)))
    if code not in (DONE, RESUMABLE):
        raise RuntimeError("this rank has ended with the failure of another one")
    ray.get(board.settle.remote(code))


class _Speech(io.TextIOBase):
    """A stream whose text goes to the board: when it is flushed, and twice a second."""

    def __init__(self, name: str, send: Callable[[list[tuple[str, str]]], Any]) -> None:
        self._name, self._send = name, send
        self._text: list[str] = []
        self._lock = threading.Lock()

    def write(self, text: str) -> int:
        """Keep the text for the next flush."""
        with self._lock:
            self._text.append(text)
        return len(text)

    def flush(self) -> None:
        """Send what is kept."""
        with self._lock:
            text, self._text = "".join(self._text), []
        if text:
            self._send([(self._name, text)])


@contextlib.contextmanager
def _heard(board: Any, stop: StopFlag, process: Process) -> Iterator[None]:
    """For the length of the block this process's prints go to the board, and a stop from there sets `stop`."""
    import ray

    def exchange(said: list[tuple[str, str]]) -> None:
        name = ray.get(board.exchange.remote(said))
        if name and not stop:
            stop.ask(name)
            if process.is_first:  # whoever asked sees that it has arrived: the step border may be a while away
                print(f"{name} has come; stopping after this step")

    def listen() -> None:
        while not over.wait(POLL_S):
            for stream in streams:
                stream.flush()
            exchange([])

    over, streams = threading.Event(), [_Speech("stdout", exchange), _Speech("stderr", exchange)]
    thread = threading.Thread(target=listen, name="board", daemon=True)
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):  # type: ignore[type-var]
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            for stream in streams:
                stream.flush()
