"""A rank that fails, stalls or is killed ends the job soon and tells why; the same command then goes on exactly."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dermfm import checkpoint, zero
from dermfm.metrics import read_rows

SCRIPT = Path(__file__).with_name("failure_rank.py")
NUM_STEPS = 8
# A fault point each: its place, the rank that dies there, in which of its calls.
FAULT_POINTS = [
    ("kill-while-writing", 1, 3),
    ("kill-before-commit", 0, 2),
    ("kill-before-latest", 0, 2),
    pytest.param("kill-before-writing", 1, 2, marks=pytest.mark.soak),
    pytest.param("kill-while-writing", 0, 2, marks=pytest.mark.soak),
    pytest.param("kill-before-pruning", 0, 3, marks=pytest.mark.soak),
]

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="session")
def start(warm: Any, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Job]:
    """start(config, fault, rank, step) → two ranks that run `failure_rank.py`."""

    def started(config: Path, fault: str = "none", rank: int = 0, step: int = 0) -> Job:
        folder, arguments = tmp_path_factory.mktemp("job"), [str(config), fault, str(rank), str(step)]
        return Job(
            [
                warm.Rank(SCRIPT, arguments, {**environment, **place}, folder / f"out{i}", folder / f"err{i}")
                for i, place in enumerate(warm.places(2))
            ]
        )

    return started


class Job:
    """Two ranks that nobody watches from outside, as under srun."""

    def __init__(self, ranks: list[Any]) -> None:
        self.ranks = ranks

    def end(self, timeout_s: float = 180) -> list[subprocess.CompletedProcess[str]]:
        """Every rank's end."""
        try:
            told = [rank.communicate(timeout=timeout_s) for rank in self.ranks]
        finally:
            for rank in self.ranks:
                rank.kill()
        return [subprocess.CompletedProcess([], r.returncode, *t) for r, t in zip(self.ranks, told, strict=True)]


@pytest.fixture
def config(config_values, tmp_path) -> Path:
    """A run of eight steps with a checkpoint every two."""
    path = tmp_path / "train.json"
    values = {**config_values, "run": str(tmp_path / "run"), "epochs": NUM_STEPS * 8 / 40, "validation": {"every": -1}}
    path.write_text(json.dumps(values))
    return path


@pytest.fixture(scope="module")
def uninterrupted(config_values, start, tmp_path_factory) -> dict[str, torch.Tensor]:
    """The final weights of the run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    path = folder / "train.json"
    values = {**config_values, "run": str(folder / "run"), "epochs": NUM_STEPS * 8 / 40, "validation": {"every": -1}}
    path.write_text(json.dumps(values))
    ends = start(path).end()
    assert [e.returncode for e in ends] == [0, 0], ends[0].stderr[-3000:]
    return final_weights(folder / "run")


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    return zero.consolidated_weights(run / "ckpt", checkpoint.step_name(NUM_STEPS))


def check_same(run: Path, expected: dict[str, torch.Tensor]) -> None:
    """The run ended with the same weights and told every step once."""
    found = final_weights(run)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == list(range(1, NUM_STEPS + 1))
    assert not [p.name for p in (run / "ckpt").iterdir() if ".tmp" in p.name]


def seconds_since(config: Path) -> float:
    return time.time() - float(config.with_suffix(".struck").read_text())


def test_a_rank_that_raises_ends_the_other_within_half_a_minute_with_rank_step_and_reason(config, start):
    ends = start(config, "raise", 1, 3).end()
    assert seconds_since(config) < 30
    assert [e.returncode for e in ends] == [1, 1]
    line = "dermfm train: rank 1 failed in step 3 (forward and backward): RuntimeError: made to fail"
    assert line in ends[0].stderr.splitlines()
    assert "Traceback" not in ends[0].stderr
    assert ends[1].stderr.count("Traceback") == 1
    assert "rank 1 failed in step 3" in (config.parent / "run" / "log" / "rank0.log").read_text()


def test_broken_data_on_one_rank_are_one_line_of_bad_input(config, start):
    ends = start(config, "loader", 1, 3).end()
    assert [e.returncode for e in ends] == [2, 2]
    told = "dermfm train: rank 1: train-00000.tar: sample r007 is not what its index says"
    assert [line for e in ends for line in e.stderr.splitlines() if line.startswith("dermfm")] == [told]
    assert not any("Traceback" in e.stderr for e in ends)


def test_a_stall_shows_every_rank_s_stack_names_the_slowest_and_ends_the_job(config, start):
    values = json.loads(config.read_text()) | {"stall_s": 20.0, "stall_end_s": 26.0}
    config.write_text(json.dumps(values))
    ends = start(config, "stall", 1, 3).end()
    assert all(e.returncode == 1 for e in ends)
    logs = [(config.parent / "run" / "log" / f"rank{r}.log").read_text() for r in range(2)]
    assert all("Current thread" in log or "Thread 0x" in log for log in logs)
    assert "failure_rank.py" in logs[1]  # where it sleeps
    assert "all ranks' stacks" in ends[0].stdout
    assert "a job without a step border" in ends[0].stderr


@pytest.mark.parametrize(("fault", "rank", "call"), FAULT_POINTS)
def test_killed_at_a_fault_point_of_saving_the_run_goes_on_to_the_same_weights(
    config, start, uninterrupted, fault, rank, call
):
    ends = start(config, fault, rank, call).end()
    assert ends[rank].returncode == -signal.SIGKILL
    assert ends[1 - rank].returncode != 0
    again = start(config).end()
    assert [e.returncode for e in again] == [0, 0], again[0].stderr[-3000:]
    check_same(config.parent / "run", uninterrupted)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_twenty_kills_at_random_times_change_nothing(config_values, start, tmp_path):
    """SIGKILL of both ranks or of one, until twenty have struck; a checkpoint every step, so that many hit one."""
    steps = 120
    values = {**config_values, "epochs": steps * 8 / 40, "checkpoint_every": 8, "validation": {"every": -1}}
    config = tmp_path / "train.json"
    config.write_text(json.dumps({**values, "run": str(tmp_path / "run")}))
    rng, kills, saving = random.Random(7), 0, 0
    while kills < 20:
        before = len(checkpoint.complete_steps(tmp_path / "run" / "ckpt"))
        job = start(config)
        wait_for_steps(tmp_path / "run", job, rng.randint(1, 5))
        time.sleep(rng.uniform(0, 0.6))
        saving += bool(list((tmp_path / "run" / "ckpt").glob("*.tmp")))
        struck = [r for r in job.ranks if r.poll() is None and (rng.random() < 0.7 or r is job.ranks[0])]
        assert struck, f"the run was over after {kills} kills ({before})"
        for rank in struck:
            os.kill(rank.pid, signal.SIGKILL)
        kills += 1
        job.end()
    ends = start(config).end(900)
    assert [e.returncode for e in ends] == [0, 0], ends[0].stderr[-3000:]
    whole = tmp_path / "whole.json"
    whole.write_text(json.dumps({**values, "run": str(tmp_path / "whole")}))
    assert [e.returncode for e in start(whole).end(900)] == [0, 0]
    expected, found = (
        zero.consolidated_weights(tmp_path / name / "ckpt", checkpoint.step_name(steps)) for name in ("whole", "run")
    )
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert saving > 0, "no kill came during a checkpoint"


def wait_for_steps(run: Path, job: Job, count: int) -> None:
    """Until the job has logged `count` steps of its own."""
    path, began = run / "metrics.jsonl", time.monotonic()
    seen: set[int] = set()
    first = path.stat().st_mtime if path.exists() else 0.0
    while len(seen) < count and time.monotonic() - began < 170 and job.ranks[0].poll() is None:
        if path.exists() and path.stat().st_mtime != first:
            seen.add(int(path.stat().st_mtime * 1000))
        time.sleep(0.05)
