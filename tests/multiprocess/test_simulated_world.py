"""One rank of 1,024 builds DeepSpeed's engine and takes a whole step, in one process; stage 3 is left to arithmetic.

A fake collective leaves a rank with its own data: the values of the losses mean nothing.
"""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("simulated_rank.py")


@pytest.mark.timeout(200)
def test_a_rank_of_1024_takes_a_step_at_stages_0_to_2_and_owns_a_1024th(config_values, environment, tmp_path):
    model = copy.deepcopy(config_values["model"])
    model["fusion"] = {"depth": 6, "width": 128, "heads": 2}
    job = {"model": model, "stages": [0, 1, 2], "out": str(tmp_path / "rows.json")}
    command = [sys.executable, str(SCRIPT), json.dumps(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=190, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [math.isfinite(row["loss"]) for row in rows] == [True] * 3
    plain, *sharded = rows
    assert plain["optimizer"] == plain["learning"]
    for row in sharded:  # a 1,024th of what learns, each group padded to a multiple of the world
        assert row["learning"] / 1024 <= row["optimizer"] < row["learning"] / 1024 + 4 * row["groups"]
