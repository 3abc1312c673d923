"""The contrastive family, one function a form, and the mining of hard negatives.

Every form is local and a sum over rows: a rank scores its own rows against the features of all ranks, gathered with
gradient, so the sum over ranks is the loss of the full batch, and rows can be taken in chunks. Pairs of the same group
or of identical text are no negatives of each other (unless `mask_same` is off, as in the reference study's formulas).

Two families: image against text (`clip`, `siglip`, `supervised`), and z = [image; text] against itself (`nt_xent`,
`infonce` and their supervised forms), which takes cosines whatever the length of the embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MAX_LOGIT_SCALE = math.log(100.0)  # CLIP's bound (Radford et al. 2021, section 2.5)
EVEN = 2**48  # from here on seeds say which images draw their negative evenly; below, they are stream indices
CHUNK_ELEMENTS = 2**24  # similarities that are in memory at a time


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
    """What is known of a step's image-note pairs, some rows [b] against all columns [B]."""

    own: Tensor  # bool [b, B]: the column is the row's own partner
    blocked: Tensor  # bool [b, B]: neither a positive nor a negative
    same_class: Tensor  # bool [b, B]: both labels known and equal
    other_class: Tensor  # bool [b, B]: both labels known and different
    valid: Tensor  # float [b]: 1 where the row counts


def describe_pairs(
    group: Tensor, text: Tensor, label: Tensor, valid: Tensor, start: int, size: int, mask_same: bool = True
) -> Pairs:
    """Pairs of the rows [start, start + size) against all columns; every tensor is [B] over all ranks.

    `group` and `text` are hashes, `label` is −1 where unknown, `valid` is 0 for bad samples and without a note.
    `mask_same` blocks pairs of the same group or text.
    """
    rows = slice(start, start + size)
    own = torch.zeros(size, len(group), dtype=torch.bool, device=group.device)
    own[torch.arange(size), torch.arange(start, start + size)] = True
    blocked = (valid[None] == 0).expand(size, -1)
    if mask_same:
        blocked = blocked | (group[rows, None] == group[None]) | (text[rows, None] == text[None])
    known = (label[rows, None] >= 0) & (label[None] >= 0) & (valid[None] > 0)
    same = label[rows, None] == label[None]
    return Pairs(own, blocked & ~own, known & same, known & ~same, valid[rows].float())


def _temper(scale: Tensor) -> Tensor:
    return scale.clamp(max=MAX_LOGIT_SCALE).exp()


def clip(
    image: Tensor, text: Tensor, all_image: Tensor, all_text: Tensor, scale: Tensor, pairs: Pairs, bias: object = None
) -> Tensor:
    """CLIP's symmetric cross-entropy (Radford et al. 2021), summed over the valid ones of the given rows.

    image, text [b, d] and all_image, all_text [B, d], usually of length 1; scale [1] is the log of 1 / temperature.
    """
    total = image.new_zeros(())
    for rows, columns in ((image, all_text), (text, all_image)):
        logits = (_temper(scale) * rows @ columns.T).masked_fill(pairs.blocked, float("-inf"))
        own = logits.masked_fill(~pairs.own, 0).sum(1)
        total = total + ((logits.logsumexp(1) - own) * pairs.valid).sum()
    return total / 2


def supervised(
    image: Tensor, text: Tensor, all_image: Tensor, all_text: Tensor, scale: Tensor, pairs: Pairs, bias: object = None
) -> Tensor:
    """Image-text form of supervised contrast (Khosla et al. 2020, L_out): all pairs of a row's class are positives."""
    total = image.new_zeros(())
    positive = pairs.own | pairs.same_class
    dead = ~positive & pairs.blocked
    for rows, columns in ((image, all_text), (text, all_image)):
        logits = _temper(scale) * rows @ columns.T
        log_p = logits - logits.masked_fill(dead, float("-inf")).logsumexp(1, keepdim=True)
        total = total - (log_p.masked_fill(~positive, 0).sum(1) / positive.sum(1) * pairs.valid).sum()
    return total / 2


def siglip(
    image: Tensor,
    text: Tensor,
    all_image: Tensor,
    all_text: Tensor,
    scale: Tensor,
    pairs: Pairs,
    bias: Tensor | None = None,
) -> Tensor:
    """SigLIP's sigmoid loss (Zhai et al. 2023, algorithm 1) over every allowed pair; `bias` [1] is learned."""
    logits = _temper(scale) * image @ all_text.T + (0 if bias is None else bias)
    each = F.softplus(torch.where(pairs.own, -logits, logits)).masked_fill(pairs.blocked, 0)
    return (each.sum(1) * pairs.valid).sum()


@dataclass(frozen=True)
class _Joint:
    """Rows z = [image; text] [2b] against all 2B columns: logits, and masks of the same shape."""

    logits: Tensor
    itself: Tensor
    partner: Tensor
    blocked: Tensor
    valid: Tensor


def _joint(image: Tensor, text: Tensor, all_image: Tensor, all_text: Tensor, scale: Tensor, pairs: Pairs) -> _Joint:
    rows, columns = F.normalize(torch.cat([image, text]), dim=1), F.normalize(torch.cat([all_image, all_text]), dim=1)
    own, none = pairs.own, torch.zeros_like(pairs.own)
    return _Joint(
        logits=_temper(scale) * rows @ columns.T,
        itself=torch.cat([torch.cat([own, none], 1), torch.cat([none, own], 1)]),
        partner=torch.cat([torch.cat([none, own], 1), torch.cat([own, none], 1)]),
        blocked=pairs.blocked.repeat(2, 2),
        valid=pairs.valid.repeat(2),
    )


def nt_xent(
    image: Tensor, text: Tensor, all_image: Tensor, all_text: Tensor, scale: Tensor, pairs: Pairs, bias: object = None
) -> Tensor:
    """NT-Xent (Chen et al. 2020, equation 1) on z = [image; text]: the partner against all other columns but itself."""
    z = _joint(image, text, all_image, all_text, scale, pairs)
    partner = z.logits.masked_fill(~z.partner, 0).sum(1)
    rest = z.logits.masked_fill(z.itself | z.blocked, float("-inf")).logsumexp(1)
    return ((rest - partner) * z.valid).sum() / 2


def supervised_infonce(
    image: Tensor, text: Tensor, all_image: Tensor, all_text: Tensor, scale: Tensor, pairs: Pairs, bias: object = None
) -> Tensor:
    """−log of the share of exp(logits) that falls on the row's class, on z = [image; text] without the row itself."""
    z = _joint(image, text, all_image, all_text, scale, pairs)
    positive = (pairs.same_class.repeat(2, 2) | z.partner) & ~z.itself
    away = float("-inf")
    inside = z.logits.masked_fill(~positive, away).logsumexp(1)
    rest = z.logits.masked_fill(z.itself | (z.blocked & ~positive), away).logsumexp(1)
    return ((rest - inside) * z.valid).sum() / 2


def supervised_nt_xent(
    image: Tensor, text: Tensor, all_image: Tensor, all_text: Tensor, scale: Tensor, pairs: Pairs, bias: object = None
) -> Tensor:
    """The reference study's sigmoid form on z = [image; text]: the partner is positive, other classes are negative.

    A row is the mean of softplus(−logit) over its two positives, one of which is the row itself with an infinite logit,
    plus the mean of softplus(logit) over columns of other classes. Pairs with an unknown label are no negatives.
    """
    z = _joint(image, text, all_image, all_text, scale, pairs)
    negative = pairs.other_class.repeat(2, 2) & ~z.blocked
    pull = F.softplus(-z.logits).masked_fill(~z.partner, 0).sum(1) / 2
    push = F.softplus(z.logits).masked_fill(~negative, 0).sum(1) / negative.sum(1).clamp(min=1)
    return ((pull + push) * z.valid).sum() / 2


CONTRASTIVE: dict[str, Callable[..., Tensor]] = {
    "clip": clip,
    "siglip": siglip,
    "supervised": supervised,
    "nt_xent": nt_xent,
    "infonce": nt_xent,  # the reference study's two names for one formula; they differ in temperature
    "supervised_nt_xent": supervised_nt_xent,
    "supervised_infonce": supervised_infonce,
}


def contrast(
    forms: Mapping[str, Tensor],
    image: Tensor,
    text: Tensor,
    describe: Callable[[int, int], Pairs],
    bias: Tensor | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Tensor:
    """Sum of the named forms over this rank's rows image, text [b, d], against the rows of all ranks. Collective.

    `forms`: name → scale [1]. `describe(first, size)` gives the Pairs of this rank's rows [first, first + size). Where
    the similarities of all rows would be more than `chunk_elements` numbers, rows are taken in chunks, whose
    similarities are computed again for the gradient.
    """
    all_image, all_text = gather(image), gather(text)
    rows = max(1, chunk_elements // len(all_image))

    def part(first: int, own_image: Tensor, own_text: Tensor, image: Tensor, text: Tensor) -> Tensor:
        pairs = describe(first, len(own_image))
        losses = [CONTRASTIVE[n](own_image, own_text, image, text, s, pairs, bias) for n, s in forms.items()]
        return torch.stack(losses).sum()

    total = image.new_zeros(())
    for first in range(0, len(image), rows):
        inputs = (first, image[first : first + rows], text[first : first + rows], all_image, all_text)
        total = total + (part(*inputs) if rows >= len(image) else checkpoint(part, *inputs, use_reentrant=False))
    return total


def mine_negatives(
    image: Tensor,
    all_text: Tensor,
    scale: Tensor,
    pairs: Pairs,
    indices: Tensor,
    all_indices: Tensor,
    hard: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """One hard-negative note per image, drawn in proportion to softmax(similarity) over the whole batch (ALBEF, 2021).

    image [b, d], all_text [B, d] of length 1; indices [b] and all_indices [B] are stream indices, on which alone the
    draw depends, not on how the batch lies on ranks. A share of 1 − `hard` of the images draws evenly. Returns (columns
    int [b], found float [b]: 0 where a row has no negative).
    """
    allowed = ~(pairs.blocked | pairs.own)
    logits = (_temper(scale) * image @ all_text.T).masked_fill(~allowed, float("-inf"))
    if hard < 1:
        even = torch.cat([_uniform(EVEN + int(index), 1) for index in indices]).to(logits.device) >= hard
        logits = torch.where(even[:, None] & allowed, 0.0, logits)
    found = allowed.any(1) & (pairs.valid > 0)
    place = all_indices - all_indices.min()
    uniform = torch.stack([_uniform(int(index), int(place.max()) + 1) for index in indices])
    # The Gumbel-max trick: argmax(logits + Gumbel noise) is a draw from their softmax.
    noise = -torch.log(-torch.log(uniform.to(logits.device)[:, place]))
    return torch.where(found, (logits + noise).nan_to_num(neginf=-1e30).argmax(1), 0), found.float()


def _uniform(seed: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(size, generator=generator).clamp(1e-9, 1 - 1e-7)
