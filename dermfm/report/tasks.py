"""Every task of metrics.json in tables: classification of images, notes and both, zero-shot, probes, reports, and what
the notes tell about the label. A track (label-given, label-masked, label-blind) is named wherever notes are read."""

from __future__ import annotations

import dataclasses
from typing import Any

from dermfm.report.tables import SIDES, Cell, Line, find, make_cell, scopes_of
from dermfm.report.tables import TASK_TITLES as RETRIEVAL

Row = dict[str, Any]
TRACKS = ("label-given", "label-masked", "label-blind")
TITLES = {
    "classify-image": "Image",
    "classify-fused": "Image and note",
    "classify-text": "Note",
    "zero-shot": "Zero-shot",
    "probe": "Frozen probe",
    "few-shot": "Few-shot",
    "report": "Generated report",
}
CLASS_SETS = {"classes": "8 classes", "subclasses": "15 subclasses", "malignancy": "malignancy"}
COLUMNS = (
    ("f1_weighted", "weighted F1"),
    ("f1_macro", "macro F1"),
    ("balanced_accuracy", "balanced acc."),
    ("accuracy", "accuracy"),
    ("kappa", "kappa"),
    ("auroc", "AUROC"),
    ("ece", "ECE"),
)
REPORT_COLUMNS = (
    ("facts_precision", "facts precision"),
    ("facts_recall", "facts recall"),
    ("bleu", "BLEU"),
    ("rouge_l", "ROUGE-L"),
)
TEXT_LABEL = "text_label_information"


@dataclasses.dataclass(frozen=True)
class TaskTable:
    """One task's table: column titles, and a line for each class set, kind of notes and partition."""

    title: str
    columns: list[str]
    lines: list[Line]


@dataclasses.dataclass(frozen=True)
class TextLabel:
    """What a bag of words of one strategy's notes tells about the label, in one scope."""

    strategy: str
    track: str
    scope: str
    n: int
    cell: Cell


def task_tables(rows: list[Row]) -> list[TaskTable]:
    """One table a task except retrieval, on the internal and external partition and on all records."""
    rows = [r for r in rows if r["metric"] != TEXT_LABEL and r["task"] not in RETRIEVAL]
    tables = []
    for task in [*TITLES, *dict.fromkeys(r["task"] for r in rows if r["task"] not in TITLES)]:
        own = [r for r in rows if r["task"] == task and r["scope_kind"] == "partition" and r["scope"] in SIDES]
        columns = _columns(own)
        if columns:
            lines = [_line(own, kind, side, columns) for kind in _kinds(own) for side in SIDES]
            titles = [title for _, title in columns]
            tables.append(TaskTable(TITLES.get(task, task), titles, [line for line in lines if line is not None]))
    return tables


def text_label_lines(rows: list[Row]) -> list[TextLabel]:
    """Every strategy and track with its text_label_information, on partitions (data sets where it has no partition)."""
    own = [r for r in rows if r["metric"] == TEXT_LABEL]
    scopes = [r for r in own if r["scope_kind"] == "partition" and r["scope"] in SIDES] or own
    return [
        TextLabel(r["eval_strategy"] or "–", r["track"] or "–", r["scope"], r["n"], make_cell(r))
        for r in sorted(scopes, key=lambda r: (r["eval_strategy"] or "", _place(r["track"], TRACKS)))
    ]


def tracks_of(rows: list[Row]) -> list[str]:
    """The tracks that the rows hold, in the order of TRACKS."""
    return sorted({r["track"] for r in rows if r["track"]}, key=lambda track: _place(track, TRACKS))


def image_reference(rows: list[Row]) -> dict[str, Cell]:
    """Partition → balanced accuracy of the image head: what text_label_information is read beside."""
    own = [r for r in rows if r["task"] == "classify-image" and r["class_set"] == "classes"]
    found = {
        side: find(own, scope_kind="partition", scope=side, metric="balanced_accuracy")
        for _, side in scopes_of(own)
        if side in SIDES
    }
    return {side: make_cell(row) for side, row in found.items() if row is not None}


def _columns(rows: list[Row]) -> list[tuple[str, str]]:
    held = {r["metric"] for r in rows}
    known = [*COLUMNS, *REPORT_COLUMNS]
    return [c for c in known if c[0] in held] or [(metric, metric) for metric in sorted(held)]


def _kinds(rows: list[Row]) -> list[tuple[str | None, str | None, str | None]]:
    """(class set, strategy, track) of a task's lines, class sets and tracks in their order."""
    kinds = dict.fromkeys((r["class_set"], r["eval_strategy"], r["track"]) for r in rows)
    return sorted(kinds, key=lambda k: (_place(k[0], (*CLASS_SETS,)), _place(k[2], TRACKS), k[1] or ""))


def _line(rows: list[Row], kind: tuple[str | None, ...], side: str, columns: list[tuple[str, str]]) -> Line | None:
    fields = dict(zip(("class_set", "eval_strategy", "track"), kind, strict=True))
    own = [r for r in rows if r["scope"] == side and all(r[k] == v for k, v in fields.items())]
    if not own:
        return None
    class_set, strategy, track = kind
    notes = f"{strategy} ({track})" if track and strategy else strategy or track
    about = " · ".join(filter(None, [CLASS_SETS.get(class_set or "", class_set), notes]))
    cells = [make_cell(find(own, metric=metric)) for metric, _ in columns]
    return Line(side, about, max(r["n"] for r in own), cells)


def _place(name: str | None, order: tuple[str, ...]) -> int:
    return order.index(name) if name in order else len(order)
