"""Shards that `dermfm shards` packed are read unchanged by webdataset and by open_clip, and indexed as DALI wants."""

from __future__ import annotations

import argparse
import functools
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from webdataset.tariterators import tar_file_expander

from dermfm.notes.store import NOTE_SCHEMA
from launch.cli import main
from shards.manifest import Manifest


@pytest.fixture(scope="module")
def packed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, dict[str, str]]:
    """Drawn images with one note each, packed with `txt_strategy`; the manifest, and record_id → note."""
    out = tmp_path_factory.mktemp("packed")
    small = ["atlas.num_dermo=40", "atlas.num_clinic=0", "atlas.size=64"]
    assert main(["records", str(root / "configs/data/atlas.yaml"), f"out={out}/records.parquet", *small]) == 0
    ids = pq.read_table(out / "records.parquet")["record_id"].to_pylist()
    notes = {i: f"A lesion, number {n}, übrigens." for n, i in enumerate(ids)}
    blanks = {"string": "", "int64": 0, "int32": 0, "double": 0.0}
    rows = [
        {f.name: None if f.nullable else blanks.get(str(f.type), []) for f in NOTE_SCHEMA}
        | {"note_id": f"n{n}", "record_id": i, "strategy": "template", "engine": "template", "text": notes[i]}
        | {"label_access": "given", "faults": []}
        for n, i in enumerate(ids)
    ]
    (out / "notes").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=NOTE_SCHEMA), out / "notes" / "part-00000.parquet")
    words = [f"records={out}/records.parquet", f"notes={out}/notes", f"out={out}/shards", "shard_bytes=30000"]
    assert main(["shards", *words, "txt_strategy=template"]) == 0
    return Manifest.load(out / "shards"), notes


def urls(manifest: Manifest) -> list[str]:
    return [str(manifest.path(shard)) for shard in manifest.split("train")]


def test_webdataset_reads_image_note_and_fields_of_every_sample(packed):
    manifest, notes = packed
    found = {s["__key__"]: s for s in webdataset.WebDataset(urls(manifest), shardshuffle=False).decode("pil")}
    assert len(urls(manifest)) > 1
    assert set(found) == set(manifest.read_rows("train")["record_id"])
    for key, sample in found.items():
        assert sample["txt"] == notes[key] == sample["json"]["notes"][0]["text"]
        assert sample["jpg"].size == (sample["json"]["width"], sample["json"]["height"])


def test_open_clips_training_reader_gives_every_image_with_its_note(packed, monkeypatch):
    open_clip = pytest.importorskip("open_clip")
    data = pytest.importorskip("open_clip_train.data")
    # open_clip is written for webdataset up to 0.2.86, which put no marks between shards
    monkeypatch.setattr(data, "tar_file_expander", functools.partial(tar_file_expander, eof_value=None))
    manifest, notes = packed
    wanted = manifest.read_rows("train")["record_id"]
    arguments = argparse.Namespace(
        train_data="::".join(urls(manifest)), train_num_samples=len(wanted), train_data_upsampling_factors=None,
        dataset_resampled=False, seed=0, workers=0, batch_size=1, world_size=1,
    )  # fmt: skip

    def bytes_of(text: str) -> torch.Tensor:
        return torch.tensor([[*text.encode()]])

    transform = open_clip.image_transform(32, is_train=True)
    batches = list(data.get_wds_dataset(arguments, transform, is_train=True, tokenizer=bytes_of).dataloader)
    read = [bytes(tokens[0].tolist()).decode() for _, tokens in batches]
    assert sorted(read) == sorted(notes[i] for i in wanted)
    assert all(pixels.shape == (1, 3, 32, 32) for pixels, _ in batches)


def test_the_index_names_every_member_where_dalis_reader_looks_for_it(packed):
    """DALI seeks to the offset of a component's data and reads `size` bytes (its docs, "Index file format v1.2")."""
    manifest, _ = packed
    for shard in manifest.shards:
        path = manifest.path(shard)
        head, *lines = path.with_suffix(".idx").read_text().splitlines()
        assert head == f"v1.2 {shard.num_samples}"
        data = path.read_bytes()
        with tarfile.open(path) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
        seen = {}
        for line in lines:
            words = line.split(" ")
            assert len(words) % 4 == 0
            for extension, offset, size, name in zip(*(words[i::4] for i in range(4)), strict=True):
                assert name.endswith(f".{extension}")
                seen[name] = data[int(offset) : int(offset) + int(size)]
        assert seen == members
        assert all(json.loads(v)["record_id"] for k, v in seen.items() if k.endswith(".json"))
