"""Steps that are not finite are stopped or skipped before they touch the weights; leaps keep the checkpoint before."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from cluster.watchdog import Unwatched
from dermfm import checkpoint, guard, saver, zero
from dermfm.border import RunError
from dermfm.checkpoint import State, step_name
from dermfm.config import InputError
from dermfm.guard import Guard, Spikes, culprits
from dermfm.saver import Keeping, Saver

pytestmark = pytest.mark.usefixtures("alone")


class Step:
    """Gradients that were fine, or not."""

    def __init__(self, applied: bool = True) -> None:
        self.applied, self.discards = applied, 0

    def step(self, discard: bool = False) -> Any:
        self.discards += discard
        return SimpleNamespace(applied=self.applied and not discard)


def judge(policy: str, values: dict[str, float], gradients: Step, meter: dict[str, Any], **options: Any) -> Any:
    made = Guard(gradients, policy, options.get("max_skips", 2), options.get("skips_alone", False), meter)
    return made.update(None, 7, values, None, 2)


@pytest.fixture(autouse=True)
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "culprits", lambda *_: "the records: r1, r2")


def test_a_run_that_reads_no_notes_names_records_by_their_images_alone():
    asked: list[str] = []

    def engine(phase: str, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        asked.append(phase)
        return {"embedding": torch.log(inputs["pixels"].float())}

    batch: Any = SimpleNamespace(pixels=torch.tensor([[1], [0], [2], [0]]), record_ids=["a", "b", "c", "d"])
    batch = type("Rows", (SimpleNamespace,), {"__len__": lambda self: 4})(**vars(batch))
    assert "2 records have embeddings that are not finite: b, d" in culprits(engine, batch, 3, reads_text=False)
    assert asked == ["image", "image"]


@pytest.mark.parametrize(
    ("values", "applied", "what"),
    [({"loss": math.nan, "loss/matching": 1.0}, True, "loss is"), ({"loss": 1.0}, False, "the gradient norm is")],
)
def test_what_is_not_finite_stops_the_run_with_its_records(values, applied, what):
    with pytest.raises(RunError, match=f"step 7: {what} not finite; the records: r1, r2; on_nonfinite=skip"):
        judge("stop", values, Step(applied), {})


def test_skips_are_counted_told_and_bounded(caplog):
    meter: dict[str, Any] = {}
    for _ in range(2):
        gradients = Step()
        judge("skip", {"loss": math.inf}, gradients, meter)
        assert gradients.discards == 1
    assert meter["skipped"] == 2
    assert "the step is skipped (2 of 2)" in caplog.text
    with pytest.raises(RunError, match="2 steps were skipped before"):
        judge("skip", {"loss": math.inf}, Step(), meter)


def test_a_step_that_fp16_skips_to_find_its_scale_is_no_fault():
    gradients, meter = Step(applied=False), {}
    update = judge("stop", {"loss": 1.0}, gradients, meter, skips_alone=True)
    assert not update.applied
    assert gradients.discards == 0
    assert meter["skipped"] == 0


def test_a_leap_of_the_loss_keeps_the_checkpoint_before_it_and_says_how_to_pass_over(tmp_path, caplog):
    (tmp_path / step_name(20)).mkdir()
    (tmp_path / step_name(20) / "COMPLETE").touch()
    meter: dict[str, Any] = {}
    spikes = Spikes(tmp_path, 10.0, 8, meter)
    for step in range(1, 31):
        spikes.look(step, step * 8, 2.0 - step / 100 + 0.01 * (-1) ** step)
    assert caplog.text == ""
    spikes.look(31, 248, 4.0)
    assert f"resume={tmp_path / step_name(20)} skip_samples=[240,248] passes over this step" in caplog.text
    assert (tmp_path / step_name(20) / "KEEP").is_file()
    assert Spikes(tmp_path, 10.0, 8, meter)._losses[-1] == 4.0  # a resumed run judges by the same losses


def test_no_leap_is_told_where_none_is_asked_for(tmp_path, caplog):
    spikes = Spikes(tmp_path, 0.0, 8, {})
    for step in range(1, 40):
        spikes.look(step, step * 8, 100.0 if step == 35 else 1.0)
    assert caplog.text == ""


@pytest.fixture
def saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Saver, State, Any]:
    """A saver whose checkpoints are one small file, its state, and the free space that it finds."""
    writer = SimpleNamespace(is_writing=False)
    fake = SimpleNamespace(module=nn.Linear(1000, 1000), checkpoint_engine=writer)

    def write(engine: object, folder: Path, tag: str, client_state: dict[str, Any]) -> None:
        (folder / tag).mkdir(parents=True)
        (folder / tag / "mp_rank_00_model_states.pt").write_bytes(b"weights")

    monkeypatch.setattr(zero, "save", write)
    disk = SimpleNamespace(free=1e9)
    monkeypatch.setattr(saver.shutil, "disk_usage", lambda _: disk)
    state = State(2, 16, {}, 1, 1, 1)
    return Saver(fake, tmp_path, Keeping(2, 0), True, Unwatched()), state, disk


def test_a_run_whose_disk_cannot_hold_one_checkpoint_is_refused_at_its_start(saving):
    made, state, disk = saving
    made.start(state)
    disk.free = 16e6  # a million parameters of 4 bytes, which learn: 12 more for each
    with pytest.raises(InputError, match=r"has 0\.02 GB free, a checkpoint needs 0\.02"):
        made.start(state)


def test_a_full_disk_costs_a_periodic_checkpoint_but_none_that_is_good(saving, tmp_path, caplog):
    made, state, disk = saving
    made.border(state, writing=False, save=True, last=False)
    made.border(state, writing=False, save=False, last=False)
    assert checkpoint.complete_steps(tmp_path) == [2]
    disk.free, state.step = 5, 4
    made.border(state, writing=False, save=True, last=False)
    made.border(state, writing=False, save=False, last=False)
    assert checkpoint.complete_steps(tmp_path) == [2]
    assert "goes on without this checkpoint; the last good one is step-00000002" in caplog.text
    with pytest.raises(RunError, match="make room, and the same command goes on from there"):
        made.border(state, writing=False, save=True, last=True)


def test_a_checkpoint_is_committed_at_the_border_where_every_rank_has_written(saving, tmp_path):
    made, state, _ = saving
    made.border(state, writing=False, save=True, last=False)
    state.step = 3
    made.border(state, writing=True, save=False, last=False)
    assert checkpoint.complete_steps(tmp_path) == []
    made.border(state, writing=False, save=False, last=False)
    assert checkpoint.complete_steps(tmp_path) == [2]
    assert made.cost()["checkpoint_s"] > 0
    assert made.cost() == {}


def test_only_a_better_value_makes_a_best(saving):
    made, state, _ = saving
    assert not made.is_best(state, None)
    assert [made.is_best(state, v) for v in (0.5, 0.5, 0.4, 0.6)] == [True, False, False, True]
    assert (state.best, state.best_step) == (0.6, 2)
