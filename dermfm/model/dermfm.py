"""The foundation model: two towers into one space, cross-attention fusion, a matching head and class heads."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dermfm.config import check_range, key
from dermfm.model.fusion import Fusion, FusionConfig
from dermfm.model.image import ImageConfig, ImageTower
from dermfm.model.text import TextConfig, TextTower, load_tokenizer


@dataclass(kw_only=True)
class ModelConfig:
    """The towers, their fusion and the shared space."""

    image: ImageConfig = key(ImageConfig, "image tower")
    text: TextConfig = key(TextConfig, "text tower")
    fusion: FusionConfig = key(FusionConfig, "cross-attention fusion")
    embed_dim: int = key(256, "dimension of the shared space")
    temperature: float = key(0.07, "initial softmax temperature of the contrastive loss (it is learned)")
    num_classes: int = key(8, "diagnosis classes of the heads")

    def __post_init__(self) -> None:
        check_range("model.embed_dim", self.embed_dim, 2, 65536)
        check_range("model.temperature", self.temperature, 0.01, 1.0)
        check_range("model.num_classes", self.num_classes, 2)


class DermFM(nn.Module):
    """The whole model. Training goes through `forward(phase, …)`: ZeRO's hooks must see what they gather."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.image = ImageTower(config.image)
        self.text = TextTower(config.text)
        self.image_projection = nn.Linear(self.image.width, config.embed_dim, bias=False)
        self.text_projection = nn.Linear(self.text.width, config.embed_dim, bias=False)
        # Shape [1], not []: a parameter without dimensions breaks DeepSpeed's initial broadcast.
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / config.temperature)))
        self.fusion = Fusion(config.fusion, self.image.width, self.text.width)
        self.match_head = nn.Linear(config.fusion.width, 1)
        self.image_head = nn.Linear(self.image.width, config.num_classes)
        self.text_head = nn.Linear(self.text.width, config.num_classes)
        self.fused_head = nn.Linear(config.fusion.width, config.num_classes)
        self.tokenizer: Any = load_tokenizer(config.text.name)

    @property
    def image_size(self) -> int:
        """Pixels of the square input."""
        return self.config.image.size

    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 pixels [B, 3, S, S] → (embedding [B, d] of length 1, tokens [B, P, D])."""
        tokens, pooled = self.image(pixels)
        return F.normalize(self.image_projection(pooled).float(), dim=-1), tokens

    def encode_text(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids [B, T], lengths [B] → (embedding [B, d] of length 1, tokens [B, T, D])."""
        states, pooled = self.text(tokens, lengths)
        return F.normalize(self.text_projection(pooled).float(), dim=-1), states

    def fuse(
        self, image_tokens: Tensor, text_tokens: Tensor, lengths: Tensor, return_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Fused note tokens [B, T, D] and, if asked for, cross-attention weights [B, H, T, P] averaged over blocks."""
        return self.fusion(image_tokens, text_tokens, lengths, return_weights)

    def match(self, image_tokens: Tensor, text_tokens: Tensor, lengths: Tensor) -> Tensor:
        """Logits [B] that note and image belong together."""
        return self.match_head(self._fused(image_tokens, text_tokens, lengths)).squeeze(-1)

    def classify_image(self, pixels: Tensor) -> Tensor:
        """Class logits [B, C] from the image alone."""
        return self.image_head(self.image(pixels)[1])

    def classify_text(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Class logits [B, C] from the note alone."""
        return self.text_head(self.text(tokens, lengths)[1])

    def classify_fused(self, image_tokens: Tensor, text_tokens: Tensor, lengths: Tensor) -> Tensor:
        """Class logits [B, C] from note and image together."""
        return self.fused_head(self._fused(image_tokens, text_tokens, lengths))

    def backbone_features(self, pixels: Tensor) -> Tensor:
        """Pooled features [B, D] of the image tower before the projection."""
        return self.image.pooled(pixels)

    def forward(self, phase: str, **inputs: Tensor) -> dict[str, Tensor]:
        """Phase `image`, `text` or `fuse` of a training step, see the methods `_phase_*` for what comes in and out."""
        phases: dict[str, Callable[..., dict[str, Tensor]]]
        phases = {"image": self._phase_image, "text": self._phase_text, "fuse": self._phase_fuse}
        return phases[phase](**inputs)

    def _phase_image(self, pixels: Tensor) -> dict[str, Tensor]:
        tokens, pooled = self.image(pixels)
        return {
            "tokens": tokens,
            "embedding": F.normalize(self.image_projection(pooled).float(), dim=-1),
            "logits": self.image_head(pooled).float(),
        }

    def _phase_text(self, tokens: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        states, pooled = self.text(tokens, lengths)
        return {
            "tokens": states,
            "embedding": F.normalize(self.text_projection(pooled).float(), dim=-1),
            "logits": self.text_head(pooled).float(),
            "logit_scale": self.logit_scale.float(),
        }

    def _phase_fuse(self, image_tokens: Tensor, text_tokens: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        fused = self._fused(image_tokens, text_tokens, lengths)
        return {"match": self.match_head(fused).squeeze(-1).float(), "logits": self.fused_head(fused).float()}

    def _fused(self, image_tokens: Tensor, text_tokens: Tensor, lengths: Tensor) -> Tensor:
        """Mean fused token [B, D]."""
        return masked_mean(self.fuse(image_tokens, text_tokens, lengths)[0], lengths)


def masked_mean(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Mean of tokens [B, T, D] over the first `lengths` [B] positions."""
    valid = (torch.arange(tokens.shape[1], device=tokens.device)[None, :] < lengths[:, None]).to(tokens.dtype)
    return (tokens * valid[:, :, None]).sum(1) / valid.sum(1, keepdim=True).clamp(min=1)
