"""How the towers and the fusion compute, decided from outside of them: activation checkpointing and torch.compile.

Neither changes a result nor a name in the state: blocks keep their classes, only their `forward` is wrapped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from dermfm.config import check_choice

PARTS = ("image", "text", "fusion", "decoder")


def check_parts(name: str, parts: Sequence[str]) -> None:
    """ValueError where an entry is neither a part of the model nor `all`."""
    for part in parts:
        check_choice(name, part, (*PARTS, "all"))


def prepare(model: nn.Module, recompute: Sequence[str], compiled: bool) -> None:
    """Apply the configured changes; before the engine is built over the model."""
    recompute_activations(model, recompute)
    if compiled:
        compile_parts(model)


def recompute_activations(model: nn.Module, parts: Sequence[str]) -> int:
    """Keep only the inputs of the blocks of `parts` (or `all`) for backward, and run the blocks again there.

    Returns how many blocks do so (Chen et al. 2016, arXiv 1604.06174). Memory falls from all of a part's activations to
    the inputs of its blocks and one block's activations; backward costs one forward pass more.
    """
    count = 0
    for part in PARTS if "all" in parts else parts:
        for block in blocks(getattr(model, part, None)):
            block.forward = functools.partial(_again, block.forward)  # type: ignore[method-assign]
            count += 1
    return count


def compile_parts(model: nn.Module) -> None:
    """Compile what the towers and the fusion run per batch, in place; the first passes of each shape are slow.

    Token counts vary from batch to batch: their dimension is left open, so that one compilation serves all.
    """
    image: Any = model.image
    image.body.forward_features = torch.compile(image.body.forward_features)
    for part in ("text", "fusion", "decoder"):
        for block in blocks(getattr(model, part, None)):
            block.compile(dynamic=True)


def blocks(part: nn.Module | None) -> Iterator[nn.Module]:
    """The repeated blocks of a tower or of the fusion: composed members of the outermost list that has several.

    timm's CNNs nest stages of blocks: there the stages are the blocks.
    """
    for child in part.children() if part is not None else ():
        members = [m for m in child.children() if list(m.children()) and not isinstance(m, _BatchNorm)]
        if isinstance(child, nn.ModuleList | nn.Sequential) and len(members) > 1:
            yield from members
        else:
            yield from blocks(child)


def _again(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # Dropout, where someone turns it on, must be the same when the block is run again: the state is kept.
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
