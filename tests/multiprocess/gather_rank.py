"""A rank of the gather tests: contrastive loss with gathered features, and the gradients of this rank's features.

Arguments: a JSON object {out}. Each rank writes what it found to `out`/<rank>.pt.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from cluster.process import close_group, from_environment, start_group
from dermfm import losses


def main() -> None:
    """Loss and gradients of the rows that this rank holds, for every contrastive form, whole and in chunks."""
    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    process = from_environment("cpu")
    start_group(process)
    try:
        inputs = torch.load(Path(job["out"]) / "inputs.pt", weights_only=True)
        size = len(inputs["group"]) // process.world
        own = slice(process.rank * size, (process.rank + 1) * size)
        found = {}
        for name, chunk in itertools.product(losses.CONTRASTIVE, (2**24, 2 * len(inputs["group"]))):
            leaves = {k: inputs[k][own].clone().requires_grad_() for k in ("image", "text")}
            leaves |= {k: inputs[k].clone().requires_grad_() for k in ("scale", "bias")}
            unit = [F.normalize(leaves[k], dim=1) for k in ("image", "text")]

            def describe(first: int, rows: int) -> losses.Pairs:
                columns = (inputs[k] for k in ("group", "words", "label", "valid"))
                return losses.describe_pairs(*columns, process.rank * size + first, rows)

            # The second chunk holds two rows: similarities are made, dropped and made again for the gradient.
            loss = losses.contrast({name: leaves["scale"]}, *unit, describe, leaves["bias"], chunk)
            loss = loss / inputs["valid"].sum()
            loss.backward()
            total = loss.detach().clone()
            dist.all_reduce(total)
            gradients = {k: torch.zeros_like(x) if x.grad is None else x.grad for k, x in leaves.items()}
            for k in ("scale", "bias"):
                dist.all_reduce(gradients[k])
            found[f"{name}-{chunk}"] = {"loss": total, **gradients}
            found["gathered"] = losses.gather(unit[0]).detach()
        torch.save(found, Path(job["out"]) / f"{process.rank}.pt")
    finally:
        close_group()


if __name__ == "__main__":
    main()
