"""A real SLURM of two virtual nodes on this machine, and what its tests do with it: submit, wait, take nodes away.

Nothing here decides by the clock: what is waited for may take WAIT_S, also on a machine that is busy with other things.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest

from cluster import slurm as scheduler
from dermfm.zero import consolidated_weights
from launch.cli import main

SCRIPTS = Path(__file__).parent / "slurm"
OWNER = Path("/tmp/dermfm-slurm-testbed.lock")  # held by the run of these tests whose testbed is up; says its folder
BRIDGE = Path("/sys/class/net/slbr0")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
NODES = ("n1", "n2")
WAIT_S = 900.0
SLURMS_OWN = ("unshare", "bash", "slurmd", "slurmstepd")
# A training of seconds: the image tower alone, 64 pixels, 24 steps of 16 of the 64 small records.
SMALL = (
    "configs/train/cpu.yaml", "model.image.size=64", "contrastive_batch=16", "micro_batch=8", "epochs=6", "device=cpu",
    "objectives.contrastive=0", "objectives.matching=0", "objectives.classify_text=0", "objectives.classify_fused=0",
    "model.text.cache_mb=0", "log_every=1", "threads=1",
)  # fmt: skip


@contextlib.contextmanager
def testbed() -> Iterator[Path]:
    """SLURM_CONF of a testbed for the length of the block; skips with the reason where there cannot be one."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("a SLURM of namespaces needs Linux and root")
    if not all(map(shutil.which, ("slurmctld", "slurmd", "munged", "sbatch", "ip", "nsenter"))):
        pytest.skip("Debian's packages slurmctld, slurmd, slurm-client, munge and iproute2 are not installed")
    with OWNER.open("a+") as owner:
        try:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            pytest.skip(f"another run of these tests has its SLURM up on this machine ({OWNER})")
        clear_leftovers(owner)
        if BRIDGE.exists():
            pytest.skip(f"a SLURM testbed that is not of these tests is up on this machine ({BRIDGE})")
        with _up(owner) as configuration:
            yield configuration


def clear_leftovers(owner: IO[str]) -> None:
    """Take away what a run of these tests that was killed has left: daemons, namespaces, its folder."""
    owner.seek(0)
    folder = owner.read().strip()
    if folder and Path(folder).is_dir():
        _down(Path(folder))
    owner.truncate(0)


@contextlib.contextmanager
def _up(owner: IO[str]) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="dermfm-slurm-", dir="/tmp"))  # sockets: short
    owner.write(str(folder))
    owner.flush()
    folder.chmod(0o755)  # munge's daemon refuses a folder that others cannot enter
    log = folder / "up.log"
    try:
        with log.open("w") as file:  # no pipe: the daemons would hold it open
            command = ["bash", str(SCRIPTS / "up.sh"), str(len(NODES)), "2", "4"]
            up = subprocess.run(command, env=_environment(folder), stdout=file, stderr=file, timeout=600, check=False)
        if up.returncode:
            pytest.skip(f"no SLURM could be started: {[*log.read_text().split(chr(10)), '-'][-2]}")
        configuration = folder / "slurm-testbed" / "slurm.conf"
        os.environ["SLURM_CONF"] = str(configuration)
        yield configuration
    finally:
        os.environ.pop("SLURM_CONF", None)
        _down(folder)
        owner.truncate(0)


def _down(folder: Path) -> None:
    subprocess.run(["bash", str(SCRIPTS / "down.sh")], env=_environment(folder), timeout=600, check=False)
    shutil.rmtree(folder, ignore_errors=True)


def _environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(folder)}


def dermfm(*words: str) -> subprocess.CompletedProcess[str]:
    """`dermfm` in this process, which has paid for its imports already."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def submit(*words: str) -> int:
    """Submit to SLURM; the id of the (last) job."""
    done = dermfm("submit", "slurm", *words)
    assert done.returncode == 0, done.stderr
    return int(re.findall(r"SLURM job (\d+)", done.stdout)[-1])


def wait_for(
    what: Callable[[], Any], told: Callable[[], str] = str, every_s: float = 0.3, longest_s: float = WAIT_S
) -> None:
    """Until `what` holds; fails with `told()` after a long while."""
    end = time.monotonic() + longest_s
    while not what():
        assert time.monotonic() < end, told()
        time.sleep(every_s)


def end(job: int, longest_s: float = 2 * WAIT_S) -> dict[str, str]:
    """What SLURM says of a job once it has ended."""
    wait_for(lambda: scheduler.job(job).get("state") in ENDED, lambda: f"{scheduler.job(job)}", longest_s=longest_s)
    return scheduler.job(job)


def restarts(job: int) -> int:
    """How often a job was requeued."""
    return int(scheduler.job(job).get("restarts", 0))


def await_restart(job: int, times: int = 1) -> None:
    """Until a job was requeued so often, or has ended without (which the test then tells)."""
    wait_for(lambda: restarts(job) >= times or scheduler.job(job).get("state") in ENDED)


def log_of(folder: Path) -> str:
    """All that the folder's jobs have printed."""
    return "\n".join(path.read_text(errors="replace") for path in sorted((folder / "log").glob("slurm-*")))


def steps(run: Path) -> list[dict[str, Any]]:
    """The complete lines of a run's metrics.jsonl; the last may be half-written."""
    path = run / "metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def weights(run: Path) -> dict[str, np.ndarray]:
    """The newest checkpoint's weights."""
    name = (run / "ckpt" / "latest").read_text().strip()
    return {k: v.detach().numpy() for k, v in consolidated_weights(run / "ckpt", name).items()}


def same_weights(one: Path, other: Path) -> bool:
    """Whether two runs end with the same weights, bit by bit."""
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


def left_on_nodes() -> list[str]:
    """Commands of the processes on the two nodes that are not SLURM's own."""
    places = {os.stat(f"/var/run/netns/{name}").st_ino for name in NODES}
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            name = (folder / "comm").read_text().strip()
            if os.stat(folder / "ns" / "net").st_ino in places and not name.startswith(SLURMS_OWN):
                found.append((folder / "cmdline").read_text().replace("\0", " ") or name)
    return found


def kill_node(name: str) -> None:
    """End the node's first process, and all of the node with it; SLURM is to see it soon."""
    _slurmd_timeout(10)
    folder = Path(os.environ["SLURM_CONF"]).parent
    pids = dict(line.split() for line in (folder / "pids").read_text().splitlines())
    children = Path(f"/proc/{pids[f'slurmd-{name}']}/task/{pids[f'slurmd-{name}']}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)


def revive_node(name: str) -> None:
    """Start a killed node again."""
    _slurmd_timeout(300)
    environment = _environment(Path(os.environ["SLURM_CONF"]).parents[1])
    subprocess.run(["bash", str(SCRIPTS / "revive.sh"), name], env=environment, timeout=300, check=True)


def _slurmd_timeout(seconds: int) -> None:
    path = Path(os.environ["SLURM_CONF"])
    path.write_text(re.sub(r"(?m)^SlurmdTimeout=.*$", f"SlurmdTimeout={seconds}", path.read_text()))
    subprocess.run(["scontrol", "reconfigure"], timeout=120, check=True)
