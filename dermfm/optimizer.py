"""AdamW's parameter groups and the schedule of their rates, a function of the share of samples seen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from dermfm.config import check_choice, check_range, key

TOWER_PREFIXES = ("image.", "text.")


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW and the schedule of its rates."""

    lr: float = key(1e-3, "peak learning rate of projections, fusion and heads")
    image_lr: float = key(3e-4, "peak learning rate of the image tower")
    text_lr: float = key(1e-4, "peak learning rate of the text tower")
    weight_decay: float = key(0.05, "decoupled weight decay; not on norms, biases and the logit scale")
    betas: list[float] = key([0.9, 0.98], "AdamW's exponential decay rates")
    eps: float = key(1e-6, "AdamW's denominator term")
    warmup: float = key(0.05, "share of all samples over which the rate rises linearly from 0")
    schedule: str = key("cosine", "after the warm-up: cosine or linear to 0, or constant")

    def __post_init__(self) -> None:
        for name in ("lr", "image_lr", "text_lr", "weight_decay"):
            check_range(f"optimizer.{name}", getattr(self, name), 0)
        check_range("optimizer.warmup", self.warmup, 0, 1)
        check_choice("optimizer.schedule", self.schedule, ("cosine", "linear", "constant"))
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"optimizer.betas: {self.betas} is not valid; give two numbers in [0, 1)")


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Trainable parameters by part (image, text, rest) and by whether they decay; each with its peak rate."""
    peaks = {"image": config.image_lr, "text": config.text_lr, "rest": config.lr}
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = next((p.rstrip(".") for p in TOWER_PREFIXES if name.startswith(p)), "rest")
            shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3's parameters look empty
            groups.setdefault((part, len(shape) > 1), []).append(parameter)
    return [
        {
            "params": found,
            "lr": peaks[part],
            "peak": peaks[part],
            "name": f"{part}{'' if decays else '_no_decay'}",
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (part, decays), found in sorted(groups.items(), key=lambda g: g[0])
    ]


def rate_factor(config: OptimizerConfig, done: float) -> float:
    """Share of the peak rate after the share `done` in [0, 1] of all samples."""
    if done < config.warmup:
        return done / config.warmup
    rest = (done - config.warmup) / max(1 - config.warmup, 1e-9)
    if config.schedule == "constant":
        return 1.0
    return 1 - rest if config.schedule == "linear" else (1 + math.cos(math.pi * min(rest, 1))) / 2
