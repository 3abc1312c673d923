"""HAM10000 as its publisher ships it: HAM10000_metadata.csv and folders of ISIC_*.jpg (any depth below `images`).

The code `akiec` joins actinic keratosis and intraepithelial carcinoma; `diagnoses.yaml` lists the images that the ISIC
Archive diagnoses as squamous cell carcinoma.
"""

from __future__ import annotations

from dermfm.records.adapters.tables import NO_PATH, Draft, check_source, finish
from dermfm.records.csvtable import Row, check_unique, number, read_rows, sex, site
from dermfm.records.source import Reading, SourceConfig
from dermfm.records.table import Record

COLUMNS = ("lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization")
DATASET = "HAM10000"
# Names of the seven codes in the data set's paper (Tschandl et al. 2018, doi:10.1038/sdata.2018.161, table 2).
NAMES = {
    "akiec": "actinic keratosis",
    "bcc": "basal cell carcinoma",
    "bkl": "benign keratosis",
    "df": "dermatofibroma",
    "mel": "melanoma",
    "nv": "melanocytic nevus",
    "vasc": "vascular lesion",
}
LICENCE = "CC BY-NC 4.0"


def read(source: SourceConfig, reading: Reading) -> list[Record]:
    """Records of HAM10000's own table whose images exist below `images`."""
    check_source(source)
    rows = read_rows(source.table, COLUMNS, source.layout, reading.losses)
    check_unique(source.table, (row["image_id"] for row in rows), "image_id")
    return finish(source, [Draft(_record(row), [row["dx"]]) for row in rows], reading.losses)


def _record(row: Row) -> Record:
    name = NAMES.get(row["dx"], row["dx"])
    return Record(
        dataset=DATASET,
        source_id=row["image_id"],
        path=NO_PATH,
        modality="dermoscopic",
        class_text=name,
        subclass_text=name,
        lesion_id=row["lesion_id"] or None,
        age=number(row["age"]),
        sex=sex(row["sex"]),
        site=site(row["localization"]),
        licence=LICENCE,
    )
