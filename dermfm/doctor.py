"""Checks of a node, or of all nodes of a job step, before a job burns hours: one row a check, green or red.

Every check is a function that returns what it saw or raises `Finding`: red where a job could not run, yellow where it
would run badly. A check that needs what is not there (no GPU, no run directory) says so and counts as passed.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.process import Process
from cluster.ray import RayError, join
from dermfm import zero
from dermfm.config import check_range, key
from dermfm.model.attention import attention
from shards.manifest import Manifest

GREEN, YELLOW, RED = "green", "yellow", "red"
MESSAGE_BYTES = 64_000_000  # of the all-reduce whose bandwidth is told
PROBE_BYTES = 128_000_000  # written and read to tell a disk's speed
SKEW_S = 1.0
OPEN_FILES = 4096
SHARED_MEMORY_BYTES = 1_000_000_000


@dataclass(kw_only=True)
class DoctorConfig:
    """What is looked at beside the node itself."""

    run: str | None = key(None, "folder that a run would write to: free space and speed")
    shards: str | None = key(None, "folder of shards: speed of reading")
    address: str | None = key(None, "Ray cluster (auto, host:port) that notes would join")
    min_free_gb: float = key(20.0, "free space that a run directory needs")
    device: str = key("auto", "auto, cuda or cpu")

    def __post_init__(self) -> None:
        check_range("min_free_gb", self.min_free_gb, 0)


class Finding(Exception):  # noqa: N818  it may be no error
    """What a check found wrong, and how bad that is."""

    def __init__(self, told: str, colour: str = RED) -> None:
        super().__init__(told)
        self.colour = colour


Row = tuple[str, str, str]  # check, colour, what was seen


def examine(config: DoctorConfig, process: Process) -> list[Row]:
    """All checks on this process's node; those of the group are collective."""
    checks: dict[str, Callable[[], str]] = {
        "Python": python,
        "packages": packages,
        "device": lambda: device(process),
        "attention kernel": lambda: kernel(process.device),
        "DeepSpeed": lambda: zero.ready(process.device),
        "compiler": compiler,
        "all-reduce": lambda: all_reduce(process),
        "clocks": lambda: clocks(process),
        "open files": open_files,
        "shared memory": shared_memory,
        "run directory": lambda: run_directory(config),
        "shards": lambda: shards(config),
        "Ray": lambda: ray_cluster(config),
    }
    return [_row(name, check) for name, check in checks.items()]


def show(rows: list[tuple[str, list[Row]]]) -> int:
    """Print one table over all nodes, checks that agree on all of them in one line; 0, or 1 where anything is red."""
    table = Table("check", "node", "", "seen", title="dermfm doctor")
    for name in [row[0] for row in rows[0][1]]:
        seen = {host: (colour, told) for host, found in rows for check, colour, told in found if check == name}
        if len(seen) > 1 and len(set(seen.values())) == 1:
            seen = {f"all {len(seen)}": next(iter(seen.values()))}
        for host, (colour, told) in seen.items():
            mark = {GREEN: "ok", YELLOW: "slow", RED: "BAD"}[colour]
            table.add_row(name, host, Text(mark, style=colour), Text(told))
    Console(soft_wrap=not sys.stdout.isatty()).print(table)
    return int(any(colour == RED for _, found in rows for _, colour, _ in found))


def python() -> str:
    """The interpreter."""
    return f"{platform.python_version()} at {sys.executable}"


def packages() -> str:
    """Whether every package that this project requires is there in a version that it asks for."""
    wrong = []
    for line in importlib.metadata.requires("dermfm") or []:
        need = Requirement(line)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            has = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{need.name} is missing")
            continue
        if not need.specifier.contains(has, prereleases=True):
            wrong.append(f"{need.name} {has} is not {need.specifier}")
    if wrong:
        raise Finding("; ".join(wrong))
    named = ("torch", "deepspeed", "ray", "transformers")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in named)


def device(process: Process) -> str:
    """The device that this process computes on, with its driver; red where CUDA's driver and torch do not fit."""
    if process.device.startswith("cuda"):
        found = torch.cuda.get_device_properties(process.device)
        (torch.ones(256, 256, device=process.device) @ torch.ones(256, 256, device=process.device)).sum().item()
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: use fp16"
        memory = found.total_memory / 1e9
        return f"{torch.cuda.device_count()} × {found.name}, {memory:.0f} GB, CUDA {torch.version.cuda}, {bf16}"
    if shutil.which("nvidia-smi"):
        raise Finding("nvidia-smi is here, but torch sees no GPU: driver and CUDA build do not fit", RED)
    return f"cpu, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"


def kernel(where: str) -> str:
    """Runs attention on the device against its reference."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if where.startswith("cuda") else torch.float32
    q = torch.randn(2, 16, 4, 32, device=where, dtype=dtype)
    lengths = torch.tensor([16, 9], device=where)
    got = attention(q, q, q, lengths_q=lengths, lengths_k=lengths)
    want = attention(q, q, q, lengths_q=lengths, lengths_k=lengths, kernel="reference")
    error = (got[1, :9] - want[1, :9]).abs().max().item()
    if error > (0.05 if dtype == torch.bfloat16 else 1e-4):
        raise Finding(f"differs from the reference by {error:.2g}")
    try:
        flash = f"flash-attn {importlib.metadata.version('flash-attn')}"
    except importlib.metadata.PackageNotFoundError:
        flash = "flash-attn is not installed (torch's own kernel is used)"
    return f"agrees with the reference to {error:.0e}; {flash}"


def compiler() -> str:
    """g++ and ninja, with which DeepSpeed builds its operators at first use."""
    missing = [name for name in ("g++", "ninja") if shutil.which(name) is None and not _beside_python(name)]
    if missing:
        raise Finding(f"{' and '.join(missing)} are not on PATH: DeepSpeed cannot build its operators", YELLOW)
    return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def all_reduce(process: Process) -> str:
    """Sum of a large tensor over all processes: right, and how fast."""
    if process.world == 1:
        return "one process; start it with srun over the allocation to test the network"
    tensor = torch.ones(MESSAGE_BYTES // 4, device=process.device)
    dist.all_reduce(tensor)
    if tensor[0].item() != process.world:
        raise Finding(f"the sum over {process.world} processes is {tensor[0].item():g}")
    _wait(process)
    began = time.monotonic()
    repeats = 5
    for _ in range(repeats):
        dist.all_reduce(tensor)
    _wait(process)
    spent = (time.monotonic() - began) / repeats
    # Bus bandwidth as nccl-tests defines it: 2 (n - 1) / n times the bytes.
    speed = 2 * (process.world - 1) / process.world * MESSAGE_BYTES / spent / 1e9
    return f"{process.world} processes, {dist.get_backend()}, {speed:.1f} GB/s bus bandwidth"


def clocks(process: Process) -> str:
    """How far the nodes' clocks are apart, beyond the time that asking takes."""
    if process.world == 1:
        return "one process"
    times: list[float] = [0.0] * process.world
    dist.barrier()
    began = time.time()
    dist.all_gather_object(times, began)
    apart = max(times) - min(times)
    if apart > SKEW_S:
        raise Finding(f"{apart:.1f} s apart: logs and file times of the nodes do not fit; set up NTP", YELLOW)
    return f"less than {max(apart, 0.001):.3f} s apart"


def open_files() -> str:
    """The limit of open files of a process."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < OPEN_FILES:
        remedy = f"ulimit -n {OPEN_FILES}"
        raise Finding(f"limit {soft} (hard {hard}), Ray and loaders may need {OPEN_FILES}; {remedy}", YELLOW)
    return f"limit {soft}"


def shared_memory() -> str:
    """Free space of /dev/shm, where loader processes and Ray hand over tensors."""
    if not Path("/dev/shm").is_dir():
        return "no /dev/shm on this system"
    free = shutil.disk_usage("/dev/shm").free
    if free < SHARED_MEMORY_BYTES:
        raise Finding(f"{free / 1e9:.1f} GB free in /dev/shm; loader processes may die (docker: --shm-size)", YELLOW)
    return f"{free / 1e9:.1f} GB free in /dev/shm"


def run_directory(config: DoctorConfig) -> str:
    """Free space and speed of writing where a run would be."""
    if config.run is None:
        return "not asked for (run=)"
    folder = Path(config.run)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 1e9
    if not os.access(folder, os.W_OK):
        raise Finding(f"{folder} cannot be written")
    if free < config.min_free_gb:
        raise Finding(f"{folder} has {free:.1f} GB free, min_free_gb is {config.min_free_gb:g}")
    probe = folder / f".doctor-{socket.gethostname()}-{os.getpid()}.tmp"
    try:
        began = time.monotonic()
        with probe.open("wb") as file:
            file.write(os.urandom(1 << 20) * (PROBE_BYTES >> 20))
            file.flush()
            os.fsync(file.fileno())
        speed = PROBE_BYTES / (time.monotonic() - began) / 1e6
    finally:
        probe.unlink(missing_ok=True)
    return f"{folder}: {free:.0f} GB free, written at {speed:.0f} MB/s"


def shards(config: DoctorConfig) -> str:
    """Speed of reading the first tars."""
    if config.shards is None:
        return "not asked for (shards=)"
    if "://" in config.shards:
        return f"{config.shards}: {len(Manifest.load(config.shards).shards)} tars answer"
    files = sorted(Path(config.shards).glob("*.tar"))
    if not files:
        raise Finding(f"{config.shards} holds no .tar")
    began, read = time.monotonic(), 0
    for path in files:
        with path.open("rb", buffering=0) as file:
            while read < PROBE_BYTES and (chunk := file.read(1 << 22)):
                read += len(chunk)
    return f"{config.shards}: {len(files)} tars, read at {read / max(time.monotonic() - began, 1e-9) / 1e6:.0f} MB/s"


def ray_cluster(config: DoctorConfig) -> str:
    """Whether the cluster answers, with its nodes and resources."""
    if config.address is None:
        return "not asked for (address=)"
    import ray

    try:
        join(config.address)
        nodes = [node for node in ray.nodes() if node["Alive"]]
        has = ray.cluster_resources()
        return f"{len(nodes)} nodes, {has.get('CPU', 0):g} CPUs, {has.get('GPU', 0):g} GPUs, Ray {ray.__version__}"
    except RayError as error:
        raise Finding(str(error)) from error
    finally:
        ray.shutdown()


def _row(name: str, check: Callable[[], str]) -> Row:
    try:
        return name, GREEN, check()
    except Finding as finding:
        return name, finding.colour, str(finding)
    except (OSError, RuntimeError, ImportError, ValueError) as error:
        return name, RED, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _wait(process: Process) -> None:
    if process.device.startswith("cuda"):
        torch.cuda.synchronize()
    dist.barrier()


def _beside_python(name: str) -> bool:
    return (Path(sys.executable).parent / name).is_file()
