"""Killed at any moment: actors, a node of two, the driver. Every note is there once, and says what it would have said.

The model is real (random weights), so that a note's faults and tokens show what was generated even where the text fell
back to the template.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dermfm.notes import store
from dermfm.records.table import SCHEMA, write_records

pytest.importorskip("ray", reason="Ray is not installed")
CLASSES = [(2, "benign", "nevus"), (6, "malignant", "melanoma"), (5, "malignant", "basal cell carcinoma")]
SITES = ("back", "scalp", "lower extremity", "hand")
TIMELESS = [name for name in store.NOTE_COLUMNS if name != "seconds"]


class Nodes:
    """Ray on this machine as two nodes: a head without CPUs, where the driver joins, and one that may be lost."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.small = {"object_store_memory": 100_000_000, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **self.small})
        self.second = self._join()
        self.address = self.cluster.address

    def lose_node(self) -> None:
        """The second node is gone without a word; another one joins."""
        self.cluster.remove_node(self.second, allow_graceful=False)
        self.second = self._join()

    def _join(self) -> Any:
        return self.cluster.add_node(num_cpus=1, object_store_memory=100_000_000)

    def kill_actor(self, chance: random.Random) -> bool:
        """SIGKILL to one actor process of these two nodes; False where none is up."""
        raylets = [info.process.pid for node in self._nodes() for info in node.all_processes["raylet"]]
        try:
            below = [p for pid in raylets for p in psutil.Process(pid).children(recursive=True)]
            chance.choice([p for p in below if _title(p).startswith("ray::_Actor")]).kill()
        except (IndexError, psutil.NoSuchProcess):  # none is up, or it has ended meanwhile
            return False
        return True

    def _nodes(self) -> list[Any]:
        return [self.cluster.head_node, *self.cluster.worker_nodes]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture
def nodes(root: Path, monkeypatch: pytest.MonkeyPatch, patient_nodes: None) -> Iterator[Nodes]:
    monkeypatch.setenv("PYTHONPATH", str(root))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    found = Nodes()
    yield found
    found.cluster.shutdown()


def records(path: Path, count: int) -> Path:
    """So many records of three classes, which have more or fewer facts: so their notes have many kinds of faults."""
    rows = []
    for k in range(count):
        label, malignancy, name = CLASSES[k % 3]
        row: dict[str, Any] = dict.fromkeys(SCHEMA.names)
        row |= {"record_id": f"{k:016x}", "dataset": "HAM10000", "source_id": str(k), "image": "x.jpg"}
        row |= {"modality": "dermoscopic", "split": "train", "label": label, "malignancy": malignancy, "class": name}
        row |= {"matched_class": name, "group_id": str(k), "age": float(20 + k % 60) if k % 5 else None}
        row |= {"sex": ("male", "female", None)[k // 3 % 3], "site": (*SITES, None)[k // 7 % (len(SITES) + 1)]}
        rows.append(row)
    write_records(pa.Table.from_pylist(rows, schema=SCHEMA), path)
    return path


def start(root: Path, words: list[str], log: Path) -> subprocess.Popen[bytes]:
    """`dermfm notes` as a process of its own."""
    with log.open("ab") as file:
        command = [sys.executable, "-m", "launch.cli", "notes", *words]
        return subprocess.Popen(command, cwd=root, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})


def advance(out: Path, process: subprocess.Popen[bytes], parts: int) -> None:
    """Wait until `parts` more parts are there, or the process has ended."""
    wanted = len(store.done_parts(out)) + parts
    deadline = time.monotonic() + 900
    while len(store.done_parts(out)) < wanted and process.poll() is None:
        assert time.monotonic() < deadline, "no part came for 900 s"
        time.sleep(0.05)


def survive(root: Path, nodes: Nodes, words: list[str], out: Path, kills: list[str], log: Path) -> int:
    """Run to the end while killing, at random moments; returns how many kills met a run under way."""
    chance, met = random.Random(3), 0
    process = start(root, words, log)
    try:
        for kind in kills:
            advance(out, process, chance.choice([0, 1, 1, 2]))
            time.sleep(chance.random() / 3)  # short against a run's twelve parts: most kills meet one under way
            if process.poll() is not None:
                break
            met += 1
            if kind == "node":
                nodes.lose_node()
            elif kind == "driver":
                process.kill()
                process.wait()
                process = start(root, words, log)
            else:
                while not nodes.kill_actor(chance) and process.poll() is None:
                    time.sleep(0.1)
        assert process.wait(timeout=1500) == 0, log.read_text()[-3000:]
    finally:
        process.kill()
        process.wait()
    return met


def compare(root: Path, nodes: Nodes, tiny: Any, folder: Path, count: int, kills: list[str]) -> int:
    """Make the same notes in peace and under fire; the rows must be equal. Returns the kills that met a run."""
    model = tiny.write_tiny_llm(folder / "model")
    path = records(folder / "records.parquet", count)
    words = [f"records={path}", "strategies=[narrative,template]", f"engine.model={model}", "engine.attempts=2"]
    words += ["part_size=20", "lease=5", "engine.max_new_tokens=24"]
    calm, rough, log = folder / "calm", folder / "rough", folder / "log"
    undisturbed = start(root, [*words, f"out={calm}", "ray=never"], log)
    assert undisturbed.wait(timeout=1500) == 0, log.read_text()[-3000:]
    more = [f"out={rough}", "ray=always", f"address={nodes.address}"]
    met = survive(root, nodes, [*words, *more], rough, kills, log)
    expected, found = store.read_notes(calm).select(TIMELESS), _all_rows(rough).select(TIMELESS)
    assert found.num_rows == 2 * count
    assert len(set(found.column("note_id").to_pylist())) == 2 * count
    assert found.sort_by("note_id").to_pylist() == expected.sort_by("note_id").to_pylist()
    assert len({tuple(row["faults"]) for row in found.to_pylist()}) > count // 4
    assert not list(rough.glob("*.tmp"))
    return met


def _all_rows(folder: Path) -> pa.Table:
    """Rows as they lie in the parts, none dropped."""
    parts = store.done_parts(folder)
    return pa.concat_tables([pq.read_table(parts[index]) for index in sorted(parts)])


@pytest.mark.timeout(3000)
def test_an_actor_a_node_and_the_driver_are_killed_and_no_note_is_lost_doubled_or_changed(root, nodes, tiny, tmp_path):
    assert compare(root, nodes, tiny, tmp_path, 120, ["actor", "node", "driver"]) >= 2


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_twenty_kills_during_two_thousand_notes(root, nodes, tiny, tmp_path):
    kills = [["actor", "node", "actor", "driver"][k % 4] for k in range(20)]
    met = compare(root, nodes, tiny, tmp_path, 1000, kills)
    print(f"{met} kills met a run under way")  # shown with -rP
    assert met >= 15
