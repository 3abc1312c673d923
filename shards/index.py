"""The `.idx` file of a tar: where every sample's bytes lie, in the text format of DALI's wds2idx v1.2.

The first line is `v1.2 <samples>`; each further line holds one sample as `extension offset size name` for each of its
members, separated by blanks. A sample is a run of members with one key: the name up to the first dot of its last part.
"""

from __future__ import annotations

import mmap
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shards.files import write_text

VERSION = "v1.2"
BLOCK = tarfile.BLOCKSIZE  # 512 bytes: a tar header, and what members are padded to


class ShardError(ValueError):
    """A shard, index or manifest cannot be used; one line that names it."""


class Member(NamedTuple):
    """One file of a sample inside a tar: `size` bytes from byte `offset`; its header is the 512 bytes before."""

    extension: str
    offset: int
    size: int
    name: str

    @property
    def key(self) -> str:
        """The sample's key: the name without the extension."""
        return self.name[: -len(self.extension) - 1]


def split_name(name: str) -> tuple[str, str]:
    """('folder/key', 'extension') of a member name, cut at the first dot of its last part as webdataset does."""
    folder, _, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension


def scan_tar(path: str | Path) -> list[list[Member]]:
    """All samples of a tar, in order, from its headers alone.

    Raises ShardError for a file that is no tar or ends too early, for a key that occurs twice, and for member names
    that would leave the folder they are unpacked in.
    """
    samples: list[list[Member]] = []
    seen: set[str] = set()
    for member in _regular_members(Path(path)):
        if samples and samples[-1][0].key == member.key:
            if any(m.extension == member.extension for m in samples[-1]):
                raise ShardError(f"{path}: '{member.name}' occurs twice; keys must be unique in a shard")
            samples[-1].append(member)
            continue
        if member.key in seen:
            raise ShardError(f"{path}: key '{member.key}' occurs twice; keys must be unique and their members adjacent")
        seen.add(member.key)
        samples.append([member])
    if not samples:
        raise ShardError(f"{path}: holds no sample")
    return samples


def _regular_members(path: Path) -> Iterator[Member]:
    """Every regular member with an extension. Folders and hidden files are passed over, as DALI does."""
    try:
        with tarfile.open(path, "r:") as tar:
            end, last = 0, ""
            for info in tar:
                _check_name(path, info)
                last = info.name
                end = info.offset_data + (-(-info.size // BLOCK) * BLOCK if info.isreg() else 0)
                key, extension = split_name(info.name)
                if info.isreg() and extension and not key.endswith("/") and key:
                    yield Member(extension, info.offset_data, info.size, info.name)
            _check_end(path, end, last)
    except FileNotFoundError:
        raise ShardError(f"{path}: no such shard") from None
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ShardError(f"{path}: cannot be read as a tar ({error}); truncated or not a plain tar?") from error


def _check_name(path: Path, info: tarfile.TarInfo) -> None:
    parts = info.name.split("/")
    if info.name.startswith("/") or ".." in parts:
        raise ShardError(f"{path}: member '{info.name}' points out of its folder; such tars are refused")
    if not (info.isreg() or info.isdir()):
        raise ShardError(f"{path}: member '{info.name}' is a link or device; only plain files belong into a shard")
    if info.isreg() and any(c.isspace() for c in info.name):
        raise ShardError(f"{path}: member '{info.name}' has a blank in its name, which an index cannot hold")


def _check_end(path: Path, end: int, last: str) -> None:
    """A complete tar closes with two blocks of zeros; without them a cut at a member's border would go unseen, and so
    would a damaged header, at which tarfile stops as if the tar ended there."""
    with open(path, "rb") as file:
        file.seek(end)
        mark = file.read(2 * BLOCK)
    if mark == bytes(2 * BLOCK):
        return
    where = f"after '{last}' (byte {end})" if last else "at its beginning"
    if len(mark) < 2 * BLOCK:
        raise ShardError(f"{path}: ends {where} without the mark that closes a tar; it is truncated")
    raise ShardError(f"{path}: the header {where} is damaged; copy it anew or pack again")


def index_path(tar: str | Path) -> Path:
    """`train-00042.idx` of `train-00042.tar`."""
    return Path(tar).with_suffix(".idx")


def index_text(samples: list[list[Member]]) -> str:
    """The text of an index file."""
    lines = [" ".join(f"{m.extension} {m.offset} {m.size} {m.name}" for m in sample) for sample in samples]
    return "\n".join([f"{VERSION} {len(samples)}", *lines]) + "\n"


def write_index(path: str | Path, samples: list[list[Member]]) -> None:
    """Write an index file under a temporary name and rename it into place."""
    write_text(path, index_text(samples))


class ShardIndex:
    """Samples of one `.idx` file by row. The file is mapped, not parsed: a line is read when its row is asked for.

    So the memory of many workers over millions of samples is the page cache's, plus 8 bytes a sample.
    """

    def __init__(self, path: str | Path, data: bytes | None = None) -> None:
        """Open `path`, or use `data` as the file's content (then `path` only names it in messages)."""
        self.path = str(path)
        self._data = _map_file(self.path) if data is None else data
        ends = np.flatnonzero(np.frombuffer(self._data, dtype=np.uint8) == ord("\n"))
        self._starts = np.concatenate([[0], ends + 1])
        version, _, count = self._line(0).partition(" ")
        if version != VERSION or not count.isdigit():
            raise ShardError(f"{path}: not an index of format {VERSION} (it begins with '{version[:20]}')")
        if len(ends) - 1 != int(count):
            raise ShardError(f"{path}: promises {count} samples and lists {len(ends) - 1}; it is truncated")

    def __len__(self) -> int:
        return len(self._starts) - 2

    def __getitem__(self, row: int) -> list[Member]:
        """The members of sample `row`; ShardError where the line is not whole."""
        if not 0 <= row < len(self):
            raise ShardError(f"{self.path}: has no row {row}; it lists {len(self)} samples")
        words = self._line(row + 1).split(" ")
        try:
            fields = zip(words[0::4], words[1::4], words[2::4], words[3::4], strict=True)
            return [Member(e, int(offset), int(size), name) for e, offset, size, name in fields]
        except ValueError as error:
            raise ShardError(f"{self.path}: line {row + 2} is not 'extension offset size name …'") from error

    def content(self) -> bytes:
        """The whole file."""
        return bytes(self._data)

    def _line(self, number: int) -> str:
        start, end = int(self._starts[number]), int(self._starts[number + 1]) - 1
        return bytes(self._data[start:end]).decode("utf-8", errors="replace")


def _map_file(path: str) -> bytes | mmap.mmap:
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise ShardError(f"{path}: is empty; `dermfm shards index` writes it anew")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise ShardError(f"{path}: no such index; `dermfm shards index` writes it") from None
