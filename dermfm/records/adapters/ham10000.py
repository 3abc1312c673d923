"""HAM10000 as its publisher ships it: HAM10000_metadata.csv and folders of ISIC_*.jpg (any depth below `images`).

The code `akiec` joins actinic keratosis and intraepithelial carcinoma; `diagnoses.yaml` lists the images that the ISIC
Archive diagnoses as squamous cell carcinoma.
"""

from __future__ import annotations

from dermfm.records.adapters.tables import apply_diagnosis, check_source, with_images
from dermfm.records.csvtable import check_unique, number, read_rows, sex, site
from dermfm.records.images import ImageFolder
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
    losses = reading.losses
    rows = read_rows(source.table, COLUMNS, source.layout)
    check_unique(source.table, (row["image_id"] for row in rows), "image_id")
    found = with_images(source, ImageFolder(source.images), ((DATASET, r["image_id"]) for r in rows), losses)
    records = []
    for row in rows:
        path = found.get((DATASET, row["image_id"]))
        if path is None:
            continue
        name = NAMES.get(row["dx"], row["dx"])
        record = Record(
            dataset=DATASET,
            source_id=row["image_id"],
            path=path,
            modality="dermoscopic",
            class_text=name,
            subclass_text=name,
            lesion_id=row["lesion_id"] or None,
            age=number(row["age"]),
            sex=sex(row["sex"]),
            site=site(row["localization"]),
            licence=source.licence or LICENCE,
            test_only=source.is_test_only(DATASET),
        )
        records.append(apply_diagnosis(record, [row["dx"]], losses))
    return records
