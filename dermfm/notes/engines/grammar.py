"""Constrained decoding: which tokens may come next so that an answer stays valid under its schema (xgrammar)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import xgrammar

from dermfm.config import canonical_json
from dermfm.notes.engines.schema import decodable


class Grammars:
    """Compiled schemas of one tokenizer; `vocabulary` is the width of the model's logits."""

    def __init__(self, tokenizer: Any, vocabulary: int, stop: Sequence[int]) -> None:
        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocabulary, stop_token_ids=list(stop))
        self.vocabulary = vocabulary
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1)
        self._compiled: dict[str, Any] = {}

    def walk(self, schemas: Sequence[Mapping[str, Any] | None]) -> Walk:
        """One walk through a schema a row; rows without one are free."""
        matchers = [None if s is None else xgrammar.GrammarMatcher(self._compile(s)) for s in schemas]
        return Walk(matchers, self.vocabulary)

    def _compile(self, schema: Mapping[str, Any]) -> Any:
        name = canonical_json(schema)
        if name not in self._compiled:
            plain = decodable(schema)
            self._compiled[name] = self._compiler.compile_json_schema(plain, any_whitespace=False)
        return self._compiled[name]


class Walk:
    """Where each row of a batch stands in its grammar."""

    def __init__(self, matchers: Sequence[Any], vocabulary: int) -> None:
        self._matchers = matchers
        self._bits = xgrammar.allocate_token_bitmask(len(matchers), vocabulary)

    def allow(self, logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Logits [b, V] of these rows as float32, minus infinity where a token may not come next."""
        masked = logits.float()
        held = [k for k, row in enumerate(rows) if self._is_walking(row)]
        for k in held:
            self._matchers[rows[k]].fill_next_token_bitmask(self._bits, k)
        if held:
            bits = self._bits[: len(rows)].to(logits.device)
            xgrammar.apply_token_bitmask_inplace(masked, bits, indices=held)
        return masked

    def take(self, row: int, token: int) -> None:
        """A row's next token was chosen."""
        if self._is_walking(row):
            accepted = self._matchers[row].accept_token(token)
            assert accepted, f"token {token} was chosen against the grammar"

    def _is_walking(self, row: int) -> bool:
        return self._matchers[row] is not None and not self._matchers[row].is_terminated()
