"""Tables as publishers ship them: CSV, Parquet or xlsx; encoding found, columns checked, other layouts recognised."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dermfm.config import InputError, nearest, read_file
from dermfm.records.source import Losses
from dermfm.records.vocabulary import malignancy_word

Row = dict[str, str]

# Columns by which a table is recognised, for the message when it was given as another layout.
SIGNATURES: dict[str, tuple[str, ...]] = {
    "HAM10000_metadata.csv (layout=ham10000)": ("image_id", "dx", "localization"),
    "MILK10k metadata (layout=milk10k)": ("isic_id", "lesion_id", "image_type", "skin_tone_class"),
    "MILK10k ground truth (ground_truth= of layout=milk10k)": ("lesion_id", "AKIEC", "SCCKA", "BEN_OTH"),
    "MILK10k supplement (supplement= of layout=milk10k)": ("isic_id", "diagnosis_full"),
    "an ISIC Archive export (layout=isic)": ("isic_id", "attribution", "copyright_license"),
    "PAD-UFES-20 metadata (layout=pad_ufes_20)": ("img_id", "diagnostic", "fitspatrick"),
    "Derm7pt meta.csv (layout=derm7pt)": ("case_num", "seven_point_score"),
    "an index file of Derm7pt (table= takes its meta.csv)": ("indexes",),
    "Fitzpatrick17k (layout=fitzpatrick17k)": ("md5hash", "fitzpatrick_scale"),
    "MRA-MIDAS (layout=mra_midas)": ("midas_record_id", "midas_file_name"),
    "PH2_dataset (layout=ph2)": ("Image Name", "Histological Diagnosis"),
    "Derm1M captions (layout=derm1m)": ("filename", "caption", "disease_label"),
    "records.parquet of dermfm": ("record_id", "source_id", "group_id"),
    "a generic table (layout=generic)": ("sample_id", "label"),
}
PH2_TEXT = "PH2_dataset.txt (layout=ph2)"
REFERENCE_TEXT = "a table of the reference study (layout=reference, table=<its folder>)"
NOT_UTF8 = "tables that are not UTF-8, read as Windows-1252"
DELIMITERS = ",;\t|"


def read_rows(path: str | Path, required: Sequence[str], layout: str, losses: Losses | None = None) -> list[Row]:
    """Rows of a CSV, Parquet or xlsx file as dictionaries of stripped strings; the columns `required` are there.

    An xlsx file (first sheet) may have lines of text above its header. An encoding other than UTF-8 is counted in
    `losses`; columns without a name are left out. Raises InputError naming the file for a missing column (with the
    layout that the table looks like), another delimiter than a comma (a tab in .tab and .tsv files), an empty table, or
    a row whose number of cells is not that of the header.
    """
    path = read_file(path)
    suffix = path.suffix.lower()
    if suffix in (".parquet", ".pq"):
        lines = _parquet_lines(path)
    elif suffix in (".xlsx", ".xlsm"):
        lines = _sheet_lines(path, required)
    else:
        lines = _csv_lines(path, losses)
    _, first = next(lines, (1, []))
    header = [name.strip() for name in first]
    if not any(header):
        raise InputError(f"{path}: is empty, or its first line is; a table with a header is needed (layout={layout})")
    _check_header(path, header, required, layout)
    rows = []
    for line, cells in lines:
        if not any(cells):
            continue
        if len(cells) != len(header):
            raise InputError(f"{path}: line {line} has {len(cells)} cells, the header has {len(header)}")
        rows.append({name: cell.strip() for name, cell in zip(header, cells, strict=True) if name})
    if not rows:
        raise InputError(f"{path}: the table has a header but no rows")
    return rows


def _csv_lines(path: Path, losses: Losses | None) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(read_text(path, losses), newline=""), delimiter=_delimiter(path))
    try:
        for cells in reader:
            yield reader.line_num, cells
    except csv.Error as error:  # a quote that never closes swallows the rest of the file into one cell
        raise InputError(f"{path}: line {reader.line_num}: {error}; is a quotation mark left open?") from error


def _parquet_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: is not a Parquet file, though its name says so") from error
    yield 1, table.column_names
    columns = [["" if v is None else str(v) for v in column.to_pylist()] for column in table.columns]
    yield from enumerate(map(list, zip(*columns, strict=True)), start=2)


def _sheet_lines(path: Path, required: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Lines of the first sheet from the header on: the first line that holds a required column, else the first."""
    try:
        from openpyxl import load_workbook
    except ImportError:
        raise InputError(
            f"{path}: reading xlsx needs openpyxl (pip install 'dermfm[xlsx]'); or save the sheet as CSV"
        ) from None
    try:
        sheet = load_workbook(path, read_only=True, data_only=True).worksheets[0]
    except Exception as error:  # zipfile, XML and openpyxl errors share no base class
        raise InputError(f"{path}: is not an xlsx file, though its name says so ({error})") from error
    lines = [["" if v is None else _cell(v) for v in row] for row in sheet.iter_rows(values_only=True)]
    at = next((i for i, line in enumerate(lines) if set(required) & {v.strip() for v in line}), 0)
    named = [i for i, name in enumerate(lines[at] if lines else []) if name.strip()]
    for line, cells in enumerate(lines[at:], start=at + 1):
        yield line, [cells[i] for i in named]


def _cell(value: object) -> str:
    """A sheet's value as text; 2.0 is 2 there."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def read_text(path: Path, losses: Losses | None = None) -> str:
    """The file as text: UTF-8 with or without a byte order mark, UTF-16 with one, else Windows-1252 (counted)."""
    data = path.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16")
    if b"\0" in data[:4096]:
        raise InputError(f"{path}: is not a text file (or UTF-16 without its mark); a CSV table in UTF-8 is needed")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        if losses is not None:
            losses.add(NOT_UTF8, path.name)
        return data.decode("cp1252", errors="replace")


def looks_like(header: Iterable[str]) -> str | None:
    """The layout whose signature columns are all in `header`, or None."""
    names = list(header)
    found = next((layout for layout, columns in SIGNATURES.items() if set(names).issuperset(columns)), None)
    if found is None and any("||" in name for name in names):
        return PH2_TEXT
    # The study's tables have no header: id, label, malignancy, class, …
    is_reference = len(names) == 8 and names[1].isdigit() and malignancy_word(names[2]) is not None
    return REFERENCE_TEXT if found is None and is_reference else found


def _check_header(path: Path, header: list[str], required: Sequence[str], layout: str) -> None:
    missing = [name for name in required if name not in header]
    kind = looks_like(header) if missing else None
    if kind is not None:
        raise InputError(f"{path}: lacks the column '{missing[0]}' that layout={layout} needs; it looks like {kind}")
    _check_delimiter(path, header, missing, layout)
    twice = next((name for name in header if name and header.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{path}: the column '{twice}' occurs more than once")
    if missing:
        raise InputError(
            f"{path}: lacks the column '{missing[0]}' that layout={layout} needs; {nearest(missing[0], header)}"
        )


def _delimiter(path: Path) -> str:
    return "\t" if path.suffix.lower() in (".tab", ".tsv") else ","


def _check_delimiter(path: Path, header: list[str], missing: Sequence[str], layout: str) -> None:
    own = _delimiter(path)
    for delimiter in DELIMITERS.replace(own, ""):
        parts = [name.strip().strip('"') for name in own.join(header).split(delimiter)]
        if len(parts) > max(1, len(header)) and set(missing) & set(parts):
            shown = {"\t": "tab"}.get(delimiter, delimiter)
            needed = "comma" if own == "," else "tab"
            raise InputError(f"{path}: the cells are separated by '{shown}'; a {needed} is needed (layout={layout})")


def check_filled(path: str | Path, ids: Iterable[str], column: str) -> None:
    """InputError for empty ids, naming the first."""
    empty = [line for line, value in enumerate(ids, start=2) if not value]
    if empty:
        more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        raise InputError(f"{path}: row {empty[0]}{more} has an empty '{column}'; every row needs its id")


def check_unique(path: str | Path, ids: Iterable[str], column: str) -> None:
    """InputError for empty or repeated ids, naming the first."""
    ids = list(ids)
    check_filled(path, ids, column)
    repeated = [value for value, n in Counter(ids).items() if n > 1]
    if repeated:
        more = f" and {len(repeated) - 1} other ids" if len(repeated) > 1 else ""
        verb = "occur" if more else "occurs"
        raise InputError(f"{path}: the {column} '{repeated[0]}'{more} {verb} more than once; ids must be unique")


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


def fitzpatrick(text: str | None) -> int | None:
    """Fitzpatrick type 1-6 from a number or a Roman numeral at the start ("III darker white skin"); else None."""
    value = number(text)
    if value is not None:
        return int(value) if value in (1, 2, 3, 4, 5, 6) else None
    word = re.match(r"(?:type\s+)?([ivIV]+)\b", (text or "").strip())
    return {"I": 1, "II": 2, "III": 3, "IV": 4, "V": 5, "VI": 6}.get(word[1].upper()) if word else None


def site(text: str | None) -> str | None:
    """An anatomical site in lower-case words; None for an empty or unknown one."""
    words = " ".join((text or "").replace("_", " ").split()).casefold()
    return {"head neck face": "head, neck or face", "unknown": None, "": None}.get(words, words)
