"""What goes on in a folder: submissions with their scheduler's state, a training run's progress, the end of its log."""

from __future__ import annotations

import glob
import shlex
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster import ray_job, slurm
from dermfm import metrics
from dermfm.config import REQUIRED, InputError, key, read_yaml
from dermfm.journal import JOURNAL, journal
from dermfm.progress import duration
from dermfm.run import check_free

ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "REQUEUED")
BAD = ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "BOOT_FAIL", "DEADLINE")
ENDED = (*BAD, "COMPLETED", "SUCCEEDED", "STOPPED", "ended")


@dataclass(kw_only=True)
class StatusConfig:
    """Which folder is looked at."""

    run: str = key(REQUIRED, "run directory, or the folder of notes or shards")
    lines: int = key(5, "last lines of the newest log that are shown")


@dataclass(kw_only=True)
class CancelConfig:
    """Whose submissions are ended."""

    run: str = key(REQUIRED, "run directory, or the folder of notes or shards")


def show(config: StatusConfig) -> None:
    """Print it. InputError where the folder holds neither submissions nor a training run."""
    folder = _folder(config.run)
    console = Console(soft_wrap=True)
    entries = _known(folder)
    if entries:
        console.print(_table(entries))
    if told := progress(folder):
        console.print(Text(told))
    for entry in entries:
        if entry["state"] in BAD:
            console.print(
                Text(f"{entry['job']} did not end well ({entry['state']}); read {entry['log'] or _ray_log(entry)}")
            )
    if (log := _newest_log(folder, entries)) and config.lines:
        _print_end(console, str(log), log.read_text(errors="replace"), config.lines)
    for entry in entries:  # a Ray job's log is with its job server
        if config.lines and entry.get("tail") and (not log or entry["state"] in BAD):
            _print_end(console, f"{entry['job']} {entry['id']}", entry["tail"], config.lines)
    if not entries and not told:
        raise InputError(f"{folder}: nothing was submitted for this folder ({JOURNAL}) and no training runs in it")


def _ray_log(entry: dict[str, Any]) -> str:
    """The command that shows the whole log of a job that a job server keeps."""
    return f"it: ray job logs --address {entry.get('address')} {entry['id']}"


def _print_end(console: Console, name: str, text: str, lines: int) -> None:
    console.print(Text(f"── {name}"))
    console.print(Text("\n".join(text.splitlines()[-lines:])))


def cancel(config: CancelConfig, dry_run: bool) -> None:
    """End the folder's submissions that are not over; InputError where there never was one."""
    folder = _folder(config.run)
    entries = [_seen(entry) for entry in journal(folder)]
    if not entries:
        raise InputError(f"{folder}: nothing was submitted for this folder; a process of this machine ends by Ctrl-C")
    alive = [entry for entry in entries if entry["state"] not in ENDED]
    for entry in reversed(alive):  # those that wait for others first
        told = f"{entry['job']}: {entry['scheduler']} job {entry['id']} ({entry['state']})"
        if not dry_run and entry["scheduler"] == "slurm":
            slurm.cancel(entry["id"])
        elif not dry_run:
            ray_job.stop(entry["address"], entry["id"])
        print(f"{told} {'would be' if dry_run else 'is'} cancelled")
    if not alive:
        print(f"{folder}: all {len(entries)} submissions have ended")


def check_idle(folder: Path, jobs: Iterable[str]) -> None:
    """InputError where one of these jobs was submitted for the folder before and waits or runs."""
    for entry in _known(folder, jobs):
        if entry["state"] in ALIVE:
            raise InputError(
                f"{folder}: {entry['job']} is in work here already ({entry['scheduler']} job {entry['id']}, "
                f"{entry['state']}); wait for it, end it with dermfm cancel {shlex.quote(str(folder))}, or give "
                "another folder"
            )


def progress(folder: Path) -> str | None:
    """Step, speed and time left of a training run, from its metrics.jsonl; None where there is none."""
    rows = metrics.read_rows(folder / "metrics.jsonl")
    if not rows:
        return None
    last = rows[-1]
    age = time.time() - (folder / "metrics.jsonl").stat().st_mtime
    speed = last["samples_per_s"]
    told = f"step {last['step']}, epoch {last['epoch']:.2f}, loss {last['loss']:.4f}, {speed:.1f} samples/s"
    settings = folder / "config.yaml"
    epochs = float(read_yaml(settings).get("epochs", 0)) if settings.is_file() else 0.0
    left = (epochs - last["epoch"]) * last["samples_seen"] / max(last["epoch"], 1e-9)
    if left <= 0:
        return f"{told}; all {epochs:g} epochs are done"
    state = (
        f"runs, about {duration(left / last['samples_per_s'])} left" if _is_alive(folder) else "does not run here now"
    )
    return f"{told}; {state}; last line {duration(age)} ago"


def _known(folder: Path, jobs: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """The newest submission of each job, or of each of `jobs`, with state, restarts and place."""
    newest = {entry["job"]: entry for entry in journal(folder)}
    return [_seen(entry) for job, entry in newest.items() if jobs is None or job in jobs]


def _seen(entry: dict[str, Any]) -> dict[str, Any]:
    return {"log": None, **entry, **_state(entry)}


def _state(entry: dict[str, Any]) -> dict[str, str]:
    try:
        is_ray = entry["scheduler"] == "ray"
        found = ray_job.state(entry["address"], entry["id"]) if is_ray else slurm.job(entry["id"])
    except (slurm.SlurmError, ray_job.RayJobError) as error:
        return {"state": "unknown", "reason": str(error)}
    return found or {"state": "ended", "reason": f"the {entry['scheduler']} controller has forgotten it"}


def _table(entries: list[dict[str, Any]]) -> Table:
    table = Table("job", "where", "state", "restarts", "nodes", "run time", "reason")
    for entry in entries:
        reason = entry.get("reason", "")
        cells = [entry["job"], f"{entry['scheduler']} {entry['id']}", entry["state"], entry.get("restarts", "")]
        cells += [entry.get("nodes", ""), entry.get("run_time", ""), "" if reason == "None" else reason]
        table.add_row(*map(Text, cells))
    return table


def _newest_log(folder: Path, entries: list[dict[str, Any]]) -> Path | None:
    files = [Path(name) for entry in entries if entry["log"] for name in glob.glob(entry["log"])]
    files += [folder / "log" / "rank0.log"]
    there = [file for file in files if file.is_file()]
    return max(there, key=lambda file: file.stat().st_mtime, default=None)


def _is_alive(folder: Path) -> bool:
    """Whether a process holds the folder, as far as this machine's file system tells; nothing is taken from it."""
    try:
        check_free(folder)
    except (InputError, OSError):
        return True
    return False


def _folder(run: str) -> Path:
    folder = Path(run)
    if not folder.is_dir():
        raise InputError(f"run: {folder} is not a folder; give the folder that was named when the job was started")
    return folder
