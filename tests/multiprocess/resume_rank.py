"""A rank of the resume tests: runs several training jobs one after another in one process group.

Arguments: a JSON file {out, jobs: [job, …]}. A job is {config} with optional `copy_from` (a run folder that is copied
to the job's own before it starts), `damage` (a file of the run that is cut short then), `stop` ([rank, step]: that rank
alone gets SIGTERM in that step), `fail` ([rank, step]: that rank alone raises) and `frozen` (a copy of the run folder,
made after the job). The first rank writes the exit codes of the jobs so far to `out`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import dermfm.train
from cluster.preemption import StopFlag
from cluster.process import Process, close_group, from_environment, start_group
from dermfm.config import from_dict
from dermfm.plan import TrainConfig
from dermfm.run import record

optimizer_step = dermfm.train.optimizer_step


def run_job(job: dict[str, Any], process: Process) -> int:
    """Prepare the run folder on the first rank, train, keep a copy; the exit code."""
    config = from_dict(TrainConfig, job["config"], "job")
    if process.is_first:
        prepare(job, config)
    dist.barrier()
    seen = json.loads((Path(config.run) / "seen").read_text())
    dermfm.train.optimizer_step = disturbed(job, process, seen)
    code = dermfm.train.train(config, process, dermfm.train.resume_source(config, process), StopFlag().install())
    dist.barrier()
    if process.is_first and "frozen" in job:
        shutil.copytree(config.run, job["frozen"])
    return code


def prepare(job: dict[str, Any], config: TrainConfig) -> None:
    """The run folder before the job: a copy with its damage, the record, and the step that the run goes on from."""
    folder = Path(config.run)
    if "copy_from" in job:
        shutil.copytree(job["copy_from"], folder)
    if "damage" in job:
        path = next((folder / "ckpt").glob(job["damage"]))
        path.write_bytes(path.read_bytes()[:-7])
    dermfm.train.prepare(config)
    record(folder, config)
    steps = dermfm.train.checkpoint.complete_steps(folder / "ckpt")
    (folder / "seen").write_text(json.dumps(steps[-1] if steps else 0))


def disturbed(job: dict[str, Any], process: Process, step: int) -> Any:
    """The optimizer step that stops or fails where the job says so."""

    def run(*arguments: Any) -> dict[str, float]:
        nonlocal step
        step += 1
        if job.get("fail") == [process.rank, step]:
            (Path(job["config"]["run"]) / "failed").write_text(str(time.time()))
            raise RuntimeError(f"made to fail in step {step}")
        values = optimizer_step(*arguments)
        if job.get("stop") == [process.rank, step]:
            os.kill(os.getpid(), signal.SIGTERM)
        return values

    return run


def main() -> None:
    """Run the jobs."""
    plan = json.loads(Path(sys.argv[1]).read_text())
    process = from_environment("cpu")
    logging.basicConfig(format=f"rank {process.rank}: %(message)s", level=logging.WARNING)
    torch.set_num_threads(1)
    start_group(process)
    try:
        codes = []
        for job in plan["jobs"]:
            codes.append(run_job(job, process))
            if process.is_first:
                Path(plan["out"]).write_text(json.dumps(codes))
    finally:
        close_group()


if __name__ == "__main__":
    main()
