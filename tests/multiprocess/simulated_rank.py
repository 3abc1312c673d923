"""Rank 1,000 of 1,024 that exists alone: DeepSpeed's engine over a fake process group, one whole optimizer step.

Arguments: one JSON object {model, stages, out}. Writes to `out` a JSON list of the losses, one row a stage, with
`optimizer`: the elements of float32 parameters that this rank's optimizer steps.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from memory_rank import BATCH, SIZE, TOKENS

from dermfm import zero
from dermfm.config import from_dict
from dermfm.gradients import Gradients
from dermfm.model.dermfm import DermFM, ModelConfig
from dermfm.optimizer import OptimizerConfig, parameter_groups
from dermfm.simulate import blank_batch, fake_group
from dermfm.step import ObjectiveConfig, optimizer_step

WORLD, RANK = 1024, 1000


def step_at(stage: int, values: dict[str, Any]) -> dict[str, float]:
    """Build the engine, accumulate two micro-batches, step."""
    torch.manual_seed(0)
    model = DermFM(from_dict(ModelConfig, values, "test")).train()
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    settings = zero.deepspeed_json(
        zero.ZeroConfig(stage=stage, bucket_elements=10_000), micro_batch=BATCH // 2, num_micro=2, world=WORLD,
        optimizer={"lr": 1e-3, "betas": [0.9, 0.98], "eps": 1e-6}, device="cpu", num_learning=learning,
        num_parameters=total,
    )  # fmt: skip
    engine = zero.initialize(model, parameter_groups(model, OptimizerConfig()), settings, "cpu")
    gradients = Gradients(engine)
    values = optimizer_step(engine, blank_batch(BATCH, TOKENS, SIZE), BATCH // 2, ObjectiveConfig())
    gradients.step()
    stepped = getattr(engine.optimizer, "optimizer", engine.optimizer).param_groups
    own = sum(p.numel() for group in stepped for p in group["params"])
    return {**values, "optimizer": own, "learning": learning, "groups": len(stepped)}


def main() -> None:
    """One rank's step at every stage."""
    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(RANK), "WORLD_SIZE": str(WORLD), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    with fake_group(WORLD, RANK):
        rows = [step_at(stage, job["model"]) for stage in job["stages"]]
    Path(job["out"]).write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
