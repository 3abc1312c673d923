"""Attention with fewer key/value heads than query heads, without copying the keys and values for every query head.

transformers repeats them to the number of query heads at every step before it calls torch's attention with a mask. With
many rows and a long shared beginning that copy costs more than the model. Here the query heads of a group stand behind
each other as further queries of their key/value head, which is the same sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

NAME = "dermfm_grouped"


def use_grouped_attention(model: Any) -> None:
    """Make a causal model on a CPU attend so; nothing changes where its heads have keys of their own, or where it does
    not let the attention be chosen."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1)
    is_grouped = heads > (getattr(config, "num_key_value_heads", None) or heads)
    if is_grouped and model.device.type == "cpu" and model.config._attn_implementation == "sdpa":
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
    groups = heads // key.shape[1]
    if groups == 1 or (attention_mask is None and width > 1):  # no mask: causal, which a folded query no longer is
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
    folded = query.reshape(rows, key.shape[1], groups * width, depth)
    mask = None if attention_mask is None else attention_mask.repeat(1, 1, groups, 1)
    found = scaled_dot_product_attention(folded, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    return found.reshape(rows, heads, width, depth).transpose(1, 2).contiguous(), None
