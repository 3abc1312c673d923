"""The linear probe beside the model: pooled features of the image tower as it was before any training."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dermfm.config import InputError, from_dict, short_hash
from dermfm.evaluate.embed import Compute, Forward, embed_images
from dermfm.evaluate.embedding import Embedded
from dermfm.evaluate.parts import Arrays, Parts
from dermfm.evaluate.probe import fit_probe
from dermfm.evaluate.ranks import Ranks, together
from dermfm.evaluate.records import CLASS_SETS
from dermfm.evaluate.results import Prediction
from dermfm.model.image import ImageConfig, ImageTower
from shards.manifest import Manifest


def probe_predictions(
    image_config: dict[str, Any],
    model: Any,
    manifest: Manifest,
    splits: list[str],
    embedded: Embedded,
    cache: Path,
    compute: Compute,
    ranks: Ranks,
) -> tuple[Prediction, dict[str, Any]]:
    """Fit on the train split of the shards, choose C on the valid split, predict the scored records.

    Where the model's own tower still has these weights (it was frozen), its features are used as they are. Returns the
    predictions and what the protocol says about the probe. InputError where the shards hold no training records.
    """
    present = {s.split for s in manifest.shards if s.num_samples}
    if "train" not in present:
        raise InputError(f"{manifest.folder}: the probe needs a train split and there is none; set probe=false")
    tower = _untrained(image_config).to(compute.device).eval()
    weights = _weights_hash(tower)
    reuse = weights == _weights_hash(model.image)

    def features(split: str) -> Arrays:
        identity = [manifest.fingerprint, split, weights, tower.size, compute.precision, compute.batch_size]
        parts = Parts(cache, f"features-{split}", identity)
        return embed_images(
            _pooled(tower), manifest, split, tower.size, parts, compute, ranks, f"probe features {split}"
        )

    train, train_labels = _labelled(manifest, "train", features("train"))
    valid, valid_labels = train[:0], train_labels[:0]
    if "valid" in present:
        valid, valid_labels = _labelled(manifest, "valid", features("valid"))
    scored = embedded.features if reuse else _rows_of(embedded, {split: features(split) for split in splits})
    fitted = together(ranks, lambda: fit_probe(train, train_labels, valid, valid_labels) if ranks.first else None)
    num_classes = len(CLASS_SETS["classes"])
    own = None if fitted is None else (fitted.probabilities(scored, num_classes), fitted.c, fitted.tried)
    probabilities, c, tried = ranks.gather(own)[0]
    about = {
        "features": f"{image_config['name']} pooled, {tower.size} px, "
        + ("as pretrained, not trained by this run" if image_config.get("weights") else "random weights"),
        "classifier": "balanced logistic regression",
        "c": c,
        "valid_f1_macro": {str(k): round(v, 4) for k, v in tried.items()},
        "num_train": len(train),
        "num_valid": len(valid),
    }
    return Prediction("probe", "classes", np.arange(len(scored)), probabilities), about


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


def _rows_of(embedded: Embedded, by_split: dict[str, Arrays]) -> np.ndarray:
    """Features of the scored records, in their order."""
    stacked = np.concatenate([arrays["features"] for arrays in by_split.values()])
    if len(stacked) != len(embedded.records):
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
