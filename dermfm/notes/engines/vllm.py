"""vLLM in this process: tensor × pipeline parallel over GPUs and nodes, images, structured answers.

With more than one shard vLLM starts its own workers on Ray, in the placement group that this actor stands in: one GPU
a bundle. Batching, prefix caching and key/value memory are vLLM's; all requests of a lease go in at once.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from cluster.replicas import ReplicaLost
from dermfm.config import InputError, short_hash
from dermfm.notes.engines.folders import bytes_of_weights, model_folder, model_revision, sees_images
from dermfm.notes.engines.pictures import IMAGE_SIDE, chat, data_url
from dermfm.notes.engines.protocol import EngineConfig, Generation, Request
from dermfm.notes.engines.schema import decodable, most_tokens, settle
from dermfm.notes.engines.seat import Seat


class VllmEngine:
    """Asks an `LLM`. `parameters` and `structured` are vLLM's SamplingParams and StructuredOutputsParams."""

    def __init__(self, llm: Any, parameters: Any, structured: Any, dead: Any, config: EngineConfig) -> None:
        self.llm, self.parameters, self.structured, self.dead = llm, parameters, structured, dead
        self.config = config
        self.takes_images = sees_images(config)

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """One generation a request; ReplicaLost where the engine's processes have died."""
        chats = [self._chat(r) for r in requests]
        how = [self._parameters(r) for r in requests]
        try:
            outputs = self.llm.chat(chats, sampling_params=how, use_tqdm=False)
        except self.dead as error:
            raise ReplicaLost(f"vLLM's engine died: {' '.join(str(error).split())[:200]}") from error
        return [_generation(output, r) for output, r in zip(outputs, requests, strict=True)]

    def _chat(self, request: Request) -> list[dict[str, Any]]:
        if request.image is None:
            return chat(request, None)
        return chat(request, {"type": "image_url", "image_url": {"url": data_url(request.image, IMAGE_SIDE)}})

    def _parameters(self, request: Request) -> Any:
        config = self.config
        temperature = config.retry_temperature if request.attempt else config.temperature
        rule = None
        if request.schema is not None:
            rule = self.structured(json=decodable(request.schema), disable_any_whitespace=True)
        return self.parameters(
            temperature=temperature,
            top_k=config.top_k,
            seed=int(short_hash([request.seed, request.attempt])[:7], 16),
            max_tokens=most_tokens(request.schema, config.max_new_tokens),
            structured_outputs=rule,
        )


def llm_arguments(config: EngineConfig) -> dict[str, Any]:
    """What `LLM` is built with."""
    arguments: dict[str, Any] = {
        "model": str(model_folder(config)),
        "dtype": config.dtype,
        "tensor_parallel_size": config.tensor_parallel,
        "pipeline_parallel_size": config.pipeline_parallel,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "enable_prefix_caching": True,
        "seed": 0,
    }
    if config.shards > 1:
        arguments["distributed_executor_backend"] = "ray"
    if config.max_model_len is not None:
        arguments["max_model_len"] = config.max_model_len
    if sees_images(config):
        arguments["limit_mm_per_prompt"] = {"image": 1}
    return arguments


def prepare(config: EngineConfig) -> str:
    """Find package and model without loading either; returns the model's revision."""
    if importlib.util.find_spec("vllm") is None:  # said before a model is downloaded for it
        raise InputError('engine.kind: vllm is not installed; pip install "dermfm[vllm]", on machines with GPUs')
    return model_revision(config)


def takes_images(config: EngineConfig) -> bool:
    """Whether the model has an image tower."""
    return sees_images(config)


def weight_bytes(config: EngineConfig) -> int:
    """Bytes of its weights."""
    return bytes_of_weights(config)


def build(config: EngineConfig, seat: Seat | None = None) -> VllmEngine:
    """Load the model."""
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams
    from vllm.v1.engine.exceptions import EngineDeadError

    return VllmEngine(LLM(**llm_arguments(config)), SamplingParams, StructuredOutputsParams, EngineDeadError, config)


def _generation(output: Any, request: Request) -> Generation:
    answer = output.outputs[0]
    text, tokens = answer.text.strip(), len(answer.token_ids)
    if request.schema is not None:
        try:
            text = settle(request.schema, text)
        except ValueError as error:
            return Generation("", tokens, error=str(error))
    return Generation(text, tokens, finished=answer.finish_reason == "stop")
