"""The command line: its exit codes, one line on stderr for what is not valid, and a help text for every job."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.process import ProcessError
from dermfm.config import REQUIRED, InputError, key
from launch import cli
from launch.cli import main, parse
from shards.manifest import ShardError


@dataclass(kw_only=True)
class MadeUpConfig:
    run: str = key(REQUIRED, "run directory")
    epochs: int = key(3, "passes")


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., int]], list]:
    """job(run) makes `dermfm made-up` a job whose run function is `run`; returns the list of its calls."""

    def install(run: Callable[..., int]) -> list:
        calls: list = []

        def recorded(config: MadeUpConfig, call: cli.Call) -> int:
            calls.append((config, call))
            return run()

        module = types.ModuleType("launch.made_up", "Do something made up.\n\nIn two paragraphs.")
        module.schema = lambda call: MadeUpConfig  # type: ignore[attr-defined]
        module.run = recorded  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "launch.made_up", module)
        monkeypatch.setitem(cli.JOBS, "made_up", ("something made up", ("first", "second")))
        return calls

    return install


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line on stderr of a call that ends with exit code 2."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    return err.rstrip()


# ---- exit codes


@pytest.mark.parametrize("code", [0, 1, 75])
def test_the_exit_code_is_the_job_s(job, code):
    job(lambda: code)
    assert main(["made_up", "run=r"]) == code


@pytest.mark.parametrize("kind", [InputError, ShardError, ProcessError])
def test_bad_input_is_one_line_on_stderr_and_exit_code_2(job, capsys, kind):
    def run() -> int:
        raise kind("records.csv: no column 'dx';\n  did you mean 'dx_type'?")

    job(run)
    assert refusal(capsys, "made_up", "run=r") == (
        "dermfm made_up: records.csv: no column 'dx'; did you mean 'dx_type'?"
    )


def test_only_the_first_rank_says_it(job, capsys, monkeypatch):
    def run() -> int:
        raise InputError("no")

    job(run)
    monkeypatch.setenv("RANK", "1")
    assert main(["made_up", "run=r"]) == 2
    assert capsys.readouterr().err == ""


def test_ctrl_c_is_75_and_says_that_the_same_command_continues(job, capsys):
    def run() -> int:
        raise KeyboardInterrupt

    job(run)
    assert main(["made_up", "run=r"]) == 75
    assert "the same command continues" in capsys.readouterr().err


def test_an_error_of_the_program_itself_is_not_hidden(job):
    def run() -> int:
        raise RuntimeError("a defect")

    job(run)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["made_up", "run=r"])


def test_the_program_s_exit_code_is_main_s(root):
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "trian"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "dermfm trian: unknown job 'trian'; did you mean 'train'?\n"


# ---- what is not valid


def test_an_unknown_job_names_the_nearest_or_lists_all(capsys):
    assert refusal(capsys, "trian") == "dermfm trian: unknown job 'trian'; did you mean 'train'?"
    assert "valid: cancel, demo, doctor" in refusal(capsys, "zzzz")


def test_an_unknown_option_names_the_nearest(capsys):
    assert refusal(capsys, "train", "--explian") == (
        "dermfm train: unknown option '--explian'; did you mean '--explain'?"
    )


def test_an_unknown_verb_lists_the_verbs_of_the_job(capsys):
    message = refusal(capsys, "shards", "verfy")
    assert "'verfy' is not understood; valid verbs: add-notes, verify, index;" in message
    assert "valid verbs" not in refusal(capsys, "train", "verify")


def test_a_second_file_is_not_understood(job, capsys):
    job(lambda: 0)
    assert "'b.yaml' is not understood" in refusal(capsys, "made_up", "a.yaml", "b.yaml")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["run=r", "epoch=3"], "command line: unknown key 'epoch'; did you mean 'epochs'?"),
        (["run=r", "epochs=many"], "command line: epochs: Value 'many'"),
        (["epochs=3"], "the key 'run' is required (run directory); give run=<value>"),
        (["nowhere.yaml"], "nowhere.yaml: no such file"),
    ],
)
def test_bad_settings_are_refused_before_the_job_runs(job, capsys, arguments, part):
    calls = job(lambda: 0)
    assert part in refusal(capsys, "made_up", *arguments)
    assert calls == []


# ---- parsing


def test_verb_file_settings_and_options_come_in_any_order():
    call = parse(["shards", "--dry-run", "verify", "a=1", "c.yaml", "b.c={x: 1}"])
    assert (call.job, call.verb, call.config, call.overrides) == ("shards", "verify", "c.yaml", ("a=1", "b.c={x: 1}"))
    assert (call.dry_run, call.explain, call.help) == (True, False, False)


def test_a_setting_whose_value_ends_in_yaml_is_no_file():
    call = parse(["train", "run=a.yaml"])
    assert call.config is None
    assert call.overrides == ("run=a.yaml",)


def test_the_job_gets_the_loaded_config_and_the_call(job, tmp_path):
    calls = job(lambda: 0)
    path = tmp_path / "c.yaml"
    path.write_text("run: r\n")
    assert main(["made_up", "second", str(path), "epochs=5", "--dry-run"]) == 0
    (config, call), *_ = calls
    assert config == MadeUpConfig(run="r", epochs=5)
    assert call.verb == "second"
    assert call.dry_run


# ---- help and explain


def test_without_arguments_the_usage_is_shown_with_exit_code_2(capsys):
    assert main([]) == 2
    assert capsys.readouterr().out.startswith("dermfm <job> [verb] [config.yaml] [key=value …]")


@pytest.mark.parametrize("word", ["--help", "-h", "help"])
def test_help_lists_every_job_and_the_exit_codes(capsys, word):
    assert main([word]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name}" in out for name in cli.JOBS)
    assert "75 stopped and resumable" in out


@pytest.mark.parametrize("name", cli.JOBS)
def test_every_job_explains_itself_and_its_keys(capsys, name):
    for verb in (None, *cli.JOBS[name][1]):
        assert main([name, *([verb] if verb else []), "--help"]) == 0
        out = capsys.readouterr().out
        text, _, keys = out.partition("\n\nKeys (")
        assert len(text) > 40
        lines = keys.splitlines()[1:]
        assert lines
        assert [line for line in lines if not line.rpartition(")  ")[2].strip()] == []  # every key has its doc line


def test_every_job_is_a_module_and_every_module_of_launch_is_a_job(root: Path):
    modules = {path.stem for path in (root / "launch").glob("*.py")} - {"__init__", "cli"}
    assert modules == set(cli.JOBS)


def test_explain_shows_origins_and_does_not_run_the_job(job, capsys, tmp_path):
    calls = job(lambda: 0)
    path = tmp_path / "c.yaml"
    path.write_text("epochs: 4\n")
    assert main(["made_up", str(path), "run=r", "--explain"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        'run = "r"   [str] (command line)  run directory',
        f"epochs = 4   [int] ({path})  passes",
    ]
    assert calls == []


@pytest.mark.parametrize("argv", [["--help"], ["notes", "--help"], ["notes", "--explain"]])
def test_a_reader_that_has_read_enough_is_no_error(argv):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as stdout:
        done = subprocess.run(
            [sys.executable, "-m", "launch.cli", *argv], stdout=stdout, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (0, "")
