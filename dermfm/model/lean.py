"""Norms and activations whose output is not kept for the backward pass.

What enters them is kept anyway; what comes out is read by one linear layer and cheap to compute again. So they move
into that layer: the module hands its input on, and the layer applies it first. Nothing else is run twice, as
recomputation stops as soon as the linear layer has its input. What an activation gives is the largest thing that a
transformer block would keep.

Under autocast a norm reads float32 and the layer half of that. Then what enters is not kept either, but what the norm
made of it before scale and shift, in the layer's type: half as much, of which its backward pass needs no more.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Any

import timm.layers
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
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
    if isinstance(cheap, nn.LayerNorm) and cheap.elementwise_affine and cheap.bias is not None and _narrows(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        return _NormedLinear.apply(x, cheap.weight, cheap.bias, linear.weight, linear.bias, cheap.eps, dtype)

    def run(x: Tensor) -> Tensor:
        return nn.Linear.forward(linear, type(cheap).forward(cheap, x))

    return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)


def _narrows(x: Tensor) -> bool:
    """Whether linear layers take x in a narrower type than its own, float32."""
    device = x.device.type
    narrow = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device).itemsize < x.dtype.itemsize
    return narrow and x.dtype == torch.float32  # autocast leaves float64 as it is


class _NormedLinear(torch.autograd.Function):
    """linear(norm(x)) of x [..., D] in `dtype`; x̂ = (x − mean) / deviation is kept in `dtype`, and the deviations."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor | None, eps: float,
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        normed, mean, inverse = torch.native_layer_norm(x, x.shape[-1:], scale, shift, eps)
        unit = torch.sub(x, mean).mul_(inverse).to(dtype)
        ctx.save_for_backward(unit, inverse, scale, shift, weight)
        ctx.bias_type = None if bias is None else bias.dtype
        return F.linear(normed.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        unit, inverse, scale, shift, weight = ctx.saved_tensors
        learns_scale, learns_shift, learns_weight, learns_bias = ctx.needs_input_grad[1:5]
        rows, width = gradient.flatten(0, -2), unit.shape[-1]
        wide = unit.to(inverse.dtype)
        of_weight = None
        if learns_weight:
            normed = torch.addcmul(shift, wide, scale).to(unit.dtype)
            of_weight = (rows.T @ normed.flatten(0, -2)).to(weight.dtype)
        of_bias = rows.sum(0).to(ctx.bias_type) if learns_bias and ctx.bias_type is not None else None
        of_normed = (gradient @ weight.to(gradient.dtype)).to(inverse.dtype)
        zero, one = torch.zeros_like(inverse), torch.ones_like(inverse)  # x̂ as one more norm sees it
        wanted = [True, learns_scale, learns_shift]
        of_unit, of_scale, of_shift = torch.ops.aten.native_layer_norm_backward(
            of_normed, wide, [width], zero, one, scale, shift, wanted
        )
        return of_unit.mul_(inverse), of_scale, of_shift, of_weight, of_bias, None, None


def _recomputes(x: Tensor, linear: nn.Linear) -> bool:
    """Whether the layer may compute its input once more in the backward pass, instead of keeping it."""
    # ZeRO stage 3 would gather the layer once more.
    keeps = KEEPS_ALL.get() or any(hasattr(p, "ds_id") for p in linear.parameters())
    return not keeps and torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling()
