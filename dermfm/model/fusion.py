"""Fusion: transformer blocks in which note tokens attend to each other and then to image tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dermfm.config import check_choice, check_range, key
from dermfm.model.attention import KERNELS, attention, attention_with_weights


@dataclass(kw_only=True)
class FusionConfig:
    """Size of the cross-attention blocks."""

    depth: int = key(2, "number of blocks")
    width: int = key(256, "channels of the fused tokens")
    heads: int = key(4, "attention heads")
    mlp_ratio: float = key(4.0, "hidden channels of the MLP per channel")
    kernel: str = key("auto", "attention kernel: auto, flash, sdpa or reference")

    def __post_init__(self) -> None:
        check_range("fusion.depth", self.depth, 1, 256)
        check_range("fusion.heads", self.heads, 1, self.width)
        check_choice("fusion.kernel", self.kernel, KERNELS)
        if self.width % self.heads:
            raise ValueError(f"fusion.width: {self.width} is not divisible by fusion.heads = {self.heads}")


class Attention(nn.Module):
    """Multi-head attention of x [B, T, D] over a context [B, S, D]."""

    def __init__(self, width: int, heads: int, kernel: str) -> None:
        super().__init__()
        self.heads, self.kernel = heads, kernel
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(
        self, x: Tensor, context: Tensor, lengths_q: Tensor | None, lengths_k: Tensor | None, weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Returns (output [B, T, D], weights [B, H, T, S] where asked for)."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)) for part in (self.query(x), self.key(context), self.value(context))
        )
        if weights:
            mixed, probabilities = attention_with_weights(q, k, v, lengths_q=lengths_q, lengths_k=lengths_k)
            return self.out(mixed.flatten(2)), probabilities
        mixed = attention(q, k, v, lengths_q=lengths_q, lengths_k=lengths_k, kernel=self.kernel)
        return self.out(mixed.flatten(2)), None


class FusionBlock(nn.Module):
    """Pre-norm block: self-attention over the note, cross-attention to the image, MLP."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.norm_self, self.norm_cross, self.norm_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.self_attention = Attention(width, config.heads, config.kernel)
        self.cross_attention = Attention(width, config.heads, config.kernel)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor, image: Tensor, lengths: Tensor, weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """x [B, T, D], image [B, P, D], lengths [B] → (x, cross-attention weights [B, H, T, P] where asked for)."""
        own = self.norm_self(x)
        x = x + self.self_attention(own, own, lengths, lengths)[0]
        seen, maps = self.cross_attention(self.norm_cross(x), image, lengths, None, weights)
        x = x + seen
        return x + self.mlp(self.norm_mlp(x)), maps


class Fusion(nn.Module):
    """Note tokens [B, T, Dt] and image tokens [B, P, Di] → fused note tokens [B, T, width]."""

    def __init__(self, config: FusionConfig, image_width: int, text_width: int) -> None:
        super().__init__()
        self.image_in = nn.Sequential(nn.LayerNorm(image_width), nn.Linear(image_width, config.width))
        self.text_in = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, config.width))
        self.blocks = nn.ModuleList(FusionBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)

    def forward(
        self, image: Tensor, text: Tensor, lengths: Tensor, return_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Returns (fused [B, T, width], weights [B, H, T, P] float32 averaged over blocks, or None)."""
        image, x = self.image_in(image), self.text_in(text)
        maps: list[Tensor] = []
        for block in self.blocks:
            x, found = block(x, image, lengths, return_weights)
            if found is not None:
                maps.append(found)
        return self.norm(x), torch.stack(maps).mean(0) if maps else None
