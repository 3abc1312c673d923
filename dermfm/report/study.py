"""The page about a study: which ways of writing notes help under shift, and beyond the label, in words and pictures.

Read from the study's folder: study.parquet (a row for each cell and metric), effects.parquet or effects.json (paired
differences with intervals), and, where they are there, study.json (protocol, looks, versions), study.yaml, and the
cells' own JSON (notes, search).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from dermfm.config import InputError
from dermfm.report import chosen, figures, study_tables
from dermfm.report.run import ATLAS, read_saved
from dermfm.report.study_tables import tier_name
from dermfm.report.template import render_template
from dermfm.report.verdicts import AGAINST, CONTROLS, LEVEL, MARGIN, MIN_SEEDS, NAMES, Effect, answers, conclusion
from shards.files import write_text

ROWS, EFFECTS, SUMMARY, CONFIG, PAGE = "study.parquet", "effects.parquet", "study.json", "study.yaml", "report.html"
EFFECTS_JSON = "effects.json"
COLUMNS = (
    "strategy",
    "engine",
    "objective",
    "seed",
    "tier",
    "task",
    "scope_kind",
    "scope",
    "class_set",
    "metric",
    "value",
)
# What an effect needs, and the name of the table's column where it is another one.
EFFECT_COLUMNS = {
    "strategy": "strategy",
    "against": "reference",
    "difference": "effect",
    "ci_low": "ci_low",
    "ci_high": "ci_high",
    "p": "p",
    "p_holm": "p_holm",
    "seeds": "per_seed",
    "primary": "primary",
}
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Study:
    """What a study's folder holds."""

    folder: Path
    rows: list[Row]
    effects: list[Effect]
    cells: list[Row]
    summary: dict[str, Any]
    config_text: str


def read_study(folder: str | Path) -> Study:
    """Read a study's folder; InputError where it is none, or a file of it is missing or damaged."""
    path = Path(folder)
    if not path.is_dir():
        raise InputError(f"study: '{folder}' is not a folder; give the folder that `dermfm study` wrote")
    table = read_saved(path / ROWS, pq.read_table, "study")
    lacking = [name for name in COLUMNS if name not in table.column_names]
    if lacking:
        raise InputError(f"{path / ROWS}: has no column '{lacking[0]}'; run `dermfm study` again")
    if not table.num_rows:
        raise InputError(f"{path / ROWS}: holds no finished cell; run `dermfm study` until some are done")
    cells = [_read_json(one) for one in sorted((path / "cells").glob("*.json"))]
    summary, config = path / SUMMARY, path / CONFIG
    return Study(
        folder=path,
        rows=table.to_pylist(),
        effects=_read_effects(path, cells),
        cells=[cell for cell in cells if "strategy" in cell],
        summary=_read_json(summary) if summary.is_file() else {},
        config_text=config.read_text(encoding="utf-8") if config.is_file() else "",
    )


def write_study_page(folder: str | Path, out: str | Path | None = None, dry_run: bool = False) -> Path:
    """Write the page of a study (default: <folder>/report.html; a dry run only reads); its path."""
    study = read_study(folder)
    path = Path(out) if out else study.folder / PAGE
    if not dry_run:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, render_template("study.html", page_values(study)))
    return path


def study_table(folder: str | Path) -> str:
    """The study's main table in Markdown: a line for each strategy, with its conclusion above it; then what validation
    chose."""
    study = read_study(folder)
    external = external_of(study)
    blocks = []
    for tier in tiers_of(study):
        effects = [e for e in study.effects if e.tier == tier]
        table = study_tables.scores(study.rows, tier, external)
        blocks.append(f"{tier_name(tier)}. {conclusion(effects)}\n\n{study_tables.markdown(table, effects)}")
    if found := chosen.chosen_part(study.summary):
        blocks.append(chosen.markdown(found, study.summary))
    return "\n\n".join(blocks) + "\n"


def page_values(study: Study) -> dict[str, Any]:
    """Everything that the template shows."""
    external = external_of(study)
    return {
        "title": study.summary.get("name") or study.folder.absolute().name,
        "tiers": [tier_values(study, tier, external) for tier in tiers_of(study)],
        "external": external,
        "atlas": all(r["scope"].startswith(ATLAS) for r in study.rows if r["scope_kind"] == "dataset"),
        "level": LEVEL,
        "margin": MARGIN,
        "min_seeds": MIN_SEEDS,
        "chosen": chosen.chosen_part(study.summary),
        "looks": chosen.looks_sentence(study.summary),
        "notes": study_tables.note_lines(study.cells),
        "text_labels": study_tables.text_label_lines(study.rows),
        "about": study_tables.about_lines(study.summary, study.cells, study.rows),
        "searched": study_tables.search_lines(study.cells),
        "config": study.config_text,
    }


def tier_values(study: Study, tier: Any, external: list[str]) -> dict[str, Any]:
    """What the page shows of one tier."""
    effects = [e for e in study.effects if e.tier == tier]
    primary, other = [e for e in effects if e.primary], [e for e in effects if not e.primary]
    ends = [v for e in primary for v in (e.ci_low, e.ci_high, e.difference, *e.seeds) if v is not None]
    reach = 1.08 * max([2 * MARGIN, *map(abs, ends)])
    gaps = study_tables.gaps(study.rows, tier)
    scores = study_tables.scores(study.rows, tier, external)
    seeds = [(line.name, line.endpoint) for line in scores.lines if line.endpoint]
    return {
        "name": tier_name(tier),
        "conclusion": conclusion(effects),
        "answers": answers(effects),
        "forests": [
            (
                against,
                f"Against {NAMES[against]}",
                figures.forest_figure(f"differences to {NAMES[against]}", own, reach),
            )
            for against in AGAINST
            if (own := [e for e in primary if e.against == against])
        ],
        "effects": primary,
        "descriptive": other,
        "family": sum(e.strategy not in CONTROLS for e in primary),
        "scores": scores,
        "seeds_figure": figures.seeds_figure(seeds) if seeds else "",
        "gaps": gaps,
        "gap_figure": figures.gap_figure(gaps, "internal and external macro F1 of every strategy") if gaps else "",
    }


def tiers_of(study: Study) -> list[Any]:
    """The tiers of the study, in order."""
    return sorted({row["tier"] for row in study.rows if row["tier"] is not None}, key=str)


def external_of(study: Study) -> list[str]:
    """The external data sets that the study or one of its cells names; [] where none does."""
    told = (study.summary.get("protocol") or {}).get("external")
    made = next((c["made_of"]["external"] for c in study.cells if "external" in c.get("made_of", {})), None)
    return list(told or made or [])


def _read_effects(folder: Path, cells: list[Row]) -> list[Effect]:
    """The effects; one of a strategy whose notes mostly fell back to the template is no test of it."""
    path = folder / EFFECTS
    if not path.is_file() and (folder / EFFECTS_JSON).is_file():
        path = folder / EFFECTS_JSON
        rows = read_saved(path, lambda file: json.loads(file.read_text(encoding="utf-8")), "study")
    else:
        rows = read_saved(path, pq.read_table, "study").to_pylist()
    for row in rows:
        lacking = [n for n, other in EFFECT_COLUMNS.items() if n not in row and other not in row]
        if lacking:
            raise InputError(f"{path}: an effect has no '{lacking[0]}'; run `dermfm study` again")
    untested = {c["strategy"] for c in cells if not (c.get("notes") or {}).get("tested", True)}
    return [_effect(row, rows, untested) for row in rows]


def _effect(row: Row, rows: list[Row], untested: set[str]) -> Effect:
    """An effect of the table; the strategy's name tells engine and objective where the study has several of them."""
    values = {name: row[other] if other in row else row[name] for name, other in EFFECT_COLUMNS.items()}
    name = study_tables.arm_name((row["strategy"], row.get("engine") or "", row.get("objective") or ""), rows)
    return Effect(
        **values | {"strategy": name},
        endpoint=row.get("endpoint") or f"{row.get('metric')}, {row.get('scope')}",
        n_groups=row.get("groups", row.get("n_groups")),
        tier=row.get("tier") or 1,
        tested=bool(row.get("tested", True)) and row["strategy"] not in untested,
    )


def _read_json(path: Path) -> Row:
    """A JSON object; InputError where it is none."""
    content = read_saved(path, lambda file: json.loads(file.read_text(encoding="utf-8")), "study")
    if not isinstance(content, dict):
        raise InputError(f"{path}: is not a JSON object; remove it and run `dermfm study` again")
    return content
