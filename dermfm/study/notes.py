"""The notes of a study: written once for every engine, the shuffled controls derived from them, one table an engine."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dermfm.config import InputError, short_hash
from dermfm.notes import controls, store
from dermfm.notes.plan import NotesConfig, Plan
from dermfm.notes.synthesize import plan_notes, synthesize
from dermfm.study.config import Cell, StudyConfig, StudyEngine, check_engine

MOSTLY = 0.5  # a strategy whose notes fell back to the template in more than this share was not tested


@dataclass(frozen=True)
class CellNotes:
    """The training notes of a cell: record id → notes as samples hold them; a hash of all; what is told of them."""

    by_record: dict[str, list[dict[str, Any]]]
    hash: str
    about: dict[str, Any]


def notes_config(config: StudyConfig, engine: StudyEngine) -> NotesConfig:
    """The job notes of one engine."""
    strategies = [strategy.name for strategy in config.written(config.only)]
    return dataclasses.replace(
        config.notes, strategies=strategies, of=config.of, engine=engine.engine, splits=["train"], share=[0, 1]
    )


def plan_engine(config: StudyConfig, engine: StudyEngine) -> tuple[Plan, pa.Table]:
    """What is to be written for an engine, and the records."""
    return plan_notes(notes_config(config, engine))


def make_notes(config: StudyConfig) -> dict[str, pa.Table]:
    """Write what is missing, in one folder for all engines; engine → its notes as NOTE_SCHEMA, the derived included."""
    tables = {}
    for engine in config.engines:
        if not config.written(config.only):
            tables[engine.name] = store.NOTE_SCHEMA.empty_table()
            continue
        plan, records = plan_engine(config, engine)
        if plan.num_missing:
            print(f"notes: {plan.num_missing} of {len(plan.notes)} are to be written ({engine.name})", flush=True)
        synthesize(notes_config(config, engine), plan, records)
        tables[engine.name] = with_controls(config, _wanted(config.notes.out, plan), records)
    return tables


def with_controls(config: StudyConfig, notes: pa.Table, records: pa.Table) -> pa.Table:
    """The table with the rows of the shuffled controls."""
    rows: list[dict[str, Any]] = []
    for control in (c for c in controls.CONTROLS if not config.only or c in config.only):
        derived = controls.derive(notes, records, control, config.of, config.seed)
        rows += derived.rows
        for label, count in derived.without.items():
            print(f"{control}: {count} records of class {label} get none, all of them are of one group")
    return pa.concat_tables([notes, pa.Table.from_pylist(rows, schema=store.NOTE_SCHEMA)])


def cell_notes(config: StudyConfig, cell: Cell, tables: dict[str, pa.Table], num_records: int) -> CellNotes:
    """The notes that a cell trains on. InputError where a strategy has none."""
    members = config.members(cell.strategy)
    table = tables[check_engine(config, cell.engine).name]
    table = table.filter(pc.is_in(table["strategy"], pa.array(members, pa.string())))
    rows = [row for row in table.to_pylist() if row["text"]]
    lacking = set(members) - {row["strategy"] for row in rows}
    if lacking:
        raise InputError(f"strategies: no training record has a note of '{min(lacking)}'; look at {config.notes.out}")
    by_record: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_record.setdefault(row["record_id"], []).append({"strategy": row["strategy"], "text": row["text"]})
    texts = sorted([row["record_id"], row["strategy"], row["text"]] for row in rows)
    return CellNotes(by_record, short_hash(texts), _about(rows, len(by_record) / max(num_records, 1)))


def _about(rows: list[dict[str, Any]], coverage: float) -> dict[str, Any]:
    """What a reader of the result must know of a cell's notes."""
    if not rows:
        return {"num": 0, "coverage": 0.0, "tested": True}
    by_model = [row for row in rows if row["engine"] not in ("template", controls.ENGINE)]
    fallback = sum(row["source"] == "template" for row in by_model) / max(len(by_model), 1)
    return {
        "num": len(rows),
        "coverage": coverage,
        "distinct": len({row["text"] for row in rows}),
        "mean_words": sum(len(row["text"].split()) for row in rows) / len(rows),
        "label_access": sorted({row["label_access"] for row in rows}),
        "sources": dict(sorted(Counter(row["source"] for row in rows).items())),
        "fallback": fallback,
        "tested": not by_model or fallback <= MOSTLY,
    }


def _wanted(folder: str, plan: Plan) -> pa.Table:
    """The planned notes of the folder: not those of earlier prompts, models or records."""
    table = store.read_notes(folder)
    return table.filter(pc.is_in(table["note_id"], pa.array(list(plan.notes), pa.string())))
