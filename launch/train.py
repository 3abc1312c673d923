"""Pretrain the image-text model on WebDataset shards with DeepSpeed ZeRO.

Under srun or torchrun every task is a rank; without a launcher `ranks=N` starts N processes here. Ctrl-C, SIGTERM and
SIGUSR1 write a checkpoint and exit 75; the same command goes on from it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from pathlib import Path

from cluster.local import run_ranks
from cluster.process import Process, close_group, from_environment, is_launched, start_group
from dermfm.plan import TrainConfig, describe
from dermfm.run import record, take_lock
from dermfm.train import is_done, prepare, resume_source, train


def schema(_: object) -> type:
    """The config dataclass of this job."""
    return TrainConfig


def run(config: TrainConfig, call: object) -> int:
    """Start the ranks where no launcher did, or be one of them."""
    world = from_environment(config.device).world if is_launched() else local_ranks(config)
    if getattr(call, "dry_run", False):
        print(describe(config, world))
        return 0
    if not is_launched():
        describe(config, world)  # every check that needs no process group, once, before any rank starts
        if is_done(config, world):
            print(f"{config.run}: done, nothing to train; a larger epochs= continues")
            return 0
        take_lock(Path(config.run)).close()
        return run_ranks([sys.executable, "-m", "launch.cli", *sys.argv[1:]], world)
    return run_rank(config, from_environment(config.device))


def run_rank(config: TrainConfig, process: Process) -> int:
    """One rank, from process group to exit code."""
    import torch

    logging.basicConfig(
        format=f"rank {process.rank}: %(message)s", level=logging.INFO if process.is_first else logging.WARNING
    )
    torch.set_num_threads(config.threads or max((os.cpu_count() or 1) // process.local_world, 1))
    lock = take_lock(Path(config.run)) if process.is_first else contextlib.nullcontext()
    with lock:
        if process.is_first:
            prepare(config)
        source = resume_source(config, process)
        if process.is_first:
            record(Path(config.run), config)  # only now: a refused resume leaves the run's record as it was
        start_group(process)
        try:
            return train(config, process, source)
        finally:
            close_group()


def local_ranks(config: TrainConfig) -> int:
    """How many processes to start on this machine."""
    if config.ranks:
        return config.ranks
    import torch

    return max(torch.cuda.device_count(), 1) if config.device != "cpu" else 1
