"""Rank, world and device from the environments of torchrun, SLURM and our own launcher; what is missing is named."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest
import torch
import torch.distributed as dist

from cluster import process
from cluster.preemption import StopFlag
from cluster.process import Process, ProcessError, close_group, from_environment, is_launched, start_group
from launch.cli import heed_stops

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch):
    """environment(NAME="value", …): exactly these of the launchers' variables are set."""
    for name in [*NAMES, *(n for n in os.environ if n.startswith("SLURM_"))]:
        monkeypatch.setenv(name, "")  # so that what the code sets is undone
        monkeypatch.delenv(name)

    def set_to(**values: object) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    return set_to


def test_without_a_launcher_a_process_is_alone(environment):
    environment()
    assert from_environment("cpu") == Process(0, 1, 0, 1, "cpu")
    assert not is_launched()
    assert from_environment("cpu").is_first


def test_torchrun_s_variables_are_read(environment):
    environment(RANK=5, WORLD_SIZE=8, LOCAL_RANK=1, LOCAL_WORLD_SIZE=4, MASTER_ADDR="node0", MASTER_PORT=29500)
    assert from_environment("cpu") == Process(5, 8, 1, 4, "cpu")
    assert is_launched()
    assert not from_environment("cpu").is_first


def test_slurm_s_variables_are_read_and_the_first_host_is_where_ranks_meet(environment, monkeypatch):
    environment(
        SLURM_STEP_NUM_TASKS=8, SLURM_PROCID=6, SLURM_LOCALID=2, SLURM_NTASKS_PER_NODE=4, SLURM_JOB_ID=123456,
        SLURM_STEP_NODELIST="gpu[03-04]",
    )  # fmt: skip
    asked = []

    def scontrol(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, "gpu03\ngpu04\n", "")

    monkeypatch.setattr(process.subprocess, "run", scontrol)
    assert is_launched()
    assert from_environment("cpu") == Process(6, 8, 2, 4, "cpu")
    assert asked == [["scontrol", "show", "hostnames", "gpu[03-04]"]]
    assert os.environ["MASTER_ADDR"] == "gpu03"
    assert 1024 < int(os.environ["MASTER_PORT"]) < 65536


def test_one_slurm_task_is_no_group(environment):
    environment(SLURM_STEP_NUM_TASKS=1, SLURM_PROCID=0, SLURM_JOB_ID=7)
    assert not is_launched()
    assert from_environment("cpu").world == 1


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"RANK": 0}, "WORLD_SIZE is 'None', a number is needed"),
        ({"RANK": "first", "WORLD_SIZE": 2}, "RANK is 'first', a number is needed"),
        ({"RANK": 1, "WORLD_SIZE": 2, "MASTER_PORT": 1}, "MASTER_ADDR is not set, 2 processes cannot meet"),
        ({"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "a"}, "MASTER_PORT is not set"),
        ({"RANK": 2, "WORLD_SIZE": 2, "MASTER_ADDR": "a", "MASTER_PORT": 1}, "rank 2 is not valid in a world of 2"),
    ],
)
def test_what_an_environment_lacks_is_named(environment, values, part):
    environment(**values)
    with pytest.raises(ProcessError, match=part):
        from_environment("cpu")


def test_a_cuda_device_that_is_not_here_is_named_with_the_choice(environment, monkeypatch):
    environment()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert from_environment("auto").device == "cpu"
    with pytest.raises(ProcessError, match=r"device: 'cuda' is not here .* use device=auto or device=cpu"):
        from_environment("cuda")


def test_a_rank_takes_the_cuda_device_of_its_place_on_the_node(environment, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    environment(RANK=6, WORLD_SIZE=8, LOCAL_RANK=2, MASTER_ADDR="a", MASTER_PORT=1)
    assert from_environment("auto").device == "cuda:2"
    environment(LOCAL_RANK=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # a task that sees only its own device
    assert from_environment("cuda").device == "cuda:0"


def test_a_lone_process_joins_a_group_of_one_and_leaves_it(environment):
    environment()
    start_group(from_environment("cpu"))
    try:
        assert (dist.get_rank(), dist.get_world_size(), dist.get_backend()) == (0, 1, "gloo")
        assert os.environ["WORLD_SIZE"] == "1"
    finally:
        close_group()
    assert not dist.is_initialized()
    close_group()  # a second time does nothing


@pytest.fixture
def flag():
    """An installed flag; the former handlers come back afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield StopFlag().install()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_only_sets_the_flag(flag, number):
    assert not flag
    os.kill(os.getpid(), number)
    assert flag
    assert flag.signal_name == number.name


def test_a_stop_during_a_rank_s_imports_is_kept_for_the_border_where_all_ranks_leave_together(flag, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    heed_stops("train")
    os.kill(os.getpid(), signal.SIGUSR1)
    assert StopFlag.of_process().signal_name == "SIGUSR1"


def test_a_stop_of_any_other_job_interrupts_it_from_its_first_moment(flag):
    heed_stops("notes")
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGUSR1)


def test_a_second_ctrl_c_interrupts_at_once(flag):
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_batch_script_of_many_tasks_is_not_one_of_them(environment):
    environment(SLURM_NTASKS=8, SLURM_PROCID=0, SLURM_JOB_ID=7)
    assert not is_launched()
    assert from_environment("cpu").world == 1


def test_a_variable_that_is_no_number_is_named(environment):
    environment(SLURM_STEP_NUM_TASKS="a")
    with pytest.raises(ProcessError, match="SLURM_STEP_NUM_TASKS is 'a'"):
        is_launched()
