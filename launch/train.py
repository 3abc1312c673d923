"""Pretrain the image-text model on WebDataset shards with DeepSpeed ZeRO.

Under srun or torchrun every task is a rank; without a launcher `ranks=N` starts N processes here. Ctrl-C, SIGTERM and
SIGUSR1 write a checkpoint and exit 75; the same command goes on from it.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from pathlib import Path

from cluster.local import run_ranks
from cluster.preemption import StopFlag
from cluster.process import (
    Process,
    close_group,
    default_ranks,
    default_threads,
    from_environment,
    is_launched,
    start_group,
)
from dermfm.config import InputError
from dermfm.plan import TrainConfig, describe
from dermfm.run import record, take_lock
from dermfm.train import is_done, prepare, resume_source, train
from shards.manifest import ShardError


def schema(_: object) -> type:
    """The config dataclass of this job."""
    return TrainConfig


def run(config: TrainConfig, call: object) -> int:
    """Start the ranks where no launcher did, or be one of them."""
    launched = is_launched()
    world = from_environment(config.device).world if launched else default_ranks(config.ranks, config.device)
    if getattr(call, "dry_run", False):
        print(describe(config, world))
        return 0
    if launched:
        return run_rank(config, from_environment(config.device))
    describe(config, world)  # every check that needs no process group, once, before any rank starts
    if is_done(config, world):
        print(f"{config.run}: done, nothing to train; a larger epochs= continues")
        return 0
    take_lock(Path(config.run)).close()
    return run_ranks([sys.executable, "-m", "launch.cli", *sys.argv[1:]], world)


def run_rank(config: TrainConfig, process: Process) -> int:
    """One rank, from process group to exit code. A stop asked for while it starts counts at the first step border."""
    import torch

    stop = StopFlag().install()
    torch.set_num_threads(default_threads(config.threads, process.local_world))
    folder = Path(config.run)
    lock = take_lock(folder) if process.is_first else contextlib.nullcontext()
    with lock:
        write_logs(folder, process)
        if process.is_first:
            prepare(config)
        source = resume_source(config, process)
        if process.is_first:
            record(folder, config)  # only now: a refused resume leaves the run's record as it was
        start_group(process)
        try:
            return train(config, process, source, stop)
        except Exception as error:
            # The command line tells of the first rank's bad input; of another rank's only this line does.
            told = isinstance(error, InputError | ShardError) and not process.is_first
            logging.getLogger(__name__).error("failed: %s", error, exc_info=not told)
            raise
        finally:
            close_group()


def write_logs(run: Path, process: Process) -> None:
    """Log to the terminal (of the other ranks only warnings) and to <run>/log/rank<N>.log."""
    (run / "log").mkdir(parents=True, exist_ok=True)
    terminal = logging.StreamHandler(sys.stdout)
    terminal.setLevel(logging.INFO if process.is_first else logging.WARNING)
    terminal.setFormatter(logging.Formatter("%(message)s" if process.is_first else f"rank {process.rank}: %(message)s"))
    terminal.addFilter(lambda entry: entry.exc_info is None)  # Python prints a traceback once, on its way out
    file = logging.FileHandler(run / "log" / f"rank{process.rank}.log")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[terminal, file])
