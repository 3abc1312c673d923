"""A rank of the gather tests: contrastive loss with gathered features, and the gradients of this rank's features.

Arguments: a JSON object {out}. Each rank writes what it found to `out`/<rank>.pt.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from cluster.process import close_group, from_environment, start_group
from dermfm import losses


def main() -> None:
    """Loss and gradients of the rows that this rank holds, for every contrastive form."""
    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    process = from_environment("cpu")
    start_group(process)
    try:
        inputs = torch.load(Path(job["out"]) / "inputs.pt", weights_only=True)
        size = len(inputs["group"]) // process.world
        own = slice(process.rank * size, (process.rank + 1) * size)
        found = {}
        for name, form in losses.CONTRASTIVE.items():
            image, text = (inputs[k][own].clone().requires_grad_() for k in ("image", "text"))
            scale = inputs["scale"].clone().requires_grad_()
            pairs = losses.describe_pairs(
                *(inputs[k] for k in ("group", "words", "label", "valid")), process.rank * size, size
            )
            unit = [F.normalize(x, dim=1) for x in (image, text)]
            everyone = [losses.gather(x) for x in unit]
            loss = form(*unit, *everyone, scale, pairs) / inputs["valid"].sum()
            loss.backward()
            total = loss.detach().clone()
            dist.all_reduce(total)
            dist.all_reduce(scale.grad)
            found[name] = {"loss": total, "image": image.grad, "text": text.grad, "scale": scale.grad}
            found[name]["gathered"] = everyone[0].detach()
        torch.save(found, Path(job["out"]) / f"{process.rank}.pt")
    finally:
        close_group()


if __name__ == "__main__":
    main()
