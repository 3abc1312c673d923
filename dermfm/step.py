"""One optimizer step over one contrastive batch: grad cache over micro-batches, every loss divided by global counts.

The features of all micro-batches are computed first; if there is more than one, without gradient and several of them
at a time, which is faster and still needs less memory than a pass whose activations are kept. The contrastive loss over
the features of all ranks gives their gradients, and a second pass carries these back together with the losses that need
no other sample (see the table in `dermfm.objectives`). So the negatives of a step do not depend on the number of ranks
or on the micro-batch (Gao et al. 2021, arXiv 2101.06983).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dermfm import losses
from dermfm.memory import TOGETHER
from dermfm.objectives import OBJECTIVES, ObjectiveConfig, Pass, noted
from dermfm.samples import Batch

__all__ = ["ObjectiveConfig", "optimizer_step", "split"]
LEARNED = ("logit_scale", "logit_bias")  # of the text phase, without samples


def optimizer_step(engine: Any, batch: Batch, micro_batch: int, objectives: ObjectiveConfig) -> dict[str, float]:
    """Accumulate the gradients of one contrastive batch, of which `batch` is this rank's part.

    `engine` is called with a phase of DermFM and its inputs, and has `backward(loss, scale_wrt_gas=False)` that
    accumulates gradients whose mean over ranks is taken at `engine.step()`, which is the caller's. Returns the losses
    by objective, means over all ranks' valid items. Collective.
    """
    # The only micro-batch keeps its forward pass; of several, each is passed forward once more for its gradients.
    kept = list(_passes(engine, batch, micro_batch, objectives)) if micro_batch >= len(batch) else []
    cached = Cached()
    sums: dict[str, Tensor] = {}
    if objectives.compares:
        everyone = _everyone(batch, with_tokens=bool(objectives.matching))
        with torch.set_grad_enabled(bool(kept)):
            features = _features(kept or _passes(engine, batch, TOGETHER * micro_batch, objectives))
        _contrast(features, everyone, objectives, cached, sums)
        _mine(features, everyone, objectives, cached)
    counts = _global_counts(batch, cached, objectives)
    world = dist.get_world_size()
    for p in kept or _passes(engine, batch, micro_batch, objectives):
        loss = _per_sample(p, cached, counts, sums) + _surrogate(p, cached)
        # DeepSpeed averages gradients over ranks; our sums are already divided by global counts.
        engine.backward(loss * world, scale_wrt_gas=False)
    return _totals(sums, objectives)


def split(batch: Batch, size: int) -> Iterator[Batch]:
    """Consecutive micro-batches of `size` samples, notes cut to the longest in each."""
    for start in range(0, len(batch), size):
        rows = slice(start, start + size)
        part = Batch(**{f.name: getattr(batch, f.name)[rows] for f in dataclasses.fields(batch)})
        part.tokens = part.tokens[:, : int(part.lengths.max())]
        yield part


@dataclass
class Cached:
    """What the whole batch says to each sample: gradients of the contrastive loss by feature, mined negative notes."""

    gradients: dict[str, Tensor] = field(default_factory=dict)
    tokens: Tensor | None = None  # of each image's negative [b, T]
    lengths: Tensor | None = None
    found: Tensor | None = None  # float [b]: 0 where an image has no negative


@dataclass(frozen=True)
class Everyone:
    """What a rank must know of all ranks' samples, in rank order [B]: hashes, labels, stream indices, note tokens."""

    group: Tensor
    text: Tensor
    labels: Tensor
    indices: Tensor
    valid: Tensor  # float: the sample is good and has a note
    tokens: Tensor  # [B, T]; T = 0 where nobody asks for others' notes
    lengths: Tensor
    start: int  # this rank's first row

    def pairs(self, first: int, size: int, mask_same: bool = True) -> losses.Pairs:
        """The rows [first, first + size) of this rank against all."""
        columns = self.group, self.text, self.labels, self.valid
        return losses.describe_pairs(*columns, self.start + first, size, mask_same)


def _passes(engine: Any, batch: Batch, size: int, objectives: ObjectiveConfig) -> Iterator[Pass]:
    for k, micro in enumerate(split(batch, size)):
        yield Pass(engine, micro, objectives, k * size)


def _features(passes: Iterable[Pass]) -> dict[str, Tensor]:
    """Embeddings of this rank's whole part, detached leaves that collect gradients; the learned scale and bias."""
    found: dict[str, list[Tensor]] = {}
    for p in passes:
        outputs = {"image": p.image["embedding"], "text": p.text["embedding"]}
        outputs |= {name: p.text[name] for name in LEARNED if name in p.text and not p.start}
        for name, value in outputs.items():
            found.setdefault(name, []).append(value.detach())
    return {name: torch.cat(values).requires_grad_() for name, values in found.items()}


def _contrast(
    features: dict[str, Tensor],
    everyone: Everyone,
    objectives: ObjectiveConfig,
    cached: Cached,
    sums: dict[str, Tensor],
) -> None:
    """Gradients of the contrastive loss on this rank's features."""
    if not objectives.contrastive:
        return
    fixed, learned = objectives.fixed_temperature, features["logit_scale"]
    scales = {f: torch.full_like(learned, -math.log(fixed[f])) if f in fixed else learned for f in objectives.forms}
    loss = losses.contrast(
        {form: scale.to(features["image"].dtype) for form, scale in scales.items()},
        features["image"],
        features["text"],
        lambda first, size: everyone.pairs(first, size, objectives.mask_same),
        features.get("logit_bias"),
    )
    loss = loss / everyone.valid.sum().clamp(min=1)
    (objectives.contrastive * loss).backward()
    sums["contrastive"] = loss.detach()
    cached.gradients = {name: leaf.grad for name, leaf in features.items() if leaf.grad is not None}


@torch.no_grad()
def _mine(features: dict[str, Tensor], everyone: Everyone, objectives: ObjectiveConfig, cached: Cached) -> None:
    """A hard negative note for each image of this rank."""
    if not objectives.matching:
        return
    size = len(features["image"])
    image, text = (F.normalize(features[name], dim=1) for name in ("image", "text"))
    own = slice(everyone.start, everyone.start + size)
    chosen, cached.found = losses.mine_negatives(
        image, losses.gather(text), features["logit_scale"], everyone.pairs(0, size), everyone.indices[own],
        everyone.indices, objectives.hard_negatives,
    )  # fmt: skip
    cached.tokens, cached.lengths = everyone.tokens[chosen], everyone.lengths[chosen]


def _surrogate(p: Pass, cached: Cached) -> Tensor:
    """A scalar whose gradient is the contrastive loss's: features times their cached gradients."""
    total = p.batch.weight.new_zeros(())
    for name, gradient in cached.gradients.items():
        if name in LEARNED:
            total = total + ((p.text[name] * gradient).sum() if p.start == 0 else 0)
        else:
            embedding = (p.image if name == "image" else p.text)["embedding"]
            total = total + (embedding * gradient[p.start : p.start + len(embedding)]).sum()
    return total


def _per_sample(p: Pass, cached: Cached, counts: dict[str, Tensor], sums: dict[str, Tensor]) -> Tensor:
    """The weighted losses that need one sample at a time (plus its mined negative), over the step's global counts."""
    if cached.tokens is not None and cached.lengths is not None and cached.found is not None:
        rows = slice(p.start, p.start + len(p.batch))
        lengths = cached.lengths[rows]
        p.negatives = cached.tokens[rows, : int(lengths.max())], lengths, cached.found[rows]
    total = p.batch.weight.new_zeros(())
    for name in p.objectives.active:
        if (of := OBJECTIVES[name].loss) is not None:
            loss = of(p) / counts[name]
            sums[name] = sums.get(name, 0) + loss.detach()
            total = total + getattr(p.objectives, name) * loss
    return total


def _everyone(batch: Batch, with_tokens: bool) -> Everyone:
    tokens = batch.tokens[:, :0]
    if with_tokens:
        widest = torch.tensor(batch.tokens.shape[1], device=batch.tokens.device)
        dist.all_reduce(widest, dist.ReduceOp.MAX)
        tokens = F.pad(batch.tokens, (0, int(widest) - batch.tokens.shape[1]))
    columns = torch.stack(
        [batch.group, batch.text, batch.labels, batch.indices, (noted(batch) > 0).long(), batch.lengths], 1
    )
    rows = _all_rows(torch.cat([columns, tokens], 1))
    group, text, labels, indices, valid, lengths = rows[:, :6].unbind(1)
    return Everyone(group, text, labels, indices, valid.float(), rows[:, 6:], lengths, dist.get_rank() * len(batch))


def _all_rows(rows: Tensor) -> Tensor:
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows)
    return torch.cat(parts)


def _global_counts(batch: Batch, cached: Cached, objectives: ObjectiveConfig) -> dict[str, Tensor]:
    """How many items each active objective has over all ranks, at least 1."""
    found = torch.zeros_like(batch.weight) if cached.found is None else cached.found
    names = objectives.active
    counts = torch.stack([OBJECTIVES[name].count(batch, found).double() for name in names])
    dist.all_reduce(counts)
    return dict(zip(names, counts.clamp(min=1).to(batch.weight.dtype), strict=True))


def _totals(sums: dict[str, Tensor], objectives: ObjectiveConfig) -> dict[str, float]:
    names = sorted(sums)
    values = torch.stack([sums[n].double() for n in names])
    dist.all_reduce(values)
    losses_by_name = dict(zip(names, values.tolist(), strict=True))
    total = sum(getattr(objectives, n) * v for n, v in losses_by_name.items())
    return {"loss": total, **{f"loss/{n}": v for n, v in losses_by_name.items()}}
