"""Control notes: training notes given to other records, so that what a note says of its own image is lost.

`shuffled` gives each training record the note of another one; `shuffled_within_class` that of another group of the same
class: what is left of its effect is not specific to the image. The notes are taken from a source strategy as they are,
each used once where that is possible, and none goes to its own record or to a record of its own group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from dermfm.config import InputError, nearest, short_hash
from dermfm.notes import store

if TYPE_CHECKING:
    from dermfm.notes.plan import NotesConfig

SHUFFLED, WITHIN_CLASS = "shuffled", "shuffled_within_class"
CONTROLS = (SHUFFLED, WITHIN_CLASS)
ENGINE, SPLIT = "derived", "train"
VERSIONS = {SHUFFLED: "shuffled-1", WITHIN_CLASS: "shuffled_within_class-1"}
COLUMNS = ["record_id", "split", "label", "group_id"]


@dataclass(frozen=True)
class Derived:
    """Rows of a control as NOTE_SCHEMA, and how many source notes found no other record to go to, by class."""

    rows: list[dict[str, Any]]
    without: dict[str, int]


def written(strategies: Iterable[str]) -> list[str]:
    """The strategies whose notes are written, not derived from those of another."""
    return [name for name in strategies if name not in CONTROLS]


def derive(notes: pa.Table, records: pa.Table, control: str, source: str, seed: int = 0) -> Derived:
    """The notes of `control`, made of those that training records have of the strategy `source`.

    A record with several source notes takes part with the one of the smallest id. The same notes, records and seed
    give the same rows. InputError where no training record has a note of the source.
    """
    by_record = {r["record_id"]: r for r in records.select(COLUMNS).to_pylist() if r["split"] == SPLIT}
    own = _source_notes(notes, source, by_record)
    if not own:
        held = sorted(set(notes.column("strategy").to_pylist()) - set(CONTROLS))
        hint = nearest(source, held) if source not in held else f"its notes are of no record of the split '{SPLIT}'"
        raise InputError(f"of: no training note of strategy '{source}' to make '{control}' of; {hint}")
    pools: dict[str, list[str]] = {}
    for record_id in sorted(own):
        label = by_record[record_id]["label"]
        if control == SHUFFLED or label is not None:  # without a class there is no "same class"
            pools.setdefault("" if control == SHUFFLED else str(label), []).append(record_id)
    rows: list[dict[str, Any]] = []
    without: dict[str, int] = {}
    for name, pool in sorted(pools.items()):
        groups = [by_record[record_id]["group_id"] for record_id in pool]
        donors = assign(groups, int(short_hash([seed, control, source, name]), 16))
        if donors is None:
            without[name] = len(pool)
            continue
        rows += [
            _row(record_id, own[pool[d]], control, source, seed) for record_id, d in zip(pool, donors, strict=True)
        ]
    return Derived(rows, without)


def assign(groups: Sequence[str], seed: int) -> np.ndarray | None:
    """For each member the place [n] of its donor, of another group; None where all members are of one group.

    Groups are laid out in a random order, each in one piece, and everyone takes from the member that stands the size of
    the largest group further on: a permutation without a fixed group. Where one group has more than half of all
    members there is none, and donors are drawn from the others.
    """
    rng = np.random.default_rng(seed)
    names, number = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < 2:
        return None
    sizes = np.bincount(number)
    largest = int(sizes.max())
    donors = np.empty(len(number), dtype=np.int64)
    if 2 * largest <= len(number):
        layout = np.lexsort((rng.random(len(number)), rng.permutation(len(names))[number]))
        donors[layout] = np.roll(layout, -largest)
        return donors
    for group in range(len(names)):
        others = np.flatnonzero(number != group)
        donors[number == group] = others[rng.integers(0, len(others), sizes[group])]
    return donors


def check_source(config: NotesConfig) -> None:
    """InputError where controls are asked for and the strategy that they are made of is neither there nor asked for."""
    asked = [name for name in CONTROLS if name in config.strategies]
    if not asked or config.of in config.strategies:
        return
    there = sorted(store.strategies_in(config.out))
    if config.of not in there:
        hint = nearest(config.of, there) if there else "it holds none at all"
        raise InputError(
            f"of: {config.out} holds no notes of '{config.of}' for '{asked[0]}' to give away; {hint}; "
            "add it to strategies, or choose another `of`"
        )


def write_controls(config: NotesConfig, records: pa.Table) -> Counter[str]:
    """Add the missing notes of the controls that are asked for to the folder; how many were made, by control.

    The source's notes must be there. Notes that were derived from an earlier state of the source stay.
    """
    asked = [name for name in CONTROLS if name in config.strategies]
    made: Counter[str] = Counter()
    for control in asked:
        notes = store.read_notes(config.out)
        derived = derive(notes, records, control, config.of, config.seed)
        there = set(notes.column("note_id").to_pylist())
        missing = [row for row in derived.rows if row["note_id"] not in there]
        for start in range(0, len(missing), config.part_size):
            used = [-1, *store.done_parts(config.out), *store.read_plan(config.out)]
            store.write_part(config.out, max(used) + 1, missing[start : start + config.part_size])
        made[control] = len(missing)
        for label, count in derived.without.items():
            print(f"{control}: {count} records of class {label} get none, all of them are of one group")
    return made


def _source_notes(
    notes: pa.Table, source: str, by_record: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Record id → its note of the source strategy, for training records with a note that has a text."""
    own: dict[str, dict[str, Any]] = {}
    for row in notes.to_pylist():
        if row["strategy"] == source and row["record_id"] in by_record and row["text"]:
            known = own.get(row["record_id"])
            if known is None or row["note_id"] < known["note_id"]:
                own[row["record_id"]] = row
    return own


def _row(record_id: str, donor: Mapping[str, Any], control: str, source: str, seed: int) -> dict[str, Any]:
    """The donor's note as a note of `record_id`. What is told of the note (access, source, faults) is the donor's."""
    identity = [record_id, control, VERSIONS[control], ENGINE, source, donor["note_id"], seed]
    planned = int(short_hash([seed, record_id, control]), 16) % 2**31
    return dict(donor) | {
        "note_id": short_hash([*identity, short_hash(donor["text"])]),
        "record_id": record_id,
        "strategy": control,
        "engine": ENGINE,
        "model": source,
        "prompt_version": VERSIONS[control],
        "seed": planned,
    }
