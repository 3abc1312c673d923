"""Attention pooling: one learned query reads a row of tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dermfm.model.attention import attention

HEAD_WIDTH = 64


class AttentionPool(nn.Module):
    """Tokens [B, T, D] (the first `lengths` [B] of them valid) → [B, D]: a learned query's view, and their norm."""

    def __init__(self, width: int, kernel: str) -> None:
        super().__init__()
        self.heads = next(h for h in range(max(width // HEAD_WIDTH, 1), 0, -1) if width % h == 0)
        self.kernel = kernel
        self.query = nn.Parameter(torch.randn(1, 1, width) * width**-0.5)
        self.norm = nn.LayerNorm(width)
        self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(3))

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """See the class."""
        x = self.norm(tokens)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1))
            for part in (self.query.to(x.dtype).expand(len(x), -1, -1), self.key(x), self.value(x))
        )
        return self.out(attention(q.to(k.dtype), k, v, lengths_k=lengths, kernel=self.kernel).flatten(2))[:, 0]
