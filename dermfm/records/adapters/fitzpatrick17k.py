"""Fitzpatrick17k as its publisher ships it: fitzpatrick17k.csv and images <md5hash>.jpg.

The images have to be fetched from the addresses in the table. Labels come from the source atlases; rows that the
publisher's own check marks as wrongly labelled keep their text and get no label.
"""

from __future__ import annotations

from dermfm.records.adapters.tables import NO_PATH, Draft, check_source, finish
from dermfm.records.csvtable import Row, check_unique, fitzpatrick, read_rows
from dermfm.records.source import Reading, SourceConfig
from dermfm.records.table import Record
from dermfm.records.vocabulary import tidy

COLUMNS = ("md5hash", "fitzpatrick_scale", "label")
DATASET = "Fitzpatrick17k"
LICENCE = "CC BY-NC-SA 3.0"
WRONG = "rows that the publisher marks as wrongly labelled, kept without a label"


def read(source: SourceConfig, reading: Reading) -> list[Record]:
    """Records of the own table whose images exist below `images`."""
    check_source(source)
    rows = read_rows(source.table, COLUMNS, source.layout, reading.losses)
    check_unique(source.table, (row["md5hash"] for row in rows), "md5hash")
    drafts = []
    for row in rows:
        is_wrong = row.get("qc", "").startswith("3")
        if is_wrong:
            reading.losses.add(WRONG, row["md5hash"])
        drafts.append(Draft(_record(row), None if is_wrong else [row["label"]]))
    return finish(source, drafts, reading.losses)


def _record(row: Row) -> Record:
    return Record(
        dataset=DATASET,
        source_id=row["md5hash"],
        path=NO_PATH,
        modality="clinical",
        class_text=tidy(row["label"]),
        subclass_text=tidy(row["label"]),
        fitzpatrick=fitzpatrick(row["fitzpatrick_scale"]),
        licence=LICENCE,
    )
