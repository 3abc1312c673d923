"""One attention with three kernels: flash-attn (variable length), torch's scaled dot product, and a reference.

All three compute softmax(q kᵀ / √D) v per head. Padding lies behind the valid tokens of a row and is given as lengths;
outputs at padded query positions are zero. Causal masks are aligned bottom-right (flash-attn's convention): the last
valid query sees the last valid key. `attention_packed` takes rows that `pack` has laid end to end, without padding.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dermfm.config import InputError
from dermfm.model.varlen import HALVES, VARLEN_SOURCES, find_varlen

KERNELS = ("auto", "flash", "sdpa", "reference")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Packing:
    """How rows of different length lie end to end: `lengths` on the host, int32 `bounds` [B + 1] on the device.

    `where` [total] are the places of the kept tokens in the padded [B · width]; None: nothing was padded.
    """

    lengths: tuple[int, ...]
    bounds: Tensor
    width: int
    where: Tensor | None

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths, default=0)


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
    Raises InputError for a kernel that is unknown or that this device cannot run.
    """
    chosen = choose_kernel(kernel, q.device.type, q.dtype)
    if chosen == "reference":
        return attention_with_weights(q, k, v, lengths_q=lengths_q, lengths_k=lengths_k, causal=causal)[0]
    if chosen == "flash":
        packed_q, rows_q = pack(q, lengths_q)
        packed_k, rows_k = pack(k, lengths_k)
        return unpack(_flash(packed_q, packed_k, repack(v, rows_k), rows_q, rows_k, causal), rows_q)
    return _sdpa(q, k, v, lengths_q, lengths_k, causal)


def attention_packed(
    q: Tensor, k: Tensor, v: Tensor, rows_q: Packing, rows_k: Packing, *, causal: bool = False, kernel: str = "auto"
) -> Tensor:
    """The same over packed rows: q [Nq, H, D], k and v [Nk, H, D] → [Nq, H, D]; row b of q sees only row b of k and v.

    Padding costs nothing here, in no kernel but those that have no form of variable length (SDPA on CUDA, reference).
    """
    chosen = choose_kernel(kernel, q.device.type, q.dtype)
    if chosen == "flash":
        return _flash(q, k, v, rows_q, rows_k, causal)
    if chosen == "sdpa" and q.device.type == "cpu":
        return _sdpa_by_rows(q, k, v, rows_q, rows_k, causal)
    lengths = {"lengths_q": rows_q.bounds.diff(), "lengths_k": rows_k.bounds.diff()}
    padded = attention(unpack(q, rows_q), unpack(k, rows_k), unpack(v, rows_k), **lengths, causal=causal, kernel=chosen)
    return repack(padded, rows_q)


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


def pack(x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Packing]:
    """Rows [B, T, …] without their padding: ([total, …], how they lie). `lengths` [B]; None: all are valid."""
    batch, width = x.shape[:2]
    if lengths is None:
        bounds = torch.arange(0, (batch + 1) * width, width, dtype=torch.int32, device=x.device)
        return x.flatten(0, 1), Packing((width,) * batch, bounds, width, None)
    valid = _valid(lengths, width, x.device)
    assert valid is not None
    where = valid.flatten().nonzero().squeeze(1)
    bounds = F.pad(lengths.to(x.device).cumsum(0), (1, 0)).to(torch.int32)
    rows = Packing(tuple(lengths.tolist()), bounds, width, where)
    return repack(x, rows), rows


def is_fake(x: Tensor) -> bool:
    """Whether a tensor has a shape but no values, so that lengths cannot be read and nothing can be packed."""
    return x.is_meta or isinstance(x, torch._subclasses.FakeTensor)


def repack(x: Tensor, rows: Packing) -> Tensor:
    """Another padded tensor [B, T, …] packed like one that was packed before."""
    return x.flatten(0, 1) if rows.where is None else x.flatten(0, 1)[rows.where]


def unpack(packed: Tensor, rows: Packing) -> Tensor:
    """Packed rows [total, …] as [B, T, …] with zeros at padding."""
    shape = (len(rows.lengths), rows.width, *packed.shape[1:])
    if rows.where is None:
        return packed.view(shape)
    flat = packed.new_zeros(shape[0] * shape[1], *packed.shape[1:])
    return flat.index_copy(0, rows.where, packed).view(shape)


def choose_kernel(kernel: str, device: str, dtype: torch.dtype) -> str:
    """The kernel that `kernel` stands for on this device; InputError if it cannot run here."""
    if kernel not in KERNELS:
        raise InputError(f"kernel: '{kernel}' is not valid; one of {', '.join(KERNELS)}")
    found = find_varlen() if device == "cuda" and dtype in HALVES else None
    if kernel == "flash" and found is None:
        raise InputError(
            f"kernel: 'flash' needs a CUDA device, fp16 or bf16 and one of {', '.join(VARLEN_SOURCES)}; "
            f"here: {device}, {dtype}; use 'auto' or 'sdpa'"
        )
    chosen = ("flash" if found else "sdpa") if kernel == "auto" else kernel
    if not torch.compiler.is_compiling():  # the compiler warns of what remembers its calls
        _say_once(f"{chosen} by {found.source}" if found and chosen == "flash" else chosen, kernel, device, str(dtype))
    return chosen


@functools.cache
def _say_once(chosen: str, asked: str, device: str, dtype: str) -> None:
    _log.info("attention kernel: %s (asked for: %s; %s, %s)", chosen, asked, device, dtype)


def _valid(lengths: Tensor | None, size: int, device: torch.device) -> Tensor | None:
    """Mask [B, size] of valid positions."""
    return None if lengths is None else torch.arange(size, device=device)[None, :] < lengths.to(device)[:, None]


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
    if causal and lengths_q is None and lengths_k is None and q.shape[1] == k.shape[1]:  # no mask: the fast kernels
        return _heads_first(q, k, v, is_causal=True)
    mask = _allowed(q, k, lengths_q, lengths_k, causal)
    if mask is not None:
        # A row that may see nothing (padding under a causal mask) would be NaN: it looks everywhere, then is zeroed.
        mask = mask | ~mask.any(-1, keepdim=True)
    output = _heads_first(q, k, v, attn_mask=mask)
    if causal:
        seen = _allowed(q, k, lengths_q, lengths_k, causal)
        assert seen is not None
        output = output * seen.any(-1)[:, 0, :, None, None].to(output.dtype)
    elif lengths_k is not None:
        output = output * (lengths_k.to(q.device) > 0)[:, None, None, None].to(output.dtype)
    return _zero_padding(output, lengths_q)


def _heads_first(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Torch's kernel, which wants [B, H, T, D], on [B, T, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal).transpose(1, 2)


def _sdpa_by_rows(q: Tensor, k: Tensor, v: Tensor, rows_q: Packing, rows_k: Packing, causal: bool) -> Tensor:
    """One unmasked call a row; neighbours of equal lengths share one. On a CPU a call costs little."""
    outputs = []
    at_q = at_k = 0
    for count, size_q, size_k in _runs(rows_q.lengths, rows_k.lengths):
        next_q, next_k = at_q + count * size_q, at_k + count * size_k
        one_q = q[at_q:next_q].unflatten(0, (count, size_q))
        one_k, one_v = (x[at_k:next_k].unflatten(0, (count, size_k)) for x in (k, v))
        found = _sdpa(one_q, one_k, one_v, None, None, causal) if size_q and size_k else torch.zeros_like(one_q)
        outputs.append(found.flatten(0, 1))
        at_q, at_k = next_q, next_k
    return torch.cat(outputs)


def _runs(lengths_q: tuple[int, ...], lengths_k: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """(number of rows, queries, keys) of neighbouring rows with the same numbers of both."""
    runs: list[tuple[int, int, int]] = []
    for size_q, size_k in zip(lengths_q, lengths_k, strict=True):
        if runs and runs[-1][1:] == (size_q, size_k):
            runs[-1] = (runs[-1][0] + 1, size_q, size_k)
        else:
            runs.append((1, size_q, size_k))
    return runs


def _flash(q: Tensor, k: Tensor, v: Tensor, rows_q: Packing, rows_k: Packing, causal: bool) -> Tensor:
    found = find_varlen()
    assert found is not None
    return found.call(q, k, v, rows_q.bounds, rows_k.bounds, rows_q.longest, rows_k.longest, causal)
