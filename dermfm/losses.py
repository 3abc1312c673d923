"""Objectives as sums over their valid items; the caller divides by the step's global count of them.

Contrastive losses are local: a rank scores its own rows against the features of all ranks, gathered with gradient.
Pairs of the same group or of identical text are no negatives of each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

MAX_LOGIT_SCALE = math.log(100.0)  # CLIP's bound (Radford et al. 2021, section 2.5)


class _GatherWithGradient(torch.autograd.Function):
    """All ranks' rows in rank order; the gradient of a rank's rows is the sum over all ranks' uses of them."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        ctx.num_rows = rows.shape[0]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        start = dist.get_rank() * ctx.num_rows
        return gradient[start : start + ctx.num_rows]


def gather(rows: Tensor) -> Tensor:
    """Rows [b, …] of every rank in rank order [world · b, …], with gradient; the rows themselves without a group."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    return _GatherWithGradient.apply(rows)


@dataclass(frozen=True)
class Pairs:
    """What is known of a step's image-note pairs, this rank's rows [b] against all columns [B]."""

    own: Tensor  # bool [b, B]: the column is the row's own partner
    blocked: Tensor  # bool [b, B]: neither a positive nor a negative
    same_class: Tensor  # bool [b, B]: both labels known and equal
    valid: Tensor  # float [b]: 1 where the row counts


def describe_pairs(group: Tensor, text: Tensor, label: Tensor, valid: Tensor, start: int, size: int) -> Pairs:
    """Pairs of the rows [start, start + size) against all columns; every argument is [B] over all ranks.

    `group` and `text` are hashes, `label` is −1 where unknown, `valid` is 0 for bad samples and without a note.
    """
    rows = slice(start, start + size)
    own = torch.zeros(size, len(group), dtype=torch.bool, device=group.device)
    own[torch.arange(size), torch.arange(start, start + size)] = True
    same = (group[rows, None] == group[None]) | (text[rows, None] == text[None])
    blocked = (same | (valid[None] == 0)) & ~own
    same_class = (label[rows, None] == label[None]) & (label[rows, None] >= 0) & (valid[None] > 0)
    return Pairs(own, blocked, same_class, valid[rows].float())


def clip(image: Tensor, text: Tensor, all_image: Tensor, all_text: Tensor, scale: Tensor, pairs: Pairs) -> Tensor:
    """CLIP's symmetric cross-entropy (Radford et al. 2021), summed over this rank's valid rows.

    image, text [b, d] and all_image, all_text [B, d] have length 1; scale [1] is the log of 1 / temperature.
    """
    total = image.new_zeros(())
    for rows, columns in ((image, all_text), (text, all_image)):
        logits = (scale.clamp(max=MAX_LOGIT_SCALE).exp() * rows @ columns.T).masked_fill(pairs.blocked, float("-inf"))
        own = logits.masked_fill(~pairs.own, 0).sum(1)
        total = total + ((logits.logsumexp(1) - own) * pairs.valid).sum()
    return total / 2


def supervised(image: Tensor, text: Tensor, all_image: Tensor, all_text: Tensor, scale: Tensor, pairs: Pairs) -> Tensor:
    """Image-text form of supervised contrast (Khosla et al. 2020, L_out): all pairs of a row's class are positives."""
    total = image.new_zeros(())
    positive = pairs.own | pairs.same_class
    dead = ~positive & pairs.blocked
    for rows, columns in ((image, all_text), (text, all_image)):
        logits = scale.clamp(max=MAX_LOGIT_SCALE).exp() * rows @ columns.T
        log_p = logits - logits.masked_fill(dead, float("-inf")).logsumexp(1, keepdim=True)
        total = total - (log_p.masked_fill(~positive, 0).sum(1) / positive.sum(1) * pairs.valid).sum()
    return total / 2


CONTRASTIVE: dict[str, Callable[..., Tensor]] = {"clip": clip, "supervised": supervised}


def classification(logits: Tensor, labels: Tensor, weight: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of logits [B, C] summed over the rows with a known label (≥ 0), times `weight` [B]."""
    losses = F.cross_entropy(logits, labels.clamp(min=0), reduction="none", label_smoothing=smoothing)
    return (losses * weight * (labels >= 0)).sum()


def matching(positive: Tensor, negative: Tensor, valid: Tensor, valid_negative: Tensor) -> Tensor:
    """Binary cross-entropy of match logits [B] of own and of hard-negative notes, summed over the valid ones."""
    own = F.softplus(-positive) * valid
    other = F.softplus(negative) * valid_negative
    return (own + other).sum()


def mine_negatives(
    image: Tensor, all_text: Tensor, scale: Tensor, pairs: Pairs, indices: Tensor, all_indices: Tensor
) -> tuple[Tensor, Tensor]:
    """One hard-negative note per image, drawn in proportion to softmax(similarity) over the whole batch (ALBEF, 2021).

    image [b, d], all_text [B, d]; indices [b] and all_indices [B] are stream indices, on which alone the draw depends,
    not on how the batch lies on ranks. Returns (columns int [b], found float [b]: 0 where a row has no negative).
    """
    allowed = ~(pairs.blocked | pairs.own)
    logits = (scale.clamp(max=MAX_LOGIT_SCALE).exp() * image @ all_text.T).masked_fill(~allowed, float("-inf"))
    found = allowed.any(1) & (pairs.valid > 0)
    place = all_indices - all_indices.min()
    uniform = torch.stack([_uniform(int(index), int(place.max()) + 1) for index in indices])
    # The Gumbel-max trick: argmax(logits + Gumbel noise) is a draw from their softmax.
    noise = -torch.log(-torch.log(uniform.to(logits.device)[:, place]))
    return torch.where(found, (logits + noise).nan_to_num(neginf=-1e30).argmax(1), 0), found.float()


def _uniform(seed: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(size, generator=generator).clamp(1e-9, 1 - 1e-7)
