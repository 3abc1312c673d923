"""A process of the streaming tests: reads one rank's batches through real decoding and prints what they hold.

Arguments: one JSON object {folder, start, batch, rank, world, workers, steps, remote}. Prints one object a sample.
"""

from __future__ import annotations

import hashlib
import json
import sys

import torch

from dermfm.images import AugmentConfig
from dermfm.samples import Collate, SampleFn
from shards.loader import stream
from shards.manifest import Manifest
from shards.order import SampleOrder
from shards.reader import ShardReader
from shards.storage import Remote


class ByteTokenizer:
    """A note's bytes as tokens; enough of a tokenizer's interface, and needs no files."""

    pad_token_id = 0

    def __call__(self, texts: list[str], truncation: bool, max_length: int, padding: bool) -> dict:
        return {"input_ids": [list(text.encode())[:max_length] for text in texts]}


def main() -> None:
    """Print ids, pixels and note of every sample that this rank reads."""
    job = json.loads(sys.argv[1])
    manifest = Manifest.load(job["folder"], Remote(**job.get("remote", {})))
    reader = ShardReader(manifest.folder, manifest.split("train"), manifest.remote)
    batches = stream(
        reader,
        SampleOrder(reader.shard_sizes, seed=5, window=16),
        start=job["start"],
        global_batch=job["batch"],
        rank=job["rank"],
        world=job["world"],
        seed=9,
        sample_fn=SampleFn(32, {"template": 1.0, "open": 2.0}, AugmentConfig()),
        collate_fn=Collate(ByteTokenizer(), max_tokens=64, image_size=32),
        num_workers=job["workers"],
        num_steps=job["steps"],
    )
    for batch in batches:
        for i, record_id in enumerate(batch.record_ids):
            note = bytes(batch.tokens[i, : batch.lengths[i]].to(torch.uint8).tolist()).decode()
            pixels = hashlib.sha256(batch.pixels[i].numpy().tobytes()).hexdigest()
            weight = float(batch.weight[i])
            line = {"index": int(batch.indices[i]), "id": record_id, "note": note, "pixels": pixels, "weight": weight}
            print(json.dumps(line))


if __name__ == "__main__":
    main()
