"""The reference study's CSV folder: <table>/<data set>/{classes_subclasses_metadata_mapping,labels*}.csv, no headers.

`table` is the folder of all data sets or of one. The mapping's columns are id, label, malignancy, class, subclass,
findings, matched class, matched subclass; labels_{train,valid,test}.csv hold the study's split (splits=given), which
has leaks of its own: an image in two files is counted and taken for the later one (test), an image in none is left out.
Labels come from the vocabulary, which gives the study's label for every row (a test says so); what differs is counted.
The ids of PAD_UFES_20 there are those of the ISIC Archive. Data sets without any image are left out and counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from dermfm.config import InputError, nearest
from dermfm.records.adapters.tables import NO_PATH, Draft, check_datasets, finish
from dermfm.records.csvtable import check_unique, looks_like
from dermfm.records.images import ImageFolder
from dermfm.records.source import Losses, Reading, SourceConfig
from dermfm.records.study_split import headless_lines
from dermfm.records.table import Record
from dermfm.records.vocabulary import CLASSES, correction, find_diagnosis, tidy

MAPPING = "classes_subclasses_metadata_mapping.csv"
# Derm7pt's ids there are those of its dermoscopic files. MRA_MIDAS holds both modalities, which its table does not tell
# apart; the study counts it as clinical.
CLINICAL = ("DermNet", "FLUO_SC", "MRA_MIDAS", "Fitzpatrick17k", "PAD_UFES_20", "SD198", "Milk10k_clinic")
DERMOSCOPIC = (
    "BCN20000",
    "Derm7pt",
    "HAM10000",
    "Hospital_Italiano_Buenos_Aires",
    "MSK",
    "Milk10k_dermo",
    "SKINL2",
    "derm12345",
)
LABELS = {str(label) for label in range(len(CLASSES))}
DISAGREE = "study's labels that the vocabulary does not give"
NO_IMAGES = "data sets of the study without images here, left out (rows)"


def read(source: SourceConfig, reading: Reading) -> list[Record]:
    """Records of all data sets of the folder that have images."""
    for key in ("table", "images"):
        if not getattr(source, key):
            raise InputError(f"layout=reference needs {key}=<folder>")
    folders = _folders(Path(source.table))
    check_datasets(source, {*CLINICAL, *DERMOSCOPIC, *folders})
    images = ImageFolder(source.images)
    drafts = []
    for name, folder in folders.items():
        if source.is_wanted(name):
            drafts += _with_any_image(images, list(_drafts(source, name, folder, reading.losses)), reading.losses)
    if not drafts:
        raise InputError(f"images={source.images}: holds no image that a table below {source.table} names")
    split_tables = source.split_tables or str(next(iter(folders.values())).resolve().parent)
    source = dataclasses.replace(source, split_tables=split_tables)
    return finish(source, drafts, reading.losses, known=(*CLINICAL, *DERMOSCOPIC))


def _folders(table: Path) -> dict[str, Path]:
    """Data set → its folder."""
    if table.is_file():
        raise InputError(f"{table}: is a file; layout=reference takes the folder that holds it")
    folders = [table] if (table / MAPPING).is_file() else [path.parent for path in sorted(table.glob(f"*/{MAPPING}"))]
    if not folders:
        beside = [p.name for p in table.parent.iterdir() if p.name != table.name] if table.parent.is_dir() else []
        raise InputError(f"{table}: holds no {MAPPING}, in it or in a folder a data set; {nearest(table.name, beside)}")
    return {folder.resolve().name: folder for folder in folders}


def _drafts(source: SourceConfig, dataset: str, folder: Path, losses: Losses) -> Iterator[Draft]:
    rows = list(headless_lines(folder / MAPPING, 8, losses))
    _check_table(folder / MAPPING, rows)
    check_unique(folder / MAPPING, (row[0] for row in rows), "id")
    for source_id, label, _, class_text, subclass_text, findings, _, _ in rows:
        _compare(dataset, source_id, label, [subclass_text, class_text], losses)
        record = Record(
            dataset=dataset,
            source_id=source_id,
            path=NO_PATH,
            modality=source.modality or ("clinical" if dataset in CLINICAL else "dermoscopic"),
            class_text=tidy(class_text),
            subclass_text=tidy(subclass_text),
            findings=tidy(findings),
        )
        yield Draft(record, [subclass_text, class_text])


def _check_table(path: Path, rows: list[list[str]]) -> None:
    """InputError for an empty table, or one whose second column is not the study's label."""
    if not rows:
        raise InputError(f"{path}: is empty")
    bad = next((row for row in rows if row[1] not in LABELS), None)
    if bad is not None:
        kind = looks_like(bad)
        hint = f"it looks like {kind}" if kind else "a line is id, label, malignancy, class, subclass, …, no header"
        raise InputError(f"{path}: {bad[0]}: the label '{bad[1]}' is not valid, 0 to {len(CLASSES) - 1}; {hint}")


def _compare(dataset: str, source_id: str, label: str, texts: list[str], losses: Losses) -> None:
    corrected = correction(dataset, source_id)
    found = find_diagnosis(dataset, [corrected] if corrected else texts)
    if found is None or str(found.label) != label:
        losses.add(DISAGREE, f"{dataset}/{source_id}: {texts[0]}, label {label}")


def _with_any_image(images: ImageFolder, drafts: list[Draft], losses: Losses) -> list[Draft]:
    if any(images.find(draft.record.dataset, draft.record.source_id) is not None for draft in drafts):
        return drafts
    dataset = drafts[0].record.dataset if drafts else ""
    for _ in drafts:
        losses.add(NO_IMAGES, dataset)
    return []
