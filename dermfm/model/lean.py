"""Norms and activations whose output is not kept for the backward pass.

What enters them is kept anyway; what comes out is read by one linear layer and cheap to compute again. So they move
into that layer: the module hands its input on, and the layer applies it first. Nothing else is run twice, as
recomputation stops as soon as the linear layer has its input. What an activation gives is the largest thing that a
transformer block would keep.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Any

import timm.layers
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.bert.modeling_bert import BertLayer

# A trace of what a rank of ZeRO stage 3 does, whose parameters are whole in the trace, sets it.
KEEPS_ALL: contextvars.ContextVar[bool] = contextvars.ContextVar("KEEPS_ALL", default=False)


@contextlib.contextmanager
def kept(all_of_it: bool) -> Iterator[None]:
    """Layers keep all, as at ZeRO stage 3, or what they keep anyway."""
    token = KEEPS_ALL.set(all_of_it)
    try:
        yield
    finally:
        KEEPS_ALL.reset(token)


def mlp(width: int, ratio: float) -> nn.Sequential:
    """The perceptron of a block of `width` channels with `width` · `ratio` hidden ones: linear, GELU, linear."""
    hidden = int(width * ratio)
    layers = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
    move_into(layers[1], layers[2])
    return layers


def use_lean_blocks(body: nn.Module) -> None:
    """Both norms of every plain block of a timm ViT, the activation of every layer of a BERT; others stay as is."""
    for module in body.modules():
        parts: Any = module
        if type(module) is BertLayer:
            move_into(parts.intermediate.intermediate_act_fn, parts.output.dense)
        if type(module) is not Block:
            continue
        if type(parts.attn) is timm.layers.Attention and getattr(parts.attn, "gate", None) is None:
            move_into(parts.norm1, parts.attn.qkv)
        if type(parts.mlp) is timm.layers.Mlp:
            move_into(parts.norm2, parts.mlp.fc1)


def use_lean_mlps(body: nn.Module) -> None:
    """The activation of every perceptron of a timm transformer; those with dropout, a norm or convolutions stay."""
    for module in body.modules():
        parts: Any = module
        if type(module) is not timm.layers.Mlp:
            continue
        if isinstance(parts.norm, nn.Identity) and parts.drop1.p == parts.drop2.p == 0:
            move_into(parts.act, parts.fc2)


def move_into(cheap: Any, linear: Any) -> None:
    """`linear`, and nothing else, reads what `cheap` gives, and computes it itself. Their names and weights stay."""
    if type(linear) is nn.Linear and isinstance(cheap, nn.Module) and "forward" not in vars(cheap):
        vars(cheap)["forward"] = functools.partial(_pass_on, cheap, linear)
        vars(linear)["forward"] = functools.partial(_apply_and_project, cheap, linear)


def _pass_on(cheap: Any, linear: nn.Linear, x: Tensor) -> Tensor:
    return x if _recomputes(x, linear) else type(cheap).forward(cheap, x)


def _apply_and_project(cheap: Any, linear: nn.Linear, x: Tensor) -> Tensor:
    """The layer's own forward pass, after the other's where `_pass_on` left that out: both ask the same of one x."""
    if not _recomputes(x, linear):
        return nn.Linear.forward(linear, x)

    def run(x: Tensor) -> Tensor:
        return nn.Linear.forward(linear, type(cheap).forward(cheap, x))

    return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)


def _recomputes(x: Tensor, linear: nn.Linear) -> bool:
    """Whether the layer may compute its input once more in the backward pass, instead of keeping it."""
    # ZeRO stage 3 would gather the layer once more.
    keeps = KEEPS_ALL.get() or any(hasattr(p, "ds_id") for p in linear.parameters())
    return not keeps and torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling()
