"""Where a run takes its samples and its first weights from: a web server, another run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dermfm import checkpoint, zero
from dermfm.metrics import read_rows

pytestmark = pytest.mark.timeout(400)
STEPS = 3


@pytest.fixture(scope="module")
def train(config_values, environment, tmp_path_factory) -> Callable[..., tuple[Path, str]]:
    """train(name, key=value …) → (run folder, what it printed) of a run of three steps on one rank."""
    folder = tmp_path_factory.mktemp("sources")
    values = {**config_values, "epochs": STEPS * 8 / 40, "validation": {"every": -1}}
    (folder / "train.yaml").write_text(json.dumps(values))  # JSON is YAML

    def start(name: str, *keys: str) -> tuple[Path, str]:
        command = [sys.executable, "-m", "launch.cli", "train", str(folder / "train.yaml"), f"run={folder / name}"]
        done = subprocess.run(
            [*command, *keys], env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return folder / name, done.stdout

    return start


@pytest.fixture(scope="module")
def local(train) -> Path:
    """A run over the shards on disk."""
    return train("local")[0]


def losses(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k.startswith("loss")} for row in read_rows(run / "metrics.jsonl")]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return zero.consolidated_weights(run / "ckpt", checkpoint.step_name(STEPS))


def test_a_run_over_a_web_server_has_the_losses_and_weights_of_one_over_the_disk(train, local, shard_folder, serve):
    web = serve(shard_folder)
    remote, _ = train("remote", f"shards={web.url}")
    assert losses(remote) == losses(local)
    assert len(losses(remote)) == STEPS
    expected, found = weights(local), weights(remote)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert any(name.endswith(".tar") for name, _ in web.requests)


def test_a_run_from_another_s_weights_takes_them_names_what_does_not_fit_and_begins_its_schedule_anew(train, local):
    still = ("optimizer.lr=0", "optimizer.image_lr=0", "optimizer.text_lr=0")  # what was taken is what is saved
    run, said = train("after", f"init_from={local}", "model.embed_dim=24", "seed=5", *still)
    old, new = weights(local), weights(run)
    differing = {name for name in old if old[name].shape != new[name].shape}
    assert differing
    assert all(torch.equal(old[name], new[name]) for name in set(old) - differing)
    (told,) = [line for line in said.splitlines() if "do not fit and start anew" in line]
    assert f"{len(differing)} tensors do not fit" in told
    assert all(f"{name} ({list(old[name].shape)}, here {list(new[name].shape)})" in told for name in differing)
    state = checkpoint.read_state(run / "ckpt" / checkpoint.step_name(STEPS))
    assert (state.step, state.samples_seen) == (STEPS, STEPS * 8)
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert "resuming" not in said
