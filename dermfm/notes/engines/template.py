"""The engine without a model: the fallback text of each request."""

from __future__ import annotations

from collections.abc import Sequence

from dermfm.notes.engines.protocol import EngineConfig, Generation, Request
from dermfm.notes.engines.seat import Seat


class TemplateEngine:
    """Answers every request with the plain sentences that state its facts."""

    takes_images = True  # it looks at none, and needs none

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """The requests' fallback texts."""
        return [Generation(r.fallback, len(r.fallback.split())) for r in requests]


def prepare(config: EngineConfig) -> str:
    """Nothing is needed."""
    return "1"


def takes_images(config: EngineConfig) -> bool:
    """Whatever the strategy, its facts are stated."""
    return True


def weight_bytes(config: EngineConfig) -> int:
    """It has none."""
    return 0


def build(config: EngineConfig, seat: Seat | None = None) -> TemplateEngine:
    """The engine."""
    return TemplateEngine()
