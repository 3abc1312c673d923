"""The files of one evaluation: metrics.json, embeddings.safetensors, ids.parquet, predictions.parquet."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

from dermfm.config import InputError, read_file
from dermfm.evaluate.classify import Value
from dermfm.evaluate.records import RecordSet, TextSet
from dermfm.evaluate.zeroshot import Prompts
from shards.files import replacing, write_text

METRICS, EMBEDDINGS, IDS, PREDICTIONS = "metrics.json", "embeddings.safetensors", "ids.parquet", "predictions.parquet"
CLASSES, REPORTS = "per_class.json", "reports.parquet"
ROW_KEYS = (
    "task",
    "scope_kind",
    "scope",
    "class_set",
    "track",
    "train_strategy",
    "eval_strategy",
    "metric",
    "value",
    "ci_low",
    "ci_high",
    "n",
    "pool",
    "chance",
    "seed",
)
Row = dict[str, Any]

_TEXT_COLUMNS = ["kind", "record_id", "dataset", "split", "group_id", "note_id", "strategy", "text"]
ID_SCHEMA = pa.schema(
    [pa.field(name, pa.string()) for name in [*_TEXT_COLUMNS, "modality", "track", "class_set"]]
    + [pa.field(name, pa.int64()) for name in ("row", "label")]
)
PREDICTION_SCHEMA = pa.schema(
    [pa.field(name, pa.string()) for name in ("task", "track", "record_id", "note_id", "class_set", "eval_strategy")]
    + [pa.field("seed", pa.int64()), pa.field("probabilities", pa.list_(pa.float64()))]
)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Class probabilities [n, C] that embeddings alone cannot give, of the records `rows` [n]; with the notes read.

    `seed`: number of the repetition of a method that is reported as the mean over several.
    """

    task: str
    class_set: str
    rows: np.ndarray
    probabilities: np.ndarray
    track: str | None = None
    note_ids: list[str] | None = None
    strategy: str | None = None
    seed: int | None = None


def make_row(task: str, scope_kind: str, scope: str, metric: str, value: Value, **fields: Any) -> Row:
    """One row of metrics.json; fields that do not apply are null."""
    known = {"task": task, "scope_kind": scope_kind, "scope": scope, "metric": metric} | fields
    return {name: known.get(name) for name in ROW_KEYS} | dataclasses.asdict(value)


def write_metrics(folder: Path, run: str, step: int, manifest: str, protocol: dict[str, Any], rows: list[Row]) -> Path:
    """Write metrics.json, the last file of an evaluation: where it is, the others are whole."""
    content = {"run": run, "step": step, "manifest": manifest, "protocol": protocol, "results": rows}
    path = folder / METRICS
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def write_classes(folder: Path, tables: list[dict[str, Any]]) -> None:
    """Write per_class.json: the confusion matrix and the classes' own measures of every classification."""
    text = json.dumps({"results": tables}, ensure_ascii=False, allow_nan=False)
    write_text(folder / CLASSES, text + "\n")


def write_reports(folder: Path, rows: list[Row]) -> None:
    """Write reports.parquet: what the decoder wrote for each record, the record's facts, and what was found wrong."""
    names = ("record_id", "text", "facts", "stated", "unsupported")
    kinds = [pa.string(), pa.string(), *[pa.list_(pa.string())] * 3]
    _write_table(folder / REPORTS, rows, pa.schema(list(zip(names, kinds, strict=True))))


def read_metrics(path: str | Path) -> dict[str, Any]:
    """A metrics.json; InputError where it is missing, broken or lacks a part."""
    path = read_file(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        missing = [name for name in ("run", "step", "manifest", "protocol", "results") if name not in content]
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: cannot be read as metrics ({error}); run `dermfm evaluate` again") from error
    if missing:
        raise InputError(f"{path}: has no '{missing[0]}'; run `dermfm evaluate` again")
    return content


def write_embeddings(folder: Path, image: np.ndarray, text: np.ndarray, prompt: np.ndarray) -> None:
    """Write the three matrices, float32, rows of unit length."""
    arrays = {"image": image, "text": text, "prompt": prompt}
    with replacing(folder / EMBEDDINGS) as temporary:
        save_file({name: np.ascontiguousarray(a, dtype=np.float32) for name, a in arrays.items()}, temporary)
        temporary.chmod(0o644)  # safetensors writes files that only their owner can read


def write_ids(folder: Path, records: RecordSet, texts: list[TextSet], prompts: Prompts) -> None:
    """Write one row for each row of the embeddings: images are the records in order, notes follow by strategy."""
    rows = [_record_id_row(records, i, "image", i) for i in range(len(records))]
    count = 0
    for texts_of in texts:
        for i, note_id in zip(texts_of.rows, texts_of.note_ids, strict=True):
            own = {"note_id": note_id, "strategy": texts_of.strategy, "track": texts_of.track}
            rows.append(_record_id_row(records, int(i), "text", count) | own)
            count += 1
    for i, text in enumerate(prompts.texts):
        own = {"strategy": "bare" if prompts.bare[i] else "ensemble", "class_set": prompts.class_sets[i]}
        rows.append({"kind": "prompt", "row": i, "label": int(prompts.classes[i]), "text": text} | own)
    _write_table(folder / IDS, rows, ID_SCHEMA)


def write_predictions(folder: Path, records: RecordSet, predictions: Iterable[Prediction]) -> None:
    """Write one row for each predicted record."""
    rows = [
        {
            "task": p.task,
            "track": p.track,
            "record_id": records.record_ids[row],
            "note_id": p.note_ids[k] if p.note_ids else None,
            "class_set": p.class_set,
            "eval_strategy": p.strategy,
            "seed": p.seed,
            "probabilities": p.probabilities[k],
        }
        for p in predictions
        for k, row in enumerate(p.rows)
    ]
    _write_table(folder / PREDICTIONS, rows, PREDICTION_SCHEMA)


def _record_id_row(records: RecordSet, i: int, kind: str, row: int) -> Row:
    label = int(records.labels[i])
    return {
        "kind": kind,
        "row": row,
        "record_id": records.record_ids[i],
        "dataset": records.datasets[i],
        "split": records.splits[i],
        "label": None if label < 0 else label,
        "group_id": records.groups[i],
        "modality": records.modality[i],
    }


def _write_table(path: Path, rows: list[Row], schema: pa.Schema) -> None:
    columns = {name: [row.get(name) for row in rows] for name in schema.names}
    with replacing(path) as temporary:
        pq.write_table(pa.table(columns, schema=schema), temporary)
