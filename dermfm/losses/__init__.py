"""Objectives as sums over their valid items; the caller divides by the step's global count of them."""

from dermfm.losses.contrastive import (
    CONTRASTIVE,
    MAX_LOGIT_SCALE,
    Pairs,
    clip,
    contrast,
    describe_pairs,
    gather,
    mine_negatives,
    supervised,
)
from dermfm.losses.samplewise import align_cosine, align_l1, classification, concepts, matching
from dermfm.losses.tokens import token_cross_entropy

__all__ = [
    "CONTRASTIVE",
    "MAX_LOGIT_SCALE",
    "Pairs",
    "align_cosine",
    "align_l1",
    "classification",
    "clip",
    "concepts",
    "contrast",
    "describe_pairs",
    "gather",
    "matching",
    "mine_negatives",
    "supervised",
    "token_cross_entropy",
]
