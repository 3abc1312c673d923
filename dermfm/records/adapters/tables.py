"""What all adapters share: rows become drafts of records, drafts become records where their image exists."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dermfm.config import InputError, nearest
from dermfm.records.images import ImageFolder
from dermfm.records.source import NAMED, Losses, SourceConfig
from dermfm.records.study_split import study_split
from dermfm.records.table import Record
from dermfm.records.vocabulary import CLASSES, correction, find_diagnosis, tidy

MISSING_IMAGE = "rows without an image"
UNNAMED_IMAGE = "images without a row"
SEVERAL_FILES = "rows whose image's name several different files have, left out"
COPIED_FILES = "images that other folders hold again, byte for byte"
PARTIAL_NAME = "ids that are only a part of an image's name, not matched"
UNMAPPED = "diagnoses without a class"
UNSPLIT = "records that the given split does not name, left out"
NO_PATH = Path()  # until `with_images` finds the image


@dataclass
class Draft:
    """A record whose image is not looked for yet. `texts`: diagnosis texts, most specific first, for the vocabulary;
    None where the label is filled already. `image`: file name or path below the images, where it is not the id."""

    record: Record
    texts: Sequence[str | None] | None
    image: str = ""


def check_source(source: SourceConfig) -> None:
    """InputError where a source of tables lacks its table or images."""
    for name, value in (("table", source.table), ("images", source.images)):
        if not value:
            raise InputError(f"layout={source.layout} needs {name}=<path>")


def finish(
    source: SourceConfig,
    drafts: Iterable[Draft],
    losses: Losses,
    is_other: Callable[[Path], bool] | None = None,
    known: Iterable[str] = (),
) -> list[Record]:
    """Records of the wanted data sets whose images exist, with labels from their diagnoses, in order.

    Split, test-only and licence follow the source's settings; `is_other` names images that are no photographs (masks),
    `known` data sets that the settings may name though no draft is of them.
    Raises InputError for an unknown data set in the settings or a folder without any of the images.
    """
    drafts = list(drafts)
    check_datasets(source, {*known, *(draft.record.dataset for draft in drafts)})
    drafts = [draft for draft in drafts if source.is_wanted(draft.record.dataset)]
    records = []
    for draft, path in zip(drafts, with_images(source, drafts, losses, is_other), strict=True):
        if path is None:
            continue
        record = draft.record
        record.path = path
        record.licence = record.licence or source.licence or None
        record.test_only = source.is_test_only(record.dataset)
        if draft.texts is not None:
            apply_diagnosis(record, draft.texts, losses)
        records.append(record)
    return _as_split(source, records, losses)


def _as_split(source: SourceConfig, records: list[Record], losses: Losses) -> list[Record]:
    """splits=given: the split of `split_tables` or of the source; records that it does not name are left out."""
    if source.splits != "given":
        for record in records:
            record.given_split = None
        return records
    if source.split_tables:
        datasets = dict.fromkeys(record.dataset for record in records)
        of = {dataset: study_split(Path(source.split_tables), dataset, losses) for dataset in datasets}
        for record in records:
            record.given_split = of[record.dataset].get(record.source_id)
    if not any(record.given_split for record in records):
        raise InputError(f"splits=given: {source.table or source.images} gives no split; use splits=lesions")
    for record in records:
        if record.given_split is None:
            losses.add(UNSPLIT, record.dataset)
    return [record for record in records if record.given_split is not None]


def check_datasets(source: SourceConfig, names: set[str]) -> None:
    """InputError where `datasets` or `test_only` name a data set that is not among `names`."""
    for key, wanted in (("datasets", source.datasets), ("test_only", source.test_only)):
        unknown = sorted(set(wanted) - names)
        if unknown:
            where = source.table or source.images
            raise InputError(f"{where}: has no data set '{unknown[0]}' ({key}); {nearest(unknown[0], names)}")


def apply_diagnosis(record: Record, texts: Sequence[str | None], losses: Losses) -> Record:
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
    source: SourceConfig, drafts: Sequence[Draft], losses: Losses, is_other: Callable[[Path], bool] | None = None
) -> list[Path | None]:
    """The image of every draft, or None; rows without an image and images without a row are counted.

    Raises InputError where not one of the images exists: the folder is not that of the table.
    """
    if not drafts:
        return []
    folder = ImageFolder(source.images)
    paths = [folder.find(draft.record.dataset, _image_name(draft)) for draft in drafts]
    without = [draft for draft, path in zip(drafts, paths, strict=True) if path is None]
    several = {id(draft): files for draft in without if len(files := folder.of_name(_image_name(draft))) > 1}
    missing = [draft for draft in without if id(draft) not in several]
    partial = _partial_names(folder, missing)
    if len(without) == len(drafts):
        raise InputError(_none_there(source, drafts, next(iter(several.values()), []), partial))
    for draft in missing:
        losses.add(MISSING_IMAGE, f"{draft.record.dataset}/{draft.record.source_id}")
    for draft in without:
        if id(draft) in several:
            losses.add(SEVERAL_FILES, f"{draft.record.source_id}: {_below(folder, several[id(draft)])}")
    for line in partial:
        losses.add(PARTIAL_NAME, line)
    for path in sorted(folder.copies):
        losses.add(COPIED_FILES, path.relative_to(folder.folder).as_posix())
    named = {path for path in (*paths, *(path for files in several.values() for path in files)) if path is not None}
    for path in folder.unnamed(named, {draft.record.dataset for draft in drafts}):
        if is_other is None or not is_other(path):
            losses.add(UNNAMED_IMAGE, path.name)
    return paths


def _partial_names(folder: ImageFolder, missing: Sequence[Draft]) -> list[str]:
    """'id in name' for those of the first missing ids that are a part of an image's name, or hold it."""
    lines = []
    for draft in missing[:NAMED]:
        other = folder.resembling(_image_name(draft))
        if other is not None:
            lines.append(f"{draft.record.source_id} / {other}")
    return lines


def _image_name(draft: Draft) -> str:
    return draft.image or draft.record.source_id


def _below(folder: ImageFolder, files: Sequence[Path]) -> str:
    return " and ".join(path.relative_to(folder.folder).as_posix() for path in files[:2])


def _none_there(source: SourceConfig, drafts: Sequence[Draft], several: Sequence[Path], partial: list[str]) -> str:
    first = drafts[0].record
    hint = f"; ids must equal the file names, {partial[0]} match only in part" if partial else ""
    if several:
        return f"images={source.images}: several different files have each name, first {several[0]} and {several[1]}"
    return (
        f"images={source.images}: none of the {len(drafts)} images that {source.table or 'the source'} names is there, "
        f"for example {first.source_id}.jpg, in it or in its folder {first.dataset}/{hint}"
    )
