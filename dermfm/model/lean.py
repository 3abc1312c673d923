"""Norms and activations whose output is not kept for the backward pass.

What enters them is kept anyway; what comes out is read by one linear layer and cheap to compute again. So they move
into that layer: the module hands its input on, and the layer applies it first. Nothing else is run twice, as
recomputation stops as soon as the linear layer has its input.
"""

from __future__ import annotations

import functools
from typing import Any

import timm.layers
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertLayer

from dermfm.model.mlp import recomputed, recomputes


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


def move_into(cheap: Any, linear: Any) -> None:
    """`linear`, and nothing else, reads what `cheap` gives, and computes it itself. Their names and weights stay."""
    if type(linear) is nn.Linear and isinstance(cheap, nn.Module) and "forward" not in vars(cheap):
        vars(cheap)["forward"] = functools.partial(_pass_on, cheap, linear)
        vars(linear)["forward"] = functools.partial(_apply_and_project, cheap, linear)


def _pass_on(cheap: Any, linear: nn.Linear, x: Tensor) -> Tensor:
    return x if recomputes(x, linear) else type(cheap).forward(cheap, x)


def _apply_and_project(cheap: Any, linear: nn.Linear, x: Tensor) -> Tensor:
    """The layer's own forward pass, after the other's where `_pass_on` left that out: both ask the same of one x."""

    def run(x: Tensor) -> Tensor:
        return nn.Linear.forward(linear, type(cheap).forward(cheap, x))

    return recomputed(run, x) if recomputes(x, linear) else nn.Linear.forward(linear, x)
