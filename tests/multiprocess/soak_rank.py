"""A process of the memory soak: reads many batches and prints the resident memory of itself and its workers.

Arguments: one JSON object {folder, workers, batches, remote}. Prints one JSON list of [batch number, bytes].
"""

from __future__ import annotations

import gc
import json
import sys

import psutil

from dermfm.images import AugmentConfig
from dermfm.samples import Collate, SampleFn
from shards.loader import stream
from shards.manifest import Manifest
from shards.order import SampleOrder
from shards.reader import ShardReader
from shards.storage import Remote

EVERY = 25


class ByteTokenizer:
    """A note's bytes as tokens."""

    pad_token_id = 0

    def __call__(self, texts: list[str], truncation: bool, max_length: int, padding: bool) -> dict:
        return {"input_ids": [list(text.encode())[:max_length] for text in texts]}


def resident() -> int:
    """Bytes that this process and all that it started have for themselves (a share of common pages would change with
    what else runs); garbage is not counted as growth."""
    gc.collect()
    own = psutil.Process()
    return sum(p.memory_full_info().uss for p in [own, *own.children(recursive=True)])


def main() -> None:
    """Read and measure."""
    job = json.loads(sys.argv[1])
    manifest = Manifest.load(job["folder"], Remote(**job.get("remote", {})))
    reader = ShardReader(manifest.folder, manifest.split("train"), manifest.remote)
    batches = stream(
        reader, SampleOrder(reader.shard_sizes, seed=5, window=16), start=0, global_batch=32, rank=0, world=1, seed=9,
        sample_fn=SampleFn(64, {"open": 1.0}, AugmentConfig()), collate_fn=Collate(ByteTokenizer(), 64, 64),
        num_workers=job["workers"], num_steps=job["batches"],
    )  # fmt: skip
    print(json.dumps([[i, resident()] for i, _ in enumerate(batches) if i % EVERY == 0]))


if __name__ == "__main__":
    main()
