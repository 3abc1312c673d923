"""Training with the towers and batch that users start with on a CPU: `dermfm train` against a bare DDP loop.

    python benchmarks/train_default.py [--quick]

`benchmarks/train.py` has a tiny model, in which whatever a step costs beside the model shows; this is the same
comparison with `configs/train/cpu.yaml`: two pretrained towers, all its default objectives (contrast, matching with
mined notes, three classifications), its contrastive batch on two ranks, one micro-batch. The bare loop computes the
same losses over the same batch in memory, and their steps take turns. So do then those of the job on two cores, of one
rank of it, and of two jobs of one rank at the same time, a core each: that is what the machine leaves of the speed of
two cores to ranks that need not talk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this script's own folder would shadow `shards`

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.shared.figures import figure, show
from benchmarks.shared.jobs import ROOT, InTurn, in_turn_with, over_batches, pin, run
from benchmarks.shared.turns import own_turns, steps_of, take_turns
from benchmarks.train import NUM_SAMPLES, ddp_step, make_shards, note
from dermfm import losses
from dermfm.config import load
from dermfm.model.dermfm import DermFM
from dermfm.plan import TrainConfig
from dermfm.samples import Batch, tokenize
from dermfm.simulate import blank_batch

TURNS = [["two ranks"], ["one rank"], ["one rank", "another"]]
CONFIG = ROOT / "configs" / "train" / "cpu.yaml"
TOLERANCE = 0.02  # of the first losses: each side draws the notes that its images are not to match


def configuration() -> TrainConfig:
    """The configuration that both sides are built from."""
    return load(TrainConfig, CONFIG, ["run=none", "shards=none"])


class Objectives(nn.Module):
    """The model and the weighted sum of its default objectives in one forward, as DDP wants it."""

    def __init__(self) -> None:
        super().__init__()
        config = configuration()
        torch.manual_seed(config.seed)
        self.model, self.weights = DermFM(config.model).train(), config.objectives
        self.chance = torch.Generator().manual_seed(config.seed)  # of its own: all loops draw the same notes

    def forward(self, batch: Batch) -> Tensor:
        """The loss of this rank's part; its mean over ranks is the step's."""
        image = self.model("image", pixels=batch.pixels)
        text = self.model("text", tokens=batch.tokens, lengths=batch.lengths)
        scale, first = text["logit_scale"].exp(), dist.get_rank() * len(batch)
        target = torch.arange(len(batch)) + first
        left = scale * image["embedding"] @ losses.gather(text["embedding"]).T
        right = scale * text["embedding"] @ losses.gather(image["embedding"]).T
        contrast = (F.cross_entropy(left, target) + F.cross_entropy(right, target)) / 2
        fused = self.model("fuse", image_tokens=image["tokens"], text_tokens=text["tokens"], lengths=batch.lengths)
        wrong = self._wrong(batch, image["tokens"], left.detach(), target)
        matching = (F.softplus(-fused["match"]).mean() + F.softplus(wrong).mean()) / 2
        classes = {"classify_image": image, "classify_text": text, "classify_fused": fused}
        total = self.weights.contrastive * contrast + self.weights.matching * matching
        for name, outputs in classes.items():
            total = total + getattr(self.weights, name) * F.cross_entropy(outputs["logits"], batch.labels)
        return total

    def _wrong(self, batch: Batch, image_tokens: Tensor, logits: Tensor, own: Tensor) -> Tensor:
        """Match logits [b] of each image with a hard note: drawn by similarity from the notes of all ranks."""
        everyone = [torch.empty_like(batch.tokens) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, batch.tokens)
        others = logits.scatter(1, own[:, None], -torch.inf)
        drawn = torch.multinomial(others.softmax(1), 1, generator=self.chance).squeeze(1)
        tokens, lengths = torch.cat(everyone)[drawn], batch.lengths  # all notes are as long, see `waiting_batch`
        states = self.model("text", tokens=tokens, lengths=lengths)["tokens"]
        return self.model("fuse", image_tokens=image_tokens, text_tokens=states, lengths=lengths)["match"]


def waiting_batch(tokenizer: Any) -> Batch:
    """A rank's part of the default batch in memory, notes of one length."""
    config = configuration()
    own, first = config.contrastive_batch // 2, dist.get_rank() * (config.contrastive_batch // 2)
    batch = blank_batch(own, 1, config.model.image.size)
    notes = [note(100 + first + i) for i in range(own)]  # three digits each
    batch.tokens, batch.lengths = tokenize(tokenizer, notes, config.model.text.max_tokens)
    assert len(set(batch.lengths.tolist())) == 1
    batch.pixels = torch.randint(0, 256, batch.pixels.shape, dtype=torch.uint8)
    batch.labels = torch.arange(own) % 8
    batch.indices = batch.group = batch.text = torch.arange(own) + first
    return batch


def rank(bare: str, out: str, arguments: list[str]) -> int:
    """A rank of `dermfm train`, with the bare loops named in `bare` in turn, or, `turns`, when it is told to."""
    pin()
    loops = {
        "ddp": lambda: ddp_step(Objectives(), fused=False),
        "ddp fused": lambda: ddp_step(Objectives(), fused=True),
    }
    if bare == "turns":
        return over_batches(lambda config, model, *rest: own_turns(waiting_batch(model.tokenizer)), arguments)
    return in_turn_with(InTurn({name: loops[name] for name in bare.split(",")}, waiting_batch, out), arguments)


def configure(folder: Path, world: int, num_steps: int) -> list[str]:
    """A run directory, and the arguments of a run there."""
    batch = configuration().contrastive_batch // 2 * world
    return [
        str(CONFIG), f"run={tempfile.mkdtemp(dir=folder)}", f"shards={folder / 'shards'}",
        f"epochs={num_steps * batch / NUM_SAMPLES}", f"contrastive_batch={batch}", "checkpoint_every=1000000000",
        "validation.every=-1", "threads=1", "device=cpu", "balance=0",  # the batch waits in memory
    ]  # fmt: skip


def beside_ddp(folder: Path, num_steps: int) -> dict[str, float]:
    """samples/s of `dermfm train` (`ours`) and of the bare loops in turn with it, and everyone's first loss."""
    out, arguments = folder / "rates.json", configure(folder, 2, num_steps)
    run(__file__, 2, "rank", "ddp,ddp fused", str(out), *arguments)
    rows = (Path(arguments[1].removeprefix("run=")) / "metrics.jsonl").read_text().splitlines()
    return {**json.loads(out.read_text()), "first loss": json.loads(rows[0])["loss"]}


def in_turns(folder: Path, rounds: int) -> dict[str, float]:
    """samples/s of jobs that take turns: `two ranks`, `one rank`, and `two jobs` of one rank at once, a core each."""

    def job(name: str, world: int, first_core: int = 0) -> Callable[[Mapping[str, str]], None]:
        arguments = configure(folder, world, steps_of(name, TURNS, rounds))
        return lambda told: run(__file__, world, "rank", "turns", "", *arguments, first_core=first_core, told=told)

    jobs = {"two ranks": job("two ranks", 2), "one rank": job("one rank", 1), "another": job("another", 1, 1)}
    seconds = {where: statistics.median(told) for where, told in take_turns(jobs, TURNS, rounds).items()}
    own = configuration().contrastive_batch // 2
    return {
        "two ranks": 2 * own / seconds["two ranks", 0],
        "one rank": own / seconds["one rank", 1],
        "two jobs": own / seconds["one rank", 2] + own / seconds["another", 2],
    }


def measure(quick: bool) -> list[dict[str, Any]]:
    """All figures, as rows of the benchmarks' common form."""
    num_steps = 5 if quick else 10
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "shards").mkdir()
        make_shards(folder / "shards")
        beside = beside_ddp(folder, num_steps)
        rate = in_turns(folder, num_steps // 2 + 2)
    two, one, apart = rate["two ranks"], rate["one rank"], rate["two jobs"]
    told, same = beside["first loss"], [beside["ddp: first loss"], beside["ddp fused: first loss"]]
    if abs(told / statistics.mean(same) - 1) > TOLERANCE:
        raise SystemExit(f"the job and the loop do not compute the same: first losses {told} and {same}")
    unit = "samples/s"
    return [
        figure("default CPU config, train / bare DDP", beside["ours"], beside["ddp"], unit, 0.95),
        figure("default CPU config, train / bare DDP, fused AdamW", beside["ours"], beside["ddp fused"], unit, None),
        figure("default CPU config, 2 ranks, 2 cores / twice 1 rank, 1 core", two, 2 * one, unit, 0.9),
        figure("default CPU config, 2 jobs of 1 rank at once / twice 1 alone", apart, 2 * one, unit, None),
    ]


def main() -> int:
    """Print a table for people and one JSON object a line for each figure; or be a rank of a side."""
    if sys.argv[1:2] == ["rank"]:
        return rank(sys.argv[2], sys.argv[3], sys.argv[4:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    show(measure(parser.parse_args().quick))
    return 0


if __name__ == "__main__":
    sys.exit(main())
