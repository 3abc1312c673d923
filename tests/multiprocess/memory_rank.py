"""A rank of the memory tests: one optimizer step under several (ZeRO stage, precision), counting bytes of tensors held.

Arguments: one JSON object {model, cases: [{stage, precision}], folder}. Every rank writes <folder>/rank<N>.json, a list
of {states, resident, learning, frozen, other, checkpoint}: bytes of all tensors that the case has made and that are
alive between backward and optimizer step; resident memory of the process; elements that learn and that are frozen;
bytes that are no model state (batch, buffers of the model); bytes of the checkpoint's files on disk.
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from cluster.process import close_group, from_environment, start_group
from dermfm import zero
from dermfm.config import from_dict
from dermfm.model.dermfm import DermFM, ModelConfig
from dermfm.optimizer import OptimizerConfig, parameter_groups
from dermfm.simulate import blank_batch
from dermfm.step import ObjectiveConfig, optimizer_step

BATCH, TOKENS, SIZE = 4, 8, 32
BUCKET = 10_000  # small beside the model, so that what is compared is the model's states


def alive() -> dict[int, Tensor]:
    """One tensor of every storage that Python can reach, gradients included, by the storage's address."""
    gc.collect()
    found: dict[int, Tensor] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gc also hands out modules that warn when they are looked at
        for thing in gc.get_objects():
            if isinstance(thing, Tensor):
                for tensor in (thing, thing.grad if thing.is_leaf else None):
                    if tensor is not None and tensor.device.type == "cpu":
                        found[tensor.untyped_storage().data_ptr()] = tensor
    return found


def run_case(job: dict[str, Any], case: dict[str, Any], rank: int, world: int) -> dict[str, float]:
    """Build the engine, accumulate one batch, count, step, save."""
    before = alive()  # held until the end: an address in it cannot be given to anything else
    torch.manual_seed(0)
    model = DermFM(from_dict(ModelConfig, job["model"], "test")).train()
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    # Stage 3 keeps small tensors whole (by default those below 100,000 elements, here all): none, to see the formula.
    extra = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if case["stage"] == 3 else {}
    config = zero.ZeroConfig(stage=case["stage"], precision=case["precision"], bucket_elements=BUCKET, extra=extra)
    settings = zero.deepspeed_json(
        config, micro_batch=BATCH, num_micro=1, world=world, device="cpu",
        optimizer={"lr": 1e-3, "betas": [0.9, 0.98], "eps": 1e-6}, num_learning=learning, num_parameters=total,
    )  # fmt: skip
    engine = zero.initialize(model, parameter_groups(model, OptimizerConfig()), settings, "cpu")
    batch = blank_batch(BATCH, TOKENS, SIZE)
    for _ in range(2):  # moments are there after the first step only
        optimizer_step(engine, batch, BATCH, ObjectiveConfig())
        held = sum(t.untyped_storage().nbytes() for name, t in alive().items() if name not in before)
        engine.step()
    other = [*model.buffers(), *(value for value in vars(batch).values() if isinstance(value, Tensor))]
    folder = Path(job["folder"]) / f"checkpoint-{world}"
    zero.save(engine, folder, "one", {})
    zero.written(engine, folder / "one")  # waits for the writer in the background
    dist.barrier()
    row = {
        "states": held,
        "resident": psutil.Process().memory_info().rss,
        "learning": learning,
        "frozen": total - learning,
        "other": sum(tensor.nbytes for tensor in other),
        "checkpoint": sum(path.stat().st_size for path in folder.rglob("*.pt")),
    }
    dist.barrier()
    if rank == 0:
        shutil.rmtree(folder)
    engine.destroy()
    return row


def main() -> None:
    """Run all cases in one process group."""
    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    process = from_environment("cpu")
    start_group(process)
    try:
        rows = [run_case(job, case, process.rank, process.world) for case in job["cases"]]
        (Path(job["folder"]) / f"rank{process.rank}.json").write_text(json.dumps(rows))
    finally:
        close_group()


if __name__ == "__main__":
    main()
