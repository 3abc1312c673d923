"""The journal of a folder, jobs.jsonl: one line for each submission that was made for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

JOURNAL = "jobs.jsonl"


def note(folder: Path, entry: dict[str, Any]) -> None:
    """Add one submission to the folder's journal."""
    with (folder / JOURNAL).open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def journal(folder: Path) -> list[dict[str, Any]]:
    """The submissions of a folder, oldest first; a broken last line (a full disk) is left out."""
    path = folder / JOURNAL
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return entries
