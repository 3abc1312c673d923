"""What an engine takes and gives, its configuration, and the table of engines."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dermfm.config import check_choice, check_range, key

ENGINES: dict[str, str] = {
    "template": "dermfm.notes.engines.template",
    "transformers": "dermfm.notes.engines.transformers",
}


@dataclass(frozen=True)
class Request:
    """One note to be written. `messages` is the conversation, `prefix` how many of them other requests share.

    `fallback` is the text that states the facts without a model. `seed` is the note's planned seed; `attempt` 0 is
    the first try.
    """

    messages: tuple[tuple[str, str], ...]
    prefix: int
    fallback: str
    seed: int
    attempt: int = 0


@dataclass(frozen=True)
class Generation:
    """What an engine made of one request: the text, its tokens, whether it ended by itself, or an error."""

    text: str
    num_tokens: int = 0
    finished: bool = True
    error: str | None = None


class Engine(Protocol):
    """Writes notes."""

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """One generation a request, in their order. A request that cannot be done gives an `error`, or all raise."""
        ...


@dataclass(kw_only=True)
class EngineConfig:
    """Which model writes the notes, and how."""

    kind: str = key("transformers", "template (facts as plain sentences, no model) | transformers (in process)")
    model: str = key("smollm2", "smollm2 (packaged SmolLM2-135M-Instruct), a folder, or a hub name")
    revision: str | None = key(None, "hub revision; null takes the main branch's")
    dtype: str = key("auto", "auto (bfloat16 on a GPU, float32 on a CPU) | bfloat16 | float16 | float32")
    device: str = key("auto", "auto | cpu | cuda")
    batch_size: int = key(32, "requests decoded together")
    max_new_tokens: int = key(80, "longest answer in tokens")
    attempts: int = key(2, "tries for a note that fails its checks, the first one included")
    temperature: float = key(0.0, "of the first try; 0 is greedy")
    retry_temperature: float = key(0.6, "of the tries after it")
    top_k: int = key(20, "sampling is among the k most likely tokens")

    def __post_init__(self) -> None:
        check_choice("engine.kind", self.kind, ENGINES)
        check_choice("engine.dtype", self.dtype, ("auto", "bfloat16", "float16", "float32"))
        check_choice("engine.device", self.device, ("auto", "cpu", "cuda"))
        check_range("engine.batch_size", self.batch_size, 1)
        check_range("engine.max_new_tokens", self.max_new_tokens, 1, 4096)
        check_range("engine.attempts", self.attempts, 1, 20)
        check_range("engine.temperature", self.temperature, 0, 5)
        check_range("engine.retry_temperature", self.retry_temperature, 0, 5)
        check_range("engine.top_k", self.top_k, 1)

    def sampling(self) -> list[object]:
        """The settings that decide a text beside model and prompt: a part of every note's id."""
        tries = [self.attempts, self.retry_temperature] if self.attempts > 1 else [1]
        return [self.dtype, self.max_new_tokens, self.temperature, self.top_k, *tries]


def prepare_engine(config: EngineConfig) -> str:
    """Check that the model is there (converting the packaged one once) and return its revision; else InputError."""
    return importlib.import_module(ENGINES[config.kind]).prepare(config)


def build_engine(config: EngineConfig) -> Engine:
    """Load the engine in this process."""
    return importlib.import_module(ENGINES[config.kind]).build(config)
