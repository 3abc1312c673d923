"""Derm7pt as its publisher ships it: meta/meta.csv, meta/{train,valid,test}_indexes.csv and images/<folder>/<file>.

One row a case with a dermoscopic image (`derm`) and a clinical one (`clinic`): two records of one lesion. The source id
is the file's name without suffix, as in the reference study. The index files hold row numbers of meta.csv from 0; they
are read for splits=given. The seven-point checklist becomes `findings`.
"""

from __future__ import annotations

from pathlib import Path, PurePath

from dermfm.config import InputError
from dermfm.records.adapters.tables import NO_PATH, Draft, check_source, finish
from dermfm.records.csvtable import Row, check_unique, number, read_rows, sex, site
from dermfm.records.source import Losses, Reading, SourceConfig
from dermfm.records.splits import TWICE
from dermfm.records.table import SPLITS, Record
from dermfm.records.vocabulary import tidy

CRITERIA = (
    "pigment_network",
    "streaks",
    "pigmentation",
    "regression_structures",
    "dots_and_globules",
    "blue_whitish_veil",
    "vascular_structures",
)
COLUMNS = ("case_num", "diagnosis", "derm", "clinic", "sex", "location", *CRITERIA)
DATASET = "Derm7pt"
MODALITY_OF = {"derm": "dermoscopic", "clinic": "clinical"}
LICENCE = "research use only (derm.cs.sfu.ca)"
SHARED = "images that several cases name: one record, and the cases are one lesion"


def read(source: SourceConfig, reading: Reading) -> list[Record]:
    """Two records a case whose images exist below `images`."""
    check_source(source)
    losses = reading.losses
    rows = read_rows(source.table, COLUMNS, source.layout, losses)
    check_unique(source.table, (row["case_num"] for row in rows), "case_num")
    splits = _given_splits(Path(source.table), len(rows), losses) if source.splits == "given" else {}
    lesion_of: dict[str, str] = {}
    drafts = []
    for number_of_row, row in enumerate(rows):
        names = {column: PurePath(row[column].replace("\\", "/")).stem for column in MODALITY_OF if row[column]}
        lesion = next((lesion_of[name] for name in names.values() if name in lesion_of), f"case {row['case_num']}")
        for column, name in names.items():
            if name in lesion_of:
                losses.add(SHARED, name)
                continue
            lesion_of[name] = lesion
            record = _record(row, name, MODALITY_OF[column], lesion)
            record.given_split = splits.get(number_of_row)
            drafts.append(Draft(record, [row["diagnosis"]], image=row[column]))
    return finish(source, drafts, losses)


def _record(row: Row, name: str, modality: str, lesion: str) -> Record:
    stated = [f"{column.replace('_', ' ')}: {row[column]}" for column in CRITERIA if row[column]]
    return Record(
        dataset=DATASET,
        source_id=name,
        path=NO_PATH,
        modality=modality,
        class_text=tidy(row["diagnosis"]),
        subclass_text=tidy(row["diagnosis"]),
        findings="; ".join(stated) or None,
        lesion_id=lesion,
        sex=sex(row["sex"]),
        site=site(row["location"]),
        licence=LICENCE,
    )


def _given_splits(table: Path, num_rows: int, losses: Losses) -> dict[int, str]:
    """Row number → split from the index files beside the table; the last split that names a row counts."""
    splits: dict[int, str] = {}
    for split in SPLITS:
        path = table.parent / f"{split}_indexes.csv"
        for row in read_rows(path, ("indexes",), "derm7pt"):
            index = number(row["indexes"])
            if index is None or not index.is_integer() or not 0 <= index < num_rows:
                raise InputError(f"{path}: '{row['indexes']}' is no row of {table}; valid: 0 to {num_rows - 1}")
            if int(index) in splits:
                losses.add(TWICE, f"{DATASET}: row {int(index)} in {splits[int(index)]} and {split}")
            splits[int(index)] = split
    return splits
