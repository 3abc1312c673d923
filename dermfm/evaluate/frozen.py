"""Linear classifiers on pooled image features: the probe on a tower as it was before any training, and few-shot."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dermfm.config import InputError, from_dict, short_hash
from dermfm.evaluate.embed import Encoders, Forward, embed_images
from dermfm.evaluate.embedding import Embedded, Site, split_outputs
from dermfm.evaluate.parts import Arrays, Parts
from dermfm.evaluate.probe import few_shot, fit_probe
from dermfm.evaluate.ranks import spread, together
from dermfm.evaluate.records import CLASS_SETS
from dermfm.evaluate.results import Prediction
from dermfm.model.image import ImageConfig, ImageTower
from shards.manifest import Manifest

NUM_CLASSES = len(CLASS_SETS["classes"])


@dataclasses.dataclass(frozen=True)
class Features:
    """Pooled image features of a tower: of a split ("rows" and "features" of its readable images), of the scored
    records [n, F], and in words what they are."""

    of: Callable[[str], Arrays]
    scored: np.ndarray
    about: str


def own_features(encoders: Encoders, embedded: Embedded, site: Site) -> Features:
    """Those of the model that is scored."""
    about = f"the scored model's own, {encoders.image_size} px"
    return Features(
        lambda split: split_outputs(encoders, split, site), embedded.features[embedded.scored], f"pooled, {about}"
    )


def untrained_features(
    image_config: dict[str, Any], model: Any, embedded: Embedded, splits: list[str], site: Site
) -> Features:
    """Those of the image tower as a run starts with it. Where the model's own tower still has these weights (it was
    frozen), its features of the scored records are used as they are."""
    tower = _untrained(image_config).to(site.compute.device).eval()
    weights = _weights_hash(tower)
    compute = site.compute

    def of(split: str) -> Arrays:
        identity = [site.manifest.fingerprint, split, weights, tower.size, compute.precision, compute.batch_size]
        parts = Parts(site.cache, f"features-{split}", identity)
        what = f"probe features {split}"
        return embed_images(_pooled(tower), site.manifest, split, tower.size, parts, compute, site.ranks, what)

    scored = embedded.features[embedded.scored]
    if weights != _weights_hash(model.image):
        scored = _rows_of(int(embedded.scored.sum()), [of(split) for split in splits])
    pretrained = "as pretrained, not trained by this run" if image_config.get("weights") else "random weights"
    return Features(of, scored, f"{image_config['name']} pooled, {tower.size} px, {pretrained}")


def probe_predictions(features: Features, rows: np.ndarray, site: Site) -> tuple[Prediction, dict[str, Any]]:
    """Fit on the train split of the shards, choose C on the valid split, predict the scored records `rows` [n].

    Returns the predictions and what the protocol says about the probe. InputError where the shards hold no training
    records.
    """
    train, train_labels = train_features(features, site.manifest, "probe")
    valid, valid_labels = train[:0], train_labels[:0]
    if any(s.split == "valid" and s.num_samples for s in site.manifest.shards):
        valid, valid_labels = _labelled(site.manifest, "valid", features.of("valid"))

    def fit() -> tuple[np.ndarray, float, dict[float, float]] | None:
        if not site.ranks.first:
            return None
        fitted = fit_probe(train, train_labels, valid, valid_labels)
        return fitted.probabilities(features.scored, NUM_CLASSES), fitted.c, fitted.tried

    found = site.ranks.gather(together(site.ranks, fit))[0]
    assert found is not None
    probabilities, c, tried = found
    about = {
        "features": features.about,
        "classifier": "balanced logistic regression",
        "c": c,
        "valid_f1_macro": {str(k): round(v, 4) for k, v in tried.items()},
        "num_train": len(train),
        "num_valid": len(valid),
    }
    return Prediction("probe", "classes", rows, probabilities), about


def few_shot_predictions(
    features: Features, rows: np.ndarray, shots: list[int], draws: int, site: Site
) -> list[Prediction]:
    """For every k of `shots`, `draws` classifiers of k training images a class each, drawn by their number.

    InputError where the shards hold no training records or fewer than two classes of them.
    """
    train, labels = train_features(features, site.manifest, "few-shot")
    items = [(k, draw) for k in shots for draw in range(draws)]

    def predict(item: tuple[int, int]) -> list[Prediction]:
        k, draw = item
        chances = few_shot(train, labels, features.scored, k, draw, NUM_CLASSES)
        return [Prediction("few-shot", "classes", rows, chances, strategy=f"{k}-shot", seed=draw)]

    return together(site.ranks, lambda: spread(site.ranks, items, predict))


def train_features(features: Features, manifest: Manifest, task: str) -> tuple[np.ndarray, np.ndarray]:
    """Features [n, F] and labels [n] of the training records. InputError where fewer than two classes are there."""
    if not any(s.split == "train" and s.num_samples for s in manifest.shards):
        raise InputError(
            f"{manifest.folder}: the task {task} needs a train split and there is none; leave it out of tasks"
        )
    train, labels = _labelled(manifest, "train", features.of("train"))
    if len(np.unique(labels)) < 2:
        raise InputError(
            f"{manifest.folder}: the task {task} needs training records of two classes at least; leave it out of tasks"
        )
    return train, labels


def _untrained(image_config: dict[str, Any]) -> ImageTower:
    """The tower as a run starts with it; where it has no pretrained weights, the same random ones in every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ImageTower(from_dict(ImageConfig, image_config, "model.image"))


def _pooled(tower: ImageTower) -> Forward:
    return lambda pixels: {"features": tower.pooled(pixels)}


def _labelled(manifest: Manifest, split: str, arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of the readable records with a known label."""
    labels = np.array([-1 if label is None else label for label in manifest.read_rows(split)["label"]])[arrays["rows"]]
    return arrays["features"][labels >= 0], labels[labels >= 0]


def _rows_of(count: int, splits: list[Arrays]) -> np.ndarray:
    """Features of the scored records, in their order."""
    stacked = np.concatenate([arrays["features"] for arrays in splits])
    if len(stacked) != count:
        raise InputError("probe: the image files changed while they were read; remove the cache folder and run again")
    return stacked


def _weights_hash(tower: ImageTower) -> str:
    """A hash of all weights and statistics of a tower and of how it normalises pixels."""
    digest = hashlib.sha256()
    tensors = dict(tower.state_dict()) | {"mean": tower.mean, "std": tower.std}
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().to(torch.float32).contiguous().numpy().tobytes())
    return short_hash([digest.hexdigest(), tower.size])
