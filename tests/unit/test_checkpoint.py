"""A checkpoint is committed by one rename and believed only if its files are what was written; runs are guarded."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from dermfm import checkpoint, run, zero
from dermfm.checkpoint import (
    COMPLETE,
    KEEP,
    State,
    best,
    complete_steps,
    damage,
    find,
    keep,
    newest,
    point_best,
    prune,
    set_aside,
    source_for,
    step_name,
)
from dermfm.config import InputError
from dermfm.optimizer import OptimizerConfig


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> object:
    """Stands for DeepSpeed's engine: what it writes are two small files."""

    def write(engine: object, folder: Path, tag: str, client_state: dict[str, Any]) -> None:
        (folder / tag).mkdir(parents=True)
        (folder / tag / "mp_rank_00_model_states.pt").write_bytes(b"weights")
        (folder / tag / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"moments")

    monkeypatch.setattr(zero, "save", write)
    return object()


def state_of(step: int, **changes: Any) -> State:
    return State(
        **{"step": step, "samples_seen": 8 * step, "identity": {"seed": 0}, "world": 1, "stage": 1, "threads": 1}
        | changes
    )


def make(folder: Path, *steps: int, **changes: Any) -> None:
    """Committed checkpoints, made by hand."""
    for step in steps:
        home = folder / step_name(step)
        home.mkdir(parents=True)
        (home / "weights.pt").write_bytes(b"weights %d" % step)
        described = {"name": "weights.pt", "size": len(b"weights %d" % step)}
        described["sha256"] = hashlib.sha256(b"weights %d" % step).hexdigest()
        values = vars(state_of(step, **changes)) | {"files": [described]}
        (home / "state.json").write_text(json.dumps(values))
        (home / COMPLETE).touch()


# ---- writing


@pytest.mark.usefixtures("alone")
def test_a_saved_checkpoint_is_complete_described_and_the_latest(tmp_path, engine):
    saved = checkpoint.save(engine, tmp_path, state_of(3))
    assert saved == tmp_path / "step-00000003"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000003"]
    assert (tmp_path / "latest").read_text() == "step-00000003\n"
    state = checkpoint.read_state(saved)
    assert (state.step, state.samples_seen, state.identity) == (3, 24, {"seed": 0})
    assert [(f["name"], f["size"]) for f in state.files] == [
        ("mp_rank_00_model_states.pt", 7), ("zero_pp_rank_0_mp_rank_00_optim_states.pt", 7),
    ]  # fmt: skip
    assert state.files[0]["sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert damage(saved) is None


@pytest.mark.usefixtures("alone")
def test_what_an_interrupted_save_left_is_replaced(tmp_path, engine):
    (tmp_path / "step-00000003.tmp").mkdir()
    (tmp_path / "step-00000003.tmp" / "half").touch()
    saved = checkpoint.save(engine, tmp_path, state_of(3))
    assert not (saved / "half").exists()
    assert complete_steps(tmp_path) == [3]


@pytest.mark.usefixtures("alone")
def test_a_save_that_fails_leaves_the_one_before_as_the_latest(tmp_path, engine, monkeypatch):
    checkpoint.save(engine, tmp_path, state_of(3))

    def fail(engine: object, folder: Path, tag: str, client_state: dict[str, Any]) -> None:
        (folder / tag).mkdir()
        raise OSError("no space left")

    monkeypatch.setattr(zero, "save", fail)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(engine, tmp_path, state_of(6))
    assert newest(tmp_path) == tmp_path / step_name(3)
    assert find(tmp_path / step_name(3)) == tmp_path / step_name(3)


@pytest.mark.usefixtures("alone")
def test_a_writer_that_fails_commits_nothing_and_leaves_no_half(tmp_path, engine, monkeypatch):
    checkpoint.save(engine, tmp_path, state_of(3))

    def full(engine: object, folder: Path) -> list[dict[str, Any]]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zero, "written", full)
    with pytest.raises(OSError, match=r"step-00000006.tmp could not be written: rank 0: No space left on device"):
        checkpoint.save(engine, tmp_path, state_of(6))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000003"]


@pytest.mark.usefixtures("alone")
def test_a_file_that_is_not_what_its_writer_wrote_is_not_committed(tmp_path, engine, monkeypatch):
    told = [{"name": "mp_rank_00_model_states.pt", "size": 8, "sha256": "0"}]
    monkeypatch.setattr(zero, "written", lambda engine, folder: told)
    with pytest.raises(OSError, match=r"mp_rank_00_model_states.pt is not what was written \(8 bytes\)"):
        checkpoint.save(engine, tmp_path, state_of(3))
    assert complete_steps(tmp_path) == []


@pytest.mark.usefixtures("alone")
def test_the_best_step_s_checkpoint_is_named_best(tmp_path, engine):
    for step, best_step in ((3, 3), (6, 3)):
        checkpoint.save(engine, tmp_path, state_of(step, best=0.5, best_step=best_step))
    assert (tmp_path / "best").read_text() == "step-00000003\n"
    assert (tmp_path / "latest").read_text() == "step-00000006\n"


@pytest.mark.usefixtures("alone")
def test_a_step_that_is_saved_again_drops_the_conversion_of_the_old_one(tmp_path, engine):
    checkpoint.save(engine, tmp_path, state_of(3))
    (tmp_path / "step-00000003.universal").mkdir()
    checkpoint.save(engine, tmp_path, state_of(3))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000003"]


# ---- choosing


def test_only_complete_checkpoints_count(tmp_path):
    make(tmp_path, 4, 12)
    make(tmp_path, 8)
    (tmp_path / step_name(8) / COMPLETE).unlink()
    (tmp_path / "step-00000016.tmp").mkdir()
    (tmp_path / "step-00000016.tmp" / COMPLETE).touch()
    assert complete_steps(tmp_path) == [4, 12]
    assert newest(tmp_path) == tmp_path / step_name(12)
    assert newest(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("harm", "part"),
    [
        (lambda c: (c / "weights.pt").unlink(), "weights.pt is missing"),
        (lambda c: (c / "weights.pt").write_bytes(b"weight"), "has 6 bytes, 10 were written"),
        (
            lambda c: (c / "weights.pt").write_bytes(b"weights_12"),
            r"has changed since it was written \(sha256 differs\)",
        ),
        (lambda c: (c / "state.json").write_text("{"), "state.json: is damaged"),
        (lambda c: (c / "state.json").write_text("{}"), "state.json: is damaged"),
        (lambda c: (c / "state.json").unlink(), "state.json: is damaged"),
    ],
)
def test_a_damaged_newest_is_passed_over_loudly_and_named_it_is_bad_input(tmp_path, caplog, harm, part):
    make(tmp_path, 4, 12)
    harm(tmp_path / step_name(12))
    assert newest(tmp_path) == tmp_path / step_name(4)
    assert "checkpoint step-00000012 is damaged and passed over" in caplog.text
    with pytest.raises(InputError, match=part) as error:
        find(tmp_path / step_name(12))
    assert "\n" not in str(error.value)


def test_a_name_that_is_no_checkpoint_gets_the_nearest(tmp_path):
    make(tmp_path / "ckpt", 4, 12)
    with pytest.raises(InputError, match=r"no COMPLETE\); did you mean 'step-00000012'"):
        find(tmp_path / "ckpt" / "step-00000013")
    with pytest.raises(InputError, match="no such run folder"):
        find(tmp_path / "rnu")
    with pytest.raises(InputError, match="no complete checkpoint lies beside it"):
        find(tmp_path / "step-00000004")


def test_a_run_folder_stands_for_its_newest_checkpoint(tmp_path):
    make(tmp_path / "ckpt", 4, 12)
    assert find(tmp_path) == tmp_path / "ckpt" / step_name(12)
    shutil.rmtree(tmp_path / "ckpt")
    with pytest.raises(InputError, match="holds no complete checkpoint"):
        find(tmp_path)


# ---- keeping


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [(2, 0, [20, 24]), (3, 0, [16, 20, 24]), (2, 8, [8, 16, 20, 24]), (9, 0, [4, 8, 12, 16, 20, 24])],
)
def test_the_last_ones_and_every_nth_are_kept(tmp_path, keep_last, keep_every, kept):
    make(tmp_path, 4, 8, 12, 16, 20, 24)
    prune(tmp_path, keep_last, keep_every)
    assert complete_steps(tmp_path) == kept


def test_leftovers_go_once_their_step_is_passed(tmp_path):
    make(tmp_path, 4, 8)
    for name in (
        "step-00000004.universal",
        "step-00000006.tmp",
        "step-00000007.aside",
        "step-00000008.universal",
        "step-00000009.tmp",
    ):
        (tmp_path / name).mkdir()
    prune(tmp_path, 2, 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-00000004", "step-00000008", "step-00000008.universal", "step-00000009.tmp",
    ]  # fmt: skip


def test_checkpoints_after_the_step_that_a_run_goes_on_from_are_set_aside(tmp_path, caplog):
    """Else the run's own next ones, being of smaller steps, would be pruned first and never resumed from."""
    make(tmp_path, 4, 8, 20, 24)
    set_aside(tmp_path, 8)
    assert complete_steps(tmp_path) == [4, 8]
    assert (tmp_path / "step-00000024.aside" / "weights.pt").is_file()
    assert "step-00000020 is set aside" in caplog.text
    make(tmp_path, 12)
    prune(tmp_path, 2, 0)
    assert complete_steps(tmp_path) == [8, 12]
    make(tmp_path, 24)
    prune(tmp_path, 2, 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000012", "step-00000024", "step-00000024.aside"]


def test_the_best_and_those_marked_are_kept_whatever_their_age(tmp_path):
    make(tmp_path, 4, 8, 12, 16, 20, 24)
    point_best(tmp_path, 8)
    keep(tmp_path / step_name(12), "a loss leapt after it")
    prune(tmp_path, 2, 0)
    assert complete_steps(tmp_path) == [8, 12, 20, 24]
    assert best(tmp_path) == tmp_path / step_name(8)
    assert (tmp_path / step_name(12) / KEEP).read_text() == "a loss leapt after it\n"
    point_best(tmp_path, 24)
    prune(tmp_path, 2, 0)
    assert complete_steps(tmp_path) == [12, 20, 24]


def test_a_best_that_is_not_there_is_none(tmp_path):
    make(tmp_path, 4)
    assert best(tmp_path) is None
    point_best(tmp_path, 12)
    assert best(tmp_path) is None
    point_best(tmp_path, 4)
    (tmp_path / step_name(4) / COMPLETE).unlink()
    assert best(tmp_path) is None


# ---- reading at another world size


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Stands for DeepSpeed's converter; the checkpoints that it was asked for."""
    asked: list[Path] = []

    def convert(source: Path, target: Path) -> None:
        asked.append(source)
        target.mkdir()

    monkeypatch.setattr(zero, "convert_universal", convert)
    return asked


def test_as_many_ranks_read_a_checkpoint_as_it_is_others_convert_it_once(tmp_path, conversions):
    make(tmp_path, 4, world=2)
    native = source_for(tmp_path / step_name(4), world=2, stage=1)
    assert (native.folder, native.is_universal) == (tmp_path / step_name(4), False)
    for _ in range(3):
        source = source_for(tmp_path / step_name(4), world=4, stage=1)
        assert (source.folder, source.is_universal) == (tmp_path / "step-00000004.universal", True)
        assert source.state.samples_seen == 32
    assert conversions == [tmp_path / step_name(4)]


def test_stage_0_is_whole_on_every_rank_and_needs_no_conversion(tmp_path, conversions):
    make(tmp_path, 4, world=2, stage=0)
    assert not source_for(tmp_path / step_name(4), world=4, stage=0).is_universal
    assert conversions == []


def test_another_stage_is_bad_input_that_says_which(tmp_path):
    make(tmp_path, 4, stage=2)
    with pytest.raises(InputError, match=r"was written at zero.stage=2, the run asks for 1; resume with zero.stage=2"):
        source_for(tmp_path / step_name(4), world=1, stage=1)


# ---- the run folder


def test_a_change_of_identity_names_the_key_both_values_and_the_ways_out(tmp_path):
    old = {"seed": 0, "model.image.size": 32, "shards": "abc"}
    run.check_identity(old, dict(old), [], tmp_path)
    with pytest.raises(InputError) as error:
        run.check_identity(old, old | {"seed": 1}, [], tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: 'seed' is 1 (it was started with 0); give another run=, restore the value, or allow_change=[seed]"
    )


@pytest.mark.parametrize("allowed", [["model.image.size"], ["model.image"], ["model"]])
def test_an_allowed_change_passes_by_its_name_or_its_part(tmp_path, allowed):
    old, new = {"model.image.size": 32}, {"model.image.size": 64}
    run.check_identity(old, new, allowed, tmp_path)
    with pytest.raises(InputError, match=r"'model\.image\.size'"):
        run.check_identity(old, new, ["mod", "model.im"], tmp_path)


def test_every_changed_key_is_named(tmp_path):
    """One often follows from another: a window that is given moves the lanes that are not."""
    with pytest.raises(InputError, match=r"'num_lanes' is 2 .*, 'window' is 16 .*allow_change=\[num_lanes,window\]"):
        run.check_identity({"num_lanes": 1, "window": 4096}, {"num_lanes": 2, "window": 16}, [], tmp_path)


def test_a_key_that_only_one_side_has_is_a_change(tmp_path):
    with pytest.raises(InputError, match=r"'balance' is 0\.5 \(it was started with None\)"):
        run.check_identity({}, {"balance": 0.5}, [], tmp_path)


def test_a_run_folder_has_one_holder_at_a_time(tmp_path):
    folder = tmp_path / "run"
    for ask in (run.check_free, lambda folder: run.take_lock(folder).__enter__()):
        with run.take_lock(folder), pytest.raises(InputError, match="another process works in this folder"):
            ask(folder)
    with run.take_lock(folder):
        assert (folder / "lock").exists()
    assert list(folder.iterdir()) == []


def test_asking_whether_a_run_folder_is_free_makes_nothing(tmp_path):
    run.check_free(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_lock_ends_with_its_process(tmp_path):
    """A job that was killed leaves its lock file behind, but not the lock."""
    child = os.fork()
    if child == 0:
        with run.take_lock(tmp_path):
            os._exit(9)
    os.waitpid(child, 0)
    assert (tmp_path / "lock").exists()
    run.check_free(tmp_path)
    with run.take_lock(tmp_path):
        pass


def test_the_record_holds_config_commands_and_code(tmp_path, monkeypatch):
    for argv in (["dermfm", "train", "a=1"], ["dermfm", "train", "a=2"]):
        monkeypatch.setattr(run.sys, "argv", argv)
        run.record(tmp_path / "run", OptimizerConfig(lr=0.5))
    assert "lr: 0.5" in (tmp_path / "run" / "config.yaml").read_text()
    assert (tmp_path / "run" / "command.txt").read_text() == "dermfm train a=1\ndermfm train a=2\n"
    code = (tmp_path / "run" / "code.txt").read_text()
    assert code == "not a git checkout\n" or len(code.splitlines()[0]) == 40


def test_without_zero_the_one_file_of_the_first_of_two_ranks_is_a_whole_checkpoint(tmp_path):
    for stage, is_whole in ((0, True), (1, False)):
        partial = tmp_path / f"step-0000000{stage + 1}.tmp"
        partial.mkdir()
        (partial / "mp_rank_00_model_states.pt").write_bytes(b"weights and moments")
        state = checkpoint.State(stage + 1, 8, {}, 2, stage, 1)
        if is_whole:
            checkpoint._commit(partial, state, [])
            assert checkpoint.complete_steps(tmp_path) == [1]
        else:
            with pytest.raises(AssertionError, match="1 state files of 2 ranks"):
                checkpoint._commit(partial, state, [])
