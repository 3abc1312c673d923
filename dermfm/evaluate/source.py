"""What is scored and from where: the checkpoint, its run's configuration, the shards, the output folder."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from dermfm import checkpoint as checkpoints
from dermfm.config import InputError, read_yaml


@dataclasses.dataclass(frozen=True)
class Source:
    """Checkpoint folder, its step and identity, the run directory, the run's configuration as plain containers."""

    checkpoint: Path
    step: int
    identity: str
    run: Path
    config: dict[str, Any]


def find_source(run: str | None, checkpoint: str | None) -> Source:
    """The newest checkpoint of `run`, or the named one. InputError where neither is given or it cannot be used."""
    if not run and not checkpoint:
        raise InputError("run: give run=<run directory> or checkpoint=<run directory>/ckpt/step-NNNNNNNN")
    found = checkpoints.find(checkpoint or run or "")
    directory = found.parent.parent
    digest = hashlib.sha256((found / checkpoints.STATE).read_bytes()).hexdigest()[:16]
    return Source(found, checkpoints.read_state(found).step, digest, directory, read_yaml(directory / "config.yaml"))


def outside_source(name: str, identity: str) -> Source:
    """What stands for a checkpoint where a model comes from elsewhere: its name, step 0, no run."""
    return Source(Path(name), 0, identity, Path(name.rstrip("/").replace("/", "-").replace(":", "-")), {})


def untrained_heads(config: dict[str, Any]) -> dict[str, str]:
    """Tasks whose head the run gave no weight, with the reason; nothing where its configuration has no objectives."""
    weights = config.get("objectives")
    if not isinstance(weights, dict):
        return {}
    heads = {f"classify-{kind}": f"classify_{kind}" for kind in ("image", "text", "fused")}
    shared = bool((config.get("model") or {}).get("shared_layers"))
    return {
        task: f"the run trained no such head (objectives.{name}=0)"
        for task, name in heads.items()
        if not weights.get(name) and not (shared and (weights.get("classify_image") or weights.get("classify_text")))
    }


def shards_folder(given: str | None, source: Source) -> str:
    """The folder of shards: as given, else the one that the run was trained from."""
    folder = given or _lookup(source.config, "shards")
    if not isinstance(folder, str) and not source.config:
        raise InputError("shards: a model from outside needs shards=<folder>")
    if not isinstance(folder, str):
        raise InputError(f"shards: {source.run / 'config.yaml'} names no folder of shards; give shards=<folder>")
    return folder


def train_strategy(config: dict[str, Any]) -> str | None:
    """The note strategies that the run trained on, joined by '+'; None where its configuration names none."""
    strategies = _lookup(config, "strategies")
    if isinstance(strategies, dict):
        strategies = [name for name, weight in strategies.items() if weight]
    return "+".join(sorted(strategies)) if strategies else None


def _lookup(config: dict[str, Any], name: str) -> Any:
    """A key of the run's configuration, at the top or in its `data` part."""
    data = config.get("data")
    return config.get(name) or (data.get(name) if isinstance(data, dict) else None)
