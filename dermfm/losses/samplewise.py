"""Losses that need one sample at a time (matching: one sample and its mined negative), as sums over valid samples."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def classification(logits: Tensor, labels: Tensor, weight: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of logits [B, C] summed over the rows with a known label (≥ 0), times `weight` [B]."""
    losses = F.cross_entropy(logits, labels.clamp(min=0), reduction="none", label_smoothing=smoothing)
    return (losses * weight * (labels >= 0)).sum()


def matching(positive: Tensor, negative: Tensor, valid: Tensor, valid_negative: Tensor) -> Tensor:
    """Binary cross-entropy of match logits [B] of own and of hard-negative notes, summed over the valid ones."""
    own = F.softplus(-positive) * valid
    other = F.softplus(negative) * valid_negative
    return (own + other).sum()


def concepts(logits: Tensor, present: Tensor, weight: Tensor) -> Tensor:
    """Binary cross-entropy of concept logits [B, C] with the words that are present (bool [B, C]).

    Mean over the C words of a sample, summed over samples times `weight` [B].
    """
    each = F.binary_cross_entropy_with_logits(logits, present.to(logits.dtype), reduction="none")
    return (each.mean(1) * weight).sum()


def align_cosine(image: Tensor, text: Tensor, weight: Tensor) -> Tensor:
    """1 − cosine of image and text embeddings [B, d], summed over samples times `weight` [B]."""
    return ((1 - F.cosine_similarity(image, text, dim=1)) * weight).sum()


def align_l1(image: Tensor, text: Tensor, weight: Tensor) -> Tensor:
    """Mean over dimensions of |image − text| of embeddings [B, d], summed over samples times `weight` [B]."""
    return ((image - text).abs().mean(1) * weight).sum()
