"""A process of the evaluation test: one rank of a job whose model is built from a seed.

Arguments: the run directory, the output folder, the folder of shards. Ranks come from the environment.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from cluster.process import close_group, from_environment, start_group
from dermfm.config import from_dict, read_yaml
from dermfm.evaluate import job
from dermfm.evaluate.ranks import current_ranks
from dermfm.model.dermfm import DermFM, ModelConfig


def seeded_model(path: str, device: str = "cpu") -> Any:
    """The model of the run's configuration with weights of seed 0, the same in every process."""
    values = read_yaml(Path(path).parents[1] / "config.yaml")["model"]
    torch.manual_seed(0)
    return DermFM(from_dict(ModelConfig, values, path)).eval()


def main() -> None:
    """Run this rank."""
    run, out, shards = sys.argv[1:]
    torch.set_num_threads(1)
    job.load_model = seeded_model
    process = from_environment("cpu")
    if process.world > 1:
        start_group(process)
    try:
        every = {"tasks": list(job.TASKS), "rerank": 3, "shots": [2], "few_shot_draws": 2, "subgroup_min": 10}
        own = {"run": run, "out": out, "shards": shards, "resamples": 30, "batch_size": 8, "device": "cpu"}
        config = job.EvaluateConfig(**own, **every)
        job.evaluate(config, current_ranks())
    finally:
        close_group()


if __name__ == "__main__":
    main()
