"""What became of the notes: how many of each strategy were generated, repaired, or replaced by the template."""

from __future__ import annotations

import collections
import dataclasses

from dermfm.config import InputError
from dermfm.notes.store import SOURCES, done_parts, read_notes


@dataclasses.dataclass(frozen=True)
class NoteLine:
    """Notes of one strategy by one engine: counts in the order of SOURCES, failed ones, most frequent faults."""

    strategy: str
    engine: str
    label_access: str
    total: int
    distinct: int
    counts: list[int]
    errors: int
    faults: list[tuple[str, int]]

    @property
    def is_no_test(self) -> bool:
        """Whether more than half fell back to the template, though another strategy was asked for."""
        return self.strategy != "template" and self.engine != "template" and self.counts[-1] * 2 > self.total


def note_table(folder: str | None) -> list[NoteLine]:
    """A line for each strategy, engine and label access of a notes folder; empty for None.

    InputError where the folder holds no notes.
    """
    if folder is None:
        return []
    if not done_parts(folder):
        raise InputError(f"notes: '{folder}' holds no finished notes; give the folder that `dermfm notes` wrote")
    groups: dict[tuple[str, str, str], list[dict]] = collections.defaultdict(list)
    for note in read_notes(folder).to_pylist():
        groups[note["strategy"], note["engine"], note["label_access"]].append(note)
    return [_line(*name, notes) for name, notes in sorted(groups.items())]


def _line(strategy: str, engine: str, access: str, notes: list[dict]) -> NoteLine:
    sources = collections.Counter(note["source"] for note in notes)
    faults = collections.Counter(fault.split(":")[0] for note in notes for fault in note["faults"] or [])
    return NoteLine(
        strategy=strategy,
        engine=engine,
        label_access=access,
        total=len(notes),
        distinct=len({note["text"] for note in notes}),
        counts=[sources.get(name, 0) for name in SOURCES],
        errors=sum(bool(note["error"]) for note in notes),
        faults=faults.most_common(3),
    )
