"""Manifests say what is wrong and where; the reader gives the bytes that tarfile gives."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import pickle
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.manifest import Manifest, ShardError
from shards.reader import ShardReader


def flip_byte(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(bytes(data))


def test_every_sample_is_what_tarfile_extracts(make_shards):
    manifest = make_shards([3, 1, 5])
    reader = ShardReader(manifest.folder, manifest.split("train"))
    for shard, info in enumerate(manifest.shards):
        with tarfile.open(manifest.path(info)) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
        found = {}
        for row in range(info.num_samples):
            sample = reader.read(shard, row)
            key = sample.pop("__key__").decode()
            found |= {f"{key}.{extension}": data for extension, data in sample.items()}
        assert found == members


def test_a_reader_pickles_and_works_in_another_process(make_shards):
    manifest = make_shards([4, 2])
    reader = ShardReader(manifest.folder, manifest.shards)
    here = reader.read(1, 1)
    assert pickle.loads(pickle.dumps(reader)).read(1, 1) == here
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.starmap(reader.read, [(1, 1)] * 8) == [here] * 8


def test_the_manifest_lists_sizes_and_hashes_of_the_files(make_shards):
    manifest = make_shards([2, 3])
    for info in manifest.shards:
        data = manifest.path(info).read_bytes()
        assert (info.num_bytes, info.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert [s.num_samples for s in manifest.shards] == [2, 3]
    manifest.verify()


def test_the_fingerprint_changes_with_any_byte(make_shards):
    one, same, other = make_shards([2, 3]), make_shards([2, 3], folder="b"), make_shards([3, 2], folder="c")
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_an_empty_split_is_named_with_those_that_have_samples(make_shards):
    with pytest.raises(ShardError, match="'valid' holds no sample; splits with samples: train"):
        make_shards([1]).split("valid")


def test_a_missing_manifest_a_missing_shard_and_a_missing_index_are_named(make_shards, tmp_path):
    with pytest.raises(ShardError, match=r"nowhere/manifest\.json: no such manifest"):
        Manifest.load(tmp_path / "nowhere")
    manifest = make_shards([1, 1])
    manifest.path(manifest.shards[1]).with_suffix(".idx").unlink()
    with pytest.raises(ShardError, match=r"train-00001\.idx: missing"):
        Manifest.load(manifest.folder)
    manifest.path(manifest.shards[0]).unlink()
    with pytest.raises(ShardError, match=r"train-00000\.tar: missing"):
        Manifest.load(manifest.folder)


def test_a_truncated_shard_is_found_before_anything_is_read(make_shards):
    manifest = make_shards([4])
    path = manifest.path(manifest.shards[0])
    path.write_bytes(path.read_bytes()[:-600])
    with pytest.raises(ShardError, match=r"train-00000\.tar: has .* it is truncated"):
        Manifest.load(manifest.folder)


def test_a_manifest_changed_by_hand_or_of_other_shards_is_refused(make_shards):
    manifest, other = make_shards([4, 2]), make_shards([2, 2], folder="other")
    path = manifest.path(manifest.shards[0]).parent / "manifest.json"
    values = json.loads(path.read_text())
    values["shards"][0]["num_samples"] = 3
    path.write_text(json.dumps(values))
    with pytest.raises(ShardError, match="changed by hand"):
        Manifest.load(manifest.folder)
    path.write_text((other.path(other.shards[0]).parent / "manifest.json").read_text())
    with pytest.raises(ShardError, match=r"train-00000\.idx: lists 4 samples, the manifest says 2"):
        Manifest.load(manifest.folder)
    path.write_text("{")
    with pytest.raises(ShardError, match="cannot be read as a manifest"):
        Manifest.load(manifest.folder)


@pytest.mark.parametrize("position", [600, 5])
def test_a_flipped_byte_is_found_by_verify_and_the_shard_named(make_shards, position):
    manifest = make_shards([3, 3])
    flip_byte(manifest.path(manifest.shards[1]), position)
    with pytest.raises(ShardError, match=r"train-00001"):
        manifest.verify()
    assert len(list(manifest.problems())) == 1


def test_a_sample_that_fails_its_check_is_named_with_its_row(make_shards):
    def check(sample):
        if json.loads(sample["json"])["number"] == 4:
            raise ValueError("not an image")

    with pytest.raises(ShardError, match=r"train-00001\.tar: sample 0000000000000004 \(row 1\).*not an image"):
        make_shards([3, 3]).verify(check)


def test_an_index_of_another_tar_is_found_by_verify_and_by_reading(make_shards):
    manifest = make_shards([3, 3])
    first, second = (manifest.path(s).with_suffix(".idx") for s in manifest.shards)
    second.write_bytes(first.read_bytes())
    with pytest.raises(ShardError, match=r"train-00001\.idx: line \d+ does not match the tar"):
        manifest.verify()
    text = first.read_text().replace(" 512 ", " 1024 ", 1)
    first.write_text(text)
    with pytest.raises(ShardError, match=r"train-00000\.tar: index and tar differ at .* \(row 0\)"):
        ShardReader(manifest.folder, manifest.shards).read(0, 0)


def test_reading_beyond_a_tar_that_was_cut_names_shard_and_sample(make_shards):
    manifest = make_shards([3])
    path = manifest.path(manifest.shards[0])
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ShardError, match=r"train-00000\.tar: sample 0000000000000002 \(row 2\).*truncated"):
        ShardReader(manifest.folder, manifest.shards).read(0, 2)


def test_an_index_with_another_number_of_samples_than_the_manifest_is_refused(make_shards):
    manifest = make_shards([2])
    other = make_shards([3], folder="other")
    index = manifest.path(manifest.shards[0]).with_suffix(".idx")
    index.write_bytes(other.path(other.shards[0]).with_suffix(".idx").read_bytes())
    with pytest.raises(ShardError, match="lists 3 samples, the manifest says 2"):
        ShardReader(manifest.folder, manifest.shards).read(0, 0)


def test_rows_come_in_manifest_order(make_shards):
    manifest = make_shards([2, 1])
    rows = [("train-00001.tar", 0, "c"), ("train-00000.tar", 1, "b"), ("train-00000.tar", 0, "a")]
    columns = dict(zip(("shard", "row", "record_id"), map(list, zip(*rows, strict=True)), strict=True))
    pq.write_table(pa.table(columns), f"{manifest.folder}/rows.parquet")
    assert manifest.read_rows("train")["record_id"] == ["a", "b", "c"]


def test_memory_of_an_index_does_not_grow_with_what_is_read(make_shards):
    manifest = make_shards([200])
    reader = ShardReader(manifest.folder, manifest.shards)
    reader.read(0, 0)
    size = len(pickle.dumps(reader))
    for row in np.random.default_rng(0).permutation(200):
        reader.read(0, int(row))
    assert len(pickle.dumps(reader)) == size
    assert set(vars(reader)) == {"folder", "shards", "remote", "_pid", "_source", "_pool", "_indexes"}
