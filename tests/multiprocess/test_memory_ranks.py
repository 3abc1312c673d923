"""Bytes that DeepSpeed's processes really hold, against the arithmetic that `dermfm plan` prints."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from dermfm.memory import Sharding, checkpoint_size, states

SCRIPT = Path(__file__).with_name("memory_rank.py")
BUFFERS = 2 * 10_000 * 4  # of memory_rank.BUCKET, float32
CASES = {
    2: [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")],
    4: [(1, "bf16"), (2, "fp32"), (3, "bf16")],
}

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def measured(config_values, launch, tmp_path_factory) -> dict[tuple[int, int, str], list[dict[str, float]]]:
    """(world, stage, precision) → one row a rank."""
    model = copy.deepcopy(config_values["model"])
    model["fusion"] = {"depth": 6, "width": 128, "heads": 2}  # a model large enough to outweigh what belongs to none
    found: dict[tuple[int, int, str], list[dict[str, float]]] = {}
    for world, cases in CASES.items():
        folder = tmp_path_factory.mktemp(f"memory-{world}")
        described: list[dict[str, Any]] = [{"stage": stage, "precision": precision} for stage, precision in cases]
        job = {"model": model, "cases": described, "folder": str(folder)}
        done = launch(SCRIPT, world, [json.dumps(job)], timeout_s=280)
        assert done.returncode == 0, done.stderr[-3000:]
        ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world)]
        for (stage, precision), *rows in zip(cases, *ranks, strict=True):
            found[world, stage, precision] = rows
    return found


@pytest.mark.parametrize("case", [(world, *case) for world, cases in CASES.items() for case in cases], ids=str)
def test_model_states_of_every_rank_are_within_5_percent_of_the_formula(measured, case):
    world, stage, precision = case
    for row in measured[case]:
        expected = states(int(row["learning"]), int(row["frozen"]), Sharding(stage, precision, world)).device
        held = row["states"] - row["other"]
        print(
            f"{case}: {held / 1e6:.2f} MB of states, formula {expected / 1e6:.2f}, process {row['resident'] / 1e6:.0f}"
        )
        assert held == pytest.approx(expected, rel=0.05, abs=BUFFERS)
        assert 0.05 * expected > BUFFERS


@pytest.mark.parametrize(
    "case", [(2, 0, "fp32"), (2, 1, "bf16"), (2, 3, "bf16"), (4, 2, "fp32"), (4, 3, "bf16")], ids=str
)
def test_a_checkpoint_has_the_planned_size(measured, case):
    world, stage, precision = case
    row = measured[case][0]
    planned = checkpoint_size(int(row["learning"]), int(row["frozen"]), Sharding(stage, precision, world))
    assert row["checkpoint"] == pytest.approx(planned.total, rel=0.05)
