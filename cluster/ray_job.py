"""Jobs of a running Ray cluster: send a command with its code to the job server, follow its log, stop it."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")
POLL_S = 1.0
PATIENCE_S = 120.0  # a server that starts, or a busy one, gives its own parts 10 s and answers with an error after them
ASKED_S = 5.0  # for who only looks
STOP_S = 120  # what a job that is told to stop gets for its checkpoint; Ray's own 3 s are too few
LOG_BYTES = 1_000_000  # of log that make the polls of it a second rarer: the server sends all of it each time
TAIL_LINES = 50
STARTED_AGAIN = r"Ray has started all of them again \(start (\d+)\)"  # as cluster.ray_train tells it
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


class RayJobError(ValueError):
    """The job server cannot be reached or does not fit; one line with the remedy."""


def submit(address: str, command: str, code: str, environment: Mapping[str, str]) -> str:
    """Send a shell command to the job server at `address` (http://host:8265); the job's id.

    `code` is a local folder that becomes the working directory of the command and of its actors on every node.
    Raises RayJobError where the server is not there, does not fit, or does not take the job.
    """
    wait = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)}
    runtime = {"working_dir": code, "env_vars": wait | dict(environment), "excludes": ["__pycache__"]}
    client, number = _client(address), f"dermfm-{secrets.token_hex(6)}"

    def send() -> str:
        try:
            return client.submit_job(entrypoint=command, runtime_env=runtime, submission_id=number)
        except (RuntimeError, OSError):
            if _info(client, number) is not None:  # it was taken, only the answer was lost
                return number
            raise

    try:
        return _patiently(send)
    except (RuntimeError, ValueError, OSError) as error:
        told = " ".join(str(error).split())[:300]
        raise RayJobError(f"address: the job server at '{address}' does not take the job: {told}") from error


def check(address: str) -> None:
    """RayJobError where no job server answers at `address`, or one of another version."""
    _client(address)


def follow(address: str, job_id: str) -> int:
    """Print a job's log as it grows until it ends; its exit code (75 where it was stopped).

    RayJobError where the server does not answer any more, or has forgotten the job.
    """
    client, shown = _client(address), 0
    while True:
        info = _known(client, address, job_id)
        ended = info.status.value in ENDED
        log = _log(client, job_id, patient=ended)
        print(log[shown:], end="", flush=True)
        shown = max(shown, len(log))
        if ended:
            return _exit_code(info)
        time.sleep(POLL_S * (1 + shown / LOG_BYTES))


def state(address: str, job_id: str) -> dict[str, str]:
    """state, reason, restarts of its ranks and the log's end (tail) of a job, {} where the cluster does not know it.

    RayJobError where the server cannot be reached.
    """
    client = _client(address)
    try:
        info = _patiently(lambda: _info(client, job_id), ASKED_S)
    except (RuntimeError, OSError) as error:
        raise _gone(address, error) from error
    if info is None:
        return {}
    log = _log(client, job_id)
    restarts = max((int(n) - 1 for n in re.findall(STARTED_AGAIN, log)), default=0)
    tail = "\n".join(log.splitlines()[-TAIL_LINES:])
    return {"state": info.status.value, "reason": info.message or "", "restarts": str(restarts), "tail": tail}


def stop(address: str, job_id: str) -> None:
    """Ask a job to end: it gets SIGTERM, and STOP_S for a checkpoint. Nothing happens to one that has ended."""
    client = _client(address)
    try:
        _patiently(lambda: client.stop_job(job_id))
    except (RuntimeError, OSError) as error:
        raise _gone(address, error) from error


def _patiently(call: Callable[[], T], patience_s: float = PATIENCE_S) -> T:
    """What a call gives, made again for `patience_s` where the server fails (5xx) or does not answer."""
    end = time.monotonic() + patience_s
    while True:
        try:
            return call()
        except (RuntimeError, OSError) as error:
            if re.search(r"status code 4\d\d", str(error)) or time.monotonic() > end:
                raise
            time.sleep(POLL_S)


def _info(client: Any, job_id: str) -> Any:
    """The server's account of a job; None where it does not know it."""
    try:
        return client.get_job_info(job_id)
    except RuntimeError as error:
        if "status code 404" in str(error):
            return None
        raise


def _known(client: Any, address: str, job_id: str) -> Any:
    try:
        info = _patiently(lambda: _info(client, job_id))
    except (RuntimeError, OSError) as error:
        raise _gone(address, error) from error
    if info is None:
        raise RayJobError(f"address: the job server at '{address}' does not know job {job_id} any more")
    return info


def _log(client: Any, job_id: str, patient: bool = False) -> str:
    """All that a job has printed; nothing while the server cannot say, which is waited for if `patient`."""
    try:
        return _patiently(lambda: client.get_job_logs(job_id)) if patient else client.get_job_logs(job_id)
    except (RuntimeError, OSError):
        return ""


def _gone(address: str, error: Exception) -> RayJobError:
    told = " ".join(str(error).split())[:200]
    return RayJobError(
        f"address: the job server at '{address}' does not answer any more ({told}); jobs there may go on"
    )


def _exit_code(info: Any) -> int:
    if info.status.value == "SUCCEEDED":
        return 0
    if info.status.value == "STOPPED":
        return 75
    return info.driver_exit_code or 1


def _client(address: str) -> Any:
    import ray
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.ERROR)
    if "://" not in address:
        address = f"http://{address}"
    try:
        client = JobSubmissionClient(address)
    except (OSError, RuntimeError, ValueError) as error:  # ConnectionError and those of requests are OSErrors
        told = str(error).splitlines()[0][:200]
        raise RayJobError(
            f"address: no Ray job server answers at '{address}' ({told}); it is http://<head node>:8265"
        ) from error
    there = getattr(client, "_server_ray_version", None)  # asked for by its constructor, and kept nowhere else
    if there and there != ray.__version__:
        raise RayJobError(f"address: '{address}' runs Ray {there}, here is {ray.__version__}; pip install ray=={there}")
    return client
