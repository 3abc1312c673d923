"""Ray inside a SLURM allocation: one task of srun a node; the first runs head and driver, the others offer their nodes.

Nothing is found by name and nothing is left running: every process here ends the Ray processes that it started. The
others know that the work is over when the head closes the connection ("bell") that each of them holds.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from cluster.process import first_host
from cluster.ray import PATIENT, RayError, join

ADDRESS = "slurm"
JOIN_S = 300.0  # how long nodes may take to join before the work starts without them
END_S = 20.0  # how long Ray may take to end by itself
TOKEN = "RAY_AUTH_TOKEN"
POLL_S = 0.5


def is_head() -> bool:
    """Whether this task runs the head and the driver."""
    return os.environ.get("SLURM_PROCID", "0") == "0"


@contextlib.contextmanager
def head() -> Iterator[None]:
    """A Ray cluster over all nodes of this job step, and a connection to it, for the length of the block.

    Called in the first task; `serve` in all others. Raises RayError outside of an allocation, without a token on more
    than one node, or where Ray does not start.
    """
    num_nodes = int(_environment("SLURM_STEP_NUM_NODES"))
    if num_nodes > 1 and not os.environ.get(TOKEN):
        raise RayError(
            f"environment: {TOKEN} is not set; export one random token for all tasks as slurm/notes.sbatch does"
        )
    host, port = _head_host(), _port()
    folder = tempfile.mkdtemp(prefix="dermfm-ray-", dir="/tmp")  # sockets: short
    options = ["--head", f"--port={port}", f"--node-ip-address={host}", f"--temp-dir={folder}"]
    bell = socket.create_server((host, port + 1), reuse_port=False)
    guests: list[socket.socket] = []
    threading.Thread(target=_let_in, args=(bell, guests), daemon=True).start()
    ray = RayNode([*options, "--include-dashboard=false"])
    try:
        _await_nodes(f"{host}:{port}", num_nodes, ray)
        yield
    finally:
        _leave()
        for end in (*guests, bell):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        ray.end()
        shutil.rmtree(folder, ignore_errors=True)


def serve() -> int:
    """Offer this node to the head's cluster until the head is gone, or Ray on this node ends. 0: the head's code tells.

    SIGTERM, SIGINT and SIGUSR1 are the head's to answer: it ends the work, and this node with it.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
    host, port = _head_host(), _port()
    try:
        bell = _ring(host, port + 1)
    except RayError as error:  # it had nothing to do, or failed: its exit code tells
        print(error, flush=True)
        return 0
    with bell:
        ray = RayNode([f"--address={host}:{port}", f"--node-ip-address={_own_address(bell)}"])
        try:
            bell.settimeout(POLL_S)
            while not ray.has_ended():
                with contextlib.suppress(TimeoutError):
                    if not bell.recv(1):
                        return 0
            print(f"Ray on this node has ended before the work has: {ray.last_line()}", flush=True)
            return 0  # the head goes on without it, and its exit code tells
        except OSError:
            return 0  # the head's node is gone
        finally:
            ray.end()


def _leave() -> None:
    import ray

    ray.shutdown()


class RayNode:
    """`ray start --block` as a process group of its own, with what it says kept for the message where it fails."""

    def __init__(self, options: list[str]) -> None:
        cpus = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE", "1")
        gpus = len([g for g in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if g.strip()])
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        command += [f"--num-cpus={cpus}", f"--num-gpus={gpus}", *options]
        with tempfile.NamedTemporaryFile(delete=False) as log:
            self._log = Path(log.name)
            self._process = subprocess.Popen(
                command, env={**PATIENT, **os.environ}, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def pid(self) -> int:
        """The process that all of Ray on this node descends from."""
        return self._process.pid

    def has_ended(self) -> bool:
        """Whether Ray on this node is gone."""
        return self._process.poll() is not None

    def last_line(self) -> str:
        """The last thing it said."""
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else "it said nothing"

    def end(self) -> None:
        """SIGTERM to `ray start`, which ends its processes; what is left of its group after a while is killed."""
        if not self.has_ended():
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.unlink(missing_ok=True)


def _await_nodes(address: str, num_nodes: int, head: RayNode) -> None:
    """Join the cluster once it answers, then wait for all nodes; after JOIN_S the work goes on with those that came.

    Raises RayError where Ray on this node ends or does not answer.
    """
    import ray

    began = time.monotonic()
    while not ray.is_initialized():
        try:
            join(address)
        except RayError as error:
            if head.has_ended():
                raise RayError(f"Ray did not start on this node: {head.last_line()}") from error
            if time.monotonic() - began > JOIN_S:
                raise
            time.sleep(POLL_S)
    while (alive := sum(node["Alive"] for node in ray.nodes())) < num_nodes:
        if time.monotonic() - began > JOIN_S:
            print(f"{alive} of {num_nodes} nodes have joined Ray after {JOIN_S:g} s; going on with these", flush=True)
            return
        time.sleep(POLL_S)


def _let_in(bell: socket.socket, guests: list[socket.socket]) -> None:
    with contextlib.suppress(OSError):  # closed: the work is over
        while True:
            guests.append(bell.accept()[0])


def _ring(host: str, port: int) -> socket.socket:
    """A connection to the head's bell, which may not be up yet."""
    began = time.monotonic()
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=POLL_S * 10)
        except OSError as error:
            if time.monotonic() - began > JOIN_S:
                raise RayError(f"the first task of this job does not answer at {host}:{port} ({error})") from error
            time.sleep(POLL_S)
        else:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            return connection


def _own_address(connection: socket.socket) -> str:
    return connection.getsockname()[0]


def _head_host() -> str:
    return socket.gethostbyname(first_host(_environment("SLURM_STEP_NODELIST")))


def _port() -> int:
    """Ray's port follows the job, so that two jobs on a node do not meet; the bell has the next one.

    Below 32768, where Linux begins to take the ports of outgoing connections, and not among those of Ray's workers
    (10002 to 19999) or of training (20000 to 25999).
    """
    return 26000 + 2 * (int(_environment("SLURM_JOB_ID")) % 3380)


def _environment(name: str) -> str:
    try:
        return os.environ[name]
    except KeyError as error:
        raise RayError(
            f"address: '{ADDRESS}' needs a task of srun, {name} is not set; see slurm/notes.sbatch"
        ) from error
