"""MRA-MIDAS as its publisher ships it: release_midas.xlsx (or its CSV) and the images of `midas_file_name`.

Several photographs of a lesion: at 1 foot and 6 inches (clinical) and through a dermatoscope. The diagnosis is that of
the biopsy (`midas_path`); rows of control skin (`midas_iscontrol`) show no diagnosed lesion and are left out. A row
without a biopsy keeps its image without a label: clinical impressions are no diagnosis.
"""

from __future__ import annotations

from pathlib import PurePath

from dermfm.config import InputError, nearest
from dermfm.records.adapters.tables import NO_PATH, Draft, check_source, finish
from dermfm.records.csvtable import Row, check_unique, fitzpatrick, number, read_rows, sex, site
from dermfm.records.source import Reading, SourceConfig
from dermfm.records.table import Record
from dermfm.records.vocabulary import tidy

COLUMNS = (
    "midas_record_id",
    "midas_file_name",
    "midas_iscontrol",
    "midas_distance",
    "midas_location",
    "midas_path",
    "midas_gender",
    "midas_age",
    "midas_fitzpatrick",
)
DATASET = "MRA_MIDAS"
MODALITY_OF = {"dscope": "dermoscopic", "1ft": "clinical", "6in": "clinical", "n/a - virtual": "clinical"}
LICENCE = "Stanford AIMI research use agreement (non-commercial)"
CONTROL = "rows of control skin, left out"


def read(source: SourceConfig, reading: Reading) -> list[Record]:
    """Records of the own table whose images exist below `images`."""
    check_source(source)
    rows = read_rows(source.table, COLUMNS, source.layout, reading.losses)
    lesions = [row for row in rows if row["midas_iscontrol"].casefold() != "yes"]
    controls = [row["midas_file_name"] for row in rows if row["midas_iscontrol"].casefold() == "yes"]
    for name in controls:
        reading.losses.add(CONTROL, name)
    check_unique(source.table, (PurePath(row["midas_file_name"]).stem for row in lesions), "midas_file_name")
    drafts = [Draft(_record(source, row), [_diagnosis(row)]) for row in lesions]
    stems = {PurePath(name).stem for name in controls}
    return finish(source, drafts, reading.losses, is_other=lambda path: path.stem in stems)


def _diagnosis(row: Row) -> str | None:
    return None if row["midas_path"] in ("", "0") else tidy(row["midas_path"].casefold())


def _record(source: SourceConfig, row: Row) -> Record:
    distance = row["midas_distance"].casefold()
    if distance not in MODALITY_OF:
        raise InputError(
            f"{source.table}: {row['midas_file_name']}: midas_distance '{distance}'; {nearest(distance, MODALITY_OF)}"
        )
    return Record(
        dataset=DATASET,
        source_id=PurePath(row["midas_file_name"]).stem,
        path=NO_PATH,
        modality=MODALITY_OF[distance],
        class_text=_diagnosis(row),
        subclass_text=_diagnosis(row),
        findings=tidy(row.get("midas_pathreport")),
        patient_id=row["midas_record_id"] or None,
        age=number(row["midas_age"]),
        sex=sex(row["midas_gender"]),
        site=site(row["midas_location"]),
        fitzpatrick=fitzpatrick(row["midas_fitzpatrick"]),
        licence=LICENCE,
    )
