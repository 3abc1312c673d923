"""A generic CSV table: one row an image, columns by name, possibly of several data sets.

Required: `sample_id`, and at least one of `label`, `subclass`, `class`, `diagnosis`. Also `dataset` and `modality`
(dermoscopic | clinical), unless the source names them. Optional: malignancy, findings, matched_class,
matched_subclass, lesion_id, patient_id, age, sex, site, fitzpatrick, skin_tone_class (MILK10k's scale) or
skin_tone_scale with skin_tone_value, licence, split (for splits=given). An empty cell means unknown. `label` is 0–7 in
the order of `vocabulary.CLASSES`; where it is empty (or -1), the diagnosis texts decide. The image of a row is
`<images>/<dataset>/<sample_id>.jpg` or `<images>/<sample_id>.jpg` (or png, …).
"""

from __future__ import annotations

import re
from pathlib import Path

from dermfm.config import InputError, check_choice, nearest
from dermfm.records.adapters.tables import apply_diagnosis, check_source, with_images
from dermfm.records.csvtable import Row, check_unique, looks_like, number, read_rows, sex, site
from dermfm.records.images import ImageFolder
from dermfm.records.source import Losses, Reading, SourceConfig
from dermfm.records.table import SPLITS, Record
from dermfm.records.vocabulary import (
    CLASSES,
    MALIGNANCY_OF,
    MODALITIES,
    find_diagnosis,
    malignancy_word,
    tidy,
)

DIAGNOSIS_COLUMNS = ("subclass", "class", "diagnosis")
MILK10K_SCALE = "MILK10k 0-5"
PAD_ID = re.compile(r"PAT_(\d+)_(\d+)_(\d+)")


def read(source: SourceConfig, reading: Reading) -> list[Record]:
    """Records of a generic table. Raises InputError for what the module's docstring rules out."""
    check_source(source)
    losses = reading.losses
    required = ["sample_id"] + [name for name in ("dataset", "modality") if not getattr(source, name)]
    rows = read_rows(source.table, required, source.layout)
    header = rows[0].keys()
    if not {"label", *DIAGNOSIS_COLUMNS} & set(header):
        kind = looks_like(header)
        hint = f"it looks like {kind}" if kind else nearest("label", header)
        raise InputError(f"{source.table}: has none of the columns label, subclass, class, diagnosis; {hint}")
    names = [source.dataset or row["dataset"] for row in rows]
    check_unique(source.table, [f"{d}/{row['sample_id']}" for d, row in zip(names, rows, strict=True)], "sample_id")
    _check_datasets(source, set(names))
    chosen = [(d, row) for d, row in zip(names, rows, strict=True) if source.is_wanted(d)]
    images = ImageFolder(source.images)
    found = with_images(source, images, ((d, row["sample_id"]) for d, row in chosen), losses)
    return [
        _record(source, d, row, path, losses)
        for d, row in chosen
        if (path := found.get((d, row["sample_id"]))) is not None
    ]


def _check_datasets(source: SourceConfig, names: set[str]) -> None:
    for key, wanted in (("datasets", source.datasets), ("test_only", source.test_only)):
        unknown = sorted(set(wanted) - names)
        if unknown:
            raise InputError(f"{source.table}: has no data set '{unknown[0]}' ({key}); {nearest(unknown[0], names)}")


def _record(source: SourceConfig, dataset: str, row: Row, path: Path, losses: Losses) -> Record:
    cell = row.get
    where = f"{source.table}: {dataset}/{row['sample_id']}"
    record = Record(
        dataset=dataset,
        source_id=row["sample_id"],
        path=path,
        modality=source.modality or row["modality"],
        class_text=tidy(cell("class")),
        subclass_text=tidy(cell("subclass") or cell("diagnosis")),
        findings=tidy(cell("findings")),
        lesion_id=cell("lesion_id") or None,
        patient_id=cell("patient_id") or None,
        age=number(cell("age")),
        sex=sex(cell("sex")),
        site=site(cell("site")),
        licence=cell("licence") or source.licence or None,
        given_split=cell("split") or None,
        test_only=source.is_test_only(dataset),
    )
    _check_words(record, where)
    if (pad := PAD_ID.fullmatch(record.source_id)) is not None and record.patient_id is None:
        record.patient_id = f"PAT_{pad[1]}"
    _skin(record, row)
    _diagnosis(record, row, where, losses)
    return record


def _check_words(record: Record, where: str) -> None:
    try:
        check_choice("modality", record.modality, MODALITIES)
        if record.given_split:
            check_choice("split", record.given_split, SPLITS)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error


def _skin(record: Record, row: Row) -> None:
    fitzpatrick = number(row.get("fitzpatrick"))
    record.fitzpatrick = int(fitzpatrick) if fitzpatrick in (1, 2, 3, 4, 5, 6) else None
    if (value := number(row.get("skin_tone_value"))) is not None:
        record.skin_tone_scale, record.skin_tone_value = row.get("skin_tone_scale") or None, value
    elif (value := number(row.get("skin_tone_class"))) is not None:
        record.skin_tone_scale, record.skin_tone_value = MILK10K_SCALE, value


def _diagnosis(record: Record, row: Row, where: str, losses: Losses) -> None:
    """The table's own label where it has one, else the vocabulary's; the class that the texts name stands beside."""
    texts = [row.get(name) for name in DIAGNOSIS_COLUMNS]
    label = _label(row.get("label", ""), where)
    if label is None:
        apply_diagnosis(record, texts, losses)
        return
    found = find_diagnosis(record.dataset, texts)
    record.label = label
    record.class_label = found.class_label if found else None
    record.matched_class = CLASSES[found.class_label] if found else CLASSES[label]
    record.matched_subclass = found.subclass if found else None
    if (matched := row.get("matched_class")) in CLASSES:
        record.class_label, record.matched_class = CLASSES.index(matched), matched
    record.matched_subclass = tidy(row.get("matched_subclass")) or record.matched_subclass
    own = malignancy_word(row.get("malignancy"))
    record.malignancy = own or (found.malignancy if found else MALIGNANCY_OF[label])


def _label(text: str, where: str) -> int | None:
    value = number(text)
    if text == "" or value == -1:
        return None
    if value is None or value not in range(len(CLASSES)):
        raise InputError(f"{where}: the label '{text}' is not valid; 0 to 7, or empty where unknown")
    return int(value)
