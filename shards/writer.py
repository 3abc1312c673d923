"""Deterministic WebDataset tars: the same samples give the same bytes, on any machine and at any time."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from webdataset.writer import TarWriter

from shards.index import ShardError, index_path, scan_tar, write_index
from shards.manifest import ShardInfo

_OWNER = "dermfm"
MAX_NAME = 100  # bytes that a plain tar header holds; longer names would need extended headers


class _HashingFile(io.RawIOBase):
    """Hashes what is written through it, so that a shard need not be read again."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.num_bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.digest.update(data)
        self.num_bytes += len(data)
        return self._file.write(data)


def write_shard(folder: str | Path, name: str, split: str, samples: Iterable[dict[str, str | bytes]]) -> ShardInfo:
    """Write `folder`/`name` (a .tar) and its index; a sample maps "__key__" to its key and extensions to bytes.

    Both files appear under their names only when complete, the index last: where the index is, the shard is whole.
    Raises ShardError for a duplicate or impossible key or no sample at all.
    """
    path = Path(folder) / name
    temporary = Path(f"{path}.tmp")
    with open(temporary, "wb") as file:
        hashing = _HashingFile(file)
        with TarWriter(hashing, user=_OWNER, group=_OWNER, mode=0o444, encoder=False, mtime=0, compress=False) as tar:
            for sample in samples:
                _check_names(path, sample)
                tar.write(sample)
        file.flush()
        os.fsync(file.fileno())
    members = scan_tar(temporary)
    index_path(path).unlink(missing_ok=True)
    os.replace(temporary, path)
    write_index(index_path(path), members)
    return ShardInfo(name, split, len(members), hashing.num_bytes, hashing.digest.hexdigest())


def _check_names(path: Path, sample: dict[str, str | bytes]) -> None:
    key = str(sample["__key__"])
    longest = max((len(f"{key}.{extension}".encode()) for extension in sample if extension != "__key__"), default=0)
    if not key or "." in key.rpartition("/")[2] or any(c.isspace() for c in key) or longest > MAX_NAME:
        raise ShardError(f"{path}: '{key}' cannot be a sample's key (no dots or blanks, at most {MAX_NAME} bytes)")
    if longest == 0:
        raise ShardError(f"{path}: sample '{key}' has no member")
