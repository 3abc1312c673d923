"""The launcher for one machine: environments, exit codes, forwarded signals, and an end within half a minute."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster import local
from cluster.local import free_port, run_ranks

pytestmark = pytest.mark.timeout(60)


def rank(program: str) -> list[str]:
    """The command of a rank that runs a small program; `R` is its rank, `F` the folder that it was given."""
    head = "import json, os, signal, sys, time; from pathlib import Path; R = int(os.environ['RANK']); "
    return [sys.executable, "-c", head + program]


def test_each_rank_gets_its_place_and_one_meeting_point(tmp_path):
    program = f"Path(r'{tmp_path}', str(R)).write_text(json.dumps(dict(os.environ)))"
    assert run_ranks(rank(program), 3) == 0
    seen = [json.loads((tmp_path / str(r)).read_text()) for r in range(3)]
    assert [e["RANK"] for e in seen] == [e["LOCAL_RANK"] for e in seen] == ["0", "1", "2"]
    assert {(e["WORLD_SIZE"], e["LOCAL_WORLD_SIZE"], e["MASTER_ADDR"]) for e in seen} == {("3", "3", "127.0.0.1")}
    assert len({e["MASTER_PORT"] for e in seen}) == 1
    assert "RANK" not in os.environ


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([0, 0, 0], 0),
        ([75, 75, 75], 75),
        ([0, 75, 0], 75),
        ([0, 3, 0], 3),
        ([75, 2, 75], 2),
        ([0, 0, -9], 1),  # killed: the shell's convention has no negative codes
    ],
)
def test_the_job_s_code_is_that_of_the_rank_that_failed(codes, expected):
    program = f"c = {codes}[R]; os.kill(os.getpid(), -c) if c < 0 else sys.exit(c)"
    assert run_ranks(rank(program), 3) == expected


def test_the_first_failure_decides(tmp_path):
    program = "time.sleep(0 if R == 1 else 1.5); sys.exit(4 + R)"
    assert run_ranks(rank(program), 2) == 5


def test_once_a_rank_has_failed_the_others_get_their_time_and_are_then_ended(monkeypatch, capfd):
    monkeypatch.setattr(local, "GRACE_S", 1.0)
    began = time.monotonic()
    assert run_ranks(rank("sys.exit(7) if R == 1 else time.sleep(60)"), 3) == 7
    assert time.monotonic() - began < 20
    assert "a rank has failed; ending the others" in capfd.readouterr().err


def test_a_rank_that_is_still_saving_is_given_its_time(tmp_path):
    program = f"sys.exit(7) if R == 1 else (time.sleep(1), Path(r'{tmp_path}', 'saved').touch())"
    assert run_ranks(rank(program), 2) == 7
    assert (tmp_path / "saved").exists()


def start(tmp_path: Path, root: Path, program: str) -> subprocess.Popen[str]:
    """A launcher of two ranks in a process of its own; both have said that they run."""
    command = rank(f"F = Path(r'{tmp_path}'); {program}")
    launcher = f"import sys; from cluster.local import run_ranks; sys.exit(run_ranks({command!r}, 2))"
    environment = {**os.environ, "PYTHONPATH": str(root)}
    job = subprocess.Popen([sys.executable, "-c", launcher], env=environment, text=True)
    deadline = time.monotonic() + 30
    while len(list(tmp_path.glob("ready*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    return job


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_reach_every_rank_once(tmp_path, root, number):
    program = (
        f"signal.signal({int(number)}, lambda n, _: (F / f'got{{R}}').open('a').write('x')); "
        "(F / f'ready{R}').touch(); [time.sleep(0.05) for _ in iter((F / f'got{R}').exists, True)]; "
        "time.sleep(0.3); sys.exit(75)"
    )
    job = start(tmp_path, root, program)
    job.send_signal(number)
    assert job.wait(40) == 75
    assert [(tmp_path / f"got{r}").read_text() for r in range(2)] == ["x", "x"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_that_comes_while_ranks_still_start_stops_resumably(tmp_path, root, number):
    """A rank that loads its libraries has no handler yet; nothing is lost, the same command continues."""
    job = start(tmp_path, root, "(F / f'ready{R}').touch(); time.sleep(60)")
    job.send_signal(number)
    assert job.wait(40) == 75


def test_the_launcher_leaves_no_rank_and_no_handler_behind(tmp_path):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    program = f"Path(r'{tmp_path}', str(os.getpid())).touch(); sys.exit(R)"
    assert run_ranks(rank(program), 2) == 1
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before
    for path in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.name), 0)


def test_free_ports_can_be_listened_on():
    import socket

    port = free_port()
    with socket.socket() as s:
        s.bind(("127.0.0.1", port))
        assert s.getsockname()[1] == port
