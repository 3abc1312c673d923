"""The engine without a model: the fallback text of each request."""

from __future__ import annotations

from collections.abc import Sequence

from dermfm.notes.engines.protocol import EngineConfig, Generation, Request


class TemplateEngine:
    """Answers every request with the plain sentences that state its facts."""

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """The requests' fallback texts."""
        return [Generation(r.fallback, len(r.fallback.split())) for r in requests]


def prepare(config: EngineConfig) -> str:
    """Nothing is needed."""
    return "1"


def build(config: EngineConfig) -> TemplateEngine:
    """The engine."""
    return TemplateEngine()
