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
from dermfm.evaluate.records import RecordSet, TextSet, check_strategies, text_sets
from dermfm.evaluate.results import Prediction
from dermfm.evaluate.zeroshot import Prompts, make_prompts
from shards.manifest import Manifest


@dataclasses.dataclass(frozen=True)
class Embedded:
    """The scored records (those of unreadable images left out) with image vectors [N, d] and pooled features [N, F];
    one note set a strategy with its vectors [M, d]; prompts with theirs [P, d]; predictions of the model's heads; and
    the record ids of unreadable images. `scored` bool [N]: the others are in pools only."""

    records: RecordSet
    scored: np.ndarray
    image: np.ndarray
    features: np.ndarray
    texts: list[TextSet]
    text: list[np.ndarray]
    prompts: Prompts
    prompt: np.ndarray
    predictions: list[Prediction]
    unreadable: list[str]


@dataclasses.dataclass(frozen=True)
class Site:
    """Where forward passes run and what they leave: shards, folder of stored pieces, what names the weights, ranks."""

    manifest: Manifest
    cache: Path
    identity: list[Any]
    compute: embed.Compute
    ranks: Ranks

    def parts(self, name: str, *more: Any) -> Parts:
        """Stored pieces that depend on the weights, the batching and on `more`."""
        return Parts(self.cache, name, [*self.identity, self.compute.precision, self.compute.batch_size, *more])


def split_outputs(encoders: embed.Encoders, split: str, site: Site) -> Arrays:
    """Outputs of the image encoder for one split: "rows" [n] of the split and each array [n, …]."""
    parts = site.parts(f"images-{split}", site.manifest.fingerprint, split, encoders.image_size)
    what = f"embedding {split} images"
    size = encoders.image_size
    return embed.embed_images(encoders.image, site.manifest, split, size, parts, site.compute, site.ranks, what)


def embed_all(
    encoders: embed.Encoders,
    records: RecordSet,
    splits: list[str],
    num_scored: int,
    strategies: list[str],
    site: Site,
) -> Embedded:
    """Embed the records of `splits` (in that order), their notes of `strategies` (empty: all) and the prompts.

    The first `num_scored` records are scored, the others are in pools only. Stored pieces of the same identity are
    taken up.
    """
    check_strategies(records, strategies)  # before an image is embedded for nothing
    arrays, offset = [], 0
    for split in splits:
        own = split_outputs(encoders, split, site)
        own["rows"] = own["rows"] + offset
        offset += int((records.splits == split).sum())
        arrays.append(own)
    image = {name: np.concatenate([a[name] for a in arrays]) for name in arrays[0]}
    readable, scored = records.select(image["rows"]), image["rows"] < num_scored
    texts = text_sets(readable, strategies)
    prompts = make_prompts(encoders.templates)
    text, prompt = _embed_texts(encoders, texts, prompts, site)
    _check_finite(image["embedding"], readable)
    return Embedded(
        records=readable,
        scored=scored,
        image=image["embedding"],
        features=image["features"],
        texts=texts,
        text=[arrays["embedding"] for arrays in text],
        prompts=prompts,
        prompt=prompt,
        predictions=[only(p, scored) for p in _head_predictions(image, texts, text)],
        unreadable=sorted(set(records.record_ids) - set(readable.record_ids)),
    )


def only(prediction: Prediction, scored: np.ndarray) -> Prediction:
    """The predictions of the scored records."""
    keep = scored[prediction.rows]
    if keep.all():
        return prediction
    notes = prediction.note_ids and [n for n, k in zip(prediction.note_ids, keep, strict=True) if k]
    return dataclasses.replace(
        prediction, rows=prediction.rows[keep], probabilities=prediction.probabilities[keep], note_ids=notes
    )


def _embed_texts(
    encoders: embed.Encoders, texts: list[TextSet], prompts: Prompts, site: Site
) -> tuple[list[Arrays], np.ndarray]:
    """Outputs for every note of every set, and the prompts' vectors; each distinct text is encoded once."""
    distinct = sorted({text for one in texts for text in one.texts} | set(prompts.texts))
    place = {text: i for i, text in enumerate(distinct)}
    parts = site.parts("texts", distinct)
    out = embed.embed_texts(
        encoders.text, encoders.tokenizer, encoders.max_tokens, distinct, parts, site.compute, site.ranks
    )
    rows = [np.array([place[t] for t in one.texts], dtype=np.int64) for one in texts]
    sets = [{name: values[own] for name, values in out.items() if name != "rows"} for own in rows]
    return sets, out["embedding"][[place[t] for t in prompts.texts]]


def _head_predictions(image: Arrays, texts: list[TextSet], text: list[Arrays]) -> list[Prediction]:
    """Of every head that the model has; the malignancy of a model without such a head is summed from its classes."""
    heads = {"classes": "logits", "subclasses": "subclass_logits", "malignancy": "malignancy_logits"}
    predictions = [
        Prediction("classify-image", class_set, np.arange(len(image[name])), softmax(image[name]))
        for class_set, name in heads.items()
        if name in image
    ]
    for one, arrays in zip(texts, text, strict=True):
        if "logits" in arrays:
            chances = softmax(arrays["logits"])
            predictions.append(
                Prediction("classify-text", "classes", one.rows, chances, one.track, one.note_ids, one.strategy)
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
