"""Report generation: a causal decoder that attends to image tokens, its captioning loss, and decoding with a cache."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dermfm.config import check_choice, check_range, key
from dermfm.losses.tokens import token_cross_entropy
from dermfm.model.attention import KERNELS, Packing, is_fake, pack, repack
from dermfm.model.fusion import Attention
from dermfm.model.lean import mlp, move_into


@dataclass(kw_only=True)
class DecoderConfig:
    """Size of the note decoder. It reads and writes tokens of the text tower's tokenizer with embeddings of its own."""

    depth: int = key(0, "number of blocks; 0: no decoder")
    width: int = key(256, "channels of its tokens and of its word embeddings (tied: in and out)")
    heads: int = key(4, "attention heads")
    mlp_ratio: float = key(4.0, "hidden channels of the MLP per channel")
    kernel: str = key("auto", "attention kernel: auto, flash, sdpa or reference")

    def __post_init__(self) -> None:
        check_range("decoder.depth", self.depth, 0, 256)
        check_range("decoder.heads", self.heads, 1, self.width)
        check_choice("decoder.kernel", self.kernel, KERNELS)
        if self.width % self.heads:
            raise ValueError(f"decoder.width: {self.width} is not divisible by decoder.heads = {self.heads}")


class Memory:
    """What one block keeps between steps: keys and values of the image [B, P, H, D] and of the tokens so far."""

    def __init__(self, image: tuple[Tensor, Tensor], max_tokens: int) -> None:
        self.image = image
        self.size = 0
        batch, _, heads, channels = image[0].shape
        self._keys, self._values = (image[0].new_empty(batch, max_tokens, heads, channels) for _ in range(2))

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values [B, t, H, D]; all of them so far."""
        start, self.size = self.size, self.size + keys.shape[1]
        self._keys[:, start : self.size], self._values[:, start : self.size] = keys, values
        return self._keys[:, : self.size], self._values[:, : self.size]


class DecoderBlock(nn.Module):
    """Pre-norm block: causal self-attention, cross-attention to the image, MLP."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width = config.width
        self.norm_self, self.norm_cross, self.norm_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.self_attention = Attention(width, config.heads, config.kernel, causal=True)
        self.cross_attention = Attention(width, config.heads, config.kernel)
        self.mlp = mlp(width, config.mlp_ratio)
        move_into(self.norm_cross, self.cross_attention.query)
        move_into(self.norm_mlp, self.mlp[0])

    def forward(
        self,
        x: Tensor,
        image: Tensor | None,
        lengths: Tensor | None,
        memory: Memory | None = None,
        packed: tuple[Packing, Packing] | None = None,
    ) -> Tensor:
        """x [B, T, D] over image [B, P, D]; with a `memory`, x follows the tokens that it holds.

        `packed`: how notes and images lie end to end; then x is [N, D] and the image [B · P, D].
        """
        if packed is not None:
            assert image is not None
            return self._packed(x, image, *packed)
        own = self.norm_self(x)
        keys, values = self.self_attention.memory(own)
        if memory is not None:
            keys, values = memory.append(keys, values)
            seen = memory.image
        else:
            assert image is not None
            seen = self.cross_attention.memory(image)
        x = x + self.self_attention.look(own, keys, values, lengths, lengths)
        x = x + self.cross_attention.look(self.norm_cross(x), *seen, lengths)
        return x + self.mlp(self.norm_mlp(x))

    def with_map(self, x: Tensor, image: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(x, weights of the attention to the image [B, H, T, P] float32), of x [B, T, D]."""
        own = self.norm_self(x)
        x = x + self.self_attention.look(own, *self.self_attention.memory(own), lengths, lengths)
        seen, weights = self.cross_attention(self.norm_cross(x), image, lengths, None, True)
        assert weights is not None
        x = x + seen
        return x + self.mlp(self.norm_mlp(x)), weights

    def _packed(self, x: Tensor, image: Tensor, rows: Packing, image_rows: Packing) -> Tensor:
        own = self.norm_self(x)
        x = x + self.self_attention.look_packed(own, *self.self_attention.memory(own), rows, rows)
        seen = self.cross_attention.memory(image)
        x = x + self.cross_attention.look_packed(self.norm_cross(x), *seen, rows, image_rows)
        return x + self.mlp(self.norm_mlp(x))


class Decoder(nn.Module):
    """Tokens [B, T] and image tokens [B, P, Di] → the next token at every position.

    `start`, `end`: the tokenizer's own first and last token of every text; `max_tokens`: longest sequence with both.
    """

    def __init__(
        self, config: DecoderConfig, image_width: int, vocabulary: int, max_tokens: int, start: int, end: int
    ) -> None:
        super().__init__()
        self.max_tokens, self.start, self.end = max_tokens, start, end
        self.image_in = nn.Sequential(nn.LayerNorm(image_width), nn.Linear(image_width, config.width))
        # Not nn.Embedding: what reads the words here twice, in and out, must own them for ZeRO stage 3 to gather them.
        self.words = nn.Parameter(torch.randn(vocabulary, config.width) * config.width**-0.5)
        self.places = nn.Parameter(torch.randn(max_tokens, config.width) * 0.02)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, image_tokens: Tensor, tokens: Tensor, lengths: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(Cross-entropy summed over predicted tokens, their number): all but the first of each note.

        image_tokens [B, P, Di], tokens int64 [B, T], lengths int64 [B], weight [B] (notes with 0 do not count).
        """
        image, read, aims = self.image_in(image_tokens), tokens[:, :-1], tokens[:, 1:]
        counted = torch.where(weight > 0, lengths - 1, 0).clamp(min=0)  # a note that does not count is not read either
        counts = torch.arange(read.shape[1], device=tokens.device)[None] < counted[:, None]
        if is_fake(tokens) or not counted.any():  # of no tokens, packed, not every parameter would get a gradient
            hidden = self.states(image, read, lengths - 1)[counts]
        else:
            hidden = self._packed_states(image, read, counted)
        return token_cross_entropy(hidden, self.words, aims[counts]), counts.sum()

    def _packed_states(self, image: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
        """As `states`, of the valid tokens alone [N, D], note by note: what is padded costs nothing."""
        ids, rows = pack(tokens, lengths)
        places = repack(torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens), rows)
        # The gradient of the words as outputs is there by then: few rows are added to it, not another whole matrix. On
        # CUDA those additions would have no fixed order.
        x = F.embedding(ids, self.words, sparse=not ids.is_cuda) + F.embedding(places, self.places)
        flat, image_rows = pack(image, None)
        for block in self.blocks:
            x = block(x, flat, None, packed=(rows, image_rows))
        return self.norm(x)

    def states(self, image: Tensor, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Last hidden states [B, T, D] of tokens [B, T] over image tokens [B, P, D] in the decoder's width."""
        x = F.embedding(tokens, self.words) + self.places[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, image, lengths)
        return self.norm(x)

    def with_maps(self, image_tokens: Tensor, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The captioning loss of image tokens [B, P, Di] and tokens [B, T], and where each block looked.

        Weights [B, H, T − 1, P] float32 a block, by the position that predicts: that of token t is t − 1. They take
        part in the loss's graph.
        """
        image, read, last = self.image_in(image_tokens), tokens[:, :-1], lengths - 1
        x = F.embedding(read, self.words) + self.places[: read.shape[1]]
        maps: list[Tensor] = []
        for block in cast(Iterable[DecoderBlock], self.blocks):
            x, found = block.with_map(x, image, last)
            maps.append(found)
        counts = torch.arange(read.shape[1], device=tokens.device)[None] < last[:, None]
        return token_cross_entropy(self.norm(x)[counts], self.words, tokens[:, 1:][counts]), maps

    def start_memory(self, image: Tensor, max_tokens: int) -> list[Memory]:
        """One empty memory a block, for at most `max_tokens` tokens."""
        blocks = cast(Iterable[DecoderBlock], self.blocks)
        return [Memory(block.cross_attention.memory(image), max_tokens) for block in blocks]

    def continue_states(self, tokens: Tensor, memories: list[Memory]) -> Tensor:
        """Last hidden states [B, t, D] of tokens [B, t] that follow what the memories hold."""
        first = memories[0].size
        x = F.embedding(tokens, self.words) + self.places[first : first + tokens.shape[1]]
        for block, memory in zip(self.blocks, memories, strict=True):
            x = block(x, None, None, memory)
        return self.norm(x)

    @torch.no_grad()
    def generate(
        self,
        image_tokens: Tensor,
        *,
        max_tokens: int | None = None,
        top_p: float = 0.0,
        temperature: float = 1.0,
        seed: int = 0,
        cache: bool = True,
        stop: bool = True,
    ) -> Tensor:
        """Written tokens int64 [B, n], n ≤ `max_tokens`, without the start token; after `end` there is only `end`.

        `top_p` 0 takes the likeliest token (greedy), else one is drawn from the smallest set that holds `top_p` of the
        probability at `temperature` (Holtzman et al. 2020); row i draws by (seed, i), whatever the rest of the batch.
        `cache=False` runs the whole prefix anew for every token and `stop=False` writes on after `end`: to compare.
        ValueError for settings out of range.
        """
        longest = self.max_tokens - 1
        check_range("max_tokens", max_tokens or longest, 1, longest)
        check_range("top_p", top_p, 0, 1)
        check_range("temperature", temperature, 1e-3)
        image = self.image_in(image_tokens)
        rows = len(image_tokens)
        draws = [np.random.default_rng((seed, row)) for row in range(rows)]
        written = torch.full((rows, 1), self.start, device=image.device)
        memories = self.start_memory(image, max_tokens or longest) if cache else None
        ended = torch.zeros(rows, dtype=torch.bool, device=image.device)
        for _ in range(max_tokens or longest):
            if memories is None:
                hidden = self.states(image, written)[:, -1]
            else:
                hidden = self.continue_states(written[:, -1:], memories)[:, -1]
            chosen = choose_tokens(hidden @ self.words.T, top_p, temperature, draws)
            chosen = torch.where(ended, self.end, chosen) if stop else chosen
            written = torch.cat([written, chosen[:, None]], 1)
            ended |= chosen == self.end
            if stop and bool(ended.all()):
                break
        return written[:, 1:]

    def cut(self, written: Tensor) -> list[list[int]]:
        """The tokens of each row before its first `end`."""
        return [list(itertools.takewhile(lambda t: t != self.end, row)) for row in written.tolist()]


def choose_tokens(logits: Tensor, top_p: float, temperature: float, draws: list[np.random.Generator]) -> Tensor:
    """One token a row [B] of logits [B, V]: the likeliest (`top_p` 0), or a draw from its nucleus."""
    if top_p == 0:
        return logits.argmax(1)
    probabilities, order = (logits.double() / temperature).softmax(1).sort(1, descending=True)
    below = probabilities.cumsum(1) - probabilities  # mass before each token: the first is always inside
    inside = probabilities.masked_fill(below >= top_p, 0).cumsum(1)
    uniform = torch.tensor([rng.random() for rng in draws], dtype=torch.float64, device=logits.device)
    place = torch.searchsorted(inside, (uniform * inside[:, -1])[:, None], right=True)
    return order.gather(1, place.clamp(max=logits.shape[1] - 1))[:, 0]
