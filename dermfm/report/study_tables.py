"""The tables of a study's page: scores of every strategy and data set, notes, search, and what made the study."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dermfm.report.protocol import Lines, plain
from dermfm.report.tables import Cell, Gap, make_cell, number
from dermfm.report.tasks import TEXT_LABEL
from dermfm.report.verdicts import AGAINST, CONTROLS, Effect, signed

Row = dict[str, Any]
METRIC = "f1_macro"
NO_OBJECTIVE = "none"  # of the frozen probe, which stands beside the controls
MEAN = "external mean"
FINISHED = "finished cells"  # of the counts of looks at external sets
SETTINGS = ("lr", "text_weight")  # what a study searches over
SHOWN_BEFORE = ("looks_at_external", "looks", "endpoint", "chosen", "name")
TITLES = {
    "manifests": "Data (fingerprint of the shards)",
    "config": "Budget and recipe of a cell",
    "not_a_test": "Not a test of their strategy",
    "cells": "Cells",
    "family": "Family of the primary comparisons",
}


@dataclasses.dataclass(frozen=True)
class ScoreLine:
    """One strategy: its cells in the order of the columns, and every seed's value of the endpoint."""

    name: str
    control: bool
    num_seeds: int
    cells: list[Cell]
    endpoint: list[float]


@dataclasses.dataclass(frozen=True)
class Scores:
    """One tier's table of the endpoint's metric."""

    columns: list[str]
    lines: list[ScoreLine]


def scores(rows: Sequence[Row], tier: Any, external: Sequence[str]) -> Scores:
    """Macro F1 of image classification by strategy and data set, means over seeds, with the mean over external sets.

    The interval is over records: that of each seed, averaged. A best value is marked among all strategies.
    """
    own = [r for r in rows if r["tier"] == tier and r["metric"] == METRIC and r["class_set"] in (None, "classes")]
    own = [r for r in own if r["task"] in ("classify-image", "probe") and r["scope_kind"] == "dataset"]
    datasets = sorted({r["scope"] for r in own}, key=lambda d: (d in external, d))
    columns = [*datasets, *([MEAN] if external else [])]
    lines = []
    for key in _arms(own):
        mine = [r for r in own if _arm(r) == key]
        ends = _endpoint(mine, external)
        cells = [_mean_cell([r for r in mine if r["scope"] == d]) for d in datasets]
        cells += (
            [Cell(number(float(np.mean(ends))), _spread(ends))] if external and ends else [Cell("–")] * bool(external)
        )
        lines.append(
            ScoreLine(
                arm_name(key, own),
                key[0] in CONTROLS or key[2] == NO_OBJECTIVE,
                len({r["seed"] for r in mine}),
                cells,
                ends,
            )
        )
    lines.sort(key=lambda line: (not line.control, -float(np.mean(line.endpoint)) if line.endpoint else 0.0))
    return Scores(columns, _mark_best(lines))


def gaps(rows: Sequence[Row], tier: Any) -> list[Gap]:
    """Internal and external macro F1 of every strategy, means over seeds."""
    own = [r for r in rows if r["tier"] == tier and r["metric"] == METRIC and r["task"] == "classify-image"]
    own = [r for r in own if r["class_set"] in (None, "classes") and r["scope_kind"] == "partition"]
    out = []
    for key in _arms(own):
        values = [[r["value"] for r in own if _arm(r) == key and r["scope"] == s] for s in ("internal", "external")]
        inside, outside = ([v for v in side if v is not None] for side in values)
        if inside and outside:
            out.append(Gap(arm_name(key, own), "macro F1", float(np.mean(inside)), float(np.mean(outside))))
    return sorted(out, key=lambda gap: -gap.external)


def markdown(table: Scores, effects: Sequence[Effect]) -> str:
    """The table of one tier as Markdown, with the effects against each control beside the scores."""
    shown = [a for a in AGAINST if any(e.against == a and e.primary for e in effects)]
    head = ["strategy", *table.columns, *(f"− {against}" for against in shown)]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for line in table.lines:
        found = [
            next((e for e in effects if e.primary and (e.strategy, e.against) == (line.name, a)), None) for a in shown
        ]
        lines.append([line.name, *(c.value for c in line.cells), *(_effect_text(e) for e in found)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def note_lines(cells: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Yield of the notes that each strategy trained on, from the cells; the template, repaired and failed ones told."""
    out: dict[tuple[str, str], Row] = {}
    for cell in cells:
        notes = cell.get("notes") or {}
        if notes.get("num"):
            out.setdefault((cell["strategy"], cell.get("engine", "")), {"strategy": cell["strategy"], **notes})
            out[cell["strategy"], cell.get("engine", "")]["engine"] = cell.get("engine", "")
    return [out[key] for key in sorted(out)]


def text_label_lines(rows: Sequence[Row]) -> list[tuple[str, str, str, Cell]]:
    """(strategy, track, scope, text-label information) where the study measured it, one line each, means over seeds."""
    own = [r for r in rows if r["metric"] == TEXT_LABEL]

    def key_of(row: Row) -> tuple[str, str, str]:
        return row.get("eval_strategy") or row["strategy"], row.get("track") or "–", row["scope"]

    keys = dict.fromkeys(map(key_of, own))
    return [(*key, _mean_cell([r for r in own if key_of(r) == key])) for key in keys]


def search_lines(cells: Iterable[Mapping[str, Any]]) -> list[tuple[str, int, int, str]]:
    """(strategy, tier, settings tried, what was chosen how often): the search was the same for all."""
    tried: dict[tuple[int, str], int] = {}
    votes: dict[tuple[int, str], Counter[str]] = {}
    for cell in cells:
        search = cell.get("search") or {}
        if search.get("tries") and search.get("chosen") is not None:
            chosen = search["tries"][search["chosen"]]
            told = ", ".join(f"{name.replace('_', ' ')} {chosen[name]:g}" for name in SETTINGS if name in chosen)
            key = (cell["tier"], cell["strategy"])
            tried[key] = len(search["tries"])
            votes.setdefault(key, Counter())[told or "that of the configuration"] += 1
    return [
        (strategy, tier, tried[tier, strategy], "; ".join(f"{what} ({n}×)" for what, n in counts.most_common()))
        for (tier, strategy), counts in sorted(votes.items())
    ]


def about_lines(summary: Mapping[str, Any], cells: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> Lines:
    """The study's protocol as (term, text): roles, seeds, budget, looks, fingerprints, versions, whatever it says."""
    counted = {(_arm(r), r["seed"], r["tier"]) for r in rows}
    manifests = sorted({str(c["manifest"]) for c in cells if c.get("manifest")})
    lines = {
        "Finished cells": f"{len(counted)} in {len({_arm(r) for r in rows})} arms",
        "Seeds": plain(sorted({r["seed"] for r in rows if r["seed"] is not None})),
        "Looks at the external test sets": _looks(summary, counted),
        "Data (fingerprint of the shards)": plain(manifests) if manifests else "",
        "Versions": plain(common_versions([c.get("versions") or {} for c in cells])),
    }
    for name, value in summary.items():
        if name not in SHOWN_BEFORE and value not in (None, [], {}, ""):
            title = TITLES.get(name, name.replace("_", " ").capitalize())
            lines[title] = lines.get(title) or plain(value)
    return [(term, text) for term, text in lines.items() if text]


def tier_name(tier: Any) -> str:
    """A tier for people."""
    return {"1": "Tier 1, frozen towers", "2": "Tier 2, fine-tuned towers"}.get(str(tier), f"Tier {tier}")


def arm_name(key: tuple[str, str, str], rows: Sequence[Row]) -> str:
    """A strategy's name, with engine and objective where the study has several of them for it."""
    extra = [
        part
        for part, field in zip(key[1:], ("engine", "objective"), strict=True)
        if len({r.get(field) for r in rows if r["strategy"] == key[0]}) > 1
    ]
    return " · ".join([key[0], *extra])


def _arm(row: Row) -> tuple[str, str, str]:
    return row["strategy"], row["engine"] or "", row["objective"] or ""


def _arms(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    return list(dict.fromkeys(_arm(r) for r in rows))


def _endpoint(rows: Sequence[Row], external: Sequence[str]) -> list[float]:
    """One mean over the external data sets for every seed that has all of them."""
    by_seed: dict[Any, list[float]] = {}
    for row in rows:
        if row["scope"] in external and row["value"] is not None:
            by_seed.setdefault(row["seed"], []).append(row["value"])
    return [float(np.mean(values)) for values in by_seed.values() if len(values) == len(external)]


def _mean_cell(rows: Sequence[Row]) -> Cell:
    """The mean over seeds with the mean of the seeds' intervals."""
    known = [r for r in rows if r["value"] is not None]
    if not known:
        return Cell("–")
    bounds = {name: [r[name] for r in known if r.get(name) is not None] for name in ("ci_low", "ci_high")}
    means = {name: float(np.mean(b)) if len(b) == len(known) else None for name, b in bounds.items()}
    value = float(np.mean([r["value"] for r in known]))
    return make_cell({"value": value, "chance": known[0].get("chance")} | means)


def _spread(values: Sequence[float]) -> str:
    """Lowest and highest seed."""
    return f"seeds {min(values):.3f}–{max(values):.3f}" if len(values) > 1 else ""


def _mark_best(lines: list[ScoreLine]) -> list[ScoreLine]:
    out = [dataclasses.replace(line, cells=list(line.cells)) for line in lines]
    for column in range(len(out[0].cells) if out else 0):
        values = [float(line.cells[column].value) for line in out if line.cells[column].value != "–"]
        for line in out:
            cell = line.cells[column]
            if values and cell.value != "–" and float(cell.value) == max(values):
                line.cells[column] = dataclasses.replace(cell, best=True)
    return out


def _effect_text(effect: Effect | None) -> str:
    if effect is None:
        return ""
    bounds = ""
    if effect.ci_low is not None and effect.ci_high is not None:
        bounds = f" ({signed(effect.ci_low)} to {signed(effect.ci_high)})"
    return f"{signed(effect.difference)}{bounds}" + ("\\*" if effect.verdict in ("better", "worse") else "")


def _looks(summary: Mapping[str, Any], counted: set[Any]) -> str:
    """How often external test sets were scored: what the study says, else once for every finished cell."""
    count = summary.get("looks_at_external") or len(counted)
    beside = [f"{n} × {what}" for what, n in (summary.get("looks") or {}).items() if what != FINISHED]
    told = f"; beside that {', '.join(beside)}" if beside else ""
    return f"{count}: every finished cell was scored on them once{told}; none of these scores chose anything"


def common_versions(found: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Versions of all cells; where they differ, all of them."""
    names = dict.fromkeys(name for one in found for name in one)
    return {name: " and ".join(sorted({str(one[name]) for one in found if name in one})) for name in names}
