"""Data sets without a table: the diagnosis is in the path of each image (DermNet, FLUO_SC, SD198, SKINL2).

`pattern` is a regular expression with named groups, searched in the path below `images` without suffix, with / between
folders. `diagnosis` is required; `lesion`, `patient`, `split` (train | valid | test, also val | validation) and `id`
are optional. Without a pattern the diagnosis is the name of the folder that holds the image. Underscores and hyphens
count as blanks. The source id is `id`, else the file's name without suffix, with its folders where several files have
that name.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from dermfm.config import InputError
from dermfm.records.adapters.tables import Draft, finish
from dermfm.records.csvtable import check_unique
from dermfm.records.images import ImageFolder
from dermfm.records.source import Losses, Reading, SourceConfig
from dermfm.records.table import SPLITS, Record
from dermfm.records.vocabulary import tidy

PATTERN = r"(?P<diagnosis>[^/]+)/[^/]+$"
GROUPS = ("diagnosis", "lesion", "patient", "split", "id")
SAME_NAME = "images whose file name several folders have, told apart by their path"
NO_MATCH = "images whose path the pattern does not match, left out"
SPLIT_NAMES = {**{split: split for split in SPLITS}, "val": "valid", "validation": "valid"}


def read(source: SourceConfig, reading: Reading) -> list[Record]:
    """One record an image below `images`; unmapped folder names keep their images without a label."""
    for key in ("images", "dataset", "modality"):
        if not getattr(source, key):
            raise InputError(f"layout=folders needs {key}=<value>")
    pattern = compile_pattern(source.pattern or PATTERN)
    root = Path(source.images)
    drafts = []
    for path in ImageFolder(root).paths():
        below = path.relative_to(root).with_suffix("").as_posix()
        match = pattern.search(below)
        if match is None:
            reading.losses.add(NO_MATCH, below)
            continue
        drafts.append(_draft(source, below, match.groupdict(), reading.losses))
    if not drafts:
        raise InputError(f"images={root}: the pattern '{pattern.pattern}' matches none of the paths below it")
    if "id" not in pattern.groupindex:
        _tell_apart(drafts, reading.losses)
    check_unique(root, (draft.record.source_id for draft in drafts), "id")
    # Here every image is its own row; those that do not match are counted already.
    return finish(source, drafts, reading.losses, is_other=lambda path: True)


def _tell_apart(drafts: list[Draft], losses: Losses) -> None:
    """Make the path the id of images whose file name other folders have, too."""
    times = Counter(draft.record.source_id for draft in drafts)
    for draft in drafts:
        if times[draft.record.source_id] > 1:
            losses.add(SAME_NAME, draft.record.source_id)
            draft.record.source_id = draft.image


def compile_pattern(text: str) -> re.Pattern[str]:
    """The expression; InputError where it is broken, lacks `diagnosis` or has an unknown group."""
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise InputError(f"pattern: '{text}' is no regular expression: {error}") from error
    if "diagnosis" not in pattern.groupindex or set(pattern.groupindex) - set(GROUPS):
        raise InputError(f"pattern: '{text}' needs the group (?P<diagnosis>…) and may have {', '.join(GROUPS[1:])}")
    return pattern


def _draft(source: SourceConfig, below: str, found: dict[str, str | None], losses: Losses) -> Draft:
    words = tidy((found["diagnosis"] or "").replace("_", " ").replace("-", " ").casefold())
    record = Record(
        dataset=source.dataset,
        source_id=found.get("id") or below.rpartition("/")[2],
        path=Path(),
        modality=source.modality,
        class_text=words,
        subclass_text=words,
        lesion_id=found.get("lesion"),
        patient_id=found.get("patient"),
    )
    given = (found.get("split") or "").casefold()
    record.given_split = SPLIT_NAMES.get(given)
    return Draft(record, [words], image=below)
