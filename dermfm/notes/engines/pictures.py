"""Requests with an image: the file made ready for a processor or a server; decoding by the model's own `generate`."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from dermfm.notes.engines.decode import Sampling, chooser
from dermfm.notes.engines.grammar import Walk
from dermfm.notes.engines.protocol import Request

QUALITY = 90
IMAGE_SIDE = 1536  # longer images are made smaller for models in process; their processors cut them further


def open_picture(path: str, longest_side: int | None = None) -> Image.Image:
    """The image upright in RGB, at most so many pixels on its longer side; ValueError where it cannot be read."""
    try:
        with Image.open(path) as image:
            picture = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as an image ({error})") from error
    if longest_side is not None and max(picture.size) > longest_side:
        picture.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
    return picture


def data_url(path: str, longest_side: int) -> str:
    """The image as a data URL: the file itself where it is a small enough JPEG or PNG, else a JPEG made of it."""
    with _opened(path) as image:
        kind, side, turned = image.format, max(image.size), image.getexif().get(0x0112, 1) != 1
    if kind in ("JPEG", "PNG") and side <= longest_side and not turned:
        return _url(f"image/{kind.lower()}", Path(path).read_bytes())
    encoded = io.BytesIO()
    open_picture(path, longest_side).save(encoded, "JPEG", quality=QUALITY)
    return _url("image/jpeg", encoded.getvalue())


def _opened(path: str) -> Image.Image:
    """The opened image; ValueError where it is none."""
    try:
        return Image.open(path)
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as an image ({error})") from error


def chat(request: Request, image: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The conversation as chat messages; an image stands before the last message's text."""
    messages: list[dict[str, Any]] = [{"role": role, "content": content} for role, content in request.messages]
    if image is not None:
        messages[-1]["content"] = [image, {"type": "text", "text": messages[-1]["content"]}]
    return messages


def picture_inputs(processor: Any, requests: Sequence[Request]) -> dict[str, torch.Tensor]:
    """A left-padded batch of conversations with one image each, on the CPU."""
    chats = []
    for request in requests:
        assert request.image is not None
        messages = chat(request, {"type": "image", "image": open_picture(request.image, IMAGE_SIDE)})
        for message in messages[:-1]:  # templates of such models want lists everywhere
            message["content"] = [{"type": "text", "text": message["content"]}]
        chats.append(messages)
    processor.tokenizer.padding_side = "left"
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    batch = processor.apply_chat_template(
        chats,
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        processor_kwargs={"return_tensors": "pt", "padding": True},
    )
    return dict(batch)


@torch.inference_mode()
def decode_with_pictures(
    model: Any,
    inputs: dict[str, torch.Tensor],
    sampling: Sampling,
    stop: Sequence[int],
    max_new_tokens: int,
    walk: Walk | None,
    agree: Callable[[torch.Tensor], torch.Tensor],
) -> list[list[int]]:
    """New token ids of each row, ending with a stop token where one came: as `decode`, through `model.generate`."""
    rows, width = inputs["input_ids"].shape
    placed = {
        name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }
    choice = _Choice(chooser(sampling, max_new_tokens, model.device), width, stop, walk, agree)
    found = model.generate(
        **placed,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=list(stop),
        pad_token_id=stop[0],
        logits_processor=[choice],
    )
    return [_until_stop(found[row, -(found.shape[1] - width) :].tolist(), stop) for row in range(rows)]


class _Choice:
    """A logits processor that leaves one finite entry a row: the token that our own sampling chooses."""

    def __init__(self, choose: Any, width: int, stop: Sequence[int], walk: Walk | None, agree: Any) -> None:
        self.choose, self.width, self.stop, self.walk, self.agree = choose, width, set(stop), walk, agree
        self.ended: set[int] = set()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        rows = list(range(scores.shape[0]))
        allowed = scores if self.walk is None else self.walk.allow(scores, rows)
        tokens = self.agree(self.choose(allowed, rows, input_ids.shape[1] - self.width))
        for row, token in enumerate(tokens.tolist()):
            if row not in self.ended and self.walk is not None:
                self.walk.take(row, token)
            if token in self.stop:
                self.ended.add(row)
        return torch.full_like(scores, float("-inf")).scatter_(1, tokens[:, None], 0.0)


def _until_stop(tokens: list[int], stop: Sequence[int]) -> list[int]:
    end = next((k + 1 for k, token in enumerate(tokens) if token in stop), len(tokens))
    return tokens[:end]


def _url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
