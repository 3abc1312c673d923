"""Where truth is known: colour words look at their colours, reports state what was drawn, notes are told apart."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def figures(*arguments: str) -> dict[str, float]:
    """Figure → our value, as `benchmarks/atlas.py` prints them."""
    command = [sys.executable, "benchmarks/atlas.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row["figure"]: row["ours"] for row in rows}


@pytest.mark.soak
@pytest.mark.timeout(6 * 3600)
def test_a_trained_model_knows_where_colours_are_and_writes_what_was_drawn(tmp_path):
    """The goals of configs/atlas-truth.yaml; its head says what was reached."""
    found = figures("--run", str(tmp_path / "run"))
    assert found["colour word on its colour, pairs of colours"] >= 0.8
    assert found["colour word on its colour, lesions"] >= 0.8
    assert found["reports, F1 of all"] >= 0.9
    assert found["reports, F1 of colours"] >= 0.9
    assert found["own note over a random one"] >= 0.93
