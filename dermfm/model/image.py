"""Image tower: a backbone by name that gives a token grid, with ImageNet or local weights, frozen as far as asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dermfm.config import InputError, check_choice, check_range, key
from dermfm.model.attention import KERNELS, choose_kernel
from dermfm.model.bodies import (
    block_of_parameter,
    build_body,
    check_name,
    features,
    token_shape,
    use_fused_attention,
)
from dermfm.model.lean import use_lean_blocks, use_lean_mlps
from dermfm.model.pooling import AttentionPool

__all__ = ["ImageConfig", "ImageTower", "check_name"]
POOLS = ("auto", "cls", "mean", "attention")


@dataclass(kw_only=True)
class ImageConfig:
    """Which image tower, from which weights, and how much of it learns."""

    name: str = key("tf_efficientnet_lite0", "timm model name, or torchvision:<name>")
    weights: str | None = key(
        None,
        "package:<python package>, a weights file (PanDerm's, open_clip's, timm's names), 'timm' or 'torchvision' for "
        "their own from the hub, or null (random)",
    )
    size: int = key(224, "pixels of the square input image; position embeddings are interpolated to it")
    stride: int | None = key(
        None, "pixels between neighbouring tokens of a CNN: 8 or 16 for finer maps, its deeper stages are then left out"
    )
    pool: str = key("auto", "auto (cls where the tower has one, else mean), cls, mean, or attention (learned query)")
    train_blocks: int = key(-1, "how many of the last blocks learn: -1 all, 0 none (frozen tower)")
    mean: list[float] = key([], "RGB mean in [0, 1] subtracted from pixels; empty: the model's own")
    std: list[float] = key([], "RGB standard deviation that pixels are divided by; empty: the model's own")
    kernel: str = key("auto", "attention kernel of a transformer: auto, flash, sdpa or reference")

    def __post_init__(self) -> None:
        check_range("image.size", self.size, 32, 4096)
        check_range("image.train_blocks", self.train_blocks, -1)
        check_choice("image.pool", self.pool, POOLS)
        check_choice("image.kernel", self.kernel, KERNELS)
        for name, values in (("image.mean", self.mean), ("image.std", self.std)):
            if len(values) not in (0, 3):
                raise ValueError(f"{name}: {values} is not valid; give three numbers (R, G, B) or none")


class ImageTower(nn.Module):
    """uint8 pixels [B, 3, S, S] → (tokens [B, P, D], pooled [B, D]); `grid` is the (rows, columns) of the P tokens.

    Batch norm runs on its stored statistics also while training, so nothing depends on the micro-batch.
    Raises InputError for an unknown name, weights that are missing or do not fit, or a pooling it cannot have.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        self.size, self.kernel = config.size, config.kernel
        self.body = build_body(config.name, config.size, config.weights, config.stride)
        use_fused_attention(self.body, config.kernel != "reference")
        use_lean_mlps(self.body)
        use_lean_blocks(self.body)
        defaults = self.body.pretrained_cfg
        mean, std = config.mean or defaults["mean"], config.std or defaults["std"]
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255, persistent=False)
        shape = token_shape(config.name, config.size, config.stride)
        self.prefix = 0 if len(shape) == 4 else int(getattr(self.body, "num_prefix_tokens", 0))
        self.width: int = shape[1] if len(shape) == 4 else shape[2]
        side = round((shape[1] - self.prefix) ** 0.5) if len(shape) == 3 else 0
        self.grid: tuple[int, int] = (shape[2], shape[3]) if len(shape) == 4 else (side, side)
        if len(shape) == 3 and side * side != shape[1] - self.prefix:
            raise InputError(f"image.name: the {shape[1]} tokens of '{config.name}' lie on no square grid")
        self.pool = self._pooling(config)
        self.attention_pool = AttentionPool(self.width, config.kernel) if self.pool == "attention" else None
        _freeze(self.body, config.train_blocks)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        x = (pixels.to(self.mean.dtype) - self.mean) / self.std
        if self.kernel == "flash":
            choose_kernel("flash", x.device.type, _compute_dtype(x))
        # On CPU, depthwise convolutions are many times faster on channels-last input. Weights stay contiguous:
        # DeepSpeed broadcasts them as bytes.
        x = features(self.body, x.contiguous(memory_format=torch.channels_last))
        if x.dim() == 4:
            x = x.flatten(2).transpose(1, 2)
        tokens = x[:, self.prefix :]
        if self.attention_pool is not None:
            return tokens, self.attention_pool(tokens)
        return tokens, x[:, 0] if self.pool == "cls" else tokens.mean(1)

    def pooled(self, pixels: Tensor) -> Tensor:
        """Pooled features [B, D]: what a linear probe of the backbone sees."""
        return self(pixels)[1]

    def train(self, mode: bool = True) -> ImageTower:
        """Training mode, but batch norm stays on its stored statistics."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def _pooling(self, config: ImageConfig) -> str:
        if config.pool == "cls" and not self.prefix:
            raise InputError(f"image.pool: '{config.name}' has no class token; one of auto, mean, attention")
        return ("cls" if self.prefix else "mean") if config.pool == "auto" else config.pool


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The type in which matrix products run: autocast's inside it, else the input's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _freeze(body: Any, train_blocks: int) -> None:
    """Stop gradients of all but the last `train_blocks` groups, in the order from stem to head."""
    if train_blocks < 0:
        return
    groups = block_of_parameter(body)
    num_groups = max(groups.values(), default=-1) + 1
    if train_blocks > num_groups:
        raise InputError(
            f"image.train_blocks: {train_blocks} is not valid; this tower has {num_groups} blocks (-1: all)"
        )
    for name, parameter in body.named_parameters():
        parameter.requires_grad_(groups[name] >= num_groups - train_blocks)
