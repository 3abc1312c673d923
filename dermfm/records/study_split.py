"""The reference study's split: <data set>/labels_{train,valid,test}.csv, each line `<file name>,<label>`, no header.

Any layout whose ids are the study's may ask for it (`split_tables`): then the publisher's lesion and patient ids show
what it divides.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path, PurePath

from dermfm.config import InputError, nearest
from dermfm.records.csvtable import DELIMITERS, read_text
from dermfm.records.source import Losses
from dermfm.records.splits import TWICE
from dermfm.records.table import SPLITS


def headless_lines(path: Path, num_cells: int, losses: Losses) -> Iterator[list[str]]:
    """Stripped cells of a CSV file without a header; InputError for a line with another number of cells."""
    reader = csv.reader(io.StringIO(read_text(path, losses), newline=""))
    for cells in reader:
        if len(cells) != num_cells:
            other = next((d for d in DELIMITERS[1:] if len(",".join(cells).split(d)) >= num_cells), None)
            hint = f"; they are separated by '{other}', a comma is needed" if other else ""
            raise InputError(f"{path}: line {reader.line_num} has {len(cells)} cells, {num_cells} are needed{hint}")
        yield [cell.strip() for cell in cells]


def study_split(folder: Path, dataset: str, losses: Losses) -> dict[str, str]:
    """Source id → split of one data set; an id in two files is counted and taken for the later split (test).

    Raises InputError where `folder` holds no file for the data set.
    """
    files = {split: folder / dataset / f"labels_{split}.csv" for split in SPLITS}
    if not any(path.is_file() for path in files.values()):
        known = [path.parent.name for path in folder.glob("*/labels_test.csv")]
        hint = nearest(dataset, known) if known else "split_tables is the folder of the study's CSVs, one a data set"
        raise InputError(f"{folder}: holds no {dataset}/labels_<split>.csv; {hint}")
    splits: dict[str, str] = {}
    for split, path in files.items():
        for name, _ in headless_lines(path, 2, losses) if path.is_file() else ():
            source_id = PurePath(name).stem
            if source_id in splits:
                losses.add(TWICE, f"{dataset}/{source_id} in {splits[source_id]} and {split}")
            splits[source_id] = split
    return splits
