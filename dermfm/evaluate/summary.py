"""The main table of an evaluation, for a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dermfm.evaluate.results import read_metrics

SHOWN = (
    ("classify-image", "f1_weighted", "model\nF1w"),
    ("probe", "f1_weighted", "probe\nF1w"),
    ("classify-fused", "f1_weighted", "fused\nF1w"),
    ("zero-shot", "f1_weighted", "zero-shot\nF1w"),
    ("classify-image", "balanced_accuracy", "model\nbal.acc"),
    ("probe", "balanced_accuracy", "probe\nbal.acc"),
    ("retrieval-i2t", "map_micro", "i2t\nmAP"),
    ("retrieval-t2i", "map_micro", "t2i\nmAP"),
    ("retrieval-i2i", "map_micro", "i2i\nmAP"),
)
MIN_WIDTH = 110  # characters: a log file has no width of its own


def print_summary(path: Path) -> None:
    """Print one line a scope with the most read numbers, and where the whole lies."""
    content = read_metrics(path)
    rows = content["results"]
    scopes = list(dict.fromkeys((r["scope_kind"], r["scope"]) for r in rows if r["scope_kind"] != "subgroup"))
    table = Table(title=f"{content['run']} step {content['step']}")
    table.add_column("scope", no_wrap=True)
    for _, _, title in SHOWN:
        table.add_column(title, justify="right", no_wrap=True)
    strategy = shown_strategy(content)
    rows = [r for r in rows if r["track"] is None or r["eval_strategy"] == strategy]
    for kind, scope in scopes:
        found = [_find(rows, kind, scope, task, metric) for task, metric, _ in SHOWN]
        table.add_row(scope, *["" if value is None else f"{value:.3f}" for value in found])
    console = Console()
    console.width = max(console.width, MIN_WIDTH)
    console.print(table)
    if strategy:
        print(f"i2t, t2i: notes of strategy '{strategy}'; F1w: weighted F1")
    print(f"all numbers: {path}")


def shown_strategy(content: dict[str, Any]) -> str | None:
    """The strategy whose notes the table shows: one that the run trained on, where there is one."""
    trained = next((r["train_strategy"] for r in content["results"] if r["train_strategy"]), "").split("+")
    notes = content["protocol"]["notes"]
    best = max(notes, key=lambda note: (note["strategy"] in trained, note["num_notes"]), default=None)
    return best["strategy"] if best else None


def _find(rows: list[dict[str, Any]], kind: str, scope: str, task: str, metric: str) -> float | None:
    """The value of the first row that fits, of the eight classes."""
    for row in rows:
        place = (row["scope_kind"], row["scope"], row["task"], row["metric"])
        if place == (kind, scope, task, metric) and row["class_set"] == "classes":
            return row["value"]
    return None
