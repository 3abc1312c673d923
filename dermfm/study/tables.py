"""A study's tables (study.parquet, a row a cell and metric; effects.parquet; study.json), its Markdown, its page."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dermfm.config import to_dict
from dermfm.evaluate.results import ROW_KEYS
from dermfm.evaluate.shift import ProtocolConfig
from dermfm.report.study import CONFIG, study_table, write_study_page
from dermfm.report.study_tables import FINISHED, common_versions
from dermfm.report.verdicts import MIN_SEEDS
from dermfm.study import cells as stored
from dermfm.study.chosen import chosen_models
from dermfm.study.config import NO_OBJECTIVE, REFERENCES, Cell, StudyConfig
from dermfm.study.effects import EFFECT_SCHEMA, LEVEL, PRIMARY, Truth, effects
from shards.files import write_text

STUDY, EFFECTS, SUMMARY, TABLE = "study.parquet", "effects.parquet", "study.json", "table.md"
VALIDATION = "validation"
NUMBERS = ("value", "ci_low", "ci_high", "chance")
COUNTS = ("n", "pool", "seed")
STUDY_SCHEMA = pa.schema(
    [
        ("cell", pa.string()), ("strategy", pa.string()), ("engine", pa.string()), ("objective", pa.string()),
        ("seed", pa.int64()), ("tier", pa.int64()), ("tested", pa.bool_()),
        *(
            (name, pa.float64() if name in NUMBERS else pa.int64() if name in COUNTS else pa.string())
            for name in ROW_KEYS
            if name != "seed"
        ),
    ]
)  # fmt: skip


def write_tables(
    config: StudyConfig, cells: Sequence[Cell], made_of: Mapping[Cell, Mapping[str, Any]], protocol: ProtocolConfig
) -> Path:
    """Write all tables and the page, whose path comes back, from the finished cells of the folder, those of other
    tiers and the probe included.

    `cells` are all of the tier, `made_of` what those are made of that are asked for now. Cells that were made of
    something else than the present configuration says are left out.
    """
    names = {cell.id for cell in cells}
    known = {cell.id: made for cell, made in made_of.items()}
    contents = [c for c in stored.read_cells(config.out) if c["tier"] != config.tier or _counts(c, names, known)]
    truth = Truth(stored.read_scored(config.out), protocol, config.resamples, config.seed)
    found = effects([c for c in contents if c["objective"] != NO_OBJECTIVE], truth, config.seed)
    out = Path(config.out)
    _write(pa.Table.from_pylist([row for c in contents for row in cell_rows(c)], schema=STUDY_SCHEMA), out / STUDY)
    _write(pa.Table.from_pylist(found, schema=EFFECT_SCHEMA), out / EFFECTS)
    about = summary(config, contents, cells, protocol, found)
    about |= {"chosen": chosen_models(contents, truth, config.goals, config.seed)}
    write_text(out / SUMMARY, json.dumps(about, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_text(out / TABLE, study_table(out))
    page = write_study_page(out)
    if config.results:
        told = [CONFIG] if (out / CONFIG).is_file() else []
        stored.publish(out, config.results, (STUDY, EFFECTS, SUMMARY, TABLE, page.name, *told))
    print("\n".join(verdict(found)))
    print(f"{out / STUDY}, {out / EFFECTS}, {out / TABLE}: {len(contents)} cells, {len(found)} effects")
    return page


def _counts(content: Mapping[str, Any], names: set[str], known: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a cell belongs to the present study: the probe, or a cell of its own that was made of what it says.

    Of cells that `only` leaves out for now it is not known what they would be made of; they count.
    """
    if content["objective"] == NO_OBJECTIVE:
        return True
    made_of = known.get(content["id"])
    return content["id"] in names and (made_of is None or not stored.stale(content, made_of))


def cell_rows(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a cell in study.parquet: its metrics, and what it reached on the validation split."""
    head = {name: content[name] for name in ("strategy", "engine", "objective", "seed", "tier")}
    head |= {"cell": content["id"], "tested": content["notes"]["tested"]}
    rows = [head | {k: v for k, v in row.items() if k != "seed"} for row in stored.full_rows(content)]
    search = content.get("search", {})
    if "tries" in search:
        for metric in ("f1_macro", "balanced_accuracy"):
            told = {"task": "classify-image", "scope_kind": "partition", "scope": VALIDATION, "class_set": "classes"}
            value = search["tries"][search["chosen"]].get(metric)
            rows.append(
                head | dict.fromkeys(ROW_KEYS) | told | {"metric": metric, "value": value, "seed": content["seed"]}
            )
    return rows


def summary(
    config: StudyConfig, contents: Sequence[Mapping[str, Any]], cells: Sequence[Cell], protocol: ProtocolConfig,
    found: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    """What a reader of the tables must know: protocol, looks, search, cells that are missing, versions."""
    done = {c["id"] for c in contents}
    tiers = sorted({c["tier"] for c in contents} | {config.tier})
    scored = looks(config, contents)
    return {
        "name": Path(config.results or config.out).absolute().name,
        "endpoint": {"metric": PRIMARY[0], "task": "classify-image", "scope": "mean over the external data sets"},
        "family": {
            "comparisons": {f"tier {t}": sum(r["primary"] and r["tier"] == t for r in found) for t in tiers},
            "references": list(REFERENCES),
            "strategies": sorted({row["strategy"] for row in found}),
            "correction": f"Holm within each tier, level {LEVEL:g}",
        },
        "intervals": "95 % percentile bootstrap: groups within strata of data sets, the same draw for both arms; seeds "
        "as second level",
        "resamples": config.resamples,
        "protocol": to_dict(protocol),
        "selection": "by macro F1 on the internal validation split: in tier 1 the setting of each cell; tier 2 has one "
        "setting for all cells, and the last checkpoint of each run is scored",
        "looks_at_external": sum(scored.values()),
        "looks": scored,
        "cells": {"finished": len(done), "missing": [cell.id for cell in cells if cell.id not in done]},
        "not_a_test": sorted({c["strategy"] for c in contents if not c["notes"]["tested"]}),
        "manifests": sorted({c["manifest"] for c in contents if c.get("manifest")}),
        "versions": common_versions([c.get("versions") or {} for c in contents]),
        "config": {f"tier {tier}": _recipe(config, contents, tier) for tier in tiers},
    }


def looks(config: StudyConfig, contents: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How often a trained model has been scored on the external test sets in this study, and what for: once a finished
    cell (never while its setting was chosen), once more for every one that was made again, and what the configuration
    says of other times."""
    again = stored.num_replaced(config.out)
    return {FINISHED: len(contents)} | ({"cells made again": again} if again else {}) | config.other_looks


def _recipe(config: StudyConfig, contents: Sequence[Mapping[str, Any]], tier: int) -> dict[str, Any]:
    """Budget and recipe of a tier's cells: what they were made with; without any, what the configuration says."""
    name = "tokens" if tier == 1 else "train"
    made = next((c["made_of"][name] for c in contents if c["tier"] == tier and name in c["made_of"]), None)
    return made or to_dict(config.tokens if tier == 1 else config.train)


def verdict(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """The primary comparisons in words."""
    lines = []
    for row in (r for r in found if r["primary"]):
        shown = (
            f"{row['effect']:+.3f} [{_signed(row['ci_low'])}, {_signed(row['ci_high'])}], Holm p {row['p_holm']:.3f}"
        )
        what = "no evidence either way"
        if len(row["seeds"]) < MIN_SEEDS:
            what = f"too few seeds, {MIN_SEEDS} are needed"
        elif row["significant"]:
            what = "better" if row["effect"] > 0 else "worse"
        lines.append(f"tier {row['tier']} {row['strategy']} against {row['reference']}: {shown}: {what}")
    return lines


def _signed(value: float | None) -> str:
    return "?" if value is None else f"{value:+.3f}"


def _write(table: pa.Table, path: Path) -> None:
    temporary = path.with_name(path.name + ".tmp")
    pq.write_table(table, temporary, compression="zstd")
    os.replace(temporary, path)
