"""Bytes of one sample by shard and row, from a local folder or a URL: one read a sample, opened lazily by a process."""

from __future__ import annotations

import functools
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

from shards.cache import NodeCache, check_cache, remote_index
from shards.index import BLOCK, Member, ShardError, ShardIndex, index_path
from shards.manifest import ShardInfo
from shards.storage import REQUESTS, Remote, Storage, is_remote

T = TypeVar("T")
MAX_OPEN = 256  # shards whose tar and index a process keeps open


class Source(Protocol):
    """Where bytes and indexes of shards come from. `concurrent`: several samples should be asked for at a time."""

    concurrent: bool

    def read(self, shard: ShardInfo, start: int, size: int) -> bytes:
        """`size` bytes of the tar from `start`; fewer where it ends before."""
        ...

    def index(self, shard: ShardInfo) -> ShardIndex:
        """The index of a shard, with as many samples as the manifest says."""
        ...

    def prefetch(self, shards: Sequence[ShardInfo]) -> None:
        """These shards will be read next, in this order."""
        ...


class LocalFiles:
    """Shards in a local folder: files are kept open and read at an offset."""

    concurrent = False

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self._files: OrderedDict[str, BinaryIO] = OrderedDict()

    def read(self, shard: ShardInfo, start: int, size: int) -> bytes:
        """One `pread`. The local reference keeps the file open even if another thread pushes it out of the cache."""
        file = _cached(self._files, shard.name, lambda: (self.folder / shard.name).open("rb", buffering=0))
        return os.pread(file.fileno(), size, start)

    def index(self, shard: ShardInfo) -> ShardIndex:
        """The `.idx` file, mapped."""
        index = ShardIndex(index_path(self.folder / shard.name))
        if len(index) != shard.num_samples:
            raise ShardError(f"{index.path}: lists {len(index)} samples, the manifest says {shard.num_samples}")
        return index

    def prefetch(self, shards: Sequence[ShardInfo]) -> None:
        """Nothing to do: the operating system reads ahead."""


class ByteRanges:
    """Shards at a URL, of which only the bytes of single samples are read; indexes are held in memory."""

    concurrent = True

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def read(self, shard: ShardInfo, start: int, size: int) -> bytes:
        """One request."""
        size = max(0, min(size, shard.num_bytes - start))
        return self.storage.read_range(shard.name, start, size, shard.num_bytes)[:size] if size else b""

    def index(self, shard: ShardInfo) -> ShardIndex:
        """One request, once a shard."""
        return remote_index(self.storage, shard)

    def prefetch(self, shards: Sequence[ShardInfo]) -> None:
        """Nothing to do: `ShardReader.reads` asks for the samples of a batch together."""


class ShardReader:
    """Random access to the samples of shards. Pickles without open files; safe to use after a fork."""

    _pid: int
    _source: Source | None
    _pool: ThreadPoolExecutor | None
    _indexes: OrderedDict[int, ShardIndex]

    def __init__(self, folder: str | Path, shards: Sequence[ShardInfo], remote: Remote | None = None) -> None:
        """`folder`: a local one, or a URL that `remote` says how to read. ShardError for an impossible cache."""
        self.folder = str(folder)
        self.shards = list(shards)
        self.remote = remote or Remote()
        if is_remote(self.folder):
            check_cache(self.remote, self.shards)
        self._forget()

    @property
    def shard_sizes(self) -> list[int]:
        """Samples of each shard, as SampleOrder wants them."""
        return [s.num_samples for s in self.shards]

    @property
    def wants_prefetch(self) -> bool:
        """Whether it helps to say which shards come next."""
        return is_remote(self.folder) and self.remote.cache is not None

    def prefetch(self, shards: Sequence[int]) -> None:
        """Shards that will be read next, in this order; those of earlier calls are forgotten."""
        self._own_source().prefetch([self.shards[s] for s in shards])

    def read(self, shard: int, row: int) -> dict[str, bytes]:
        """One sample: extension → bytes, and "__key__" → the key's bytes.

        Raises ShardError naming shard and row where the tar is shorter than its index says or the two do not belong
        together, OSError where a local file cannot be read, and StorageError where a remote one cannot.
        """
        members = self.members(shard, row)
        start = members[0].offset - BLOCK
        size = members[-1].offset + members[-1].size - start
        data = self._own_source().read(self.shards[shard], start, size)
        if len(data) != size:
            name = self.shards[shard].name
            raise ShardError(f"{name}: sample {members[0].key} (row {row}) lies beyond its end; the tar is truncated")
        sample = {"__key__": members[0].key.encode()}
        for member in members:
            begin = member.offset - start
            self._check_header(data[begin - BLOCK : begin], member, shard, row)
            sample[member.extension.lower()] = data[begin : begin + member.size]
        return sample

    def reads(self, places: Sequence[tuple[int, int]]) -> Iterator[Callable[[], dict[str, bytes]]]:
        """For each (shard, row), a call that gives what `read` gives. Of byte ranges, many are asked for at a time."""
        if not self._own_source().concurrent:
            yield from (functools.partial(self.read, shard, row) for shard, row in places)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(REQUESTS, thread_name_prefix="samples")
        unknown = {s for s, _ in places} - set(self._indexes)
        for index in [self._pool.submit(self._index, s) for s in sorted(unknown)]:
            index.exception()  # whoever reads a sample of this shard meets the fault again
        yield from [self._pool.submit(self.read, shard, row).result for shard, row in places]

    def key(self, shard: int, row: int) -> str:
        """The key of a sample, from the index alone."""
        return self.members(shard, row)[0].key

    def members(self, shard: int, row: int) -> list[Member]:
        """The members of a sample, from the index."""
        return self._index(shard)[row]

    def _index(self, shard: int) -> ShardIndex:
        source = self._own_source()
        return _cached(self._indexes, shard, lambda: source.index(self.shards[shard]))

    def _own_source(self) -> Source:
        """Where the bytes come from, opened by this process."""
        if self._pid != os.getpid():
            self._forget()
        if self._source is None:
            self._source = _open_source(self.folder, self.remote)
        return self._source

    def _check_header(self, header: bytes, member: Member, shard: int, row: int) -> None:
        """The block before a member must be the tar header of a file of this size: a wrong index shows here."""
        digits = header[124:135]
        if not digits.isdigit() or int(digits, 8) != member.size or header[257:262] != b"ustar":
            name = self.shards[shard].name
            raise ShardError(f"{name}: index and tar differ at {member.name} (row {row}); see `dermfm shards verify`")

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._source, self._pool = None, None
        self._indexes = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "shards": self.shards, "remote": self.remote}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.folder, self.shards, self.remote = state["folder"], state["shards"], state["remote"]
        self._forget()


def _open_source(folder: str, remote: Remote) -> Source:
    if not is_remote(folder):
        return LocalFiles(folder)
    storage = Storage(folder, remote)
    return NodeCache(storage) if remote.cache is not None else ByteRanges(storage)


def _cached(known: OrderedDict[Any, T], name: Any, compute: Callable[[], T]) -> T:
    found = known.get(name)
    if found is None:
        found = known[name] = compute()
        if len(known) > MAX_OPEN:
            known.popitem(last=False)
    return found
