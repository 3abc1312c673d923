"""The evaluation gives the same bits on 1, 2 and 4 ranks."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from cluster.local import free_port
from dermfm.model.decoder import DecoderConfig
from dermfm.model.dermfm import DermFM

SCRIPT = Path(__file__).with_name("evaluate_rank.py")

pytestmark = pytest.mark.timeout(900)  # four processes on two busy cores


@pytest.fixture(scope="module")
def make(root: Path) -> ModuleType:
    """The module that builds a small synthetic run."""
    spec = importlib.util.spec_from_file_location("run_builder", root / "tests" / "unit" / "evaluate" / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(make: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run directory with shards of 80 test records."""
    folder = tmp_path_factory.mktemp("ranks")
    config = make.tiny_config(folder / "encoder")
    config.decoder = DecoderConfig(depth=1, width=16, heads=2)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        return make.build_run(folder, DermFM(config).eval(), config, patch)


def evaluate_on(
    world: int, root: Path, run: SimpleNamespace, out: Path, shards: str | None = None
) -> list[tuple[int, str]]:
    """(exit code, standard error) of every rank."""
    base = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world)}
    base |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "LOCAL_WORLD_SIZE": str(world)}
    command = [sys.executable, str(SCRIPT), str(run.run), str(out), shards or run.shards]
    ranks = [
        subprocess.Popen(command, env={**base, "RANK": str(r), "LOCAL_RANK": str(r)}, stderr=subprocess.PIPE, text=True)
        for r in range(world)
    ]
    return [(p.returncode, errors) for p in ranks for _, errors in [p.communicate(timeout=600)]]


@pytest.fixture(scope="module")
def alone(root: Path, run: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one process."""
    out = tmp_path_factory.mktemp("alone")
    assert [code for code, _ in evaluate_on(1, root, run, out)] == [0]
    return out


@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_ranks_gives_the_same_metrics_and_embeddings(
    world: int, root: Path, run: SimpleNamespace, alone: Path, tmp_path: Path
) -> None:
    results = evaluate_on(world, root, run, tmp_path)
    assert [code for code, _ in results] == [0] * world, results[0][1]
    assert json.loads((tmp_path / "metrics.json").read_text()) == json.loads((alone / "metrics.json").read_text())
    ours, theirs = load_file(tmp_path / "embeddings.safetensors"), load_file(alone / "embeddings.safetensors")
    for name in ("image", "text", "prompt"):
        np.testing.assert_array_equal(ours[name], theirs[name])
    for name in ("predictions.parquet", "per_class.json", "reports.parquet"):
        assert (tmp_path / name).read_bytes() == (alone / name).read_bytes()
    tasks = {row["task"] for row in json.loads((alone / "metrics.json").read_text())["results"]}
    assert tasks >= {"classify-fused", "few-shot", "report", "retrieval-t2t", "zero-shot", "probe"}
