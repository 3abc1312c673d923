"""AdamW's parameter groups and the schedule of their rates, a function of samples seen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from dermfm.compute import blocks
from dermfm.config import check_choice, check_range, key

TOWERS = ("image", "text")
PARTS = (*TOWERS, "fusion", "decoder")  # what is none of them is a head: projections, class heads, logit scale


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW and the schedule of its rates. Rates follow samples seen, not steps, and so not the batch."""

    lr: float = key(1e-3, "peak learning rate of projections and heads, and of what has none of its own")
    image_lr: float = key(3e-4, "peak learning rate of the image tower")
    text_lr: float = key(1e-4, "peak learning rate of the text tower")
    fusion_lr: float | None = key(None, "peak learning rate of the fusion; null: lr")
    decoder_lr: float | None = key(None, "peak learning rate of the note decoder; null: lr")
    layer_decay: float = key(1.0, "factor on a tower's rate for each layer further from its output; 1: none")
    weight_decay: float = key(0.05, "decoupled weight decay; not on norms, biases, tokens, positions, logit scale")
    betas: list[float] = key([0.9, 0.98], "AdamW's exponential decay rates")
    eps: float = key(1e-6, "AdamW's denominator term")
    warmup: float = key(0.05, "share of all samples over which the rate rises linearly from 0")
    warmup_samples: int | None = key(None, "the same in samples, whatever the run's length; null: the share counts")
    schedule: str = key("cosine", "after the warm-up: cosine or linear to final, or constant")
    final: float = key(0.0, "share of the peak rate that cosine and linear end at")

    def __post_init__(self) -> None:
        for name in ("lr", "image_lr", "text_lr", "weight_decay"):
            check_range(f"optimizer.{name}", getattr(self, name), 0)
        for name in ("fusion_lr", "decoder_lr", "warmup_samples"):
            if getattr(self, name) is not None:
                check_range(f"optimizer.{name}", getattr(self, name), 0)
        check_range("optimizer.layer_decay", self.layer_decay, 0.01, 1)
        check_range("optimizer.warmup", self.warmup, 0, 1)
        check_range("optimizer.final", self.final, 0, 1)
        check_choice("optimizer.schedule", self.schedule, ("cosine", "linear", "constant"))
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"optimizer.betas: {self.betas} is not valid; give two numbers in [0, 1)")

    def peak(self, part: str) -> float:
        """Peak rate of a part of the model."""
        own = getattr(self, f"{part}_lr", None)
        return self.lr if own is None else own


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Trainable parameters by part, by layer where layers decay, and by whether weights decay; each with its peak rate.

    With layer decay (Clark et al. 2020, ELECTRA, section 3.1; Bao et al. 2022, BEiT) the last layer of a tower has the
    tower's rate, each one before it `layer_decay` times the rate of the next, the embeddings the least.
    """
    depth = _distances(model) if config.layer_decay < 1 else {}
    kept = _undecayed(model)
    groups: dict[tuple[str, int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = name.split(".")[0] if name.split(".")[0] in PARTS else "heads"
            decays = name not in kept and not _is_vector(parameter)
            groups.setdefault((part, depth.get(name, 0), decays), []).append(parameter)
    return [
        _group(part, distance, decays, found, config)
        for (part, distance, decays), found in sorted(groups.items(), key=lambda g: g[0])
    ]


def _group(
    part: str, distance: int, decays: bool, found: list[nn.Parameter], config: OptimizerConfig
) -> dict[str, Any]:
    peak = config.peak(part) * config.layer_decay**distance
    return {
        "params": found,
        "lr": peak,
        "peak": peak,
        "part": part,
        "name": f"{part}{f'_{distance}' if distance else ''}{'' if decays else '_no_decay'}",
        "weight_decay": config.weight_decay if decays else 0.0,
    }


def _is_vector(parameter: nn.Parameter) -> bool:
    """Norms, biases, class tokens, the logit scale: all but one dimension are 1."""
    shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3's parameters look empty
    return sum(size > 1 for size in shape) <= 1


def _undecayed(model: nn.Module) -> set[str]:
    """Names that the image tower itself excepts from weight decay (timm: positions, class and register tokens)."""
    body: Any = getattr(getattr(model, "image", None), "body", None)
    named = body.no_weight_decay() if hasattr(body, "no_weight_decay") else ()
    return {f"image.body.{name}" for name in named}


def _distances(model: nn.Module) -> dict[str, int]:
    """How many layers lie between a tower's parameter and the tower's output, by parameter name."""
    distances: dict[str, int] = {}
    for tower in TOWERS:
        layers = list(blocks(getattr(model, tower)))
        own = {id(p): len(layers) - k - 1 for k, layer in enumerate(layers) for p in layer.parameters()}
        last = max((i for i, p in enumerate(getattr(model, tower).parameters()) if id(p) in own), default=-1)
        for i, (name, parameter) in enumerate(getattr(model, tower).named_parameters()):
            # What comes before the layers (patches, embeddings) is furthest; what comes after (the norm) has the rate.
            distances[f"{tower}.{name}"] = own.get(id(parameter), len(layers) if i < last else 0)
    return distances


def rate_factor(config: OptimizerConfig, seen: float, total: float) -> float:
    """Share of the peak rate after `seen` of `total` samples."""
    warmup = config.warmup * total if config.warmup_samples is None else config.warmup_samples
    if seen < warmup:
        return seen / warmup
    if config.schedule == "constant":
        return 1.0
    rest = min((seen - warmup) / max(total - warmup, 1e-9), 1.0)
    falling = 1 - rest if config.schedule == "linear" else (1 + math.cos(math.pi * rest)) / 2
    return config.final + (1 - config.final) * falling


def peaks(groups: list[dict[str, Any]]) -> Mapping[str, float]:
    """Peak rate by group name."""
    return {group["name"]: group["peak"] for group in groups}
