"""What an engine takes and gives, its configuration, and the table of engines."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dermfm.config import InputError, check_choice, check_range, key
from dermfm.notes.engines.seat import Seat

ENGINES: dict[str, str] = {
    "template": "dermfm.notes.engines.template",
    "transformers": "dermfm.notes.engines.transformers",
    "vllm": "dermfm.notes.engines.vllm",
    "openai": "dermfm.notes.engines.openai",
}


@dataclass(frozen=True)
class Request:
    """One note to be written. `messages` is the conversation, `prefix` how many of them other requests share.

    `fallback` is the text that states the facts without a model. `seed` is the note's planned seed; `attempt` 0 is
    the first try. `image` is the path of a file that belongs to the last message; `schema` a JSON schema (an object
    of enumerations and lists of them) that the answer must be valid under.
    """

    messages: tuple[tuple[str, str], ...]
    prefix: int
    fallback: str
    seed: int
    attempt: int = 0
    image: str | None = None
    schema: dict[str, Any] | None = None


@dataclass(frozen=True)
class Generation:
    """What an engine made of one request: the text, its tokens, whether it ended by itself, or an error.

    `refused`: the server says that the model declined; `text` is then what it said instead.
    """

    text: str
    num_tokens: int = 0
    finished: bool = True
    error: str | None = None
    refused: bool = False


class Engine(Protocol):
    """Writes notes. `takes_images`: whether requests may carry an image."""

    takes_images: bool

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """One generation a request, in their order. A request that cannot be done gives an `error`, or all raise.

        The text of a request with a schema is JSON valid under it, else the generation has an error.
        """
        ...


@dataclass(kw_only=True)
class ServerConfig:
    """An OpenAI-compatible server."""

    url: str = key("http://127.0.0.1:8000/v1", "base address, with its version: the engine asks <url>/chat/completions")
    key_variable: str = key("OPENAI_API_KEY", "environment variable that holds the key; unset sends none")
    concurrency: int = key(16, "requests under way at once")
    requests_per_minute: float | None = key(None, "rate limit; null has none")
    tokens_per_minute: float | None = key(None, "rate limit over prompts and answers; null has none")
    timeout_s: float = key(120.0, "of one try; a server that hangs costs so long")
    tries: int = key(6, "for a request that meets 408, 409, 429, 5xx, a cut connection or a hang; with growing pauses")
    longest_pause_s: float = key(60.0, "between two tries, Retry-After included")
    limit_field: str = key("max_tokens", "max_tokens | max_completion_tokens (newer OpenAI models)")
    image_side: int = key(1024, "images are made smaller to so many pixels on the longer side")
    check: bool = key(True, "ask <url>/models for the model at the start")

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"engine.server.url: '{self.url}' is not valid; it begins with http:// or https://")
        self.url = self.url.rstrip("/")
        check_choice("engine.server.limit_field", self.limit_field, ("max_tokens", "max_completion_tokens"))
        for name in ("concurrency", "tries", "image_side"):
            check_range(f"engine.server.{name}", getattr(self, name), 1)
        for name in ("requests_per_minute", "tokens_per_minute", "timeout_s", "longest_pause_s"):
            if getattr(self, name) is not None:
                check_range(f"engine.server.{name}", getattr(self, name), 1e-3)


@dataclass(kw_only=True)
class EngineConfig:
    """Which model writes the notes, and how."""

    kind: str = key("transformers", "template (no model) | transformers | vllm (both in process) | openai (a server)")
    model: str = key("smollm2", "smollm2 (packaged SmolLM2-135M-Instruct), a folder, a hub name; the server's name")
    revision: str | None = key(None, "hub revision; null takes the main branch's")
    dtype: str = key("auto", "auto (bfloat16 on a GPU, float32 on a CPU) | bfloat16 | float16 | float32")
    device: str = key("auto", "auto | cpu | cuda")
    batch_size: int = key(128, "requests decoded together at most; fewer make poorer use of a CPU")
    max_new_tokens: int = key(80, "longest answer in tokens")
    attempts: int = key(2, "tries for a note that fails its checks, the first one included")
    temperature: float = key(0.0, "of the first try; 0 is greedy")
    retry_temperature: float = key(0.6, "of the tries after it")
    top_k: int = key(20, "sampling is among the k most likely tokens")
    tensor_parallel: int = key(1, "processes that hold one model, each a part of every layer (transformers, vllm)")
    pipeline_parallel: int = key(1, "stages of layers that such a model is cut into besides (vllm)")
    server: ServerConfig = key(ServerConfig, "of kind openai")
    gpu_memory_utilization: float = key(0.9, "share of a GPU's memory that vllm takes")
    max_model_len: int | None = key(None, "longest prompt with answer, for vllm; null takes the model's")

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
        check_range("engine.tensor_parallel", self.tensor_parallel, 1)
        check_range("engine.pipeline_parallel", self.pipeline_parallel, 1)
        check_range("engine.gpu_memory_utilization", self.gpu_memory_utilization, 0.01, 1)
        if self.tensor_parallel > 1 and self.kind not in ("transformers", "vllm"):
            raise ValueError(f"engine.tensor_parallel: {self.kind} holds no model; leave it at 1")
        if self.pipeline_parallel > 1 and self.kind != "vllm":
            raise ValueError(f"engine.pipeline_parallel: only vllm cuts a model into stages, not {self.kind}")

    @property
    def shards(self) -> int:
        """Processes that hold one model."""
        return self.tensor_parallel * self.pipeline_parallel

    def sampling(self) -> list[object]:
        """The settings that decide a text beside model and prompt: a part of every note's id."""
        tries = [self.attempts, self.retry_temperature] if self.attempts > 1 else [1]
        return [self.dtype, self.max_new_tokens, self.temperature, self.top_k, *tries]


def prepare_engine(config: EngineConfig) -> str:
    """Check that the model is there (converting the packaged one once) and return its revision; else InputError."""
    return _module(config).prepare(config)


def takes_images(config: EngineConfig) -> bool:
    """Whether requests may carry an image, known without loading the model (after `prepare_engine`)."""
    return _module(config).takes_images(config)


def weight_bytes(config: EngineConfig) -> int:
    """Bytes of the model's weights in the memory of the processes that hold it, all together; 0 where none does."""
    return _module(config).weight_bytes(config)


def build_engine(config: EngineConfig, seat: Seat | None = None) -> Engine:
    """Load the engine in this process; `seat` is its place among the processes that hold one model."""
    if seat is None and config.shards > 1 and config.kind == "transformers":
        raise InputError(
            f"engine.tensor_parallel: {config.shards} processes are started on Ray only; leave out ray=never"
        )
    return _module(config).build(config, seat)


def _module(config: EngineConfig) -> Any:
    return importlib.import_module(ENGINES[config.kind])
