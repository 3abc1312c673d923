"""The job: make what cells share, run the cells that are missing, write the tables.

A finished cell is one JSON under <out>/cells; the same command does only what is missing. Several jobs may work on one
folder, each with its share of the cells; whoever ends last writes the whole tables.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dermfm.config import InputError, to_dict, to_yaml
from dermfm.evaluate.probe import fit_probe
from dermfm.evaluate.records import CLASS_SETS
from dermfm.evaluate.shift import ProtocolConfig
from dermfm.progress import Meter, duration
from dermfm.study import cells as stored
from dermfm.study import tier2
from dermfm.study.config import BEST, IMAGE_ONLY, NO_ENGINE, NO_OBJECTIVE, PROBE, Cell, StudyConfig, all_cells
from dermfm.study.notes import CellNotes, cell_notes, plan_engine
from dermfm.study.prepare import Shared, check_goals, prepare, prepare_tokens
from dermfm.study.score import Scorer, versions
from dermfm.study.tables import CONFIG, write_tables
from dermfm.study.tier1 import Data, alone, train_cell
from shards.files import write_text

RunJob = Callable[[str, Any, Path], int]


def run_study(config: StudyConfig, run_job: RunJob) -> int:
    """Run the study's share of cells. `run_job(job, config, folder)` runs another job in a process of its own and
    returns its exit code. Returns 0, or the exit code of a job of tier 2 that did not end well.
    """
    check(config)
    Path(config.out).mkdir(parents=True, exist_ok=True)
    if config.results and (taken := stored.take_up(config.out, config.results)):
        print(f"cells: {taken} taken from {config.results}")
    if config.tables:
        write_tables(config, all_cells(config, best_of(config)), {}, told_protocol(config))
        return 0
    write_text(Path(config.out) / CONFIG, to_yaml(config))
    shared = prepare(config)
    every = all_cells(config, best_of(config))
    cells = [cell for cell in every if not config.only or cell.strategy in config.only]
    notes = {(c.strategy, c.engine): cell_notes(config, c, shared.notes, len(shared.records["train"])) for c in cells}
    made_of = {cell: ingredients(config, cell, notes[cell.strategy, cell.engine], shared) for cell in cells}
    missing = missing_cells(config, cells, made_of)
    own = [cell for k, cell in enumerate(cells) if k % config.cells[1] == config.cells[0] and cell in missing]
    print(f"cells: {len(cells)}, {len(cells) - len(missing)} done, {len(own)} to do here", flush=True)
    code = _run_tier1(config, own, notes, made_of, shared) if config.tier == 1 else 0
    if config.tier == 2:
        code = tier2.run(config, own, notes, made_of, shared, run_job)
    write_tables(config, every, made_of, shared.protocol)
    return code


def check(config: StudyConfig) -> None:
    """What the study would refuse at its start: unknown strategies, a tier 2 without its tier 1, tables of nothing."""
    config.written()
    if config.tables:
        told_protocol(config)
    if config.tier == 2:
        best_of(config)


def describe(config: StudyConfig) -> list[str]:
    """For people: the cells, what each trains on and what they share. Nothing is made."""
    check(config)
    cells = all_cells(config, best_of(config))
    there = {cell for cell in cells if stored.path_of(config.out, cell).is_file()}
    lines = [f"{cell.id}{'  done' if cell in there else ''}" for cell in cells]
    told = f"{len(cells)} cells of tier {config.tier}, {len(there)} done"
    if config.tables:
        return [*lines, f"{told}; tables and page would be written anew"]
    shared = [f"records {config.records.out}", f"shards {config.shards.out}", f"notes {config.notes.out}"]
    if config.tier == 1:
        shared.append(f"tokens of {config.tokens.model.image.name} and {config.tokens.model.text.name}")
    if Path(config.records.out).is_file():
        for engine in config.engines:
            plan, _ = plan_engine(config, engine)
            shared.append(f"{len(plan.notes)} training notes ({engine.name}), {plan.num_missing} to be written")
    tries = len(config.tokens.search.settings(IMAGE_ONLY))
    budget = (
        f"{config.tokens.epochs:g} epochs × {tries} settings" if config.tier == 1 else f"{config.train.epochs:g} epochs"
    )
    return [
        *lines,
        f"{told}; each sees the same samples ({budget})",
        f"shared by all: {', '.join(shared)}",
    ]


def best_of(config: StudyConfig) -> list[str]:
    """[strategy, engine] of tier 1's best by the mean validation score over seeds, for tier 2; [] for tier 1.

    InputError where tier 1 has no finished cell of a strategy that is tested.
    """
    if config.tier == 1 or BEST not in config.tier2_strategies:
        return []
    scores: dict[tuple[str, str], list[float]] = {}
    for content in finished_cells(config):
        if content["tier"] == 1 and content["strategy"] in config.strategies and content["notes"]["tested"]:
            found = content["search"]["tries"][content["search"]["chosen"]]["f1_macro"]
            scores.setdefault((content["strategy"], content["engine"]), []).append(found)
    if not scores:
        raise InputError(
            f"tier2_strategies: 'best' needs finished cells of tier 1 in {config.out}; run the study with tier=1 first"
        )
    best = max(sorted(scores), key=lambda pair: float(np.mean(scores[pair])))
    return list(best)


def finished_cells(config: StudyConfig) -> list[dict[str, Any]]:
    """The finished cells of `out`, and of `results` those that `out` has not taken up yet."""
    folders = [config.results, config.out] if config.results else [config.out]
    found = {content["id"]: content for folder in folders for content in stored.read_cells(folder)}
    return [found[name] for name in sorted(found)]


def told_protocol(config: StudyConfig) -> ProtocolConfig:
    """The protocol with the roles that the configuration gives, else those that the finished cells were made with.

    InputError where there is no finished cell.
    """
    made = next((c["made_of"] for c in finished_cells(config) if "external" in c["made_of"]), None)
    if made is None:
        raise InputError(f"tables: {config.out} has no finished cell; run the study without tables=true first")
    protocol = dataclasses.replace(
        config.protocol,
        internal=config.protocol.internal or made["internal"],
        external=config.protocol.external or made["external"],
    )
    check_goals(config.goals, protocol)
    return protocol


def ingredients(config: StudyConfig, cell: Cell, notes: CellNotes, shared: Shared) -> dict[str, Any]:
    """All that a cell's result depends on; where it changes, the cell is made again."""
    made: dict[str, Any] = {
        "records": shared.fingerprint,
        "notes": notes.hash,
        "strategies": dict.fromkeys(config.members(cell.strategy), 1.0),
        "objectives": to_dict(config.objective(cell.objective).weights),
        "internal": shared.protocol.internal,
        "external": shared.protocol.external,
    }
    if config.tier == 1:
        return made | {"tokens": to_dict(config.tokens)}
    return made | {"train": tier2.recipe(config)}


def missing_cells(config: StudyConfig, cells: Sequence[Cell], made_of: dict[Cell, dict[str, Any]]) -> set[Cell]:
    """Cells without a file, or with one that was made of something else, which is told."""
    missing = set()
    for cell in cells:
        path = stored.path_of(config.out, cell)
        changed = stored.stale(stored.read_cell(path), made_of[cell]) if path.is_file() else []
        if changed:
            print(f"{cell.id}: was made with other {', '.join(changed[:4])}; it is made again")
        if changed or not path.is_file():
            missing.add(cell)
    return missing


def _run_tier1(
    config: StudyConfig, own: Sequence[Cell], notes: dict[tuple[str, str], CellNotes],
    made_of: dict[Cell, dict[str, Any]], shared: Shared,
) -> int:  # fmt: skip
    if not own:
        return 0
    data = prepare_tokens(config, shared)
    scorer = Scorer(config, shared)
    _probe(config, scorer, data, shared)
    with Meter(len(own), "cells", "cells") as meter, alone():
        for cell in own:
            began = time.monotonic()
            read = notes[cell.strategy, cell.engine]
            weights = made_of[cell]["strategies"]
            objective = config.objective(cell.objective)
            trained = train_cell(config.tokens, objective, cell.strategy, weights, read.by_record, data, cell.seed)
            content, probabilities = scorer.content(cell, trained, data)
            content |= {"made_of": made_of[cell], "notes": read.about, "manifest": shared.manifest.fingerprint}
            content |= {"seconds": round(time.monotonic() - began, 1), "versions": versions()}
            stored.write_cell(config.out, cell, content, probabilities)
            meter.advance()
            told = trained.tries[trained.chosen]
            print(
                f"{cell.id}: validation {told['f1_macro']:.3f} (lr {told['lr']:g}, text {told['text_weight']:g}),"
                f" external {scorer.endpoint(content):.3f}, {duration(content['seconds'])}",
                flush=True,
            )
    return 0


def _probe(config: StudyConfig, scorer: Scorer, data: Data, shared: Shared) -> None:
    """The frozen probe beside the cells: a balanced logistic regression on the mean token, chosen on validation."""
    cell = Cell(1, PROBE, NO_ENGINE, NO_OBJECTIVE, 0)
    made_of = {"records": shared.fingerprint, "images": data.images.identity}
    path = stored.path_of(config.out, cell)
    if path.is_file() and not stored.stale(stored.read_cell(path), made_of):
        return
    features = {
        split: np.stack([data.images.tokens[row].astype(np.float32).mean(0) for row in data.images.rows(split)])
        for split in shared.records
    }
    labels = {split: records.labels for split, records in shared.records.items()}
    known = {split: values >= 0 for split, values in labels.items()}
    fitted = fit_probe(*[x[s][known[s]] for s in ("train", "valid") for x in (features, labels)])
    probabilities = {s: fitted.probabilities(features[s], len(CLASS_SETS["classes"])) for s in ("valid", "test")}
    content = {
        "made_of": made_of, "notes": {"num": 0, "tested": True}, "manifest": shared.manifest.fingerprint,
        "search": {"c": fitted.c, "tried": {str(k): v for k, v in fitted.tried.items()}}, "versions": versions(),
        "results": stored.compact_rows(scorer.heads("probe", probabilities["test"], {"seed": 0})),
        "predicted": {split: stored.digits(p) for split, p in probabilities.items()},
    }  # fmt: skip
    stored.write_cell(config.out, cell, content, probabilities)
