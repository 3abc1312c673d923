"""PH2 as its publisher ships it: PH2_dataset.txt or .xlsx, and PH2 Dataset images/IMD*/IMD*_Dermoscopic_Image/IMD*.bmp.

The text file separates its columns by `||` and its features by `|`: name, histological diagnosis (often empty),
clinical diagnosis (0 common nevus, 1 atypical nevus, 2 melanoma), seven dermoscopic features, colours as numbers. The
sheet marks the diagnosis and the colours by an X. Mendonça et al. 2013, doi:10.1109/EMBC.2013.6610779.
"""

from __future__ import annotations

from pathlib import Path

from dermfm.config import InputError, read_file
from dermfm.records.adapters.tables import NO_PATH, Draft, check_source, finish
from dermfm.records.csvtable import Row, check_unique, looks_like, read_rows, read_text
from dermfm.records.source import Reading, SourceConfig
from dermfm.records.table import Record
from dermfm.records.vocabulary import tidy

DATASET = "PH2"
DIAGNOSES = ("Common Nevus", "Atypical Nevus", "Melanoma")
FEATURES = ("Asymmetry", "Pigment Network", "Dots/Globules", "Streaks", "Regression Areas", "Blue-Whitish Veil")
COLOURS = ("White", "Red", "Light-Brown", "Dark-Brown", "Blue-Gray", "Black")
WORDS = {"A": "absent", "P": "present", "T": "typical", "AT": "atypical"}
ASYMMETRY = {"0": "symmetric", "1": "symmetric in one axis", "2": "asymmetric"}
LICENCE = "research and education only (ADDI project)"


def read(source: SourceConfig, reading: Reading) -> list[Record]:
    """Records of the own table whose images exist below `images`; masks are not taken for images without a row."""
    check_source(source)
    path = Path(source.table)
    rows = (
        _sheet_rows(path, reading)
        if path.suffix.lower() in (".xlsx", ".csv")
        else _text_rows(path, source.layout, reading)
    )
    check_unique(source.table, (row["name"] for row in rows), "name")
    drafts = [Draft(_record(row), [row["diagnosis"]]) for row in rows]
    return finish(source, drafts, reading.losses, is_other=lambda path: "_" in path.stem)


def _record(row: Row) -> Record:
    return Record(
        dataset=DATASET,
        source_id=row["name"],
        path=NO_PATH,
        modality="dermoscopic",
        class_text=row["diagnosis"],
        subclass_text=tidy(row["histology"].casefold()) or row["diagnosis"],
        findings=row["findings"] or None,
        licence=LICENCE,
    )


def _text_rows(path: Path, layout: str, reading: Reading) -> list[Row]:
    rows = []
    lines = read_text(read_file(path), reading.losses).splitlines()
    for line_number, line in enumerate(lines, start=1):
        cells = [cell.strip() for cell in line.split("||")]
        is_row = len(cells) > 5 and cells[3] in ("0", "1", "2")
        if len(cells) < 2 or not (cells[1].startswith("IMD") or is_row):
            continue  # the header, rules and the legend below the table
        if not is_row:
            raise InputError(f"{path}: line {line_number} is not of the form || name || histology || 0-2 || … ||")
        features = [cell.strip() for cell in cells[4].split("|")]
        colours = [COLOURS[int(n) - 1] for n in cells[5].split() if n in "123456"]
        rows.append(_row(cells[1], cells[2], DIAGNOSES[int(cells[3])], features, colours))
    if not rows:
        kind = looks_like((lines[0] if lines else "").split(","))
        hint = f"it looks like {kind}" if kind else "a row is || IMD003 || … || 0 || …"
        raise InputError(f"{path}: has no row of layout={layout}; {hint}")
    return rows


def _sheet_rows(path: Path, reading: Reading) -> list[Row]:
    rows = []
    for given in read_rows(path, ("Image Name", "Histological Diagnosis", *DIAGNOSES), "ph2", reading.losses):
        cells = {name.split("\n")[0].strip(): value for name, value in given.items()}  # "Asymmetry\n(0/1/2)"
        marked = [name for name in DIAGNOSES if cells[name].casefold() == "x"]
        if len(marked) != 1:
            raise InputError(f"{path}: {cells['Image Name']}: {len(marked)} of {', '.join(DIAGNOSES)} are marked by X")
        features = [cells.get(name, "") for name in FEATURES]
        colours = [name for name in COLOURS if cells.get(name, "").casefold() == "x"]
        rows.append(_row(cells["Image Name"], cells["Histological Diagnosis"], marked[0], features, colours))
    return rows


def _row(name: str, histology: str, diagnosis: str, features: list[str], colours: list[str]) -> Row:
    stated = []
    for feature, value in zip(FEATURES, features, strict=False):
        word = (ASYMMETRY if feature == "Asymmetry" else WORDS).get(value)
        if word is not None:
            stated.append(f"{feature.casefold()}: {word}")
    if colours:
        stated.append(f"colours: {', '.join(c.casefold().replace('-', ' ') for c in colours)}")
    return {"name": name, "histology": histology, "diagnosis": diagnosis.casefold(), "findings": "; ".join(stated)}
