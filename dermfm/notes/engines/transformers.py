"""A causal or image-text-to-text model through Hugging Face transformers, held by this process or by several.

Where several processes hold it, each has a part of every layer (tensor parallel). The first takes the requests, makes
jobs of them and tells each job to the others; all run the same steps and go on with the first one's choice of tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from safetensors import SafetensorError

from cluster.replicas import ReplicaLost
from dermfm.config import InputError, short_hash
from dermfm.notes.engines.decode import (
    Prefix,
    Sampling,
    can_share_prefixes,
    common_beginning,
    compute_prefix,
    decode,
)
from dermfm.notes.engines.folders import (
    bytes_of_weights,
    has_chat_template,
    model_folder,
    model_revision,
    on_cuda,
    sees_images,
)
from dermfm.notes.engines.grammar import Grammars
from dermfm.notes.engines.grouped import use_grouped_attention
from dermfm.notes.engines.pictures import decode_with_pictures, picture_inputs
from dermfm.notes.engines.protocol import EngineConfig, Generation, Request
from dermfm.notes.engines.schema import most_tokens, settle
from dermfm.notes.engines.seat import Seat, Table

PREFIXES_KEPT = 32
Encoded = tuple[tuple[int, ...], list[int]]  # token ids of the shared prefix, token ids after it


@dataclass(frozen=True)
class Job:
    """One batch, as every process of the model needs it. `inputs` is what a processor made of images and texts."""

    rows: list[Encoded]
    sampling: Sampling
    schemas: list[dict[str, Any] | None]
    inputs: dict[str, torch.Tensor] | None = None


class TransformersEngine:
    """A loaded model and tokenizer. Prefixes of conversations are computed once and kept."""

    def __init__(
        self, model: Any, tokenizer: Any, config: EngineConfig, processor: Any = None, table: Table | None = None
    ) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.processor, self.table = processor, table
        self.takes_images = processor is not None
        self.stop = _stop_tokens(model, tokenizer)
        self.shares = can_share_prefixes(model)
        self._prefixes: OrderedDict[tuple[int, ...], Prefix] = OrderedDict()
        self._grammars: Grammars | None = None

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """Batches of at most `batch_size` requests, tries alike; similarly long beginnings and rests stand together."""
        encoded = [self._encode(r) for r in requests]
        order = sorted(range(len(requests)), key=lambda i: (*_kind(requests[i]), *_lengths(encoded[i]), i))
        answers: list[Generation | None] = [None] * len(requests)
        for chunk in self._chunks(order, requests):
            job = self._job([requests[i] for i in chunk], [encoded[i] for i in chunk])
            for i, tokens in zip(chunk, self._run_together(job), strict=True):
                answers[i] = self._generation(tokens, requests[i])
        return [a for a in answers if a is not None]

    def follow(self) -> None:
        """Run what rank 0 tells, until it says that it was all; for the other processes that hold this model."""
        assert self.table is not None
        while (job := self.table.hear()) is not None:
            self._run(job)

    def close(self) -> None:
        """Let the other processes go."""
        if self.table is not None:
            self.table.tell(None)

    def _chunks(self, order: list[int], requests: Sequence[Request]) -> list[list[int]]:
        chunks: list[list[int]] = []
        for i in order:
            full = not chunks or len(chunks[-1]) == self.config.batch_size
            if full or _kind(requests[chunks[-1][0]]) != _kind(requests[i]):
                chunks.append([])
            chunks[-1].append(i)
        return chunks

    def _encode(self, request: Request) -> Encoded:
        if request.image is not None:
            return (), []  # the processor does it, for a batch
        tokens = self._tokens(request.messages, answer=True)
        can_share = self.shares and request.prefix > 0
        shared = self._tokens(request.messages[: request.prefix], answer=False) if can_share else []
        if tokens[: len(shared)] != shared or len(shared) == len(tokens):
            shared = []  # this model's chat template does not build up message by message
        return tuple(shared), tokens[len(shared) :]

    def _tokens(self, messages: Sequence[tuple[str, str]], answer: bool) -> list[int]:
        chat: list[dict[str, Any]] = [{"role": role, "content": content} for role, content in messages]
        if self.processor is not None:  # templates of image models want lists
            chat = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in chat]
        templates = self.processor or self.tokenizer
        text = templates.apply_chat_template(chat, tokenize=False, add_generation_prompt=answer)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _job(self, requests: list[Request], encoded: list[Encoded]) -> Job:
        config = self.config
        temperature = config.retry_temperature if requests[0].attempt else config.temperature
        seeds = [int(short_hash([r.seed, r.attempt])[:12], 16) for r in requests]
        inputs = picture_inputs(self.processor, requests) if requests[0].image is not None else None
        return Job(encoded, Sampling(temperature, config.top_k, seeds), [r.schema for r in requests], inputs)

    def _run_together(self, job: Job) -> list[list[int]]:
        if self.table is None:
            return self._run(job)
        try:
            self.table.tell(job)
            return self._run(job)
        except Exception as error:  # whatever it was, the processes no longer stand at the same step
            raise ReplicaLost(f"a process that holds the model failed: {' '.join(str(error).split())[:200]}") from error

    def _run(self, job: Job) -> list[list[int]]:
        """The new tokens of each row: the same on every process."""
        steps = max(most_tokens(schema, self.config.max_new_tokens) for schema in job.schemas)
        walk = self._walk(job) if any(job.schemas) else None
        agree = self.table.agree if self.table is not None else (lambda tokens: tokens)
        if job.inputs is not None:
            return decode_with_pictures(self.model, job.inputs, job.sampling, self.stop, steps, walk, agree)
        suffixes, prefixes = self._begun(job.rows)
        return decode(self.model, suffixes, prefixes, job.sampling, self.stop, steps, walk, agree)

    def _begun(self, rows: list[Encoded]) -> tuple[list[list[int]], list[Prefix]]:
        """What is left of each row, and what stands before it: the prefix and what its neighbours go on with alike."""
        suffixes: list[list[int]] = []
        prefixes: list[Prefix] = []
        for tokens, run in groupby(rows, key=lambda row: row[0]):
            rests, prefix = [rest for _, rest in run], self._prefix(tokens)
            alike = common_beginning(rests) if self.shares and len(rests) > 1 else 0
            prefix = compute_prefix(self.model, rests[0][:alike], prefix)
            suffixes += [rest[alike:] for rest in rests]
            prefixes += [prefix] * len(rests)
        return suffixes, prefixes

    def _walk(self, job: Job) -> Any:
        if self._grammars is None:
            width = self.model.get_output_embeddings().weight.shape[0]
            text = self.model.config.get_text_config()
            self._grammars = Grammars(self.tokenizer, max(width, text.vocab_size), self.stop)
        return self._grammars.walk(job.schemas)

    def _generation(self, tokens: list[int], request: Request) -> Generation:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        if request.schema is not None:
            try:
                text = settle(request.schema, text)
            except ValueError as error:
                return Generation("", len(tokens), error=str(error))
        return Generation(text, len(tokens), finished=tokens[-1] in self.stop)

    def _prefix(self, tokens: tuple[int, ...]) -> Prefix:
        if tokens not in self._prefixes:
            self._prefixes[tokens] = compute_prefix(self.model, tokens)
            if len(self._prefixes) > PREFIXES_KEPT:
                self._prefixes.popitem(last=False)
        self._prefixes.move_to_end(tokens)
        return self._prefixes[tokens]


def prepare(config: EngineConfig) -> str:
    """Find the model without loading it; returns its revision. InputError names a model that is not there."""
    revision = model_revision(config)
    if not has_chat_template(config):
        raise InputError(f"engine.model: {config.model} has no chat template; use an instruction-tuned model")
    if config.model != "smollm2":
        _check_known(config)
    if config.tensor_parallel > 1:
        _sharding(config)
    return revision


def takes_images(config: EngineConfig) -> bool:
    """Whether the model has an image tower."""
    return sees_images(config)


def weight_bytes(config: EngineConfig) -> int:
    """Bytes of its weights."""
    return bytes_of_weights(config)


def build(config: EngineConfig, seat: Seat | None = None) -> TransformersEngine:
    """Load model and tokenizer into this process; with a `seat`, this process's part of the model."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder, cuda = str(model_folder(config)), on_cuda(config)
    table = Table(seat, cuda) if seat is not None and seat.world > 1 else None
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if cuda else "float32"  # without matrix units bfloat16 is the slower
    images = sees_images(config)
    loader: Any = AutoModelForImageTextToText if images else AutoModelForCausalLM
    how: dict[str, Any] = {"distributed_config": _sharding(config)} if table is not None else {}
    try:
        model: Any = loader.from_pretrained(folder, dtype=getattr(torch, dtype), **how).eval()
        processor = AutoProcessor.from_pretrained(folder) if images else None
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise InputError(f"engine.model: {config.model} cannot be loaded: {_told(error)}") from error
    if table is None:
        model = model.to("cuda" if cuda else "cpu")
        if not images:
            use_grouped_attention(model)
    if processor is not None and processor.chat_template is None:  # some models have it with their tokenizer only
        processor.chat_template = tokenizer.chat_template
    return TransformersEngine(model, tokenizer, config, processor, table)


def _check_known(config: EngineConfig) -> None:
    """InputError where the installed transformers has no code for the model."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(str(model_folder(config)), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"engine.model: {config.model} cannot be loaded: {_told(error)}") from error


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _sharding(config: EngineConfig) -> Any:
    """How transformers cuts the model: its own plan, attention whole where the heads cannot be divided evenly."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.distributed import DistributedConfig

    shards, whole = config.tensor_parallel, AutoConfig.from_pretrained(str(model_folder(config)))
    shape = whole.get_text_config()
    loader: Any = AutoModelForImageTextToText if sees_images(config) else AutoModelForCausalLM
    with torch.device("meta"):
        plan = loader.from_config(whole)._tp_plan or {}
    if not any(".mlp." in name for name in plan):
        raise InputError(
            f"engine.tensor_parallel: transformers cannot shard {config.model} (a {shape.model_type}); set it to 1 "
            "or use engine.kind=vllm"
        )
    if shape.intermediate_size % shards:
        raise InputError(
            f"engine.tensor_parallel: {shards} does not divide the model's {shape.intermediate_size} channels"
        )
    if shape.num_attention_heads % shards == 0 and shape.num_key_value_heads % shards == 0:
        return DistributedConfig(tp_size=shards)
    return DistributedConfig(tp_size=shards, tp_plan={name: "replicate" for name in plan if ".self_attn." in name})


def _kind(request: Request) -> tuple[bool, bool, bool]:
    """What requests of one batch have alike."""
    return request.attempt > 0, request.image is not None, request.schema is not None


def _lengths(encoded: Encoded) -> tuple[int, tuple[int, ...], int]:
    """What similar rows have alike: length of the prefix, the prefix, length of the rest."""
    prefix, suffix = encoded
    return len(prefix), prefix, len(suffix)


def _stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    found = model.generation_config.eos_token_id
    tokens = found if isinstance(found, list) else [found]
    return [t for t in dict.fromkeys([tokenizer.eos_token_id, *tokens]) if t is not None]
