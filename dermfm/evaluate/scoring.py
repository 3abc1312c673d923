"""From predictions and rankings to rows of metrics.json: every task in every scope, with intervals and chance."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dermfm.evaluate import ranking
from dermfm.evaluate.classify import Value, class_matched, classification, per_class
from dermfm.evaluate.ranking import Pool, Ranking, TargetRank
from dermfm.evaluate.ranks import Ranks
from dermfm.evaluate.records import CLASS_SETS
from dermfm.evaluate.results import Row, make_row
from dermfm.evaluate.shift import Scope
from dermfm.evaluate.statistics import Draws, class_mean, class_mean_draws, interval, mean_draws, median_draws

PRECISION_AT = (1, 5, 10, 20, 50, 100)
RECALL_AT = (1, 5, 10)


@dataclasses.dataclass(frozen=True)
class Scored:
    """Class scores [n, C] of the records `rows` [n], probabilities if `calibrated`; `fields` go into the rows.

    Scores [R, n, C] are repetitions of one method (few-shot draws), whose mean is reported.
    """

    task: str
    class_set: str
    rows: np.ndarray
    scores: np.ndarray
    calibrated: bool = True
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Side:
    """Queries or pool items of a retrieval: vectors [n, d] float32 of the records `rows` [n]."""

    vectors: np.ndarray
    rows: np.ndarray

    def take(self, which: np.ndarray) -> Side:
        """Some of them, by a mask or by numbers."""
        return Side(self.vectors[which], self.rows[which])


@dataclasses.dataclass(frozen=True)
class Retrieved:
    """Results of all queries: records `rows` [n] with labels [n]; class-level ranking, rank of the own item, and its
    rank among the items of the query's own class (None where the protocol has no instance level)."""

    task: str
    rows: np.ndarray
    labels: np.ndarray
    classes: Ranking
    targets: TargetRank | None
    class_targets: TargetRank | None
    pool: int
    class_pool: int
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class RetrievalRules:
    """Quirks of the reference protocol: the query's own group stays in the pool, identical embeddings stand in it once;
    with the first of them there is no instance level."""

    self_in_pool: bool = False
    merge_identical: bool = False


def classification_rows(
    scored: Scored, truth: np.ndarray, scopes: list[Scope], draws: Draws, **fields: Any
) -> Iterator[Row]:
    """Rows of one classification task; records of unknown truth [N] are left out, scopes without records skipped."""
    labels = truth[scored.rows]
    for scope in scopes:
        keep = scope.mask[scored.rows] & (labels >= 0)
        if keep.any():
            values = _classified(scored, labels, keep, scope, draws)
            own = {"class_set": scored.class_set} | fields | scored.fields
            for metric, value in values.items():
                yield make_row(scored.task, scope.kind, scope.name, metric, value, **own)


def _classified(scored: Scored, labels: np.ndarray, keep: np.ndarray, scope: Scope, draws: Draws) -> dict[str, Value]:
    kept, rows = scored.scores[..., keep, :], scored.rows[keep]
    if scope.like is None:
        return classification(labels[keep], kept, rows, draws, scored.calibrated)
    like = labels[scope.like[scored.rows] & (labels >= 0)]
    prior = np.bincount(like, minlength=kept.shape[-1])
    if kept.ndim > 2 or not prior[labels[keep]].any():
        return {}
    return class_matched(labels[keep], kept, rows, draws, prior)


def class_tables(scored: Scored, truth: np.ndarray, scopes: list[Scope], draws: Draws) -> Iterator[dict[str, Any]]:
    """The confusion matrix and the classes' own measures of one classification task in every scope with records."""
    labels = truth[scored.rows]
    for scope in scopes:
        keep = scope.mask[scored.rows] & (labels >= 0)
        if keep.any() and scored.scores.ndim == 2:
            own = {"track": scored.fields.get("track"), "eval_strategy": scored.fields.get("eval_strategy")}
            where = {"task": scored.task, "scope_kind": scope.kind, "scope": scope.name, "class_set": scored.class_set}
            names = CLASS_SETS[scored.class_set]
            yield where | own | per_class(labels[keep], scored.scores[keep], scored.rows[keep], draws, names)


def retrieve(
    task: str,
    queries: Side,
    pool: Side,
    labels: np.ndarray,
    groups: np.ndarray,
    ranks: Ranks,
    same_kind: bool = False,
    fields: dict[str, Any] | None = None,
    rules: RetrievalRules | None = None,
    rerank: Callable[[Side, Side], ranking.Rerank] | None = None,
) -> Retrieved:
    """Rank `pool` for every query, sharded over ranks. labels, groups [N] are those of all records.

    Class level: items of unknown label are out of pool and queries, the own group is out of the pool. Instance level:
    the target is the record's own item; with `same_kind` (image to image) it is the other items of the own group.
    `rerank` makes of queries and pool what brings the first items of each query into another order.
    """
    rules = rules or RetrievalRules()
    group_number = np.unique(groups.astype(str), return_inverse=True)[1].ravel()
    mine = ranking.shard_rows(len(queries.rows), ranks.rank, ranks.world)
    query_labels, query_groups = labels[queries.rows], group_number[queries.rows]
    pool = _once(pool) if rules.merge_identical else pool
    known = labels[pool.rows] >= 0
    by_class = ranking.rank_classes(
        queries.vectors,
        query_labels,
        query_groups,
        Pool(pool.vectors[known], labels[pool.rows[known]], group_number[pool.rows[known]]),
        PRECISION_AT,
        mine,
        own_group=rules.self_in_pool,
        rerank=rerank and rerank(queries, pool.take(known)),
    )
    targets: list[TargetRank | None] = [None, None]
    if not rules.self_in_pool:
        items = Pool(pool.vectors, labels[pool.rows], group_number[pool.rows])
        change = rerank and rerank(queries, pool)
        for i, within in enumerate((None, query_labels)):
            found = ranking.rank_targets(
                queries.vectors, queries.rows, query_groups, items, pool.rows, mine, same_kind, within, change
            )
            targets[i] = _gather(ranks, mine, found, len(queries.rows))
    return Retrieved(
        task=task,
        rows=queries.rows,
        labels=query_labels,
        classes=_gather(ranks, mine, by_class, len(queries.rows)),
        targets=targets[0],
        class_targets=targets[1],
        pool=len(pool.rows),
        class_pool=int(known.sum()),
        fields=fields or {},
    )


def _once(pool: Side) -> Side:
    """The first item of every distinct vector."""
    _, of = ranking.unique_rows(pool.vectors)
    return pool.take(np.unique(of, return_index=True)[1])


def retrieval_rows(found: Retrieved, scopes: list[Scope], draws: Draws, **fields: Any) -> Iterator[Row]:
    """Rows of one retrieval task; a scope limits the queries, the pool is always the whole one. Instance level against
    the pool items of the own class only has `same-class` in its eval_strategy."""
    own = fields | found.fields
    within = "+".join(filter(None, (own.get("eval_strategy"), "same-class")))
    for scope in scopes:
        inside = scope.mask[found.rows]
        for metric, value in _class_values(found, inside & (found.labels >= 0), draws):
            yield make_row(found.task, scope.kind, scope.name, metric, value, class_set="classes", **own)
        for metric, value in _target_values(found, found.targets, inside, draws, found.pool):
            yield make_row(found.task, scope.kind, scope.name, metric, value, **own)
        for metric, value in _target_values(found, found.class_targets, inside & (found.labels >= 0), draws):
            yield make_row(found.task, scope.kind, scope.name, metric, value, **own | {"eval_strategy": within})


def _class_values(found: Retrieved, inside: np.ndarray, draws: Draws) -> Iterator[tuple[str, Value]]:
    use = np.flatnonzero(inside & (found.classes.num_relevant > 0))
    if not len(use):
        return
    rows, labels, ap = found.rows[use], found.labels[use], found.classes.ap[use]
    relevant, sizes = found.classes.num_relevant[use], found.classes.pool_size[use]
    share = float(np.mean(relevant / sizes))
    for column, k in enumerate(PRECISION_AT):
        hits = found.classes.precision[use, column]
        yield (
            f"p@{k}",
            Value(float(hits.mean()), *interval(mean_draws(hits, rows, draws)), share, len(use), found.class_pool),
        )
    chance = ranking.chance_ap(relevant, sizes)
    micro, macro = interval(mean_draws(ap, rows, draws)), interval(class_mean_draws(ap, labels, rows, draws))
    yield "map_micro", Value(float(ap.mean()), *micro, float(chance.mean()), len(use), found.class_pool)
    yield "map_macro", Value(class_mean(ap, labels), *macro, class_mean(chance, labels), len(use), found.class_pool)


def _target_values(
    found: Retrieved, targets: TargetRank | None, inside: np.ndarray, draws: Draws, pool: int | None = None
) -> Iterator[tuple[str, Value]]:
    """`pool` None: pools differ from query to query, and their mean size is told."""
    if targets is None or not (inside & (targets.num_targets > 0)).any():
        return
    use = np.flatnonzero(inside & (targets.num_targets > 0))
    rows, own = found.rows[use], _take(targets, use)
    blind = ranking.random_order(own)
    size = round(float(own.pool_size.mean())) if pool is None else pool
    for k in RECALL_AT:
        hits, chance = ranking.recall_at(own, k), float(ranking.recall_at(blind, k).mean())
        yield (
            f"r@{k}",
            Value(float(hits.mean()), *interval(mean_draws(hits, rows, draws)), chance, len(use), size),
        )
    middle, chance = ranking.mid_rank(own), float(np.median(ranking.mid_rank(blind)))
    low_high = interval(median_draws(middle, rows, draws))
    yield "median_rank", Value(float(np.median(middle)), *low_high, chance, len(use), size)


def _take(ranks: TargetRank, use: np.ndarray) -> TargetRank:
    return TargetRank(*(getattr(ranks, field.name)[use] for field in dataclasses.fields(ranks)))


def _gather(ranks: Ranks, mine: np.ndarray, part: Any, total: int) -> Any:
    """Per-query arrays of all ranks, put together in query order."""
    names = [field.name for field in dataclasses.fields(part)]
    whole: dict[str, np.ndarray] = {}
    for rows, values in ranks.gather((mine, {name: getattr(part, name) for name in names})):
        for name in names:
            if name not in whole:
                whole[name] = np.zeros((total, *values[name].shape[1:]), values[name].dtype)
            whole[name][rows] = values[name]
    return type(part)(**whole)
