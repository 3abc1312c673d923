"""A run that was stopped and resumed, on as many ranks or on others, is the run that was never stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dermfm import checkpoint, zero
from dermfm.metrics import read_rows
from dermfm.run import take_lock
from launch.cli import main

SCRIPT = Path(__file__).with_name("resume_rank.py")
STAGES = (1, 2, 3)
GROWING_STAGES = (1, 3)  # stage 2 is saved and read as stage 1 is
NUM_STEPS, CUT, CUT_AGAIN = 10, 4, 7
OF_THE_CLOCK = {"samples_per_s", "step_s", "data_wait", "memory_gb", "checkpoint_s"}

pytestmark = pytest.mark.timeout(180)


class Runs:
    """A folder of runs, made by launches of `resume_rank.py`; each launch happens once and its output is kept."""

    def __init__(self, folder: Path, values: dict[str, Any], launch: Any) -> None:
        self.folder, self.values, self.launch = folder, values, launch
        self.done: dict[str, subprocess.CompletedProcess[str]] = {}

    def job(self, name: str, **options: Any) -> dict[str, Any]:
        """A job whose run folder is `name`; keys of `changes` overlay the configuration."""
        changes = options.pop("changes", {})
        for which in ("copy_from", "frozen"):
            if which in options:
                options[which] = str(self.folder / options[which])
        return {"config": {**self.values, "run": str(self.folder / name), **changes}, **options}

    def start(self, title: str, world: int, jobs: list[dict[str, Any]], expected: int = 0) -> list[int]:
        """The exit codes of the jobs, run by one launch of `world` ranks; `expected`: the exit code of the launch."""
        plan, out = self.folder / f"{title}.json", self.folder / f"{title}-codes.json"
        plan.write_text(json.dumps({"out": str(out), "jobs": jobs}))
        self.done[title] = self.launch(SCRIPT, world, [str(plan)], timeout_s=170)
        (self.folder / f"{title}-ended").write_text(str(time.time()))
        assert self.done[title].returncode == expected, self.done[title].stderr[-4000:]
        return json.loads(out.read_text())

    def rows(self, name: str) -> list[dict[str, float]]:
        """What the run logged that is not of the clock, checkpoints' own rows left out."""
        rows = [
            {k: v for k, v in r.items() if k not in OF_THE_CLOCK}
            for r in read_rows(self.folder / name / "metrics.jsonl")
        ]
        return [row for row in rows if len(row) > 1]

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """The whole model at the end of the run."""
        return zero.consolidated_weights(self.folder / name / "ckpt", checkpoint.step_name(NUM_STEPS))


@pytest.fixture(scope="module")
def runs(config_values, launch, tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), {**config_values, "epochs": 2.0}, launch)


@pytest.fixture(scope="module")
def two_ranks(runs: Runs) -> Runs:
    """On two ranks, at each stage: `full-<stage>`, and `cut-<stage>` that was stopped after four steps and resumed."""
    jobs = []
    for stage in STAGES:
        changes = {"zero": {"stage": stage}}
        jobs.append(runs.job(f"full-{stage}", changes=changes))
        jobs.append(runs.job(f"cut-{stage}", changes=changes, stop=[1, CUT], frozen=f"at-cut-{stage}"))
        jobs.append(runs.job(f"cut-{stage}", changes=changes))
    damage = f"{checkpoint.step_name(CUT)}/*optim_states.pt"
    jobs.append(runs.job("damaged", copy_from="at-cut-1", damage=damage))
    faster = {**runs.values["optimizer"], "lr": 0.03, "image_lr": 0.01, "text_lr": 0.01}
    jobs.append(runs.job("faster", copy_from="at-cut-1", changes={"optimizer": faster}))
    assert runs.start("two ranks", 2, jobs) == [0, 75, 0] * len(STAGES) + [0, 0]
    return runs


@pytest.fixture(scope="module")
def one_rank(two_ranks: Runs) -> Runs:
    """`fewer-<stage>`: stopped on two ranks after four steps, resumed on one, stopped after seven, resumed on one."""
    jobs = []
    for stage in STAGES:
        changes = {"zero": {"stage": stage}}
        stopping = {"stop": [0, CUT_AGAIN], "frozen": f"at-second-cut-{stage}"}
        jobs.append(two_ranks.job(f"fewer-{stage}", copy_from=f"at-cut-{stage}", changes=changes, **stopping))
        jobs.append(two_ranks.job(f"fewer-{stage}", changes=changes))
    assert two_ranks.start("one rank", 1, jobs) == [75, 0] * len(STAGES)
    return two_ranks


@pytest.fixture(scope="module")
def two_ranks_again(one_rank: Runs) -> Runs:
    """`more-<stage>`: what one rank saved after seven steps, resumed on two. At last `failing`, in which one raises."""
    jobs = [
        one_rank.job(f"more-{stage}", copy_from=f"at-second-cut-{stage}", changes={"zero": {"stage": stage}})
        for stage in GROWING_STAGES
    ]
    jobs.append(one_rank.job("failing", fail=[1, 3]))
    assert one_rank.start("two ranks again", 2, jobs, expected=1) == [0] * len(GROWING_STAGES)
    return one_rank


@pytest.mark.parametrize("stage", STAGES)
def test_on_as_many_ranks_every_logged_number_and_every_weight_is_the_same(two_ranks, stage):
    full, cut = two_ranks.rows(f"full-{stage}"), two_ranks.rows(f"cut-{stage}")
    assert [row["step"] for row in full] == list(range(1, NUM_STEPS + 1))
    assert full[-1]["loss"] < full[0]["loss"]
    assert cut == full
    expected, found = two_ranks.weights(f"full-{stage}"), two_ranks.weights(f"cut-{stage}")
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


@pytest.mark.parametrize("stage", STAGES)
def test_on_one_rank_what_two_have_saved_continues_the_same_losses(one_rank, stage):
    check_continued(one_rank.rows(f"full-{stage}"), one_rank.rows(f"fewer-{stage}"), first_step=CUT + 1)


@pytest.mark.parametrize("stage", GROWING_STAGES)
def test_on_two_ranks_what_one_has_saved_continues_the_same_losses(two_ranks_again, stage):
    check_continued(
        two_ranks_again.rows(f"fewer-{stage}"), two_ranks_again.rows(f"more-{stage}"), first_step=CUT_AGAIN + 1
    )


def check_continued(before: list[dict[str, float]], after: list[dict[str, float]], first_step: int) -> None:
    """The same steps; exact up to the resumption, 1e-6 in its first step, 1e-4 in all others."""
    assert [row["step"] for row in after] == [row["step"] for row in before] == list(range(1, NUM_STEPS + 1))
    assert after[: first_step - 1] == before[: first_step - 1]
    for old, new in zip(before, after, strict=True):
        assert new == pytest.approx(old, rel=1e-6 if new["step"] == first_step else 1e-4), f"step {new['step']}"


def test_a_damaged_newest_checkpoint_falls_back_loudly_to_the_one_before(two_ranks):
    assert two_ranks.rows("damaged") == two_ranks.rows("full-1")
    err = two_ranks.done["two ranks"].stderr
    assert f"checkpoint {checkpoint.step_name(CUT)} is damaged and passed over" in err
    assert f"{checkpoint.step_name(CUT)} is set aside" in err
    assert "bytes" in err


def test_a_changed_learning_rate_takes_effect_in_a_resumed_run(two_ranks):
    full, faster = two_ranks.rows("full-1"), two_ranks.rows("faster")
    assert faster[:CUT] == full[:CUT]
    assert faster[CUT]["loss"] == full[CUT]["loss"]  # the first loss comes before the first update
    assert faster[-1]["loss"] != pytest.approx(full[-1]["loss"], rel=1e-3)


def test_the_run_keeps_its_last_checkpoints_and_nothing_half_made(two_ranks_again):
    for name in ("full-1", "cut-3", "damaged", "fewer-2", "more-1"):
        folder = two_ranks_again.folder / name / "ckpt"
        assert checkpoint.complete_steps(folder) == [NUM_STEPS - 2, NUM_STEPS]
        assert (folder / "latest").read_text().strip() == checkpoint.step_name(NUM_STEPS)
        others = sorted(p.name for p in folder.iterdir() if p.suffix != ".py")  # DeepSpeed leaves scripts there
        assert others == ["latest", *(checkpoint.step_name(s) for s in (NUM_STEPS - 2, NUM_STEPS))]
        assert checkpoint.damage(folder / checkpoint.step_name(NUM_STEPS)) is None


def test_the_model_of_a_finished_run_loads_whole_from_every_stage(two_ranks):
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    embeddings = [checkpoint.load_model(two_ranks.folder / f"full-{s}").encode_image(pixels)[0] for s in STAGES]
    torch.testing.assert_close(embeddings[1], embeddings[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(embeddings[2], embeddings[0], rtol=1e-3, atol=1e-4)


def test_a_rank_that_raises_ends_the_job_in_less_than_a_minute(two_ranks_again):
    folder = two_ranks_again.folder
    began, ended = (
        float(path.read_text()) for path in (folder / "failing" / "failed", folder / "two ranks again-ended")
    )
    assert 0 <= ended - began < 60
    assert two_ranks_again.done["two ranks again"].returncode == 1
    assert "made to fail in step 3" in two_ranks_again.done["two ranks again"].stderr


# ---- through the command line


@pytest.fixture
def stopped(two_ranks, tmp_path) -> tuple[Path, Path]:
    """(config file, run folder) of a run that two ranks have stopped after four steps."""
    folder = tmp_path / "run"
    shutil.copytree(two_ranks.folder / "at-cut-1", folder)
    config = tmp_path / "train.yaml"
    values = {**two_ranks.values, "run": str(folder)}
    config.write_text(json.dumps(values))  # JSON is YAML
    return config, folder


@pytest.fixture
def as_first_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is rank 0 of 2: what it refuses, it refuses before it looks for the other."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that `dermfm train` leaves on stderr with exit code 2."""
    assert main(["train", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err


@pytest.mark.usefixtures("as_first_rank")
def test_a_damaged_checkpoint_that_is_named_is_bad_input(stopped, capsys):
    config, folder = stopped
    named = folder / "ckpt" / checkpoint.step_name(CUT)
    next(named.glob("*model_states.pt")).unlink()
    message = refusal(capsys, str(config), f"resume={named}")
    assert f"{named}: the checkpoint is damaged" in message
    assert "model_states.pt is missing" in message


@pytest.mark.usefixtures("as_first_rank")
def test_a_checkpoint_that_is_not_there_is_bad_input_that_names_the_nearest(stopped, capsys):
    config, folder = stopped
    message = refusal(capsys, str(config), f"resume={folder}/ckpt/step-00000005")
    assert "did you mean 'step-0000000" in message


@pytest.mark.usefixtures("as_first_rank")
def test_a_run_whose_checkpoints_are_all_damaged_is_bad_input(stopped, capsys):
    config, folder = stopped
    for state in folder.glob("ckpt/step-*/state.json"):
        state.write_text("{")
    assert "checkpoints are damaged" in refusal(capsys, str(config))


@pytest.mark.usefixtures("as_first_rank")
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


@pytest.mark.usefixtures("as_first_rank")
def test_another_zero_stage_is_bad_input_that_names_the_run_s_own(stopped, capsys):
    assert "resume with zero.stage=1" in refusal(capsys, str(stopped[0]), "zero.stage=2")


def test_a_batch_that_the_ranks_cannot_share_is_bad_input_with_the_legal_neighbours(stopped, capsys):
    assert "8 is not divisible by 3 ranks; 6 and 9 are" in refusal(capsys, str(stopped[0]), "ranks=3")
    assert "8 is not divisible by 16 ranks; 16 is the smallest" in refusal(capsys, str(stopped[0]), "ranks=16")


def test_a_micro_batch_that_does_not_divide_is_bad_input_with_the_legal_ones(stopped, capsys):
    assert "[1, 2, 4, 8]" in refusal(capsys, str(stopped[0]), "micro_batch=3")


def test_a_run_directory_in_use_is_bad_input(stopped, capsys):
    with take_lock(stopped[1]):
        assert "another process works in this folder" in refusal(capsys, str(stopped[0]))


def test_a_finished_run_has_nothing_to_train(two_ranks, tmp_path, capsys):
    config = tmp_path / "train.yaml"
    config.write_text(json.dumps({**two_ranks.values, "run": str(two_ranks.folder / "full-1")}))
    assert main(["train", str(config)]) == 0
    assert "done, nothing to train" in capsys.readouterr().out


@pytest.fixture
def long_run(runs, tmp_path) -> list[str]:
    """The command of a run of 2,000 steps on two ranks that saves only when it is stopped."""
    config = tmp_path / "train.yaml"
    values = {**runs.values, "run": str(tmp_path / "run"), "epochs": 400.0, "checkpoint_every": 16000, "ranks": 2}
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
