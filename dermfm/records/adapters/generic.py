"""A generic CSV, Parquet or xlsx table: one row an image, columns by name, possibly of several data sets.

Required: `sample_id`, and at least one of `label`, `subclass`, `class`, `diagnosis`. Also `dataset` and `modality`
(dermoscopic | clinical), unless the source names them. Optional: malignancy, findings, matched_class,
matched_subclass, lesion_id, patient_id, age, sex, site, fitzpatrick, skin_tone_class (MILK10k's scale) or
skin_tone_scale with skin_tone_value, licence, split (for splits=given). An empty cell means unknown. `label` is 0–7 in
the order of `vocabulary.CLASSES`; where it is empty (or -1), the diagnosis texts decide. The image of a row is
`<images>/<dataset>/<sample_id>.jpg` or `<images>/<sample_id>.jpg` (or png, …).
"""

from __future__ import annotations

import re

from dermfm.config import InputError, check_choice, nearest
from dermfm.records.adapters.tables import NO_PATH, Draft, check_source, finish
from dermfm.records.csvtable import Row, check_unique, fitzpatrick, looks_like, number, read_rows, sex, site
from dermfm.records.source import Reading, SourceConfig
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
    rows = read_rows(source.table, ["sample_id"], source.layout, reading.losses)
    header = rows[0].keys()
    for name, example in (("dataset", "<name>"), ("modality", "|".join(MODALITIES))):
        if not getattr(source, name) and name not in header:
            raise InputError(
                f"{source.table}: lacks the column '{name}'; add it, or say {name}={example} if all rows have the same"
            )
    if not {"label", *DIAGNOSIS_COLUMNS} & set(header):
        kind = looks_like(header)
        hint = f"it looks like {kind}" if kind else nearest("label", header)
        raise InputError(f"{source.table}: has none of the columns label, subclass, class, diagnosis; {hint}")
    names = [source.dataset or row["dataset"] for row in rows]
    ids = [f"{d}/{row['sample_id']}" if row["sample_id"] else "" for d, row in zip(names, rows, strict=True)]
    check_unique(source.table, ids, "sample_id")
    return finish(source, [_draft(source, d, row) for d, row in zip(names, rows, strict=True)], reading.losses)


def _draft(source: SourceConfig, dataset: str, row: Row) -> Draft:
    cell = row.get
    where = f"{source.table}: {dataset}/{row['sample_id']}"
    record = Record(
        dataset=dataset,
        source_id=row["sample_id"],
        path=NO_PATH,
        modality=source.modality or row["modality"],
        class_text=tidy(cell("class")),
        subclass_text=tidy(cell("subclass") or cell("diagnosis")),
        findings=tidy(cell("findings")),
        lesion_id=cell("lesion_id") or None,
        patient_id=cell("patient_id") or None,
        age=number(cell("age")),
        sex=sex(cell("sex")),
        site=site(cell("site")),
        fitzpatrick=fitzpatrick(cell("fitzpatrick")),
        licence=cell("licence") or None,
        given_split=cell("split") or None,
    )
    _check_words(record, where)
    if (pad := PAD_ID.fullmatch(record.source_id)) is not None and record.patient_id is None:
        record.patient_id = f"PAT_{pad[1]}"
    _skin_tone(record, row)
    return Draft(record, _diagnosis(record, row, where))


def _check_words(record: Record, where: str) -> None:
    try:
        check_choice("modality", record.modality, MODALITIES)
        if record.given_split:
            check_choice("split", record.given_split, SPLITS)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error


def _skin_tone(record: Record, row: Row) -> None:
    if (value := number(row.get("skin_tone_value"))) is not None:
        record.skin_tone_scale, record.skin_tone_value = row.get("skin_tone_scale") or None, value
    elif (value := number(row.get("skin_tone_class"))) is not None:
        record.skin_tone_scale, record.skin_tone_value = MILK10K_SCALE, value


def _diagnosis(record: Record, row: Row, where: str) -> list[str | None] | None:
    """Fill in the table's own label, beside it the class that the texts name; where it has none, return the texts."""
    texts = [row.get(name) for name in DIAGNOSIS_COLUMNS]
    label = _label(row.get("label", ""), where)
    if label is None:
        return texts
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
    return None


def _label(text: str, where: str) -> int | None:
    value = number(text)
    if text == "" or value == -1:
        return None
    if value is None or value not in range(len(CLASSES)):
        raise InputError(f"{where}: the label '{text}' is not valid; 0 to 7, or empty where unknown")
    return int(value)
