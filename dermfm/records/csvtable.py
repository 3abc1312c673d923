"""CSV tables as publishers ship them: delimiter and encoding found, columns checked, other layouts recognised."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from dermfm.config import InputError, nearest, read_file

Row = dict[str, str]

# Columns by which a table is recognised, for the message when it was given as another layout.
SIGNATURES: dict[str, tuple[str, ...]] = {
    "HAM10000_metadata.csv (layout=ham10000)": ("image_id", "dx", "localization"),
    "MILK10k metadata (layout=milk10k)": ("isic_id", "lesion_id", "image_type", "site"),
    "MILK10k ground truth (ground_truth= of layout=milk10k)": ("lesion_id", "AKIEC", "SCCKA", "BEN_OTH"),
    "MILK10k supplement (supplement= of layout=milk10k)": ("isic_id", "diagnosis_full"),
    "ISIC Archive export": ("isic_id", "diagnosis_1", "image_type"),
    "PAD-UFES-20 metadata": ("img_id", "diagnostic", "fitspatrick"),
    "Derm7pt meta.csv": ("case_num", "seven_point_score"),
    "Fitzpatrick17k": ("md5hash", "fitzpatrick_scale"),
    "MRA-MIDAS": ("midas_record_id", "midas_file_name"),
    "a generic table (layout=generic)": ("sample_id", "label"),
}
DELIMITERS = ",;\t|"


def read_rows(path: str | Path, required: Sequence[str], layout: str) -> list[Row]:
    """Rows of a CSV file as dictionaries of stripped strings; the columns `required` are there.

    Raises InputError naming the file for a missing column (with the layout that the table looks like), another
    delimiter than a comma, an empty table, or a row whose number of cells is not that of the header.
    """
    path = read_file(path)
    reader = csv.reader(io.StringIO(read_text(path), newline=""))
    header = [name.strip() for name in next(reader, [])]
    _check_header(path, header, required, layout)
    rows = []
    for cells in reader:
        if not cells:
            continue
        if len(cells) != len(header):
            raise InputError(f"{path}: line {reader.line_num} has {len(cells)} cells, the header has {len(header)}")
        rows.append({name: cell.strip() for name, cell in zip(header, cells, strict=True)})
    if not rows:
        raise InputError(f"{path}: the table has a header but no rows")
    return rows


def read_text(path: Path) -> str:
    """The file as text: UTF-8 with or without a byte order mark, UTF-16 with one, else Latin-1."""
    data = path.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        if b"\0" in data[:4096]:
            raise InputError(f"{path}: is not a text file; a CSV table is needed") from None
        return data.decode("latin-1")


def looks_like(header: Iterable[str]) -> str | None:
    """The layout whose signature columns are all in `header`, or None."""
    names = set(header)
    return next((layout for layout, columns in SIGNATURES.items() if names.issuperset(columns)), None)


def _check_header(path: Path, header: list[str], required: Sequence[str], layout: str) -> None:
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{path}: the column '{twice}' occurs more than once")
    missing = [name for name in required if name not in header]
    if not missing:
        return
    for delimiter in DELIMITERS[1:]:
        if len(header) == 1 and delimiter in header[0]:
            shown = {"\t": "tab"}.get(delimiter, delimiter)
            raise InputError(f"{path}: the cells are separated by '{shown}'; a comma is needed (layout={layout})")
    kind = looks_like(header)
    hint = f"it looks like {kind}" if kind else nearest(missing[0], header)
    raise InputError(f"{path}: lacks the column '{missing[0]}' that layout={layout} needs; {hint}")


def check_unique(path: str | Path, ids: Iterable[str], column: str) -> None:
    """InputError for an empty or repeated id, naming it."""
    seen: set[str] = set()
    for line, value in enumerate(ids, start=2):
        if not value:
            raise InputError(f"{path}: row {line} has an empty '{column}'")
        if value in seen:
            raise InputError(f"{path}: the {column} '{value}' occurs more than once; ids must be unique")
        seen.add(value)


def number(text: str | None) -> float | None:
    """A number from a cell; None for an empty or non-numeric one."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if value == value and abs(value) != float("inf") else None


def sex(text: str | None) -> str | None:
    """male | female, or None for anything else."""
    word = (text or "").strip().casefold()
    return {"m": "male", "f": "female"}.get(word, word if word in ("male", "female") else None)


def site(text: str | None) -> str | None:
    """An anatomical site in lower-case words; None for an empty or unknown one."""
    words = " ".join((text or "").replace("_", " ").split()).casefold()
    return {"head neck face": "head, neck or face", "unknown": None, "": None}.get(words, words)
