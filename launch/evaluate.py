"""dermfm evaluate: score a checkpoint on held-out records, per data set and partition.

  dermfm evaluate run=runs/demo
  dermfm evaluate configs/evaluate/strict.yaml checkpoint=runs/demo/ckpt/step-00000400 shards=runs/other/shards

Writes metrics.json, embeddings.safetensors, ids.parquet and predictions.parquet under <run>/eval/<step>/. Under srun or
torchrun every task is a rank; without a launcher `ranks=N` starts N processes here (on a CPU, one a core is fastest).
An interrupted call continues; embeddings of the same checkpoint are used again. --dry-run prints what would be scored.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from cluster.local import run_ranks
from cluster.process import (
    close_group,
    default_ranks,
    default_threads,
    from_environment,
    is_launched,
    python_command,
    start_group,
)
from dermfm.evaluate.job import EvaluateConfig, evaluate, make_plan
from dermfm.evaluate.ranks import current_ranks
from dermfm.evaluate.summary import print_summary

if TYPE_CHECKING:
    from launch.cli import Call


def schema(call: Call) -> type[EvaluateConfig]:
    """The job's configuration."""
    return EvaluateConfig


def check(config: EvaluateConfig, _: int) -> None:
    """What the job would refuse at its start, for `submit`."""
    make_plan(config)


def run(config: EvaluateConfig, call: Call) -> int:
    """Start the ranks where no launcher did, or be one of them."""
    plan = make_plan(config)
    if call.dry_run:
        print("\n".join(plan.lines(config)))
        return 0
    world = default_ranks(config.ranks, config.device)
    if world > 1 and not is_launched():
        return run_ranks([*python_command("launch.cli"), *sys.argv[1:]], world)
    return run_rank(config)


def run_rank(config: EvaluateConfig) -> int:
    """One rank: score, print the main table, 0 when done."""
    import torch

    process = from_environment(config.device)
    torch.set_num_threads(default_threads(0, process.local_world))
    if process.world > 1:
        start_group(process)
    try:
        path = evaluate(config, current_ranks(), process.device)
    finally:
        close_group()
    if process.is_first:
        print_summary(path)
    return 0
