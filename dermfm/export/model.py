"""An exported model in three lines: images and notes in, vectors, probabilities, notes and reports out."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dermfm.config import InputError
from dermfm.export import bundle
from dermfm.images import decode_image
from dermfm.samples import tokenize

BATCH = 32  # images or texts in one forward pass
F = TypeVar("F", bound=Callable[..., Any])
Picture = str | Path | bytes | Image.Image | np.ndarray | Tensor


def load(path: str | Path, device: str = "cpu") -> Exported:
    """The model in an exported folder. InputError where it is none."""
    return Exported(bundle.read(path, device))


def without_gradient(method: F) -> F:
    """Run a method in inference mode."""

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode():
            return method(*args, **kwargs)

    return cast(F, run)


class Exported:
    """A trained model with its processor and calibration.

    An image is a path, encoded bytes, a PIL image, or uint8 pixels [3, S, S] of the model's own size; a list of them or
    one tensor [B, 3, S, S] is a batch. Results lie on the CPU.
    """

    def __init__(self, content: bundle.Bundle) -> None:
        self.model, self.about, self.notes = content.model, content.about, content.notes
        self.classes: list[str] = self.about["classes"]

    @property
    def temperature(self) -> float | None:
        """What class logits are divided by; None where the model was exported without calibration."""
        return self.about.get("temperature")

    @property
    def writes_reports(self) -> bool:
        """Whether the model has a decoder."""
        return self.model.config.decoder.depth > 0

    @without_gradient
    def encode_image(self, images: Sequence[Picture] | Tensor) -> Tensor:
        """Vectors [B, d] of length 1."""
        return self._batches(images, lambda pixels: self.model.encode_image(pixels)[0])

    @without_gradient
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Vectors [M, d] of length 1."""
        parts = [self.model.encode_text(*self._tokens(texts[i : i + BATCH]))[0] for i in range(0, len(texts), BATCH)]
        return torch.cat(parts).cpu() if parts else torch.zeros(0, self.model.config.embed_dim)

    @without_gradient
    def classify(self, images: Sequence[Picture] | Tensor) -> Tensor:
        """Probabilities [B, C] of `classes`, calibrated where the export is."""
        logits = self._batches(images, self.model.classify_image).double()
        return (logits / (self.temperature or 1.0)).softmax(-1)

    @without_gradient
    def match(self, images: Sequence[Picture] | Tensor, texts: Sequence[str]) -> Tensor:
        """Probability [B] that image i and text i belong together, by the fused pair. ValueError for other lengths."""
        if len(images) != len(texts):
            raise ValueError(f"match: {len(images)} images and {len(texts)} texts; give one text an image")
        if self.model.config.fusion.kind == "none":
            raise InputError("match: this model was trained without fusion; compare encode_image and encode_text")
        parts = []
        for start in range(0, len(texts), BATCH):
            rows = slice(start, start + BATCH)
            tokens, lengths = self._tokens(texts[rows])
            image_tokens = self.model.encode_image(self.pixels(images[rows]))[1]
            parts.append(self.model.match(image_tokens, self.model.encode_text(tokens, lengths)[1], lengths))
        return torch.cat(parts).float().sigmoid().cpu()

    def write_report(self, images: Sequence[Picture] | Tensor, **options: Any) -> list[str]:
        """One report an image (see DermFM.write_report). InputError where the model has no decoder."""
        starts = range(0, len(images), BATCH)
        return [t for i in starts for t in self.model.write_report(self.pixels(images[i : i + BATCH]), **options)]

    def nearest_notes(self, vectors: Tensor, count: int = 3) -> list[list[dict[str, Any]]]:
        """For each image vector [B, d] the exported notes of highest cosine: their columns and `score`, best first."""
        if not len(self.notes.rows):
            return [[] for _ in vectors]
        scores = vectors.float().numpy() @ self.notes.vectors.T
        best = np.argsort(-scores, axis=1, kind="stable")[:, :count]
        return [[self.notes.rows[j] | {"score": float(scores[i, j])} for j in row] for i, row in enumerate(best)]

    def pixels(self, images: Sequence[Picture] | Tensor) -> Tensor:
        """uint8 [B, 3, S, S] on the model's device. ValueError or OSError for an image that cannot be read."""
        size = self.model.image_size
        one = images if isinstance(images, Tensor) else torch.stack([_pixels(image, size) for image in images])
        if one.dtype != torch.uint8 or tuple(one.shape[1:]) != (3, size, size):
            raise ValueError(
                f"pixels: {one.dtype} {tuple(one.shape)} are not uint8 [B, 3, {size}, {size}]; give files or PIL images"
            )
        return one.to(self._device)

    def _batches(self, images: Sequence[Picture] | Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        if not len(images):
            raise ValueError("images: none given")
        return torch.cat([run(self.pixels(images[i : i + BATCH])) for i in range(0, len(images), BATCH)]).cpu()

    def _tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        tokens, lengths = tokenize(self.model.tokenizer, texts, self.model.config.text.max_tokens)
        return tokens.to(self._device), lengths.to(self._device)

    @property
    def _device(self) -> torch.device:
        return self.model.logit_scale.device


def _pixels(image: Picture, size: int) -> Tensor:
    """uint8 [3, size, size]: the centre square, resized, by the same code as in training and evaluation."""
    if isinstance(image, str | Path):
        image = Path(image).read_bytes()
    if isinstance(image, Image.Image):
        encoded = io.BytesIO()
        image.convert("RGB").save(encoded, "BMP")  # lossless and quick
        image = encoded.getvalue()
    if isinstance(image, bytes):
        return torch.from_numpy(np.ascontiguousarray(decode_image(image, size)))
    return torch.as_tensor(np.asarray(image))
