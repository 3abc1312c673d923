"""Work on many images, in parts that are done when their file is there: in processes, or as a Ray Data job.

A part is a Parquet file of one row an image, each with the key of what it was made from (file, settings, version). A
second run reads the parts and does only what is missing, changed or was lost. Workers read and write the images
themselves: paths go to them and rows come back, which are kept as Arrow tables, some hundred bytes an image.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.ray import ray_session
from dermfm.config import short_hash
from dermfm.progress import Meter
from dermfm.records.processes import mapping, one_thread
from shards.files import replacing

PART = 64  # images: what a killed worker loses at most
# Parts that a Ray task does, and tasks that wait at each worker: without waiting ones a worker stands idle until the
# next comes, and with larger ones the last is long alone. The job ran at 0.6 of a bare loop's speed with neither.
PARTS_A_TASK, TASKS_WAITING = 6, 3
RAY_FROM = 20_000  # images; fewer are done by a pool of processes, before Ray would have started
Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One image: `key` identifies file, settings and version; `target` is the file to be made, "" for none."""

    key: str
    source: str
    target: str = ""


@dataclass(frozen=True)
class Place:
    """Where parts run: processes of this machine (0: one a core; a Ray of its own for RAY_FROM images and more), or the
    Ray cluster that answers at `address`."""

    workers: int = 0
    address: str | None = None

    @property
    def num_workers(self) -> int:
        """Processes to use on this machine."""
        return self.workers or os.cpu_count() or 1


class Rows(Mapping[str, Row]):
    """Rows by their key, kept as Arrow tables: a third of what dictionaries take. Of a key that comes again the newest
    counts."""

    def __init__(self) -> None:
        self._tables: list[pa.Table] = []
        self._places: dict[str, tuple[int, int]] = {}

    def add(self, table: pa.Table) -> None:
        """The rows of a table with the column "key"."""
        number = len(self._tables)
        self._tables.append(table)
        self._places.update((key, (number, i)) for i, key in enumerate(table.column("key").to_pylist()))

    def __getitem__(self, key: str) -> Row:
        number, i = self._places[key]
        table = self._tables[number]
        return {name: column[i].as_py() for name, column in zip(table.column_names, table.columns, strict=True)}

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


# Does the tasks of one part and gives their rows in order; must be importable by a worker. Each row has the task's
# "key".
Work = Callable[[Sequence[Task]], list[Row]]


def run_parts(tasks: Sequence[Task], work: Work, folder: Path, schema: pa.Schema, place: Place, what: str) -> Rows:
    """The rows of every task by key; what an earlier run left in `folder` is not done again.

    A row of the schema column "bytes" is taken as done only while its target has that size.
    """
    done = read_rows(folder, schema.names)
    left = [task for task in tasks if not _is_done(task, done.get(task.key))]
    if not left:
        return done
    folder.mkdir(parents=True, exist_ok=True)
    parts = [left[i : i + PART] for i in range(0, len(left), PART)]
    run = _runner(len(left), place)
    with Meter(len(tasks), what, "images", start=len(tasks) - len(left)) as meter:
        for table in run(parts, work, folder, schema, place):
            done.add(table)
            meter.advance(table.num_rows)
    return done


def read_rows(folder: Path, columns: Sequence[str]) -> Rows:
    """The rows of all finished parts of a folder; of a key that was done again the newest part counts.

    Parts of an older version without one of the columns are passed over.
    """
    files = sorted(folder.glob("*.parquet"), key=lambda file: file.stat().st_mtime_ns)
    rows = Rows()
    for file in files:
        if set(columns) <= set(pq.read_schema(file).names):
            rows.add(pq.read_table(file))
    return rows


def do_part(part: Sequence[Task], work: Work, folder: Path, schema: pa.Schema) -> pa.Table:
    """Do one part and write its file under a temporary name first; its rows."""
    table = pa.Table.from_pylist(work(part), schema=schema)
    path = folder / f"{short_hash([task.key for task in part])}.parquet"
    # A part is small and read once, as a whole: dictionaries and statistics would cost more than they save.
    with replacing(path, flush=False) as temporary:
        pq.write_table(table, temporary, use_dictionary=False, write_statistics=False)
    return table


def _is_done(task: Task, row: Row | None) -> bool:
    if row is None:
        return False
    if not task.target or row.get("error"):
        return True
    try:
        return os.stat(task.target).st_size == row["bytes"]
    except OSError:
        return False


def _runner(num_images: int, place: Place) -> Callable[..., Iterator[pa.Table]]:
    if place.address or (num_images >= RAY_FROM and place.num_workers > 1):
        return _on_ray
    return _here


def _here(parts: list[list[Task]], work: Work, folder: Path, schema: pa.Schema, place: Place) -> Iterator[pa.Table]:
    with mapping(place.num_workers, sum(map(len, parts))) as mapped:
        yield from mapped(partial(do_part, work=work, folder=folder, schema=schema), parts)


def _on_ray(parts: list[list[Task]], work: Work, folder: Path, schema: pa.Schema, place: Place) -> Iterator[pa.Table]:
    """A Ray Data job: a row of the dataset is a part; the rows of its images stream back as they are done."""
    with ray_session(place.address, None if place.address else place.num_workers):
        import ray.data

        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        items = [{"part": [[task.key, task.source, task.target] for task in part]} for part in parts]
        cores = max(1, int(ray.cluster_resources().get("CPU", 1)))
        tasks = max(-(-len(parts) // PARTS_A_TASK), min(len(parts), cores))
        workers = min(cores, tasks)
        # As many as there is room for where other jobs share the cluster; Ray starts one anew that dies.
        pool = ray.data.ActorPoolStrategy(
            min_size=1, max_size=workers, initial_size=workers, max_tasks_in_flight_per_actor=1 + TASKS_WAITING
        )
        done = ray.data.from_items(items, override_num_blocks=tasks).map_batches(
            _Worker,
            fn_constructor_args=(work, folder.resolve(), schema),
            compute=pool,
            num_cpus=1,
            batch_size=1,
            batch_format="pyarrow",
        )
        for batch in done.iter_batches(batch_size=None, batch_format="pyarrow"):
            assert isinstance(batch, pa.Table)
            yield batch


class _Worker:
    """An actor of a Ray Data job: gives the rows of the parts of a batch."""

    def __init__(self, work: Work, folder: Path, schema: pa.Schema) -> None:
        one_thread()
        self.work, self.folder, self.schema = work, folder, schema

    def __call__(self, batch: pa.Table) -> pa.Table:
        parts = ([Task(*task) for task in part] for part in batch.column("part").to_pylist())
        return pa.concat_tables(do_part(part, self.work, self.folder, self.schema) for part in parts)
