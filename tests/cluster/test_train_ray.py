"""Training through Ray Train on a real Ray cluster of this machine: lost ranks, stops, verdicts, the same weights."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from cluster.preemption import StopFlag
from cluster.process import Process
from cluster.ray import RayError, ray_session
from cluster.ray_train import Ranks, Verdict, check_all_fit, run_on_ray
from dermfm import checkpoint
from dermfm.metrics import read_rows
from dermfm.zero import consolidated_weights

pytest.importorskip("ray", reason="Ray is not installed")
pytestmark = pytest.mark.timeout(1800)
STEPS = 60


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """An own cluster for the tests whose ranks do not train."""
    with ray_session(num_cpus=2):
        yield


def ranks(count: int, max_failures: int = 0, cpus: float = 0.5) -> Ranks:
    return Ranks(count, count, cpus, 0.0, max_failures)


def test_ranks_are_in_one_group_and_what_the_first_prints_is_printed_here(cluster, tmp_path, capsys):
    def main(process: Process, stop: StopFlag, verdict: Verdict) -> int:
        import torch
        import torch.distributed as dist

        from cluster.process import close_group, start_group

        start_group(process)
        total = torch.tensor([process.rank + 1.0])
        dist.all_reduce(total)
        close_group()
        assert dist.is_initialized(), "the group is Ray's to end"
        print(f"rank {process.rank} of {process.world}: {total.item():g}")
        print("told", file=sys.stderr)
        return 0

    assert run_on_ray(main, ranks(2), tmp_path / "notes") == 0
    said = capsys.readouterr()
    assert sorted(line for line in said.out.splitlines() if line.startswith("rank")) == [
        "rank 0 of 2: 3",
        "rank 1 of 2: 3",
    ]
    assert said.err.count("told") == 2
    assert not (tmp_path / "notes").exists()


def test_a_stop_reaches_the_ranks_is_told_at_once_and_ends_the_run_with_75(cluster, tmp_path, capsys):
    began = tmp_path / "began"

    def main(process: Process, stop: StopFlag, verdict: Verdict) -> int:
        began.touch()
        while not stop:
            time.sleep(0.05)
        began.write_text(str(stop.signal_name))
        return 75

    def ask() -> None:
        while not began.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGUSR1)

    threading.Thread(target=ask, daemon=True).start()
    assert run_on_ray(main, ranks(1), tmp_path / "notes") == 75
    assert began.read_text() == "SIGUSR1"
    assert "SIGUSR1 has come; stopping after this step" in capsys.readouterr().out


def test_a_verdict_ends_the_run_with_its_code_and_the_ranks_do_not_work_again(cluster, tmp_path):
    def main(process: Process, stop: StopFlag, verdict: Verdict) -> int:
        with (tmp_path / "starts").open("a") as file:
            file.write("start\n")
        verdict(2)
        os._exit(2)  # as the watchdog ends a rank that hangs in a collective

    assert run_on_ray(main, ranks(1, max_failures=3), tmp_path / "notes") == 2
    assert (tmp_path / "starts").read_text() == "start\n"


def test_ranks_that_fail_at_each_start_end_the_run_with_one_line(cluster, tmp_path, capsys):
    def main(process: Process, stop: StopFlag, verdict: Verdict) -> int:
        raise ValueError("no such thing\nand more")

    assert run_on_ray(main, ranks(1, max_failures=1), tmp_path / "notes") == 1
    said = capsys.readouterr()
    assert "Ray has started all of them again (start 2)" in said.out
    assert said.err == "Ray has given up after 2 starts: rank 0: ValueError: no such thing\n"


def test_ranks_that_no_node_can_hold_are_refused_before_anything_starts(cluster, tmp_path):
    with pytest.raises(RayError, match="a rank needs 64 CPUs and 0 GPUs; no node has them"):
        run_on_ray(lambda *_: 0, ranks(1, cpus=64.0), tmp_path / "notes")


def test_more_ranks_than_an_own_cluster_holds_are_refused_before_anything_starts(cluster):
    check_all_fit(ranks(4))
    with pytest.raises(RayError, match=r"5 ranks of 0\.5 CPUs .* this machine holds 4; give fewer ray\.workers"):
        check_all_fit(ranks(5))


@pytest.fixture
def command(config_values: dict[str, Any], tmp_path: Path) -> Callable[..., list[str]]:
    """command(run, key=value …) → the command line of a training run of 60 steps."""

    def line(run: Path, *keys: str) -> list[str]:
        values = {**config_values, "run": str(run), "epochs": STEPS * 8 / 40, "checkpoint_every": 80}
        config = tmp_path / f"{run.name}.yaml"
        config.write_text(json.dumps({**values, "validation": {"every": -1}}))
        return [sys.executable, "-m", "launch.cli", "train", str(config), *keys]

    return line


def rows(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    with contextlib.suppress(json.JSONDecodeError):  # a line that is being written
        return [row for row in read_rows(path) if "loss" in row] if path.is_file() else []
    return []


def workers_of(job: subprocess.Popen[str]) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        below = psutil.Process(job.pid).children(recursive=True)
        return [p for p in below if "RayTrainWorker" in " ".join(p.cmdline())]
    return []


def weights(run: Path) -> dict[str, np.ndarray]:
    name = checkpoint.step_name(STEPS)
    return {k: v.detach().numpy() for k, v in consolidated_weights(run / "ckpt", name).items()}


def test_a_rank_that_is_killed_costs_a_restart_and_changes_no_weight(command, environment, tmp_path):
    whole, own = tmp_path / "whole", tmp_path / "own"
    alone = subprocess.run(
        command(whole, "ranks=2"), env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert alone.returncode == 0, alone.stderr[-3000:]
    job = subprocess.Popen(
        command(own, "ray.workers=2", "ray.cpus=0.5"),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        kill_a_rank(job, own)
        out, err = job.communicate(timeout=900)
    finally:
        job.kill()
    assert job.returncode == 0, out + err
    assert "a rank was lost; Ray has started all of them again (start 2)" in out
    assert "resuming step-000000" in out
    assert [row["loss"] for row in rows(own)] == [row["loss"] for row in rows(whole)]
    expected, found = weights(whole), weights(own)
    assert expected.keys() == found.keys()
    assert all(np.array_equal(expected[name], found[name]) for name in expected)


def kill_a_rank(job: subprocess.Popen[str], run: Path) -> None:
    """Kill the second rank once there is a checkpoint to go on from."""
    found: list[psutil.Process] = []
    while len(found) != 2 or not (run / "ckpt" / "latest").is_file():
        assert job.poll() is None, job.communicate()
        found = found if len(found) == 2 else workers_of(job)
        time.sleep(0.02)
    found[1].kill()


@pytest.fixture
def two_nodes(root: Path, monkeypatch: pytest.MonkeyPatch, patient_nodes: None) -> Iterator[Any]:
    """A cluster of this machine whose head has one CPU, to which nodes come and go."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(root))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    small = {"num_cpus": 1, "object_store_memory": 100_000_000}
    found = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    found.one_more = lambda: found.add_node(**small)
    yield found
    found.shutdown()


@pytest.mark.soak
def test_ranks_of_a_to_b_go_on_with_fewer_when_a_node_is_lost_and_with_more_when_one_comes(
    command, environment, two_nodes, tmp_path
):
    """2 → 1 → 2 ranks, then a stop; the samples are those of an undisturbed run, and the losses nearly."""
    whole, own = tmp_path / "whole", tmp_path / "own"
    long = "epochs=600"
    second = two_nodes.one_more()
    line = command(own, long, "ray.workers=[1,2]", "ray.cpus=1", f"ray.address={two_nodes.address}")
    told = tmp_path / "told"
    with told.open("w") as file:
        job = subprocess.Popen(line, env=environment, stdout=file, stderr=file, text=True)
    try:
        await_told(job, told, "step 11/")
        two_nodes.remove_node(second, allow_graceful=False)
        await_told(
            job, told, "there is room for 1 ranks now, there was for 2; Ray has started all of them again (start 2)"
        )
        await_told(job, told, "saved by 2 ranks")
        fewer = rows(own)[-1]["step"]
        await_step(job, told, own, fewer + 20)
        two_nodes.one_more()
        await_told(
            job, told, "there is room for 2 ranks now, there was for 1; Ray has started all of them again (start 3)"
        )
        await_told(job, told, "saved by 1 ranks")
        more = rows(own)[-1]["step"]
        await_step(job, told, own, more + 5)
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=900) == 75, told.read_text()
    finally:
        job.kill()
    steps = len(rows(own))
    assert [row["step"] for row in rows(own)] == list(range(1, steps + 1))
    alone = subprocess.Popen(command(whole, long, "ranks=2"), env=environment, stdout=subprocess.DEVNULL)
    try:
        await_step(alone, told, whole, fewer + 15)
    finally:
        alone.terminate()
        alone.wait(timeout=300)
    ours, theirs = ([row["loss"] for row in rows(run)[: fewer + 15]] for run in (own, whole))
    assert np.allclose(ours, theirs, rtol=2e-2), (ours, theirs)


def await_told(job: subprocess.Popen[str], told: Path, text: str) -> None:
    while text not in told.read_text():
        assert job.poll() is None, told.read_text()
        time.sleep(0.1)


def await_step(job: subprocess.Popen[Any], told: Path, run: Path, step: int) -> None:
    while not rows(run) or rows(run)[-1]["step"] < step:
        assert job.poll() is None, told.read_text()
        time.sleep(0.1)
