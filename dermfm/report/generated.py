"""Generated reports of images, each fact marked: supported, missing or contradicted, and words that no fact supports.

The marks are those of the notes' own faithfulness checks (`dermfm.notes.checks`), held against everything that the
record's metadata says. The world is closed there, so "unsupported" means: not in the metadata, not necessarily wrong.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from dermfm.config import InputError
from dermfm.notes.checks import find_faults, states
from dermfm.notes.facts import VISIBLE_FIELDS, Facts, visible_facts
from dermfm.report.gallery import choose_rows, class_name
from dermfm.report.run import Evaluation, Images, read_saved

REPORTS = "reports.parquet"
COLUMNS = ("record_id", "text")  # and "reference", where the evaluation names the text it was held against
LONGEST = 700  # characters of a report that are shown
SUPPORTED, UNSUPPORTED, CONTRADICTED, MISSING = "supported", "unsupported", "contradicted", "missing"
_FACT_FAULTS = ("missing", "contradiction", "unsupported")  # the other kinds of faults are of form
# Spans of a text are marked in this order, the first mark of a place stays.
_ORDER = (CONTRADICTED, SUPPORTED, UNSUPPORTED)


@dataclasses.dataclass(frozen=True)
class Fact:
    """One fact of the record and what became of it: supported, missing or contradicted."""

    name: str
    value: str
    status: str


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece of a report's text with its mark ("" for plain text)."""

    text: str
    mark: str


@dataclasses.dataclass(frozen=True)
class MarkedReport:
    """One generated report: its image, its pieces, the record's facts, the other faults and the reference text."""

    label: str
    dataset: str
    image: str
    pieces: list[Piece]
    facts: list[Fact]
    faults: list[str]
    reference: str


@dataclasses.dataclass(frozen=True)
class FactCount:
    """How often the reports state one kind of fact, contradict it, or leave it out."""

    name: str
    supported: int
    contradicted: int
    missing: int


def read_reports(folder: Path) -> list[dict[str, Any]]:
    """The rows of reports.parquet of an evaluation, [] where it has none. InputError where it cannot be read."""
    path = folder / REPORTS
    if not path.is_file():
        return []
    table = read_saved(path, pq.read_table)
    lacking = [name for name in COLUMNS if name not in table.column_names]
    if lacking:
        raise InputError(f"{path}: has no column '{lacking[0]}'; run `dermfm evaluate` again")
    return table.to_pylist()


def marked_reports(evaluation: Evaluation, images: Images | None, count: int, seed: int) -> list[MarkedReport]:
    """Some of the evaluation's generated reports, drawn from the data sets in turn; without images for None."""
    rows, places = _placed(evaluation)
    records = evaluation.records
    chosen = choose_rows(records.datasets[places], records.labels[places], count, seed) if rows else []
    out = []
    for i in chosen:
        at, text = int(places[i]), rows[i]["text"] or ""
        facts = facts_of(records.fields[at])
        out.append(
            MarkedReport(
                label=class_name(int(records.labels[at])),
                dataset=str(records.datasets[at]),
                image=images.thumbnail(str(records.record_ids[at])) if images else "",
                pieces=_cut(mark_text(text, facts)),
                facts=fact_states(text, facts),
                faults=[f for f in find_faults(text, facts) if not f.startswith(_FACT_FAULTS)],
                reference=rows[i].get("reference") or own_note(evaluation, at),
            )
        )
    return out


def fact_counts(evaluation: Evaluation) -> list[FactCount]:
    """A line for each kind of fact over all generated reports of the evaluation."""
    rows, places = _placed(evaluation)
    found: dict[str, list[str]] = {}
    for row, at in zip(rows, places, strict=True):
        for fact in fact_states(row["text"] or "", facts_of(evaluation.records.fields[int(at)])):
            found.setdefault(fact.name, []).append(fact.status)
    return [FactCount(name, *(one.count(s) for s in (SUPPORTED, CONTRADICTED, MISSING))) for name, one in found.items()]


def own_note(evaluation: Evaluation, row: int) -> str:
    """The record's own note of the first strategy that has one; "" where there is none."""
    found = (text for one in evaluation.texts for at, text in zip(one.rows, one.texts, strict=True) if at == row)
    return next(found, "")


def facts_of(record: Mapping[str, Any]) -> Facts:
    """Everything that the metadata of the record says."""
    return visible_facts(record, VISIBLE_FIELDS)


def fact_states(text: str, facts: Facts) -> list[Fact]:
    """What became of every fact in the text."""
    clean = _clean(text)
    wrong = {f.removeprefix("contradiction: ").split(" (")[0] for f in find_faults(text, facts) if "contradiction" in f}
    out = []
    for name, value in facts.items():
        status = CONTRADICTED if name in wrong else SUPPORTED if states(clean, name, facts) else MISSING
        out.append(Fact(name, value, status))
    return out


def mark_text(text: str, facts: Facts) -> list[Piece]:
    """The text in pieces: stated facts, words against them, words without support, and the rest."""
    marks: list[str | None] = [None] * len(text)
    phrases: dict[str, list[str]] = {mark: [] for mark in _ORDER}
    for fault in find_faults(text, facts):
        kind, _, detail = fault.partition(": ")
        if kind == "contradiction":
            phrases[CONTRADICTED].append(_term(detail).removeprefix("not "))
        elif kind == "unsupported":
            phrases[UNSUPPORTED].append(_term(detail))
    clean = _clean(text)
    phrases[SUPPORTED] = [_said(name, value) for name, value in facts.items() if states(clean, name, facts)]
    for mark in _ORDER:
        for phrase in phrases[mark]:
            pattern = phrase if mark == SUPPORTED else r"\s+".join(map(re.escape, phrase.split()))
            for match in re.finditer(rf"(?<![\w-])(?:{pattern})(?![\w-])", text, re.IGNORECASE):
                if all(m is None for m in marks[slice(*match.span())]):
                    marks[slice(*match.span())] = [mark] * len(match[0])
    return _pieces(text, marks)


def _pieces(text: str, marks: list[str | None]) -> list[Piece]:
    out: list[Piece] = []
    for character, mark in zip(text, marks, strict=True):
        if out and out[-1].mark == (mark or ""):
            out[-1] = Piece(out[-1].text + character, out[-1].mark)
        else:
            out.append(Piece(character, mark or ""))
    return out


def _cut(pieces: list[Piece]) -> list[Piece]:
    """The pieces up to LONGEST characters."""
    out: list[Piece] = []
    left = LONGEST
    for piece in pieces:
        if len(piece.text) > left:
            return [*out, Piece(piece.text[:left] + " …", piece.mark)]
        out.append(piece)
        left -= len(piece.text)
    return out


def _said(name: str, value: str) -> str:
    """A pattern of how a text states a fact."""
    if name == "image":
        return r"derm(?:at)?oscop\w*" if value == "dermoscopic" else re.escape(value)
    if name == "age":
        return rf"{re.escape(value)}(?:[- ]years?(?:[- ]old)?)?"
    if name == "sex":
        return {"male": "man|male|boy|gentleman", "female": "woman|female|girl|lady"}.get(value, re.escape(value))
    return r"\s+".join(map(re.escape, value.split()))


def _term(detail: str) -> str:
    """The words of the text that a fault is about: "nevus" of "diagnosis (nevus)"."""
    found = re.fullmatch(r".* \((.*)\)", detail)
    return found[1] if found else detail


def _clean(text: str) -> str:
    return " ".join(text.lower().replace("’", "'").split())


def _placed(evaluation: Evaluation) -> tuple[list[dict[str, Any]], np.ndarray]:
    """The reports of the evaluation's records, and the place of each one's record."""
    place = {record_id: i for i, record_id in enumerate(evaluation.records.record_ids)}
    rows = read_reports(evaluation.folder)
    unknown = [row["record_id"] for row in rows if row["record_id"] not in place]
    if unknown:
        raise InputError(
            f"{evaluation.folder / REPORTS}: record '{unknown[0]}' was not evaluated; run `dermfm evaluate` again"
        )
    return rows, np.array([place[row["record_id"]] for row in rows], dtype=np.int64)
