"""Jobs of a running Ray cluster: send a command with its code to the job server, follow its log, stop it."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

POLL_S = 1.0
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


class RayJobError(ValueError):
    """The job server cannot be reached or does not fit; one line with the remedy."""


def submit(address: str, command: str, code: str, environment: Mapping[str, str]) -> str:
    """Send a shell command to the job server at `address` (http://host:8265); the job's id.

    `code` is a local folder that becomes the working directory of the command and of its actors on every node.
    Raises RayJobError where the server is not there, does not fit, or does not take the job.
    """
    runtime = {"working_dir": code, "env_vars": dict(environment), "excludes": ["__pycache__"]}
    client = _client(address)
    try:
        return client.submit_job(entrypoint=command, runtime_env=runtime)
    except (RuntimeError, ValueError, OSError) as error:
        told = " ".join(str(error).split())[:300]
        raise RayJobError(f"address: the job server at '{address}' does not take the job: {told}") from error


def check(address: str) -> None:
    """RayJobError where no job server answers at `address`, or one of another version."""
    _client(address)


def follow(address: str, job_id: str) -> int:
    """Print a job's log as it grows until it ends; its exit code (75 where it was stopped)."""
    client, shown = _client(address), 0
    while True:
        info = client.get_job_info(job_id)
        ended = info.status.value in ENDED
        log = client.get_job_logs(job_id)
        print(log[shown:], end="", flush=True)
        shown = len(log)
        if ended:
            return _exit_code(info)
        time.sleep(POLL_S)


def state(address: str, job_id: str) -> dict[str, str]:
    """state, reason and last log line of a job, {} where the cluster does not know it; RayJobError if unreachable."""
    client = _client(address)
    try:
        info = client.get_job_info(job_id)
    except RuntimeError:
        return {}
    log = client.get_job_logs(job_id).strip().splitlines()
    return {"state": info.status.value, "reason": info.message or "", "last": log[-1] if log else ""}


def stop(address: str, job_id: str) -> None:
    """End a job; nothing happens to one that has ended."""
    _client(address).stop_job(job_id)


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
