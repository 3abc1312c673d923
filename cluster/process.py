"""This process among its peers: rank, world and device from torchrun's, SLURM's or our own environment; the group."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Exit codes of every job; the last means that the same command goes on where it stopped.
DONE, FAILED, BAD_INPUT, RESUMABLE = 0, 1, 2, 75
GROUP_TIMEOUT_S = 1800
MEET_TIMEOUT_S = 300
ROOT = Path(__file__).resolve().parents[1]


class ProcessError(ValueError):
    """The environment does not describe a process group; one line that names the variable."""


@dataclass(frozen=True)
class Process:
    """One process of a job. `device` is the torch device string that it computes on."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    device: str = "cpu"

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes and talks for all."""
        return self.rank == 0


def is_launched() -> bool:
    """Whether a launcher (torchrun, srun with several tasks, our own) has set this process's rank.

    Batch scripts and salloc shells have SLURM_NTASKS too, but only srun's tasks have SLURM_STEP_NUM_TASKS.
    """
    return "RANK" in os.environ or _number("SLURM_STEP_NUM_TASKS", 1) > 1


def python_command(module: str, root: Path = ROOT) -> list[str]:
    """The command that runs `module` as a program with the code in `root` (this one), wherever it is started.

    `python -m` would take a package of that name in the working directory first (PYTHONSAFEPATH needs Python 3.11).
    """
    run = f"import runpy, sys; sys.path.insert(0, {str(root)!r}); runpy.run_module({module!r}, run_name='__main__')"
    return [sys.executable, "-c", run]


def default_ranks(ranks: int, device: str) -> int:
    """How many processes to start on this machine: `ranks`, or where it is 0 one a CUDA device, or one."""
    if ranks or device == "cpu":
        return max(ranks, 1)
    import torch

    return max(torch.cuda.device_count(), 1)


def default_threads(threads: int, local_world: int) -> int:
    """CPU threads of a process: `threads`, or where it is 0 OMP_NUM_THREADS, or its share of the cores it may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return threads or _number("OMP_NUM_THREADS", max(cores // local_world, 1))


def from_environment(device: str = "auto") -> Process:
    """The Process that the environment describes; alone where no launcher is seen.

    Raises ProcessError where a rank is set but its world, address or port is not.
    """
    env = os.environ
    if "RANK" in env:
        rank, world = _number("RANK"), _number("WORLD_SIZE")
        local_rank, local_world = _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1)
    elif is_launched():
        rank, world = _number("SLURM_PROCID"), _number("SLURM_STEP_NUM_TASKS")
        local_rank = _number("SLURM_LOCALID", 0)
        local_world = _number("SLURM_NTASKS_PER_NODE", max(world // _number("SLURM_STEP_NUM_NODES", 1), 1))
        env.setdefault("MASTER_ADDR", first_host(env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", ""))))
        env.setdefault("MASTER_PORT", str(20000 + _number("SLURM_JOB_ID", 0) % 6000))
    else:
        rank, world, local_rank, local_world = 0, 1, 0, 1
    if world > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in env:
                raise ProcessError(
                    f"environment: {name} is not set, {world} processes cannot meet; start with srun or torchrun"
                )
    if not 0 <= rank < world:
        raise ProcessError(f"environment: rank {rank} is not valid in a world of {world}")
    return Process(rank, world, local_rank, local_world, _device(device, local_rank))


def meet(process: Process, name: str) -> Any:
    """A connection to the job's key-value store at MASTER_ADDR:MASTER_PORT, for the uses called `name`.

    The first rank holds the store (under torchrun its agent does, on Ray the group that Ray has formed) and does not
    wait for the others; each call makes a connection of its own, so threads do not wait for each other. Raises
    ProcessError where no store answers in time.
    """
    import torch.distributed as dist

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0")
    host, port = os.environ["MASTER_ADDR"], _held[0].port if _held else _number("MASTER_PORT")
    has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or dist.is_initialized()
    holds = process.is_first and not has_store and not _held
    timeout = datetime.timedelta(seconds=MEET_TIMEOUT_S)
    try:
        store = dist.TCPStore(host, port, process.world, holds, timeout=timeout, wait_for_workers=False)
    except RuntimeError as error:
        raise ProcessError(f"environment: no store at {host}:{port} ({str(error).splitlines()[0][:160]})") from error
    if holds:
        _held.append(store)
    _met[name] += 1  # a process may form one group after another; every rank does so in the same order
    return dist.PrefixStore(f"{name}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{_met[name]}", store)


_held: list[Any] = []  # the store that this process holds, for as long as it lives
_met: Counter[str] = Counter()
_own: list[bool] = []  # not empty: the process group is ours to end


def start_group(process: Process) -> None:
    """Join the default process group: NCCL on CUDA, gloo on CPU. Everyone joins, a lone process too.

    A group that stands already (Ray Train forms one) is taken as it is; ProcessError where its ranks are others.
    """
    import torch
    import torch.distributed as dist

    # DeepSpeed reads these names, whatever launcher set ours.
    for name, value in (
        ("RANK", process.rank),
        ("WORLD_SIZE", process.world),
        ("LOCAL_RANK", process.local_rank),
        ("LOCAL_WORLD_SIZE", process.local_world),
    ):
        os.environ[name] = str(value)
    if process.device.startswith("cuda"):
        torch.cuda.set_device(process.device)
    if dist.is_initialized():
        theirs = (dist.get_rank(), dist.get_world_size())
        if theirs != (process.rank, process.world):
            raise ProcessError(
                f"environment: rank {process.rank} of {process.world} is in a group as rank {theirs[0]} of {theirs[1]}"
            )
        return
    _own.append(True)
    dist.init_process_group(
        "nccl" if process.device.startswith("cuda") else "gloo",
        store=meet(process, "group"),
        rank=process.rank,
        world_size=process.world,
        timeout=datetime.timedelta(seconds=GROUP_TIMEOUT_S),
    )


def close_group() -> None:
    """Leave the process group, if `start_group` has formed it."""
    import torch.distributed as dist

    if dist.is_initialized() and _own:
        _own.clear()
        dist.destroy_process_group()


def _number(name: str, default: int | None = None) -> int:
    if default is not None and name not in os.environ:
        return default
    try:
        return int(os.environ[name])
    except (KeyError, ValueError) as error:
        raise ProcessError(
            f"environment: {name} is '{os.environ.get(name)}', a number is needed; start with srun or torchrun"
        ) from error


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list ("n[1-4]"), asked from SLURM; this machine for an empty one."""
    if not nodes:
        return "127.0.0.1"
    listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return listed.stdout.split()[0]


def _device(wanted: str, local_rank: int) -> str:
    if wanted == "cpu":
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return f"cuda:{local_rank % torch.cuda.device_count()}" if wanted in ("auto", "cuda") else wanted
    if wanted != "auto":
        raise ProcessError(f"device: '{wanted}' is not here (no CUDA device is visible); use device=auto or device=cpu")
    return "cpu"
