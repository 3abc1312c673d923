"""Shards at a URL give what the local folder gives, whatever the server does; what cannot be had is one clear line."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shards.cache
from shards.cache import NodeCache
from shards.index import index_path
from shards.loader import passes, stream
from shards.manifest import Manifest, ShardError
from shards.order import SampleOrder
from shards.reader import ShardReader
from shards.storage import Remote, Storage, StorageError

SIZES = [7, 12, 1, 20]
QUICK = {"timeout_s": 20.0, "attempts": 3, "pause_s": 0.01}
SHORT_S = 1.0  # a request's time-out where the server hangs; shorter, and a busy machine is taken for a dead server


@pytest.fixture
def local(make_shards) -> Manifest:
    return make_shards(SIZES)


@pytest.fixture
def web(local, serve) -> Any:
    """The local folder behind a real HTTP server."""
    return serve(local.folder)


@pytest.fixture(params=["ranges", "cache"])
def remote(request, tmp_path) -> Remote:
    """Both ways of reading a remote shard."""
    return Remote(cache=str(tmp_path / "cache") if request.param == "cache" else None, **QUICK)


def cached(tmp_path: Path, **options) -> Remote:
    return Remote(cache=str(tmp_path / "cache"), **(QUICK | options))


def impatient(remote: Remote, fault: str) -> Remote:
    """The same with a short time-out where the fault is a server that hangs."""
    return dataclasses.replace(remote, timeout_s=SHORT_S) if fault == "hang" else remote


def reader_of(web: Any, remote: Remote) -> ShardReader:
    manifest = Manifest.load(web.url, remote)
    return ShardReader(manifest.folder, manifest.split("train"), manifest.remote)


def every_sample(reader: ShardReader) -> list[dict[str, bytes]]:
    return [reader.read(s, row) for s, size in enumerate(reader.shard_sizes) for row in range(size)]


def key_and_draw(sample, rng):
    return sample["__key__"].decode(), sample["jpg"], float(rng.random())


def keep(items, indices):
    return list(items), indices.tolist()


def batches(reader: ShardReader, steps: int = 12):
    order = SampleOrder(reader.shard_sizes, seed=3, num_lanes=2, window=4)
    return list(
        stream(
            reader, order, start=4, global_batch=8, rank=0, world=1, seed=11, sample_fn=key_and_draw, collate_fn=keep,
            num_steps=steps,
        )
    )  # fmt: skip


def files_in(remote: Remote, pattern: str = "*") -> list[Path]:
    return sorted(Path(remote.cache or "").glob(pattern))


def test_every_sample_and_the_manifest_are_those_of_the_local_folder(local, web, remote):
    assert Manifest.load(web.url, remote).fingerprint == local.fingerprint
    assert every_sample(reader_of(web, remote)) == every_sample(ShardReader(local.folder, local.shards))


def test_the_stream_from_a_url_is_the_local_stream(local, web, remote):
    assert batches(reader_of(web, remote)) == batches(ShardReader(local.folder, local.shards))


def test_an_evaluation_pass_from_a_url_is_the_local_one(local, web, remote):
    def read(reader):
        parts = passes(reader, SIZES, batch_size=6, rank=1, world=2, sample_fn=key_and_draw, collate_fn=keep)
        return [(rows.tolist(), batch) for rows, batch in parts]

    assert read(reader_of(web, remote)) == read(ShardReader(local.folder, local.shards))


def test_byte_ranges_read_samples_and_indexes_and_never_a_whole_shard(local, web):
    every_sample(reader_of(web, Remote(**QUICK)))
    tars = [span for name, span in web.requests if name.endswith(".tar")]
    assert len(tars) == sum(SIZES)
    assert None not in tars
    assert web.count(".idx") == len(SIZES)


def test_a_cache_asks_for_every_shard_once_and_a_second_reader_for_none(web, tmp_path):
    remote = cached(tmp_path)
    every_sample(reader_of(web, remote))
    assert (web.count(".tar"), web.count(".idx")) == (len(SIZES), len(SIZES))
    web.requests.clear()
    every_sample(reader_of(web, remote))
    assert [name for name, _ in web.requests] == ["manifest.json"]
    assert files_in(remote, "*.part") == []


def test_a_remote_reader_pickles_and_is_opened_anew(web, remote):
    reader = reader_of(web, remote)
    here = reader.read(1, 3)
    assert pickle.loads(pickle.dumps(reader)).read(1, 3) == here


@pytest.mark.parametrize("fault", ["500", "503", "429", "cut", "hang"])
def test_answers_that_fail_now_and_then_are_asked_for_again(local, web, remote, fault):
    remote = impatient(remote, fault)
    names = ("manifest.json", "train-00000.idx", "train-00001.tar", "train-00003.tar")
    for name in names[1:3] if fault == "hang" else names:  # each costs its time-out
        web.faults[name] = [fault] if fault == "hang" else [fault, fault]
    assert every_sample(reader_of(web, remote)) == every_sample(ShardReader(local.folder, local.shards))


def test_a_slow_answer_is_waited_for_as_long_as_bytes_come(local, web, remote):
    web.delay_s = 0.1
    assert reader_of(web, remote).read(3, 5) == ShardReader(local.folder, local.shards).read(3, 5)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("500", r"after 3 attempts \(500"), ("cut", "after 3 attempts"), ("hang", "after 3 attempts")],
)
def test_a_shard_that_never_comes_is_one_line_after_a_bounded_number_of_attempts(web, remote, fault, reason):
    web.faults["train-00001.tar"] = [f"always {fault}"]
    reader = reader_of(web, impatient(remote, fault))
    with pytest.raises(StorageError, match=rf"{web.url}/train-00001\.tar: cannot be read {reason}") as error:
        reader.read(1, 0)
    assert "\n" not in str(error.value)
    assert web.count("train-00001.tar") == 3


def test_a_shard_that_is_gone_is_not_asked_for_twice(web, remote):
    web.faults["train-00001.tar"] = ["always 404"]
    with pytest.raises(StorageError, match=r"train-00001\.tar: there is no such file \(404\)"):
        reader_of(web, remote).read(1, 0)
    assert web.count("train-00001.tar") == 1


def test_an_outage_ends_the_stream_with_its_reason_and_leaves_no_gaps_in_it(web, remote):
    web.faults["train-00003.tar"] = ["always 500"]
    with pytest.raises(StorageError, match=r"train-00003\.tar: cannot be read .* asked for row \d+ of"):
        batches(reader_of(web, remote))


def test_a_missing_or_cut_shard_or_index_is_named_before_anything_is_read(local, web, remote):
    tar = local.path(local.shards[1])
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-512])
    with pytest.raises(ShardError, match=rf"{web.url}/train-00001\.tar: has .* it is truncated"):
        Manifest.load(web.url, remote)
    tar.write_bytes(whole)
    index_path(tar).unlink()
    with pytest.raises(ShardError, match=r"train-00001\.idx: there is no such file"):
        Manifest.load(web.url, remote)
    (tar.parent / "manifest.json").unlink()
    with pytest.raises(ShardError, match=r"manifest\.json: there is no such file"):
        Manifest.load(web.url, remote)


def test_nobody_at_the_address_and_an_unknown_storage_are_one_line(tmp_path):
    with pytest.raises(StorageError, match=r"127\.0\.0\.1:9/x/manifest\.json: cannot be read after 3 attempts"):
        Manifest.load("http://127.0.0.1:9/x", Remote(**QUICK))
    with pytest.raises(StorageError, match=r"'s4' is no known storage; s3, gs, http, https are"):
        Manifest.load("s4://bucket/x", Remote(**QUICK))


def test_an_index_of_another_shard_is_refused(local, web, remote):
    first, second = (index_path(local.path(s)) for s in local.shards[:2])
    second.write_bytes(first.read_bytes())
    with pytest.raises(ShardError, match=r"train-00001\.idx: lists 7 samples, the manifest says 12"):
        reader_of(web, remote).read(1, 0)


def test_a_server_without_byte_ranges_needs_a_cache_and_says_so(local, serve, tmp_path):
    web = serve(local.folder, knows_ranges=False)
    with pytest.raises(StorageError, match=r"sends the whole file .* give cache\.folder"):
        reader_of(web, Remote(**QUICK)).read(1, 3)
    assert every_sample(reader_of(web, cached(tmp_path))) == every_sample(ShardReader(local.folder, local.shards))


def test_a_shard_is_put_together_from_several_requests(local, web, tmp_path, monkeypatch):
    monkeypatch.setattr(shards.cache, "CHUNK", 3000)
    web.faults["train-00003.tar"] = ["500", "cut", "", "500"]
    assert every_sample(reader_of(web, cached(tmp_path))) == every_sample(ShardReader(local.folder, local.shards))
    assert web.count("train-00003.tar") > local.shards[3].num_bytes / 3000


def test_other_bytes_than_the_manifests_are_fetched_once_more_and_then_refused(local, web, tmp_path):
    web.faults["train-00001.tar"] = ["garble"]
    assert reader_of(web, cached(tmp_path)).read(1, 0)["__key__"] == b"0000000000000007"
    web.faults["train-00003.tar"] = ["always garble"]
    with pytest.raises(StorageError, match=r"train-00003\.tar: .* not those of the manifest .* copy it anew"):
        reader_of(web, cached(tmp_path)).read(3, 0)
    assert files_in(cached(tmp_path), "*.part") == []


def test_a_flipped_byte_that_byte_ranges_meet_is_a_bad_sample_or_a_named_fault(local, web):
    path = local.path(local.shards[0])
    data = bytearray(path.read_bytes())
    data[257] ^= 1  # the mark of a tar header
    path.write_bytes(bytes(data))
    with pytest.raises(ShardError, match=r"train-00000\.tar: index and tar differ at .* \(row 0\)"):
        reader_of(web, Remote(**QUICK)).read(0, 0)


def test_verify_reads_a_remote_folder_and_names_the_shard(local, web, remote):
    assert list(Manifest.load(web.url, remote).problems()) == []
    path = local.path(local.shards[2])
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(bytes(data))
    (fault,) = Manifest.load(web.url, remote).problems()
    assert fault.startswith(f"{web.url}/train-00002.tar: ")


def test_the_cache_keeps_to_its_bytes_and_lets_the_oldest_go(local, web, tmp_path):
    sizes = [s.num_bytes for s in local.shards]
    remote = cached(tmp_path, max_bytes=sizes[3] + sizes[1] + 3000)
    reader = reader_of(web, remote)
    age = time.time() - 1000
    for shard in (0, 1):
        reader.read(shard, 0)
        for path in files_in(remote, f"{local.shards[shard].sha256}*"):
            os.utime(path, (age + shard, age + shard))
    reader.read(3, 0)
    left = {p.stem for p in files_in(remote, "*.tar")}
    assert left == {local.shards[1].sha256, local.shards[3].sha256}
    assert sum(p.stat().st_size for p in files_in(remote)) <= remote.max_bytes
    assert reader.read(0, 0)["__key__"] == b"0000000000000000"  # what was removed is fetched again


def test_a_whole_stream_through_a_cache_of_one_shard_is_right_if_slow(local, web, tmp_path):
    remote = cached(tmp_path, max_bytes=max(s.num_bytes for s in local.shards) + 2000)
    assert batches(reader_of(web, remote), steps=4) == batches(ShardReader(local.folder, local.shards), steps=4)
    assert sum(p.stat().st_size for p in files_in(remote, "*.tar")) <= remote.max_bytes


def test_an_impossible_cache_is_refused_when_the_reader_is_made(local, web, tmp_path):
    largest = max(s.num_bytes for s in local.shards)
    with pytest.raises(StorageError, match=rf"cache\.max_bytes: 1000 is less than .* at least {largest}"):
        reader_of(web, cached(tmp_path, max_bytes=1000))
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cache\.folder: .* cannot be made"):
        reader_of(web, Remote(cache=str(tmp_path / "file"), **QUICK))


def test_shards_of_the_next_window_are_fetched_before_they_are_asked_for(local, web, tmp_path):
    remote = cached(tmp_path)
    reader = reader_of(web, remote)
    order = SampleOrder(reader.shard_sizes, seed=3, num_lanes=1, window=8)
    wanted = order.shards_ahead(np.arange(4))
    reader.prefetch(wanted)
    deadline = time.monotonic() + 10
    while len(files_in(remote, "*.tar")) < len(wanted) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert {p.stem for p in files_in(remote, "*.tar")} == {local.shards[s].sha256 for s in wanted}
    assert {s for _, s, _ in (order[i] for i in range(16))} <= set(wanted)


def test_fetching_ahead_removes_nothing_that_is_in_use(local, web, tmp_path):
    remote = cached(tmp_path, max_bytes=local.shards[3].num_bytes + 2000)
    reader = reader_of(web, remote)
    reader.read(3, 0)
    NodeCache(Storage(web.url, remote)).fetch(local.shards[1], ahead=True)
    assert [p.stem for p in files_in(remote, "*.tar")] == [local.shards[3].sha256]


def test_the_thread_that_fetches_ahead_ends_with_its_reader(web, tmp_path):
    reader = reader_of(web, cached(tmp_path))
    before = set(threading.enumerate())
    reader.prefetch([0])
    thread = next(t for t in set(threading.enumerate()) - before if t.name == "shards-ahead")
    del reader
    thread.join(10)
    assert not thread.is_alive()


def test_many_threads_that_want_one_shard_fetch_it_once(local, web, tmp_path):
    web.delay_s = 0.05
    remote, found = cached(tmp_path), []
    first = NodeCache(Storage(web.url, remote))
    waiting = [
        threading.Thread(target=lambda: found.append(NodeCache(Storage(web.url, remote)).read(local.shards[3], 0, 512)))
        for _ in range(4)
    ]
    starter = threading.Thread(target=first.fetch, args=(local.shards[3],))
    starter.start()
    while not files_in(remote, "*.part"):
        time.sleep(0.001)
    for thread in [*waiting]:
        thread.start()
    for thread in [starter, *waiting]:
        thread.join(20)
    assert len(found) == 4
    assert web.count("train-00003.tar") == 1


def test_the_part_file_of_a_process_that_died_holds_nobody_up_and_goes_in_time(local, web, tmp_path):
    remote = cached(tmp_path)
    reader = reader_of(web, remote)
    sha256 = local.shards[1].sha256
    dead = Path(remote.cache or "") / f"{sha256}.tar.elsewhere-1-abcdef01.part"
    dead.write_bytes(b"half")
    os.utime(dead, (1, 1))
    began = time.monotonic()
    assert reader.read(1, 0)["__key__"] == b"0000000000000007"
    assert time.monotonic() - began < 5
    assert hashlib.sha256((dead.parent / f"{sha256}.tar").read_bytes()).hexdigest() == sha256
    assert not dead.exists()


def test_shards_are_not_written_to_a_url(capsys):
    from launch.cli import main

    for command in (["shards", "out=s3://bucket/x"], ["shards", "index", "out=s3://bucket/x"]):
        assert main(command) == 2
        assert "out: 's3://bucket/x' is a URL; shards are written to a local folder" in capsys.readouterr().err
