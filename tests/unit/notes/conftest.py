"""Records of a few images, as `dermfm records` would write them, without any image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dermfm.config import short_hash
from dermfm.records.table import SCHEMA, write_records

NAMES = {
    2: ("benign", "nevus", "nevus, nos, compound", "melanocytic / benign nevus", "benign melanocytic nevus"),
    5: ("malignant", "basal cell carcinoma", "basal cell carcinoma", "basal cell cancer", "basal cell carcinoma"),
    6: ("malignant", "melanoma in situ", "melanoma in situ", "melanoma", "melanoma"),
}


def make_record(source_id: str, label: int = 2, **fields: Any) -> dict[str, Any]:
    """One valid row of records.parquet."""
    malignancy, named, detail, matched, matched_detail = NAMES[label]
    record: dict[str, Any] = dict.fromkeys(SCHEMA.names)
    record |= {"dataset": "HAM10000", "source_id": source_id, "image": f"{source_id}.jpg", "modality": "dermoscopic"}
    record |= {"split": "train", "label": label, "malignancy": malignancy, "class": named, "subclass": detail}
    record |= {"matched_class": matched, "matched_subclass": matched_detail, "age": 55.0, "sex": "female"}
    record |= {"site": "back", "group_id": source_id, "width": 64, "height": 64, **fields}
    return {**record, "record_id": short_hash([record["dataset"], source_id])}


@pytest.fixture
def records_file(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes rows to records.parquet and returns its path."""

    def write(rows: list[dict[str, Any]] | None = None) -> Path:
        rows = rows if rows is not None else [make_record(f"i{k}", [2, 5, 6][k % 3]) for k in range(30)]
        path = tmp_path / "records.parquet"
        write_records(pa.Table.from_pylist(rows, schema=SCHEMA), path)
        return path

    return write


@pytest.fixture
def record() -> Callable[..., dict[str, Any]]:
    """`make_record`."""
    return make_record
