"""Attention read-outs: where a word of a note looks in the image.

A read-out takes the attention weights to the image of one block, or of all, of one head, or of all, plain or times a
gradient (Chefer et al. 2021, arXiv 2103.15679, equation 5). In the fusion a word's map is that of its tokens, and the
gradient is of the match logit. In the decoder the map is that of the position which predicts the word's first token,
and the gradient is of the note's log-likelihood: there the word is chosen, while the rest of it ('dark' → 'brown')
follows without a look at the image.

`word_maps` is what reports and predictions show; `dermfm.evaluate.readout` judges every read-out where truth is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dermfm.model.fusion import masked_mean
from dermfm.samples import tokenize

ATTENTIVE = ("cross", "early")  # kinds of fusion that attend to the image; late and none do not
Span = tuple[int, int]  # first character and the one behind the last


@dataclass(frozen=True)
class ReadOut:
    """One way of reading maps off the fusion or the decoder. `block` −1: the sum of all; `head` −1: the mean of all."""

    part: str
    block: int
    head: int
    gradient: bool

    @property
    def name(self) -> str:
        """As one writes it."""
        block = "all blocks" if self.block < 0 else f"block {self.block}"
        heads = "all heads" if self.head < 0 else f"head {self.head}"
        return f"{self.part}, {block}, {heads}{', times gradient' if self.gradient else ''}"

    def tokens_of(self, word: Span, spans: Sequence[Span]) -> list[int]:
        """The tokens whose maps make that of a word, [] where a long note was cut before it.

        `spans`: the characters of each token.
        """
        tokens = [t for t, (start, end) in enumerate(spans) if start < word[1] and end > word[0]]
        return tokens[:1] if self.part == "decoder" else tokens


def parts_with_maps(model: Any) -> list[str]:
    """What of the model attends to the image: fusion, decoder, both or neither."""
    config = model.config
    return ["fusion"] * (config.fusion.kind in ATTENTIVE) + ["decoder"] * (config.decoder.depth > 0)


def read_outs(model: Any) -> list[ReadOut]:
    """Every read-out that the model has, in the order of `token_maps`; ValueError where it has none."""
    found: list[ReadOut] = []
    for part in parts_with_maps(model):
        sizes = getattr(model.config, part)
        plain = part == "fusion" and sizes.kind == "early"  # its weights are cut out of those of one long sequence
        rows = [(-1, -1), *((block, head) for block in range(sizes.depth) for head in range(-1, sizes.heads))]
        found += [ReadOut(part, *row, gradient) for gradient in (False, True)[: 1 if plain else 2] for row in rows]
    if not found:
        raise ValueError(
            f"model.fusion.kind: '{model.config.fusion.kind}' has no maps to read; use cross, or a decoder"
        )
    return found


def default_read_out(model: Any) -> ReadOut:
    """What reports and predictions show: all blocks and heads of the decoder; else those of the fusion, times gradient.

    ValueError where nothing attends to images.
    """
    part = read_outs(model)[-1].part
    return ReadOut(part, -1, -1, part == "fusion" and model.config.fusion.kind == "cross")


def token_maps(model: Any, pixels: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
    """Maps [R, B, T, P] of every read-out, in the order of `read_outs`, of tokens [B, T] over pixels [B, 3, S, S].

    Non-negative, not normalised. ValueError where the model has no attention to images.
    """
    parts = dict.fromkeys(read_out.part for read_out in read_outs(model))
    return torch.cat([MAPS_OF[part](model, pixels, tokens, lengths) for part in parts])


def fusion_maps(model: Any, pixels: Tensor, tokens: Tensor, lengths: Tensor, gradient: bool = True) -> Tensor:
    """Those of the fusion; without `gradient` the plain ones alone, which come first."""
    with torch.no_grad():
        image, text = model.encode_image(pixels)[1], model.encode_text(tokens, lengths)[1]
    gradient = gradient and model.config.fusion.kind != "early"
    with torch.set_grad_enabled(gradient):
        # The towers are left out of the graph: the maps depend on the fusion alone.
        fused, weights = model.fusion.with_maps(image.detach().requires_grad_(gradient), text, lengths)
        match = model.match_head(masked_mean(fused, lengths)).sum() if gradient else None
        slopes = () if match is None else torch.autograd.grad(match, weights)
    return _rows(weights, slopes)


def decoder_maps(model: Any, pixels: Tensor, tokens: Tensor, lengths: Tensor, gradient: bool = True) -> Tensor:
    """Those of the note decoder, which reads the note that it is given; a note's first token, which none predicts, has
    a map of zeros. Without `gradient` the plain ones alone, which come first."""
    longest = int(lengths.max())  # padding may reach beyond the places that the decoder has
    with torch.no_grad():
        image = model.encode_image(pixels)[1]
    with torch.set_grad_enabled(gradient):
        image = image.detach().requires_grad_(gradient)
        loss, weights = model.decoder.with_maps(image, tokens[:, :longest], lengths)
        slopes = torch.autograd.grad(-loss, weights) if gradient else ()
    # A position's weights belong to the token that it predicts.
    return F.pad(_rows(weights, slopes), (0, 0, 1, tokens.shape[1] - longest))


MAPS_OF = {"fusion": fusion_maps, "decoder": decoder_maps}


def _rows(weights: Sequence[Tensor], slopes: Sequence[Tensor] = ()) -> Tensor:
    """Plain and weighted maps [R, B, T, P] of blocks [B, H, T, P], in the order of `read_outs`."""
    plain = [w.detach() for w in weights]
    kinds = [plain]
    if slopes:
        kinds.append([(w * g).clamp(min=0) for w, g in zip(plain, slopes, strict=True)])
    rows: list[Tensor] = []
    for maps in kinds:
        rows.append(torch.stack([block.mean(1) for block in maps]).sum(0))
        for block in maps:
            rows += [block.mean(1), *block.unbind(1)]
    return torch.stack(rows)


def word_maps(
    model: Any, pixels: np.ndarray, text: str, words: Sequence[Span], read_out: ReadOut | None = None
) -> list[np.ndarray | None]:
    """Map [rows, columns] of each word of a note over uint8 pixels [3, S, S]; None where the note was cut before it.

    `read_out`: `default_read_out` where none is given. A map sums to 1, or to 0 where nothing speaks for the word.
    ValueError where the model has no attention to images.
    """
    chosen = read_out or default_read_out(model)
    limit, device = model.config.text.max_tokens, next(model.parameters()).device
    tokens, lengths = (t.to(device) for t in tokenize(model.tokenizer, [text], limit))
    spans = model.tokenizer(text, truncation=True, max_length=limit, return_offsets_mapping=True)["offset_mapping"]
    row = [r for r in read_outs(model) if r.part == chosen.part].index(chosen)
    image = torch.from_numpy(pixels)[None].to(device)
    maps = MAPS_OF[chosen.part](model, image, tokens, lengths, chosen.gradient)[row, 0].float().cpu()
    found: list[np.ndarray | None] = []
    for word in words:
        places = chosen.tokens_of(word, spans)
        found.append(_unit(maps[places].mean(0).numpy()).reshape(model.image.grid) if places else None)
    return found


def _unit(weights: np.ndarray) -> np.ndarray:
    """Weights over their sum; zeros stay."""
    return weights / max(float(weights.sum()), 1e-30)
