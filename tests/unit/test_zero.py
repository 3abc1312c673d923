"""DeepSpeed as this project starts it."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from dermfm import zero


def test_deepspeed_builds_with_the_ninja_of_this_environment_whatever_stands_first_on_the_path(monkeypatch):
    own = Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"/usr/bin:{own}")
    zero.ready("cpu")
    assert shutil.which("ninja") == str(own / "ninja")


def test_what_deepspeed_builds_stays_in_this_environment_unless_another_folder_is_named(monkeypatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    zero.ready("cpu")
    assert Path(os.environ["TORCH_EXTENSIONS_DIR"]).parent == Path(sys.prefix)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/elsewhere")
    zero.ready("cpu")
    assert os.environ["TORCH_EXTENSIONS_DIR"] == "/elsewhere"


@pytest.mark.parametrize(("device", "stage", "contiguous"), [("cpu", 1, False), ("cpu", 2, None), ("cuda:0", 1, None)])
def test_gradients_are_not_copied_at_stage_1_on_a_cpu(device, stage, contiguous):
    found = zero.deepspeed_json(
        zero.ZeroConfig(stage=stage), micro_batch=2, num_micro=1, world=2, optimizer={"lr": 1e-3}, device=device,
        num_learning=1000, num_parameters=2000,
    )  # fmt: skip
    assert found["zero_optimization"].get("contiguous_gradients") is contiguous
