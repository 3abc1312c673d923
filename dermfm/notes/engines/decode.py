"""Batched decoding of a causal language model: shared prefix computed once, finished rows dropped, planned seeds.

Written for many short answers to long, mostly equal prompts. The key/value cache is allocated once at its final
length (growing it by concatenation costs more than the model itself on a CPU), rows that have ended leave the batch,
and each row samples from noise of its own seed, so that its randomness does not depend on its neighbours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from dermfm.notes.engines.grammar import Walk
from dermfm.notes.engines.grouped import Beginnings, attends_apart, begun

SHRINK_AT = 0.75  # rows leave the batch once no more than this share of it is still being written


class RoomyLayer(DynamicLayer):
    """A layer's cache with room for `room` positions: new keys and values are written in place."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.length = room, 0
        self._store: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states [B, H, T, D]; returns all keys and values so far, as views."""
        if self._store is None:
            self.lazy_initialization(key_states, value_states)
            rows = key_states.shape[0]
            self._store = self._allocate(key_states, rows), self._allocate(value_states, rows)
        end = self.length + key_states.shape[-2]
        for store, states in zip(self._store, (key_states, value_states), strict=True):
            store[:, :, self.length : end] = states
        self.length = end
        return self._view()

    def place(self, row: int, rows: int, end: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put states [1, H, T, D] into one of `rows` rows so that they end at position `end`, where writing goes on."""
        if self._store is None:
            self.lazy_initialization(keys, values)
            self._store = self._allocate(keys, rows), self._allocate(values, rows)
        for store, states in zip(self._store, (keys, values), strict=True):
            store[row, :, end - states.shape[-2] : end] = states[0]
        self.length = end
        self._view()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows."""
        if self._store is not None:
            self._store = self._store[0][indices], self._store[1][indices]
            self._view()

    def _allocate(self, states: torch.Tensor, rows: int) -> torch.Tensor:
        _, heads, _, width = states.shape
        return states.new_zeros(rows, heads, self.room, width)

    def _view(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._store is not None
        self.keys, self.values = (store[:, :, : self.length] for store in self._store)
        return self.keys, self.values


@dataclass(frozen=True)
class Prefix:
    """A computed beginning that many rows share: its length in tokens, and the model's cache of it (one row)."""

    length: int
    cache: DynamicCache | None


EMPTY = Prefix(0, None)


def can_share_prefixes(model: Any) -> bool:
    """Whether all layers keep every position (sliding windows and recurrent layers do not)."""
    layers = DynamicCache(config=model.config).layers
    return len(layers) > 0 and all(type(layer) is DynamicLayer for layer in layers)


@torch.inference_mode()
def compute_prefix(model: Any, tokens: Sequence[int], after: Prefix = EMPTY) -> Prefix:
    """Run the model once over a beginning (token ids) that stands `after` another; that one stays as it is."""
    if not tokens:
        return after
    cache = DynamicCache(config=model.config)
    if after.cache is not None:
        cache.layers = [copy.copy(layer) for layer in after.cache.layers]  # growing replaces tensors, it writes in none
    ids = torch.tensor([list(tokens)], device=model.device)
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return Prefix(after.length + len(tokens), cache)


def common_beginning(rows: Sequence[list[int]]) -> int:
    """How many tokens all rows begin with, leaving every row at least one."""
    first, last = min(rows), max(rows)  # in order of their tokens: what these two share, all share
    same = next((k for k, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return min(same, *(len(row) - 1 for row in rows))


def _joined_cache(model: Any, prefixes: Sequence[Prefix], room: int) -> DynamicCache:
    """A cache with one row for each prefix, all of them ending at the same position, and `room` positions after it."""
    joined: Any = DynamicCache(config=model.config)
    if not can_share_prefixes(model):
        return joined
    width = max(p.length for p in prefixes)
    joined.layers = [RoomyLayer(width + room) for _ in joined.layers]
    for depth, layer in enumerate(joined.layers):
        for row, prefix in enumerate(prefixes):
            if prefix.cache is not None:
                source: Any = prefix.cache.layers[depth]
                layer.place(row, len(prefixes), width, source.keys, source.values)
    return joined


def _standing_before(prefixes: Iterable[Prefix], layers: int) -> AbstractContextManager[None]:
    """Rows of these prefixes attend to them without a copy of their own; neighbours with the same one ask together."""
    runs: list[Any] = []
    for _, same in groupby(prefixes, key=id):
        prefix, *others = same
        held: Any = prefix.cache.layers if prefix.cache is not None else None
        runs.append((1 + len(others), held and [(layer.keys, layer.values) for layer in held]))
    return begun(Beginnings(runs), layers)


@dataclass(frozen=True)
class Sampling:
    """How each row chooses its next token: temperature 0 is greedy. `seeds`: one for each row."""

    temperature: float
    top_k: int
    seeds: Sequence[int]


@torch.inference_mode()
def decode(
    model: Any,
    suffixes: Sequence[Sequence[int]],
    prefixes: Sequence[Prefix],
    sampling: Sampling,
    stop: Sequence[int],
    max_new_tokens: int,
    walk: Walk | None = None,
    agree: Callable[[torch.Tensor], torch.Tensor] = lambda tokens: tokens,
) -> list[list[int]]:
    """Continue `prefix + suffix` for each row; returns the new token ids, ending with a stop token where one came.

    `walk` says which tokens may come next in each row; `agree` makes all processes of a sharded model go on with the
    same tokens.

    Rows are padded between prefix and suffix, and before their prefix where the model's attention wants it in every
    row's cache. Every suffix needs at least one token; a model that cannot share prefixes (`can_share_prefixes`) needs
    empty ones.
    """
    rows, width = len(suffixes), max(map(len, suffixes))
    ids = torch.tensor([[stop[0]] * (width - len(s)) + list(s) for s in suffixes], device=model.device)
    mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in suffixes], device=model.device)
    position = torch.tensor([[p.length] for p in prefixes], device=model.device) + mask.cumsum(dim=1) - 1
    apart = attends_apart(model) and can_share_prefixes(model)
    joined = [EMPTY] * rows if apart else prefixes
    mask = torch.cat([_held(joined, mask), mask], dim=1)
    cache = _joined_cache(model, joined, width + max_new_tokens)
    choose = chooser(sampling, max_new_tokens, model.device)
    written: list[list[int]] = [[] for _ in range(rows)]
    live = list(range(rows))
    for step in range(max_new_tokens):
        before = _standing_before((prefixes[k] for k in live), len(cache.layers)) if apart else nullcontext()
        with before:
            logits = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=position.clamp(min=0),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
        allowed = logits if walk is None else walk.allow(logits, live)
        ids = agree(choose(allowed, live, step))[:, None]
        for row, token in zip(live, ids[:, 0].tolist(), strict=True):
            if not (written[row] and written[row][-1] in stop):
                written[row].append(token)
                if walk is not None:
                    walk.take(row, token)
        going = [k for k, row in enumerate(live) if written[row][-1] not in stop]
        if not going:
            break
        mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
        position = position[:, -1:] + 1
        if len(going) <= SHRINK_AT * len(live):
            keep = torch.tensor(going, device=model.device)
            cache.batch_select_indices(keep)
            ids, mask, position = ids[keep], mask[keep], position[keep]
            live = [live[k] for k in going]
    return written


def _held(prefixes: Sequence[Prefix], like: torch.Tensor) -> torch.Tensor:
    """1 where a row's cache holds its prefix, all of them ending at the same position."""
    width = max(p.length for p in prefixes)
    return torch.tensor([[0] * (width - p.length) + [1] * p.length for p in prefixes]).to(like)


def chooser(sampling: Sampling, steps: int, device: torch.device) -> Any:
    """A function (logits [b, V], rows, step) → token ids [b]."""
    if sampling.temperature == 0:
        return lambda logits, rows, step: logits.argmax(dim=-1)
    noise = torch.stack([_gumbel(seed, steps, sampling.top_k) for seed in sampling.seeds]).to(device)

    def choose(logits: torch.Tensor, rows: list[int], step: int) -> torch.Tensor:
        # The largest of logits/T plus Gumbel noise is an exact draw from softmax(logits/T).
        best = torch.topk(logits.float(), min(sampling.top_k, logits.shape[-1]), dim=-1)
        drawn = best.values / sampling.temperature + noise[rows, step, : best.values.shape[-1]]
        return best.indices.gather(-1, drawn.argmax(dim=-1, keepdim=True))[:, 0]

    return choose


def _gumbel(seed: int, steps: int, choices: int) -> torch.Tensor:
    """Standard Gumbel noise [steps, choices] of one row's seed."""
    uniform = torch.rand(steps, choices, generator=torch.Generator().manual_seed(seed)).clamp_(1e-9, 1 - 1e-7)
    return -torch.log(-torch.log(uniform))
