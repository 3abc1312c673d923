"""Small folders of shards, written by the project's writer from made-up samples."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from shards.manifest import Manifest, write_manifest
from shards.writer import write_shard


def sample_of(number: int) -> dict[str, str | bytes]:
    """Sample `number`: its bytes say which it is."""
    image = f"image {number} ".encode() * (1 + number % 70)
    return {"__key__": f"{number:016x}", "jpg": image, "json": json.dumps({"number": number}).encode()}


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., Manifest]:
    """make_shards([3, 1, 5], split="train") → the manifest of shards with those numbers of samples."""

    def make(sizes: list[int], split: str = "train", folder: str = "shards") -> Manifest:
        out = tmp_path / folder
        out.mkdir(exist_ok=True)
        numbers = iter(range(sum(sizes)))
        infos = [
            write_shard(out, f"{split}-{i:05d}.tar", split, [sample_of(next(numbers)) for _ in range(size)])
            for i, size in enumerate(sizes)
        ]
        write_manifest(out, infos, {})
        return Manifest.load(out)

    return make
