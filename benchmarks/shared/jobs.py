"""`dermfm train` as a benchmark runs it: ranks pinned to cores, batches that wait in memory, other loops in turn."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dermfm.model.dermfm import DermFM
from dermfm.samples import Batch

ROOT = Path(__file__).resolve().parents[2]
RANKS = "import sys; from cluster.local import run_ranks; sys.exit(run_ranks(sys.argv[2:], int(sys.argv[1])))"
Step = Callable[[Batch], Tensor]


def pin() -> None:
    """One thread on one core of its own, as far as the machine has them: by rank, from FIRST_CORE on."""
    cores = sorted(os.sched_getaffinity(0))
    own = int(os.environ.get("RANK", 0)) + int(os.environ.get("FIRST_CORE", 0))
    os.sched_setaffinity(0, {cores[own % len(cores)]})
    torch.set_num_threads(1)


class InTurn:
    """Batches for `dermfm train` that run a step of each bare loop between its own: what disturbs one disturbs all.

    A step of the job is all that it does between two batches, its agreement, guards and logging included.
    """

    def __init__(self, loops: dict[str, Callable[[], Step]], batch: Callable[[Any], Batch], out: str) -> None:
        self._loops, self._batch, self._out = loops, batch, Path(out)
        self.times: dict[str, list[float]] = {name: [] for name in ("ours", *loops)}
        self.losses: dict[str, list[float]] = {name: [] for name in loops}
        self._samples = 0

    def batches(self, config: Any, model: DermFM, *rest: Any) -> Iterator[Batch]:
        """Stands where the job's reading, decoding and augmenting do."""
        batch = self._batch(model.tokenizer)
        self._samples = len(batch) * dist.get_world_size()
        steps = {name: made() for name, made in self._loops.items()}
        while True:
            for name, step in steps.items():
                self._timed(name, lambda step=step: step(batch))
            dist.barrier()
            began = time.perf_counter()
            yield batch
            self.times["ours"].append(time.perf_counter() - began)

    def _timed(self, name: str, step: Callable[[], Tensor]) -> None:
        dist.barrier()
        began = time.perf_counter()
        loss = step()
        self.times[name].append(time.perf_counter() - began)
        self.losses[name].append(loss.item())

    def write(self) -> None:
        """samples/s of all ranks by side: medians over steps but the first two, which warm up; each loop's first loss.

        SystemExit where the bare loops have come to other losses: then they were not the same work.
        """
        last = {name: losses[-1] for name, losses in self.losses.items()}
        if any(abs(loss / last["ddp"] - 1) > 1e-3 for loss in last.values()):
            raise SystemExit(f"the loops do not compute the same: losses {last}")
        told = {name: self._samples / statistics.median(own[2:]) for name, own in self.times.items() if own[2:]}
        told |= {f"{name}: first loss": losses[0] for name, losses in self.losses.items()}
        self._out.write_text(json.dumps(told))


def in_turn_with(sides: InTurn, arguments: list[str]) -> int:
    """`dermfm train` over the batches of `sides`; the first rank writes what they have measured."""
    code = over_batches(sides.batches, arguments)
    if code == 0 and os.environ["RANK"] == "0":
        sides.write()
    return code


def over_batches(batches: Callable[..., Iterator[Batch]], arguments: list[str]) -> int:
    """`dermfm train` over what `batches` gives in the place of the job's reading, decoding and augmenting."""
    import dermfm.train as job
    from launch.cli import main as dermfm_main

    setattr(job, "_batches", batches)  # noqa: B010, its signature is wider
    return dermfm_main(["train", *arguments])


def run(script: str, world: int, *arguments: str, first_core: int = 0, told: Mapping[str, str] | None = None) -> None:
    """A script as `world` ranks; `told`: more variables of its environment."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    environment |= {"FIRST_CORE": str(first_core), **(told or {})}
    command = [sys.executable, "-c", RANKS, str(world), sys.executable, script, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{arguments[0]} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
