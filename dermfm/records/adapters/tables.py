"""What all adapters of a table with images share: rows become records where their image exists."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dermfm.config import InputError
from dermfm.records.images import ImageFolder
from dermfm.records.source import Losses, SourceConfig
from dermfm.records.table import Record
from dermfm.records.vocabulary import CLASSES, correction, find_diagnosis, tidy

MISSING_IMAGE = "rows without an image"
UNNAMED_IMAGE = "images without a row"
UNMAPPED = "diagnoses without a class"


def check_source(source: SourceConfig) -> None:
    """InputError where a source of tables lacks its table or images."""
    for name, value in (("table", source.table), ("images", source.images)):
        if not value:
            raise InputError(f"layout={source.layout} needs {name}=<path>")


def apply_diagnosis(record: Record, texts: list[str | None], losses: Losses) -> Record:
    """Fill label, class, subclass and malignancy from diagnosis texts, most specific first; corrections come before."""
    corrected = correction(record.dataset, record.source_id)
    if corrected is not None:
        texts = [corrected]
        record.class_text = record.subclass_text = corrected
    found = find_diagnosis(record.dataset, texts)
    if found is None:
        shown = next((tidy(text) for text in texts if tidy(text)), None) or "(empty)"
        losses.add(UNMAPPED, f"{record.dataset}: {shown}")
        return record
    record.label, record.class_label = found.label, found.class_label
    record.malignancy = found.malignancy
    record.matched_class, record.matched_subclass = CLASSES[found.class_label], found.subclass
    return record


def with_images(
    source: SourceConfig, folder: ImageFolder, items: Iterable[tuple[str, str]], losses: Losses
) -> dict[tuple[str, str], Path]:
    """(dataset, source id) → path of every item whose image exists; the others, and images no item names, are counted.

    Raises InputError where not one of the images exists: the folder is not that of the table.
    """
    items = list(items)
    found = {item: path for item in items if (path := folder.find(*item)) is not None}
    for dataset, source_id in items:
        if (dataset, source_id) not in found:
            losses.add(MISSING_IMAGE, f"{dataset}/{source_id}")
    if items and not found:
        dataset, source_id = items[0]
        raise InputError(
            f"images={source.images}: none of the {len(items)} images that {source.table} names is there, "
            f"for example {source_id}.jpg, in it or in its folder {dataset}/"
        )
    for path in folder.unnamed(set(found.values()), {dataset for dataset, _ in items}):
        losses.add(UNNAMED_IMAGE, path.name)
    return found
