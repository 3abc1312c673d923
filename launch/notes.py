"""Synthesize clinical notes for the records: one row a note in <out>/part-NNNNN.parquet.

`template`, `label` and `measured` need no model; prompted strategies (narrative, abcd, characteristics; with a model
that sees also open, native, native_blind) are written by a language model on Ray actors, checked against the facts,
tried again, repaired, or replaced by the template, and each row says which. `shuffled` and `shuffled_within_class` give
the training notes of `of` to other records. The same command continues what was interrupted and makes only what is
missing. --report writes a page about the notes into the folder (report.html).
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from cluster import allocation
from cluster.ray import RayError
from dermfm.config import InputError
from dermfm.notes.controls import check_source, write_controls
from dermfm.notes.plan import NotesConfig
from dermfm.notes.store import SOURCES
from dermfm.notes.synthesize import Tally, TooManyFailures, plan_notes, summary, synthesize


def schema(call: Any) -> type:
    """The job's configuration."""
    return NotesConfig


def check(config: NotesConfig, _: int) -> None:
    """What the job would refuse at its start, for `submit`."""
    plan_notes(config)


def run(config: NotesConfig, call: Any) -> int:
    """Make the missing notes: 0 done, 1 too many failed. In an allocation, all tasks but the first offer Ray a node."""
    plan, table = plan_notes(config)
    check_source(config)
    if config.address == allocation.ADDRESS and not allocation.is_head() and not call.dry_run:
        return allocation.serve() if plan.num_missing else 0  # the first task starts no Ray for nothing
    wanted = Counter(note.strategy.name for note in plan.notes.values())
    done = len(plan.notes) - plan.num_missing - plan.num_elsewhere
    others = f", {plan.num_elsewhere} left to the other shares" if plan.num_elsewhere else ""
    print(f"notes: {len(plan.notes)} wanted ({_counts(wanted)}); {done} done, {plan.num_missing} to do{others}")
    if call.dry_run or not (plan.num_missing or done):
        return 0
    began = time.monotonic()
    inside = config.address == allocation.ADDRESS and plan.num_missing
    try:
        with allocation.head() if inside else contextlib.nullcontext():
            tally = synthesize(config, plan, table)
    except TooManyFailures as error:
        print(f"dermfm notes: {error}", file=sys.stderr)
        return 1
    except RayError as error:
        raise InputError(f"ray: {error}") from error
    for control, count in write_controls(config, table).items():
        print(f"{control}: {count} notes of '{config.of}' given to other training records")
    _print_summary(config, tally, time.monotonic() - began)
    if call.report:
        from dermfm.report.synthesis import write_notes_page

        print(f"page: {write_notes_page(config, table, Path(config.out) / 'report.html', tell=print)}")
    return 0


def _print_summary(config: NotesConfig, tally: Tally, seconds: float) -> None:
    made = sum(tally.made.values())
    if made:
        print(f"{made} notes in {seconds:.0f} s ({made / seconds:.1f} notes/s), {tally.errors} with an error")
    for strategy, counts in summary(config).items():
        total = sum(counts.values())
        kept = counts["generated"] + counts["regenerated"]
        told = _counts({source: counts[source] for source in SOURCES if counts[source]})
        share = f"; yield {kept / total:.3f}" if kept or counts["repaired"] else ""
        print(f"  {strategy}: {total} notes ({told}){share}")
    print(f"in {config.out}")


def _counts(counts: Any) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
