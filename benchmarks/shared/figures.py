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
    name: str,
    ours: float,
    other: float | None,
    unit: str,
    goal: float | None,
    better: str = "higher",
    threads: int = 1,
) -> dict[str, Any]:
    """One row; `ratio` is ours over the other. `other` null: nothing to compare with; `goal` null: told, not judged."""
    return {
        "figure": name,
        "ours": round(ours, 3),
        "other": None if other is None else round(other, 3),
        "unit": unit,
        "ratio": None if other is None else round(ours / other, 4),
        "goal": goal,
        "better": better,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {threads} thread{'s' * (threads > 1)} a process",
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Print both forms."""
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*("–" if row[name] is None else str(row[name]) for name in COLUMNS))
    Console().print(table)
    for row in rows:
        print(json.dumps(row))
