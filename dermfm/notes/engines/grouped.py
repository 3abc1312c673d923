"""Attention on a CPU for rows that begin alike, and for fewer key/value heads than query heads.

transformers repeats keys and values to the number of query heads at every step, and a batch's cache holds the shared
beginning of its prompts once a row. With many rows and a long beginning, reading those copies costs more than the
model. Here the query heads of a group stand behind each other as further queries of their key/value head, and all rows
that share a beginning ask its keys together, as one matrix product; each row's own keys are asked apart, and the two
parts of the softmax are joined by their normalisers, which is the same sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

NAME = "dermfm_grouped"


@dataclass
class Beginnings:
    """What stands before the rows of a batch. `runs`: (rows, layers) for each run of neighbours that begin alike.

    `layers` holds (keys, values), each [1, K, S, D], for every layer of the model; null: nothing stands before them.
    `asked` counts the layers that attended so.
    """

    runs: Sequence[tuple[int, Sequence[tuple[torch.Tensor, torch.Tensor]] | None]]
    asked: int = field(default=0)


_BEFORE: ContextVar[Beginnings | None] = ContextVar("beginnings", default=None)


@contextmanager
def begun(beginnings: Beginnings, num_layers: int) -> Iterator[None]:
    """Let the rows of the one batch that goes through a model in this block attend to what stands before them."""
    token = _BEFORE.set(beginnings)
    try:
        yield
    finally:
        _BEFORE.reset(token)
    assert beginnings.asked == num_layers, "a layer of the model attends in its own way"


def attends_apart(model: Any) -> bool:
    """Whether beginnings may stay out of the rows' cache."""
    text = model.config.get_text_config()
    return model.config._attn_implementation == NAME and not hasattr(text, "v_head_dim")  # the kernel wants one width


def use_grouped_attention(model: Any) -> None:
    """Make a causal model on a CPU attend so; nothing changes where it does not let the attention be chosen."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    if model.device.type == "cpu" and model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, grouped_attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


def grouped_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [B, H, T, D], key and value [B, K, S, D] → [B, T, H, D]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    rows, heads, width, depth = query.shape
    groups, before = heads // key.shape[1], _BEFORE.get()
    if attention_mask is None and width > 1:  # no mask: causal, which a folded query no longer is
        if before is None:
            return sdpa_attention_forward(module, query, key, value, None, dropout=dropout, scaling=scaling, **more)
        attention_mask = torch.ones(width, key.shape[2], dtype=torch.bool).tril(key.shape[2] - width)[None, None]
    folded = query.reshape(rows, key.shape[1], groups * width, depth)
    bias = None if attention_mask is None else _bias(attention_mask, query.dtype).repeat(1, 1, groups, 1)
    if before is None:
        found = scaled_dot_product_attention(folded, key, value, attn_mask=bias, dropout_p=dropout, scale=scaling)
    else:
        found, normaliser = _attend(folded, key, value, bias, scaling)
        before.asked += 1
        found = _with_beginnings(folded, found, normaliser, before, module.layer_idx, scaling)
    return found.reshape(rows, heads, width, -1).transpose(1, 2).contiguous(), None


def _with_beginnings(
    query: torch.Tensor,
    own: torch.Tensor,
    own_normaliser: torch.Tensor,
    before: Beginnings,
    layer: int,
    scaling: float | None,
) -> torch.Tensor:
    """Attention [B, K, Q, D] over a row's own keys joined with that over its beginning's."""
    parts, start = [], 0
    for rows, layers in before.runs:
        here = slice(start, start + rows)
        start += rows
        if layers is None:
            parts.append(own[here])
            continue
        keys, values = layers[layer]
        _, heads, width, depth = query[here].shape
        together = query[here].transpose(0, 1).reshape(1, heads, rows * width, depth)
        found, normaliser = _attend(together, keys, values, None, scaling)
        found = found.reshape(heads, rows, width, depth).transpose(0, 1)
        normaliser = normaliser.reshape(heads, rows, width).transpose(0, 1)
        share = torch.sigmoid(own_normaliser[here] - normaliser)[..., None].to(own.dtype)
        parts.append(torch.lerp(found, own[here], share))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, scaling: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention [B, K, Q, D] and the logarithm of its normaliser [B, K, Q] (0 where a query may see no key)."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, False, attn_mask=bias, scale=scaling
    )


def _bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask as what is added to the scores."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))
