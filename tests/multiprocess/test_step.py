"""One optimizer step means the same on any number of ranks, micro-batch size and ZeRO stage: that of the full batch.

The reference is plain autograd in one process over the whole batch, see `step_rank.run_reference`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("step_rank.py")
NUM_STEPS, NUM_LONG = 4, 20
MORE = {
    "contrastive_form": "nt_xent", "align_cosine": 0.3, "align_l1": 0.3, "caption": 1.0, "concepts": 0.5,
    "classify_subclass": 0.5, "classify_malignancy": 0.5,
}  # fmt: skip
PARTS = {
    "image": {"name": "test_efficientnet", "size": 64},
    "decoder": {"depth": 1, "width": 16, "heads": 2},
    "heads": ["subclass", "malignancy", "concepts"],
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "all": {},
    "more": MORE,
    "supervised": {"contrastive_form": "supervised", "matching": 0, "label_smoothing": 0.1},
    "image-only": {"contrastive": 0, "matching": 0, "classify_text": 0, "classify_fused": 0},
}
# (world, ZeRO stage, micro-batch, objectives); the batch has 16 samples
CASES = [
    (1, 1, 16, "all"),
    (1, 1, 2, "all"),
    (1, 0, 4, "supervised"),
    (2, 0, 4, "all"),
    (2, 1, 8, "all"),
    (2, 1, 1, "all"),
    (2, 2, 4, "all"),
    (2, 3, 4, "all"),
    (2, 1, 2, "supervised"),
    (2, 2, 8, "image-only"),
    (4, 1, 2, "all"),
    (4, 2, 4, "all"),
    (4, 3, 4, "all"),
    (2, 3, 4, "more"),
    (4, 2, 2, "more"),
]
# (world, None: one step in float64 without DeepSpeed, micro-batch, objectives)
DOUBLE = [(1, None, 16, "more"), (2, None, 2, "more"), (4, None, 4, "more")]
# Every stage on two and on four ranks, in several micro-batches or one: followed over 20 steps, half of them in CI.
LONG = [(2, 2, 4, "all"), (4, 1, 2, "all"), (4, 3, 4, "all")]
LONG_IN_SOAK = [(2, 1, 8, "all"), (2, 3, 4, "all"), (4, 2, 4, "all")]

pytestmark = pytest.mark.timeout(300)
Rows = list[dict[str, float]]


@pytest.fixture(scope="module")
def results(config_values, launch, tmp_path_factory) -> Callable[[int], dict[Any, Rows]]:
    """results(world) → the rows of that world's cases, and with world 1 the references by objectives' name."""
    found: dict[int, dict[Any, Rows] | BaseException] = {}

    def of(world: int) -> dict[Any, Rows]:
        if world not in found:
            try:
                found[world] = run_world(world, config_values, launch, tmp_path_factory.mktemp("step"))
            except (AssertionError, pytest.fail.Exception) as error:
                found[world] = error  # every test of this world fails with it, at once
        result = found[world]
        if isinstance(result, BaseException):
            raise result
        return result

    return of


def run_world(
    world: int, values: dict[str, Any], launch: Any, folder: Path, cases: Sequence[Any] = (*CASES, *DOUBLE)
) -> dict[Any, Rows]:
    own = [case for case in cases if case[0] == world]
    job: dict[str, Any] = {
        "model": values["model"] | PARTS,
        "out": str(folder / "rows.json"),
        "cases": [{"stage": s, "micro": m, "objectives": values["objectives"] | OBJECTIVES[o]} for _, s, m, o in own],
        "references": [{"objectives": values["objectives"] | changes} for changes in OBJECTIVES.values()],
    }
    for case, described in zip(own, job["cases"], strict=True):
        described["num_steps"] = NUM_LONG if case in LONG or cases == LONG_IN_SOAK else NUM_STEPS
    for name, described in zip(OBJECTIVES, job["references"], strict=True):
        described["num_steps"] = NUM_LONG if name == "all" else NUM_STEPS
    done = launch(SCRIPT, world, [json.dumps(job)], timeout_s=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip([*own, *OBJECTIVES], json.loads((folder / "rows.json").read_text()), strict=False))


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-ranks-stage-{c[1]}-micro-{c[2]}-{c[3]}")
def test_losses_and_gradient_norms_are_those_of_the_full_batch_in_one_process(results, case):
    rows, reference = results(case[0])[case], results(1)[case[3]]
    losses, expected_losses = ({n: v for n, v in row.items() if "loss" in n} for row in (rows[0], reference[0]))
    assert losses == pytest.approx(expected_losses, rel=1e-6)
    assert len(rows) == (NUM_LONG if case in LONG else NUM_STEPS)
    for row, expected in zip(rows, reference, strict=False):
        assert row == pytest.approx(expected, rel=1e-4)


@pytest.mark.soak
@pytest.mark.parametrize("world", [2, 4])
def test_the_other_stages_too_are_followed_over_20_steps(results, config_values, launch, tmp_path, world):
    found = run_world(world, config_values, launch, tmp_path, LONG_IN_SOAK)
    for case in [case for case in LONG_IN_SOAK if case[0] == world]:
        assert len(found[case]) == NUM_LONG
        for row, expected in zip(found[case], results(1)["all"], strict=True):
            assert row == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("case", DOUBLE, ids=lambda c: f"{c[0]}-ranks-micro-{c[2]}-{c[3]}")
def test_every_loss_and_every_parameter_s_gradient_is_that_of_the_full_batch_in_float64(results, case):
    (found,) = results(case[0])[case]
    assert {name: value for name, value in found.items() if value > 1e-6} == {}
    assert len([name for name in found if name.startswith("loss/")]) == 11
    assert "decoder.words" in found


@pytest.mark.parametrize("objectives", ["all", "more"])
def test_the_losses_of_the_comparison_really_move(results, objectives):
    first, *_, last = results(1)[objectives]
    assert last["loss"] < 0.9 * first["loss"]
    assert all(last[name] != pytest.approx(first[name], rel=1e-4) for name in first)


def test_the_worlds_agree_with_each_other_while_the_batch_is_unevenly_bad_over_ranks(results):
    """Rank 0 of 2 and of 4 has all records without notes; bad samples, unknown labels, equal texts lie elsewhere."""
    everywhere = [results(world)[(world, 1, micro, "all")] for world, micro in ((1, 2), (2, 1), (4, 2))]
    alone, *others = [[row["loss/matching"] for row in rows[:NUM_STEPS]] for rows in everywhere]
    assert all(other == pytest.approx(alone, rel=1e-4) for other in others)
