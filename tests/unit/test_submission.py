"""What a scheduler is handed: a script that is the file in slurm/ with other resources, frozen code, quoted names."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster import ray_job, slurm
from cluster.process import python_command
from dermfm import submission
from dermfm.config import InputError, from_dict, load
from dermfm.evaluate.job import EvaluateConfig
from dermfm.notes.plan import NotesConfig
from dermfm.pack_plan import ShardsConfig
from dermfm.pipeline import JOBS, PipelineConfig
from dermfm.plan import TrainConfig
from dermfm.records.build import RecordsConfig
from dermfm.report.page import ReportConfig
from dermfm.submission import RayConfig, SlurmConfig
from launch.cli import main, parse

HOSTILE = 'my run\'s "$(touch hacked)" `x` %j'


def directives(script: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script, re.M))


def rendered(job: str = "train", **keys: Any) -> str:
    return submission.render(
        job, SlurmConfig(**keys), Path("/runs/r/submit.yaml"), Path("/runs/r/code/1"), "/runs/r/log/x-"
    )


def test_a_script_asks_for_what_was_given_and_keeps_the_rest_of_the_file():
    script = rendered(
        nodes=4, gpus=8, cpus=12, time="12:00:00", partition="gpu", account="lab", directives={"exclusive": ""}
    )
    asked = directives(script)
    assert asked["nodes"] == "4"
    assert asked["gpus-per-node"] == asked["ntasks-per-node"] == "8"
    assert (asked["cpus-per-task"], asked["time"], asked["partition"]) == ('"12"', '"12:00:00"', '"gpu"')
    assert asked["signal"] == "USR1@120"
    assert "requeue" in asked
    assert "exclusive" in asked
    body = (Path(submission.ROOT) / "slurm" / "train.sbatch").read_text().split("set -euo pipefail\n")[1]
    assert script.endswith(body)


def test_without_gpus_no_gpu_is_asked_for_and_a_node_has_one_task():
    asked = directives(rendered(nodes=2))
    assert "gpus-per-node" not in asked
    assert asked["ntasks-per-node"] == "1"


@pytest.mark.parametrize("job", sorted(submission.TEMPLATES))
def test_every_script_is_valid_shell(job, tmp_path):
    path = tmp_path / "s.sbatch"
    path.write_text(rendered(job, array=3 if job in submission.ARRAYS else 1, container="image with blank.sif"))
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_a_script_runs_the_frozen_code_on_the_frozen_config_whatever_their_names_hold(tmp_path):
    settings, code = tmp_path / HOSTILE / "submit.yaml", tmp_path / HOSTILE / "code"
    script = submission.render("records", SlurmConfig(), settings, code, str(tmp_path / "log"))
    said = tmp_path / "srun"
    said.write_text('#!/bin/bash\nprintf "%s\\n" "$PYTHONPATH" "$@"\n')
    said.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": ""}
    done = subprocess.run(
        ["bash", "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert lines[0] == str(code)
    assert lines[-2:] == ["records", str(settings)]
    assert not list(tmp_path.rglob("hacked"))


def test_a_directive_with_blanks_quotes_and_percent_is_quoted_for_sbatch():
    assert slurm.quoted('a "b" 50%') == '"a \\"b\\" 50%"'
    with pytest.raises(slurm.SlurmError, match="line break"):
        slurm.quoted("a\nb")


def test_only_notes_shards_and_studies_can_be_cut_into_an_array(tmp_path):
    config = load(RecordsConfig, None, ["layout=atlas", f"out={tmp_path / 'r.parquet'}"])
    with pytest.raises(ValueError, match="cannot be cut into shares, only notes, shards, study can"):
        submission.prepare("records", config, SlurmConfig(array=2))
    assert directives(rendered("notes", array=4))["array"] == "0-3"


def test_a_study_in_an_array_takes_its_share_of_cells_and_starts_once_a_node(tmp_path):
    asked = directives(rendered("study", array=3, gpus=4))
    assert asked["array"] == "0-2"
    assert "ntasks-per-node" not in asked
    said = tmp_path / "srun"
    said.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    said.chmod(0o755)
    told = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "3"}
    for job, share in (("study", "cells=[1,3]"), ("shards", "share=[1,3]")):
        script = rendered(job, array=3)
        done = subprocess.run(["bash", "-c", script], env=os.environ | told, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-3:] == [job, "/runs/r/submit.yaml", share]


def test_preparing_twice_freezes_the_code_once_and_later_edits_make_another_copy(tmp_path, monkeypatch):
    fake = tmp_path / "src"
    for name in submission.PACKAGES:
        (fake / name).mkdir(parents=True)
        (fake / name / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(submission, "ROOT", fake)
    first = submission.freeze_code(tmp_path)
    assert submission.freeze_code(tmp_path) == first
    (fake / "dermfm" / "a.py").write_text("x = 2\n")
    second = submission.freeze_code(tmp_path)
    assert [(p / "dermfm" / "a.py").read_text() for p in (first, second)] == ["x = 1\n", "x = 2\n"]


def test_a_prepared_job_has_its_config_script_and_code_in_its_folder(tmp_path):
    config = load(ShardsConfig, None, [f"records={tmp_path}/r.parquet", f"out={tmp_path / HOSTILE}"])
    ready = submission.prepare("shards", config, SlurmConfig())
    assert ready.script == tmp_path / HOSTILE / "submit.sbatch"
    assert load(ShardsConfig, tmp_path / HOSTILE / "submit.yaml") == config
    assert (next((tmp_path / HOSTILE / "code").iterdir()) / "launch" / "cli.py").is_file()


def test_a_chain_is_six_jobs_of_one_configuration(tmp_path):
    config = load(PipelineConfig, "configs/demo.yaml", [f"out={tmp_path}"])
    parts = submission.chain(config)
    assert tuple(parts) == JOBS
    folders = {submission.folder_of(job, part) for job, part in parts.items()}
    assert folders == {tmp_path, tmp_path / "notes", tmp_path / "shards"}
    site = submission.site_of("evaluate", SlurmConfig(nodes=4, gpus=8, array=3), in_chain=True)
    assert (site.nodes, site.gpus, site.array) == (1, 8, 1)


def test_keys_of_the_scheduler_are_no_keys_of_a_job_that_can_be_submitted():
    own = set(submission.own_keys(SlurmConfig)) | set(submission.own_keys(RayConfig)) - {"address"}
    for schema in (RecordsConfig, NotesConfig, ShardsConfig, TrainConfig, EvaluateConfig, ReportConfig, PipelineConfig):
        assert not own & {field.name for field in dataclasses.fields(schema)}


def test_a_command_line_is_cut_into_the_schedulers_keys_and_the_jobs():
    call = parse(["submit", "slurm", "train", "c.yaml", "run=r", "nodes=2", "time=24:00:00", "directives.qos=x"])
    assert call.overrides == ("nodes=2", "time=24:00:00", "directives.qos=x")
    assert call.target is not None
    assert (call.target.job, call.target.config, call.target.overrides) == ("train", "c.yaml", ("run=r",))
    assert load(SlurmConfig, None, call.overrides).time == "24:00:00"  # not a number to the base of 60


def test_an_unknown_key_job_or_scheduler_is_one_line_and_exit_code_2(capsys):
    for words, told in {
        "submit": "valid: ray, slurm",
        "submit slurm tran": "did you mean 'train'?",
        "submit slurm train run=r shards=s nodess=2": "unknown key 'nodess'; did you mean 'nodes'?",
        "submit slurm shards recods=r": "unknown key 'recods'; did you mean 'records'?",
        "submit slurm train run=r shards=s nodes=0": "it must be at least 1",
        "submit slurm shards add-notes out=s": "'shards add-notes' cannot be submitted",
        "submit slurm notes --report out=s records=r": "'notes --report' cannot be submitted",
        "submit ray plan run=r shards=s": "valid: ",
        "submit ray train run=r shards=s --dry-run": "give ray.workers=N",
    }.items():
        assert main(words.split()) == 2
        assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("resources", "gpus"), [("(null)", 0), ("gpu:8", 8), ("gpu:a100:4(S:0-1),tmpdisk:900", 4), ("gpu:a:2,gpu:b:3", 5)]
)
def test_gpus_of_a_node_are_read_from_its_generic_resources(resources, gpus):
    assert slurm._num_gpus(resources) == gpus


def test_a_ray_command_runs_in_this_folder_and_its_notes_join_that_cluster(tmp_path):
    config = from_dict(NotesConfig, {"records": "r.parquet", "out": str(tmp_path)}, "test")
    told = submission.ray_command("notes", config, RayConfig(), tmp_path)
    assert f'cd {os.getcwd()} && exec "$python" "$code" notes {tmp_path}/submit.yaml' in told.command
    assert load(NotesConfig, tmp_path / "submit.yaml").address == "auto"


def test_ranks_that_are_sent_to_ray_join_that_cluster(tmp_path):
    config = load(TrainConfig, None, ["run=r", "shards=s", "ray.workers=[1,2]"])
    told = submission.ray_command("train", config, RayConfig(), tmp_path)
    assert told.code.parent == tmp_path / "code"
    sent = load(TrainConfig, tmp_path / "submit.yaml").ray
    assert (sent.address, sent.least, sent.most) == ("auto", 1, 2)


@pytest.mark.parametrize("workers", ["-1", "[2,1]", "[0,2]", "two", "[1,2,3]"])
def test_a_number_of_ray_workers_that_is_none_is_refused(workers):
    with pytest.raises(InputError, match=r"ray.workers: .* is not valid; give a number, or \[a, b\]"):
        load(TrainConfig, None, ["run=r", "shards=s", f"ray.workers={workers}"])


def test_frozen_code_is_imported_in_a_folder_that_has_packages_of_the_same_names(tmp_path):
    """As on Python 3.10, which has no PYTHONSAFEPATH."""
    code = submission.freeze_code(tmp_path / "frozen")
    (tmp_path / "launch").mkdir()
    for name in ("__init__", "cli"):
        (tmp_path / "launch" / f"{name}.py").write_text("raise SystemExit('the code of the working directory')\n")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONSAFEPATH", "PYTHONPATH")}
    for command in ([sys.executable, str(code)], python_command("launch.cli", code)):
        done = subprocess.run(
            [*command, "--help"], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "Exit codes" in done.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            "records layout=generic images={0} table={0}/tabel.csv out={0}/r.parquet",
            "tabel.csv does not exist; did you mean",
        ),
        ("shards records={0}/r.parquet out={0}/s", "r.parquet: no such file"),
        ("report run={0}/r", "is not a folder"),
    ],
)
def test_inputs_that_are_not_there_are_found_at_submission_and_not_in_the_queue(words, told, tmp_path, capsys):
    (tmp_path / "table.csv").write_text("a,b\n")
    assert main(["submit", "slurm", *words.format(tmp_path).split()]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert told in said
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]


def test_a_machine_without_slurm_is_one_line_with_the_remedy_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["submit", "slurm", "records", "layout=atlas", f"out={tmp_path / 'run' / 'r.parquet'}"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "sinfo is not on this machine's PATH; run this on a login node of the cluster, or give --dry-run" in said
    assert not (tmp_path / "run").exists()


def test_a_lost_answer_of_the_job_server_is_asked_for_again_and_a_refusal_is_not(monkeypatch):
    monkeypatch.setattr(ray_job, "POLL_S", 0.0)
    answers = iter([RuntimeError("Request failed with status code 500: no head node agent"), ConnectionError("reset")])

    def busy() -> str:
        error = next(answers, None)
        if error is not None:
            raise error
        return "taken"

    assert ray_job._patiently(busy) == "taken"
    refused = []

    def refuse() -> None:
        refused.append(1)
        raise RuntimeError("Request failed with status code 400: no such thing")

    with pytest.raises(RuntimeError, match="400"):
        ray_job._patiently(refuse)
    assert len(refused) == 1
