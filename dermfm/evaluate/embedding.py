"""What the model says about the scored records: image, note and prompt vectors, and its heads' predictions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from dermfm.config import InputError
from dermfm.evaluate import embed
from dermfm.evaluate.parts import Arrays, Parts
from dermfm.evaluate.ranks import Ranks
from dermfm.evaluate.records import RecordSet, TextSet, text_sets
from dermfm.evaluate.results import Prediction
from dermfm.evaluate.zeroshot import Prompts, make_prompts
from shards.manifest import Manifest


@dataclasses.dataclass(frozen=True)
class Embedded:
    """The scored records (those of unreadable images left out) with image vectors [N, d] and pooled features [N, F];
    one note set a strategy with its vectors [M, d]; prompts with theirs [P, d]; predictions of the model's heads; and
    the record ids of unreadable images."""

    records: RecordSet
    image: np.ndarray
    features: np.ndarray
    texts: list[TextSet]
    text: list[np.ndarray]
    prompts: Prompts
    prompt: np.ndarray
    predictions: list[Prediction]
    unreadable: list[str]


def embed_all(
    model: Any,
    manifest: Manifest,
    records: RecordSet,
    splits: list[str],
    strategies: list[str],
    cache: Path,
    identity: list[Any],
    compute: embed.Compute,
    ranks: Ranks,
) -> Embedded:
    """Embed the records of `splits` (in that order), their notes of `strategies` (empty: all) and the prompts.

    `identity` names the checkpoint; stored pieces under `cache` of the same identity are taken up.
    """
    identity = [*identity, compute.precision, compute.batch_size]
    arrays, offset = [], 0
    for split in splits:
        parts = Parts(cache, f"images-{split}", [*identity, manifest.fingerprint, split, model.image_size])
        forward = embed.image_outputs(model)
        own = embed.embed_images(
            forward, manifest, split, model.image_size, parts, compute, ranks, f"embedding {split} images"
        )
        own["rows"] = own["rows"] + offset
        offset += int((records.splits == split).sum())
        arrays.append(own)
    image = {name: np.concatenate([a[name] for a in arrays]) for name in arrays[0]}
    readable = records.select(image["rows"])
    texts = text_sets(readable, strategies)
    prompts = make_prompts()
    text, prompt = _embed_texts(model, texts, prompts, cache, identity, compute, ranks)
    _check_finite(image["embedding"], readable)
    return Embedded(
        records=readable,
        image=image["embedding"],
        features=image["features"],
        texts=texts,
        text=[arrays["embedding"] for arrays in text],
        prompts=prompts,
        prompt=prompt,
        predictions=_head_predictions(image["logits"], texts, text),
        unreadable=sorted(set(records.record_ids) - set(readable.record_ids)),
    )


def _embed_texts(
    model: Any,
    texts: list[TextSet],
    prompts: Prompts,
    cache: Path,
    identity: list[Any],
    compute: embed.Compute,
    ranks: Ranks,
) -> tuple[list[Arrays], np.ndarray]:
    """Outputs for every note of every set, and the prompts' vectors; each distinct text is encoded once."""
    distinct = sorted({text for one in texts for text in one.texts} | set(prompts.texts))
    place = {text: i for i, text in enumerate(distinct)}
    parts = Parts(cache, "texts", [*identity, distinct])
    limit = model.config.text.max_tokens
    out = embed.embed_texts(embed.text_outputs(model), model.tokenizer, limit, distinct, parts, compute, ranks)
    rows = [np.array([place[t] for t in one.texts], dtype=np.int64) for one in texts]
    sets = [{name: values[own] for name, values in out.items() if name != "rows"} for own in rows]
    return sets, out["embedding"][[place[t] for t in prompts.texts]]


def _head_predictions(logits: np.ndarray, texts: list[TextSet], text: list[Arrays]) -> list[Prediction]:
    predictions = [Prediction("classify-image", "classes", np.arange(len(logits)), softmax(logits))]
    for one, arrays in zip(texts, text, strict=True):
        predictions.append(
            Prediction(
                "classify-text", "classes", one.rows, softmax(arrays["logits"]), one.track, one.note_ids, one.strategy
            )
        )
    return predictions


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities [n, C] in float64."""
    shifted = logits.astype(float) - logits.max(axis=1, keepdims=True)
    grown = np.exp(shifted)
    return grown / grown.sum(axis=1, keepdims=True)


def _check_finite(vectors: np.ndarray, records: RecordSet) -> None:
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        record = records.record_ids[bad[0]]
        raise InputError(
            f"the checkpoint gives embeddings that are not finite ({len(bad)} of {len(vectors)}, first {record})"
        )
