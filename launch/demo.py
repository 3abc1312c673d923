"""Run the whole chain: records → notes → shards → train → evaluate → report, each as a process of its own.

`dermfm demo configs/demo.yaml` draws the embedded atlas; `dermfm demo configs/demo-real.yaml data=<folder>` reads real
images. Every job continues where an earlier call stopped. A folder that holds a chain of other data is set aside.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cluster.preemption import SIGNALS
from cluster.process import BAD_INPUT, python_command
from cluster.usage import PeakMemory
from dermfm.config import to_yaml
from dermfm.pipeline import CHAIN, JOBS, PipelineConfig, set_aside
from dermfm.progress import duration
from shards.files import write_text


def schema(_: Any) -> type[PipelineConfig]:
    """The job's configuration."""
    return PipelineConfig


def run(config: PipelineConfig, call: Any) -> int:
    """Run the jobs in order; the first that does not end with 0 ends the chain with its exit code."""
    out = Path(config.out)
    if call.dry_run:
        print(f"{out}: " + " → ".join(JOBS))
        with tempfile.TemporaryDirectory() as folder:
            return run_job("records", config.records, Path(folder), "--dry-run")
    moved = set_aside(config)
    if moved is not None:
        print(f"{out} held a chain of other records; it is now {moved}")
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / CHAIN, to_yaml(config))
    spent: dict[str, float] = {}
    with PeakMemory() as memory:
        for job in JOBS:
            print(f"\n── {job} {'─' * (70 - len(job))}", flush=True)
            began = time.monotonic()
            code = run_job(job, getattr(config, job), out / "jobs")
            spent[job] = time.monotonic() - began
            if code == BAD_INPUT:
                return code  # the job has said its one line, and the same command would not continue
            if code:
                print(f"dermfm demo: {job} ended with exit code {code}; the same command continues", file=sys.stderr)
                return code
    parts = ", ".join(f"{job} {duration(s)}" for job, s in spent.items())
    print(f"\ndone in {duration(sum(spent.values()))} ({parts}); peak memory {memory.peak / 1e9:.1f} GB")
    print(f"see {out / 'report.html'}, and the curves with: tensorboard --logdir {out / 'tb'}")
    return 0


def run_job(job: str, config: Any, folder: Path, *flags: str) -> int:
    """Run one job in a process of its own on its part of the configuration, written to `folder`; its exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder / f"{job}.yaml"
    write_text(settings, to_yaml(config))
    process: list[subprocess.Popen] = []
    asked: list[int] = []

    def forward(number: int, _: Any) -> None:
        """Ctrl-C reaches the job by itself, the others through this; the job ends in its own time."""
        asked.append(-number)
        if number != signal.SIGINT:
            for one in process:
                one.send_signal(number)

    handlers = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        process.append(subprocess.Popen([*python_command("launch.cli"), job, str(settings), *flags]))
        code = process[0].wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if code in asked:
        return 75  # a job that takes no signal over: what it had finished stays
    return code if code >= 0 else 1
