"""Forward passes: every image and every distinct text once, over any number of ranks, continued where they stopped."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dermfm.evaluate.parts import Arrays, Parts
from dermfm.evaluate.ranks import Ranks, on_first, together
from dermfm.evaluate.zeroshot import TEMPLATES
from dermfm.images import decode_image
from dermfm.progress import Meter
from dermfm.samples import image_bytes, tokenize
from shards.loader import passes
from shards.manifest import Manifest
from shards.reader import ShardReader

PIECE = 8  # batches of a rank in one piece on disk: what an interruption costs at most
Forward = Callable[..., dict[str, Tensor]]
Beside = Callable[[np.ndarray], tuple[Tensor, ...]]  # rows [B] → what else goes into the forward pass of their images


class DecodedImage:
    """Sample function of the loader: the image alone, without augmentation, uint8 [3, size, size]."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, sample: dict[str, bytes], rng: np.random.Generator) -> np.ndarray:
        """Decode one sample."""
        return decode_image(image_bytes(sample), self.size)


def stack_images(items: list[np.ndarray | None], indices: np.ndarray) -> tuple[Tensor | None, np.ndarray]:
    """(pixels [B, 3, S, S] with zeros for missing ones, which are there [B]); pixels None where all are missing."""
    there = np.array([item is not None for item in items])
    shape = next((item.shape for item in items if item is not None), None)
    if shape is None:
        return None, there
    return torch.from_numpy(np.stack([np.zeros(shape, np.uint8) if i is None else i for i in items])), there


def image_outputs(model: Any) -> Forward:
    """pixels → embedding [B, d], class logits [B, C] and pooled features [B, F] in one pass of the image tower."""

    def forward(pixels: Tensor) -> dict[str, Tensor]:
        pooled = model.image.pooled(pixels)
        finer = {f"{n}_logits": model.heads[n](pooled) for n in ("subclass", "malignancy") if n in model.heads}
        logits = model.image_logits(pooled)
        return {"embedding": model.embed_image(pooled), "logits": logits, "features": pooled} | finer

    return forward


def text_outputs(model: Any) -> Forward:
    """tokens [B, T], lengths [B] → embedding [B, d] and class logits [B, C] in one pass of the text tower."""

    def forward(tokens: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        _, pooled = model.text(tokens, lengths)
        return {"embedding": model.embed_text(pooled), "logits": model.text_logits(pooled)}

    return forward


@dataclasses.dataclass(frozen=True)
class Encoders:
    """What is scored, as functions: `image` of uint8 pixels [B, 3, S, S] gives `embedding` [B, d], `features` [B, F]
    and, where the model has such heads, `logits`, `subclass_logits`, `malignancy_logits`; `text` of tokens and lengths
    gives `embedding` and perhaps `logits`. `templates`: class set → prompts with {} for the class word."""

    image: Forward
    text: Forward
    image_size: int
    tokenizer: Any
    max_tokens: int
    templates: dict[str, tuple[str, ...]]
    identity: str = ""


def encoders_of(model: Any) -> Encoders:
    """Those of our own model."""
    limit = model.config.text.max_tokens
    return Encoders(image_outputs(model), text_outputs(model), model.image_size, model.tokenizer, limit, TEMPLATES)


class Compute:
    """Where and how forward passes run: device, precision (fp32 or bf16), batch size, loader workers."""

    def __init__(self, device: str, precision: str, batch_size: int, num_workers: int) -> None:
        self.device, self.precision = torch.device(device), precision
        self.batch_size, self.num_workers = batch_size, num_workers

    def run(self, forward: Forward, *inputs: Tensor) -> Arrays:
        """Outputs of one batch as float32 arrays."""
        bf16 = torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")
        with torch.inference_mode(), bf16:
            out = forward(*[x.to(self.device, non_blocking=True) for x in inputs])
        return {name: value.float().cpu().numpy() for name, value in out.items()}


def embed_images(
    forward: Forward,
    manifest: Manifest,
    split: str,
    size: int,
    parts: Parts,
    compute: Compute,
    ranks: Ranks,
    what: str,
    beside: Beside | None = None,
) -> Arrays:
    """Outputs of `forward` for every readable image of a split: "rows" [n] of the split and each array [n, …]."""
    num_rows = sum(s.num_samples for s in manifest.split(split))

    def work() -> None:
        done = parts.done(num_rows)
        if not done.all():
            batches = image_batches(manifest, split, size, compute, ranks)
            _collect(_image_batches(forward, batches, done, num_rows, compute, beside), parts, ranks, num_rows, what)

    together(ranks, work)
    on_first(ranks, parts.merge)
    return parts.load()


def image_batches(
    manifest: Manifest, split: str, size: int, compute: Compute, ranks: Ranks
) -> Iterator[tuple[np.ndarray, tuple[Tensor | None, np.ndarray]]]:
    """This rank's batches of a split, in order: rows [B] (those past the end pad the last one), pixels, there [B]."""
    shards = manifest.split(split)
    reader = ShardReader(manifest.folder, shards, manifest.remote)
    return passes(
        reader,
        reader.shard_sizes,
        batch_size=compute.batch_size,
        rank=ranks.rank,
        world=ranks.world,
        sample_fn=DecodedImage(size),
        collate_fn=stack_images,
        num_workers=compute.num_workers,
    )


def embed_texts(
    forward: Forward, tokenizer: Any, max_tokens: int, texts: list[str], parts: Parts, compute: Compute, ranks: Ranks
) -> Arrays:
    """Outputs of `forward` for texts [U] (distinct ones): each array [U, …]. Batches hold texts of similar length."""
    order = np.argsort([len(text) for text in texts], kind="stable")

    def work() -> None:
        done = parts.done(len(texts))
        if not done.all():
            _collect(
                _text_batches(forward, tokenizer, max_tokens, texts, order, done, compute, ranks),
                parts,
                ranks,
                len(texts),
                "embedding texts",
            )

    together(ranks, work)
    on_first(ranks, parts.merge)
    return parts.load()


def _image_batches(
    forward: Forward,
    batches: Iterator[Any],
    done: np.ndarray,
    num_rows: int,
    compute: Compute,
    beside: Beside | None,
) -> Iterator[Arrays]:
    for rows, (pixels, there) in batches:
        rows = rows[: min(len(rows), num_rows - int(rows[0]))]  # the loader pads the last batch
        if done[rows].all():
            continue
        good = there[: len(rows)]
        piece = {"rows": rows.astype(np.int64), "good": good}
        if pixels is not None:
            inputs = (pixels,) if beside is None else (pixels[: len(rows)], *beside(rows))
            piece |= {name: values[: len(rows)][good] for name, values in compute.run(forward, *inputs).items()}
        yield piece


def _text_batches(
    forward: Forward,
    tokenizer: Any,
    max_tokens: int,
    texts: list[str],
    order: np.ndarray,
    done: np.ndarray,
    compute: Compute,
    ranks: Ranks,
) -> Iterator[Arrays]:
    for start in range(ranks.rank * compute.batch_size, len(order), ranks.world * compute.batch_size):
        rows = order[start : start + compute.batch_size]
        if done[rows].all():
            continue
        tokens, lengths = tokenize(tokenizer, [texts[i] for i in rows], max_tokens)
        yield {"rows": rows.astype(np.int64), "good": np.ones(len(rows), bool)} | compute.run(forward, tokens, lengths)


def _collect(batches: Iterator[Arrays], parts: Parts, ranks: Ranks, num_rows: int, what: str) -> None:
    """Store the batches of this rank in pieces of several; only the first rank talks."""
    held: list[Arrays] = []
    with Meter(num_rows if ranks.first else 0, what, "items") as meter:
        for piece in batches:
            held.append(piece)
            if ranks.first:
                meter.advance(len(piece["rows"]) * ranks.world)
            if len(held) == PIECE:
                _store(held, parts, ranks)
                held = []
    _store(held, parts, ranks)


def _store(held: list[Arrays], parts: Parts, ranks: Ranks) -> None:
    """Batches whose images all failed have no arrays; they join a piece that has."""
    if held:
        names = max(held, key=len)
        full = [_with_empty(piece, names) for piece in held]
        parts.write({name: np.concatenate([piece[name] for piece in full]) for name in names}, ranks.rank)


def _with_empty(piece: Arrays, like: Arrays) -> Arrays:
    return {name: piece.get(name, values[:0]) for name, values in like.items()}
