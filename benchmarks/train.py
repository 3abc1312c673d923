"""Training: `dermfm train` against a bare DDP loop, what grad cache costs, checkpoint stalls, two ranks against one.

    python benchmarks/train.py [--quick]

Every side runs in processes of its own with one thread a rank, each pinned to a core, in alternating rounds; figures
are medians. `dermfm train` is the real job: shards on disk, decoding, augmentation, ZeRO stage 1, logging. The bare
loop has the same model, world, batch and objectives (contrast and image classification), torch's DDP and AdamW, and
batches that wait in memory.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this script's own folder would shadow `shards`

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from benchmarks.shared.figures import figure, show
from cluster.process import close_group, from_environment, start_group
from dermfm import losses
from dermfm.config import from_dict
from dermfm.model.dermfm import DermFM, ModelConfig
from dermfm.samples import Batch, tokenize
from dermfm.simulate import blank_batch
from shards.manifest import write_manifest
from shards.writer import write_shard

ROOT = Path(__file__).resolve().parents[1]
SIZE, TOKENS, NUM_SAMPLES = 128, 32, 512
OWN = 16  # samples of a rank and step
EPOCH = 10_000  # samples between checkpoints that the stall's share is told for: the default is one epoch
MODEL: dict[str, Any] = {
    "image": {"name": "vit_tiny_patch16_224", "size": SIZE},
    "text": {"pretrained": False, "max_tokens": TOKENS, "train_blocks": 2},
    "fusion": {"depth": 1, "width": 64, "heads": 2},
    "embed_dim": 128,
}
OBJECTIVES = {"matching": 0.0, "classify_text": 0.0, "classify_fused": 0.0}
RANKS = "import sys; from cluster.local import run_ranks; sys.exit(run_ranks(sys.argv[2:], int(sys.argv[1])))"


def note(number: int) -> str:
    """A note of about 25 tokens, unlike any other."""
    return (
        f"A pigmented lesion number {number} of the left forearm with an irregular border, brown and black, 7 mm wide."
    )


def make_shards(folder: Path) -> None:
    """One shard of noisy JPEGs with a note each."""
    rng = np.random.default_rng(0)
    samples: list[dict[str, str | bytes]] = []
    for i in range(NUM_SAMPLES):
        encoded = io.BytesIO()
        coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        coarse.resize((224, 224), Image.Resampling.BICUBIC).save(encoded, "JPEG", quality=90)
        notes = [{"strategy": "template", "text": note(i)}]
        fields = {"record_id": f"r{i}", "group_id": f"g{i}", "label": i % 8, "notes": notes}
        samples.append({"__key__": f"r{i:06d}", "jpg": encoded.getvalue(), "json": json.dumps(fields).encode()})
    info = write_shard(folder, "train-00000.tar", "train", samples)
    write_manifest(folder, [info], {"strategies": {"template": NUM_SAMPLES}})


def pin() -> None:
    """One thread on one core of its own, as far as the machine has them."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ.get("RANK", 0)) % len(cores)]})
    torch.set_num_threads(1)


class Loss(nn.Module):
    """Model and loss in one forward, as DDP wants it; the parts that no objective reads are frozen."""

    def __init__(self, model: DermFM) -> None:
        super().__init__()
        self.model = model
        for part in (model.fusion, model.match_head, model.text_head, model.fused_head):
            part.requires_grad_(False)

    def forward(self, batch: Batch) -> Tensor:
        """Symmetric cross-entropy over the pairs of all ranks, and of the image classes."""
        image = self.model("image", pixels=batch.pixels)
        text = self.model("text", tokens=batch.tokens, lengths=batch.lengths)
        scale = text["logit_scale"].exp()
        target = torch.arange(len(batch)) + dist.get_rank() * len(batch)
        left = scale * image["embedding"] @ losses.gather(text["embedding"]).T
        right = scale * text["embedding"] @ losses.gather(image["embedding"]).T
        contrast = (F.cross_entropy(left, target) + F.cross_entropy(right, target)) / 2
        return contrast + F.cross_entropy(image["logits"], batch.labels)


def bare_rank(num_steps: int, out: str) -> None:
    """A rank of the bare loop; the first writes samples/s of all ranks, the median over the steps, to `out`."""
    pin()
    process = from_environment("cpu")
    start_group(process)
    torch.manual_seed(0)
    model = DermFM(from_dict(ModelConfig, MODEL, "benchmark")).train()
    module = Loss(model)
    learning = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-4)
    ddp = nn.parallel.DistributedDataParallel(module)
    batch = blank_batch(OWN, TOKENS, SIZE)
    batch.tokens, batch.lengths = tokenize(model.tokenizer, [note(i) for i in range(OWN)], TOKENS)
    batch.pixels = torch.randint(0, 256, batch.pixels.shape, dtype=torch.uint8)
    times = []
    for _ in range(num_steps):
        began = time.perf_counter()
        optimizer.zero_grad()
        ddp(batch).backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        times.append(time.perf_counter() - began)
    if process.is_first:
        Path(out).write_text(json.dumps(OWN * process.world / statistics.median(times[1:])))
    close_group()


def train_rank(arguments: list[str]) -> int:
    """A rank of `dermfm train`, pinned."""
    from launch.cli import main as dermfm

    pin()
    return dermfm(["train", *arguments])


def run(world: int, *arguments: str) -> None:
    """This script as `world` ranks."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", RANKS, str(world), sys.executable, __file__, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{arguments[0]} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")


def bare(folder: Path, world: int, num_steps: int) -> float:
    """Samples/s of the bare loop."""
    run(world, "bare", str(num_steps), str(folder / "bare.json"))
    return float(json.loads((folder / "bare.json").read_text()))


def train(folder: Path, world: int, num_steps: int, micro: int, number: int) -> dict[str, float]:
    """samples_per_s of `dermfm train` (median of its log lines but the first) and checkpoint_s of its last line."""
    out = folder / f"run-{number}-{world}-{micro}"
    config = {
        "run": str(out), "shards": str(folder / "shards"), "model": MODEL, "objectives": OBJECTIVES,
        "contrastive_batch": OWN * world, "micro_batch": micro, "epochs": num_steps * OWN * world / NUM_SAMPLES,
        "checkpoint_every": 10**9, "log_every": 2, "threads": 1, "device": "cpu",
    }  # fmt: skip
    path = folder / f"{out.name}.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    run(world, "train", str(path))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    speeds = [row["samples_per_s"] for row in rows if row["step"] > 2 and "samples_per_s" in row]
    stalls = [row["checkpoint_s"] for row in rows if "checkpoint_s" in row]
    return {"samples_per_s": statistics.median(speeds), "checkpoint_s": max(stalls, default=0.0)}


def measure(quick: bool) -> list[dict[str, Any]]:
    """All figures, as rows of the benchmarks' common form."""
    num_steps, rounds = (6, 1) if quick else (24, 3)
    sides: dict[str, list[float]] = {name: [] for name in ("ours", "bare", "grad cache", "one rank", "stall")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "shards").mkdir()
        make_shards(folder / "shards")
        for k in range(rounds):
            whole = train(folder, 2, num_steps, OWN, k)
            sides["ours"].append(whole["samples_per_s"])
            sides["stall"].append(whole["checkpoint_s"])
            sides["bare"].append(bare(folder, 2, num_steps))
            sides["grad cache"].append(train(folder, 2, num_steps, OWN // 4, k)["samples_per_s"])
            sides["one rank"].append(train(folder, 1, num_steps, OWN, k)["samples_per_s"])
    rate = {name: statistics.median(values) for name, values in sides.items()}
    interval = EPOCH / rate["ours"]
    return [
        figure("train, one micro-batch / bare DDP", rate["ours"], rate["bare"], "samples/s", 0.95),
        figure("grad cache, 4 micro-batches / one", rate["grad cache"], rate["ours"], "samples/s", 0.6),
        figure(f"checkpoint stall / {EPOCH} samples", rate["stall"], interval, "s", 0.02, better="lower"),
        figure("2 ranks, 2 cores / twice 1 rank, 1 core", rate["ours"], 2 * rate["one rank"], "samples/s", 0.9),
    ]


def main() -> int:
    """Print a table for people and one JSON object a line for each figure; or be a rank of a side."""
    if sys.argv[1:2] == ["bare"]:
        bare_rank(int(sys.argv[2]), sys.argv[3])
        return 0
    if sys.argv[1:2] == ["train"]:
        return train_rank(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer steps and one round")
    rows = measure(parser.parse_args().quick)
    show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
