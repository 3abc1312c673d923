"""The foundation model: two towers into one space, fusion with a matching head, a note decoder, and heads."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dermfm.concepts import CONCEPTS
from dermfm.config import InputError, check_choice, check_range, key
from dermfm.model.decoder import Decoder, DecoderConfig
from dermfm.model.fusion import FUSIONS, FusionConfig, masked_mean
from dermfm.model.image import ImageConfig, ImageTower
from dermfm.model.summary import Part, summary
from dermfm.model.text import TextConfig, TextTower, load_tokenizer
from dermfm.records.vocabulary import MALIGNANCIES, SUBCLASSES

# Heads on the image beside the one of the classes: name → outputs. `concepts` reads the embedding in the shared space.
HEADS: dict[str, int] = {"subclass": len(SUBCLASSES), "malignancy": len(MALIGNANCIES), "concepts": len(CONCEPTS)}


@dataclass(kw_only=True)
class ModelConfig:
    """The towers, their fusion, the decoder, the heads and the shared space."""

    image: ImageConfig = key(ImageConfig, "image tower")
    text: TextConfig = key(TextConfig, "text tower")
    fusion: FusionConfig = key(FusionConfig, "fusion of note and image")
    decoder: DecoderConfig = key(DecoderConfig, "note decoder for captioning and reports")
    embed_dim: int = key(256, "dimension of the shared space")
    temperature: float = key(0.07, "initial softmax temperature of the contrastive loss (it is learned)")
    logit_bias: float | None = key(None, "initial bias of SigLIP's logits (it is learned), -10 there; null: none")
    normalize: bool = key(True, "train on embeddings of length 1; false: as the layers give them (reference modes)")
    shared_layers: bool = key(False, "image and text share a linear layer after the projection, and the class head")
    num_classes: int = key(8, "diagnosis classes of the heads")
    heads: list[str] = key([], "more heads on the image: subclass, malignancy, concepts")

    def __post_init__(self) -> None:
        check_range("model.embed_dim", self.embed_dim, 2, 65536)
        check_range("model.temperature", self.temperature, 0.01, 1.0)
        check_range("model.num_classes", self.num_classes, 2)
        for name in self.heads:
            check_choice("model.heads", name, HEADS)


class DermFM(nn.Module):
    """The whole model. Training goes through `forward(phase, …)`: ZeRO's hooks must see what they gather."""

    def __init__(self, config: ModelConfig, image: Any = None, text: Any = None) -> None:
        """`image`, `text`: towers to take instead of those that `config` names, with the same calls and `width`."""
        super().__init__()
        self.config = config
        self.image = ImageTower(config.image) if image is None else image
        self.text = TextTower(config.text) if text is None else text
        self.tokenizer: Any = load_tokenizer(config.text.name)
        self._build_space(config)
        fusion = config.fusion
        if fusion.kind != "none":
            self.fusion = FUSIONS[fusion.kind](fusion, self.image.width, self.text.width)
            self.match_head = nn.Linear(fusion.width, 1)
        self._build_heads(config)
        if config.decoder.depth:
            ends = text_ends(self.tokenizer, config.text.name)
            self.decoder = Decoder(config.decoder, self.image.width, len(self.tokenizer), config.text.max_tokens, *ends)

    def _build_space(self, config: ModelConfig) -> None:
        self.image_projection = nn.Linear(self.image.width, config.embed_dim, bias=False)
        self.text_projection = nn.Linear(self.text.width, config.embed_dim, bias=False)
        if config.shared_layers:
            self.shared = nn.Linear(config.embed_dim, config.embed_dim)
        # Shape [1], not []: a parameter without dimensions breaks DeepSpeed's initial broadcast.
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / config.temperature)))
        if config.logit_bias is not None:
            self.logit_bias = nn.Parameter(torch.full((1,), config.logit_bias))

    def _build_heads(self, config: ModelConfig) -> None:
        if config.shared_layers:
            self.shared_head = nn.Linear(config.embed_dim, config.num_classes)
        else:
            self.image_head = nn.Linear(self.image.width, config.num_classes)
            self.text_head = nn.Linear(self.text.width, config.num_classes)
        if config.fusion.kind != "none":
            self.fused_head = nn.Linear(config.fusion.width, config.num_classes)
        widths = dict.fromkeys(HEADS, self.image.width) | {"concepts": config.embed_dim}
        self.heads = nn.ModuleDict({name: nn.Linear(widths[name], HEADS[name]) for name in sorted(config.heads)})

    @property
    def image_size(self) -> int:
        """Pixels of the square input."""
        return self.config.image.size

    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 pixels [B, 3, S, S] → (embedding [B, d] of length 1, tokens [B, P, D])."""
        tokens, pooled = self.image(pixels)
        return self.embed_image(pooled), tokens

    def encode_text(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids [B, T], lengths [B] → (embedding [B, d] of length 1, tokens [B, T, D])."""
        states, pooled = self.text(tokens, lengths)
        return self.embed_text(pooled), states

    def embed_image(self, pooled: Tensor) -> Tensor:
        """Embedding [B, d] of length 1 from the image tower's pooled features [B, D]."""
        return F.normalize(full_precision(self._project(pooled, self.image_projection)), dim=-1)

    def embed_text(self, pooled: Tensor) -> Tensor:
        """Embedding [B, d] of length 1 from the text tower's pooled features [B, D]."""
        return F.normalize(full_precision(self._project(pooled, self.text_projection)), dim=-1)

    def image_logits(self, pooled: Tensor) -> Tensor:
        """Class logits [B, C] from the image tower's pooled features [B, D]."""
        if self.config.shared_layers:
            return self.shared_head(self._project(pooled, self.image_projection))
        return self.image_head(pooled)

    def text_logits(self, pooled: Tensor) -> Tensor:
        """Class logits [B, C] from the text tower's pooled features [B, D]."""
        if self.config.shared_layers:
            return self.shared_head(self._project(pooled, self.text_projection))
        return self.text_head(pooled)

    def fuse(
        self, image_tokens: Tensor, text_tokens: Tensor, lengths: Tensor, return_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Fused note tokens [B, T, D] and, if asked for, cross-attention weights [B, H, T, P] averaged over blocks.

        ValueError where the model has no fusion, or one without attention (late) is asked for weights.
        """
        if self.config.fusion.kind == "none":
            raise ValueError("model.fusion.kind: 'none' can fuse nothing; train with 'cross'")
        return self.fusion(image_tokens, text_tokens, lengths, return_weights)

    def match(self, image_tokens: Tensor, text_tokens: Tensor, lengths: Tensor) -> Tensor:
        """Logits [B] that note and image belong together."""
        return self.match_head(self._fused(image_tokens, text_tokens, lengths)).squeeze(-1)

    def classify_image(self, pixels: Tensor) -> Tensor:
        """Class logits [B, C] from the image alone."""
        return self.image_logits(self.image(pixels)[1])

    def classify_text(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Class logits [B, C] from the note alone."""
        return self.text_logits(self.text(tokens, lengths)[1])

    def classify_fused(self, image_tokens: Tensor, text_tokens: Tensor, lengths: Tensor) -> Tensor:
        """Class logits [B, C] from note and image together."""
        return self.fused_head(self._fused(image_tokens, text_tokens, lengths))

    @torch.no_grad()
    def write_report(
        self, pixels: Tensor, *, max_tokens: int | None = None, top_p: float = 0.0, temperature: float = 1.0,
        seed: int = 0,
    ) -> list[str]:  # fmt: skip
        """One note an image of uint8 pixels [B, 3, S, S]: greedy, or drawn from the nucleus of `top_p` > 0.

        InputError where the model has no decoder; ValueError for settings out of range. See `Decoder.generate`.
        """
        if not self.config.decoder.depth:
            raise InputError("model.decoder.depth: 0, this model writes no reports; train with a decoder")
        written = self.decoder.generate(
            self.image(pixels)[0], max_tokens=max_tokens, top_p=top_p, temperature=temperature, seed=seed
        )
        texts = self.tokenizer.batch_decode(self.decoder.cut(written), skip_special_tokens=True)
        return [tidy_spaces(text) for text in texts]

    def summary(self) -> list[Part]:
        """Parameters, FLOPs and activation memory of one sample by part, and `total`."""
        return summary(self)

    def backbone_features(self, pixels: Tensor) -> Tensor:
        """Pooled features [B, D] of the image tower before the projection."""
        return self.image.pooled(pixels)

    def forward(self, phase: str, **inputs: Tensor) -> dict[str, Tensor]:
        """Phase `image`, `text`, `fuse` or `caption` of a training step; the methods `_phase_*` say what goes in and
        out."""
        phases: dict[str, Callable[..., dict[str, Tensor]]]
        phases = {
            "image": self._phase_image,
            "text": self._phase_text,
            "fuse": self._phase_fuse,
            "caption": self._phase_caption,
        }
        return phases[phase](**inputs)

    def _phase_image(self, pixels: Tensor) -> dict[str, Tensor]:
        """uint8 pixels [B, 3, S, S] → tokens, embedding (of length 1 if so configured), logits of every head."""
        tokens, pooled = self.image(pixels)
        projected = full_precision(self._project(pooled, self.image_projection))
        unit = F.normalize(projected, dim=-1)
        more = {n: head(unit.to(pooled.dtype) if n == "concepts" else pooled) for n, head in self.heads.items()}
        return {
            "tokens": tokens,
            "embedding": unit if self.config.normalize else projected,
            "logits": full_precision(self.image_logits(pooled)),
            **{f"{name}_logits": full_precision(logits) for name, logits in more.items()},
        }

    def _phase_text(self, tokens: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """Token ids [B, T], lengths [B] → tokens, embedding, class logits, and the learned scale and bias [1]."""
        states, pooled = self.text(tokens, lengths)
        projected = full_precision(self._project(pooled, self.text_projection))
        bias = {} if self.config.logit_bias is None else {"logit_bias": full_precision(self.logit_bias)}
        return {
            "tokens": states,
            "embedding": F.normalize(projected, dim=-1) if self.config.normalize else projected,
            "logits": full_precision(self.text_logits(pooled)),
            "logit_scale": full_precision(self.logit_scale),
            **bias,
        }

    def _phase_fuse(self, image_tokens: Tensor, text_tokens: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """Both towers' tokens, lengths [B] → match logits [B] and class logits [B, C]."""
        fused = self._fused(image_tokens, text_tokens, lengths)
        return {
            "match": full_precision(self.match_head(fused).squeeze(-1)),
            "logits": full_precision(self.fused_head(fused)),
        }

    def _phase_caption(
        self, image_tokens: Tensor, tokens: Tensor, lengths: Tensor, weight: Tensor
    ) -> dict[str, Tensor]:
        """Image tokens, token ids [B, T], lengths [B], weight [B] → captioning loss summed over predicted tokens, and
        their number. No logits: they would be [tokens × vocabulary]."""
        loss, num_tokens = self.decoder(image_tokens, tokens, lengths, weight)
        return {"loss": loss, "num_tokens": num_tokens}

    def _fused(self, image_tokens: Tensor, text_tokens: Tensor, lengths: Tensor) -> Tensor:
        """Mean fused token [B, D]."""
        fused = self.fuse(image_tokens, text_tokens, lengths)[0]
        return fused[:, 0] if fused.shape[1] == 1 else masked_mean(fused, lengths)

    def _project(self, pooled: Tensor, projection: nn.Module) -> Tensor:
        """Into the shared space [B, d], of any length."""
        projected = projection(pooled)
        return self.shared(projected) if self.config.shared_layers else projected


def full_precision(x: Tensor) -> Tensor:
    """At least float32: half precision is widened for losses, double stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def text_ends(tokenizer: Any, name: str) -> tuple[int, int]:
    """The tokens that this tokenizer puts before and after every text; InputError where it has none."""
    ids = tokenizer("")["input_ids"]
    if len(ids) != 2:
        raise InputError(
            f"model.decoder: the tokenizer of '{name}' marks no start and end of a text; take an encoder like BERT's"
        )
    return ids[0], ids[1]


def tidy_spaces(text: str) -> str:
    """Decoded word pieces as one writes them: no blank before punctuation or around hyphens within words."""
    text = re.sub(r"\s+([.,:;!?)%])", r"\1", text)
    return re.sub(r"(?<=\w) - (?=\w)", "-", re.sub(r"\(\s+", "(", text)).strip()
