"""One attention with three kernels: flash-attn (variable length), torch's scaled dot product, and a reference.

All three compute softmax(q kᵀ / √D) v per head. Padding lies behind the valid tokens of a row and is given as lengths;
outputs at padded query positions are zero. Causal masks are aligned bottom-right (flash-attn's convention): the last
valid query sees the last valid key.
"""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch
import torch.nn.functional as F
from torch import Tensor

KERNELS = ("auto", "flash", "sdpa", "reference")
_log = logging.getLogger(__name__)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths_q: Tensor | None = None,
    lengths_k: Tensor | None = None,
    causal: bool = False,
    kernel: str = "auto",
) -> Tensor:
    """Attention of q [B, Tq, H, D] over k, v [B, Tk, H, D]; returns [B, Tq, H, D].

    `lengths_q`, `lengths_k` [B] int count the valid leading positions of each row (None: all are valid).
    Raises ValueError for a kernel that is unknown or that this device cannot run.
    """
    chosen = choose_kernel(kernel, q.device.type, q.dtype)
    if chosen == "reference":
        return attention_with_weights(q, k, v, lengths_q=lengths_q, lengths_k=lengths_k, causal=causal)[0]
    if chosen == "flash":
        return _flash(q, k, v, lengths_q, lengths_k, causal)
    return _sdpa(q, k, v, lengths_q, lengths_k, causal)


def attention_with_weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths_q: Tensor | None = None,
    lengths_k: Tensor | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """The reference kernel: (output [B, Tq, H, D], weights [B, H, Tq, Tk] in float32)."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) * q.shape[-1] ** -0.5
    allowed = _allowed(q, k, lengths_q, lengths_k, causal)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    weights = torch.nan_to_num(scores.softmax(-1))  # rows that may see nothing are all -inf: they get weight zero
    output = torch.einsum("bhqk,bkhd->bqhd", weights, v.float()).to(q.dtype)
    return _zero_padding(output, lengths_q), weights


def choose_kernel(kernel: str, device: str, dtype: torch.dtype) -> str:
    """The kernel that `kernel` stands for on this device; ValueError if it cannot run here."""
    if kernel not in KERNELS:
        raise ValueError(f"kernel: '{kernel}' is not valid; one of {', '.join(KERNELS)}")
    can_flash = device == "cuda" and dtype in (torch.float16, torch.bfloat16) and _has_flash()
    if kernel == "flash" and not can_flash:
        raise ValueError(
            f"kernel: 'flash' needs a CUDA device, fp16 or bf16 and the package flash-attn; here: {device}, {dtype}; "
            "use 'auto' or 'sdpa'"
        )
    if kernel != "auto":
        return kernel
    chosen = "flash" if can_flash else "sdpa"
    _say_once(chosen, device, str(dtype))
    return chosen


@functools.cache
def _say_once(kernel: str, device: str, dtype: str) -> None:
    _log.info("attention kernel: %s (%s, %s)", kernel, device, dtype)


@functools.cache
def _has_flash() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def _valid(lengths: Tensor | None, size: int, device: torch.device) -> Tensor | None:
    """Mask [B, size] of valid positions."""
    return None if lengths is None else torch.arange(size, device=device)[None, :] < lengths[:, None]


def _allowed(q: Tensor, k: Tensor, lengths_q: Tensor | None, lengths_k: Tensor | None, causal: bool) -> Tensor | None:
    """Mask broadcastable to [B, H, Tq, Tk] of the pairs that may attend; None where all may."""
    mask = None
    if (valid := _valid(lengths_k, k.shape[1], q.device)) is not None:
        mask = valid[:, None, None, :]
    if causal:
        last_q = lengths_q if lengths_q is not None else torch.full((q.shape[0],), q.shape[1], device=q.device)
        last_k = lengths_k if lengths_k is not None else torch.full((q.shape[0],), k.shape[1], device=q.device)
        rows = torch.arange(q.shape[1], device=q.device)[None, :, None] + (last_k - last_q)[:, None, None]
        below = (torch.arange(k.shape[1], device=q.device)[None, None, :] <= rows)[:, None]
        mask = below if mask is None else mask & below
    return mask


def _zero_padding(output: Tensor, lengths: Tensor | None) -> Tensor:
    valid = _valid(lengths, output.shape[1], output.device)
    return output if valid is None else output * valid[:, :, None, None].to(output.dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, lengths_q: Tensor | None, lengths_k: Tensor | None, causal: bool) -> Tensor:
    mask = _allowed(q, k, lengths_q, lengths_k, causal)
    if mask is not None:
        # A row that may see nothing (padding under a causal mask) would be NaN: it looks everywhere, then is zeroed.
        mask = mask | ~mask.any(-1, keepdim=True)
    output = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    output = output.transpose(1, 2)
    if causal:
        seen = _allowed(q, k, lengths_q, lengths_k, causal)
        assert seen is not None
        output = output * seen.any(-1)[:, 0, :, None, None].to(output.dtype)
    elif lengths_k is not None:
        output = output * (lengths_k > 0)[:, None, None, None].to(output.dtype)
    return _zero_padding(output, lengths_q)


def _flash(q: Tensor, k: Tensor, v: Tensor, lengths_q: Tensor | None, lengths_k: Tensor | None, causal: bool) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # imports only where CUDA is

    packed_q, bounds_q, longest_q, where_q = _pack(q, lengths_q)
    packed_k, bounds_k, longest_k, where_k = _pack(k, lengths_k)
    packed_v = v.flatten(0, 1) if where_k is None else v.flatten(0, 1)[where_k]
    packed = flash_attn_varlen_func(
        packed_q, packed_k, packed_v, bounds_q, bounds_k, longest_q, longest_k, causal=causal
    )
    if where_q is None:
        return packed.view_as(q)
    return torch.zeros_like(q).flatten(0, 1).index_copy(0, where_q, packed).view_as(q)


def _pack(x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor, int, Tensor | None]:
    """Rows [B, T, H, D] without their padding: (total, H, D), int32 bounds [B + 1], longest row, kept positions."""
    batch, size = x.shape[:2]
    if lengths is None:
        bounds = torch.arange(0, (batch + 1) * size, size, dtype=torch.int32, device=x.device)
        return x.flatten(0, 1), bounds, size, None
    valid = _valid(lengths, size, x.device)
    assert valid is not None
    where = valid.flatten().nonzero().squeeze(1)
    bounds = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return x.flatten(0, 1)[where], bounds, int(lengths.max()), where
