"""Fusion of a note with an image: cross-attention, or its baselines early and late fusion.

- cross: note tokens attend to each other and then to image tokens, block by block (ALBEF, BLIP);
- early: image and note tokens in one sequence, every token attends to all;
- late: nothing meets before the end: mean image and note token, concatenated, through an MLP.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dermfm.config import check_choice, check_range, key
from dermfm.model.attention import KERNELS, Packing, attention, attention_packed, attention_with_weights
from dermfm.model.lean import mlp, move_into

KINDS = ("cross", "early", "late", "none")


@dataclass(kw_only=True)
class FusionConfig:
    """How note and image tokens meet, and the size of the blocks."""

    kind: str = key("cross", "cross (cross-attention), early (one sequence), late (concatenated means), none")
    depth: int = key(2, "number of blocks; of hidden layers for late")
    width: int = key(256, "channels of the fused tokens")
    heads: int = key(4, "attention heads")
    mlp_ratio: float = key(4.0, "hidden channels of the MLP per channel")
    kernel: str = key("auto", "attention kernel: auto, flash, sdpa or reference")

    def __post_init__(self) -> None:
        check_choice("fusion.kind", self.kind, KINDS)
        check_range("fusion.depth", self.depth, 1, 256)
        check_range("fusion.heads", self.heads, 1, self.width)
        check_choice("fusion.kernel", self.kernel, KERNELS)
        if self.width % self.heads:
            raise ValueError(f"fusion.width: {self.width} is not divisible by fusion.heads = {self.heads}")


class Attention(nn.Module):
    """Multi-head attention of x [B, T, D] over a context [B, S, D]."""

    def __init__(self, width: int, heads: int, kernel: str, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.kernel, self.causal = heads, kernel, causal
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(
        self, x: Tensor, context: Tensor, lengths_q: Tensor | None, lengths_k: Tensor | None, weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Returns (output [B, T, D], weights [B, H, T, S] where asked for)."""
        if weights:
            q, (k, v) = self._heads(self.query(x)), self.memory(context)
            mixed, probabilities = attention_with_weights(
                q, k, v, lengths_q=lengths_q, lengths_k=lengths_k, causal=self.causal
            )
            return self.out(mixed.flatten(2)), probabilities
        return self.look(x, *self.memory(context), lengths_q, lengths_k), None

    def memory(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, S, H, D / H] of a context [B, S, D]."""
        return self._heads(self.key(context)), self._heads(self.value(context))

    def look(
        self, x: Tensor, k: Tensor, v: Tensor, lengths_q: Tensor | None = None, lengths_k: Tensor | None = None
    ) -> Tensor:
        """Output [B, T, D] of x [B, T, D] over keys and values that are there already."""
        q = self._heads(self.query(x))
        causal = self.causal and x.shape[1] > 1  # the last of the tokens so far sees all of them: no mask
        mixed = attention(q, k, v, lengths_q=lengths_q, lengths_k=lengths_k, causal=causal, kernel=self.kernel)
        return self.out(mixed.flatten(2))

    def look_packed(self, x: Tensor, k: Tensor, v: Tensor, rows_q: Packing, rows_k: Packing) -> Tensor:
        """As `look` for rows that lie end to end: x [N, D] over k, v [M, H, D / H] → [N, D]."""
        q = self._heads(self.query(x))
        return self.out(attention_packed(q, k, v, rows_q, rows_k, causal=self.causal, kernel=self.kernel).flatten(1))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))


class FusionBlock(nn.Module):
    """Pre-norm block: self-attention over the note, cross-attention to the image, MLP."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        width = config.width
        self.norm_self, self.norm_cross, self.norm_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.self_attention = Attention(width, config.heads, config.kernel)
        self.cross_attention = Attention(width, config.heads, config.kernel)
        self.mlp = mlp(width, config.mlp_ratio)
        move_into(self.norm_cross, self.cross_attention.query)
        move_into(self.norm_mlp, self.mlp[0])

    def forward(self, x: Tensor, image: Tensor, lengths: Tensor, weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """x [B, T, D], image [B, P, D], lengths [B] → (x, cross-attention weights [B, H, T, P] where asked for)."""
        own = self.norm_self(x)
        x = x + self.self_attention(own, own, lengths, lengths)[0]
        seen, maps = self.cross_attention(self.norm_cross(x), image, lengths, None, weights)
        x = x + seen
        return x + self.mlp(self.norm_mlp(x)), maps


class EarlyBlock(nn.Module):
    """Pre-norm block of one sequence: self-attention, MLP."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.norm_self, self.norm_mlp = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.self_attention = Attention(config.width, config.heads, config.kernel)
        self.mlp = mlp(config.width, config.mlp_ratio)
        move_into(self.norm_mlp, self.mlp[0])

    def forward(self, x: Tensor, lengths: Tensor, weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """x [B, S, D], lengths [B] → (x, attention weights [B, H, S, S] where asked for)."""
        own = self.norm_self(x)
        seen, maps = self.self_attention(own, own, lengths, lengths, weights)
        x = x + seen
        return x + self.mlp(self.norm_mlp(x)), maps


class _FusionInputs(nn.Module):
    """Both towers' tokens in one width."""

    def __init__(self, config: FusionConfig, image_width: int, text_width: int) -> None:
        super().__init__()
        self.image_in = nn.Sequential(nn.LayerNorm(image_width), nn.Linear(image_width, config.width))
        self.text_in = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, config.width))


class Fusion(_FusionInputs):
    """Note tokens [B, T, Dt] and image tokens [B, P, Di] → fused note tokens [B, T, width], by cross-attention."""

    def __init__(self, config: FusionConfig, image_width: int, text_width: int) -> None:
        super().__init__(config, image_width, text_width)
        self.blocks = nn.ModuleList(FusionBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)

    def forward(
        self, image: Tensor, text: Tensor, lengths: Tensor, return_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Returns (fused [B, T, width], weights [B, H, T, P] float32 averaged over blocks, or None)."""
        fused, maps = self.with_maps(image, text, lengths, return_weights)
        return fused, torch.stack(maps).mean(0) if maps else None

    def with_maps(
        self, image: Tensor, text: Tensor, lengths: Tensor, return_weights: bool = True
    ) -> tuple[Tensor, list[Tensor]]:
        """The same with the weights of every block by itself, in order; [] where they are not asked for."""
        image, x = self.image_in(image), self.text_in(text)
        maps: list[Tensor] = []
        for block in self.blocks:
            x, found = block(x, image, lengths, return_weights)
            if found is not None:
                maps.append(found)
        return self.norm(x), maps


class EarlyFusion(_FusionInputs):
    """As `Fusion`, by self-attention over image and note tokens in one sequence."""

    def __init__(self, config: FusionConfig, image_width: int, text_width: int) -> None:
        super().__init__(config, image_width, text_width)
        self.modality = nn.Parameter(torch.randn(2, config.width) * 0.02)  # tells image from note tokens
        self.blocks = nn.ModuleList(EarlyBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)

    def forward(
        self, image: Tensor, text: Tensor, lengths: Tensor, return_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """As `Fusion`; the weights are those from note to image tokens."""
        fused, maps = self.with_maps(image, text, lengths, return_weights)
        return fused, torch.stack(maps).mean(0) if maps else None

    def with_maps(
        self, image: Tensor, text: Tensor, lengths: Tensor, return_weights: bool = True
    ) -> tuple[Tensor, list[Tensor]]:
        """The same with the weights of every block by itself, in order; [] where they are not asked for."""
        size = image.shape[1]  # image tokens come first: all are valid, so padding stays behind
        x = torch.cat([self.image_in(image) + self.modality[0], self.text_in(text) + self.modality[1]], 1)
        maps: list[Tensor] = []
        for block in self.blocks:
            x, found = block(x, lengths + size, return_weights)
            if found is not None:
                maps.append(found[:, :, size:, :size])
        return self.norm(x)[:, size:], maps


class LateFusion(_FusionInputs):
    """One fused vector [B, 1, width] from the mean image and the mean note token. It has no attention to show."""

    def __init__(self, config: FusionConfig, image_width: int, text_width: int) -> None:
        super().__init__(config, image_width, text_width)
        hidden = int(config.width * config.mlp_ratio)
        layers: list[nn.Module] = []
        for width in [2 * config.width, *[hidden] * (config.depth - 1)]:
            layers += [nn.Linear(width, hidden), nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden, config.width))
        self.norm = nn.LayerNorm(config.width)

    def forward(
        self, image: Tensor, text: Tensor, lengths: Tensor, return_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Returns (fused [B, 1, width], None); ValueError where weights are asked for."""
        if return_weights:
            raise ValueError("model.fusion.kind: 'late' has no attention weights; use 'cross' or 'early'")
        both = torch.cat([self.image_in(image).mean(1), masked_mean(self.text_in(text), lengths)], 1)
        return self.norm(self.mlp(both))[:, None], None


FUSIONS: dict[str, type[_FusionInputs]] = {"cross": Fusion, "early": EarlyFusion, "late": LateFusion}


def masked_mean(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Mean of tokens [B, T, D] over the first `lengths` [B] positions."""
    valid = (torch.arange(tokens.shape[1], device=tokens.device)[None, :] < lengths[:, None]).to(tokens.dtype)
    return (tokens * valid[:, :, None]).sum(1) / valid.sum(1, keepdim=True).clamp(min=1)
