"""`dermfm submit ray` against the job server of a real Ray cluster on this machine."""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from cluster import ray_job
from cluster.allocation import RayNode
from cluster.local import free_port
from dermfm.notes import store
from dermfm.records.table import SCHEMA, write_records
from launch.cli import main

pytest.importorskip("ray", reason="Ray is not installed")
pytestmark = pytest.mark.timeout(420)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of the job server of an own cluster, which is ended with its processes."""
    folder = tempfile.mkdtemp(prefix="dermfm-ray-", dir="/tmp")  # sockets: short
    dashboard = free_port()
    options = ["--head", f"--port={free_port()}", f"--temp-dir={folder}", "--num-cpus=2", "--node-ip-address=127.0.0.1"]
    options += ["--include-dashboard=true", f"--dashboard-port={dashboard}", f"--ray-client-server-port={free_port()}"]
    options += [f"--dashboard-agent-listen-port={free_port()}", "--object-store-memory=100000000"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("OMP_NUM_THREADS", "1")
        node = RayNode(options)
        address = f"http://127.0.0.1:{dashboard}"
        try:
            _await(address, node)
            yield address
        finally:
            node.end()
            shutil.rmtree(folder, ignore_errors=True)


def _await(address: str, node: RayNode) -> None:
    end = time.monotonic() + 200
    while time.monotonic() < end and not node.has_ended():
        try:
            with urllib.request.urlopen(f"{address}/api/version", timeout=10):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"no job server came up: {node.last_line()}")


def test_notes_are_made_by_the_job_server_with_log_and_exit_code(server, tmp_path):
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
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "submit", "ray", *words, f"address={server}", "environment.SEEN=yes"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "notes: 40 wanted (template 40); 0 done, 40 to do" in done.stdout
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


def test_a_cluster_of_another_version_is_one_line_with_the_remedy(tmp_path, capsys):
    class OldServer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"version": "4", "ray_version": "2.9.3", "ray_commit": "", "session_name": ""}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), OldServer) as old:
        threading.Thread(target=old.serve_forever, daemon=True).start()
        told = refusal(capsys, tmp_path, f"http://127.0.0.1:{old.server_port}")
        old.shutdown()
    assert "runs Ray 2.9.3, here is " in told
    assert "pip install ray==2.9.3" in told
    assert os.environ.get("RAY_ADDRESS") is None
