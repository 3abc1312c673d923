"""Bytes of one sample by shard and row: one `pread` a sample, files opened lazily in each process."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from shards.index import BLOCK, Member, ShardError, ShardIndex, index_path
from shards.manifest import ShardInfo

T = TypeVar("T")
MAX_OPEN = 256  # shards whose tar and index a process keeps open


class ShardReader:
    """Random access to the samples of shards. Pickles without open files; safe to use after a fork."""

    def __init__(self, folder: str | Path, shards: Sequence[ShardInfo]) -> None:
        self.folder = str(folder)
        self.shards = list(shards)
        self._forget()

    @property
    def shard_sizes(self) -> list[int]:
        """Samples of each shard, as SampleOrder wants them."""
        return [s.num_samples for s in self.shards]

    def read(self, shard: int, row: int) -> dict[str, bytes]:
        """One sample: extension → bytes, and "__key__" → the key's bytes.

        Raises ShardError naming shard and row where the tar is shorter than its index says or the two do not belong
        together, and OSError where the file cannot be read.
        """
        if self._pid != os.getpid():
            self._forget()
        members = self.members(shard, row)
        start = members[0].offset - BLOCK
        size = members[-1].offset + members[-1].size - start
        data = self._pread(shard, start, size)
        if len(data) != size:
            name = self.shards[shard].name
            raise ShardError(f"{name}: sample {members[0].key} (row {row}) lies beyond its end; the tar is truncated")
        sample = {"__key__": members[0].key.encode()}
        for member in members:
            begin = member.offset - start
            self._check_header(data[begin - BLOCK : begin], member, shard, row)
            sample[member.extension.lower()] = data[begin : begin + member.size]
        return sample

    def key(self, shard: int, row: int) -> str:
        """The key of a sample, from the index alone."""
        return self.members(shard, row)[0].key

    def members(self, shard: int, row: int) -> list[Member]:
        """The members of a sample, from the index."""
        index = _cached(self._indexes, shard, lambda: self._open_index(shard))
        return index[row]

    def _open_index(self, shard: int) -> ShardIndex:
        info = self.shards[shard]
        index = ShardIndex(index_path(Path(self.folder) / info.name))
        if len(index) != info.num_samples:
            raise ShardError(f"{index.path}: lists {len(index)} samples, the manifest says {info.num_samples}")
        return index

    def _pread(self, shard: int, start: int, size: int) -> bytes:
        # the local reference keeps the file open for this call even if another thread pushes it out of the cache
        file = _cached(self._files, shard, lambda: self._open_tar(shard))
        return os.pread(file.fileno(), size, start)

    def _open_tar(self, shard: int) -> BinaryIO:
        return (Path(self.folder) / self.shards[shard].name).open("rb", buffering=0)

    def _check_header(self, header: bytes, member: Member, shard: int, row: int) -> None:
        """The block before a member must be the tar header of a file of this size: a wrong index shows here."""
        digits = header[124:135]
        if not digits.isdigit() or int(digits, 8) != member.size or header[257:262] != b"ustar":
            name = self.shards[shard].name
            raise ShardError(f"{name}: index and tar differ at {member.name} (row {row}); see `dermfm shards verify`")

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._files: OrderedDict[int, BinaryIO] = OrderedDict()
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "shards": self.shards}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.folder, self.shards = state["folder"], state["shards"]
        self._forget()


def _cached(known: OrderedDict[int, T], name: int, compute: Callable[[], T]) -> T:
    found = known.get(name)
    if found is None:
        found = known[name] = compute()
        if len(known) > MAX_OPEN:
            known.popitem(last=False)
    return found
