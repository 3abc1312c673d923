"""The two-layer perceptron of a block, which does not keep what its activation gives.

That output is the largest thing that a transformer block would keep for the backward pass, and the cheapest to compute
again from its input, which is kept anyway. The matrix products are not run again: recomputation stops as soon as the
second layer has its input.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import timm.layers
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# A trace of what a rank of ZeRO stage 3 does, whose parameters are whole in the trace, sets it.
KEEPS_ALL: contextvars.ContextVar[bool] = contextvars.ContextVar("KEEPS_ALL", default=False)


@contextlib.contextmanager
def kept(all_of_it: bool) -> Iterator[None]:
    """Perceptrons keep all, as at ZeRO stage 3, or what they keep anyway."""
    token = KEEPS_ALL.set(all_of_it)
    try:
        yield
    finally:
        KEEPS_ALL.reset(token)


class Mlp(nn.Sequential):
    """Linear, GELU, Linear."""

    def forward(self, input: Tensor) -> Tensor:
        """x [..., D] → [..., D]."""
        first, activation, second = self
        return activate_and_project(activation, second, first(input))


def mlp(width: int, ratio: float) -> Mlp:
    """The perceptron of a block of `width` channels with `width` · `ratio` hidden ones."""
    hidden = int(width * ratio)
    return Mlp(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def activate_and_project(activation: nn.Module, second: nn.Module, hidden: Tensor) -> Tensor:
    """second(activation(hidden)), keeping only `hidden` for the backward pass."""

    def run(hidden: Tensor) -> Tensor:
        return second(activation(hidden))

    return recomputed(run, hidden) if recomputes(hidden, second) else run(hidden)


def recomputes(x: Tensor, layer: nn.Module) -> bool:
    """Whether a layer that reads `x` may compute its input once more in the backward pass, instead of keeping it."""
    # ZeRO stage 3 would gather the layer once more.
    keeps = KEEPS_ALL.get() or any(hasattr(p, "ds_id") for p in layer.parameters())
    return not keeps and torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling()


def recomputed(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """run(x), of which nothing but `x` is kept."""
    return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)


def use_lean_mlps(body: nn.Module) -> None:
    """Let the perceptrons of a timm transformer keep as little; those with dropout, a norm or convolutions stay."""
    for module in body.modules():
        if type(module) is timm.layers.Mlp and _is_plain(module):
            module.forward = functools.partial(_forward, module)  # type: ignore[method-assign]


def _is_plain(module: Any) -> bool:
    return (
        isinstance(module.fc1, nn.Linear)
        and isinstance(module.norm, nn.Identity)
        and module.drop1.p == module.drop2.p == 0
    )


def _forward(module: Any, x: Tensor) -> Tensor:
    return activate_and_project(module.act, module.fc2, module.fc1(x))
