"""The evaluation job: embed the scored records with a checkpoint, score every task in every scope, write the files."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dermfm.checkpoint import load_model
from dermfm.config import InputError
from dermfm.evaluate import results
from dermfm.evaluate.about import describe
from dermfm.evaluate.embed import Compute, Encoders, encoders_of
from dermfm.evaluate.embedding import Embedded, Site, embed_all
from dermfm.evaluate.fairness import subgroup_scopes
from dermfm.evaluate.frozen import few_shot_predictions, own_features, probe_predictions, untrained_features
from dermfm.evaluate.fused import fused_predictions
from dermfm.evaluate.outside import load_outside, split_name
from dermfm.evaluate.ranks import Ranks, on_first, together
from dermfm.evaluate.records import CLASS_SETS, RecordSet, concatenate, read_split
from dermfm.evaluate.reports import Reports, write_reports
from dermfm.evaluate.rerank import Matcher
from dermfm.evaluate.results import Prediction, Row
from dermfm.evaluate.settings import TASKS, EvaluateConfig
from dermfm.evaluate.shift import make_scopes, resolve_roles
from dermfm.evaluate.source import (
    Source,
    find_source,
    outside_source,
    shards_folder,
    train_strategy,
    untrained_heads,
)
from dermfm.evaluate.tasks import score
from dermfm.evaluate.views import over_views
from dermfm.storage import remote
from shards.manifest import Manifest

__all__ = ["TASKS", "EvaluateConfig", "Plan", "evaluate", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """What one call will do, resolved from the configuration. `splits`: those embedded, the scored ones first."""

    source: Source
    manifest: Manifest
    splits: list[str]
    folder: Path
    cache: Path

    def lines(self, config: EvaluateConfig) -> list[str]:
        """For people: checkpoint, records a split, output."""
        counts = {s: sum(i.num_samples for i in self.manifest.split(s)) for s in config.splits}
        what = f"model {config.model}" if config.model else f"checkpoint {self.source.checkpoint}"
        return [
            f"{what} (step {self.source.step})",
            f"shards {self.manifest.folder} ({self.manifest.fingerprint}): "
            + ", ".join(f"{n} {s} records" for s, n in counts.items()),
            f"tasks {', '.join(config.tasks)}; {config.resamples} resamples; protocol {config.protocol.name}",
            f"output {self.folder}",
        ]


@dataclass(frozen=True)
class Subject:
    """What is scored: its encoders; our own model where it is one (None: from outside); tasks it cannot do, and why."""

    encoders: Encoders
    model: Any
    unable: dict[str, str]

    def seen_in(self, views: int) -> Subject:
        """The same whose image encoder averages over symmetric views; fused passes and reports see the plain one."""
        encoders = dataclasses.replace(self.encoders, image=over_views(self.encoders.image, views))
        return dataclasses.replace(self, encoders=encoders)


def make_plan(config: EvaluateConfig) -> Plan:
    """Resolve what is scored. InputError or ShardError for a run without checkpoint, missing shards, an empty split."""
    if config.model:
        split_name(config.model)
    source = outside_source(config.model, "") if config.model else find_source(config.run, config.checkpoint)
    manifest = Manifest.load(shards_folder(config.shards, source), remote(config.cache))
    for split in config.splits:
        manifest.split(split)
    splits = list(dict.fromkeys(config.splits))
    if config.protocol.has("all_splits_in_pool"):
        splits += sorted({s.split for s in manifest.shards if s.num_samples} - set(splits))
    folder = Path(config.out) if config.out else source.run / "eval" / f"{source.step:08d}"
    cache = folder / "cache" if config.out else source.run / "eval" / "cache"
    return Plan(source, manifest, splits, folder, cache)


def evaluate(config: EvaluateConfig, ranks: Ranks | None = None, device: str = "cpu") -> Path:
    """Run the whole job; the path of metrics.json. Stored pieces of an interrupted call are taken up.

    Raises InputError or ShardError for what cannot be scored.
    """
    ranks = ranks or Ranks()
    plan = make_plan(config)
    read = concatenate([read_split(plan.manifest, split, quiet=not ranks.first) for split in plan.splits])
    trained = _trained_datasets(plan.manifest)
    scored_names = sorted(set(read.datasets[np.isin(read.splits, config.splits)]))
    protocol = resolve_roles(config.protocol, scored_names, trained)
    subject = together(ranks, functools.partial(load_subject, config, plan.source, device)).seen_in(config.views)
    compute = Compute(device, config.precision, config.batch_size, config.num_workers)
    identity = [subject.encoders.identity or plan.source.identity, *([config.views] if config.views > 1 else [])]
    site = Site(plan.manifest, plan.cache, identity, compute, ranks)
    num_scored = int(np.isin(read.splits, config.splits).sum())
    embedded = embed_all(subject.encoders, read, plan.splits, num_scored, config.eval_strategies, site)
    asked = dataclasses.replace(config, tasks=[t for t in config.tasks if t not in subject.unable] or config.tasks)
    predictions, reports, more = _more_passes(asked, plan, subject, embedded, site)
    scopes = make_scopes(embedded.records, protocol, embedded.scored)
    scopes += subgroup_scopes(embedded.records, embedded.scored, config.subgroups, config.subgroup_min)
    matcher = Matcher(subject.model, embedded, plan.splits, site, config.rerank) if _can_match(asked, subject) else None
    fields = {"train_strategy": train_strategy(plan.source.config), "seed": plan.source.config.get("seed")}
    training = _training_notes(asked, plan, embedded)
    rows, tables = score(asked, protocol, fields, embedded, predictions, scopes, ranks, matcher, reports, training)
    more |= {"model": config.model, "left_out": {t: why for t, why in subject.unable.items() if t in config.tasks}}
    about = describe(config, protocol, embedded, scopes, plan.splits, trained, more)
    on_first(ranks, lambda: _write(plan, embedded, predictions, reports, about, rows, tables))
    return plan.folder / results.METRICS


def load_subject(config: EvaluateConfig, source: Source, device: str) -> Subject:
    """The model that is scored. InputError where it cannot be had or has not our classes."""
    if config.model:
        own = "a model from outside has no such head"
        unable = dict.fromkeys(("classify-image", "classify-text", "classify-fused", "report"), own)
        return Subject(load_outside(config.model, device, config.prompts), None, unable)
    model = load_model(str(source.checkpoint), device)
    if model.config.num_classes != len(CLASS_SETS["classes"]):
        raise InputError(
            f"{source.checkpoint}: a model of {model.config.num_classes} classes; the protocol's are "
            f"{len(CLASS_SETS['classes'])}: {', '.join(CLASS_SETS['classes'])}"
        )
    unable = untrained_heads(source.config)
    if model.config.fusion.kind == "none":
        unable["classify-fused"] = "the model has no fusion"
    if not model.config.decoder.depth:
        unable["report"] = "the model has no decoder"
    return Subject(encoders_of(model), model, unable)


def _more_passes(
    config: EvaluateConfig, plan: Plan, subject: Subject, embedded: Embedded, site: Site
) -> tuple[list[Prediction], Reports | None, dict[str, Any]]:
    """What needs further passes over the images: (all predictions, reports, what the protocol says about them)."""
    predictions = [p for p in embedded.predictions if p.task in config.tasks]
    if "classify-fused" in config.tasks and any(len(one.rows) for one in embedded.texts):
        predictions += fused_predictions(subject.model, embedded, config.splits, site)
    reports = write_reports(subject.model, embedded, config.splits, site) if "report" in config.tasks else None
    scored, probe = np.flatnonzero(embedded.scored), None
    if config.probe and "probe" in config.tasks:
        if subject.model is None or config.probe_on == "model":
            features = own_features(subject.encoders, embedded, site)
        else:
            image = plan.source.config["model"]["image"]
            features = untrained_features(image, subject.model, embedded, config.splits, site)
        found, probe = probe_predictions(features, scored, site)
        predictions.append(found)
    if "few-shot" in config.tasks:
        features = own_features(subject.encoders, embedded, site)
        predictions += few_shot_predictions(features, scored, config.shots, config.few_shot_draws, site)
    return predictions, reports, {"probe": probe}


def _can_match(config: EvaluateConfig, subject: Subject) -> bool:
    return bool(config.rerank) and subject.model is not None and subject.model.config.fusion.kind != "none"


def _training_notes(config: EvaluateConfig, plan: Plan, embedded: Embedded) -> RecordSet | None:
    """The training records with their notes, where text information is asked for and there are any."""
    wanted = config.text_information and any(len(one.rows) for one in embedded.texts)
    if not wanted or not any(s.split == "train" and s.num_samples for s in plan.manifest.shards):
        return None
    if "train" in plan.splits:
        own = embedded.records.select(np.flatnonzero(embedded.records.splits == "train"))
        return own if "train" not in config.splits else None  # the scored records are the training ones
    return read_split(plan.manifest, "train", quiet=True)


def _write(
    plan: Plan,
    embedded: Embedded,
    predictions: list[Prediction],
    reports: Reports | None,
    about: dict[str, Any],
    rows: list[Row],
    tables: list[dict[str, Any]],
) -> None:
    plan.folder.mkdir(parents=True, exist_ok=True)
    text = np.concatenate([*embedded.text, embedded.image[:0]])
    results.write_embeddings(plan.folder, embedded.image, text, embedded.prompt)
    results.write_ids(plan.folder, embedded.records, embedded.texts, embedded.prompts)
    results.write_predictions(plan.folder, embedded.records, predictions)
    results.write_classes(plan.folder, tables)
    if reports is not None:
        results.write_reports(plan.folder, reports.table(embedded.records.record_ids))
    run, step = plan.source.run.name, plan.source.step
    results.write_metrics(plan.folder, run, step, plan.manifest.fingerprint, about, rows)


def _trained_datasets(manifest: Manifest) -> list[str]:
    """Data sets with training samples in the shards."""
    if not any(s.split == "train" and s.num_samples for s in manifest.shards):
        return []
    return sorted(set(manifest.read_rows("train")["dataset"]))
