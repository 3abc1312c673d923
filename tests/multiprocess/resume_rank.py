"""A rank of the resume tests: runs several training jobs one after another in one process group.

Arguments: a JSON file {out, jobs: [job, …]}. A job is {config} with optional `copy_from` (a run folder that is copied
to the job's own before it starts), `damage` (a file of the run that is cut short then), `stop` ([rank, step]: that rank
alone gets SIGTERM in that step), `poison` ([rank, step]: that rank's images make the loss NaN) and `frozen` (a copy of
the run folder, made after the job). The first rank writes the exit codes of the jobs so far to `out`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import dermfm.train
from cluster.preemption import StopFlag
from cluster.process import Process, close_group, from_environment, meet, start_group
from cluster.watchdog import Watch
from dermfm.border import RunError
from dermfm.config import from_dict
from dermfm.plan import TrainConfig
from dermfm.resume import resume_source

optimizer_step = dermfm.train.optimizer_step


def run_job(job: dict[str, Any], process: Process, watch: Watch) -> int:
    """Prepare the run folder on the first rank, train, keep a copy; the exit code, 1 for an agreed end."""
    config = from_dict(TrainConfig, job["config"], "job")
    if process.is_first:
        prepare(job, Path(config.run))
    source = resume_source(config, process, watch)
    dermfm.train.optimizer_step = disturbed(job, process, source.state.step if source else 0)
    try:
        code = dermfm.train.train(config, process, source, StopFlag().install(), watch)
    except RunError as error:
        logging.error("%s", error)
        code = 1
    dist.barrier()
    if process.is_first and "frozen" in job:
        shutil.copytree(config.run, job["frozen"])
    return code


def prepare(job: dict[str, Any], folder: Path) -> None:
    """The run folder before the job: a copy with its damage."""
    if "copy_from" in job:
        shutil.copytree(job["copy_from"], folder)
    if "damage" in job:
        path = next((folder / "ckpt").glob(job["damage"]))
        path.write_bytes(path.read_bytes()[:-7])


def disturbed(job: dict[str, Any], process: Process, step: int) -> Any:
    """The optimizer step that is stopped or poisoned where the job says so."""

    def run(engine: Any, batch: Any, *arguments: Any) -> dict[str, float]:
        nonlocal step
        step += 1
        if job.get("poison") == [process.rank, step]:
            hook = engine.module.image.register_forward_hook(lambda *o: (o[2][0], o[2][1] * float("nan")))
            values = optimizer_step(engine, batch, *arguments)
            hook.remove()
            return values
        values = optimizer_step(engine, batch, *arguments)
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
    watch = Watch(process, meet(process, "watch"), Path(sys.argv[1]).with_suffix(f".{process.rank}.log"))
    start_group(process)
    codes = []
    for job in plan["jobs"]:
        codes.append(run_job(job, process, watch))
        if process.is_first:
            Path(plan["out"]).write_text(json.dumps(codes))
    watch.close()
    close_group()


if __name__ == "__main__":
    main()
