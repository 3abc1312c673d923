"""Cross-entropy of tokens straight from hidden states, without ever holding [tokens × vocabulary] in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 2**20  # logits in memory at a time: 4 MB in float32, while all activations are there too


class _FusedLinearCrossEntropy(torch.autograd.Function):
    """Logits chunk by chunk; their gradient is taken at once, while they are there (Hsu et al. 2024, Liger Kernel)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, words: Tensor, targets: Tensor, chunk: int) -> Tensor:  # type: ignore[override]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        ctx.dtype = words.dtype
        # Narrowed in here, so that the gradient of the words is made once, in their own type.
        words = words.to(hidden.dtype)
        learns_hidden, learns_words = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if learns_hidden else None
        grad_words = torch.zeros(words.shape, dtype=wide, device=words.device) if learns_words else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        for start in range(0, len(hidden), chunk):
            rows, aims = hidden[start : start + chunk], targets[start : start + chunk, None]
            logits = (rows @ words.T).to(wide)
            log_sum = logits.logsumexp(1, keepdim=True)
            total += (log_sum - logits.gather(1, aims)).sum()
            if grad_hidden is None and grad_words is None:
                continue
            slope = logits.sub_(log_sum).exp_()  # softmax, and from here the gradient: softmax − one-hot
            slope.scatter_add_(1, aims, slope.new_full(aims.shape, -1.0))
            if grad_hidden is not None:
                grad_hidden[start : start + chunk] = slope.to(words.dtype) @ words
            if grad_words is not None:
                grad_words.addmm_(slope.T, rows.to(wide))
        ctx.gradients = grad_hidden, grad_words
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # type: ignore[override]
        # Scaled in place: a copy of the words' gradient would be among the largest tensors of a step, at its peak.
        if ctx.gradients is None:
            raise RuntimeError("token_cross_entropy: its gradients were given out; a second backward needs a new pass")
        (hidden, words), ctx.gradients = ctx.gradients, None
        return (
            None if hidden is None else hidden.mul_(gradient.to(hidden.dtype)),
            None if words is None else words.mul_(gradient).to(ctx.dtype),
            None,
            None,
        )


def token_cross_entropy(hidden: Tensor, words: Tensor, targets: Tensor, chunk_elements: int = CHUNK_ELEMENTS) -> Tensor:
    """Σ over tokens of the cross-entropy of logits hidden · wordsᵀ with targets; a scalar, at least float32.

    hidden [N, D], words [V, D] (output embeddings, which may be wider, as under autocast), targets int64 [N]. At most
    `chunk_elements` logits exist at a time.
    """
    return _FusedLinearCrossEntropy.apply(hidden, words, targets, max(1, chunk_elements // len(words)))
