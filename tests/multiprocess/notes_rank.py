"""A rank of the tests of a sharded language model: it generates (rank 0) or follows.

Arguments: a JSON object {model, out, port, requests, fail}. Rank 0 writes the generations, and every rank the number of
weights that it holds, to `out`. With `fail`, rank 1 dies at its second job.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from cluster.replicas import ReplicaLost
from dermfm.notes.engines.protocol import EngineConfig, Request
from dermfm.notes.engines.seat import Seat
from dermfm.notes.engines.transformers import TransformersEngine, build


def main() -> None:
    """One rank's part."""
    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    rank, world, out = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), Path(job["out"])
    config = EngineConfig(model=job["model"], tensor_parallel=world, batch_size=4, max_new_tokens=12)
    engine = build(config, Seat(rank, world, "127.0.0.1", job["port"]))
    held = sum(local(p).numel() for p in engine.model.parameters())
    (out / f"weights-{rank}.json").write_text(json.dumps(held))
    if rank:
        follow(engine, job["fail"])
        return
    requests = [Request(**{**r, "messages": tuple(map(tuple, r["messages"]))}) for r in job["requests"]]
    try:
        (out / "texts.json").write_text(json.dumps([g.text for g in engine.generate(requests)]))
        engine.close()
    except ReplicaLost as error:
        (out / "lost.json").write_text(json.dumps(str(error)))


def local(weight: torch.Tensor) -> torch.Tensor:
    """The part of a weight that this rank holds."""
    return weight.to_local() if hasattr(weight, "to_local") else weight


def follow(engine: TransformersEngine, fail: bool) -> None:
    """Follow, or die in the middle."""
    if fail:
        assert engine.table is not None
        engine._run(engine.table.hear())
        engine.table.hear()
        os._exit(0)
    engine.follow()


if __name__ == "__main__":
    main()
