"""Image backbones by name: any timm model that gives tokens, or torchvision's (`torchvision:densenet121`)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.models import group_parameters
from torch import Tensor, nn

from dermfm.config import InputError, nearest
from dermfm.model.weights import SHARDING, fitting_weights, full_shapes, load_weights

TORCHVISION = "torchvision:"
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def check_name(name: str) -> None:
    """InputError with the nearest names where neither timm nor torchvision has a model of this name."""
    if name.startswith(TORCHVISION):
        known = torchvision_names()
        if name.removeprefix(TORCHVISION) not in known:
            hint = nearest(name.removeprefix(TORCHVISION), known)
            raise InputError(f"image.name: torchvision has no tower '{name.removeprefix(TORCHVISION)}'; {hint}")
    elif not timm.is_model(name):
        raise InputError(f"image.name: timm has no model '{name}'; {nearest(name, timm.list_models())}")


def torchvision_names() -> list[str]:
    """Classifiers of torchvision whose tokens we can read."""
    return [n for n in torchvision.models.list_models(module=torchvision.models) if _family(n) is not None]


def build_body(name: str, size: int, weights: str | None, stride: int | None = None) -> Any:
    """The backbone without its classifier, with `weights` (see ImageConfig). InputError where it cannot be had.

    `stride`: only as deep as its feature map has one cell every `stride` pixels; the deeper stages are left out.
    """
    check_name(name)
    from_hub = weights in ("timm", "torchvision")
    sharding = SHARDING.get()
    around = sharding.structure() if sharding is not None and weights and not from_hub else contextlib.nullcontext()
    try:
        with around:
            body = _construct(name, size, from_hub)
    except (OSError, RuntimeError, TypeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"image.name: '{name}' cannot be built ({first}); a local file can be given as image.weights"
        ) from error
    if weights and not from_hub:
        load_weights(_loaded(body), weights, "image.weights")
    return body if stride is None else _cut(body, name, stride)


def check_weights(name: str, size: int, weights: str | None) -> None:
    """InputError where local `weights` (see ImageConfig) do not fit the backbone, which gets no memory for it."""
    if not weights or weights in ("timm", "torchvision"):
        return
    try:
        with torch.device("meta"):
            body = _construct(name, size, False)
    except (NotImplementedError, RuntimeError):  # as in `token_shape`
        with torch.random.fork_rng(devices=[]):
            body = _construct(name, size, False)
    fitting_weights(full_shapes(_loaded(body)), weights, "image.weights")


def _loaded(body: Any) -> nn.Module:
    """What weights are loaded into: the module whose names are those of the files."""
    return body.net if isinstance(body, TorchvisionBody) else body


def token_shape(name: str, size: int, stride: int | None = None) -> torch.Size:
    """Shape of the features of one image, [1, C, H, W] or [1, N, D], found without memory or work where possible."""

    def look() -> Any:
        body = _construct(name, size, False).eval()
        return features(body if stride is None else _cut(body, name, stride), torch.zeros(1, 3, size, size))

    try:
        with torch.device("meta"):
            found = look()
    except (NotImplementedError, RuntimeError):  # a constructor that computes with tensors (torchvision's RegNet)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            found = look()
    if not isinstance(found, Tensor) or found.dim() not in (3, 4):
        raise InputError(f"image.name: '{name}' gives no grid of tokens; choose a ViT, ConvNeXt, DenseNet, …")
    return found.shape


def features(body: Any, x: Tensor) -> Tensor:
    """Feature map [B, C, H, W] or tokens [B, N, D], channels first in both layouts of timm's CNNs."""
    if (level := getattr(body, "token_level", None)) is not None:
        return body.forward_intermediates(
            x, indices=[level], stop_early=True, output_fmt="NCHW", intermediates_only=True
        )[0]
    found = body.forward_features(x)
    if isinstance(found, Tensor) and found.dim() == 4 and getattr(body, "output_fmt", "NCHW") == "NHWC":
        found = found.permute(0, 3, 1, 2)
    return found


def _cut(body: Any, name: str, stride: int) -> Any:
    """The body without the stages behind the last one whose cells lie `stride` pixels apart."""
    stages = getattr(body, "feature_info", None) if hasattr(body, "prune_intermediate_layers") else None
    steps = [int(stage["reduction"]) for stage in stages or []]
    if len(set(steps)) < 2:  # one grid from the first block to the last
        raise InputError(f"image.stride: '{name}' has no stages to stop at; leave it out or take a CNN of timm's")
    if stride not in steps:
        known = ", ".join(map(str, sorted(set(steps))))
        raise InputError(f"image.stride: {stride} is not valid; the stages of '{name}' have {known}")
    body.token_level = len(steps) - 1 - steps[::-1].index(stride)
    body.prune_intermediate_layers([body.token_level], prune_norm=True, prune_head=True)
    return body


def block_of_parameter(body: Any) -> dict[str, int]:
    """Parameter name → its block, counted from stem to head."""
    if isinstance(body, TorchvisionBody):
        return body.blocks()
    return group_parameters(body, body.group_matcher(coarse=True), reverse=True)


def use_fused_attention(body: nn.Module, fused: bool) -> None:
    """Ask every attention layer of a timm body for torch's fused kernel, or for the plain one."""
    for module in body.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused  # type: ignore[assignment]


def _construct(name: str, size: int, from_hub: bool) -> Any:
    if name.startswith(TORCHVISION):
        return TorchvisionBody(name.removeprefix(TORCHVISION), size, from_hub)
    try:
        return timm.create_model(name, pretrained=from_hub, num_classes=0, img_size=size)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
    return timm.create_model(name, pretrained=from_hub, num_classes=0)  # a CNN takes any size


def _maps(net: Any, x: Tensor) -> Tensor:
    return net.features(x)


def _dense(net: Any, x: Tensor) -> Tensor:
    return F.relu(net.features(x))


def _residual(net: Any, x: Tensor) -> Tensor:
    x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
    return net.layer4(net.layer3(net.layer2(net.layer1(x))))


def _regular(net: Any, x: Tensor) -> Tensor:
    return net.trunk_output(net.stem(x))


def _swin(net: Any, x: Tensor) -> Tensor:
    return net.norm(net.features(x)).permute(0, 3, 1, 2)


def _vit(net: Any, x: Tensor) -> Tensor:
    tokens = net._process_input(x)
    return net.encoder(torch.cat([net.class_token.expand(len(x), -1, -1), tokens], 1))


FAMILIES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "densenet": _dense,
    "convnext": _maps,
    "efficientnet": _maps,
    "mobilenet": _maps,
    "vgg": _maps,
    "resnet": _residual,
    "resnext": _residual,
    "wide_resnet": _residual,
    "regnet": _regular,
    "swin": _swin,
    "vit": _vit,
}


def _family(name: str) -> str | None:
    return next((f for f in FAMILIES if name.startswith(f)), None)


class TorchvisionBody(nn.Module):
    """A torchvision classifier without its last layers, with what we use of timm's interface.

    `net` keeps torchvision's parameter names, so its published weights load as they are.
    """

    def __init__(self, name: str, size: int, from_hub: bool) -> None:
        super().__init__()
        family = _family(name)
        assert family is not None
        self._features = FAMILIES[family]
        self.num_prefix_tokens = 1 if family == "vit" else 0
        self.pretrained_cfg = IMAGENET
        options = {"image_size": size} if family == "vit" and not from_hub else {}
        self.net = torchvision.models.get_model(name, weights="DEFAULT" if from_hub else None, **options)
        for head in ("classifier", "fc", "head", "heads"):
            if hasattr(self.net, head):
                setattr(self.net, head, nn.Identity())

    def forward_features(self, x: Tensor) -> Tensor:
        """Feature map [B, C, H, W], or tokens [B, N, D] with the class token first."""
        return self._features(self.net, x)

    def blocks(self) -> dict[str, int]:
        """Parameter name → its block: every stage, or every layer of the longest stack, in order."""
        stages: dict[str, int] = {}
        found = {}
        for name, _ in self.named_parameters():
            parts = name.split(".")
            # net.features.denseblock1…, net.layer1…, net.encoder.layers.encoder_layer_0…
            depth = {"features": 3, "encoder": 4, "trunk_output": 3}.get(parts[1], 2)
            found[name] = stages.setdefault(".".join(parts[:depth]), len(stages))
        return found
