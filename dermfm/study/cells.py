"""A finished cell: one small JSON with its metrics, its predicted classes and what made it; probabilities beside it.

The predicted classes of the scored records, one digit a record, suffice to compute every effect again; the records
themselves (ids, groups, labels) stand once for all cells in scored.parquet.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dermfm.config import InputError, read_file, short_hash
from dermfm.evaluate.records import RecordSet
from dermfm.evaluate.results import ROW_KEYS
from dermfm.study.config import Cell, defaults, differences
from shards.files import write_text

FOLDER, SCORED, REPLACED = "cells", "scored.parquet", "replaced.jsonl"
KEPT_DIGITS = 6
SCORED_FIELDS = ("record_id", "dataset", "group_id", "modality", "split", "label", "age", "sex", "site", "fitzpatrick")
NEEDED = ("id", "tier", "strategy", "engine", "objective", "seed", "made_of", "results", "predicted")


def path_of(out: str | Path, cell: Cell) -> Path:
    """The file of a cell."""
    return Path(out) / FOLDER / f"{cell.id}.json"


def write_cell(
    out: str | Path, cell: Cell, content: Mapping[str, Any], probabilities: Mapping[str, np.ndarray]
) -> Path:
    """Write probabilities (split → [n, C]) and then the JSON, both under temporary names first.

    A cell that is made again has been scored once more than one sees: replaced.jsonl gets a line of the former one.
    """
    path = path_of(out, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    former = read_cell(path) if path.is_file() else None
    arrays = path.with_suffix(".npz")
    with arrays.with_suffix(".npz.tmp").open("wb") as file:
        np.savez_compressed(file, **{split: p.astype(np.float16) for split, p in probabilities.items()})  # type: ignore[arg-type]
    os.replace(arrays.with_suffix(".npz.tmp"), arrays)
    made_of = content["made_of"]
    head = {"id": cell.id, **dataclasses.asdict(cell), "config_hash": short_hash(made_of)} | dict(content)
    write_text(path, _one_line_a_row(head))
    if former is not None:
        with (Path(out) / REPLACED).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"id": former["id"], "config_hash": former.get("config_hash")}) + "\n")
    return path


def num_replaced(out: str | Path) -> int:
    """How many finished cells of the folder were made again."""
    path = Path(out) / REPLACED
    return len(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else 0


def read_cells(out: str | Path) -> list[dict[str, Any]]:
    """All finished cells of a folder, sorted by id. InputError for a file that is none."""
    return [read_cell(path) for path in sorted((Path(out) / FOLDER).glob("*.json"))]


def take_up(out: str | Path, results: str | Path) -> int:
    """Copy finished cells that `results` has and `out` lacks, how many; and what stands beside them there."""
    there = {path.name for path in (Path(out) / FOLDER).glob("*.json")}
    lacking = [path for path in sorted((Path(results) / FOLDER).glob("*.json")) if path.name not in there]
    for path in lacking:
        read_cell(path)
        _copy(path, Path(out) / FOLDER)
    for name in (SCORED, REPLACED):
        if (Path(results) / name).is_file() and not (Path(out) / name).is_file():
            _copy(Path(results) / name, Path(out))
    return len(lacking)


def publish(out: str | Path, results: str | Path, names: Sequence[str]) -> None:
    """Put the finished cells and the named files of `out` into `results`."""
    for path in sorted((Path(out) / FOLDER).glob("*.json")):
        _copy(path, Path(results) / FOLDER)
    for name in (SCORED, *names):
        _copy(Path(out) / name, Path(results))
    if (Path(out) / REPLACED).is_file():
        _copy(Path(out) / REPLACED, Path(results))


def _copy(path: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{path.name}.tmp"
    shutil.copyfile(path, temporary)
    os.replace(temporary, folder / path.name)


def read_cell(path: str | Path) -> dict[str, Any]:
    """One finished cell."""
    try:
        content = json.loads(read_file(path).read_text(encoding="utf-8"))
        lacking = [name for name in NEEDED if name not in content]
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: cannot be read as a cell ({error}); remove it, and it is made again") from error
    if lacking:
        raise InputError(f"{path}: has no '{lacking[0]}'; remove it, and the cell is made again")
    return content


def stale(stored: Mapping[str, Any], made_of: Mapping[str, Any]) -> list[str]:
    """What a stored cell was made of otherwise: dotted names; empty where it still counts."""
    return differences(stored["made_of"], dict(made_of), defaults())


def predicted_classes(content: Mapping[str, Any], split: str = "test") -> np.ndarray:
    """The predicted class [N] of every scored record, in the order of scored.parquet."""
    return np.frombuffer(content["predicted"][split].encode(), np.uint8) - ord("0")


def digits(probabilities: np.ndarray) -> str:
    """The predicted classes of [N, C] probabilities, one digit each."""
    assert probabilities.shape[1] <= 10, "one digit a class"
    return "".join(map(str, probabilities.argmax(1).tolist()))


def compact_rows(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of metrics.json without fields that are null, numbers at six digits."""
    return [
        {k: round(v, KEPT_DIGITS) if isinstance(v, float) else v for k, v in row.items() if v is not None}
        for row in rows
    ]


def full_rows(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a cell with every key of metrics.json."""
    return [{name: row.get(name) for name in ROW_KEYS} for row in content["results"]]


def write_scored(out: str | Path, records: RecordSet) -> None:
    """Write what the scored records are: the truth behind `predicted`."""
    table = pa.Table.from_pylist(
        [
            {n: f.get(n) for n in SCORED_FIELDS} | {"split": str(s)}
            for f, s in zip(records.fields, records.splits, strict=True)
        ]
    )
    path = Path(out) / SCORED
    temporary = path.with_name(path.name + ".tmp")
    pq.write_table(table, temporary, compression="zstd")
    os.replace(temporary, path)


def read_scored(out: str | Path) -> pa.Table:
    """The scored records, in the order of `predicted`; InputError where they are not there."""
    return pq.read_table(read_file(Path(out) / SCORED))


def _one_line_a_row(content: Mapping[str, Any]) -> str:
    """JSON whose lists of rows have one row a line: readable, and small differences in version control."""
    parts = []
    for name, value in content.items():
        told = _rows(value) if _is_rows(value) else json.dumps(value, ensure_ascii=False, allow_nan=False)
        parts.append(f" {json.dumps(name)}: {told}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _is_rows(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and bool(value) and isinstance(value[0], Mapping)


def _rows(rows: Sequence[Mapping[str, Any]]) -> str:
    told = ",\n".join("  " + json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
    return f"[\n{told}\n ]"
