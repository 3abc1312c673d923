"""Symmetric views of an image: a photographed lesion has no up and no left, so that all eight show the same."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dermfm.evaluate.embed import Forward

VIEWS = (1, 2, 4, 8)


def symmetric(pixels: Tensor, number: int) -> Iterator[Tensor]:
    """The first `number` (1, 2, 4 or 8) of a batch's views [B, 3, S, S]: plain, mirrored, upside down, half a turn, and
    these four transposed."""
    for k in range(number):
        view = pixels.transpose(-1, -2) if k >= 4 else pixels
        yield view.flip([dim for dim, bit in ((-1, 1), (-2, 2)) if k & bit])


def over_views(image: Forward, number: int) -> Forward:
    """An image encoder whose outputs are means over `number` views: of unit embeddings, of features, of probabilities,
    whose logarithms stand for logits."""
    if number == 1:
        return image

    def forward(pixels: Tensor) -> dict[str, Tensor]:
        of_views = [image(view) for view in symmetric(pixels, number)]
        return {name: _mean(name, torch.stack([one[name].float() for one in of_views])) for name in of_views[0]}

    return forward


def _mean(name: str, values: Tensor) -> Tensor:
    """[V, B, D] → [B, D]."""
    if name == "embedding":
        return F.normalize(F.normalize(values, dim=-1).mean(0), dim=-1)
    if name.endswith("logits"):
        return values.softmax(-1).mean(0).log()
    return values.mean(0)
