"""Notes on a real Ray cluster of this machine: dead actors, poisoned items, nothing lost, nothing twice."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cluster.actors import work_through
from cluster.ray import RayError, ray_session
from cluster.replicas import Resources, room_for
from dermfm.notes import store
from dermfm.notes import synthesize as job
from dermfm.notes.engines.protocol import EngineConfig
from dermfm.notes.plan import NotesConfig
from dermfm.notes.synthesize import plan_notes, synthesize
from dermfm.notes.write import NoteWriter
from dermfm.records.table import SCHEMA, write_records

pytest.importorskip("ray", reason="Ray is not installed")
pytestmark = pytest.mark.timeout(1800)
QUARTER = Resources(cpus=0.25)


def test_an_address_where_no_cluster_answers_is_told():
    with pytest.raises(RayError, match="no Ray cluster answers"), ray_session("127.0.0.1:1"):
        pass


@pytest.fixture(scope="module")
def cluster():
    """An own cluster for all tests of this file, ended behind them; SIGTERM means to it what it means to a job."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ray_session(num_cpus=2):
        yield
    signal.signal(signal.SIGTERM, before)


def test_a_job_that_has_joined_ray_still_hears_a_scheduler_that_ends_it(cluster):
    """Ray's own handlers, of Python and of its core, would end it without a word, or with a stack."""

    def be_told() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt):
        be_told()


def _square_worker() -> type:
    class Square:  # defined here, so that it travels to the actors by value
        def __init__(self, folder: str) -> None:
            self.folder = folder

        def work(self, items: list[int]) -> list[int]:
            for item in items:
                mark = Path(self.folder) / f"met-{item}"
                if item in (17, 60) and not mark.exists():
                    mark.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                if item == 33:
                    os.kill(os.getpid(), signal.SIGKILL)
            return [item * item for item in items]

    return Square


def leases(count: int, size: int) -> list[tuple[int, list[int]]]:
    return [(start, list(range(start, min(start + size, count)))) for start in range(0, count, size)]


def test_dead_actors_cost_nothing_and_the_item_that_kills_is_given_back_alone(cluster, tmp_path):
    done = list(work_through(leases(80, 8), _square_worker(), (str(tmp_path),), replicas=2, resources=QUARTER))
    results = {d.key + d.offset + k: r for d in done if d.results is not None for k, r in enumerate(d.results)}
    assert results == {k: k * k for k in range(80) if k != 33}
    assert sum(len(d.items) for d in done) == 80
    (poisoned,) = [d for d in done if d.results is None]
    assert list(poisoned.items) == [33]
    assert "killed" in poisoned.error


def test_a_bundle_that_no_node_has_is_refused_before_anything_starts(cluster):
    with pytest.raises(RayError, match="no node has them"):
        room_for(Resources(cpus=1.0, gpus=64.0))
    assert room_for(Resources(cpus=1.0)) == 2


def test_a_worker_that_cannot_start_ends_the_job_with_its_reason(cluster):
    class Broken:
        def __init__(self) -> None:
            raise OSError("no weights here")

    with pytest.raises(RayError, match="no weights here"):
        list(work_through(leases(4, 2), Broken, replicas=1, resources=QUARTER))


def test_an_error_inside_the_work_is_raised_in_the_driver(cluster):
    class Failing:
        def work(self, items: list[int]) -> list[int]:
            raise ValueError("broken work")

    with pytest.raises(ValueError, match="broken work"):
        list(work_through(leases(4, 2), Failing, replicas=1, resources=QUARTER))


def _records(path: Path, count: int) -> Path:
    rows = []
    for k in range(count):
        row: dict[str, Any] = dict.fromkeys(SCHEMA.names)
        row |= {"record_id": f"{k:016x}", "dataset": "HAM10000", "source_id": str(k), "image": "x.jpg"}
        row |= {"modality": "dermoscopic", "split": "train", "label": 2, "malignancy": "benign", "class": "nevus"}
        row |= {"group_id": str(k), "age": float(20 + k % 60), "sex": "male"}
        rows.append(row)
    write_records(pa.Table.from_pylist(rows, schema=SCHEMA), path)
    return path


def _dying_writer(folder: Path) -> type:
    class DyingWriter(NoteWriter):
        """Dies in the middle of its work, four times over all actors."""

        def work(self, items: Any) -> Any:
            rows = super().work(items)
            for k in range(4):
                mark = folder / f"death-{k}"
                if not mark.exists():
                    mark.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
            return rows

    return DyingWriter


def test_every_note_is_there_once_although_actors_die_and_texts_equal_the_undisturbed_run(
    cluster, tmp_path, monkeypatch
):
    path = _records(tmp_path / "records.parquet", 120)
    keys: dict[str, Any] = {"records": str(path), "strategies": ["narrative", "label"], "part_size": 25, "lease": 5}
    calm = NotesConfig(out=str(tmp_path / "calm"), ray="never", **keys)
    rough = NotesConfig(out=str(tmp_path / "rough"), ray="always", replicas="2", **keys)
    for settings in (calm, rough):
        settings.engine.kind = "template"
    plan, table = plan_notes(calm)
    synthesize(calm, plan, table)
    monkeypatch.setattr(job, "NoteWriter", _dying_writer(tmp_path))
    plan, table = plan_notes(rough)
    tally = synthesize(rough, plan, table)
    assert len(list(tmp_path.glob("death-*"))) == 4
    assert tally.errors == 0
    notes = store.read_notes(rough.out)
    assert sorted(notes.column("note_id").to_pylist()) == sorted(plan.notes)
    undisturbed = store.read_notes(calm.out)
    assert undisturbed.select(["note_id", "text"]).equals(notes.select(["note_id", "text"]))


def _watched_writer(folder: Path) -> type:
    class Watched(NoteWriter):
        """Leaves its process id; the one that follows dies once, in the middle of the work."""

        def follow(self) -> None:
            (folder / f"follower-{os.getpid()}").touch()
            super().follow()

        def work(self, items: Any) -> Any:
            rows = super().work(items)
            followers = list(folder.glob("follower-*"))
            if len(followers) == 1 and not (folder / "killed").exists():
                (folder / "killed").touch()
                os.kill(int(followers[0].name.partition("-")[2]), signal.SIGKILL)
                super().work(items)
            return rows

    return Watched


def test_a_model_held_by_two_actors_writes_what_the_whole_one_writes_though_one_of_them_dies(
    cluster, tiny, tmp_path, monkeypatch
):
    engine = EngineConfig(model=str(tiny.write_tiny_llm(tmp_path / "model")), max_new_tokens=16)
    path = _records(tmp_path / "records.parquet", 30)
    keys: dict[str, Any] = {"records": str(path), "strategies": ["narrative"], "part_size": 15, "lease": 5}
    calm = NotesConfig(out=str(tmp_path / "calm"), ray="never", engine=engine, **keys)
    plan, table = plan_notes(calm)
    synthesize(calm, plan, table)
    monkeypatch.setattr(job, "NoteWriter", _watched_writer(tmp_path))
    both = replace(engine, tensor_parallel=2)
    sharded = NotesConfig(out=str(tmp_path / "sharded"), engine=both, **keys)
    plan, table = plan_notes(sharded)
    tally = synthesize(sharded, plan, table)
    assert (tmp_path / "killed").exists()
    assert len(list(tmp_path.glob("follower-*"))) == 2
    assert tally.errors == 0
    columns = ["note_id", "text", "faults", "num_tokens"]
    assert store.read_notes(sharded.out).select(columns).equals(store.read_notes(calm.out).select(columns))
