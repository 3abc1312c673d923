"""The evaluation job: embed the scored records with a checkpoint, score every task in every scope, write the files."""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dermfm.checkpoint import load_model
from dermfm.config import check_choice, check_range, key
from dermfm.evaluate import results
from dermfm.evaluate.embed import Compute
from dermfm.evaluate.embedding import Embedded, embed_all
from dermfm.evaluate.frozen import probe_predictions
from dermfm.evaluate.ranks import Ranks, on_first, spread
from dermfm.evaluate.records import CLASS_SETS, concatenate, read_split
from dermfm.evaluate.results import Prediction, Row
from dermfm.evaluate.scoring import (
    PRECISION_AT,
    RECALL_AT,
    Retrieved,
    Scored,
    Side,
    classification_rows,
    retrieval_rows,
    retrieve,
)
from dermfm.evaluate.shift import ProtocolConfig, Scope, absent_classes, empty_partitions, make_scopes, resolve_roles
from dermfm.evaluate.source import Source, find_source, shards_folder, train_strategy
from dermfm.evaluate.statistics import Draws, draw_groups
from dermfm.evaluate.zeroshot import PROMPT_SETS, TEMPLATES, zero_shot_scores
from dermfm.records.vocabulary import MALIGNANCIES, MALIGNANCY_OF
from dermfm.storage import CacheConfig, remote
from shards.manifest import Manifest

TASKS = ("classify-image", "classify-text", "zero-shot", "retrieval-i2t", "retrieval-t2i", "retrieval-i2i", "probe")


@dataclass(kw_only=True)
class EvaluateConfig:
    """Scoring of one checkpoint on the shards that it was trained from, or on others."""

    run: str | None = key(None, "run directory; its newest checkpoint is scored")
    checkpoint: str | None = key(None, "a checkpoint folder ckpt/step-NNNNNNNN instead of a run's newest one")
    shards: str | None = key(None, "folder of shards, or their address; null: that of the run's config.yaml")
    cache: CacheConfig = key(CacheConfig, "how shards at an address are read")
    out: str | None = key(None, "output folder; null: <run>/eval/<step>")
    splits: list[str] = key(["test"], "splits whose records are scored")
    protocol: ProtocolConfig = key(ProtocolConfig, "roles of the data sets and rules of scoring")
    tasks: list[str] = key(list(TASKS), f"what is scored, among {', '.join(TASKS)}")
    eval_strategies: list[str] = key([], "note strategies used as text; empty: all that the scored records hold")
    probe: bool = key(True, "score a linear probe on the untrained image tower's features beside the model")
    batch_size: int = key(32, "images or texts in one forward pass")
    num_workers: int = key(0, "loader processes a rank (0: one background thread)")
    precision: str = key("fp32", "forward passes in fp32 or bf16")
    ranks: int = key(0, "processes to start here where no launcher did; 0: one a CUDA device, or one")
    device: str = key("auto", "auto, cpu or cuda")
    resamples: int = key(1000, "bootstrap resamples of groups")
    seed: int = key(0, "seed of the bootstrap")

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, ("fp32", "bf16"))
        check_choice("device", self.device, ("auto", "cpu", "cuda"))
        check_range("batch_size", self.batch_size, 1)
        check_range("num_workers", self.num_workers, 0)
        check_range("ranks", self.ranks, 0, 4096)
        check_range("resamples", self.resamples, 20)
        for task in self.tasks:
            check_choice("tasks", task, TASKS)
        if not self.splits or not self.tasks:
            raise ValueError("splits and tasks: at least one of each is needed")
        if self.run and self.checkpoint:
            raise ValueError("run and checkpoint: give one of the two; a checkpoint folder lies in its run already")


@dataclass(frozen=True)
class Plan:
    """What one call will do, resolved from the configuration."""

    source: Source
    manifest: Manifest
    folder: Path
    cache: Path

    def lines(self, config: EvaluateConfig) -> list[str]:
        """For people: checkpoint, records a split, output."""
        counts = {s: sum(i.num_samples for i in self.manifest.split(s)) for s in config.splits}
        return [
            f"checkpoint {self.source.checkpoint} (step {self.source.step})",
            f"shards {self.manifest.folder} ({self.manifest.fingerprint}): "
            + ", ".join(f"{n} {s} records" for s, n in counts.items()),
            f"tasks {', '.join(config.tasks)}; {config.resamples} resamples",
            f"output {self.folder}",
        ]


def make_plan(config: EvaluateConfig) -> Plan:
    """Resolve what is scored. InputError or ShardError for a run without checkpoint, missing shards, an empty split."""
    source = find_source(config.run, config.checkpoint)
    manifest = Manifest.load(shards_folder(config.shards, source), remote(config.cache))
    for split in config.splits:
        manifest.split(split)
    folder = Path(config.out) if config.out else source.run / "eval" / f"{source.step:08d}"
    return Plan(source, manifest, folder, folder / "cache" if config.out else source.run / "eval" / "cache")


def evaluate(config: EvaluateConfig, ranks: Ranks | None = None, device: str = "cpu") -> Path:
    """Run the whole job; the path of metrics.json. Stored pieces of an interrupted call are taken up.

    Raises InputError or ShardError for what cannot be scored.
    """
    ranks = ranks or Ranks()
    plan = make_plan(config)
    read = concatenate([read_split(plan.manifest, split, quiet=not ranks.first) for split in config.splits])
    trained = _trained_datasets(plan.manifest)
    protocol = resolve_roles(config.protocol, sorted(set(read.datasets)), trained)
    model = load_model(str(plan.source.checkpoint), device)
    compute = Compute(device, config.precision, config.batch_size, config.num_workers)
    identity, strategies = [plan.source.identity], config.eval_strategies
    embedded = embed_all(model, plan.manifest, read, config.splits, strategies, plan.cache, identity, compute, ranks)
    predictions, probe_about = list(embedded.predictions), None
    if config.probe and "probe" in config.tasks:
        image_config = plan.source.config["model"]["image"]
        probe, probe_about = probe_predictions(
            image_config, model, plan.manifest, config.splits, embedded, plan.cache, compute, ranks
        )
        predictions.append(probe)
    scopes = make_scopes(embedded.records, protocol)
    rows = score(config, plan.source, embedded, predictions, scopes, ranks)
    about = describe(config, protocol, embedded, scopes, trained, probe_about)
    on_first(ranks, lambda: _write(plan, embedded, predictions, about, rows))
    return plan.folder / results.METRICS


def score(
    config: EvaluateConfig,
    source: Source,
    embedded: Embedded,
    predictions: list[Prediction],
    scopes: list[Scope],
    ranks: Ranks,
) -> list[Row]:
    """All rows of metrics.json."""
    records = embedded.records
    draws = draw_groups(records.groups, records.datasets, config.resamples, config.seed)
    fields = {"train_strategy": train_strategy(source.config), "seed": source.config.get("seed")}

    def classification(item: tuple[Scored, Scope]) -> list[Row]:
        scored, scope = item
        own = fields if scored.task != "probe" else {"seed": fields["seed"]}
        return list(classification_rows(scored, records.truth[scored.class_set], [scope], draws, **own))

    heads = [*_from_heads(config, predictions), *_from_prompts(config, embedded)]
    rows = spread(ranks, list(itertools.product(heads, scopes)), classification)
    for found in _retrievals(config, embedded, ranks):
        rows += spread(ranks, scopes, functools.partial(_retrieval_rows, found, draws, fields))
    return rows


def _retrieval_rows(found: Retrieved, draws: Draws, fields: dict[str, Any], scope: Scope) -> list[Row]:
    return list(retrieval_rows(found, [scope], draws, **fields))


def _from_heads(config: EvaluateConfig, predictions: list[Prediction]) -> list[Scored]:
    """Predicted classes, and the same probabilities summed over each malignancy."""
    sums = np.array([[MALIGNANCY_OF[c] == m for m in MALIGNANCIES] for c in range(len(MALIGNANCY_OF))], dtype=float)
    out = []
    for p in predictions:
        if p.task in config.tasks:
            fields = {"track": p.track, "eval_strategy": p.strategy}
            out.append(Scored(p.task, "classes", p.rows, p.probabilities, fields=fields))
            out.append(Scored(p.task, "malignancy", p.rows, p.probabilities @ sums, fields=fields))
    return out


def _from_prompts(config: EvaluateConfig, embedded: Embedded) -> list[Scored]:
    if "zero-shot" not in config.tasks:
        return []
    every = np.arange(len(embedded.records))
    out = []
    for class_set in CLASS_SETS:
        for prompt_set in PROMPT_SETS:
            scores = zero_shot_scores(embedded.image, embedded.prompts, embedded.prompt, class_set, prompt_set)
            out.append(Scored("zero-shot", class_set, every, scores, False, {"eval_strategy": prompt_set}))
    return out


def _retrievals(config: EvaluateConfig, embedded: Embedded, ranks: Ranks) -> Any:
    """Every retrieval task; text tasks once a strategy."""
    records = embedded.records
    image = Side(embedded.image, np.arange(len(records)))
    for one, vectors in zip(embedded.texts, embedded.text, strict=True):
        text, fields = Side(vectors, one.rows), {"track": one.track, "eval_strategy": one.strategy}
        for task, queries, pool in (("retrieval-i2t", image, text), ("retrieval-t2i", text, image)):
            if task in config.tasks:
                yield retrieve(task, queries, pool, records.labels, records.groups, ranks, fields=fields)
    if "retrieval-i2i" in config.tasks:
        yield retrieve("retrieval-i2i", image, image, records.labels, records.groups, ranks, same_kind=True)


def describe(
    config: EvaluateConfig,
    protocol: ProtocolConfig,
    embedded: Embedded,
    scopes: list[Scope],
    trained: list[str],
    probe: dict[str, Any] | None,
) -> dict[str, Any]:
    """The protocol part of metrics.json: everything that a reader must know to read the rows."""
    records = embedded.records
    return asdict(protocol) | {
        "splits": config.splits,
        "num_records": len(records),
        "num_groups": len(set(records.groups)),
        "datasets": {d: int((records.datasets == d).sum()) for d in sorted(set(records.datasets))},
        "modality": {d: sorted(set(records.modality[records.datasets == d])) for d in sorted(set(records.datasets))},
        "trained_on": trained,
        "classes": CLASS_SETS["classes"],
        "absent_classes": absent_classes(records, scopes),
        "empty_partitions": empty_partitions(scopes),
        "unreadable_images": embedded.unreadable,
        "notes": [{"strategy": t.strategy, "track": t.track, "num_notes": len(t.rows)} for t in embedded.texts],
        "zero_shot_templates": {name: list(templates) for name, templates in TEMPLATES.items()},
        "retrieval": {
            "pool": "one note a record; the scored splits of all data sets together",
            "class_level": "same class is relevant; the query's own group is out of the pool",
            "instance_level": "the record's own note or image is the target, others of its group are out; image to "
            "image: the other images of the group are the targets",
            "ties": "expectation over random order within ties; median rank uses mid-ranks",
            "precision_at": list(PRECISION_AT),
            "recall_at": list(RECALL_AT),
        },
        "chance": "classification: always the scope's most frequent class; retrieval: a random order of the pool",
        "intervals": {"level": 0.95, "method": "percentile bootstrap of groups within data sets"}
        | {"resamples": config.resamples, "seed": config.seed},
        "probe": probe,
        "precision": config.precision,
        "batch_size": config.batch_size,
        "versions": _versions(),
    }


def _write(
    plan: Plan, embedded: Embedded, predictions: list[Prediction], about: dict[str, Any], rows: list[Row]
) -> None:
    plan.folder.mkdir(parents=True, exist_ok=True)
    text = np.concatenate([*embedded.text, embedded.image[:0]])
    results.write_embeddings(plan.folder, embedded.image, text, embedded.prompt)
    results.write_ids(plan.folder, embedded.records, embedded.texts, embedded.prompts)
    results.write_predictions(plan.folder, embedded.records, predictions)
    run, step = plan.source.run.name, plan.source.step
    results.write_metrics(plan.folder, run, step, plan.manifest.fingerprint, about, rows)


def _trained_datasets(manifest: Manifest) -> list[str]:
    """Data sets with training samples in the shards."""
    if not any(s.split == "train" and s.num_samples for s in manifest.shards):
        return []
    return sorted(set(manifest.read_rows("train")["dataset"]))


def _versions() -> dict[str, str]:
    import sklearn
    import torch

    python = ".".join(map(str, sys.version_info[:3]))
    return {
        "dermfm": importlib.metadata.version("dermfm"),
        "python": python,
        "torch": torch.__version__,
        "numpy": np.__version__,
    } | {"scikit-learn": sklearn.__version__}
