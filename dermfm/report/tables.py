"""The numbers of metrics.json as tables for people: one entry a cell, with its interval."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from dermfm.evaluate.shift import CLASS_MATCHED

Row = dict[str, Any]
METHODS = (
    ("classify-image", None, "model"),
    ("probe", None, "frozen probe"),
    ("zero-shot", "ensemble", "zero-shot"),
)
MAIN_METRICS = (("f1_weighted", "Weighted F1"), ("balanced_accuracy", "Balanced accuracy"), ("f1_macro", "Macro F1"))
SAME_CLASS = "same-class"  # in the strategy of rows whose pool is the query's own class only
# (metric, whether the pool is the query's own class only, title)
RETRIEVAL_COLUMNS = (
    ("p@1", False, "P@1"),
    ("p@10", False, "P@10"),
    ("map_micro", False, "mAP micro"),
    ("map_macro", False, "mAP macro"),
    ("r@1", False, "R@1"),
    ("r@10", False, "R@10"),
    ("median_rank", False, "median rank"),
    ("r@10", True, "R@10 in class"),
)
SIDES = ("internal", "external", "all")
GAP_METRICS = (("f1_weighted", "weighted F1"), ("balanced_accuracy", "balanced accuracy"), ("f1_macro", "macro F1"))
TASK_TITLES = {
    "retrieval-i2t": "Image → note",
    "retrieval-t2i": "Note → image",
    "retrieval-i2i": "Image → image",
    "retrieval-t2t": "Note → note",
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One number as text, its interval as text, and its chance level as text ("" where there is none)."""

    value: str
    interval: str = ""
    chance: str = ""
    best: bool = False


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a table: what it is about, how many records, its cells."""

    title: str
    kind: str
    n: int
    cells: list[Cell]


def number(value: float | None, digits: int = 3) -> str:
    """A number for a cell; a dash where it is not defined."""
    return "–" if value is None else f"{value:.{digits}f}"


def make_cell(row: Row | None, digits: int = 3) -> Cell:
    """The cell of one row of metrics.json."""
    if row is None:
        return Cell("–")
    interval = "" if row["ci_low"] is None else f"{row['ci_low']:.{digits}f}–{row['ci_high']:.{digits}f}"
    return Cell(
        number(row["value"], digits), interval, number(row["chance"], digits) if row["chance"] is not None else ""
    )


def find(rows: Iterable[Row], **wanted: Any) -> Row | None:
    """The first row with all these fields."""
    return next((r for r in rows if all(r[name] == value for name, value in wanted.items())), None)


def scopes_of(rows: list[Row]) -> list[tuple[str, str]]:
    """(kind, name) of every scope, data sets first, in the order of the file."""
    return list(
        dict.fromkeys((r["scope_kind"], r["scope"]) for r in rows if r["scope_kind"] in ("dataset", "partition"))
    )


def main_table(rows: list[Row], metric: str) -> list[Line]:
    """A line a scope: model, frozen probe, zero-shot and the majority's value of one metric, of the eight classes."""
    lines = []
    for kind, scope in scopes_of(rows):
        own = [r for r in rows if r["scope_kind"] == kind and r["scope"] == scope and r["class_set"] == "classes"]
        found = [find(own, task=task, eval_strategy=strategy, metric=metric) for task, strategy, _ in METHODS]
        known = [r for r in found if r is not None]
        if known:
            best = max(r["value"] for r in known)
            cells = [dataclasses.replace(make_cell(r), best=r is not None and r["value"] == best) for r in found]
            lines.append(Line(scope, kind, known[0]["n"], [*cells, Cell(number(known[0]["chance"]))]))
    return lines


@dataclasses.dataclass(frozen=True)
class RetrievalBlock:
    """The lines of one retrieval task with one kind of notes."""

    title: str
    track: str | None
    strategy: str | None
    pool: int
    lines: list[Line]

    @property
    def sides(self) -> list[Line]:
        """The lines of the internal and the external partition and of all queries."""
        return [line for line in self.lines if line.kind == "partition" and line.title in SIDES]


def retrieval_columns(rows: list[Row]) -> list[tuple[str, bool, str]]:
    """The columns of the retrieval tables that the rows fill."""
    held = {(r["metric"], _within_class(r)) for r in rows if r["task"] in TASK_TITLES}
    return [column for column in RETRIEVAL_COLUMNS if column[:2] in held]


def retrieval_blocks(rows: list[Row]) -> list[RetrievalBlock]:
    """One block for every retrieval task, strategy and track of the file."""
    own = [r for r in rows if r["task"] in TASK_TITLES]
    columns = retrieval_columns(own)
    keys = list(dict.fromkeys(map(_retrieval_key, own)))
    blocks = []
    for task, strategy, track in sorted(keys, key=lambda k: (list(TASK_TITLES).index(k[0]), k[1] or "", k[2] or "")):
        mine = [r for r in own if _retrieval_key(r) == (task, strategy, track)]
        pool = max(r["pool"] or 0 for r in mine)
        lines = [_retrieval_line(mine, scope, columns) for scope in scopes_of(mine)]
        blocks.append(RetrievalBlock(TASK_TITLES[task], track, strategy, pool, lines))
    return blocks


def _retrieval_key(row: Row) -> tuple[str, str | None, str | None]:
    """Task, strategy and track of a row, the mark of a pool of one class taken off."""
    kept = [part for part in (row["eval_strategy"] or "").split("+") if part != SAME_CLASS]
    return row["task"], "+".join(kept) or None, row["track"]


def _within_class(row: Row) -> bool:
    return SAME_CLASS in (row["eval_strategy"] or "").split("+")


def _retrieval_line(rows: list[Row], scope: tuple[str, str], columns: list[tuple[str, bool, str]]) -> Line:
    own = [r for r in rows if (r["scope_kind"], r["scope"]) == scope]
    cells = []
    for metric, within, _ in columns:
        found = find([r for r in own if _within_class(r) == within], metric=metric)
        cells.append(make_cell(found, 1 if metric == "median_rank" else 3))
    return Line(scope[1], scope[0], max(r["n"] for r in own), cells)


@dataclasses.dataclass(frozen=True)
class Gap:
    """Internal and external value of one method and their difference; `matched`: the external value if classes were as
    frequent as in the internal partition, None where it was not measured."""

    method: str
    metric: str
    internal: float
    external: float
    matched: float | None = None

    @property
    def difference(self) -> float:
        """Internal minus external."""
        return self.internal - self.external


def shift_gaps(rows: list[Row]) -> list[Gap]:
    """The gap of every method and metric for which both partitions have a value."""
    gaps = []
    for metric, title in GAP_METRICS:
        for task, strategy, method in METHODS:
            wanted = {"task": task, "eval_strategy": strategy, "metric": metric, "class_set": "classes"}
            inside = find(rows, scope_kind="partition", scope="internal", **wanted)
            outside = find(rows, scope_kind="partition", scope="external", **wanted)
            matched = find(rows, scope_kind="partition", scope=CLASS_MATCHED, **wanted)
            if inside and outside:
                gaps.append(
                    Gap(method, title, inside["value"], outside["value"], matched["value"] if matched else None)
                )
    return gaps
