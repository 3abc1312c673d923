"""The sbatch files are shell that parses, and start ranks in the way that preemption needs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).resolve().parents[2] / "slurm").glob("*.sbatch"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_a_script_is_valid_shell(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--shell=bash", str(script)], check=True)


def test_training_starts_with_srun_and_is_requeued_once_when_resumable() -> None:
    text = next(s for s in SCRIPTS if s.name == "train.sbatch").read_text()
    assert "#SBATCH --signal=USR1@" in text  # to the tasks: no B:
    assert "torchrun" not in text
    assert text.count("scontrol requeue") == 1
