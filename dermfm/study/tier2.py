"""Tier 2: a cell with fine-tuned towers, by the jobs train and evaluate, on shards that hold the study's notes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dermfm.add_notes import AddNotesConfig, add_notes
from dermfm.config import short_hash, to_dict
from dermfm.evaluate.results import METRICS, PREDICTIONS, read_metrics
from dermfm.notes import store
from dermfm.progress import Meter
from dermfm.study import cells as stored
from dermfm.study.config import IMAGE_ONLY, Cell, StudyConfig, check_engine
from dermfm.study.notes import CellNotes
from dermfm.study.prepare import Shared, one_at_a_time
from dermfm.study.score import Scorer
from dermfm.study.tier1 import classified

# Keys of the job train that differ from cell to cell, or say where and how it runs but not what comes out.
OF_THE_CELL = (
    "run",
    "shards",
    "strategies",
    "objectives",
    "seed",
    "ranks",
    "threads",
    "device",
    "num_workers",
    "resume",
)


def recipe(config: StudyConfig) -> dict[str, Any]:
    """What all cells of tier 2 share of the job train."""
    return {name: value for name, value in to_dict(config.train).items() if name not in OF_THE_CELL}


def run(
    config: StudyConfig, own: Sequence[Cell], notes: dict[tuple[str, str], CellNotes],
    made_of: dict[Cell, dict[str, Any]], shared: Shared, run_job: Callable[[str, Any, Path], int],
) -> int:  # fmt: skip
    """Train and evaluate the cells; the exit code of the first job that does not end well, else 0."""
    scorer = Scorer(config, shared)
    with Meter(len(own), "cells", "cells") as meter:
        for cell in own:
            began = time.monotonic()
            folder = Path(config.out) / "tier2" / cell.id
            shards = shards_with_notes(config, check_engine(config, cell.engine).name, shared)
            train = dataclasses.replace(
                config.train, run=str(folder), shards=shards, seed=cell.seed,
                strategies=dict.fromkeys(config.members(cell.strategy), 1.0),
                objectives=config.objective(cell.objective).of(cell.strategy),
            )  # fmt: skip
            for job, settings in (("train", train), ("evaluate", evaluate_config(config, folder))):
                code = run_job(job, settings, folder / "jobs")
                if code:
                    return code
            content, probabilities = scored(cell, folder, shared, scorer)
            content |= {"made_of": made_of[cell], "notes": notes[cell.strategy, cell.engine].about}
            content |= {"manifest": shared.manifest.fingerprint, "seconds": round(time.monotonic() - began, 1)}
            stored.write_cell(config.out, cell, content, probabilities)
            meter.advance()
    return 0


def evaluate_config(config: StudyConfig, folder: Path) -> Any:
    """The job evaluate of one cell: test and validation records, by the study's protocol."""
    return dataclasses.replace(
        config.evaluate, run=str(folder), checkpoint=None, splits=["test", "valid"], tasks=["classify-image"],
        probe=False, protocol=config.protocol, resamples=config.cell_resamples, seed=config.seed, out=None,
    )  # fmt: skip


def shards_with_notes(config: StudyConfig, engine: str, shared: Shared) -> str:
    """Shards of the study's images with all notes of one engine, made once; their folder."""
    table = shared.notes[engine]
    name = short_hash([shared.manifest.fingerprint, sorted(table.column("note_id").to_pylist())])
    folder = Path(config.out) / "tier2" / f"shards-{name}"
    notes = folder.with_name(f"notes-{name}")
    with one_at_a_time(Path(config.out)):
        if not store.done_parts(notes):
            store.write_part(notes, 0, table.to_pylist())
        add_notes(AddNotesConfig(shards=str(shared.manifest.folder), notes=str(notes), out=str(folder)))
    return str(folder)


def scored(cell: Cell, folder: Path, shared: Shared, scorer: Scorer) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What the evaluation of a run says, in the form of a cell; and the probabilities by split.

    The rows of metrics.json are over both splits; those of the cell are over the test split alone.
    """
    found = max((folder / "eval").glob(f"*/{METRICS}"), key=lambda path: path.parent.name)
    content = read_metrics(found)
    predictions = pq.read_table(found.parent / PREDICTIONS)
    probabilities = {split: _of(predictions, shared.records[split].record_ids) for split in ("test", "valid")}
    fields = {"train_strategy": None if cell.strategy == IMAGE_ONLY else cell.strategy, "seed": cell.seed}
    reached = classified(probabilities["valid"], shared.records["valid"].labels)
    return {
        "step": content["step"],
        "versions": content["protocol"]["versions"],
        "search": {"tries": [reached], "chosen": 0},
        "results": stored.compact_rows(scorer.heads("classify-image", probabilities["test"], fields)),
        "predicted": {split: stored.digits(values) for split, values in probabilities.items()},
    }, probabilities


def _of(predictions: pa.Table, record_ids: np.ndarray) -> np.ndarray:
    """Probabilities [n, C] of image classification of these records; uniform for an unreadable image."""
    rows = [r for r in predictions.to_pylist() if r["task"] == "classify-image" and r["class_set"] == "classes"]
    by_record = {r["record_id"]: r["probabilities"] for r in rows}
    size = len(rows[0]["probabilities"])
    return np.array([by_record.get(record_id, [1 / size] * size) for record_id in record_ids])
