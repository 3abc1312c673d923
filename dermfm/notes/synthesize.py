"""The notes job: plan, write what is missing part by part (on Ray actors where a model writes), count what came out."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster.actors import Done, work_through
from cluster.ray import ray_session
from dermfm.notes import store
from dermfm.notes.engines.protocol import Request, prepare_engine
from dermfm.notes.pace import Pace
from dermfm.notes.plan import NotesConfig, Plan, PlannedNote, engine_of, make_plan, records_of, strategies_of
from dermfm.notes.room import check_cluster, check_here, resources_of
from dermfm.notes.write import Item, NoteWriter, Row, fixed_row, poisoned_row
from dermfm.records.table import read_records

MANY = 200_000  # notes without a model from which Ray is worth its start
TOLD_AT_LEAST = 20  # errors below this number never fail a job


class TooManyFailures(RuntimeError):  # noqa: N818  it says what happened
    """More notes ended with an error than `max_failed_fraction` allows."""


@dataclass
class Tally:
    """Counts of one run: notes by (strategy, source), errors, tokens."""

    made: Counter[tuple[str, str]] = field(default_factory=Counter)
    tokens: int = 0
    errors: int = 0
    last_error: str = ""

    def add(self, row: Row) -> None:
        """Count one finished row."""
        self.made[row["strategy"], row["source"]] += 1
        self.tokens += row["num_tokens"]
        if row["error"]:
            self.errors, self.last_error = self.errors + 1, f"{row['note_id']}: {row['error']}"


def plan_notes(config: NotesConfig) -> tuple[Plan, pa.Table]:
    """The plan and the records table; the model is looked for first, and InputError says what is not there."""
    strategies = strategies_of(config)
    revision = prepare_engine(config.engine) if any(s.prompt for s in strategies) else ""
    if config.ray == "never" and any(engine_of(s, config.engine)[0] != "template" for s in strategies):
        check_here(config.engine)
    table = read_records(config.records)
    return make_plan(config, table, revision), table


def synthesize(config: NotesConfig, plan: Plan, table: pa.Table) -> Tally:
    """Write every missing part. Raises TooManyFailures, InputError or RayError; finished parts stay in any case."""
    tally = Tally()
    if not plan.missing:
        return tally
    store.write_plan(config.out, plan.parts)
    on_ray = {index: _needs_ray(config, plan, index) for index in plan.missing}
    done = len(plan.notes) - plan.num_missing - plan.num_elsewhere
    with Pace(config.out, len(plan.notes), done) as pace:
        parts = _Parts(config, plan, table, tally, pace)
        for index in plan.missing:
            if not on_ray[index]:
                parts.write_here(index)
        parts.write_on_ray([index for index in plan.missing if on_ray[index]])
    return tally


def summary(config: NotesConfig) -> dict[str, Counter[str]]:
    """Strategy → counts by source, of all finished notes in the folder."""
    table = store.read_notes(config.out)
    counts: dict[str, Counter[str]] = {}
    pairs = zip(table.column("strategy").to_pylist(), table.column("source").to_pylist(), strict=True)
    for strategy, source in pairs:
        counts.setdefault(strategy, Counter())[source] += 1
    return counts


def _needs_ray(config: NotesConfig, plan: Plan, index: int) -> bool:
    if config.ray != "auto":
        return config.ray == "always"
    engine, _ = engine_of(plan.notes[plan.parts[index][0]].strategy, config.engine)
    if engine == "openai":  # the work is the server's; one process keeps its rate limit
        return False
    return engine != "template" or plan.num_missing > MANY


class _Parts:
    """Parts in the making: rows that came back wait here until their part is complete."""

    def __init__(self, config: NotesConfig, plan: Plan, table: pa.Table, tally: Tally, pace: Pace) -> None:
        self.config, self.plan, self.table, self.tally, self.pace = config, plan, table, tally, pace
        self.rows: dict[int, dict[str, Row]] = {}

    def write_here(self, index: int) -> None:
        """Make one part in this process."""
        prompted = self._is_prompted(index)
        for chunk in self._chunks(index):
            self._receive(index, self._writer.work(chunk) if prompted else [fixed_row(item) for item in chunk])

    def write_on_ray(self, indices: list[int]) -> None:
        """Make the parts on the actor pool."""
        if not indices:
            return
        config = self.config
        models = any(self._is_prompted(index) for index in indices)
        engine = config.engine if models else replace(config.engine, kind="template", tensor_parallel=1)
        need = resources_of(config, engine)
        with ray_session(config.address, _local_cpus(config)):
            replicas = check_cluster(config, engine, need)
            done = work_through(
                self._leases(indices), NoteWriter, (engine, config.repair), replicas=replicas, resources=need
            )
            try:
                for piece in done:
                    self._receive(piece.key, _rows_of(piece))
            finally:
                done.close()  # type: ignore[attr-defined]

    def _is_prompted(self, index: int) -> bool:
        """Whether a model writes the notes of a part (a part is of one strategy)."""
        strategy = self.plan.notes[self.plan.parts[index][0]].strategy
        return engine_of(strategy, self.config.engine)[0] != "template"

    @functools.cached_property
    def _writer(self) -> NoteWriter:
        return NoteWriter(self.config.engine, self.config.repair)

    def _leases(self, indices: list[int]) -> Iterator[tuple[int, list[Item]]]:
        for index in indices:
            yield from ((index, chunk) for chunk in self._chunks(index))

    def _chunks(self, index: int) -> Iterator[list[Item]]:
        """The items of a part in equal leases; what no model writes is cheap enough to lease the part at once."""
        notes = [self.plan.notes[note_id] for note_id in self.plan.parts[index]]
        pieces = -(-len(notes) // self.config.lease) if self._is_prompted(index) else 1
        for k in range(pieces):  # a last lease of a few notes would cost as many steps as a full one
            chunk = notes[k * len(notes) // pieces : (k + 1) * len(notes) // pieces]
            records = records_of(self.table, chunk)
            yield [make_item(note, record, self.config) for note, record in zip(chunk, records, strict=True)]

    def _receive(self, index: int, rows: list[Row]) -> None:
        """Take in rows of a part; the complete part is written in the plan's order."""
        waiting = self.rows.setdefault(index, {})
        for row in rows:
            waiting[row["note_id"]] = row
            self.tally.add(row)
        self.pace.advance(rows)
        self._check_failures()
        ids = self.plan.parts[index]
        if len(waiting) == len(ids):
            store.write_part(self.config.out, index, [waiting[note_id] for note_id in ids])
            del self.rows[index]

    def _check_failures(self) -> None:
        allowed = max(self.config.max_failed_fraction * self.plan.num_missing, TOLD_AT_LEAST)
        if self.tally.errors > allowed:
            raise TooManyFailures(
                f"{self.tally.errors} notes failed, more than max_failed_fraction={self.config.max_failed_fraction:g} "
                f"of {self.plan.num_missing} allows; the last one: {self.tally.last_error}"
            )


def make_item(note: PlannedNote, record: dict[str, Any], config: NotesConfig) -> Item:
    """What a worker needs to write one planned note."""
    strategy = note.strategy
    engine, model = engine_of(strategy, config.engine)
    facts = strategy.facts(record)
    messages = strategy.prompt.messages(facts, note.seed) if strategy.prompt else ()
    fallback = strategy.fallback(record)
    assert fallback is not None, "only eligible records are planned"
    columns = {
        "note_id": note.note_id,
        "record_id": record["record_id"],
        "strategy": strategy.name,
        "engine": engine,
        "model": model,
        "prompt_version": strategy.version,
        "seed": note.seed,
        "label_access": strategy.label_access,
        "facts_source": strategy.facts_source,
    }
    request = Request(messages, max(len(messages) - 1, 0), fallback, note.seed)
    if strategy.sees:
        request = replace(request, image=str(Path(config.records).parent / record["image"]))
    request = replace(request, schema=strategy.options)
    return Item(request, facts if strategy.prompt else None, columns, strategy.form(record), strategy.rules)


def _rows_of(piece: Done) -> list[Row]:
    if piece.results is None:
        return [poisoned_row(item, piece.error or "unknown") for item in piece.items]
    return piece.results


def _local_cpus(config: NotesConfig) -> int:
    """CPUs of an own local cluster: this machine's, and never too few for two actors (they may share one)."""
    return max(2 * config.threads_per_actor, os.cpu_count() or 1)
