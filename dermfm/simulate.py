"""One rank's training step without its machine: tensors without data, a process group without peers.

`trace_step` runs the real `optimizer_step` of rank r of N under PyTorch's FakeTensorMode and fake process group.
Nothing is computed; shapes, dtypes, lifetimes and what autograd saves are those of the real step. Activations, logits
and collectives of a world of any size are so known on a laptop.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import tempfile
import typing
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dermfm.config import InputError
from dermfm.model.dermfm import DermFM, ModelConfig
from dermfm.model.text import encoder_folder
from dermfm.objectives import OBJECTIVES, ObjectiveConfig
from dermfm.samples import Batch
from dermfm.step import optimizer_step

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Encoders of configs/gpu/ whose architecture is known without a hub: BERT-base with this vocabulary.
BERT_BASE = {"microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract-fulltext": 30522}
LARGEST_CONTRAST = 128  # rows of a rank of which the contrast is traced; beyond, bytes grow as rows × columns


@dataclass(frozen=True)
class Traced:
    """Bytes of a traced step.

    `saved`: the most that autograd held for backward at one time, parameters not counted, nor what a function keeps by
    itself (the gradients of the captioning loss), which is in `peak` alone. `peak`: the most that lived
    at one time of what the step made, gradients of parameters not counted. `sent`: input bytes of the collectives.
    """

    saved: int
    peak: int
    sent: dict[str, int]


@contextlib.contextmanager
def fake_group(world: int, rank: int = 0) -> Iterator[None]:
    """A default process group of `world` ranks of which only `rank` exists: collectives return at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "a simulated world needs a process without a process group"
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class SavedTensors:
    """Counts what autograd saves for backward, each storage once while anything refers to it."""

    def __init__(self, ignored: nn.Module | None = None) -> None:
        own = [*ignored.parameters(), *ignored.buffers()] if ignored is not None else []
        self._ignored = {_storage(t) for t in own}
        self._uses: Counter[int] = Counter()
        self.held = self.most = 0

    def hooks(self) -> Any:
        """The context in which saving is counted."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: getattr(kept, "tensor", kept))

    def _pack(self, tensor: Tensor) -> Any:
        name = _storage(tensor)
        if name in self._ignored:
            return tensor
        if not self._uses[name]:
            self.held += tensor.untyped_storage().nbytes()
            self.most = max(self.most, self.held)
        self._uses[name] += 1
        return _Kept(tensor, self, name)

    def release(self, name: int, size: int) -> None:
        """One reference to a storage is gone."""
        self._uses[name] -= 1
        if not self._uses[name]:
            self.held -= size


class _Kept:
    """A saved tensor that says when autograd lets it go."""

    def __init__(self, tensor: Tensor, counter: SavedTensors, name: int) -> None:
        self.tensor = tensor
        weakref.finalize(self, counter.release, name, tensor.untyped_storage().nbytes()).atexit = False


BY_INDEX = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
)


class Tracker(TorchDispatchMode):
    """Follows every storage made by an operation, and the bytes given to collectives.

    Where Python asks a tensor without data for a number (a longest note, a seed), it gets `number`; where rows are
    chosen by a mask without data (tokens that count), all of them are.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.sent: Counter[str] = Counter()
        self._events: list[tuple[int, int]] = []  # (storage, bytes made or, negative, freed), in order
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called for every operation."""
        if func is torch.ops.aten._local_scalar_dense.default:
            kind = args[0].dtype
            return True if kind == torch.bool else 1.0 if kind.is_floating_point else self.number
        if func in BY_INDEX and any(t is not None and t.dtype == torch.bool for t in args[1]):
            return self._all_rows(func, args)
        if func.namespace == "c10d":
            inputs = args[1] if "gather" in func.__name__ and isinstance(args[1], list | tuple) else args[0]
            self.sent[func.__name__.split(".")[0].strip("_")] += sum(
                t.nbytes for t in tree_leaves(inputs) if isinstance(t, Tensor)
            )
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._follow(tensor)
        return out

    def _all_rows(self, func: Any, args: Any) -> Tensor:
        """The result of indexing the first dimensions of args[0] by a mask that is true everywhere."""
        whole, (mask, *_) = args[:2]
        if func is not torch.ops.aten.index.Tensor:  # its backward: gradients go back to where they came from
            return whole
        out = whole.flatten(0, mask.dim() - 1).clone()
        self._follow(out)
        return out

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        name = storage._cdata
        if name not in self._alive:
            size = storage.nbytes()
            self._events.append((name, size))
            self._alive[name] = weakref.ref(storage, lambda _: self._free(name, size))

    def _free(self, name: int, size: int) -> None:
        del self._alive[name]
        self._events.append((name, -size))

    def peak(self) -> int:
        """The most bytes alive at one time, without storages that are alive still (gradients of parameters)."""
        last = {name: i for i, (name, _) in enumerate(self._events)}
        surviving = {i for name, i in last.items() if name in self._alive}
        now = most = 0
        for i, (_, size) in enumerate(self._events):
            now += 0 if i in surviving else size
            most = max(most, now)
        return most


@dataclass
class Unsharded:
    """Stands where DeepSpeed's engine does: the bare module, gradients left on its parameters."""

    module: nn.Module
    losses: list[float] = field(default_factory=list)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A phase of the model."""
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor, scale_wrt_gas: bool = False) -> None:
        """Accumulate gradients."""
        loss.backward()


def trace_step(
    model: nn.Module, objectives: ObjectiveConfig, num_samples: int, micro_batch: int, tokens: int, size: int
) -> Traced:
    """Trace one optimizer step of this rank over `num_samples` images of `size` pixels and notes of `tokens` tokens.

    `model` has parameters without data (`build`), in an active `fake_group`.
    """
    saved = SavedTensors(model)
    mode = typing.cast(Any, next(model.parameters())).fake_mode
    with mode, Tracker(tokens) as tracker, saved.hooks():
        batch = blank_batch(num_samples, tokens, size)
        optimizer_step(Unsharded(model), batch, micro_batch, objectives)
        del batch
    return Traced(saved.most, tracker.peak(), dict(tracker.sent))


def blank_batch(num_samples: int, tokens: int, size: int) -> Batch:
    """A batch of zeros with the shapes of a real one."""
    whole = functools.partial(torch.zeros, num_samples, dtype=torch.long)
    return Batch(
        pixels=torch.zeros(num_samples, 3, size, size, dtype=torch.uint8),
        tokens=torch.zeros(num_samples, tokens, dtype=torch.long),
        lengths=torch.full((num_samples,), tokens),
        labels=whole(),
        weight=torch.ones(num_samples),
        group=torch.arange(num_samples),
        text=torch.arange(num_samples),
        indices=torch.arange(num_samples),
        record_ids=[""] * num_samples,
    )


def build(config: ModelConfig, precision: str, prepare: Any = None) -> DermFM:
    """The model without data: every shape, no byte. `prepare(model)` may change it (activation checkpointing)."""
    with FakeTensorMode(allow_non_fake_inputs=True), Tracker(1), shape_only(config) as shape:
        model = DermFM(shape).train()
        if prepare is not None:
            prepare(model)
        _cast(model, DTYPES[precision])
        return model


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """`model.to(dtype)` for tensors without data, which cannot be swapped in place; tied ones stay tied."""
    done: dict[int, Tensor] = {}
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is not None and tensor.is_floating_point():
                    if id(tensor) not in done:
                        cast = tensor.detach().to(dtype)
                        is_parameter = isinstance(tensor, nn.Parameter)
                        done[id(tensor)] = nn.Parameter(cast, tensor.requires_grad) if is_parameter else cast
                    table[name] = done[id(tensor)]


@contextlib.contextmanager
def shape_only(config: ModelConfig) -> Iterator[ModelConfig]:
    """The same architecture without weights, with kernels that need no device; a hub's encoder that is not here is
    stood in for where it is known."""
    image = dataclasses.replace(config.image, weights=None, kernel=_anywhere(config.image.kernel))
    text = dataclasses.replace(config.text, pretrained=False, cache_mb=0, kernel=_anywhere(config.text.kernel))
    fusion = dataclasses.replace(config.fusion, kernel=_anywhere(config.fusion.kernel))
    decoder = dataclasses.replace(config.decoder, kernel=_anywhere(config.decoder.kernel))
    with tempfile.TemporaryDirectory() as folder:
        if not Path(encoder_folder(config.text.name)).is_dir() and not _is_cached(config.text.name):
            text = dataclasses.replace(text, name=_stand_in(config.text.name, Path(folder)))
        yield dataclasses.replace(config, image=image, text=text, fusion=fusion, decoder=decoder)


def _anywhere(kernel: str) -> str:
    return "auto" if kernel == "flash" else kernel


def _is_cached(name: str) -> bool:
    from transformers import AutoConfig, AutoTokenizer

    try:
        AutoConfig.from_pretrained(name, local_files_only=True)
        AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        return False
    return True


def _stand_in(name: str, folder: Path) -> str:
    """A folder with the configuration of a known encoder and a tokenizer of as many words."""
    from tokenizers import Tokenizer, models, processors
    from transformers import BertConfig, PreTrainedTokenizerFast

    if name not in BERT_BASE:
        raise InputError(
            f"text.name: encoder '{name}' is not on this machine, so its shape is not known; give a local folder, or "
            f"load it once. Known without: {', '.join(BERT_BASE)}"
        )
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(BERT_BASE[name] - len(special)))])}
    BertConfig(vocab_size=len(words)).save_pretrained(folder)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", words["[SEP]"]), ("[CLS]", words["[CLS]"]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return str(folder)


class OnlyFeatures(nn.Module):
    """A model whose towers cost nothing: what a step then holds is the contrast over the features."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.zeros(1, embed_dim))
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, phase: str, **inputs: Tensor) -> dict[str, Tensor]:
        """The phases of the model."""
        first = next(iter(inputs.values()))
        row = self.row.expand(first.shape[0], -1)
        out = {"tokens": row[:, None, :1], "embedding": row * 1, "logits": row[:, :2], "match": row[:, 0]}
        return {**out, "logit_scale": self.scale * 1, "logit_bias": self.scale * 1} if phase == "text" else out


def trace_contrast(objectives: ObjectiveConfig, rows: int, embed_dim: int) -> float:
    """Bytes that the contrast of a rank's `rows` against all ranks' rows needs at most, in an active `fake_group`.

    Traced for two sizes of at most `LARGEST_CONTRAST` rows; beyond, similarities grow as rows × columns, so as B² / N,
    and gathered features as columns, so as B.
    """
    if not objectives.compares:
        return 0.0
    if rows <= LARGEST_CONTRAST:
        return float(_contrast_peak(objectives, rows, embed_dim))
    most, half = (_contrast_peak(objectives, n, embed_dim) for n in (LARGEST_CONTRAST, LARGEST_CONTRAST // 2))
    grown = rows / LARGEST_CONTRAST
    square = max(2 * (most - 2 * half), 0)
    return square * grown**2 + (most - square) * grown


def _contrast_peak(objectives: ObjectiveConfig, rows: int, embed_dim: int) -> int:
    others = [name for name in objectives.active if "batch" not in OBJECTIVES[name].needs]
    only = copy.copy(objectives)
    for name in others:
        setattr(only, name, 0.0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = OnlyFeatures(embed_dim)
    return trace_step(model, only, rows, rows, tokens=1, size=1).peak
