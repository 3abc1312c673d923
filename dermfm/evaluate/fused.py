"""The fused head: image and note together, for the notes of every strategy, in one more pass over the images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dermfm.evaluate.embed import embed_images
from dermfm.evaluate.embedding import Embedded, Site, softmax
from dermfm.evaluate.parts import Arrays
from dermfm.evaluate.results import Prediction
from dermfm.samples import tokenize


def fused_predictions(model: Any, embedded: Embedded, splits: list[str], site: Site) -> list[Prediction]:
    """Class probabilities of the fused head for every scored record with a note, by strategy."""
    notes = _notes_of(embedded)
    found = [_split_logits(model, notes, embedded, split, site) for split in splits]
    predictions = []
    for k, one in enumerate(embedded.texts):
        rows, logits, ids = [], [], dict(zip(one.rows.tolist(), one.note_ids, strict=True))
        for split, arrays in zip(splits, found, strict=True):
            own = np.flatnonzero(embedded.records.splits == split)  # readable images of the split, in its order
            has = np.array([(k, int(row)) in notes for row in own], dtype=bool)
            rows.append(own[has])
            logits.append(arrays["logits"][:, k][has])
        scored = np.concatenate(rows)
        chances = softmax(np.concatenate(logits))
        kept = [ids[int(row)] for row in scored]
        predictions.append(Prediction("classify-fused", "classes", scored, chances, one.track, kept, one.strategy))
    return predictions


def _notes_of(embedded: Embedded) -> dict[tuple[int, int], str]:
    """(number of the strategy, row of the record) → note."""
    return {
        (k, int(row)): text
        for k, one in enumerate(embedded.texts)
        for row, text in zip(one.rows, one.texts, strict=True)
    }


def _split_logits(model: Any, notes: dict[tuple[int, int], str], embedded: Embedded, split: str, site: Site) -> Arrays:
    """`logits` [n, strategies, C] of the readable images of one split; a missing note counts as an empty one."""
    rows_of = manifest_rows(embedded, split, site)
    num = len(embedded.texts)

    def beside(rows: np.ndarray) -> tuple[Tensor, ...]:
        texts = [notes.get((k, rows_of.get(int(row), -1)), "") for row in rows for k in range(num)]
        return tokenize(model.tokenizer, texts, model.config.text.max_tokens)

    def forward(pixels: Tensor, tokens: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        image_tokens = model.image(pixels)[0]
        shown = torch.arange(len(pixels), device=pixels.device).repeat_interleave(num)
        logits = model.classify_fused(image_tokens[shown], model.text(tokens, lengths)[0], lengths)
        return {"logits": logits.unflatten(0, (len(pixels), num))}

    strategies = [one.strategy for one in embedded.texts]
    parts = site.parts(f"fused-{split}", site.manifest.fingerprint, split, model.image_size, strategies)
    what = f"{split} images with their notes"
    return embed_images(forward, site.manifest, split, model.image_size, parts, site.compute, site.ranks, what, beside)


def manifest_rows(embedded: Embedded, split: str, site: Site) -> dict[int, int]:
    """Row of a split in the shards → row of its record among the readable ones."""
    place = {record_id: i for i, record_id in enumerate(embedded.records.record_ids)}
    ids = site.manifest.read_rows(split)["record_id"]
    return {row: place[record_id] for row, record_id in enumerate(ids) if record_id in place}
