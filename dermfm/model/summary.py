"""What a model is made of: parameters, work and memory of each part, for one sample; measured, not estimated."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

if TYPE_CHECKING:
    from dermfm.model.dermfm import DermFM

TOWERS = {"image": "image tower", "text": "text tower", "fusion": "fusion", "decoder": "decoder"}
REST = "projections and heads"


def _attention_work(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


# Torch counts the fused kernels of CUDA only.
_CPU_KERNEL = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_work}


@dataclass(frozen=True)
class Part:
    """One part of a model. `flops`: of one sample's forward pass (a multiply-add counts two), at the longest note;
    `activation_bytes`: what autograd keeps of that pass for the backward one, parameters and inputs left out."""

    name: str
    parameters: int
    trainable: int
    flops: int
    activation_bytes: int

    @property
    def training_flops(self) -> int:
        """Of one sample's step: the forward pass, and twice as much backward where something learns."""
        return self.flops * (3 if self.trainable else 1)


def summary(model: DermFM) -> list[Part]:
    """The parts of `model` and, last, `total`. Runs each part once on one blank sample, on the model's device."""
    runs = _runs(model)
    parts = []
    for attribute, title in TOWERS.items():
        if hasattr(model, attribute):
            flops, kept = _measure(runs[attribute], model)
            parts.append(Part(title, *_count(getattr(model, attribute)), flops, kept))
    own, learning = _count(model)
    flops, kept = _measure(runs["heads"], model)
    rest = own - sum(p.parameters for p in parts), learning - sum(p.trainable for p in parts)
    parts.append(Part(REST, *rest, flops, kept))
    sums = [sum(getattr(p, f) for p in parts) for f in ("parameters", "trainable", "flops", "activation_bytes")]
    return [*parts, Part("total", *sums)]


def print_summary(parts: list[Part]) -> None:
    """The parts as a table for people."""
    table = Table("part", "parameters", "trainable", "GFLOP a sample", "activations a sample", title="model")
    for p in parts:
        row = (f"{p.parameters / 1e6:.2f} M", f"{p.trainable / 1e6:.2f} M", f"{p.flops / 1e9:.2f}")
        table.add_row(p.name, *row, f"{p.activation_bytes / 1e6:.1f} MB", end_section=p.name == REST)
    Console().print(table)


def _runs(model: DermFM) -> dict[str, Callable[[], Any]]:
    """Attribute → a forward pass of that part on one sample."""
    config, device = model.config, model.logit_scale.device
    pixels = torch.full((1, 3, model.image_size, model.image_size), 128, dtype=torch.uint8, device=device)
    width = config.text.max_tokens
    tokens = torch.ones(1, width, dtype=torch.long, device=device)
    lengths = torch.full((1,), width, device=device)
    with torch.no_grad(), _uncached(model):
        image_tokens, image_pooled = model.image(pixels)
        text_tokens, text_pooled = model.text(tokens, lengths)
    floats = [t.requires_grad_() for t in (image_tokens, text_tokens, image_pooled, text_pooled)]

    def heads() -> list[Tensor]:
        image = [model.embed_image(floats[2]), model.image_logits(floats[2])]
        return [*image, model.embed_text(floats[3]), model.text_logits(floats[3])]

    return {
        "image": lambda: model.image(pixels),
        "text": lambda: model.text(tokens, lengths),
        "fusion": lambda: model.fuse(floats[0], floats[1], lengths),
        "decoder": lambda: model.decoder(floats[0], tokens, lengths, torch.ones(1, device=device)),
        "heads": heads,
    }


def _measure(run: Callable[[], Any], model: DermFM) -> tuple[int, int]:
    """(FLOPs, bytes that autograd keeps) of one pass."""
    given = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in given:  # by the storage itself: a model without data has no addresses
            kept[storage._cdata] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with (
        torch.enable_grad(),
        _uncached(model),
        hooks,
        FlopCounterMode(display=False, custom_mapping=_CPU_KERNEL) as counter,
    ):
        out = run()  # held until it is measured: freed memory would be given out twice
    del out
    return counter.get_total_flops(), sum(kept.values())


@contextlib.contextmanager
def _uncached(model: DermFM) -> Iterator[None]:
    """The text tower without its memory of notes, which would do the work once only."""
    cache, model.text._cache = model.text._cache, None
    try:
        yield
    finally:
        model.text._cache = cache


def _count(module: nn.Module) -> tuple[int, int]:
    """(parameters, those that learn); in ZeRO stage 3 the whole ones, not a rank's share."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in module.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, learns in sizes if learns)
