"""Training: `dermfm train` against a bare DDP loop, what grad cache costs, checkpoint stalls, two ranks against one.

    python benchmarks/train.py [--quick]

Every rank has one thread, pinned to a core; figures are medians over steps. `dermfm train` is the real job, with its
agreement, guards, logging and checkpoints. The bare loops have the same model, world, batch, objectives (contrast and
image classification), parameter groups, AdamW and clipping: one over torch's DDP, which holds all states on every rank
as ZeRO stage 0 does, and one over DeepSpeed's engine at stage 1 with nothing else, whose own buckets the job replaces.
DDP takes its steps in turn with the job's, in its processes, over the same batch, which waits in memory, and then in
turn with DeepSpeed's; what reading, decoding and augmenting cost on the same cores is a line of its own. Two ranks, one
rank, two jobs of one rank at the same time and grad cache take their steps in turn, too. Two jobs need not talk: what
they lose to each other is the machine's (its memory, its caches), and no job of two ranks can be faster than they are.
"""

from __future__ import annotations

import argparse
import collections
import io
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
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
from benchmarks.shared.jobs import InTurn, Step, in_turn_with, over_batches, pin, run
from benchmarks.shared.turns import own_turns, steps_of, take_turns
from cluster.process import close_group, from_environment, start_group
from dermfm import losses, zero
from dermfm.config import from_dict
from dermfm.model.dermfm import DermFM, ModelConfig
from dermfm.optimizer import OptimizerConfig, parameter_groups
from dermfm.samples import Batch, tokenize
from dermfm.simulate import blank_batch
from shards.manifest import write_manifest
from shards.writer import write_shard

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
TURNS = [["two ranks"], ["one rank"], ["one rank", "another"], ["grad cache"]]


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


def loss_of(call: Any, batch: Batch) -> Tensor:
    """Symmetric cross-entropy over the pairs of all ranks, and of the image classes; `call(phase, …)` is the model."""
    image = call("image", pixels=batch.pixels)
    text = call("text", tokens=batch.tokens, lengths=batch.lengths)
    scale = text["logit_scale"].exp()
    target = torch.arange(len(batch)) + dist.get_rank() * len(batch)
    left = scale * image["embedding"] @ losses.gather(text["embedding"]).T
    right = scale * text["embedding"] @ losses.gather(image["embedding"]).T
    contrast = (F.cross_entropy(left, target) + F.cross_entropy(right, target)) / 2
    return contrast + F.cross_entropy(image["logits"], batch.labels)


class Loss(nn.Module):
    """Model and loss in one forward, as DDP wants it."""

    def __init__(self, model: DermFM) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        """See `loss_of`."""
        return loss_of(self.model, batch)


def new_model() -> DermFM:
    """The benchmark's model."""
    torch.manual_seed(0)
    return only_read(from_dict(ModelConfig, MODEL, "benchmark")).train()


def only_read(config: ModelConfig) -> DermFM:
    """A model whose parts that no objective reads are frozen, on both sides: DDP waits for all that learns."""
    model = DermFM(config)
    for part in (model.fusion, model.match_head, model.text_head, model.fused_head):
        part.requires_grad_(False)
    return model


def waiting_batch(tokenizer: Any) -> Batch:
    """A batch of one rank in memory: random pixels, real notes, labels in turn."""
    batch = blank_batch(OWN, TOKENS, SIZE)
    batch.tokens, batch.lengths = tokenize(tokenizer, [note(i) for i in range(OWN)], TOKENS)
    batch.pixels = torch.randint(0, 256, batch.pixels.shape, dtype=torch.uint8)
    batch.labels = torch.arange(OWN) % 8
    batch.indices = batch.group = batch.text = torch.arange(OWN) + dist.get_rank() * OWN  # all unlike each other
    return batch


def ddp_step(module: Any, fused: bool) -> Step:
    """One step of torch's DDP with AdamW and clipping; `module` is a loss with its `model`."""
    learning = [p for p in module.parameters() if p.requires_grad]
    config = OptimizerConfig()
    groups = parameter_groups(module.model, config)
    optimizer = torch.optim.AdamW(groups, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=fused)
    ddp = nn.parallel.DistributedDataParallel(module)

    def step(batch: Batch) -> Tensor:
        optimizer.zero_grad()
        loss = ddp(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        return loss.detach()

    return step


def deepspeed_step(model: DermFM) -> Step:
    """One step of DeepSpeed's engine, stage 1: the job's settings, but DeepSpeed's own buckets."""
    config, world = OptimizerConfig(), dist.get_world_size()
    buckets = {"zero_optimization": {"contiguous_gradients": True}}
    settings = zero.deepspeed_json(
        zero.ZeroConfig(extra=buckets), micro_batch=OWN, num_micro=1, world=world, device="cpu",
        optimizer={"lr": config.lr, "betas": list(config.betas), "eps": config.eps},
        num_learning=sum(p.numel() for p in model.parameters() if p.requires_grad),
        num_parameters=sum(p.numel() for p in model.parameters()),
    )  # fmt: skip
    engine = zero.initialize(model, parameter_groups(model, config), settings, "cpu")

    def step(batch: Batch) -> Tensor:
        loss = loss_of(engine, batch)
        engine.backward(loss, scale_wrt_gas=False)
        engine.step()
        return loss.detach()

    return step


BARE: dict[str, Callable[[], Step]] = {
    "ddp": lambda: ddp_step(Loss(new_model()), fused=False),
    "ddp fused": lambda: ddp_step(Loss(new_model()), fused=True),
    "deepspeed": lambda: deepspeed_step(new_model()),
}


def train_rank(bare: str, out: str, arguments: list[str]) -> int:
    """A rank of `dermfm train`, pinned. `bare`: names of the bare loops in turn with it; `reading`: none, and the job
    reads its own batches; `turns`: none, and it takes its steps when it is told to."""
    import dermfm.train as job
    from launch.cli import main as dermfm_main

    pin()
    setattr(job, "DermFM", only_read)  # noqa: B010
    if bare == "reading":
        return dermfm_main(["train", *arguments])
    if bare == "turns":
        return over_batches(lambda config, model, *rest: own_turns(waiting_batch(model.tokenizer)), arguments)
    return in_turn_with(InTurn({name: BARE[name] for name in bare.split(",") if name}, waiting_batch, out), arguments)


def bare_rank(num_steps: int, out: str) -> None:
    """A rank of the bare loops alone, in turn. A second engine of DeepSpeed's would disturb the job's checkpoint."""
    pin()
    process = from_environment("cpu")
    start_group(process)
    sides = InTurn(BARE, waiting_batch, out)
    batches = sides.batches(None, new_model())
    for _ in range(num_steps):
        next(batches)
    if process.is_first:
        sides.write()
    close_group()


def bare(folder: Path, world: int, num_steps: int) -> dict[str, float]:
    """samples/s of the bare loops."""
    run(__file__, world, "bare", str(num_steps), str(folder / "bare.json"))
    return json.loads((folder / "bare.json").read_text())


def configure(folder: Path, world: int, num_steps: int, micro: int = OWN, stage: int = 1) -> Path:
    """A new folder with the train.yaml of a run."""
    out = Path(tempfile.mkdtemp(dir=folder))
    config = {
        "run": str(out / "run"), "shards": str(folder / "shards"), "model": MODEL, "objectives": OBJECTIVES,
        "contrastive_batch": OWN * world, "micro_batch": micro, "epochs": num_steps * OWN * world / NUM_SAMPLES,
        "checkpoint_every": 10**9, "log_every": 10, "threads": 1, "device": "cpu", "zero": {"stage": stage},
    }  # fmt: skip
    (out / "train.yaml").write_text(json.dumps(config))  # JSON is YAML
    return out


def train(folder: Path, num_steps: int, bare: str, stage: int = 1) -> dict[str, float]:
    """samples/s of `dermfm train` on two ranks (`ours`) and of the bare loops named in `bare`, and `stall`:
    checkpoint_s of its last line. `bare`: see `train_rank`."""
    out = configure(folder, 2, num_steps, stage=stage)
    run(__file__, 2, "train", bare, str(out / "rates.json"), str(out / "train.yaml"))
    rows = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    stall = max((row["checkpoint_s"] for row in rows if "checkpoint_s" in row), default=0.0)
    if bare != "reading":
        return {**json.loads((out / "rates.json").read_text()), "stall": stall}
    # A log line tells the steps since the one before it; the first step, which warms up, has a line of its own.
    steps = [row["step_s_p50"] for row in rows if row["step"] > 1]
    return {"ours": OWN * 2 / statistics.median(steps), "stall": stall}


def in_turns(folder: Path, rounds: int) -> dict[str, float]:
    """samples/s of jobs that take turns: `two ranks`, `one rank`, `two jobs` of one rank at once, and `grad cache`."""

    def job(name: str, world: int, micro: int = OWN, first_core: int = 0) -> Callable[[Mapping[str, str]], None]:
        config = str(configure(folder, world, steps_of(name, TURNS, rounds), micro) / "train.yaml")
        return lambda told: run(__file__, world, "train", "turns", "", config, first_core=first_core, told=told)

    jobs = {
        "two ranks": job("two ranks", 2),
        "one rank": job("one rank", 1),
        "another": job("another", 1, first_core=1),
        "grad cache": job("grad cache", 2, micro=OWN // 4),
    }
    seconds = {where: statistics.median(told) for where, told in take_turns(jobs, TURNS, rounds).items()}
    return {
        "two ranks": 2 * OWN / seconds["two ranks", 0],
        "one rank": OWN / seconds["one rank", 1],
        "two jobs": OWN / seconds["one rank", 2] + OWN / seconds["another", 2],
        "grad cache": 2 * OWN / seconds["grad cache", 3],
    }


def measure(quick: bool) -> list[dict[str, Any]]:
    """All figures, as rows of the benchmarks' common form."""
    num_steps, rounds = (8, 1) if quick else (22, 2)
    sides: dict[str, list[float]] = collections.defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "shards").mkdir()
        make_shards(folder / "shards")
        for _ in range(rounds):
            for side, told in {
                "stage 1": train(folder, num_steps, "ddp"),
                "bare": bare(folder, 2, num_steps),
                "stage 0": train(folder, num_steps, "ddp", stage=0),
                "reading": train(folder, num_steps, "reading"),
                "turns": in_turns(folder, num_steps // 2 + 2),
            }.items():
                for what, value in told.items():
                    sides[f"{side}: {what}"].append(value)
    return figures({name: statistics.median(values) for name, values in sides.items()})


def figures(rate: dict[str, float]) -> list[dict[str, Any]]:
    """Rows of the common form from each side's samples/s."""
    ours, ddp, two, one = (rate[n] for n in ("stage 1: ours", "stage 1: ddp", "turns: two ranks", "turns: one rank"))
    # The bare loops among each other, on the scale of the one that the job was measured with.
    deepspeed, fused = (ddp * rate[f"bare: {name}"] / rate["bare: ddp"] for name in ("deepspeed", "ddp fused"))
    unit = "samples/s"
    return [
        figure("train, stage 1, one micro-batch / bare DDP", ours, ddp, unit, 0.95),
        figure("train, stage 0, one micro-batch / bare DDP", rate["stage 0: ours"], rate["stage 0: ddp"], unit, 0.95),
        figure("train, stage 1 / bare DeepSpeed, stage 1", ours, deepspeed, unit, 0.95),
        figure("bare DeepSpeed, stage 1 / bare DDP", deepspeed, ddp, unit, None),
        figure("train, stage 1 / bare DDP, fused AdamW", ours, fused, unit, None),
        figure("train that reads and decodes / in memory", rate["reading: ours"], two, unit, None),
        figure("grad cache, 4 micro-batches / one", rate["turns: grad cache"], two, unit, 0.6),
        figure(f"checkpoint stall / {EPOCH} samples", rate["reading: stall"], EPOCH / two, "s", 0.02, better="lower"),
        figure("2 ranks, 2 cores / twice 1 rank, 1 core", two, 2 * one, unit, 0.9),
        figure("2 jobs of 1 rank at once / twice 1 alone", rate["turns: two jobs"], 2 * one, unit, None),
    ]


def main() -> int:
    """Print a table for people and one JSON object a line for each figure; or be a rank of a side."""
    if sys.argv[1:2] == ["bare"]:
        bare_rank(int(sys.argv[2]), sys.argv[3])
        return 0
    if sys.argv[1:2] == ["train"]:
        return train_rank(sys.argv[2], sys.argv[3], sys.argv[4:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer steps and one round")
    show(measure(parser.parse_args().quick))
    return 0


if __name__ == "__main__":
    sys.exit(main())
