"""A validation pass while training: zero-shot, retrieval and classification on a small fixed set, and the best one.

The set is the same in every run over the same shards; batches are formed before they are dealt out to ranks and the
scores are computed by the first rank, so the numbers do not depend on how many ranks there are.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from dermfm.config import check_choice, check_range, key
from dermfm.evaluate import ranking
from dermfm.evaluate.classify import point_values
from dermfm.evaluate.records import CLASS_SETS
from dermfm.evaluate.zeroshot import Prompts, make_prompts, zero_shot_scores
from dermfm.objectives import NO_NOTE, ObjectiveConfig
from dermfm.samples import Batch, Collate, SampleFn, tokenize
from shards.loader import sample_rng
from shards.manifest import Manifest, ShardError
from shards.order import permutation
from shards.reader import ShardReader

METRICS = ("zero_shot_f1_macro", "image_f1_macro", "i2t_r@1", "t2i_r@1", "i2t_map")
RECALL_AT = (1, 5, 10)
_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ValidationConfig:
    """The validation pass of a training run."""

    every: int = key(0, "samples between passes; 0: one an epoch; -1: none")
    split: str = key("valid", "split of the shards that the set is taken from; without it there is no pass")
    samples: int = key(256, "samples of the fixed set")
    metric: str = key("auto", "what the best checkpoint is best by; auto: zero-shot macro F1, else the first there is")

    def __post_init__(self) -> None:
        check_range("validation.every", self.every, -1)
        check_range("validation.samples", self.samples, 1)
        check_choice("validation.metric", self.metric, ("auto", *METRICS))


class NoValidation:
    """The null pass: never due, nothing to tell."""

    metric = ""

    def run(self, engine: Any, step: int, *, last: bool, stopping: bool) -> dict[str, float]:
        """Scores as `valid/…` where a pass is due after step `step`, else nothing. None in a stop: time is short."""
        return {}


class Validation(NoValidation):
    """See the module. `every_steps`: steps between passes."""

    def __init__(
        self,
        config: ValidationConfig,
        manifest: Manifest,
        objectives: ObjectiveConfig,
        sample_fn: SampleFn,
        collate: Collate,
        batch_size: int,
        every_steps: int,
        device: str,
    ) -> None:
        self._config, self._objectives, self._collate, self._device = config, objectives, collate, device
        self._every = every_steps
        self._batches = _fixed_batches(manifest, config, sample_fn, collate, batch_size)
        self._prompts = _class_prompts()
        self.metric = "" if config.metric == "auto" else f"valid/{config.metric}"

    @torch.no_grad()
    def run(self, engine: Any, step: int, *, last: bool, stopping: bool) -> dict[str, float]:
        """See NoValidation. Collective; the same numbers on every rank."""
        if stopping or not (last or step % self._every == 0):
            return {}
        engine.module.eval()
        told = [self._forward(engine, batch) for batch in self._batches]  # ZeRO-3: as many passes on every rank
        prompts = self._embed_prompts(engine) if self._objectives.uses_text else None
        engine.module.train()
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, told)
        scores = [self._scores(_in_order(parts), prompts, engine.module) if dist.get_rank() == 0 else {}]
        dist.broadcast_object_list(scores, src=0)
        found = {f"valid/{name}": value for name, value in scores[0].items()}
        if self.metric not in found:
            self.metric = next((f"valid/{name}" for name in METRICS if f"valid/{name}" in found), "")
        return found

    def _forward(self, engine: Any, batch: Batch) -> dict[str, np.ndarray]:
        own = batch.to(self._device)
        image = engine("image", pixels=own.pixels)
        out = {"image": F.normalize(image["embedding"], dim=-1), "logits": image["logits"]}
        if self._objectives.uses_text:
            out["text"] = F.normalize(engine("text", tokens=own.tokens, lengths=own.lengths)["embedding"], dim=-1)
        arrays = {name: value.float().cpu().numpy() for name, value in out.items()}
        kept = {"row": batch.indices, "label": batch.labels, "group": batch.group, "weight": batch.weight}
        return arrays | {k: v.numpy() for k, v in kept.items()} | {"note": (batch.text != NO_NOTE).numpy()}

    def _embed_prompts(self, engine: Any) -> np.ndarray:
        """[P, d]: every rank embeds all of them, a few short texts."""
        tokens, lengths = tokenize(self._collate.tokenizer, self._prompts.texts, self._collate.max_tokens)
        parts = []
        for start in range(0, len(tokens), 32):
            rows = slice(start, start + 32)
            inputs = {"tokens": tokens[rows].to(self._device), "lengths": lengths[rows].to(self._device)}
            parts.append(F.normalize(engine("text", **inputs)["embedding"].float(), dim=-1).cpu().numpy())
        return np.concatenate(parts)

    def _scores(self, found: dict[str, np.ndarray], prompts: np.ndarray | None, module: Any) -> dict[str, float]:
        good = found["weight"] > 0
        found = {name: values[good] for name, values in found.items()}
        scores: dict[str, float] = {}
        known = found["label"] >= 0
        truth = found["label"][known]
        if self._objectives.classify_image and known.any():
            scores |= _classified("image", truth, found["logits"][known])
        if prompts is None:
            return scores
        if known.any() and module.config.num_classes == len(CLASS_SETS["classes"]):
            cosines = zero_shot_scores(found["image"][known], self._prompts, prompts, "classes", "ensemble")
            scores |= _classified("zero_shot", truth, cosines)
        with_note = {name: values[found["note"]] for name, values in found.items()}
        if len(with_note["row"]) > 1:
            scores |= _retrieved("i2t", with_note, "image", "text") | _retrieved("t2i", with_note, "text", "image")
        return {name: value for name, value in scores.items() if math.isfinite(value)}


def _class_prompts() -> Prompts:
    """The prompts of the diagnosis classes."""
    every = make_prompts()
    own = [i for i, name in enumerate(every.class_sets) if name == "classes"]
    texts, sets = [every.texts[i] for i in own], [every.class_sets[i] for i in own]
    return Prompts(texts, sets, every.classes[own], every.bare[own])


def _classified(name: str, truth: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    points = point_values(truth, scores.argmax(1), scores.shape[1])
    return {f"{name}_{m}": float(points[m]) for m in ("f1_macro", "balanced_accuracy")}


def _retrieved(name: str, found: dict[str, np.ndarray], queries: str, items: str) -> dict[str, float]:
    """Recall of the own partner, and mean average precision of the class; the rest of the group is out of the pool."""
    rows, labels = found["row"], found["label"]
    group = np.unique(found["group"], return_inverse=True)[1].ravel()
    pool = ranking.Pool(found[items], labels, group)
    ranks = ranking.rank_targets(found[queries], rows, group, pool, rows)
    scores = {f"{name}_r@{k}": float(np.nanmean(ranking.recall_at(ranks, k))) for k in RECALL_AT}
    known = labels >= 0
    if known.sum() > 1:
        pool = ranking.Pool(found[items][known], labels[known], group[known])
        ap = ranking.rank_classes(found[queries][known], labels[known], group[known], pool, (1,)).ap
        if np.isfinite(ap).any():
            scores[f"{name}_map"] = float(np.nanmean(ap))
    return scores


def _fixed_batches(
    manifest: Manifest, config: ValidationConfig, sample_fn: SampleFn, collate: Collate, batch_size: int
) -> list[Batch]:
    """This rank's batches of the fixed set: batch k on rank k mod world, as many on every rank (some twice)."""
    shards = manifest.split(config.split)
    reader = ShardReader(manifest.folder, shards, manifest.remote)
    borders = np.concatenate([[0], np.cumsum(reader.shard_sizes)])
    rows = np.sort(permutation(int(borders[-1]), 0)[: config.samples])
    pieces = [rows[k : k + batch_size] for k in range(0, len(rows), batch_size)]
    rank, world = dist.get_rank(), dist.get_world_size()
    own = [pieces[k % len(pieces)] for k in range(rank, math.ceil(len(pieces) / world) * world, world)]
    return [collate([_item(reader, borders, row, sample_fn) for row in piece], piece) for piece in own]


def _item(reader: ShardReader, borders: np.ndarray, row: int, sample_fn: SampleFn) -> Any:
    shard = int(np.searchsorted(borders, row, side="right")) - 1
    try:
        return sample_fn(reader.read(shard, int(row - borders[shard])), sample_rng(0, int(row)))
    except (OSError, ValueError, KeyError, ShardError):
        return None  # keeps its place with weight 0, as in training


def _in_order(parts: Sequence[Sequence[dict[str, np.ndarray]]]) -> dict[str, np.ndarray]:
    """All ranks' batches as one set of arrays in row order, each row once."""
    batches = [batch for part in parts for batch in part]
    whole = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    order = np.unique(whole["row"], return_index=True)[1]
    return {name: values[order] for name, values in whole.items()}
