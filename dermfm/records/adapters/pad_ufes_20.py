"""PAD-UFES-20 as its publisher ships it: metadata.csv and folders of PAT_<patient>_<lesion>_<image>.png.

Smartphone photographs of lesions; six codes, of which SCC includes Bowen's disease (Pacheco et al. 2020,
doi:10.1016/j.dib.2020.106221). The lesion id is unique only together with the patient's.
"""

from __future__ import annotations

from pathlib import PurePath

from dermfm.records.adapters.tables import NO_PATH, Draft, check_source, finish
from dermfm.records.csvtable import Row, check_unique, fitzpatrick, number, read_rows, sex, site
from dermfm.records.source import Reading, SourceConfig
from dermfm.records.table import Record

COLUMNS = ("patient_id", "lesion_id", "img_id", "diagnostic", "age", "gender", "fitspatrick", "region")
DATASET = "PAD_UFES_20"
NAMES = {
    "ACK": "actinic keratosis",
    "BCC": "basal cell carcinoma",
    "MEL": "melanoma",
    "NEV": "nevus",
    "SCC": "squamous cell carcinoma",
    "SEK": "seborrheic keratosis",
}
LICENCE = "CC BY 4.0"


def read(source: SourceConfig, reading: Reading) -> list[Record]:
    """Records of the own table whose images exist below `images`."""
    check_source(source)
    rows = read_rows(source.table, COLUMNS, source.layout, reading.losses)
    check_unique(source.table, (PurePath(row["img_id"]).stem for row in rows), "img_id")
    return finish(source, [Draft(_record(row), [row["diagnostic"]]) for row in rows], reading.losses)


def _record(row: Row) -> Record:
    name = NAMES.get(row["diagnostic"], row["diagnostic"])
    return Record(
        dataset=DATASET,
        source_id=PurePath(row["img_id"]).stem,
        path=NO_PATH,
        modality="clinical",
        class_text=name,
        subclass_text=name,
        lesion_id=f"{row['patient_id']}_{row['lesion_id']}" if row["lesion_id"] else None,
        patient_id=row["patient_id"] or None,
        age=number(row["age"]),
        sex=sex(row["gender"]),
        site=site(row["region"]),
        fitzpatrick=fitzpatrick(row["fitspatrick"]),
        licence=LICENCE,
    )
