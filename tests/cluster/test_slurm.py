"""Jobs on a real SLURM: submitted, preempted, requeued, refused, chained; the same results as without.

What takes minutes more (lost nodes, time limits, the whole chain) is in test_slurm_long.py.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import slurm_testbed as bed

from cluster import slurm as scheduler
from dermfm.checkpoint import read_state
from dermfm.run import take_lock

pytestmark = pytest.mark.timeout(5400)


def test_an_array_packs_the_shards_that_one_job_packs(shards, small_records, tmp_path):
    alone = bed.dermfm("shards", f"records={small_records}", f"out={tmp_path / 's'}", "shard_bytes=20000")
    assert alone.returncode == 0, alone.stderr
    read = [json.loads((folder / "manifest.json").read_text()) for folder in (shards, tmp_path / "s")]
    assert read[0] == read[1]
    assert len(read[0]["shards"]) > 2


def test_a_job_told_to_stop_is_requeued_and_ends_with_the_weights_of_an_uninterrupted_run(
    shards, uninterrupted, tmp_path
):
    run = tmp_path / "it's a run"
    job = bed.submit("train", *bed.SMALL, f"run={run}", f"shards={shards}", "nodes=2", "cpus=1", "time=00:30:00")
    bed.wait_for(lambda: len(bed.steps(run)) >= 2, lambda: bed.log_of(run), every_s=0.05)
    subprocess.run(["scancel", "--signal=USR1", str(job)], check=True)
    bed.await_restart(job)
    assert bed.end(job)["state"] == "COMPLETED", bed.log_of(run)
    assert bed.restarts(job) == 1, bed.log_of(run)
    assert bed.log_of(run).count("stopped and resumable; requeueing") == 1
    assert [row["step"] for row in bed.steps(run)] == [row["step"] for row in bed.steps(uninterrupted)]
    assert [row["loss"] for row in bed.steps(run)] == [row["loss"] for row in bed.steps(uninterrupted)]
    assert bed.same_weights(uninterrupted, run)
    assert read_state(run / "ckpt" / (run / "ckpt" / "latest").read_text().strip()).world == 2
    assert list((run / "tb").glob("events*"))
    shown = bed.dermfm("status", str(run)).stdout
    assert "COMPLETED" in shown
    assert "all 6 epochs are done" in shown


def test_what_cannot_work_is_refused_at_submission_and_nothing_is_queued(shards, tmp_path):
    words = ("train", *bed.SMALL, f"run={tmp_path / 'r'}", f"shards={shards}")
    cases = {"nodess=2": "mean 'nodes'", "partition=cy": "may be ci", "gpus=4": "have 2", "array=2": "cannot be cut"}
    cases |= {"cpus=99": r"--cpus-per-task=99\); lower cpus=", "time=soon": "time= is minutes"}
    cases |= {"cpus=1 directives.holdd=": r"option '--holdd'; directives\.<name>= takes"}
    for wrong, told in {**cases, "nodes=3 tasks_per_node=1": "contrastive_batch"}.items():
        done = bed.dermfm("submit", "slurm", *words, *wrong.split())
        assert done.returncode == 2, wrong
        assert done.stderr.count("\n") == 1, done.stderr
        assert re.search(told, done.stderr), done.stderr
    with take_lock(tmp_path / "r"):
        done = bed.dermfm("submit", "slurm", *words)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "another process works in this folder" in done.stderr
    queued = subprocess.run(["squeue", "--noheader"], capture_output=True, text=True, check=True).stdout
    assert queued.strip() == ""


def test_a_job_that_waits_for_a_folder_is_the_only_one_of_its_kind_there(shards, small_records, tmp_path):
    words = ("submit", "slurm", "shards", f"records={small_records}", f"out={tmp_path / 's'}", "cpus=1")
    assert bed.dermfm(*words, "directives.hold=").returncode == 0
    again = bed.dermfm(*words)
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert re.search(r"shards is in work here already \(slurm job \d+, PENDING\); .* dermfm cancel", again.stderr)
    assert "is cancelled" in bed.dermfm("cancel", str(tmp_path / "s")).stdout
    assert bed.end(bed.submit(*words[2:]))["state"] == "COMPLETED"


@pytest.mark.parametrize("name", ["train", "notes", "shards", "evaluate", "pipeline"])
def test_slurm_takes_each_of_the_files_that_are_submitted_by_hand(slurm, root, name):
    small = ["--gpus-per-node=2", "--ntasks-per-node=1", "--cpus-per-task=2"]  # what the nodes here have
    command = ["sbatch", "--test-only", *small, str(root / "slurm" / f"{name}.sbatch"), "run=r"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "to start at" in done.stderr


def test_notes_are_written_by_ray_over_both_nodes_and_nothing_is_left_running(slurm, small_records, tmp_path):
    out = tmp_path / "notes"
    words = ("notes", f"records={small_records}", f"out={out}", "strategies=[template,label]", "part_size=32")
    job = bed.submit(*words, "ray=always", "nodes=2", "cpus=2")
    assert bed.end(job)["state"] == "COMPLETED", bed.log_of(out)
    made = pq.read_table(sorted(out.glob("part-*.parquet")), columns=["note_id", "error"])
    assert len(set(made["note_id"].to_pylist())) == made.num_rows == 192
    bed.wait_for(lambda: not bed.left_on_nodes(), lambda: "\n".join(bed.left_on_nodes()))


def test_the_doctor_measures_the_network_between_the_nodes(slurm, tmp_path):
    words = ["-m", "launch.cli", "doctor", f"run={tmp_path}", "min_free_gb=0.1"]
    done = subprocess.run(
        ["srun", "--nodes=2", "--ntasks-per-node=1", sys.executable, *words],
        capture_output=True, text=True, timeout=bed.WAIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes, gloo" in done.stdout


def test_a_job_that_fails_cancels_those_behind_it_and_the_status_names_its_log(slurm, chain, tmp_path):
    out = tmp_path / "broken"
    gone = tmp_path / "images that are gone"
    last = bed.submit("pipeline", str(chain), f"out={out}", "nodes=2", "cpus=1", f"records.images={gone}")
    assert bed.end(last)["state"] == "CANCELLED", bed.log_of(out)
    entries = [json.loads(line) for line in (out / "jobs.jsonl").read_text().splitlines()]
    assert [scheduler.job(entry["id"])["state"] for entry in entries] == ["FAILED"] + ["CANCELLED"] * 5
    told = " ".join(bed.dermfm("status", str(out)).stdout.split())
    log = out / "log" / f"slurm-records-{entries[0]['id']}.out"
    assert f"records did not end well (FAILED); read {log}" in told
    assert "images that are gone" in log.read_text()
