"""Tars are deterministic and plain, and their indexes say what tarfile and webdataset say."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import time

import pytest
import webdataset

from shards.files import file_sha256
from shards.index import ShardError, ShardIndex, index_text, scan_tar, split_name
from shards.writer import write_shard


def samples(count: int) -> list[dict[str, str | bytes]]:
    return [{"__key__": f"key{i}", "jpg": bytes([i]) * (511 + i), "json": b"{}"} for i in range(count)]


def write_tar(path, names, kind=tarfile.REGTYPE):
    with tarfile.open(path, "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size, info.type = (3, kind) if kind == tarfile.REGTYPE else (0, kind)
            tar.addfile(info, io.BytesIO(b"abc"))


def test_packing_twice_gives_the_same_bytes(tmp_path):
    first = write_shard(tmp_path, "a.tar", "train", samples(5))
    time.sleep(1.1)  # tar headers count seconds
    second = write_shard(tmp_path, "b.tar", "train", samples(5))
    assert first.sha256 == second.sha256 == file_sha256(tmp_path / "a.tar")
    assert (tmp_path / "a.idx").read_bytes() == (tmp_path / "b.idx").read_bytes()
    assert first.num_bytes == os.path.getsize(tmp_path / "a.tar")


def test_packing_in_another_process_gives_the_same_bytes(tmp_path, root):
    here = write_shard(tmp_path, "a.tar", "train", samples(3))
    code = (
        "from shards.writer import write_shard\n"
        "samples = [{'__key__': f'key{i}', 'json': b'{}', 'jpg': bytes([i]) * (511 + i)} for i in range(3)]\n"
        f"print(write_shard({str(tmp_path)!r}, 'b.tar', 'train', samples).sha256)"
    )
    environment = {**os.environ, "TZ": "Asia/Tokyo", "USER": "somebody", "PYTHONHASHSEED": "3"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == here.sha256, done.stderr


def test_every_member_is_where_tarfile_says(tmp_path):
    write_shard(tmp_path, "a.tar", "train", samples(4))
    index = ShardIndex(tmp_path / "a.idx")
    listed = [(m.name, m.offset, m.size) for row in range(len(index)) for m in index[row]]
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert listed == [(m.name, m.offset_data, m.size) for m in tar]


def test_webdataset_reads_what_was_written(tmp_path):
    write_shard(tmp_path, "a.tar", "train", samples(4))
    found = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    assert [(f["__key__"], f["jpg"], f["json"]) for f in found] == [
        (s["__key__"], s["jpg"], s["json"]) for s in samples(4)
    ]


def test_the_index_is_in_the_text_format_of_wds2idx(tmp_path):
    write_shard(tmp_path, "a.tar", "train", samples(2))
    assert (tmp_path / "a.idx").read_text() == (
        "v1.2 2\njpg 512 511 key0.jpg json 1536 2 key0.json\njpg 2560 512 key1.jpg json 3584 2 key1.json\n"
    )


def test_nothing_unfinished_has_a_final_name(tmp_path):
    def broken():
        yield from samples(2)
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_shard(tmp_path, "a.tar", "train", broken())
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar.tmp"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a/b.c/key.seg.png", ("a/b.c/key", "seg.png")), ("key.jpg", ("key", "jpg")), ("none", ("none", ""))],
)
def test_a_name_is_cut_at_the_first_dot_of_its_last_part(name, expected):
    assert split_name(name) == expected


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.jpg", "b.jpg", "a.json"], "key 'a' occurs twice"),
        (["a.jpg", "a.jpg"], "'a.jpg' occurs twice"),
        (["../a.jpg"], "points out of its folder"),
        (["x/../../a.jpg"], "points out of its folder"),
        (["/etc/a.jpg"], "points out of its folder"),
        (["a b.jpg"], "blank in its name"),
        ([], "holds no sample"),
    ],
)
def test_foreign_tars_with_tricks_are_refused_by_name(tmp_path, names, message):
    write_tar(tmp_path / "x.tar", names)
    with pytest.raises(ShardError, match=message) as error:
        scan_tar(tmp_path / "x.tar")
    assert "x.tar" in str(error.value)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    write_tar(tmp_path / "x.tar", ["a.jpg"], kind)
    with pytest.raises(ShardError, match="link or device"):
        scan_tar(tmp_path / "x.tar")


def test_hidden_files_and_folders_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("d/.hidden", tarfile.REGTYPE), ("d/a.jpg", tarfile.REGTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
    assert [[m.name for m in s] for s in scan_tar(tmp_path / "x.tar")] == [["d/a.jpg"]]


def test_long_names_with_extended_headers_are_indexed_as_tarfile_says(tmp_path):
    write_tar(tmp_path / "x.tar", ["f" * 150 + "/" + "k" * 120 + ".jpg"])
    with tarfile.open(tmp_path / "x.tar") as tar:
        expected = [(m.name, m.offset_data) for m in tar]
    assert [(m.name, m.offset) for sample in scan_tar(tmp_path / "x.tar") for m in sample] == expected


@pytest.mark.parametrize("keep", [100, 512, 700, 1024, 1536, 2600, 3072, 4096])
def test_a_tar_cut_anywhere_is_refused(tmp_path, keep):
    write_shard(tmp_path, "a.tar", "train", samples(2))
    whole = (tmp_path / "a.tar").read_bytes()
    assert keep <= len(whole) - 1024
    (tmp_path / "a.tar").write_bytes(whole[:keep])
    with pytest.raises(ShardError, match=r"a\.tar"):
        scan_tar(tmp_path / "a.tar")


def test_a_damaged_header_is_named_with_the_sample_before_it_and_is_no_end_of_data(tmp_path):
    write_shard(tmp_path, "a.tar", "train", samples(2))
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[1536 + 512 + 5] ^= 8  # in the header of the second sample
    (tmp_path / "a.tar").write_bytes(bytes(data))
    with pytest.raises(ShardError, match=r"a\.tar: the header after 'key0\.json' \(byte 2048\) is damaged"):
        scan_tar(tmp_path / "a.tar")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("v1.1 1\njpg 512 3\n", "not an index of format v1.2"),
        ("v1.2 2\njpg 512 3 a.jpg\n", "promises 2 samples and lists 1"),
        ("v1.2 1\njpg 512 3 a.jpg", "promises 1 samples and lists 0"),
    ],
)
def test_a_broken_index_is_named_when_it_is_opened(tmp_path, text, message):
    (tmp_path / "a.idx").write_text(text)
    with pytest.raises(ShardError, match=message):
        ShardIndex(tmp_path / "a.idx")


def test_a_broken_line_of_an_index_is_named_when_it_is_read(tmp_path):
    (tmp_path / "a.idx").write_text("v1.2 2\njpg 512 3 a.jpg\njpg 512 x b.jpg\n")
    index = ShardIndex(tmp_path / "a.idx")
    assert index[0][0].name == "a.jpg"
    with pytest.raises(ShardError, match="line 3"):
        index[1]
    with pytest.raises(ShardError, match="no row 2"):
        index[2]


@pytest.mark.parametrize("key", ["", "a.b", "a b", "k" * 200])
def test_a_key_that_cannot_be_stored_is_refused(tmp_path, key):
    with pytest.raises(ShardError, match="cannot be a sample's key"):
        write_shard(tmp_path, "a.tar", "train", [{"__key__": key, "jpg": b"x"}])


def test_index_text_is_what_scanning_the_tar_gives(tmp_path):
    write_shard(tmp_path, "a.tar", "train", samples(3))
    assert index_text(scan_tar(tmp_path / "a.tar")) == (tmp_path / "a.idx").read_text()
