"""Jobs on a real SLURM: submitted, preempted, requeued, lost with their node, chained; the same results as without."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster import slurm as scheduler
from dermfm.checkpoint import read_state
from dermfm.records.table import SCHEMA, write_records
from dermfm.zero import consolidated_weights

pytestmark = pytest.mark.timeout(900)
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
SMALL = (
    "configs/train/cpu.yaml", "model.image.size=64", "contrastive_batch=16", "micro_batch=8", "epochs=6", "device=cpu",
    "objectives.contrastive=0", "objectives.matching=0", "objectives.classify_text=0", "objectives.classify_fused=0",
    "model.text.cache_mb=0", "log_every=1", "threads=1",
)  # fmt: skip


SCRIPTS = Path(__file__).parent / "slurm"


@pytest.fixture(scope="module")
def slurm() -> Iterator[Path]:
    """SLURM_CONF of a running testbed (also in the environment); skips with the reason where there cannot be one."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("a SLURM of namespaces needs Linux and root")
    if Path("/sys/class/net/slbr0").exists():
        pytest.skip("another SLURM testbed is up on this machine")
    if not all(map(shutil.which, ("slurmctld", "slurmd", "munged", "sbatch"))):
        pytest.skip("Debian's packages slurmctld, slurmd, slurm-client and munge are not installed")
    folder = tempfile.mkdtemp(prefix="dermfm-slurm-", dir="/tmp")  # sockets: short
    environment = {**os.environ, "TMPDIR": folder}
    os.chmod(folder, 0o755)  # munge's daemon refuses a folder that others cannot enter
    log = Path(folder) / "up.log"
    try:
        with log.open("w") as file:  # no pipe: the daemons would hold it open
            command = ["bash", str(SCRIPTS / "up.sh"), "2", "2", "4"]
            up = subprocess.run(command, env=environment, stdout=file, stderr=file, timeout=300, check=False)
        if up.returncode:
            pytest.skip(f"no SLURM could be started: {[*log.read_text().split(chr(10)), '-'][-2]}")
        configuration = Path(folder) / "slurm-testbed" / "slurm.conf"
        os.environ["SLURM_CONF"] = str(configuration)
        yield configuration
    finally:
        os.environ.pop("SLURM_CONF", None)
        subprocess.run(["bash", str(SCRIPTS / "down.sh")], env=environment, timeout=120, check=False)
        shutil.rmtree(folder, ignore_errors=True)


def dermfm(*words: str, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    """`dermfm` of this checkout, one thread a process."""
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip


def submit(*words: str) -> int:
    """Submit to SLURM; the id of the (last) job."""
    done = dermfm("submit", "slurm", *words)
    assert done.returncode == 0, done.stderr
    return int(re.findall(r"SLURM job (\d+)", done.stdout)[-1])


def wait_for(what: Callable[[], bool], seconds: float = 240, told: Callable[[], str] = str) -> None:
    """Until `what` holds; fails with `told()` after a while."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, told()
        time.sleep(0.5)


@pytest.fixture(scope="module")
def small_records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """records.parquet of 96 plain images in three colours and classes."""
    folder = tmp_path_factory.mktemp("small records")
    rows = []
    for k in range(96):
        colour = [(200, 150, 120), (90, 60, 40), (60, 60, 90)][k % 3]
        Image.new("RGB", (64, 64), tuple(c + k % 7 for c in colour)).save(folder / f"{k}.jpg")
        row = dict.fromkeys(SCHEMA.names)
        row |= {"record_id": f"{k:016x}", "dataset": "HAM10000", "source_id": str(k), "image": f"{k}.jpg"}
        row |= {"modality": "dermoscopic", "split": "train" if k < 64 else "test", "label": [2, 5, 6][k % 3]}
        row |= {"malignancy": "benign" if k % 3 == 0 else "malignant", "group_id": str(k), "site": "back", "age": 50.0}
        row |= {"class": ["nevus", "basal cell carcinoma", "melanoma"][k % 3]}
        row |= {"subclass": row["class"], "matched_class": row["class"]}
        rows.append(row)
    write_records(pa.Table.from_pylist(rows, schema=SCHEMA), folder / "records.parquet")
    return folder / "records.parquet"


@pytest.fixture(scope="module")
def shards(slurm: Path, small_records: Path) -> Path:
    """Shards of the small records, packed by an array of two jobs whose folder has a name that a shell would mangle."""
    out = small_records.parent / 'sh "ar$(ds)'
    job = submit("shards", f"records={small_records}", f"out={out}", "cpus=1", "array=2", "shard_bytes=20000")
    end(job)
    wait_for(lambda: (out / "manifest.json").is_file(), 60, lambda: log_of(out))
    return out


def end(job: int, seconds: float = 400) -> dict[str, str]:
    wait_for(lambda: scheduler.job(job).get("state") in ENDED, seconds, lambda: f"{scheduler.job(job)}")
    return scheduler.job(job)


def log_of(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted((folder / "log").glob("slurm-*")))


def steps(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def weights(run: Path) -> dict[str, np.ndarray]:
    name = (run / "ckpt" / "latest").read_text().strip()
    return {k: v.detach().numpy() for k, v in consolidated_weights(run / "ckpt", name).items()}


@pytest.fixture(scope="module")
def uninterrupted(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    done = dermfm("train", *SMALL, f"run={run}", f"shards={shards}", "ranks=2", timeout_s=400)
    assert done.returncode == 0, done.stderr
    return run


def test_an_array_packs_the_shards_that_one_job_packs(shards, small_records, tmp_path):
    alone = dermfm("shards", f"records={small_records}", f"out={tmp_path / 's'}", "shard_bytes=20000")
    assert alone.returncode == 0, alone.stderr
    read = [json.loads((folder / "manifest.json").read_text()) for folder in (shards, tmp_path / "s")]
    assert read[0] == read[1]
    assert len(read[0]["shards"]) > 2


def test_a_job_told_to_stop_is_requeued_and_ends_with_the_weights_of_an_uninterrupted_run(
    shards, uninterrupted, tmp_path
):
    run = tmp_path / "it's a run"
    job = submit("train", *SMALL, f"run={run}", f"shards={shards}", "nodes=2", "cpus=1", "time=00:30:00")
    wait_for(lambda: len(steps(run)) >= 5, told=lambda: log_of(run))
    subprocess.run(["scancel", "--signal=USR1", str(job)], check=True)
    wait_for(lambda: scheduler.job(job)["restarts"] == "1", told=lambda: log_of(run))
    assert end(job)["state"] == "COMPLETED", log_of(run)
    assert scheduler.job(job)["restarts"] == "1"
    assert "stopped with a checkpoint; requeueing" in log_of(run)
    assert [row["step"] for row in steps(run)] == [row["step"] for row in steps(uninterrupted)]
    assert [row["loss"] for row in steps(run)] == [row["loss"] for row in steps(uninterrupted)]
    whole, own = weights(uninterrupted), weights(run)
    assert all(np.array_equal(whole[name], own[name]) for name in whole)
    assert read_state(run / "ckpt" / (run / "ckpt" / "latest").read_text().strip()).world == 2
    assert list((run / "tb").glob("events*"))
    shown = dermfm("status", str(run)).stdout
    assert "COMPLETED" in shown
    assert "all 6 epochs are done" in shown


def test_what_cannot_work_is_refused_at_submission_and_nothing_is_queued(shards, tmp_path):
    words = ("train", *SMALL, f"run={tmp_path / 'r'}", f"shards={shards}")
    cases = {"nodess=2": "nodess", "partition=cy": "may be ci", "gpus=4": "have 2", "array=2": "cannot be cut"}
    for wrong, told in {**cases, "nodes=3 tasks_per_node=1": "contrastive_batch"}.items():
        done = dermfm("submit", "slurm", *words, *wrong.split())
        assert done.returncode == 2, wrong
        assert done.stderr.count("\n") == 1, done.stderr
        assert re.search(told, done.stderr), done.stderr
    queued = subprocess.run(["squeue", "--noheader"], capture_output=True, text=True, check=True).stdout
    assert queued.strip() == ""


def test_notes_are_written_by_ray_over_both_nodes_and_nothing_is_left_running(slurm, small_records, tmp_path):
    out = tmp_path / "notes"
    words = ("notes", f"records={small_records}", f"out={out}", "strategies=[template,label]", "part_size=32")
    before = ray_processes()
    job = submit(*words, "ray=always", "nodes=2", "cpus=2")
    assert end(job)["state"] == "COMPLETED", log_of(out)
    made = pq.read_table(sorted(out.glob("part-*.parquet")), columns=["note_id", "error"])
    assert len(set(made["note_id"].to_pylist())) == made.num_rows == 192
    assert ray_processes() <= before


def ray_processes() -> set[str]:
    found = subprocess.run(["pgrep", "-f", "gcs_server|raylet"], capture_output=True, text=True, check=False)
    return set(found.stdout.split())


def test_the_doctor_measures_the_network_between_the_nodes(slurm, tmp_path):
    words = ["-m", "launch.cli", "doctor", f"run={tmp_path}", "min_free_gb=0.1"]
    done = subprocess.run(
        ["srun", "--nodes=2", "--ntasks-per-node=1", sys.executable, *words],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes, gloo" in done.stdout


@pytest.mark.soak
def test_a_lost_node_costs_a_requeue_and_changes_no_weight(shards, uninterrupted, tmp_path):
    run = tmp_path / "lost"
    job = submit("train", *SMALL, f"run={run}", f"shards={shards}", "nodes=2", "cpus=1")
    wait_for(lambda: len(steps(run)) >= 10, told=lambda: log_of(run))
    kill_node("n2")
    wait_for(lambda: scheduler.job(job)["restarts"] == "1", 200, lambda: log_of(run))
    revive_node("n2")
    assert end(job, 600)["state"] == "COMPLETED", log_of(run)
    whole, own = weights(uninterrupted), weights(run)
    assert all(np.array_equal(whole[name], own[name]) for name in whole)


@pytest.mark.soak
def test_a_node_that_is_lost_while_notes_are_written_loses_and_doubles_none(slurm, small_records, tmp_path):
    rows = pq.read_table(small_records).to_pylist()
    many = [{**row, "record_id": f"{k:016x}", "group_id": str(k)} for k in range(16_000) for row in [rows[k % 96]]]
    write_records(pa.Table.from_pylist(many, schema=SCHEMA), tmp_path / "records.parquet")
    out = tmp_path / "notes"
    words = (f"records={tmp_path / 'records.parquet'}", f"out={out}", "strategies=[template,label]", "part_size=100")
    job = submit("notes", *words, "lease=10", "ray=always", "nodes=2", "cpus=2")
    wait_for(lambda: len(list(out.glob("part-*.parquet"))) >= 3, told=lambda: log_of(out))
    kill_node("n2")
    assert len(list(out.glob("part-*.parquet"))) < 320, "the notes were done before the node was lost"
    wait_for(lambda: scheduler.job(job)["restarts"] == "1" or scheduler.job(job)["state"] in ENDED, 300)
    revive_node("n2")
    assert end(job, 600)["state"] == "COMPLETED", log_of(out)
    made = pq.read_table(sorted(out.glob("part-*.parquet")), columns=["note_id"])["note_id"].to_pylist()
    assert len(made) == len(set(made)) == 32_000


@pytest.fixture(scope="module")
def chain(small_records: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration of all six jobs on 96 images and their table."""
    folder = tmp_path_factory.mktemp("chain")
    rows = ["sample_id,dataset,modality,label,lesion_id,site,age"]
    rows += [f"{k},HAM10000,dermoscopic,{[2, 5, 6][k % 3]},{k},back,50" for k in range(96)]
    (folder / "table.csv").write_text("\n".join(rows) + "\n")
    settings: dict[str, Any] = {
        "extends": str(Path("configs/base.yaml").absolute()),
        "data": None,
        "records": {
            "layout": "generic", "duplicate_distance": -1, "images": str(small_records.parent),
            "table": str(folder / "table.csv"),
        },
        "notes": {"strategies": ["template"]},
        "train": {
            "model": {"image": {"size": 64}}, "contrastive_batch": 16, "micro_batch": 8, "epochs": 2,
            "strategies": {"template": 1}, "threads": 1, "device": "cpu",
        },
        "evaluate": {"device": "cpu"},
    }  # fmt: skip
    (folder / "chain.yaml").write_text(json.dumps(settings))  # JSON is YAML
    return folder / "chain.yaml"


@pytest.mark.soak
def test_six_jobs_one_after_another_end_with_a_report(slurm, chain, tmp_path):
    out = tmp_path / "chain"
    last = end(submit("pipeline", str(chain), f"out={out}", "nodes=2", "cpus=1", "array=2"), 1500)
    assert last["state"] == "COMPLETED", log_of(out)  # so all others have: each waits for the one before to end well
    entries = [json.loads(line) for line in (out / "jobs.jsonl").read_text().splitlines()]
    assert [entry["job"] for entry in entries] == ["records", "notes", "shards", "train", "evaluate", "report"]
    assert "</html>" in (out / "report.html").read_text()
    assert next(out.glob("eval/*/metrics.json"))


def test_a_job_that_fails_cancels_those_behind_it_and_the_status_names_its_log(slurm, chain, tmp_path):
    out = tmp_path / "broken"
    gone = tmp_path / "images that are gone"
    last = submit("pipeline", str(chain), f"out={out}", "nodes=2", "cpus=1", f"records.images={gone}")
    wait_for(lambda: scheduler.job(last).get("state", "CANCELLED") in ENDED, 200, lambda: log_of(out))
    entries = [json.loads(line) for line in (out / "jobs.jsonl").read_text().splitlines()]
    states = [scheduler.job(entry["id"]).get("state", "CANCELLED") for entry in entries]
    assert states == ["FAILED"] + ["CANCELLED"] * 5
    told = " ".join(dermfm("status", str(out)).stdout.split())
    log = out / "log" / f"slurm-records-{entries[0]['id']}.out"
    assert f"records did not end well (FAILED); read {log}" in told
    assert "images that are gone" in log.read_text()


@pytest.mark.soak
def test_two_runs_at_a_time_on_one_node_do_not_meet(shards, tmp_path):
    runs = [tmp_path / name for name in ("one", "two")]
    words = (f"shards={shards}", "epochs=2", "tasks_per_node=2", "cpus=1", "directives.nodelist=n1")
    jobs = [submit("train", *SMALL, *words, f"run={run}") for run in runs]
    wait_for(lambda: all(steps(run) for run in runs), 400, lambda: "".join(map(log_of, runs)))
    assert {scheduler.job(job)["nodes"] for job in jobs} == {"n1"}
    began = [steps(run)[0] for run in runs]
    assert began[0]["loss"] == began[1]["loss"]
    assert [end(job)["state"] for job in jobs] == ["COMPLETED"] * 2, "".join(map(log_of, runs))
    one, two = (weights(run) for run in runs)
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert "beyond imports: launch" in log_of(runs[0])


def kill_node(name: str) -> None:
    """End the node's first process, and all of the node with it."""
    pids = dict(line.split() for line in (Path(os.environ["SLURM_CONF"]).parent / "pids").read_text().splitlines())
    children = Path(f"/proc/{pids[f'slurmd-{name}']}/task/{pids[f'slurmd-{name}']}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)


def revive_node(name: str) -> None:
    environment = {**os.environ, "TMPDIR": str(Path(os.environ["SLURM_CONF"]).parents[1])}
    subprocess.run(["bash", str(SCRIPTS / "revive.sh"), name], env=environment, timeout=60, check=True)
