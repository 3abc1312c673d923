"""records.parquet: one row an image. Its columns, and reading and writing it.

Paths in `image` are relative to the folder of the file. Columns named `measured_*` may follow the fixed ones.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dermfm.config import InputError, nearest, read_file, short_hash
from dermfm.records.measure.columns import SCHEMA as MEASURED_SCHEMA
from dermfm.records.vocabulary import MALIGNANCIES, MODALITIES
from shards.files import replacing

SPLITS = ["train", "valid", "test"]
MEASURED = "measured_"
MEASURED_TYPES = {field.name: field.type for field in MEASURED_SCHEMA}


@dataclasses.dataclass(kw_only=True)
class Record:
    """One image with what its data set says about it. None means unknown.

    `path` is where the image lies now; the fields from `split` on that adapters leave empty are filled by
    `dermfm.records.build`. `class_label` is the class that the diagnosis texts name: a label that differs from it is
    a conflict. `given_split` is the publisher's own split. `measured` holds attributes measured from the pixels, by
    name without the prefix `measured_` of their columns; a record that lacks one has null there.
    """

    dataset: str
    source_id: str
    path: Path
    modality: str
    label: int | None = None
    class_label: int | None = None
    malignancy: str | None = None
    class_text: str | None = None
    subclass_text: str | None = None
    findings: str | None = None
    matched_class: str | None = None
    matched_subclass: str | None = None
    lesion_id: str | None = None
    patient_id: str | None = None
    age: float | None = None
    sex: str | None = None
    site: str | None = None
    fitzpatrick: int | None = None
    skin_tone_scale: str | None = None
    skin_tone_value: float | None = None
    licence: str | None = None
    given_split: str | None = None
    test_only: bool = False
    split: str = ""
    group_id: str = ""
    phash: str | None = None
    width: int = 0
    height: int = 0
    measured: dict[str, object] = dataclasses.field(default_factory=dict)

    @property
    def record_id(self) -> str:
        """16 hex digits of the sha256 of [dataset, source id]."""
        return short_hash([self.dataset, self.source_id])

    @property
    def has_conflict(self) -> bool:
        """Whether label and diagnosis texts name different classes."""
        return self.label is not None and self.class_label is not None and self.label != self.class_label


SCHEMA = pa.schema(
    [
        pa.field("record_id", pa.string(), nullable=False),
        pa.field("dataset", pa.string(), nullable=False),
        pa.field("source_id", pa.string(), nullable=False),
        pa.field("image", pa.string(), nullable=False),
        pa.field("modality", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("label", pa.int64()),
        pa.field("malignancy", pa.string()),
        pa.field("class", pa.string()),
        pa.field("subclass", pa.string()),
        pa.field("findings", pa.string()),
        pa.field("matched_class", pa.string()),
        pa.field("matched_subclass", pa.string()),
        pa.field("lesion_id", pa.string()),
        pa.field("patient_id", pa.string()),
        pa.field("group_id", pa.string(), nullable=False),
        pa.field("age", pa.float64()),
        pa.field("sex", pa.string()),
        pa.field("site", pa.string()),
        pa.field("fitzpatrick", pa.int64()),
        pa.field("skin_tone_scale", pa.string()),
        pa.field("skin_tone_value", pa.float64()),
        pa.field("licence", pa.string()),
        pa.field("phash", pa.string()),
        pa.field("width", pa.int64()),
        pa.field("height", pa.int64()),
    ]
)
RECORD_COLUMNS: list[str] = SCHEMA.names
_FIELD_OF = {"class": "class_text", "subclass": "subclass_text"}


def to_table(records: Sequence[Record], folder: Path) -> pa.Table:
    """Records in order as a table; `image` becomes relative to `folder`, where the file will lie."""
    real = folder.resolve()  # the system follows a link before it goes up, relpath alone would not
    columns: dict[str, list[object]] = {}
    for name in RECORD_COLUMNS:
        if name == "image":
            columns[name] = [Path(os.path.relpath(r.path, real)).as_posix() for r in records]
        else:
            columns[name] = [getattr(r, _FIELD_OF.get(name, name)) for r in records]
    table = pa.table(columns, schema=SCHEMA)
    for name in dict.fromkeys(name for record in records for name in record.measured):
        kind = MEASURED_TYPES.get(MEASURED + name)
        values = [record.measured.get(name) for record in records]
        table = table.append_column(MEASURED + name, pa.array(values, type=kind))
    return table


def read_records(path: str | Path) -> pa.Table:
    """records.parquet with SCHEMA's columns first and `measured_*` columns after them.

    Raises InputError for a file that is missing, is no Parquet, lacks a column, has one of a wrong type, an id twice,
    or a value outside its vocabulary.
    """
    path = read_file(path)
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: is not a Parquet file; `dermfm records` writes one") from error
    measured = [name for name in table.column_names if name.startswith(MEASURED)]
    missing = [name for name in RECORD_COLUMNS if name not in table.column_names]
    if missing:
        raise InputError(f"{path}: lacks the column '{missing[0]}'; {nearest(missing[0], table.column_names)}")
    fixed = table.select(RECORD_COLUMNS)
    for field, found in zip(SCHEMA, fixed.schema, strict=True):
        if field.type != found.type and found.type != pa.null():
            raise InputError(f"{path}: column '{field.name}' has the type {found.type}; {field.type} is needed")
    _check_values(fixed, str(path))
    columns = [fixed.column(f.name).cast(f.type) for f in SCHEMA] + [table.column(name) for name in measured]
    fields = list(SCHEMA) + [table.schema.field(name) for name in measured]
    return pa.table(columns, schema=pa.schema(fields, metadata=table.schema.metadata))


def write_records(table: pa.Table, path: str | Path) -> None:
    """Write the table under a temporary name and rename it into place; ids and vocabularies are checked before."""
    path = Path(path)
    _check_values(table, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def _check_values(table: pa.Table, origin: str) -> None:
    ids = table.column("record_id").to_pylist()
    if len(set(ids)) != len(ids):
        seen: set[str] = set()
        twice = next(i for i in ids if i in seen or seen.add(i))  # type: ignore[func-returns-value]
        raise InputError(f"{origin}: the record_id {twice} occurs more than once; ids must be unique")
    allowed: dict[str, list[object]] = {
        "split": [*SPLITS],
        "modality": [*MODALITIES],
        "malignancy": [*MALIGNANCIES, None],
        "label": [*range(8), None],
        "sex": ["male", "female", None],
    }
    for name, valid in allowed.items():
        wrong = set(table.column(name).unique().to_pylist()) - set(valid)
        if wrong:
            raise InputError(f"{origin}: column '{name}' holds '{wrong.pop()}'; valid: {', '.join(map(str, valid))}")
    if table.column("group_id").null_count or "" in table.column("group_id").unique().to_pylist():
        raise InputError(f"{origin}: group_id must never be empty")
