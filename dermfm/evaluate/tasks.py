"""All rows of one evaluation: every task in every scope, shared out over the ranks."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from dermfm.config import InputError
from dermfm.evaluate.embedding import Embedded
from dermfm.evaluate.information import information_rows
from dermfm.evaluate.ranks import Ranks, spread
from dermfm.evaluate.records import CLASS_SETS, RecordSet
from dermfm.evaluate.reports import Reports, report_rows
from dermfm.evaluate.rerank import Matcher
from dermfm.evaluate.results import Prediction, Row
from dermfm.evaluate.scoring import (
    RetrievalRules,
    Retrieved,
    Scored,
    Side,
    class_tables,
    classification_rows,
    retrieval_rows,
    retrieve,
)
from dermfm.evaluate.settings import EvaluateConfig
from dermfm.evaluate.shift import ProtocolConfig, Scope, class_matched_scopes
from dermfm.evaluate.statistics import Draws, draw_groups
from dermfm.evaluate.zeroshot import PROMPT_SETS, zero_shot_scores
from dermfm.records.vocabulary import MALIGNANCIES, MALIGNANCY_OF

BY_SUBGROUP = ("classify-image", "classify-fused", "zero-shot", "probe")  # the tasks with fairness rows
LABELLED = ("classify-image", "classify-text", "classify-fused", "zero-shot", "probe", "few-shot")


def score(
    config: EvaluateConfig,
    protocol: ProtocolConfig,
    fields: dict[str, Any],
    embedded: Embedded,
    predictions: list[Prediction],
    scopes: list[Scope],
    ranks: Ranks,
    matcher: Matcher | None = None,
    reports: Reports | None = None,
    training: RecordSet | None = None,
) -> tuple[list[Row], list[dict[str, Any]]]:
    """(rows of metrics.json, tables of per_class.json). `fields` go into the rows of the trained model; `training`
    holds the notes that text information is fitted on."""
    check_labels(config, embedded)
    draws = scored_draws(embedded, config)
    main = [scope for scope in scopes if scope.kind != "subgroup"]
    heads = [*_from_heads(config, predictions), *_from_prompts(config, protocol, embedded)]
    items = [(one, scope) for one, scope in itertools.product(heads, scopes) if _applies(one, scope)]
    truth = embedded.records.truth

    def classified(item: tuple[Scored, Scope]) -> list[Row]:
        one, scope = item
        own = fields if one.task != "probe" else {"seed": fields["seed"]}
        return list(classification_rows(one, truth[one.class_set], [scope], draws, **own))

    def tables(item: tuple[Scored, Scope]) -> list[dict[str, Any]]:
        one, scope = item
        return list(class_tables(one, truth[one.class_set], [scope], draws))

    matched = [item for item in itertools.product(heads, class_matched_scopes(main)) if item[0].class_set == "classes"]
    rows = spread(ranks, [*items, *matched], classified)
    for found in _retrievals(config, protocol, embedded, ranks, matcher):
        rows += spread(ranks, main, functools.partial(_retrieval_rows, found, draws, fields))
    if reports is not None:
        texts = embedded.texts
        rows += spread(ranks, main, lambda scope: list(report_rows(reports, texts, [scope], draws, **fields)))
    if training is not None:
        work = functools.partial(information_rows, training, embedded, main, config.seed, fields)
        rows += spread(ranks, embedded.texts, work)
    return rows, spread(ranks, [item for item in items if item[1].kind != "subgroup"], tables)


def check_labels(config: EvaluateConfig, embedded: Embedded) -> None:
    """InputError where a task needs labels and no scored record has one."""
    asked = [task for task in config.tasks if task in LABELLED]
    if asked and not (embedded.records.labels[embedded.scored] >= 0).any():
        names = ", ".join(sorted(set(embedded.records.datasets[embedded.scored])))
        raise InputError(
            f"tasks: {asked[0]} needs labels and no scored record of {names} has one; give tasks=[retrieval-i2t, …]"
        )


def scored_draws(embedded: Embedded, config: EvaluateConfig) -> Draws:
    """Resamples of the scored records' groups; records that are in pools only belong to none of them."""
    own = np.flatnonzero(embedded.scored)
    draws = draw_groups(embedded.records.groups[own], embedded.records.datasets[own], config.resamples, config.seed)
    group_of = np.zeros(len(embedded.records), dtype=draws.group_of.dtype)
    group_of[own] = draws.group_of
    return Draws(draws.weights, group_of)


def _applies(one: Scored, scope: Scope) -> bool:
    return scope.kind != "subgroup" or (one.task in BY_SUBGROUP and one.class_set == "classes")


def _retrieval_rows(found: Retrieved, draws: Draws, fields: dict[str, Any], scope: Scope) -> list[Row]:
    return list(retrieval_rows(found, [scope], draws, **fields))


def _from_heads(config: EvaluateConfig, predictions: list[Prediction]) -> Iterator[Scored]:
    """Predicted classes; where a method has no malignancy of its own, its class probabilities summed over each."""
    sums = np.array([[MALIGNANCY_OF[c] == m for m in MALIGNANCIES] for c in range(len(MALIGNANCY_OF))], dtype=float)
    found: dict[tuple[Any, ...], list[Prediction]] = {}
    for p in predictions:
        if p.task in config.tasks:
            found.setdefault((p.task, p.class_set, p.track, p.strategy), []).append(p)
    for (task, class_set, track, strategy), repeats in found.items():
        fields = {"track": track, "eval_strategy": strategy}
        scores = np.stack([p.probabilities for p in repeats]) if len(repeats) > 1 else repeats[0].probabilities
        yield Scored(task, class_set, repeats[0].rows, scores, fields=fields)
        if class_set == "classes" and (task, "malignancy", track, strategy) not in found:
            yield Scored(task, "malignancy", repeats[0].rows, scores @ sums, fields=fields)


def _from_prompts(config: EvaluateConfig, protocol: ProtocolConfig, embedded: Embedded) -> Iterator[Scored]:
    if "zero-shot" not in config.tasks:
        return
    own = np.flatnonzero(embedded.scored)
    for class_set, prompt_set in itertools.product(CLASS_SETS, PROMPT_SETS):
        if prompt_set == "bare" or not protocol.has("bare_words"):
            vectors = embedded.image[own]
            scores = zero_shot_scores(vectors, embedded.prompts, embedded.prompt, class_set, prompt_set)
            yield Scored("zero-shot", class_set, own, scores, False, {"eval_strategy": prompt_set})


def _retrievals(
    config: EvaluateConfig,
    protocol: ProtocolConfig,
    embedded: Embedded,
    ranks: Ranks,
    matcher: Matcher | None,
) -> Iterator[Retrieved]:
    """Every retrieval task; text tasks once a strategy, and again with their first items put in order by `matcher`."""
    records, scored = embedded.records, embedded.scored
    rules = RetrievalRules(protocol.has("self_in_pool"), protocol.has("merge_identical"))
    numbers = np.unique(records.groups.astype(str), return_inverse=True)[1].ravel()
    image = Side(embedded.image, np.arange(len(records)))

    def ranked(task: str, queries: Side, pool: Side, same: bool, fields: dict[str, Any], change: Any = None) -> Any:
        asked = queries.take(scored[queries.rows])
        return retrieve(task, asked, pool, records.labels, records.groups, ranks, same, fields, rules, change)

    for one, vectors in zip(embedded.texts, embedded.text, strict=True):
        text, fields = Side(vectors, one.rows), {"track": one.track, "eval_strategy": one.strategy}
        notes = dict(zip(one.rows.tolist(), one.texts, strict=True))
        for task, queries, pool in _text_tasks(config.tasks, image, text):
            yield ranked(task, queries, pool, queries is pool, fields)
            if matcher is not None and queries is not pool:
                name = f"{one.strategy}+match@{matcher.top}"
                change: Callable[..., Any] = matcher.rerank(notes, queries is image, numbers)
                yield ranked(task, queries, pool, False, fields | {"eval_strategy": name}, change)
    if "retrieval-i2i" in config.tasks:
        yield ranked("retrieval-i2i", image, image, True, {})


def _text_tasks(tasks: list[str], image: Side, text: Side) -> Iterable[tuple[str, Side, Side]]:
    every = (("retrieval-i2t", image, text), ("retrieval-t2i", text, image), ("retrieval-t2t", text, text))
    return [entry for entry in every if entry[0] in tasks and len(text.rows)]
