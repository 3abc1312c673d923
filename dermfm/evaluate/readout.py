"""Whether the attention of a word looks where the thing is: for images whose regions are known.

Which of a model's read-outs (see `dermfm.model.maps`) tells colours apart is chosen on a validation set and fixed.

A map is judged by a pair of words of the same note: the map of `a` should put more of its mass on the pixels of `a`
than the map of `b` does. A map that does not depend on its word scores one half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dermfm.config import InputError
from dermfm.model.maps import ReadOut, Span, read_outs, token_maps
from dermfm.samples import tokenize

BATCH = 32


@dataclass(frozen=True)
class Example:
    """An image with a note about it, the places of some words of the note, and where in the image each is true."""

    pixels: np.ndarray  # uint8 [3, S, S]
    text: str
    words: Mapping[str, Span]  # word → its characters in the text
    regions: Mapping[str, np.ndarray]  # word → bool [S', S'], of any side


def pair_hits(model: Any, examples: Sequence[Example]) -> list[np.ndarray]:
    """Per example bool [R, N] over its N ordered pairs of words (a, b): a's map lies more on a's region than b's does.

    Ties, as of a map of zeros, are misses.
    """
    device, names = next(model.parameters()).device, read_outs(model)
    found: list[np.ndarray] = []
    for start in range(0, len(examples), BATCH):
        part = examples[start : start + BATCH]
        texts = [e.text for e in part]
        tokens, lengths = tokenize(model.tokenizer, texts, model.config.text.max_tokens)
        pixels = torch.from_numpy(np.stack([e.pixels for e in part]))
        maps = token_maps(model, pixels.to(device), tokens.to(device), lengths.to(device)).float().cpu().numpy()
        spans = model.tokenizer(
            texts, truncation=True, max_length=model.config.text.max_tokens, return_offsets_mapping=True
        )["offset_mapping"]
        found += [_hits(names, maps[:, i], spans[i], e, model.image.grid) for i, e in enumerate(part)]
    return found


def _hits(
    names: Sequence[ReadOut], maps: np.ndarray, spans: Sequence[Span], example: Example, grid: tuple[int, int]
) -> np.ndarray:
    """bool [R, N] of one example from its maps [R, T, P] of these read-outs."""
    mass: dict[str, np.ndarray] = {}
    cover: dict[str, np.ndarray] = {}
    for word, place in example.words.items():
        tokens = [read_out.tokens_of(place, spans) for read_out in names]
        if not tokens[0]:  # cut off with the end of a long note
            continue
        one = np.stack([row[places].mean(0) for row, places in zip(maps, tokens, strict=True)])
        mass[word] = one / np.maximum(one.sum(1, keepdims=True), 1e-30)
        cover[word] = cell_shares(example.regions[word], grid).ravel()
    pairs = [(a, b) for a in mass for b in mass if a != b]
    hits = [mass[a] @ cover[a] > mass[b] @ cover[a] for a, b in pairs]
    return np.stack(hits, 1) if hits else np.zeros((len(maps), 0), bool)


def cell_shares(region: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Share [rows, columns] of each cell's pixels that lie in a region bool [S, S]; cells may cut pixels."""
    rows, columns = (_overlap(size, cells) for size, cells in zip(region.shape, grid, strict=True))
    return rows @ region.astype(np.float64) @ columns.T


def _overlap(size: int, cells: int) -> np.ndarray:
    """[cells, size]: which part of a cell each pixel is."""
    edges = np.arange(cells + 1) * (size / cells)
    pixels = np.arange(size)
    low = np.maximum(edges[:-1, None], pixels)
    return np.clip(np.minimum(edges[1:, None], pixels + 1) - low, 0, None) * (cells / size)


def choose_read_out(model: Any, examples: Sequence[Example]) -> tuple[ReadOut, float]:
    """The read-out with the most hits on these examples (of a validation set), and its share of hits."""
    rates = hit_rates(pair_hits(model, examples))
    best = int(rates.argmax())
    return read_outs(model)[best], float(rates[best])


def score_read_outs(model: Any, examples: Sequence[Example], chosen: Sequence[ReadOut]) -> list[dict[str, float]]:
    """Of each: `pairs`, share of ordered pairs of words that are hits; `images`, those with more hits than misses."""
    names, found = read_outs(model), [hits for hits in pair_hits(model, examples) if hits.shape[1]]
    scores = []
    for row in map(names.index, chosen):
        hits = [h[row] for h in found]
        images = float(np.mean([h.mean() > 0.5 for h in hits]))
        scores.append({"pairs": float(np.concatenate(hits).mean()), "images": images, "num_images": len(hits)})
    return scores


def hit_rates(hits: Sequence[np.ndarray]) -> np.ndarray:
    """Share of hits [R] over all pairs of all examples."""
    found = [h for h in hits if h.shape[1]]
    if not found:
        raise InputError("shards: none of the lesions looked at has two of the words' regions; give more lesions")
    return np.concatenate(found, axis=1).mean(1)
