"""MILK10k as its publisher ships it: Metadata, GroundTruth and Supplement tables, and the images.

`table` is the Metadata file (two rows a lesion: dermoscopic and clinical); the other two lie beside it under their
published names or are named by `ground_truth` and `supplement`. The images become the data sets Milk10k_dermo and
Milk10k_clinic; a pair keeps its lesion id and so its group. The diagnosis is the supplement's full text. The ground
truth only checks it: where the text's class cannot belong to the ground truth's group, the row is counted.
"""

from __future__ import annotations

from pathlib import Path

from dermfm.config import InputError, nearest
from dermfm.records.adapters.generic import MILK10K_SCALE
from dermfm.records.adapters.tables import NO_PATH, Draft, check_source, finish
from dermfm.records.csvtable import Row, check_unique, number, read_rows, sex, site
from dermfm.records.source import Losses, Reading, SourceConfig
from dermfm.records.table import Record
from dermfm.records.vocabulary import tidy

COLUMNS = ("lesion_id", "image_type", "isic_id", "age_approx", "sex", "skin_tone_class", "site")
DATASETS = {"dermoscopic": "Milk10k_dermo", "clinical": "Milk10k_clinic"}
# Labels that each column of the ground truth may have; BEN_OTH, INF and MAL_OTH are outside the eight classes.
GROUPS: dict[str, set[int | None]] = {
    "AKIEC": {4, 7},
    "BCC": {5},
    "BEN_OTH": {None},
    "BKL": {0},
    "DF": {1},
    "INF": {None},
    "MAL_OTH": {None},
    "MEL": {6},
    "NV": {2},
    "SCCKA": {7},
    "VASC": {3},
}
LICENCE = "CC BY-NC (MILK study team)"
DISAGREE = "diagnosis and ground truth disagree"
NOT_ONE_GROUP = "lesions of which the ground truth names no group or several, not compared"


def read(source: SourceConfig, reading: Reading) -> list[Record]:
    """Records of both modalities whose images exist below `images`."""
    check_source(source)
    losses = reading.losses
    rows = read_rows(source.table, COLUMNS, source.layout, losses)
    check_unique(source.table, (row["isic_id"] for row in rows), "isic_id")
    texts = _diagnoses(_beside(source, source.supplement, "Supplement"), source.layout)
    truth = _ground_truth(_beside(source, source.ground_truth, "GroundTruth"), source.layout, losses)
    drafts = []
    for row in rows:
        text = texts.get(row["isic_id"])
        drafts.append(Draft(_record(source, row, text), [text]))
    records = finish(source, drafts, losses)
    for record in records:
        _compare(record, texts.get(record.source_id), truth.get(record.lesion_id or ""), losses)
    return records


def _compare(record: Record, text: str | None, group: str | None, losses: Losses) -> None:
    if text is None:
        losses.add("images without a row in the supplement", record.source_id)
    if group is not None and record.label not in GROUPS[group]:
        losses.add(DISAGREE, f"{record.source_id}: {text} / {group}")


def _record(source: SourceConfig, row: Row, text: str | None) -> Record:
    tone = number(row["skin_tone_class"])
    modality = _modality(source, row)
    return Record(
        dataset=DATASETS[modality],
        source_id=row["isic_id"],
        path=NO_PATH,
        modality=modality,
        class_text=tidy((text or "").casefold()),
        subclass_text=tidy((text or "").casefold()),
        lesion_id=row["lesion_id"] or None,
        age=number(row["age_approx"]),
        sex=sex(row["sex"]),
        site=site(row["site"]),
        skin_tone_scale=MILK10K_SCALE if tone is not None else None,
        skin_tone_value=tone,
        licence=LICENCE,
    )


def _modality(source: SourceConfig, row: Row) -> str:
    word = row["image_type"].split(":")[0].strip().casefold()
    if word not in DATASETS:
        raise InputError(
            f"{source.table}: {row['isic_id']}: image_type '{row['image_type']}'; {nearest(word, DATASETS)}"
        )
    return word


def _beside(source: SourceConfig, given: str, kind: str) -> Path:
    """The table of `kind`: the given one, else the only file named *<kind>*.csv beside the metadata."""
    if given:
        return Path(given)
    folder = Path(source.table).parent
    files = sorted(path for path in folder.glob(f"*{kind}*.csv"))
    if len(files) != 1:
        key = {"Supplement": "supplement", "GroundTruth": "ground_truth"}[kind]
        raise InputError(f"{folder}: {len(files)} files named *{kind}*.csv; give {key}=<file>")
    return files[0]


def _diagnoses(path: Path, layout: str) -> dict[str, str]:
    rows = read_rows(path, ("isic_id", "diagnosis_full"), layout)
    check_unique(path, (row["isic_id"] for row in rows), "isic_id")
    return {row["isic_id"]: row["diagnosis_full"] for row in rows}


def _ground_truth(path: Path, layout: str, losses: Losses) -> dict[str, str]:
    """lesion id → the only column of the ground truth that is 1; lesions of none or several are counted."""
    rows = read_rows(path, ("lesion_id", *GROUPS), layout)
    check_unique(path, (row["lesion_id"] for row in rows), "lesion_id")
    truth = {}
    for row in rows:
        named = [name for name in GROUPS if number(row[name]) == 1]
        if len(named) == 1:
            truth[row["lesion_id"]] = named[0]
        else:
            losses.add(NOT_ONE_GROUP, f"{row['lesion_id']}: {', '.join(named) or 'none'}")
    return truth
