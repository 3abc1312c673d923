"""Which notes are wanted, what each one's id is, and how they are cut into parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from dermfm.config import InputError, check_choice, check_range, check_share, key, short_hash
from dermfm.notes import controls, store
from dermfm.notes.engines.protocol import EngineConfig, takes_images
from dermfm.notes.strategies import Strategy, find_strategies
from dermfm.records.table import SPLITS

RAY = ("auto", "always", "never")


@dataclass(kw_only=True)
class NotesConfig:
    """`dermfm notes`: which records get which notes, written by what, and where."""

    records: str = key("???", "records.parquet")
    out: str = key("???", "folder of part-*.parquet")
    strategies: list[str] = key(
        ["template"],
        "template | label | measured (no model); shuffled | shuffled_within_class (others' notes, see of); narrative | "
        "abcd | characteristics; with an engine that takes images also open | native | native_blind; or the name of a "
        "prompt file",
    )
    of: str = key("narrative", "the strategy whose training notes shuffled and shuffled_within_class give to others")
    engine: EngineConfig = key(EngineConfig, "the model that writes prompted strategies")
    prompts: str | None = key(None, "folder of prompt files; null takes the packaged ones")
    limit: int | None = key(None, "prompted strategies write for at most so many records, spread over all classes")
    splits: list[str] = key(SPLITS, "splits whose records get notes")
    part_size: int = key(512, "notes a part file; a part is what an interrupted run makes again")
    seed: int = key(0, "of the spread of `limit` and of sampling")
    repair: bool = key(True, "try to repair a failing note sentence by sentence before the template replaces it")
    share: list[int] = key(
        [0, 1], "[k, n]: make the parts whose number mod n is k, as one of n jobs on the same folder"
    )
    max_failed_fraction: float = key(0.05, "more notes with an error than this fail the job")
    ray: str = key("auto", "auto (Ray where a model writes, or for many notes) | always | never")
    address: str | None = key(
        None,
        "Ray cluster to join; null starts one on this machine, slurm one in this allocation (see slurm/notes.sbatch)",
    )
    replicas: str = key(
        "auto", "replicas of the model: a number, or auto to fill the cluster, also with nodes that join"
    )
    threads_per_actor: int = key(1, "CPU threads (and CPUs) of an actor; a replica has one actor a shard")
    gpus_per_actor: float = key(0.0, "GPUs of an actor")
    lease: int = key(128, "notes that a replica gets at once: what a dead one costs, and the most that it can batch")

    def __post_init__(self) -> None:
        check_choice("ray", self.ray, RAY)
        for split in self.splits:
            check_choice("splits", split, SPLITS)
        check_share(self.share)
        if not self.strategies:
            raise ValueError("strategies: at least one is needed, for example [template]")
        if self.of in controls.CONTROLS:
            raise ValueError(f"of: '{self.of}' is itself made of another strategy's notes; name that one")
        derived = [name for name in self.strategies if name in controls.CONTROLS]
        if derived and self.share != [0, 1]:
            raise ValueError(f"share: '{derived[0]}' needs all notes of '{self.of}'; make it in a call without share")
        for name in ("part_size", "threads_per_actor", "lease"):
            check_range(name, getattr(self, name), 1)
        if self.limit is not None:
            check_range("limit", self.limit, 1)
        if self.replicas != "auto" and not (self.replicas.isdecimal() and int(self.replicas) > 0):
            raise ValueError(f"replicas: '{self.replicas}' is not valid; it is auto or a number of at least 1")
        if self.engine.kind == "vllm" and self.ray != "never" and self.gpus_per_actor != 1:
            raise ValueError("gpus_per_actor: vllm needs 1 GPU for each shard; set gpus_per_actor=1")
        check_range("gpus_per_actor", self.gpus_per_actor, 0)
        if self.engine.kind == "transformers" and self.ray == "never" and self.engine.shards > 1:
            raise ValueError(
                f"engine.tensor_parallel: {self.engine.shards} processes are started on Ray only; leave out ray=never"
            )
        if self.engine.device == "cuda" and self.ray != "never" and not self.gpus_per_actor:
            raise ValueError("gpus_per_actor: engine.device=cuda needs a GPU for every actor; set gpus_per_actor=1")
        check_range("max_failed_fraction", self.max_failed_fraction, 0, 1)


@dataclass(frozen=True)
class PlannedNote:
    """One note to be made: of the record in row `row` of the table."""

    note_id: str
    row: int
    strategy: Strategy
    seed: int


@dataclass(frozen=True)
class Plan:
    """All wanted notes by id, the parts they are in (number → ids), and which parts are still to be made."""

    notes: dict[str, PlannedNote]
    parts: dict[int, list[str]]
    missing: list[int]
    num_elsewhere: int = 0  # notes that are left to the other shares

    @property
    def num_missing(self) -> int:
        """Notes that are still to be made."""
        return sum(len(self.parts[index]) for index in self.missing)


def engine_of(strategy: Strategy, config: EngineConfig) -> tuple[str, str]:
    """(engine, model) that a strategy's notes carry."""
    if strategy.prompt is None or config.kind == "template":
        return "template", "template"
    return config.kind, config.model


def make_plan(config: NotesConfig, table: pa.Table, revision: str) -> Plan:
    """The wanted notes of `table` (records), cut into parts, minus what the folder already holds.

    Parts of an earlier plan stay as they are while all their notes are wanted, so that an interrupted part is made
    again with the same batches; finished parts always stay. `revision` is the model's.
    """
    wanted: dict[str, PlannedNote] = {}
    for strategy in strategies_of(config):
        _check_measured(strategy, config, table)
        wanted |= {note.note_id: note for note in _notes_of(strategy, config, table, revision)}
    if not wanted and controls.written(config.strategies):
        raise InputError(f"{config.records}: no record of the splits {', '.join(config.splits)} can get such a note")
    done = store.done_parts(config.out)
    parts = {index: store.part_ids(path) for index, path in done.items()}
    kept = {
        i: ids for i, ids in store.read_plan(config.out).items() if i not in parts and all(n in wanted for n in ids)
    }
    covered = {note_id for ids in (*parts.values(), *kept.values()) for note_id in ids}
    fresh = _cut([n for n in wanted.values() if n.note_id not in covered], config.part_size)
    following = max([-1, *parts, *kept]) + 1
    kept |= {following + k: ids for k, ids in enumerate(fresh)}
    own, num_shares = config.share
    missing = sorted(index for index in kept if index % num_shares == own)
    elsewhere = sum(len(ids) for index, ids in kept.items() if index % num_shares != own)
    return Plan(wanted, {**parts, **kept}, missing, elsewhere)


def strategies_of(config: NotesConfig) -> list[Strategy]:
    """The configured strategies, as the configured engine can do them."""
    return find_strategies(controls.written(config.strategies), config.prompts, lambda: takes_images(config.engine))


def _check_measured(strategy: Strategy, config: NotesConfig, table: pa.Table) -> None:
    """InputError where the strategy needs measured attributes and the records were written without them."""
    lacking = [f for f in strategy.fields if f.startswith("measured_") and f not in table.column_names]
    if lacking:
        raise InputError(
            f"{config.records}: has no column {lacking[0]}, which strategy '{strategy.name}' works from; "
            "write the records with `dermfm records … measure=true`"
        )


def record_of(table: pa.Table, row: int) -> dict[str, Any]:
    """One row of the records table as a dict."""
    return table.slice(row, 1).to_pylist()[0]


def records_of(table: pa.Table, notes: Sequence[PlannedNote]) -> list[dict[str, Any]]:
    """The records of notes of one strategy, with the columns that it reads (and id and image): a part at once."""
    columns = list(dict.fromkeys(["record_id", "image", *notes[0].strategy.fields]))
    return table.select(columns).take([note.row for note in notes]).to_pylist()


def _notes_of(strategy: Strategy, config: NotesConfig, table: pa.Table, revision: str) -> Iterator[PlannedNote]:
    """The strategy's notes in the order in which they are cut into parts."""
    columns = ["record_id", "dataset", "split", "label", "matched_class", *strategy.fields]
    records = table.select([name for name in dict.fromkeys(columns) if name in table.column_names]).to_pylist()
    rows = [i for i, record in enumerate(records) if record["split"] in config.splits and strategy.is_eligible(record)]
    if strategy.prompt and config.limit is not None:
        rows = spread(records, rows, config.limit, config.seed)
    engine, model = engine_of(strategy, config.engine)
    told = [engine, model, revision, config.engine.sampling()] if engine != "template" else [engine, "", "", []]
    notes = []
    for row in rows:
        record = records[row]
        seed = planned_seed(config.seed, record["record_id"], strategy.name)
        identity = [record["record_id"], strategy.name, strategy.version, *told, seed]
        note_id = short_hash([*identity, short_hash(strategy.visible(record))])
        notes.append((_prefix_key(strategy, record, seed), PlannedNote(note_id, row, strategy, seed)))
    yield from (note for _, note in sorted(notes, key=lambda pair: (pair[0], pair[1].row)))


def planned_seed(seed: int, record_id: str, strategy: str) -> int:
    """The seed of a note, below 2**31, known before anything is written."""
    return int(short_hash([seed, record_id, strategy]), 16) % 2**31


def spread(records: Sequence[Mapping[str, Any]], rows: Sequence[int], limit: int, seed: int) -> list[int]:
    """At most `limit` of `rows`, in row order: equally many of each (split, data set, class) as far as there are.

    Which ones is decided by a hash of their ids, so that a larger limit contains the choice of a smaller one.
    """
    cells: dict[tuple[str, ...], list[tuple[str, int]]] = {}
    for row in rows:
        record = records[row]
        cell = (record["split"], record["dataset"], str(record["label"]))
        cells.setdefault(cell, []).append((short_hash([seed, record["record_id"]]), row))
    ranked = ((rank, hashed, row) for cell in cells.values() for rank, (hashed, row) in enumerate(sorted(cell)))
    return sorted(row for _, _, row in sorted(ranked)[:limit])


def _prefix_key(strategy: Strategy, record: Mapping[str, Any], seed: int) -> str:
    """Notes that share a prompt's beginning have the same key: they stand together in parts and batches."""
    return short_hash(list(strategy.prompt.prefix(strategy.facts(record), seed))) if strategy.prompt else ""


def _cut(notes: Sequence[PlannedNote], size: int) -> list[list[str]]:
    """Parts of at most `size` ids, each of one strategy."""
    parts: list[list[str]] = []
    before = None
    for note in notes:
        if note.strategy is not before or len(parts[-1]) == size:
            parts.append([])
        before = note.strategy
        parts[-1].append(note.note_id)
    return parts
