"""The variable-length kernels for CUDA, newest first: FlashAttention 3, flash-attn 2, and torch's own.

They share one layout: q [Nq, H, D], k and v [Nk, H, D], int32 bounds [B + 1] of the rows, the longest row of each.
flash-attn's signatures are checked against its published source by tests/unit/test_flash_signatures.py.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

VARLEN_SOURCES = ("flash_attn_interface (FlashAttention 3)", "flash_attn", "torch.nn.attention.varlen")
HALVES = (torch.float16, torch.bfloat16)
HOPPER = 9  # compute capability that FlashAttention 3 is written for
Varlen = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, bool], Tensor]


@dataclass(frozen=True)
class Found:
    """A kernel that is installed: where it comes from and how it is called."""

    source: str
    call: Varlen


@functools.cache
def find_varlen() -> Found | None:
    """The first of VARLEN_SOURCES that is installed for this machine's CUDA device; None without one."""
    if not torch.cuda.is_available():
        return None
    makers = (_flash3, _flash2, _torch)
    for source, make in zip(VARLEN_SOURCES, makers, strict=True):
        call = make()
        if call is not None:
            return Found(source, call)
    return None


def call_flash(function: Any, *inputs: Any) -> Tensor:
    """Call flash-attn's `flash_attn_varlen_func`, of version 2 or 3, on the inputs of `Varlen`."""
    q, k, v, bounds_q, bounds_k, longest_q, longest_k, causal = inputs
    out = function(q, k, v, bounds_q, bounds_k, longest_q, longest_k, causal=causal)
    return out[0] if isinstance(out, tuple) else out  # early versions of 3 return the log-sum-exp too


def call_torch(function: Any, *inputs: Any) -> Tensor:
    """Call torch's `varlen_attn`, whose causal form is a window in newer releases and a flag in older ones."""
    *rest, causal = inputs
    if "window_size" in inspect.signature(function).parameters:
        return function(*rest, window_size=(-1, 0) if causal else (-1, -1))
    return function(*rest, is_causal=causal)


def _flash3() -> Varlen | None:
    if torch.cuda.get_device_capability()[0] != HOPPER:
        return None
    return _bound("flash_attn_interface", "flash_attn_varlen_func", call_flash)


def _flash2() -> Varlen | None:
    return _bound("flash_attn", "flash_attn_varlen_func", call_flash)


def _torch() -> Varlen | None:
    return _bound("torch.nn.attention.varlen", "varlen_attn", call_torch)


def _bound(module: str, name: str, call: Callable[..., Tensor]) -> Varlen | None:
    """The kernel `name` of `module` behind our argument order; None where the module is not there."""
    top = module.split(".")[0]
    if importlib.util.find_spec(top) is None:
        return None
    try:
        function = getattr(importlib.import_module(module), name, None)
    except ImportError:  # built for another torch or CUDA
        return None
    return None if function is None else functools.partial(call, function)
