"""Training through the command line: what is refused, in one line, and what signals leave behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.local import free_port
from dermfm import checkpoint
from dermfm.metrics import read_rows
from dermfm.run import take_lock
from launch.cli import main
from shards.manifest import Manifest, write_manifest

pytestmark = pytest.mark.timeout(240)
STOPPED = 4


@pytest.fixture(scope="module")
def first_run(config_values, environment, tmp_path_factory) -> tuple[dict[str, Any], Path]:
    """(configuration, run folder) of a run of one rank that is done after four steps, with a checkpoint every two."""
    folder = tmp_path_factory.mktemp("first") / "run"
    values = {**config_values, "run": str(folder), "epochs": 0.8, "ranks": 1, "validation": {"every": -1}}
    config = folder.with_name("train.yaml")
    config.write_text(json.dumps(values))  # JSON is YAML
    command = [sys.executable, "-m", "launch.cli", "train", str(config)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "started in" in done.stdout
    return values, folder


@pytest.fixture
def stopped(first_run, tmp_path) -> tuple[Path, Path]:
    """(config file, run folder) of a copy of that run that is to go on for four steps more."""
    folder = tmp_path / "run"
    shutil.copytree(first_run[1], folder)
    config = tmp_path / "train.yaml"
    config.write_text(json.dumps({**first_run[0], "run": str(folder), "epochs": 1.6}))
    return config, folder


@pytest.fixture
def as_only_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is a launched rank without peers: what it refuses, it refuses before the process group."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that `dermfm train` leaves on stderr with exit code 2."""
    assert main(["train", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err


@pytest.mark.usefixtures("as_only_rank")
def test_a_damaged_checkpoint_that_is_named_is_bad_input(stopped, capsys):
    config, folder = stopped
    named = folder / "ckpt" / checkpoint.step_name(STOPPED)
    next(named.glob("*model_states.pt")).unlink()
    message = refusal(capsys, str(config), f"resume={named}")
    assert f"{named}: the checkpoint is damaged" in message
    assert "model_states.pt is missing" in message


@pytest.mark.usefixtures("as_only_rank")
def test_a_checkpoint_that_is_not_there_is_bad_input_that_names_the_nearest(stopped, capsys):
    config, folder = stopped
    message = refusal(capsys, str(config), f"resume={folder}/ckpt/step-00000005")
    assert "did you mean 'step-0000000" in message


@pytest.mark.usefixtures("as_only_rank")
def test_a_run_whose_checkpoints_are_all_damaged_is_bad_input(stopped, capsys):
    config, folder = stopped
    for state in folder.glob("ckpt/step-*/state.json"):
        state.write_text("{")
    assert "checkpoints are damaged" in refusal(capsys, str(config))


@pytest.mark.usefixtures("as_only_rank")
def test_a_new_run_that_is_refused_leaves_no_lock_and_nothing_that_looks_like_a_run(stopped, capsys, tmp_path):
    new = tmp_path / "new"
    told = refusal(capsys, str(stopped[0]), f"run={new}", "model.fusion.kernel=flash")
    assert "kernel: 'flash' needs a CUDA device" in told
    left = [p.relative_to(new).as_posix() for p in new.rglob("*")]
    assert sorted(left) == ["log", "log/rank0.log"]


@pytest.mark.usefixtures("as_only_rank")
@pytest.mark.parametrize(
    ("change", "key"),
    [("contrastive_batch=4", "contrastive_batch"), ("seed=1", "seed"), ("window=16", "window"),
     ("model.embed_dim=8", "model.embed_dim"), ("num_lanes=2", "num_lanes")],
)  # fmt: skip
def test_a_changed_identity_key_is_bad_input_that_names_the_key_and_leaves_the_record(stopped, capsys, change, key):
    config, folder = stopped
    before = (folder / "config.yaml").read_text()
    message = refusal(capsys, str(config), change)
    assert f"'{key}' is " in message
    assert key in message.partition("allow_change=[")[2]
    assert (folder / "config.yaml").read_text() == before


@pytest.mark.usefixtures("as_only_rank")
def test_another_zero_stage_is_bad_input_that_names_the_run_s_own(stopped, capsys):
    assert "resume with zero.stage=1" in refusal(capsys, str(stopped[0]), "zero.stage=2")


def test_a_batch_that_the_ranks_cannot_share_is_bad_input_with_the_legal_neighbours(stopped, capsys):
    assert "8 is not divisible by 3 ranks; 6 and 9 are" in refusal(capsys, str(stopped[0]), "ranks=3")
    assert "8 is not divisible by 16 ranks; 16 is the smallest" in refusal(capsys, str(stopped[0]), "ranks=16")


def test_a_micro_batch_that_does_not_divide_is_bad_input_with_the_legal_ones(stopped, capsys):
    assert "3 does not divide the 8 samples of a rank; 2 and 4 do" in refusal(capsys, str(stopped[0]), "micro_batch=3")


def test_a_run_directory_in_use_is_bad_input(stopped, capsys):
    with take_lock(stopped[1]):
        assert "another process works in this folder" in refusal(capsys, str(stopped[0]))


def test_a_finished_run_has_nothing_to_train(first_run, capsys):
    assert main(["train", str(first_run[1].with_name("train.yaml"))]) == 0
    assert "done, nothing to train" in capsys.readouterr().out


def test_a_finished_run_of_another_model_is_bad_input_and_not_done(first_run, capsys):
    told = refusal(capsys, str(first_run[1].with_name("train.yaml")), "model.image.size=96")
    assert "'model.image.size' is 96" in told


@pytest.mark.usefixtures("as_only_rank")
def test_shards_of_another_data_set_are_bad_input_that_names_them(stopped, capsys, tmp_path):
    config, _ = stopped
    values = json.loads(config.read_text())
    other = tmp_path / "other"
    shutil.copytree(values["shards"], other)
    manifest = Manifest.load(other)
    write_manifest(other, manifest.split("train"), manifest.about)
    assert "'shards' is " in refusal(capsys, str(config), f"shards={other}")


def under_srun(arguments: list[str], world: int, environment: dict[str, str]) -> list[subprocess.CompletedProcess[str]]:
    """The ends of ranks that nobody watches from outside: RANK and WORLD_SIZE set, no launcher."""
    place = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    jobs = [
        subprocess.Popen(
            [sys.executable, "-m", "launch.cli", "train", *arguments],
            env={**environment, **place, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        ends = [job.communicate(timeout=150) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    return [subprocess.CompletedProcess([], job.returncode, *end) for job, end in zip(jobs, ends, strict=True)]


def with_our_launcher(arguments: list[str], world: int, environment: dict[str, str]) -> list[Any]:
    """The one end of a job that our launcher started."""
    command = [sys.executable, "-m", "launch.cli", "train", *arguments, f"ranks={world}"]
    return [subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150, check=False)]


@pytest.mark.parametrize("start", [under_srun, with_our_launcher])
@pytest.mark.parametrize("wrong", ["resume={folder}/ckpt/step-00000004", "seed=1"], ids=["damaged", "identity"])
def test_two_ranks_that_are_refused_say_one_line_and_end_with_2(stopped, environment, start: Callable, wrong):
    config, folder = stopped
    next((folder / "ckpt" / checkpoint.step_name(STOPPED)).glob("*model_states.pt")).write_bytes(b"nothing")
    ends = start([str(config), wrong.format(folder=folder)], 2, environment)
    assert [end.returncode for end in ends] == [2] * len(ends), ends
    said = [line for end in ends for line in end.stderr.splitlines() if not line.startswith(("[W", "W1", "["))]
    told = [line for line in said if line.startswith("dermfm train: ")]
    assert len(told) == 1, said
    assert not any("Traceback" in line for line in said)
    assert "damaged" in told[0] or "'seed' is 1" in told[0]


def test_a_resume_that_is_named_counts_until_the_run_has_a_checkpoint_that_came_of_it(stopped, environment):
    """Else a job that is requeued with the same command would go back each time."""
    config, folder = stopped
    named = folder / "ckpt" / checkpoint.step_name(2)
    command = [str(config), f"resume={named}", "ranks=1"]
    outs = []
    for epochs in (0.8, 0.8, 1.2):
        done = with_our_launcher([*command, f"epochs={epochs}"], 1, environment)[0]
        assert done.returncode == 0, done.stderr[-2000:]
        outs.append(done.stdout)
    assert "resuming step-00000002 at 16 samples" in outs[0]
    assert "done, nothing to train" in outs[1]
    assert "resuming step-00000004 at 32 samples" in outs[2]


@pytest.fixture
def long_run(config_values, tmp_path) -> list[str]:
    """The command of a run of 2,000 steps on two ranks that saves only when it is stopped."""
    config = tmp_path / "train.yaml"
    values = {
        **config_values,
        "run": str(tmp_path / "run"),
        "epochs": 400.0,
        "checkpoint_every": 16000,
        "ranks": 2,
        "validation": {"every": -1},
    }
    config.write_text(json.dumps(values))
    return [sys.executable, "-m", "launch.cli", "train", str(config)]


def start_and_signal(command: list[str], environment: dict[str, str], number: int) -> tuple[int, list[str]]:
    """Signal the job after its third line of a step; (exit code, lines of stdout)."""
    job = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, bufsize=1)
    try:
        lines: list[str] = []
        for line in step_lines(job, lines):
            if line >= 3:
                job.send_signal(number)
                break
        lines += job.communicate(timeout=60)[0].splitlines()
        return job.returncode, lines
    finally:
        job.terminate()
        job.wait(45)


def step_lines(job: subprocess.Popen[str], lines: list[str]) -> Iterator[int]:
    """Counts the lines `step …` as they come; every line is appended to `lines`."""
    assert job.stdout is not None
    count = 0
    for line in job.stdout:
        lines.append(line.rstrip())
        count += line.startswith("step ")
        yield count


def test_sigterm_and_ctrl_c_end_with_75_and_a_checkpoint_from_which_the_same_command_continues(
    long_run, environment, tmp_path
):
    saved: list[int] = []
    for number, name in ((signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGINT")):
        code, lines = start_and_signal(long_run, environment, number)
        assert code == 75, lines
        step = checkpoint.complete_steps(tmp_path / "run" / "ckpt")[-1]
        assert lines[-1] == f"stopped by {name} at step {step}; the same command continues"
        if saved:
            assert any(line.startswith(f"resuming {checkpoint.step_name(saved[-1])} at") for line in lines)
        saved.append(step)
    assert saved[0] < saved[1]
    steps = [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert steps == list(range(1, saved[1] + 1))
    assert os.path.isfile(tmp_path / "run" / "command.txt")
