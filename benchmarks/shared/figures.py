"""How every benchmark shows its figures: a table for people, then one JSON object a line."""

from __future__ import annotations

import json
import os
import platform
from typing import Any

from rich.console import Console
from rich.table import Table

COLUMNS = ("figure", "ours", "other", "unit", "ratio", "goal")


def figure(
    name: str, ours: float, other: float, unit: str, goal: float | None, better: str, threads: int
) -> dict[str, Any]:
    """One row; `ratio` is ours over the other; a goal of None is none: the figure is told, not judged."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {threads} threads"
    return {
        "figure": name, "ours": round(ours, 3), "other": round(other, 3), "unit": unit,
        "ratio": round(ours / other, 3), "goal": goal, "better": better, "machine": machine,
    }  # fmt: skip


def show(rows: list[dict[str, Any]]) -> None:
    """Print both forms."""
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*("–" if row[name] is None else str(row[name]) for name in COLUMNS))
    Console().print(table)
    for row in rows:
        print(json.dumps(row))
