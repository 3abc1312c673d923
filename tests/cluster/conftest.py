"""The tiny image-text world of tests/multiprocess (towers, shards, configuration) for runs on a cluster."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_spec = importlib.util.spec_from_file_location(
    "tiny_world", Path(__file__).parents[1] / "multiprocess" / "conftest.py"
)  # folders of tests are no packages, and pytest looks for fixtures only above a test
assert _spec is not None
assert _spec.loader is not None
_world = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_world)

config_values, environment = _world.config_values, _world.environment
shard_folder, text_tower = _world.shard_folder, _world.text_tower
