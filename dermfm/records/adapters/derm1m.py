"""Derm1M and tables of its kind: images with captions (Derm1M_v2_pretrain.csv, Derm1M_v2_validation.csv).

`filename` is the path below `images`; it is the source id, without suffix. The caption is kept whole as `findings`
(several captions of an image joined by a blank line), so that no label-blind prompt ever sees it: captions name the
diagnosis. `disease_label` gives class and label; the last level of `hierarchical_disease_label` where that is unknown.
An image is dermoscopic where caption or concepts say so (dermoscop…, dermatoscop…), else of the source's `modality`.
For splits=given, a table whose name holds "valid" is the validation set, any other the training set.
"""

from __future__ import annotations

import re
from pathlib import Path

from dermfm.records.adapters.tables import NO_PATH, Draft, check_source, finish
from dermfm.records.csvtable import Row, check_filled, number, read_rows, sex, site
from dermfm.records.source import Reading, SourceConfig
from dermfm.records.table import Record
from dermfm.records.vocabulary import tidy

COLUMNS = ("filename", "caption", "disease_label")
DATASET = "Derm1M"
LICENCE = "CC BY-NC 4.0"
DERMOSCOPIC = re.compile(r"derm(at)?oscop|epiluminescence", re.IGNORECASE)
UNKNOWN = re.compile(r"no (definitive diagnosis|body location|age|gender|symptom|visual concepts?)\b.*", re.IGNORECASE)
REPEATED = "rows that repeat an image without a new caption"
OTHER_LABEL = "captions of one image with different disease labels, the first is kept"


def read(source: SourceConfig, reading: Reading) -> list[Record]:
    """One record an image that exists below `images`, with all its captions."""
    check_source(source)
    rows = read_rows(source.table, COLUMNS, source.layout, reading.losses)
    check_filled(source.table, (row["filename"] for row in rows), "filename")
    split = "valid" if "valid" in Path(source.table).stem.casefold() else "train"
    drafts: dict[str, Draft] = {}
    for row in rows:
        known = drafts.get(row["filename"])
        if known is None:
            drafts[row["filename"]] = _draft(source, row, split)
            continue
        if not _add_caption(known.record, row["caption"]):
            reading.losses.add(REPEATED, row["filename"])
        if _known(row["disease_label"]) != known.record.subclass_text:
            reading.losses.add(OTHER_LABEL, row["filename"])
    return finish(source, drafts.values(), reading.losses)


def _draft(source: SourceConfig, row: Row, split: str) -> Draft:
    label = _known(row["disease_label"])
    levels = [_known(level) for level in row.get("hierarchical_disease_label", "").split(",")]
    is_dermoscopic = DERMOSCOPIC.search(f"{row['caption']} {row.get('skin_concept', '')}") is not None
    record = Record(
        dataset=source.dataset or DATASET,
        source_id=row["filename"].rpartition(".")[0] or row["filename"],
        path=NO_PATH,
        modality="dermoscopic" if is_dermoscopic else source.modality or "clinical",
        class_text=label,
        subclass_text=label,
        findings=tidy(row["caption"]),
        age=number(row.get("age")),
        sex=sex(row.get("gender")),
        site=site(_known(row.get("body_location"))),
        licence=source.licence or LICENCE,
        given_split=split,
    )
    return Draft(record, [label, levels[-1]], image=row["filename"])


def _add_caption(record: Record, caption: str) -> bool:
    """Add a caption to the record's; whether it is a new one."""
    text = tidy(caption)
    known = (record.findings or "").split("\n\n")
    if not text or text in known:
        return False
    record.findings = "\n\n".join([*filter(None, known), text])
    return True


def _known(text: str | None) -> str | None:
    """A cell in lower case; None where it is empty or says that nothing is known."""
    text = tidy((text or "").casefold())
    return None if text is None or UNKNOWN.fullmatch(text) else text
