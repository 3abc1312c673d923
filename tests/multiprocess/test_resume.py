"""A run that was stopped and resumed, on as many ranks or on others, is the run that was never stopped.

The worlds are cut from one run at two ranks: 2 → 4 after eight steps, and what four ranks save three steps later goes
on at two and at one; and 1 → 2 → 4 from a run at one rank. The model has frozen parameters (all of the text tower but
its last layer).
"""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from dermfm import checkpoint, zero
from dermfm.metrics import read_rows

SCRIPT = Path(__file__).with_name("resume_rank.py")
STAGES = (1, 2, 3)
NUM_STEPS, CUT, CUT_AGAIN = 28, 8, 11
EVERY = 4  # steps between checkpoints
# The chains of the test that everyone runs; `make soak` runs the others.
IN_CI = {(3, 1)}
WORLDS = [
    pytest.param(stage, world, marks=[] if (stage, world) in IN_CI else pytest.mark.soak)
    for stage in STAGES
    for world in (1, 2, 4)
]
OF_THE_CLOCK = {
    "samples_per_s", "samples_per_s_per_gpu", "step_s", "step_s_p50", "step_s_p95", "data_wait", "memory_gb",
    "slowest_rank", "slowest_lag_s", "checkpoint_s",
}  # fmt: skip

pytestmark = pytest.mark.timeout(400)


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

    def start(self, title: str, world: int, jobs: list[dict[str, Any]], timeout_s: float = 380.0) -> list[int]:
        """The exit codes of the jobs, run by one launch of `world` ranks."""
        plan, out = self.folder / f"{title}.json", self.folder / f"{title}-codes.json"
        plan.write_text(json.dumps({"out": str(out), "jobs": jobs}))
        self.done[title] = self.launch(SCRIPT, world, [str(plan)], timeout_s=timeout_s)
        assert self.done[title].returncode == 0, self.done[title].stderr[-4000:]
        return json.loads(out.read_text())

    def rows(self, name: str) -> list[dict[str, float]]:
        """What the run logged that is not of the clock."""
        path = self.folder / name / "metrics.jsonl"
        return [{k: v for k, v in row.items() if k not in OF_THE_CLOCK} for row in read_rows(path)]

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """The whole model at the end of the run."""
        return zero.consolidated_weights(self.folder / name / "ckpt", checkpoint.step_name(NUM_STEPS))


@pytest.fixture(scope="module")
def runs(config_values, launch, tmp_path_factory) -> Runs:
    """Runs of 28 steps with a validation pass every fourteen."""
    values = {**config_values, "epochs": NUM_STEPS * 8 / 40, "validation": {"every": 14 * 8}}
    values["checkpoint_every"] = EVERY * 8
    return Runs(tmp_path_factory.mktemp("runs"), values, launch)


@pytest.fixture(scope="module")
def two_ranks(runs: Runs) -> Runs:
    """On two ranks, at each stage: `full-<stage>`, and `cut-<stage>` that was stopped after CUT steps and resumed."""
    jobs = []
    for stage in STAGES:
        changes = {"zero": {"stage": stage}}
        jobs.append(runs.job(f"full-{stage}", changes=changes))
        jobs.append(runs.job(f"cut-{stage}", changes=changes, stop=[1, CUT], frozen=f"at-cut-{stage}"))
        jobs.append(runs.job(f"cut-{stage}", changes=changes))
    damage = f"{checkpoint.step_name(CUT)}/*optim_states.pt"
    jobs.append(runs.job("damaged", copy_from="at-cut-1", damage=damage, stop=[0, CUT + 2]))
    faster = {**runs.values["optimizer"], "lr": 0.03, "image_lr": 0.01, "text_lr": 0.01}
    jobs.append(runs.job("faster", copy_from="at-cut-1", changes={"optimizer": faster}, stop=[0, CUT + 3]))
    assert runs.start("two ranks", 2, jobs) == [0, 75, 0] * len(STAGES) + [75, 75]
    return runs


def continued(runs: Runs, stage: int, world: int) -> str:
    """The name of the run that two ranks stopped after CUT steps, four ranks three later, and `world` ranks ended."""
    name, changes = f"two-four-{world}-{stage}", {"zero": {"stage": stage}}
    first = {} if world == 4 else {"stop": [2, CUT_AGAIN]}
    codes = runs.start(name, 4, [runs.job(name, copy_from=f"at-cut-{stage}", changes=changes, **first)])
    if world == 4:
        assert codes == [0]
    else:
        assert codes == [75]
        assert runs.start(f"{name} on", world, [runs.job(name, changes=changes)]) == [0]
    return name


def test_the_loss_has_moved_well_away_from_that_of_guessing(two_ranks):
    """A run in which nothing is learned would agree with everything."""
    for stage in STAGES:
        losses = [row["loss/contrastive"] for row in two_ranks.rows(f"full-{stage}")]
        assert abs(losses[-1] - math.log(8)) > 0.3
        assert max(losses) - min(losses) > 0.5


@pytest.mark.parametrize("stage", STAGES)
def test_at_the_same_world_size_the_resumed_run_is_equal_to_the_last_bit(two_ranks, stage):
    full, cut = two_ranks.rows(f"full-{stage}"), two_ranks.rows(f"cut-{stage}")
    assert [row["step"] for row in full] == list(range(1, NUM_STEPS + 1))
    assert sum("valid/i2t_r@1" in row for row in full) == 2
    assert cut == full
    expected, found = two_ranks.weights(f"full-{stage}"), two_ranks.weights(f"cut-{stage}")
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


@pytest.mark.parametrize(("stage", "world"), WORLDS)
def test_two_ranks_then_four_then_fewer_continue_the_same_losses(two_ranks, stage, world):
    name = continued(two_ranks, stage, world)
    check_continued(two_ranks.rows(f"full-{stage}"), two_ranks.rows(name))
    assert checkpoint.read_state(two_ranks.folder / name / "ckpt" / checkpoint.step_name(NUM_STEPS)).world == world


@pytest.mark.soak
@pytest.mark.parametrize("stage", STAGES)
def test_one_rank_then_two_then_four_continue_the_same_losses(runs, stage):
    name, changes = f"one-two-four-{stage}", {"zero": {"stage": stage}}
    alone = [runs.job(f"alone-{stage}", changes=changes), runs.job(name, changes=changes, stop=[0, CUT])]
    assert runs.start(f"{name} 1", 1, alone) == [0, 75]
    assert runs.start(f"{name} 2", 2, [runs.job(name, changes=changes, stop=[1, CUT_AGAIN])]) == [75]
    assert runs.start(f"{name} 4", 4, [runs.job(name, changes=changes)]) == [0]
    check_continued(runs.rows(f"alone-{stage}"), runs.rows(name))


@pytest.mark.soak
@pytest.mark.timeout(1800)  # every start compiles anew
def test_a_compiled_run_on_two_ranks_resumes_exactly_and_has_the_losses_of_a_plain_one(runs):
    """torch.compile orders sums in its own way: its losses are the plain run's to rounding.

    Every start has processes of its own, as in life: within one, a second model would be compiled from what the
    compiler has learned of the first one's shapes.
    """
    changes = {"compile": True}
    assert runs.start("compiled", 2, [runs.job("plain"), runs.job("compiled", changes=changes)], 800.0) == [0, 0]
    assert runs.start("cut", 2, [runs.job("compiled-cut", changes=changes, stop=[1, CUT])], 400.0) == [75]
    assert runs.start("on", 2, [runs.job("compiled-cut", changes=changes)], 600.0) == [0]
    assert runs.rows("compiled-cut") == runs.rows("compiled")
    for plain, compiled in zip(runs.rows("plain"), runs.rows("compiled"), strict=True):
        assert compiled["loss"] == pytest.approx(plain["loss"], rel=1e-3)
    assert runs.rows("plain") != runs.rows("compiled")  # else nothing was compiled


def check_continued(before: list[dict[str, float]], after: list[dict[str, float]]) -> None:
    """The same steps; exact up to the first resumption, 1e-6 in its first step, 1e-4 in all others."""
    assert [row["step"] for row in after] == [row["step"] for row in before] == list(range(1, NUM_STEPS + 1))
    assert after[:CUT] == before[:CUT]
    for old, new in zip(before, after, strict=True):
        tolerance = 1e-6 if new["step"] == CUT + 1 else 1e-4
        losses = [name for name in old if name.startswith("loss") or name in ("lr", "samples_seen", "epoch")]
        assert {n: new[n] for n in losses} == pytest.approx({n: old[n] for n in losses}, rel=tolerance), new["step"]
        assert new.keys() == old.keys()


def test_a_damaged_newest_checkpoint_falls_back_loudly_to_the_one_before(two_ranks):
    assert two_ranks.rows("damaged") == two_ranks.rows("full-1")[: CUT + 2]
    err = two_ranks.done["two ranks"].stderr
    assert f"checkpoint {checkpoint.step_name(CUT)} is damaged and passed over" in err
    assert f"{checkpoint.step_name(CUT)} is set aside" in err
    assert "bytes" in err


def test_a_changed_learning_rate_takes_effect_in_a_resumed_run(two_ranks):
    full, faster = two_ranks.rows("full-1"), two_ranks.rows("faster")
    assert faster[:CUT] == full[:CUT]
    assert faster[CUT]["loss"] == full[CUT]["loss"]  # the first loss comes before the first update
    assert faster[-1]["loss"] != pytest.approx(full[len(faster) - 1]["loss"], rel=1e-3)


def test_the_run_keeps_its_last_checkpoints_its_best_and_nothing_half_made(two_ranks):
    for name in ("full-1", "cut-3"):
        folder = two_ranks.folder / name / "ckpt"
        rows = {row["step"]: row for row in two_ranks.rows(name)}
        scores = {step: row["valid/zero_shot_f1_macro"] for step, row in rows.items() if "valid/i2t_r@1" in row}
        best = min(step for step, score in scores.items() if score == max(scores.values()))
        kept = sorted({best, NUM_STEPS - EVERY, NUM_STEPS})
        assert checkpoint.complete_steps(folder) == kept
        assert (folder / "latest").read_text().strip() == checkpoint.step_name(NUM_STEPS)
        assert (folder / "best").read_text().strip() == checkpoint.step_name(best)
        assert sorted(p.name for p in folder.iterdir()) == ["best", "latest", *map(checkpoint.step_name, kept)]
        assert checkpoint.damage(folder / checkpoint.step_name(NUM_STEPS)) is None


def test_a_checkpoint_says_what_it_is_of(two_ranks):
    state = checkpoint.read_state(two_ranks.folder / "cut-2" / "ckpt" / checkpoint.step_name(NUM_STEPS))
    manifest = json.loads((Path(two_ranks.values["shards"]) / "manifest.json").read_text())
    assert state.fingerprint == manifest["fingerprint"] == state.identity["shards"]
    assert state.schedule["total_samples"] == state.samples_seen == NUM_STEPS * 8
    assert len(state.code) == len(state.config) == 16
    assert state.meter["losses"] == [row["loss"] for row in two_ranks.rows("cut-2")]
    assert state.meter["skipped"] == 0
    assert state.meter["seconds"] > 0


def test_the_model_of_a_finished_run_loads_whole_from_every_stage(two_ranks):
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    embeddings = [checkpoint.load_model(two_ranks.folder / f"full-{s}").encode_image(pixels)[0] for s in STAGES]
    torch.testing.assert_close(embeddings[1], embeddings[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(embeddings[2], embeddings[0], rtol=1e-3, atol=1e-4)
