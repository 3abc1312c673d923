"""Tier 1: a cell trained on tokens of frozen towers, by the project's own model, objectives, order and optimizer step.

Two cells of the same seed differ in the notes that they read and in nothing else: initialisation, sample order, view of
each image and number of draws are the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.process import Process, close_group, start_group
from dermfm.concepts import find_concepts
from dermfm.evaluate.classify import confusion_matrix, confusion_values
from dermfm.evaluate.embedding import softmax
from dermfm.evaluate.records import RecordSet
from dermfm.model.dermfm import DermFM
from dermfm.objectives import ObjectiveConfig
from dermfm.optimizer import parameter_groups, rate_factor
from dermfm.samples import PAD_MULTIPLE, Batch, balanced_weights, choose_note, hash63
from dermfm.step import optimizer_step
from dermfm.study.config import StudyObjective, TokensConfig
from dermfm.study.tokens import ImageTokens, StoredImage, StoredText, TextStates
from shards.loader import sample_rng
from shards.order import SampleOrder

SCORED_AT_ONCE = 256
LAUNCH_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
Notes = Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Data:
    """What all cells share: records by split in the order of the shards, image tokens, text states."""

    records: dict[str, RecordSet]
    images: ImageTokens
    texts: TextStates


@dataclass(frozen=True)
class Trained:
    """The setting that won: its model, what every try reached on the validation split, the losses of its last step."""

    model: DermFM
    tries: list[dict[str, float]]
    chosen: int
    losses: dict[str, float]


class PlainEngine:
    """The model as `optimizer_step` calls DeepSpeed's engine: phases, and a backward pass that accumulates."""

    def __init__(self, model: DermFM) -> None:
        self.module = model

    def __call__(self, phase: str, **inputs: Tensor) -> dict[str, Tensor]:
        return self.module(phase, **inputs)

    def backward(self, loss: Tensor, scale_wrt_gas: bool = False) -> None:
        """Add the gradients."""
        loss.backward()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """A process group of one, which the losses' collectives need; the environment is as before afterwards."""
    before = {name: os.environ.get(name) for name in LAUNCH_NAMES}
    start_group(Process(0, 1, 0, 1, "cpu"))
    try:
        yield
    finally:
        close_group()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def train_cell(
    config: TokensConfig, objective: StudyObjective, strategy: str, weights: Mapping[str, float], notes: Notes,
    data: Data, seed: int,
) -> Trained:  # fmt: skip
    """Train every setting of the search; the model of the one with the best validation macro F1 (the first on a tie).

    `weights`: note strategies and how often each is drawn. Needs a process group (see `alone`).
    """
    tries: list[dict[str, float]] = []
    best: tuple[float, int, DermFM, dict[str, float]] | None = None
    for lr, text_weight in config.search.settings(strategy):
        model, losses = train_once(config, objective.of(strategy, text_weight), weights, notes, data, seed, lr)
        found = classified(image_outputs(model, data, "valid")[0], data.records["valid"].labels)
        tries.append({"lr": lr, "text_weight": text_weight, **found})
        if best is None or found["f1_macro"] > best[0]:
            best = found["f1_macro"], len(tries) - 1, model, losses
    assert best is not None
    return Trained(best[2], tries, best[1], best[3])


def train_once(
    config: TokensConfig, objectives: ObjectiveConfig, weights: Mapping[str, float], notes: Notes, data: Data,
    seed: int, lr: float,
) -> tuple[DermFM, dict[str, float]]:  # fmt: skip
    """One training from its first step to its last; the model, and the losses by objective of the last step."""
    model = build_model(config, data, seed)
    rates = dataclasses.replace(config.optimizer, lr=lr, image_lr=lr)
    optimizer = torch.optim.AdamW(parameter_groups(model, rates), betas=(rates.betas[0], rates.betas[1]), eps=rates.eps)
    train = data.records["train"]
    labels = [None if label < 0 else int(label) for label in train.labels]
    order = SampleOrder(
        [len(train)], seed, weights=balanced_weights(labels, config.balance) if config.balance else None
    )
    steps = max(round(config.epochs * len(train) / config.contrastive_batch), 1)
    losses: dict[str, float] = {}
    model.train()
    for step in range(steps):
        batch = make_batch(config, order, step * config.contrastive_batch, weights, notes, data, seed)
        factor = rate_factor(rates, step * config.contrastive_batch, steps * config.contrastive_batch)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        losses = optimizer_step(PlainEngine(model), batch, len(batch), objectives)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval(), losses


def build_model(config: TokensConfig, data: Data, seed: int) -> DermFM:
    """The project's model with stored tokens for towers; the same weights for the same seed, whatever the cell."""
    torch.manual_seed(seed)
    image = StoredImage(data.images.tokens, config.adapter)
    return DermFM(config.model, image, StoredText(data.texts))


def make_batch(
    config: TokensConfig, order: SampleOrder, start: int, weights: Mapping[str, float], notes: Notes, data: Data,
    seed: int,
) -> Batch:  # fmt: skip
    """The batch of the stream indices from `start` on. As in training on pixels, note and view are drawn by index."""
    train = data.records["train"]
    indices = np.arange(start, start + config.contrastive_batch)
    rows = order.locate(indices)[2]
    texts, views = [], np.empty(len(rows), np.int64)
    for k, (index, row) in enumerate(zip(indices.tolist(), rows.tolist(), strict=True)):
        rng = sample_rng(seed, index)
        texts.append(choose_note(notes.get(train.record_ids[row], ()), weights, rng))
        views[k] = int(rng.random() * data.images.views["train"])
    tokens, lengths = _padded([data.texts.ids(text) for text in texts])
    return Batch(
        pixels=torch.from_numpy(data.images.rows("train")[rows] + views),
        tokens=tokens,
        lengths=lengths,
        labels=torch.from_numpy(train.labels[rows]),
        weight=torch.ones(len(rows)),
        group=torch.tensor([hash63(train.groups[row]) for row in rows]),
        text=torch.tensor([hash63(text) for text in texts]),
        indices=torch.from_numpy(indices),
        record_ids=[train.record_ids[row] for row in rows],
        subclasses=torch.from_numpy(train.truth["subclasses"][rows]),
        malignancies=torch.from_numpy(train.truth["malignancy"][rows]),
        concepts=torch.from_numpy(np.stack([_concepts(text) for text in texts])),
    )


@functools.cache
def _concepts(text: str) -> np.ndarray:
    return find_concepts(text)


def _padded(ids: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    lengths = [len(one) for one in ids]
    width = -(-max(lengths) // PAD_MULTIPLE) * PAD_MULTIPLE
    tokens = np.zeros((len(ids), width), np.int64)
    for row, one in enumerate(ids):
        tokens[row, : len(one)] = one
    return torch.from_numpy(tokens), torch.tensor(lengths)


@torch.no_grad()
def image_outputs(model: DermFM, data: Data, split: str) -> tuple[np.ndarray, np.ndarray]:
    """(probabilities [n, C], embeddings [n, d]) of a split's records, means over the stored views."""
    views = range(data.images.views[split])
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    for view in views:
        rows, parts = data.images.rows(split, view), []
        for start in range(0, len(rows), SCORED_AT_ONCE):
            out = model("image", pixels=torch.from_numpy(rows[start : start + SCORED_AT_ONCE]))
            parts.append((softmax(out["logits"].numpy()), out["embedding"].numpy()))
        kept.append((np.concatenate([p for p, _ in parts]), np.concatenate([e for _, e in parts])))
    embeddings = np.mean([e for _, e in kept], axis=0)
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True).clip(1e-12)
    return np.mean([p for p, _ in kept], axis=0), embeddings / lengths


def classified(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Macro F1 and balanced accuracy of probabilities [n, C] over the records with a known label."""
    known = labels >= 0
    matrix = confusion_matrix(labels[known], probabilities[known].argmax(1), probabilities.shape[1])
    found = confusion_values(matrix)
    return {name: float(found[name]) for name in ("f1_macro", "balanced_accuracy")}


@torch.no_grad()
def make_text_vectors(model: DermFM, data: Data, texts: Sequence[str]) -> np.ndarray:
    """Unit embeddings [n, d] of texts; their states must be there."""
    parts = []
    for start in range(0, len(texts), SCORED_AT_ONCE):
        tokens, lengths = _padded([data.texts.ids(text) for text in texts[start : start + SCORED_AT_ONCE]])
        parts.append(model.encode_text(tokens, lengths)[0].numpy())
    return np.concatenate(parts)
