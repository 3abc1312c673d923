"""What `dermfm records` prints: counts by data set × split × class, and what was left out."""

from __future__ import annotations

import pyarrow as pa
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dermfm.records.build import Built
from dermfm.records.table import SPLITS
from dermfm.records.vocabulary import CLASS_CODES

WIDTH = 120  # columns where the output is no terminal


def class_counts(table: pa.Table) -> dict[tuple[str, str], list[int]]:
    """(data set, split) → number of images per class 0–7, and without a label as the ninth; data sets by name."""
    counts: dict[tuple[str, str], list[int]] = {}
    columns = (table.column(name).to_pylist() for name in ("dataset", "split", "label"))
    for dataset, split, label in zip(*columns, strict=True):
        row = counts.setdefault((dataset, split), [0] * (len(CLASS_CODES) + 1))
        row[len(CLASS_CODES) if label is None else label] += 1
    return dict(sorted(counts.items(), key=lambda item: (item[0][0], SPLITS.index(item[0][1]))))


def print_summary(built: Built, out: str) -> None:
    """The counts as a table, groups, and one line for each kind of loss."""
    table = built.table
    title = f"{table.num_rows} records in {len(set(table.column('group_id').to_pylist()))} groups"
    shown = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title_justify="left")
    shown.add_column("data set", overflow="fold")  # a name cut off may be that of two data sets
    shown.add_column("split")
    for name in ("images", *CLASS_CODES, "none"):
        shown.add_column(name, justify="right")
    counts = class_counts(table)
    last = ""
    for (dataset, split), row in counts.items():
        shown.add_row("" if dataset == last else dataset, split, str(sum(row)), *map(str, row))
        last = dataset
    if len({dataset for dataset, _ in counts}) > 1:
        shown.add_section()
        for split in SPLITS:
            all_sets = [sum(one) for one in zip(*(row for (_, of), row in counts.items() if of == split), strict=True)]
            if all_sets:
                shown.add_row("all", split, str(sum(all_sets)), *map(str, all_sets))
    console = Console()
    console = console if console.is_terminal else Console(width=WIDTH)
    console.print(shown)
    for line in built.losses.lines():
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if built.was_there:
        console.print(
            f"{out} is up to date: nothing to do (overwrite=true builds it again)",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
