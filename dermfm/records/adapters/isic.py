"""Exports of the ISIC Archive (metadata.csv of `isic image download` or of the website) with the images <isic_id>.jpg.

BCN20000, MSK 1-5, Hospital_Italiano_Buenos_Aires, derm12345, Milk10k and any other collection; `dataset` names it, and
dataset=Milk10k makes Milk10k_dermo and Milk10k_clinic of the two image types. Every row is checked by the Archive's own
schema (isic-metadata): rows that it refuses are counted and kept, since only the vocabulary decides about labels; where
most rows are refused, the table is not an export. The most specific of diagnosis_5 … diagnosis_1 is the diagnosis;
confocal images (RCM) are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from isic_metadata.metadata import MetadataRow
from pydantic import ValidationError

from dermfm.config import InputError, nearest
from dermfm.records.adapters.milk10k import DATASETS as MILK10K
from dermfm.records.adapters.tables import NO_PATH, Draft, check_source, finish
from dermfm.records.csvtable import Row, check_unique, fitzpatrick, looks_like, number, read_rows, sex, site
from dermfm.records.source import Losses, Reading, SourceConfig
from dermfm.records.table import Record
from dermfm.records.vocabulary import tidy

COLUMNS = ("isic_id", "attribution", "copyright_license")
LEVELS = tuple(f"diagnosis_{level}" for level in (5, 4, 3, 2, 1))
MODALITY_OF = {"dermoscopic": "dermoscopic", "clinical": "clinical", "tbp tile": "clinical", "overview": "clinical"}
# Names of the export where the Archive's schema has others.
SCHEMA_NAMES = {"age_approx": "age"}
REFUSED = "rows that the ISIC Archive's schema refuses, kept"
OTHER_TYPE = "rows of other image types (confocal, …), left out"
NO_TYPE = "rows without an image type, left out (modality= gives it)"


def read(source: SourceConfig, reading: Reading) -> list[Record]:
    """Records of an export whose images exist below `images`."""
    check_source(source)
    if not source.dataset:
        raise InputError("layout=isic needs dataset=<name>, for example dataset=BCN20000")
    rows = read_rows(source.table, COLUMNS, source.layout, reading.losses)
    if not {*LEVELS, "diagnosis"} & set(rows[0]):
        kind = looks_like(rows[0])
        hint = f"it looks like {kind}" if kind else nearest("diagnosis_1", rows[0])
        raise InputError(f"{source.table}: has none of the columns diagnosis_1 … diagnosis_5, diagnosis; {hint}")
    check_unique(source.table, (row["isic_id"] for row in rows), "isic_id")
    check_schema(source.table, rows, reading.losses)
    drafts, left_out = [], set()
    for row in rows:
        modality = _modality(source, row, reading.losses)
        if modality is None:
            left_out.add(row["isic_id"])
        else:
            drafts.append(Draft(_record(source, row, modality), _texts(row)))
    if not drafts:
        raise InputError(f"{source.table}: no row has an image type that is read ({', '.join(MODALITY_OF)})")
    return finish(source, drafts, reading.losses, is_other=lambda path: path.stem in left_out)


def check_schema(table: str, rows: Sequence[Row], losses: Losses) -> None:
    """Count the rows that isic-metadata refuses; InputError where most are."""
    refused = [(row["isic_id"], why) for row in rows if (why := refusal(row)) is not None]
    if 2 * len(refused) > len(rows):
        name, why = refused[0]
        raise InputError(
            f"{table}: the ISIC Archive's schema refuses {len(refused)} of {len(rows)} rows, first {name}: {why}"
        )
    for name, why in refused:
        losses.add(REFUSED, f"{name}: {why}")


def refusal(row: Row) -> str | None:
    """What the Archive's schema says against a row, or None."""
    try:
        MetadataRow(**{SCHEMA_NAMES.get(name, name): value for name, value in row.items()})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        return f"{place}: {first['msg']}" if place else first["msg"]
    return None


def _modality(source: SourceConfig, row: Row, losses: Losses) -> str | None:
    word = row.get("image_type", "").partition(":")[0].strip().casefold()
    if not word:
        if not source.modality:
            losses.add(NO_TYPE, row["isic_id"])
        return source.modality or None
    if word not in MODALITY_OF:
        losses.add(OTHER_TYPE, row["image_type"])
    return MODALITY_OF.get(word)


def _texts(row: Row) -> list[str]:
    return [row[name] for name in (*LEVELS, "diagnosis") if row.get(name)]


def _record(source: SourceConfig, row: Row, modality: str) -> Record:
    texts = _texts(row)
    anatomy = next((row[name] for name in ("anatom_site_special", "anatom_site_general") if row.get(name)), None)
    return Record(
        dataset=MILK10K[modality] if source.dataset == "Milk10k" else source.dataset,
        source_id=row["isic_id"],
        path=NO_PATH,
        modality=modality,
        class_text=tidy((row.get("diagnosis_3") or (texts[0] if texts else "")).casefold()),
        subclass_text=tidy(texts[0].casefold()) if texts else None,
        findings=tidy(row.get("diagnosis_2", "").casefold()),
        lesion_id=row.get("lesion_id") or None,
        patient_id=row.get("patient_id") or None,
        age=number(row.get("age_approx") or row.get("age")),
        sex=sex(row.get("sex")),
        site=site(anatomy),
        fitzpatrick=fitzpatrick(row.get("fitzpatrick_skin_type")),
        licence=row["copyright_license"] or None,
    )
