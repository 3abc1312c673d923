"""Image tower: any timm model that gives a token grid, with ImageNet or local weights, frozen as far as asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models import group_parameters
from torch import Tensor, nn

from dermfm.config import InputError, check_range, key, nearest
from dermfm.model.weights import load_weights


@dataclass(kw_only=True)
class ImageConfig:
    """Which image tower, from which weights, and how much of it learns."""

    name: str = key("tf_efficientnet_lite0", "timm model name")
    weights: str | None = key(
        None, "package:<python package>, a weights file, 'timm' for timm's own from the hub, or null (random)"
    )
    size: int = key(224, "pixels of the square input image")
    train_blocks: int = key(-1, "how many of the last blocks learn: -1 all, 0 none (frozen tower)")
    mean: list[float] = key([], "RGB mean in [0, 1] subtracted from pixels; empty: the model's own")
    std: list[float] = key([], "RGB standard deviation that pixels are divided by; empty: the model's own")

    def __post_init__(self) -> None:
        check_range("image.size", self.size, 32, 4096)
        check_range("image.train_blocks", self.train_blocks, -1)
        for name, values in (("image.mean", self.mean), ("image.std", self.std)):
            if len(values) not in (0, 3):
                raise ValueError(f"{name}: {values} is not valid; give three numbers (R, G, B) or none")


class ImageTower(nn.Module):
    """uint8 pixels [B, 3, S, S] → (tokens [B, P, D], pooled [B, D]); `grid` is the (rows, columns) of the P tokens.

    Batch norm runs on its stored statistics also while training, so nothing depends on the micro-batch.
    Raises InputError for an unknown name or weights that are missing or do not fit.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        self.size = config.size
        self.body = _build(config)
        defaults = self.body.pretrained_cfg
        mean, std = config.mean or defaults["mean"], config.std or defaults["std"]
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255, persistent=False)
        with torch.no_grad():
            shape = _features(self.body.eval(), torch.zeros(1, 3, self.size, self.size)).shape
        self.prefix = 0 if len(shape) == 4 else int(getattr(self.body, "num_prefix_tokens", 0))
        self.width: int = shape[1] if len(shape) == 4 else shape[2]
        side = int((shape[1] - self.prefix) ** 0.5) if len(shape) == 3 else 0
        self.grid: tuple[int, int] = (shape[2], shape[3]) if len(shape) == 4 else (side, side)
        _freeze(self.body, config.train_blocks)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        x = (pixels.to(self.mean.dtype) - self.mean) / self.std
        # On CPU, depthwise convolutions are many times faster on channels-last input. Weights stay contiguous:
        # DeepSpeed broadcasts them as bytes.
        x = _features(self.body, x.contiguous(memory_format=torch.channels_last))
        if x.dim() == 4:
            tokens = x.flatten(2).transpose(1, 2)
            return tokens, tokens.mean(1)
        tokens = x[:, self.prefix :]
        return tokens, x[:, 0] if self.prefix else tokens.mean(1)

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


def _features(body: Any, x: Tensor) -> Tensor:
    """Feature map [B, C, H, W] or tokens [B, N, D], channels first in both layouts of timm's CNNs."""
    features = body.forward_features(x)
    if features.dim() == 4 and getattr(body, "output_fmt", "NCHW") == "NHWC":
        features = features.permute(0, 3, 1, 2)
    return features


def check_name(name: str) -> None:
    """InputError with the nearest names where timm has no model of this name."""
    if not timm.is_model(name):
        raise InputError(f"image.name: timm has no model '{name}'; {nearest(name, timm.list_models())}")


def _build(config: ImageConfig) -> Any:
    check_name(config.name)
    resizes = "img_size" in timm.models.model_entrypoint(config.name).__code__.co_varnames
    options: dict[str, Any] = {"img_size": config.size} if resizes or "vit" in config.name else {}
    from_hub = config.weights == "timm"
    try:
        body = timm.create_model(config.name, pretrained=from_hub, num_classes=0, **options)
    except (OSError, RuntimeError, TypeError) as error:
        first = str(error).splitlines()[0]
        raise InputError(
            f"image.name: '{config.name}' cannot be built ({first}); a local file can be given as image.weights"
        ) from error
    if config.weights and not from_hub:
        load_weights(body, config.weights, "image.weights")
    return body


def _freeze(body: Any, train_blocks: int) -> None:
    """Stop gradients of all but the last `train_blocks` groups, in timm's own order from stem to head."""
    if train_blocks < 0:
        return
    groups = group_parameters(body, body.group_matcher(coarse=True), reverse=True)
    num_groups = max(groups.values(), default=-1) + 1
    if train_blocks > num_groups:
        raise InputError(
            f"image.train_blocks: {train_blocks} is not valid; this tower has {num_groups} blocks (-1: all)"
        )
    for name, parameter in body.named_parameters():
        parameter.requires_grad_(groups[name] >= num_groups - train_blocks)
