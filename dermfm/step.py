"""One optimizer step over one contrastive batch: grad cache over micro-batches, every loss divided by global counts.

The features of all micro-batches are computed first (without gradient if there is more than one), the contrastive loss
over the features of all ranks gives their gradients, and a second pass carries these back together with the losses
that need no other sample (matching against mined negatives, classification). So the negatives of a step do not depend
on the number of ranks or on the micro-batch (Gao et al. 2021, arXiv 2101.06983).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dermfm import losses
from dermfm.config import check_choice, check_range, key
from dermfm.samples import Batch, hash63

NO_NOTE = hash63("")


@dataclass(kw_only=True)
class ObjectiveConfig:
    """Weights of the objectives; 0 switches one off. Without the five that read notes, no text is encoded."""

    contrastive: float = key(1.0, "image-note contrast over the whole batch")
    contrastive_form: str = key("clip", "clip (own partner is the positive) or supervised (all notes of the class are)")
    matching: float = key(0.5, "does this note belong to this image: own note against a hard negative")
    classify_image: float = key(1.0, "class from the image")
    classify_text: float = key(0.2, "class from the note")
    classify_fused: float = key(0.2, "class from image and note together")
    label_smoothing: float = key(0.0, "label smoothing of the classification losses")

    def __post_init__(self) -> None:
        for name in ("contrastive", "matching", "classify_image", "classify_text", "classify_fused"):
            check_range(f"objectives.{name}", getattr(self, name), 0)
        check_choice("objectives.contrastive_form", self.contrastive_form, losses.CONTRASTIVE)
        check_range("objectives.label_smoothing", self.label_smoothing, 0, 0.9)
        if not (self.uses_text or self.classify_image):
            raise ValueError("objectives: all weights are 0; give at least one of them a positive weight")

    @property
    def uses_text(self) -> bool:
        """Whether any objective reads notes."""
        return any((self.contrastive, self.matching, self.classify_text, self.classify_fused))

    @property
    def uses_fusion(self) -> bool:
        """Whether any objective needs fused tokens."""
        return any((self.matching, self.classify_fused))


@dataclass(frozen=True)
class Everyone:
    """What a rank must know of all ranks' samples, in rank order [B]: hashes, labels, stream indices, note tokens."""

    group: Tensor
    text: Tensor
    labels: Tensor
    indices: Tensor
    valid: Tensor  # float: the sample is good and has a note
    tokens: Tensor  # [B, T]
    lengths: Tensor
    start: int  # this rank's first row


def optimizer_step(engine: Any, batch: Batch, micro_batch: int, objectives: ObjectiveConfig) -> dict[str, float]:
    """Accumulate the gradients of one contrastive batch, of which `batch` is this rank's part.

    `engine.step()` is the caller's. Returns the losses by objective, means over all ranks' valid items. Collective.
    """
    micros = list(split(batch, micro_batch))
    everyone = _everyone(batch) if objectives.uses_text else None
    counts = _global_counts(batch, everyone, objectives)
    kept = [_towers(engine, m, objectives) for m in micros] if len(micros) == 1 else []
    features = _features(engine, micros, kept, objectives)
    sums: dict[str, Tensor] = {}
    cached = _contrast(features, everyone, counts, objectives, sums)
    world = dist.get_world_size()
    for k, micro in enumerate(micros):
        passed = kept[k] if kept else _towers(engine, micro, objectives)
        loss = _surrogate(passed, cached, k * micro_batch)
        loss = loss + _per_sample(engine, micro, passed, cached, everyone, counts, objectives, sums, k * micro_batch)
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


def _towers(engine: Any, batch: Batch, objectives: ObjectiveConfig) -> dict[str, dict[str, Tensor]]:
    out = {"image": engine("image", pixels=batch.pixels)}
    if objectives.uses_text:
        out["text"] = engine("text", tokens=batch.tokens, lengths=batch.lengths)
    return out


def _features(
    engine: Any, micros: list[Batch], kept: list[dict[str, dict[str, Tensor]]], objectives: ObjectiveConfig
) -> dict[str, Tensor]:
    """Embeddings of this rank's whole part, detached leaves that collect gradients; {} where nothing contrasts them."""
    if not (objectives.contrastive or objectives.matching):
        return {}
    passes = kept
    if not kept:
        with torch.no_grad():
            passes = [_towers(engine, m, objectives) for m in micros]
    leaves = {m: torch.cat([p[m]["embedding"].detach() for p in passes]).requires_grad_() for m in ("image", "text")}
    leaves["logit_scale"] = passes[0]["text"]["logit_scale"].detach().requires_grad_()
    return leaves


def _contrast(
    features: dict[str, Tensor],
    everyone: Everyone | None,
    counts: dict[str, Tensor],
    objectives: ObjectiveConfig,
    sums: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Gradients of the contrastive loss on this rank's features, and the mined negatives of its images."""
    if not features:
        return {}
    assert everyone is not None
    image, text, scale = features["image"], features["text"], features["logit_scale"]
    all_image, all_text = losses.gather(image), losses.gather(text)
    pairs = losses.describe_pairs(
        everyone.group, everyone.text, everyone.labels, everyone.valid, everyone.start, len(image)
    )
    cached: dict[str, Tensor] = {}
    if objectives.contrastive:
        form = losses.CONTRASTIVE[objectives.contrastive_form]
        loss = form(image, text, all_image, all_text, scale, pairs) / counts["pairs"]
        (objectives.contrastive * loss).backward()
        sums["contrastive"] = loss.detach()
        cached |= {name: leaf.grad for name, leaf in features.items() if leaf.grad is not None}
    if objectives.matching:
        own = slice(everyone.start, everyone.start + len(image))
        with torch.no_grad():
            cached["negative"], cached["negative_found"] = losses.mine_negatives(
                image, all_text, scale, pairs, everyone.indices[own], everyone.indices
            )
            found = cached["negative_found"].sum()
            dist.all_reduce(found)
            counts["matches"] = (counts["pairs"] + found).clamp(min=1)
    return cached


def _surrogate(passed: dict[str, dict[str, Tensor]], cached: dict[str, Tensor], start: int) -> Tensor:
    """A scalar whose gradient is the contrastive loss's: features times their cached gradients."""
    total = passed["image"]["embedding"].sum() * 0
    for name in ("image", "text"):
        if name in cached:
            embedding = passed[name]["embedding"]
            total = total + (embedding * cached[name][start : start + len(embedding)]).sum()
    if "logit_scale" in cached and start == 0:
        total = total + (passed["text"]["logit_scale"] * cached["logit_scale"]).sum()
    return total


def _per_sample(
    engine: Any,
    batch: Batch,
    passed: dict[str, dict[str, Tensor]],
    cached: dict[str, Tensor],
    everyone: Everyone | None,
    counts: dict[str, Tensor],
    objectives: ObjectiveConfig,
    sums: dict[str, Tensor],
    start: int,
) -> Tensor:
    """The weighted losses that need one sample at a time (plus its mined negative), over the step's global counts."""
    smoothing = objectives.label_smoothing
    parts = {}
    if objectives.classify_image:
        logits = passed["image"]["logits"]
        parts["classify_image"] = (
            losses.classification(logits, batch.labels, batch.weight, smoothing) / counts["labels"]
        )
    if not objectives.uses_text:
        return _weigh(parts, objectives, sums)
    with_note = batch.weight * (batch.text != NO_NOTE)
    if objectives.classify_text:
        logits = passed["text"]["logits"]
        parts["classify_text"] = (
            losses.classification(logits, batch.labels, with_note, smoothing) / counts["labelled_notes"]
        )
    if objectives.uses_fusion:
        image = passed["image"]["tokens"]
        own = engine("fuse", image_tokens=image, text_tokens=passed["text"]["tokens"], lengths=batch.lengths)
        if objectives.classify_fused:
            fused = losses.classification(own["logits"], batch.labels, with_note, smoothing)
            parts["classify_fused"] = fused / counts["labelled_notes"]
        if objectives.matching:
            assert everyone is not None
            rows = slice(start, start + len(batch))
            chosen, found = cached["negative"][rows], cached["negative_found"][rows]
            lengths = everyone.lengths[chosen]
            tokens = everyone.tokens[chosen][:, : int(lengths.max())]
            other = engine("text", tokens=tokens, lengths=lengths)["tokens"]
            wrong = engine("fuse", image_tokens=image, text_tokens=other, lengths=lengths)
            parts["matching"] = losses.matching(own["match"], wrong["match"], with_note, found) / counts["matches"]
    return _weigh(parts, objectives, sums)


def _weigh(parts: dict[str, Tensor], objectives: ObjectiveConfig, sums: dict[str, Tensor]) -> Tensor:
    for name, value in parts.items():
        sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value.detach()
    return (
        torch.stack([getattr(objectives, name) * value for name, value in parts.items()]).sum()
        if parts
        else torch.zeros(())
    )


def _everyone(batch: Batch) -> Everyone:
    widest = torch.tensor(batch.tokens.shape[1], device=batch.tokens.device)
    dist.all_reduce(widest, dist.ReduceOp.MAX)
    tokens = F.pad(batch.tokens, (0, int(widest) - batch.tokens.shape[1]))
    valid = (batch.weight > 0) & (batch.text != NO_NOTE)
    columns = torch.stack([batch.group, batch.text, batch.labels, batch.indices, valid.long(), batch.lengths], 1)
    rows = _all_rows(torch.cat([columns, tokens], 1))
    group, text, labels, indices, valid, lengths = rows[:, :6].unbind(1)
    return Everyone(group, text, labels, indices, valid.float(), rows[:, 6:], lengths, dist.get_rank() * len(batch))


def _all_rows(rows: Tensor) -> Tensor:
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows)
    return torch.cat(parts)


def _global_counts(batch: Batch, everyone: Everyone | None, objectives: ObjectiveConfig) -> dict[str, Tensor]:
    """How many items each loss has over all ranks, at least 1."""
    labelled = batch.weight * (batch.labels >= 0)
    counts = torch.stack([labelled.sum(), (labelled * (batch.text != NO_NOTE)).sum()])
    dist.all_reduce(counts)
    found = {"labels": counts[0].clamp(min=1), "labelled_notes": counts[1].clamp(min=1)}
    if everyone is not None:
        found["pairs"] = everyone.valid.sum().clamp(min=1)
    return found


def _totals(sums: dict[str, Tensor], objectives: ObjectiveConfig) -> dict[str, float]:
    names = sorted(sums)
    values = torch.stack([sums[n].float() for n in names])
    dist.all_reduce(values)
    losses_by_name = dict(zip(names, values.tolist(), strict=True))
    total = sum(getattr(objectives, n) * v for n, v in losses_by_name.items())
    return {"loss": total, **{f"loss/{n}": v for n, v in losses_by_name.items()}}
