"""What takes minutes on a real SLURM: lost nodes, time limits that chain, two runs on a node, the whole chain."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import slurm_testbed as bed

from cluster import slurm as scheduler
from dermfm.records.table import SCHEMA, write_records

pytestmark = [pytest.mark.soak, pytest.mark.timeout(7200)]


def test_what_a_killed_run_of_these_tests_has_left_is_taken_away_by_the_next(root):
    """Before `slurm` is up: a testbed of another process, which is killed."""
    code = "import sys, time; sys.path.append('tests/cluster'); import slurm_testbed as bed\n"
    code += "with bed.testbed() as up: print(up, flush=True); time.sleep(3600)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        left = Path(other.stdout.readline().strip())
        other.kill()
    assert left.is_file()
    assert bed.BRIDGE.exists()
    with bed.testbed() as up:
        assert up != left
        assert not left.exists()
        states = subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True, check=True).stdout
        assert states.split() == ["idle"]
    assert not bed.BRIDGE.exists()


def test_a_lost_node_costs_a_requeue_and_changes_no_weight(shards, uninterrupted, tmp_path):
    run = tmp_path / "lost"
    job = bed.submit("train", *bed.SMALL, f"run={run}", f"shards={shards}", "nodes=2", "cpus=1")
    bed.wait_for(lambda: len(bed.steps(run)) >= 6, lambda: bed.log_of(run), every_s=0.05)
    bed.kill_node("n2")
    bed.await_restart(job)
    bed.revive_node("n2")
    assert bed.end(job)["state"] == "COMPLETED", bed.log_of(run)
    assert bed.restarts(job) == 1
    assert bed.same_weights(uninterrupted, run)


def test_a_time_limit_shorter_than_the_job_chains_restarts_to_the_end(shards, tmp_path):
    """How many steps outlast the limit depends on the machine: four times as many, until they do."""
    site = ("nodes=2", "cpus=1", "time=00:04:00", "warn_s=60")  # told to stop 150 to 180 s after each start
    for epochs in (60, 240, 960):  # 240, 960 and 3840 steps
        long = [word for word in bed.SMALL if not word.startswith("epochs=")]
        run = tmp_path / f"short of time {epochs}"
        words = (*long, f"epochs={epochs}", "checkpoint_every=1000000", f"run={run}", f"shards={shards}")
        job = bed.submit("train", *words, *site)
        assert bed.end(job, 6000)["state"] == "COMPLETED", bed.log_of(run)
        if bed.restarts(job):
            break
    assert bed.restarts(job) >= 1, bed.log_of(run)
    assert bed.log_of(run).count("stopped and resumable; requeueing") == bed.restarts(job)
    assert 1 <= bed.log_of(run).count("resuming step-") <= bed.restarts(job)
    assert [row["step"] for row in bed.steps(run)] == list(range(1, 4 * epochs + 1))


def test_notes_in_an_array_are_shared_out_and_each_is_made_once(slurm, small_records, tmp_path):
    out = tmp_path / "notes"
    words = ("notes", f"records={small_records}", f"out={out}", "strategies=[template,label]", "part_size=32")
    job = bed.submit(*words, "ray=never", "array=3", "cpus=1")
    assert bed.end(job)["state"] == "COMPLETED", bed.log_of(out)
    assert len(list((out / "log").glob(f"slurm-notes-{job}_*.out"))) == 3
    made = pq.read_table(sorted(out.glob("part-*.parquet")), columns=["note_id"])["note_id"].to_pylist()
    assert len(made) == len(set(made)) == 192
    limit = int(scheduler.settings()["MaxArraySize"])
    refused = bed.dermfm("submit", "slurm", *words, f"array={limit}")
    assert refused.returncode == 2
    assert f"array: {limit} tasks are more than this site's {limit - 1}" in refused.stderr


def test_a_node_that_is_lost_while_notes_are_written_loses_and_doubles_none(slurm, small_records, tmp_path):
    rows = pq.read_table(small_records).to_pylist()
    many = [{**row, "record_id": f"{k:016x}", "group_id": str(k)} for k in range(16_000) for row in [rows[k % 96]]]
    write_records(pa.Table.from_pylist(many, schema=SCHEMA), tmp_path / "records.parquet")
    out = tmp_path / "notes"
    words = (f"records={tmp_path / 'records.parquet'}", f"out={out}", "strategies=[template,label]", "part_size=100")
    job = bed.submit("notes", *words, "lease=10", "ray=always", "nodes=2", "cpus=2")
    bed.wait_for(lambda: len(list(out.glob("part-*.parquet"))) >= 3, lambda: bed.log_of(out), every_s=0.05)
    bed.kill_node("n2")
    assert len(list(out.glob("part-*.parquet"))) < 320, "the notes were done before the node was lost"
    bed.await_restart(job)
    bed.revive_node("n2")
    assert bed.end(job)["state"] == "COMPLETED", bed.log_of(out)
    made = pq.read_table(sorted(out.glob("part-*.parquet")), columns=["note_id"])["note_id"].to_pylist()
    assert len(made) == len(set(made)) == 32_000


def test_six_jobs_one_after_another_end_with_a_report(slurm, chain, tmp_path):
    out = tmp_path / "chain"
    last = bed.end(bed.submit("pipeline", str(chain), f"out={out}", "nodes=2", "cpus=1", "array=2"), 6000)
    assert last["state"] == "COMPLETED", bed.log_of(out)  # so all others have: each waits for the one before
    entries = [json.loads(line) for line in (out / "jobs.jsonl").read_text().splitlines()]
    assert [entry["job"] for entry in entries] == ["records", "notes", "shards", "train", "evaluate", "report"]
    assert "</html>" in (out / "report.html").read_text()
    assert next(out.glob("eval/*/metrics.json"))
    told = bed.dermfm("status", str(out)).stdout
    assert told.count("COMPLETED") == 6, told


def test_two_runs_at_a_time_on_one_node_do_not_meet(shards, tmp_path):
    runs = [tmp_path / name for name in ("one", "two")]
    words = (f"shards={shards}", "epochs=6", "tasks_per_node=2", "cpus=1", "memory=1G", "directives.nodelist=n1")
    jobs = [bed.submit("train", *bed.SMALL, *words, f"run={run}") for run in runs]
    bed.wait_for(lambda: all(bed.steps(run) for run in runs), lambda: "".join(map(bed.log_of, runs)))
    assert {scheduler.job(job)["nodes"] for job in jobs} == {"n1"}
    began = [bed.steps(run)[0] for run in runs]
    assert began[0]["loss"] == began[1]["loss"]
    assert [bed.end(job)["state"] for job in jobs] == ["COMPLETED"] * 2, "".join(map(bed.log_of, runs))
    assert bed.same_weights(*runs)
    (beyond,) = re.findall(r"started in .* s, (.*) of them beyond imports: launch", bed.log_of(runs[0]))
    assert float(beyond) > 0
