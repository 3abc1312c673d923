"""Ray for one job: join a running cluster by its address, or start an own one on this machine and end it again."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

OBJECT_STORE_BYTES = 100_000_000
KNOCK_S = 10.0
# An own cluster lives on this host alone: no reports home, no tokens, addresses on 127.0.0.1.
LOCAL_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
# How long Ray's parts may take to start. Its own 10 to 60 s are too few where Python's packages come over a network, or
# the machine is busy.
PATIENT = {
    "RAY_gcs_server_port_wait_time_s": "300",
    "RAY_raylet_start_wait_time_s": "300",
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "600",
}
# Ray gives its workers a low priority (nice 15) so that they stay out of the way of what else a machine does; beside
# another busy process they then hardly run. On an own cluster they are the job itself.
PRIORITY = {"RAY_worker_niceness": "0"}
STARTS = 3  # of an own cluster, which a busy machine may fail


class RayError(RuntimeError):
    """Ray cannot be reached, started, or has no room for what was asked."""


@contextmanager
def ray_session(address: str | None = None, num_cpus: int | None = None) -> Iterator[None]:
    """A connection to Ray for the length of the block.

    `address` null starts a cluster of this machine only, with `num_cpus` (all by default) in a temporary folder, and
    ends it; an address ("auto", host:port, ray://…) joins that cluster and leaves it running. A connection that is
    already open is used as it is. Raises RayError where the address does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    if address:
        join(address)
        folder = None
    else:
        folder = _start_local(num_cpus)
    try:
        yield
    finally:
        with _same_sigterm():  # Ray's core leaves the system's default behind: a stop would end the job without a word
            ray.shutdown()
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def join(address: str) -> None:
    """Connect to a running cluster; RayError where it does not answer."""
    import ray

    try:
        _knock(address)
        with _same_sigterm():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        raise RayError(f"no Ray cluster answers at '{address}': {str(error).splitlines()[0]}") from error


@contextmanager
def _same_sigterm() -> Iterator[None]:
    """What SIGTERM does stays what it is: Ray's core would dump a stack and abort, with nothing put in order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _knock(address: str) -> None:
    """Raise an OSError where nothing listens at host:port; Ray itself would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdigit():
        with socket.create_connection((host, int(port)), timeout=KNOCK_S):
            pass


def _start_local(num_cpus: int | None) -> str:
    """Start an own cluster; its temporary folder."""
    defaults = {**PATIENT, **PRIORITY}
    wanted = {**{name: os.environ.get(name, value) for name, value in defaults.items()}, **LOCAL_ENVIRONMENT}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        for _ in range(STARTS - 1):
            with suppress(Exception):  # Ray's own errors have no common type
                return _init_local(num_cpus)
        return _init_local(num_cpus)
    except Exception as error:
        told = (str(error).splitlines() or [type(error).__name__])[0]
        raise RayError(f"Ray does not start on this machine: {told}") from error
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _init_local(num_cpus: int | None) -> str:
    """The new cluster's temporary folder. What has been started is ended, and the folder gone, where the rest fails."""
    import ray

    folder = tempfile.mkdtemp(prefix="dermfm-ray-", dir="/tmp" if os.path.isdir("/tmp") else None)  # sockets: short
    try:
        with _same_sigterm():
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=folder,
            )
    except BaseException:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder
