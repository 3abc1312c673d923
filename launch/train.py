"""Pretrain the image-text model on WebDataset shards with DeepSpeed ZeRO.

Under srun or torchrun every task is a rank; without a launcher `ranks=N` starts N processes here, and `ray.workers=N`
N ranks on a Ray cluster (`ray.address=`), which starts them again from the last checkpoint where one is lost. Ctrl-C,
SIGTERM and SIGUSR1 write a checkpoint and exit 75; the same command goes on from it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from cluster.local import run_ranks
from cluster.process import default_ranks, from_environment, is_launched, python_command
from dermfm.on_ray import train_on_ray
from dermfm.plan import TrainConfig, check_here, describe
from dermfm.rank import run_rank
from dermfm.resume import is_done
from dermfm.run import check_free, check_writable
from dermfm.scale_table import show_run


def schema(_: object) -> type:
    """The config dataclass of this job."""
    return TrainConfig


def check(config: TrainConfig, world: int) -> None:
    """What a run of `world` ranks would refuse at its start, for `submit`."""
    for ranks in range(config.ray.least, config.ray.most + 1) if config.ray.most else [world]:
        describe(config, ranks)  # Ray may choose any of them


def run(config: TrainConfig, call: object) -> int:
    """Start the ranks where no launcher did, or be one of them."""
    launched = is_launched()
    alone = config.ray.most or default_ranks(config.ranks, config.device)
    world = from_environment(config.device).world if launched else alone
    if getattr(call, "dry_run", False):
        told = describe(config, world)
        check_here(config)
        print(told)
        show_run(config, world)
        return 0
    if launched:
        return run_rank(config, from_environment(config.device))
    check(config, world)  # all that needs no process group, once, before any rank starts
    check_here(config)
    if is_done(config, world):
        print(f"{config.run}: done, nothing to train; a larger epochs= continues")
        return 0
    check_free(Path(config.run))
    check_writable(Path(config.run))
    if config.ray.most:
        return train_on_ray(config)
    return run_ranks([*python_command("launch.cli"), *sys.argv[1:]], world)
