"""The records of a split as the evaluation knows them, in manifest order: labels, groups, fields, notes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from dermfm.config import InputError, nearest
from dermfm.progress import track
from dermfm.records.vocabulary import CLASSES, MALIGNANCIES, SUBCLASSES
from shards.manifest import Manifest
from shards.reader import ShardReader

AT_A_TIME = 256  # samples whose bytes are held while records are read
TRACKS = {"given": "label-given", "masked": "label-masked", "blind": "label-blind"}
CLASS_SETS: dict[str, list[str]] = {"classes": CLASSES, "subclasses": SUBCLASSES, "malignancy": MALIGNANCIES}


@dataclasses.dataclass(frozen=True)
class RecordSet:
    """N records of one or more splits, in manifest order: string arrays [N], labels int64 [N] (−1: unknown), the index
    of each class set's truth int64 [N] (−1: unknown), all fields of each record without its notes, and its notes."""

    record_ids: np.ndarray
    datasets: np.ndarray
    splits: np.ndarray
    modality: np.ndarray
    groups: np.ndarray
    labels: np.ndarray
    truth: dict[str, np.ndarray]
    fields: list[dict[str, Any]]
    notes: list[list[dict[str, Any]]]

    def __len__(self) -> int:
        return len(self.record_ids)

    def select(self, rows: np.ndarray) -> RecordSet:
        """The records of some rows, in the order of `rows`."""
        return RecordSet(
            record_ids=self.record_ids[rows],
            datasets=self.datasets[rows],
            splits=self.splits[rows],
            modality=self.modality[rows],
            groups=self.groups[rows],
            labels=self.labels[rows],
            truth={name: values[rows] for name, values in self.truth.items()},
            fields=[self.fields[i] for i in rows],
            notes=[self.notes[i] for i in rows],
        )

    def strategies(self) -> list[str]:
        """The strategies that the records' notes hold, sorted."""
        return sorted({note["strategy"] for notes in self.notes for note in notes})


@dataclasses.dataclass(frozen=True)
class TextSet:
    """One note a record of one strategy: `rows` [M] of the record set, the note's id, text and label access each."""

    strategy: str
    track: str
    rows: np.ndarray
    note_ids: list[str]
    texts: list[str]


def concatenate(sets: list[RecordSet]) -> RecordSet:
    """Several record sets, one after the other."""
    fields = [f for one in sets for f in one.fields]
    notes = [n for one in sets for n in one.notes]
    return record_set(fields, notes, [str(s) for one in sets for s in one.splits])


def read_split(manifest: Manifest, split: str, quiet: bool = False) -> RecordSet:
    """All records of one split, `quiet` without a progress line.

    ShardError for an empty split, InputError for a sample without readable fields.
    """
    shards = manifest.split(split)
    reader = ShardReader(manifest.folder, shards, manifest.remote)
    places = [(s, row) for s, info in enumerate(shards) for row in range(info.num_samples)]
    fields, notes = [], []
    samples = _samples(reader, places)
    for (shard, row), sample in (
        samples if quiet else track(samples, len(places), f"reading {split} records", "records")
    ):
        record = _parse(sample, f"{shards[shard].name} row {row}")
        notes.append(record.pop("notes", None) or [])
        fields.append(record)
    return record_set(fields, notes, [split] * len(fields))


def _samples(reader: ShardReader, places: list[tuple[int, int]]) -> Iterator[tuple[tuple[int, int], dict[str, bytes]]]:
    """(shard, row) and sample of each place; of a remote storage, some hundred are asked for at a time."""
    for start in range(0, len(places), AT_A_TIME):
        some = places[start : start + AT_A_TIME]
        yield from ((place, read()) for place, read in zip(some, reader.reads(some), strict=True))


def record_set(fields: list[dict[str, Any]], notes: list[list[dict[str, Any]]], splits: list[str]) -> RecordSet:
    """A record set from the fields of a sample's JSON and its notes. InputError for a label that is none of ours."""

    def column(name: str) -> np.ndarray:
        return np.array([str(f.get(name) or "") for f in fields], dtype=object)

    labels = np.array([-1 if f.get("label") is None else int(f["label"]) for f in fields], dtype=np.int64)
    strange = np.flatnonzero((labels < -1) | (labels >= len(CLASSES)))
    if len(strange):
        first, label = fields[strange[0]], labels[strange[0]]
        raise InputError(
            f"record '{first.get('record_id')}' of {first.get('dataset')}: label {label} is not valid; the classes are "
            f"0 to {len(CLASSES) - 1}, unknown is null"
        )
    truth = {
        "classes": labels,
        "subclasses": _indices([f.get("matched_subclass") for f in fields], SUBCLASSES),
        "malignancy": _indices([f.get("malignancy") for f in fields], MALIGNANCIES),
    }
    return RecordSet(
        record_ids=column("record_id"),
        datasets=column("dataset"),
        splits=np.array(splits, dtype=object),
        modality=column("modality"),
        groups=column("group_id"),
        labels=labels,
        truth=truth,
        fields=fields,
        notes=notes,
    )


def text_sets(records: RecordSet, strategies: list[str]) -> list[TextSet]:
    """One text set a strategy (empty list: all that the notes hold): of several notes the one of the smallest id.

    InputError where a wanted strategy is in no note, or its notes are of different label access.
    """
    check_strategies(records, strategies)
    return [_text_set(records, name) for name in strategies or records.strategies()]


def check_strategies(records: RecordSet, strategies: list[str]) -> None:
    """InputError where a wanted strategy is in no note."""
    held = records.strategies()
    for name in strategies:
        if name not in held:
            raise InputError(f"eval_strategies: no test note of strategy '{name}'; {nearest(name, held or ['(none)'])}")


def _text_set(records: RecordSet, strategy: str) -> TextSet:
    rows, chosen = [], []
    for row, notes in enumerate(records.notes):
        own = [note for note in notes if note["strategy"] == strategy and (note.get("text") or "").strip()]
        if own:
            rows.append(row)
            chosen.append(min(own, key=lambda note: note["note_id"]))
    access = sorted({note.get("label_access") or "given" for note in chosen})
    unknown = [a for a in access if a not in TRACKS]
    if unknown or len(access) > 1:
        raise InputError(
            f"notes of strategy '{strategy}': label_access {access}; one of {', '.join(TRACKS)} for all is needed"
        )
    return TextSet(
        strategy=strategy,
        track=TRACKS[access[0]] if access else TRACKS["given"],
        rows=np.array(rows, dtype=np.int64),
        note_ids=[note["note_id"] for note in chosen],
        texts=[note["text"] for note in chosen],
    )


def _parse(sample: dict[str, bytes], where: str) -> dict[str, Any]:
    try:
        record = json.loads(sample["json"])
        missing = [name for name in ("record_id", "dataset", "group_id", "modality") if not record.get(name)]
    except (KeyError, ValueError, AttributeError) as error:
        raise InputError(f"{where}: no readable .json of a record ({error}); pack the shards anew") from error
    if missing:
        raise InputError(f"{where}: the record has no {', '.join(missing)}; pack the shards anew")
    return record


def _indices(values: list[str | None], names: list[str]) -> np.ndarray:
    place = {name.casefold(): i for i, name in enumerate(names)}
    return np.array([place.get((value or "").casefold(), -1) for value in values], dtype=np.int64)
