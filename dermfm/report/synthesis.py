"""`dermfm notes … --report`: one self-contained page about a notes folder: what was kept, wrong, and what it cost."""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dermfm.config import short_hash
from dermfm.notes.checks import KINDS, examine
from dermfm.notes.information import text_label_information
from dermfm.notes.plan import NotesConfig, strategies_of
from dermfm.notes.store import SOURCES, read_notes
from dermfm.notes.strategies import Strategy
from dermfm.report import figures
from dermfm.report.notes import NoteLine, note_table
from dermfm.report.template import render_template
from shards.files import write_text

Row = dict[str, Any]
EXAMPLES = 3  # notes shown of each kind of fault
SHOWN = 4  # notes shown of each strategy
ALWAYS_TOLD = ("missing", "contradiction", "self-contradiction", "unsupported")  # a zero is worth saying, too
CHECKED = 2000  # released notes of a strategy that are checked again
COUNTED = 2000  # notes of a strategy whose n-grams are counted, so that strategies of different size compare


@dataclass(frozen=True)
class Section:
    """Everything that is told about the notes of one strategy by one engine."""

    line: NoteLine
    written: bool  # by a model
    model: str
    kept: float
    before: dict[str, float] | None
    after: dict[str, float] | None
    recall: float | None
    information: float
    chance: float
    distinct_1: float
    distinct_2: float
    self_overlap: float
    words: float
    tokens: int
    seconds: float | None
    faults: list[tuple[str, int, list[str]]]
    samples: list[str]


def write_notes_page(
    config: NotesConfig, table: pa.Table, out: Path, tell: Callable[[str], None] = lambda line: None
) -> Path:
    """Write the page about the notes of `config.out`, made of the records `table`, to `out`; its path.

    `tell` gets a line for each strategy whose released notes were checked anew. Needs no network to be read.
    InputError where the folder holds no notes.
    """
    values = page_values(config, table)
    write_text(out, render_template("synthesis.html", values))
    for section in values["sections"]:
        if section.after is not None:
            tell(released_line(section))
    return out


def released_line(section: Section) -> str:
    """What the checks say of a strategy's notes as they were released: the three figures that a lab looks at first."""
    assert section.after is not None
    wrong = section.after["contradiction"], section.after["self-contradiction"], section.after["unsupported"]
    share = "{:.2%} contradict a fact, {:.2%} themselves, {:.2%} say what no fact supports".format(*wrong)
    recall = "" if section.recall is None else f"; {section.recall:.4f} of the given facts are stated"
    return f"  {section.line.strategy} as released: {share}{recall}"


def page_values(config: NotesConfig, table: pa.Table) -> dict[str, Any]:
    """Everything that the template shows."""
    groups: dict[tuple[str, str, str], list[Row]] = collections.defaultdict(list)
    for row in read_notes(config.out).to_pylist():
        groups[row["strategy"], row["engine"], row["label_access"]].append(row)
    records = {record["record_id"]: record for record in table.to_pylist()}
    known = _known_strategies(config)
    lines = {(line.strategy, line.engine, line.label_access): line for line in note_table(config.out)}
    sections = [_section(lines[k], rows, records, known.get(k[0])) for k, rows in sorted(groups.items())]
    checked = [s for s in sections if s.before is not None or s.after is not None]
    return {
        "title": Path(config.out).name,
        "num_notes": sum(s.line.total for s in sections),
        "num_records": len({row["record_id"] for rows in groups.values() for row in rows}),
        "sources": SOURCES,
        "sections": sections,
        "kinds": [
            kind
            for kind in KINDS
            if kind in ALWAYS_TOLD or any((s.before or {}).get(kind) or (s.after or {}).get(kind) for s in checked)
        ],
        "checked": checked,
        "lengths": _length_figures(groups),
    }


def _known_strategies(config: NotesConfig) -> dict[str, Strategy]:
    """The configured strategies by name: facts can be checked again only where the prompt is at hand."""
    return {strategy.name: strategy for strategy in strategies_of(config)}


def _section(line: NoteLine, rows: list[Row], records: dict[str, Row], strategy: Strategy | None) -> Section:
    written = line.engine != "template"
    total = max(line.total, 1)
    counts = dict(zip(SOURCES, line.counts, strict=True))
    after, recall = _released(rows, records, strategy) if written else (None, None)
    seconds = [row["seconds"] for row in rows if row["seconds"] is not None]
    texts = [row["text"] for row in _spread(rows, COUNTED)]
    information, chance = _information(rows, records)
    return Section(
        line=line,
        written=written,
        model=", ".join(sorted({row["model"] for row in rows})),
        kept=(counts["generated"] + counts["regenerated"]) / total,
        before=_rates([row["first_faults"] for row in rows]) if written else None,
        after=after,
        recall=recall,
        information=information,
        chance=chance,
        distinct_1=distinct_share(texts, 1),
        distinct_2=distinct_share(texts, 2),
        self_overlap=self_overlap(texts),
        words=float(np.mean([len(row["text"].split()) for row in rows])),
        tokens=sum(row["num_tokens"] for row in rows),
        seconds=sum(seconds) if seconds else None,
        faults=_examples(rows) if written else [],
        samples=[row["text"] for row in _spread(rows, SHOWN)],
    )


def _rates(found: Sequence[list[str] | None]) -> dict[str, float] | None:
    """Kind → share of notes with such a fault; None where no first faults were stored."""
    known = [faults for faults in found if faults is not None]
    if not known:
        return None
    counts = collections.Counter(kind for faults in known for kind in {kind_of(f) for f in faults})
    return {kind: counts[kind] / len(known) for kind in KINDS}


def kind_of(fault: str) -> str:
    """The kind (of KINDS) of a stored fault."""
    return fault.split(":")[0].split(" (")[0]


def _released(
    rows: list[Row], records: dict[str, Row], strategy: Strategy | None
) -> tuple[dict[str, float] | None, float | None]:
    """(fault rates, given-fact recall) of the texts as released, checked anew; None where that cannot be done."""
    if strategy is None or strategy.prompt is None:
        return None, None
    faults, given, dropped = [], 0, 0
    for row in _spread(rows, CHECKED):
        if (record := records.get(row["record_id"])) is None or row["prompt_version"] != strategy.version:
            continue
        facts = strategy.facts(record)
        found = examine(row["text"], facts, strategy.rules)
        faults.append([str(fault) for fault in found])
        given, dropped = given + len(facts), dropped + sum(fault.kind == "missing" for fault in found)
    return _rates(faults), 1 - dropped / given if given else None


def _information(rows: list[Row], records: dict[str, Row]) -> tuple[float, float]:
    """(text_label_information of the notes, chance): fitted on the train split, tested on the others; where the notes
    are of one split alone, on halves of the groups."""
    known = [(row["text"], records[row["record_id"]]) for row in rows if row["record_id"] in records]
    known = [(text, record) for text, record in known if record["label"] is not None]
    is_train = [record["split"] == "train" for _, record in known]
    if all(is_train) or not any(is_train):
        is_train = [int(short_hash([record["group_id"]]), 16) % 2 == 0 for _, record in known]
    sides: list[tuple[list[str], list[int]]] = [([], []), ([], [])]
    for (text, record), fitted in zip(known, is_train, strict=True):
        sides[not fitted][0].append(text)
        sides[not fitted][1].append(record["label"])
    return text_label_information(*sides[0], *sides[1]), 1 / max(len(set(sides[1][1])), 1)


def _spread(rows: list[Row], count: int) -> list[Row]:
    """At most `count` rows, picked by a hash of their ids: the same ones in every page."""
    return sorted(rows, key=lambda row: short_hash(["page", row["note_id"]]))[:count]


def _examples(rows: list[Row]) -> list[tuple[str, int, list[str]]]:
    """(fault without its words, notes, some of its occurrences as "words: released text"), most frequent first."""
    found: dict[str, list[str]] = collections.defaultdict(list)
    for row in _spread(rows, len(rows)):
        for fault in dict.fromkeys(row["first_faults"] or row["faults"]):
            found[fault.split(" (")[0]].append(f"{fault} → {row['source']}: {row['text']}")
    ordered = sorted(found.items(), key=lambda item: -len(item[1]))
    return [(name, len(shown), shown[:EXAMPLES]) for name, shown in ordered]


def distinct_share(texts: Sequence[str], n: int) -> float:
    """distinct-n: different n-grams of words over all n-grams (Li et al. 2016, arXiv 1510.03055); NaN without any."""
    grams = [gram for text in texts for gram in _grams(text, n)]
    return len(set(grams)) / len(grams) if grams else math.nan


def self_overlap(texts: Sequence[str], n: int = 4, count: int = 200) -> float:
    """Share of a note's n-grams that another of (at most `count`) notes has too, mean over them: the n-gram precision
    within self-BLEU (Zhu et al. 2018, arXiv 1802.01886). 1: every phrase is a stock phrase."""
    sets = [set(_grams(text, n)) for text in texts[:count]]
    holders = collections.Counter(itertools.chain.from_iterable(sets))
    shares = [sum(holders[gram] > 1 for gram in own) / len(own) for own in sets if own]
    return float(np.mean(shares)) if shares else math.nan


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.lower().split()
    return list(zip(*(words[k:] for k in range(n)), strict=False))


def _length_figures(groups: dict[tuple[str, str, str], list[Row]]) -> list[str]:
    """Histograms of the notes' lengths, four strategies in each."""
    lengths = {f"{name[0]}, {name[1]}": [len(r["text"].split()) for r in rows] for name, rows in sorted(groups.items())}
    names = list(lengths)
    return [
        figures.histogram_figure("Length", "words", {name: lengths[name] for name in names[k : k + 4]})
        for k in range(0, len(names), 4)
    ]
