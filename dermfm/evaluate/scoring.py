"""From predictions and rankings to rows of metrics.json: every task in every scope, with intervals and chance."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from dermfm.evaluate import ranking
from dermfm.evaluate.classify import Value, classification
from dermfm.evaluate.ranking import Pool, Ranking, TargetRank
from dermfm.evaluate.ranks import Ranks
from dermfm.evaluate.results import Row, make_row
from dermfm.evaluate.shift import Scope
from dermfm.evaluate.statistics import Draws, class_mean, class_mean_draws, interval, mean_draws, median_draws

PRECISION_AT = (1, 5, 10, 20, 50, 100)
RECALL_AT = (1, 5, 10)


@dataclasses.dataclass(frozen=True)
class Scored:
    """Class scores [n, C] of the records `rows` [n], probabilities if `calibrated`; `fields` go into the rows."""

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


@dataclasses.dataclass(frozen=True)
class Retrieved:
    """Results of all queries: records `rows` [n] with labels [n]; class-level ranking and rank of the own item."""

    task: str
    rows: np.ndarray
    labels: np.ndarray
    classes: Ranking
    targets: TargetRank
    pool: int
    class_pool: int
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)


def classification_rows(
    scored: Scored, truth: np.ndarray, scopes: list[Scope], draws: Draws, **fields: Any
) -> Iterator[Row]:
    """Rows of one classification task; records of unknown truth [N] are left out, scopes without records skipped."""
    labels = truth[scored.rows]
    for scope in scopes:
        keep = scope.mask[scored.rows] & (labels >= 0)
        if keep.any():
            values = classification(labels[keep], scored.scores[keep], scored.rows[keep], draws, scored.calibrated)
            own = {"class_set": scored.class_set} | fields | scored.fields
            for metric, value in values.items():
                yield make_row(scored.task, scope.kind, scope.name, metric, value, **own)


def retrieve(
    task: str,
    queries: Side,
    pool: Side,
    labels: np.ndarray,
    groups: np.ndarray,
    ranks: Ranks,
    same_kind: bool = False,
    fields: dict[str, Any] | None = None,
) -> Retrieved:
    """Rank `pool` for every query, sharded over ranks. labels, groups [N] are those of all records.

    Class level: items of unknown label are out of pool and queries, the own group is out of the pool. Instance level:
    the target is the record's own item; with `same_kind` (image to image) it is the other items of the own group.
    """
    group_number = np.unique(groups.astype(str), return_inverse=True)[1].ravel()
    mine = ranking.shard_rows(len(queries.rows), ranks.rank, ranks.world)
    query_labels, query_groups = labels[queries.rows], group_number[queries.rows]
    known = labels[pool.rows] >= 0
    class_pool = Pool(pool.vectors[known], labels[pool.rows[known]], group_number[pool.rows[known]])
    by_class = ranking.rank_classes(queries.vectors, query_labels, query_groups, class_pool, PRECISION_AT, mine)
    all_pool = Pool(pool.vectors, labels[pool.rows], group_number[pool.rows])
    by_item = ranking.rank_targets(
        queries.vectors, queries.rows, query_groups, all_pool, pool.rows, mine, group_targets=same_kind
    )
    return Retrieved(
        task=task,
        rows=queries.rows,
        labels=query_labels,
        classes=_gather(ranks, mine, by_class, len(queries.rows)),
        targets=_gather(ranks, mine, by_item, len(queries.rows)),
        pool=len(pool.rows),
        class_pool=int(known.sum()),
        fields=fields or {},
    )


def retrieval_rows(found: Retrieved, scopes: list[Scope], draws: Draws, **fields: Any) -> Iterator[Row]:
    """Rows of one retrieval task; a scope limits the queries, the pool is always the whole one."""
    for scope in scopes:
        inside = scope.mask[found.rows]
        own = fields | found.fields
        for metric, value in _class_values(found, inside & (found.labels >= 0), draws):
            yield make_row(found.task, scope.kind, scope.name, metric, value, class_set="classes", **own)
        for metric, value in _target_values(found, inside, draws):
            yield make_row(found.task, scope.kind, scope.name, metric, value, **own)


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


def _target_values(found: Retrieved, inside: np.ndarray, draws: Draws) -> Iterator[tuple[str, Value]]:
    use = np.flatnonzero(inside & (found.targets.num_targets > 0))
    if not len(use):
        return
    rows, own = found.rows[use], _take(found.targets, use)
    blind = ranking.random_order(own)
    for k in RECALL_AT:
        hits, chance = ranking.recall_at(own, k), float(ranking.recall_at(blind, k).mean())
        yield (
            f"r@{k}",
            Value(float(hits.mean()), *interval(mean_draws(hits, rows, draws)), chance, len(use), found.pool),
        )
    middle, chance = ranking.mid_rank(own), float(np.median(ranking.mid_rank(blind)))
    low_high = interval(median_draws(middle, rows, draws))
    yield "median_rank", Value(float(np.median(middle)), *low_high, chance, len(use), found.pool)


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
