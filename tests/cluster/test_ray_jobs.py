"""`dermfm submit ray` against the job server of a real Ray cluster on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest

from cluster import ray_job
from cluster.allocation import RayNode
from cluster.local import free_port
from dermfm import checkpoint
from dermfm.metrics import read_rows
from dermfm.notes import store
from dermfm.records.table import SCHEMA, write_records
from dermfm.zero import consolidated_weights
from launch.cli import main

pytest.importorskip("ray", reason="Ray is not installed")
pytestmark = pytest.mark.timeout(5400)


@pytest.fixture(scope="module")
def head() -> Iterator[tuple[str, int]]:
    """Address of the job server, and process, of an own cluster, which is ended with its processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("OMP_NUM_THREADS", "1")
        for _ in range(4):  # a free port may be taken meanwhile
            folder = tempfile.mkdtemp(prefix="dermfm-ray-", dir="/tmp")  # sockets: short
            dashboard = free_port()
            node = RayNode([*start_options(folder), f"--dashboard-port={dashboard}"])
            address = f"http://127.0.0.1:{dashboard}"
            try:
                if answers(address, node):
                    yield address, node.pid
                    return
                told = node.last_line()
            finally:
                node.end()
                shutil.rmtree(folder, ignore_errors=True)
        pytest.fail(f"no job server came up: {told}")


def start_options(folder: str) -> list[str]:
    """A head with two CPUs on this host alone. Its ports are free ones: another process may take one meanwhile."""
    options = ["--head", f"--port={free_port()}", f"--temp-dir={folder}", "--num-cpus=2", "--node-ip-address=127.0.0.1"]
    options += ["--include-dashboard=true", f"--ray-client-server-port={free_port()}"]
    return [*options, f"--dashboard-agent-listen-port={free_port()}", "--object-store-memory=100000000"]


def answers(address: str, node: RayNode) -> bool:
    """Whether the job server comes up before the node ends, or 900 s have gone."""
    end = time.monotonic() + 900
    while time.monotonic() < end and not node.has_ended():
        try:
            with urllib.request.urlopen(f"{address}/api/version", timeout=30):
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    return False


@pytest.fixture
def server(head: tuple[str, int]) -> str:
    """The address of the job server."""
    return head[0]


def test_notes_are_made_by_the_job_server_with_log_and_exit_code(server, tmp_path, capsys):
    rows = []
    for k in range(40):
        row = dict.fromkeys(SCHEMA.names)
        row |= {
            "record_id": f"{k:016x}",
            "dataset": "HAM10000",
            "source_id": str(k),
            "image": "x.jpg",
            "class": "nevus",
        }
        row |= {"modality": "dermoscopic", "split": "train", "label": 2, "malignancy": "benign", "group_id": str(k)}
        rows.append(row)
    write_records(pa.Table.from_pylist(rows, schema=SCHEMA), tmp_path / "records.parquet")
    out = tmp_path / "the 'notes' $(touch hacked)"
    words = ["notes", f"records={tmp_path / 'records.parquet'}", f"out={out}", "strategies=[template]", "ray=always"]
    assert main(["submit", "ray", *words, f"address={server}", "environment.SEEN=yes"]) == 0
    assert "notes: 40 wanted (template 40); 0 done, 40 to do" in capsys.readouterr().out
    notes = store.read_notes(out).column("record_id").to_pylist()
    assert sorted(notes) == [row["record_id"] for row in rows]
    job = json.loads((out / "jobs.jsonl").read_text())
    assert (job["scheduler"], job["address"]) == ("ray", server)
    assert ray_job.state(server, job["id"])["state"] == "SUCCEEDED"
    assert not list(tmp_path.rglob("hacked"))


def test_a_command_that_fails_gives_its_exit_code_and_its_log(server, tmp_path, capsys):
    (tmp_path / "seen.txt").write_text("the working directory")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "left.pyc").write_text("out")
    job = ray_job.submit(server, 'cat seen.txt; ls; echo " $WORD"; exit 7', str(tmp_path), {"WORD": "told"})
    assert ray_job.follow(server, job) == 7
    said = capsys.readouterr().out
    assert "the working directory" in said
    assert " told" in said
    assert "__pycache__" not in said


def test_a_job_that_is_stopped_counts_as_resumable(server, tmp_path):
    job = ray_job.submit(server, "echo began; sleep 600", str(tmp_path), {})
    while ray_job.state(server, job)["state"] == "PENDING":
        time.sleep(0.2)
    ray_job.stop(server, job)
    assert ray_job.follow(server, job) == 75


STEPS = 60


@pytest.mark.soak
def test_training_sent_to_a_cluster_survives_a_killed_rank_and_a_cancel_and_ends_with_the_same_weights(
    head, environment, config_values, tmp_path, capsys
):
    address, cluster = head
    environment = {**environment, "RAY_AUTH_MODE": "disabled"}  # as the cluster
    whole, own = tmp_path / "whole", tmp_path / "own"
    config = tmp_path / "train.yaml"
    values = {**config_values, "epochs": STEPS * 8 / 40, "checkpoint_every": 80, "validation": {"every": -1}}
    config.write_text(json.dumps(values))
    words = ["submit", "ray", "train", str(config), f"run={own}", "ray.workers=2", "ray.cpus=0.5", f"address={address}"]
    alone = command("train", str(config), f"run={whole}", "ranks=2")
    done = subprocess.run(alone, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

    log = tmp_path / "followed"
    with log.open("w") as file:
        job = subprocess.Popen(command(*words), env=environment, stdout=file, stderr=file)
    try:
        frozen = freeze_a_rank(cluster, own, job, log, starts=1)
        assert status(own)["state"] == "RUNNING"
        assert main(["status", str(own)]) == 0
        assert re.search(r"step \d+, epoch .* samples/s", capsys.readouterr().out)
        frozen.kill()
        frozen = freeze_a_rank(cluster, own, job, log, starts=2)
        assert status(own)["restarts"] == "1"
        assert main(["cancel", str(own)]) == 0
        await_line(job, log, "SIGTERM has come; stopping after this step")
        frozen.resume()
        assert job.wait(timeout=900) == 75, log.read_text()
    finally:
        job.kill()
    followed = log.read_text()
    assert "Ray has started all of them again (start 2)" in followed
    assert "resuming step-000000" in followed
    assert re.search(r"stopped by .* at step \d+; the same command continues", followed)
    assert status(own)["state"] == "STOPPED"

    capsys.readouterr()
    code, again = main(words), capsys.readouterr()
    assert code == 0, again.out + again.err
    assert f"done: {STEPS} steps" in again.out
    assert losses(own) == losses(whole)
    expected, found = weights(whole), weights(own)
    assert expected.keys() == found.keys()
    assert all(np.array_equal(expected[name], found[name]) for name in expected)
    complete = {"config.yaml", "command.txt", "code.txt", "submit.yaml", "jobs.jsonl", "tb", "metrics.jsonl", "ckpt"}
    assert complete | {"log", "code"} <= {path.name for path in own.iterdir()}
    assert main(["status", str(own)]) == 0
    assert "all 12 epochs are done" in capsys.readouterr().out


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "launch.cli", *words]


def status(run: Path) -> dict[str, str]:
    """What the job server says of the run's last submission."""
    job = json.loads((run / "jobs.jsonl").read_text().splitlines()[-1])
    return ray_job.state(job["address"], job["id"])


def await_line(job: subprocess.Popen[bytes], log: Path, text: str) -> None:
    """Until the followed log has this text; the job must be there so long."""
    while text not in log.read_text():
        assert job.poll() is None, log.read_text()
        time.sleep(0.1)


def freeze_a_rank(cluster: int, run: Path, job: subprocess.Popen[bytes], log: Path, starts: int) -> psutil.Process:
    """Halt the second rank once the `starts`-th start has made a step and a checkpoint is there; no step ends then."""
    told, found = run / "log" / "rank0.log", []
    while True:
        assert job.poll() is None, log.read_text()
        trains = told.is_file() and told.read_text().count("started in") >= starts
        if trains and (len(found) != 2 or not all(process.is_running() for process in found)):
            found = ranks_below(cluster)
        if trains and (run / "ckpt" / "latest").is_file() and len(found) == 2:
            found[1].suspend()
            return found[1]
        time.sleep(0.02)


def ranks_below(pid: int) -> list[psutil.Process]:
    """The ranks that the cluster of this process runs now."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_rows(run / "metrics.jsonl") if "loss" in row]


def weights(run: Path) -> dict[str, np.ndarray]:
    name = checkpoint.step_name(STEPS)
    return {k: v.detach().numpy() for k, v in consolidated_weights(run / "ckpt", name).items()}


def refusal(capsys: pytest.CaptureFixture[str], tmp_path: Path, address: str) -> str:
    """The one line that a submission to `address` leaves with exit code 2; nothing is written."""
    write_records(pa.Table.from_pylist([], schema=SCHEMA), tmp_path / "records.parquet")
    out = tmp_path / "r.parquet"
    assert main(["submit", "ray", "records", "layout=atlas", f"out={out}", f"address={address}"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert not (tmp_path / "code").exists()
    return err


def test_an_address_where_no_job_server_answers_is_one_line_with_the_remedy(tmp_path, capsys):
    told = refusal(capsys, tmp_path, f"http://127.0.0.1:{free_port()}")
    assert re.search(r"address: no Ray job server answers at .*; it is http://<head node>:8265", told)


def test_a_cluster_of_another_version_is_one_line_with_the_remedy(tmp_path, capsys, serve):
    answer = tmp_path / "web" / "api" / "version"
    answer.parent.mkdir(parents=True)
    answer.write_text(json.dumps({"version": "4", "ray_version": "2.9.3", "ray_commit": "", "session_name": ""}))
    told = refusal(capsys, tmp_path, serve(tmp_path / "web").url)
    assert "runs Ray 2.9.3, here is " in told
    assert "pip install ray==2.9.3" in told
    assert os.environ.get("RAY_ADDRESS") is None
