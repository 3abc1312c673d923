"""Attention read-outs, and whether a word's looks where the thing is: for images whose regions are known.

A read-out turns attention to the image into one map a word: the weights of one block and head, or of all heads of a
block, plain or times a gradient (Chefer et al. 2021, arXiv 2103.15679, equation 5). In the fusion a word's map is that
of its tokens, and the gradient is of the match logit; in the decoder, that of the positions that predict its tokens,
and the gradient is of the note's log-likelihood. Which one tells colours apart is chosen on a validation set and fixed.

A map is judged by a pair of words of the same note: the map of `a` should put more of its mass on the pixels of `a`
than the map of `b` does. A map that does not depend on its word scores one half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dermfm.config import InputError
from dermfm.model.fusion import masked_mean
from dermfm.samples import tokenize

BATCH = 32


@dataclass(frozen=True)
class Example:
    """An image with a note about it, the places of some words of the note, and where in the image each is true."""

    pixels: np.ndarray  # uint8 [3, S, S]
    text: str
    words: Mapping[str, tuple[int, int]]  # word → its characters in the text
    regions: Mapping[str, np.ndarray]  # word → bool [S', S'], of any side


@dataclass(frozen=True)
class ReadOut:
    """One way of reading a map off the fusion or the decoder. `head` −1: the mean of all."""

    block: int
    head: int
    gradient: bool
    part: str = "fusion"

    @property
    def name(self) -> str:
        """As one writes it."""
        heads = "all heads" if self.head < 0 else f"head {self.head}"
        return f"{self.part}, block {self.block}, {heads}{', times gradient' if self.gradient else ''}"


def read_outs(model: Any) -> list[ReadOut]:
    """Every read-out that the model has, in the order of `word_maps`."""
    found: list[ReadOut] = []
    for part in _parts(model):
        sizes = getattr(model.config, part)
        blocks, heads = range(sizes.depth), range(-1, sizes.heads)
        found += [ReadOut(b, h, g, part) for g in (False, True) for b in blocks for h in heads]
    return found


def _parts(model: Any) -> list[str]:
    """What of the model attends to the image; ValueError where nothing does."""
    config = model.config
    parts = ["fusion"] * (config.fusion.kind == "cross") + ["decoder"] * (config.decoder.depth > 0)
    if not parts:
        raise ValueError(f"model.fusion.kind: '{config.fusion.kind}' has no maps to read; use cross, or a decoder")
    return parts


def word_maps(model: Any, pixels: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
    """Maps [R, B, T, P] of every read-out, in the order of `read_outs`, of tokens [B, T] over pixels [B, 3, S, S].

    Non-negative, not normalised. ValueError where the model has no attention to images.
    """
    of = {"fusion": fusion_maps, "decoder": decoder_maps}
    return torch.cat([of[part](model, pixels, tokens, lengths) for part in _parts(model)])


def fusion_maps(model: Any, pixels: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
    """Those of the fusion by cross-attention."""
    with torch.no_grad():
        image, text = model.encode_image(pixels)[1], model.encode_text(tokens, lengths)[1]
    with torch.enable_grad():
        # The towers are left out of the graph: the maps depend on the fusion alone.
        fused, weights = model.fusion.with_maps(image.detach().requires_grad_(), text, lengths)
        slopes = torch.autograd.grad(model.match_head(masked_mean(fused, lengths)).sum(), weights)
    return _rows(weights, slopes)


def decoder_maps(model: Any, pixels: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
    """Those of the note decoder, which reads the note that it is given; a note's first token, which none predicts, has
    a map of zeros."""
    with torch.no_grad():
        image = model.encode_image(pixels)[1]
    with torch.enable_grad():
        loss, weights = model.decoder.with_maps(image.detach().requires_grad_(), tokens, lengths)
        slopes = torch.autograd.grad(-loss, weights)
    return F.pad(_rows(weights, slopes), (0, 0, 1, 0))  # a position's weights belong to the token that it predicts


def _rows(weights: Sequence[Tensor], slopes: Sequence[Tensor]) -> Tensor:
    """Plain and weighted maps [R, B, T, P] of blocks [B, H, T, P]: first the mean of a block's heads, then each."""
    plain = [w.detach() for w in weights]
    weighted = [(w * g).clamp(min=0) for w, g in zip(plain, slopes, strict=True)]
    return torch.stack([row for maps in (*plain, *weighted) for row in (maps.mean(1), *maps.unbind(1))])


def pair_hits(model: Any, examples: Sequence[Example]) -> list[np.ndarray]:
    """Per example bool [R, N] over its N ordered pairs of words (a, b): a's map lies more on a's region than b's does.

    Ties, as of a map of zeros, are misses.
    """
    device = next(model.parameters()).device
    found: list[np.ndarray] = []
    for start in range(0, len(examples), BATCH):
        part = examples[start : start + BATCH]
        texts = [e.text for e in part]
        tokens, lengths = tokenize(model.tokenizer, texts, model.config.text.max_tokens)
        pixels = torch.from_numpy(np.stack([e.pixels for e in part]))
        maps = word_maps(model, pixels.to(device), tokens.to(device), lengths.to(device)).float().cpu().numpy()
        spans = model.tokenizer(
            texts, truncation=True, max_length=model.config.text.max_tokens, return_offsets_mapping=True
        )["offset_mapping"]
        found += [_hits(maps[:, i], spans[i], example, model.image.grid) for i, example in enumerate(part)]
    return found


def _hits(maps: np.ndarray, spans: Sequence[tuple[int, int]], example: Example, grid: tuple[int, int]) -> np.ndarray:
    """bool [R, N] of one example from its maps [R, T, P]."""
    mass: dict[str, np.ndarray] = {}
    cover: dict[str, np.ndarray] = {}
    for word, (start, end) in example.words.items():
        tokens = [t for t, (a, b) in enumerate(spans) if a < end and b > start]
        if not tokens:  # cut off with the end of a long note
            continue
        one = maps[:, tokens].mean(1)
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


def score_read_out(model: Any, examples: Sequence[Example], read_out: ReadOut) -> dict[str, float]:
    """`pairs`: share of ordered pairs of words that are hits; `images`: share of images with more hits than misses."""
    row = read_outs(model).index(read_out)
    hits = [h[row] for h in pair_hits(model, examples) if h.shape[1]]
    return {
        "pairs": float(np.concatenate(hits).mean()),
        "images": float(np.mean([h.mean() > 0.5 for h in hits])),
        "num_images": len(hits),
    }


def hit_rates(hits: Sequence[np.ndarray]) -> np.ndarray:
    """Share of hits [R] over all pairs of all examples."""
    found = [h for h in hits if h.shape[1]]
    if not found:
        raise InputError("shards: none of the lesions looked at has two of the words' regions; give more lesions")
    return np.concatenate(found, axis=1).mean(1)
