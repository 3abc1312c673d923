"""`manifest.json` of a folder of shards: which tars there are, what they hold, and a fingerprint of all of it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from shards.cache import check_cache, download
from shards.files import file_sha256, write_text
from shards.index import BLOCK, ShardError, ShardIndex, index_path, index_text, scan_tar
from shards.storage import Remote, Storage, is_remote

__all__ = ["FILE_NAME", "Manifest", "ShardError", "ShardInfo", "fingerprint_of", "read_manifest", "write_manifest"]

FILE_NAME = "manifest.json"
FORMAT = "dermfm-shards-1"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class ShardInfo:
    """One tar: its file name, split, and content. `sha256` is that of the tar's bytes."""

    name: str
    split: str
    num_samples: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The shards of a folder or URL. `about` holds what the writer noted: inputs, settings, skipped samples."""

    folder: str
    shards: list[ShardInfo]
    fingerprint: str
    about: dict[str, Any] = field(default_factory=dict)
    remote: Remote = field(default_factory=Remote, compare=False)

    @staticmethod
    def load(folder: str | Path, remote: Remote | None = None) -> Manifest:
        """Read `folder`/manifest.json and see that every tar and index is there with its right size.

        `folder` may be a URL, which `remote` says how to read. Raises ShardError naming the file: none or broken,
        edited by hand, a shard missing or of another size.
        """
        manifest = read_manifest(folder, remote)
        if is_remote(manifest.folder):
            _check_remote(manifest)
        else:
            for shard in manifest.shards:
                _check_files(manifest.path(shard), shard)
        return manifest

    def path(self, shard: ShardInfo) -> Path:
        """Where the tar of `shard` lies in a local folder."""
        return Path(self.folder) / shard.name

    def file(self, name: str) -> bytes:
        """A small file beside the manifest, local or remote; ShardError where it is missing."""
        if is_remote(self.folder):
            return Storage(self.folder, self.remote).read(name)
        path = Path(self.folder) / name
        if not path.is_file():
            raise ShardError(f"{path}: no such file; `dermfm shards` writes it beside the manifest")
        return path.read_bytes()

    def split(self, name: str) -> list[ShardInfo]:
        """The shards of one split, in order; ShardError where it is empty."""
        found = [s for s in self.shards if s.split == name]
        if not sum(s.num_samples for s in found):
            splits = ", ".join(sorted({s.split for s in self.shards})) or "none"
            raise ShardError(f"{self.folder}: the split '{name}' holds no sample; splits with samples: {splits}")
        return found

    def check_indexes(self, split: str) -> None:
        """ShardError where a local index of the split is damaged: reads all of it. Remote ones are read by `load`."""
        if not is_remote(self.folder):
            for shard in self.split(split):
                ShardIndex(index_path(self.path(shard)))

    def read_rows(self, split: str) -> dict[str, list[Any]]:
        """Columns of rows.parquet for one split, in manifest order: shard, row, record_id, dataset, label, group_id."""
        import pyarrow.parquet as pq

        rows = pq.read_table(io.BytesIO(self.file("rows.parquet")))
        names = {s.name: i for i, s in enumerate(self.split(split))}
        columns = rows.to_pydict()
        order = sorted(
            (i for i, name in enumerate(columns["shard"]) if name in names),
            key=lambda i: (names[columns["shard"][i]], columns["row"][i]),
        )
        if len(order) != sum(s.num_samples for s in self.split(split)):
            where = f"{self.folder}/rows.parquet"
            raise ShardError(f"{where}: lists {len(order)} samples of '{split}'; the manifest has another number")
        return {name: [values[i] for i in order] for name, values in columns.items()}

    def verify(self, check_sample: Callable[[dict[str, bytes]], None] | None = None) -> None:
        """Read everything; ShardError at the first problem. `check_sample` may raise ValueError for a sample."""
        for problem in self.problems(check_sample):
            raise ShardError(problem)

    def problems(self, check_sample: Callable[[dict[str, bytes]], None] | None = None) -> Iterator[str]:
        """One line for each shard that is not what the manifest says, naming the first fault and sample."""
        for shard in self.shards:
            if fault := self.fault(shard, check_sample):
                yield fault

    def fault(self, shard: ShardInfo, check_sample: Callable[[dict[str, bytes]], None] | None = None) -> str | None:
        """The first thing wrong with one shard, as a line; None where all is well."""
        try:
            with self._local(shard) as path:
                fault = _fault(path, shard, check_sample)
                return fault and fault.replace(f"{path.parent}/", f"{self.folder.rstrip('/')}/")
        except ShardError as error:
            return str(error)

    @contextlib.contextmanager
    def _local(self, shard: ShardInfo) -> Iterator[Path]:
        """A shard and its index as local files, for as long as the context lasts."""
        if not is_remote(self.folder):
            yield self.path(shard)
            return
        with tempfile.TemporaryDirectory(prefix="dermfm-") as folder:
            path = Path(folder) / shard.name
            with open(path, "wb") as file:
                download(Storage(self.folder, self.remote), shard, file)
            index_path(path).write_bytes(self.file(index_path(shard.name).name))
            yield path


def _fault(path: Path, shard: ShardInfo, check_sample: Callable[[dict[str, bytes]], None] | None) -> str | None:
    try:
        _check_files(path, shard)
        found = scan_tar(path)
        if len(found) != shard.num_samples:
            return f"{path}: holds {len(found)} samples; the manifest says {shard.num_samples}"
        _check_index(path, index_text(found))
        if check_sample is not None:
            _check_samples(path, check_sample)
        if file_sha256(path) != shard.sha256:
            return f"{path}: its bytes are not those that were written (sha256 differs); pack or copy it anew"
    except ShardError as error:
        return str(error)
    return None


def read_manifest(folder: str | Path, remote: Remote | None = None) -> Manifest:
    """manifest.json as it is written, without a look at the shards; ShardError where it is none."""
    remote = remote or Remote()
    path = f"{str(folder).rstrip('/')}/{FILE_NAME}"
    values = _parse(path, Storage(str(folder), remote).read(FILE_NAME)) if is_remote(folder) else _read_json(Path(path))
    try:
        shards = [ShardInfo(**shard) for shard in values["shards"]]
        given = str(values["fingerprint"])
    except (KeyError, TypeError) as error:
        raise ShardError(f"{path}: not a manifest of shards (at {error})") from error
    if fingerprint_of(shards) != given:
        raise ShardError(f"{path}: its fingerprint is not that of the shards it lists; it was changed by hand")
    about = {name: value for name, value in values.items() if name not in ("format", "shards", "fingerprint")}
    return Manifest(str(folder), shards, given, about, remote)


def fingerprint_of(shards: Sequence[ShardInfo]) -> str:
    """16 hex digits that change with any byte, name or split of the shards."""
    content = [[s.name, s.split, s.num_samples, s.sha256] for s in shards]
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()[:16]


def write_manifest(folder: str | Path, shards: Sequence[ShardInfo], about: dict[str, Any]) -> Manifest:
    """Write manifest.json through a temporary name."""
    fingerprint = fingerprint_of(shards)
    content = {"format": FORMAT, **about, "fingerprint": fingerprint, "shards": [asdict(s) for s in shards]}
    write_text(Path(folder) / FILE_NAME, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return Manifest(str(folder), list(shards), fingerprint, about)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return _parse(str(path), path.read_bytes())
    except FileNotFoundError:
        folder = path.parent
        hint = "it holds no finished shards" if folder.is_dir() else "the folder does not exist"
        raise ShardError(f"{path}: no such manifest; {hint}. `dermfm shards` writes it last") from None
    except OSError as error:
        raise ShardError(f"{path}: cannot be read as a manifest ({error})") from error


def _parse(path: str, data: bytes) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except ValueError as error:
        raise ShardError(f"{path}: cannot be read as a manifest ({error})") from error
    if not isinstance(values, dict):
        raise ShardError(f"{path}: not a manifest of shards")
    return values


def _check_remote(manifest: Manifest) -> None:
    """Sizes of all shards, that their indexes are there, and that the cache can hold them."""
    check_cache(manifest.remote, manifest.shards)
    storage = Storage(manifest.folder, manifest.remote)
    names = [shard.name for shard in manifest.shards]
    sizes = storage.sizes([*names, *(index_path(name).name for name in names)])
    for shard, size in zip(manifest.shards, sizes, strict=False):
        if size not in (None, shard.num_bytes):
            _wrong_size(storage.url(shard.name), size or 0, shard)


def _check_files(path: Path, shard: ShardInfo) -> None:
    for file, remedy in ((path, "copy it anew or pack again"), (index_path(path), "`dermfm shards index` writes it")):
        if not file.is_file():
            raise ShardError(f"{file}: missing, though the manifest lists {shard.name}; {remedy}")
    size = path.stat().st_size
    if size != shard.num_bytes:
        _wrong_size(str(path), size, shard)
    with open(index_path(path), "rb") as index:
        head = index.readline(64).decode("utf-8", errors="replace").split()
    if head[1:] != [str(shard.num_samples)]:
        listed = head[1] if len(head) > 1 else "no"
        raise ShardError(f"{index_path(path)}: lists {listed} samples, the manifest says {shard.num_samples}")


def _wrong_size(where: str, size: int, shard: ShardInfo) -> NoReturn:
    verb = "is truncated, or the manifest that of other shards" if size < shard.num_bytes else "is another file"
    raise ShardError(f"{where}: has {size} bytes, the manifest says {shard.num_bytes}: it {verb}; copy it anew")


def _check_index(path: Path, expected: str) -> None:
    text = index_path(path).read_bytes().decode("utf-8", errors="replace")
    if text != expected:
        lines = enumerate(zip(text.split("\n"), expected.split("\n"), strict=False))
        line = next((i for i, (a, b) in lines if a != b), min(text.count("\n"), expected.count("\n")))
        raise ShardError(f"{index_path(path)}: line {line + 1} does not match the tar; `dermfm shards index` mends it")


def _check_samples(path: Path, check_sample: Callable[[dict[str, bytes]], None]) -> None:
    index = ShardIndex(index_path(path))
    with open(path, "rb") as file:
        for row in range(len(index)):
            members = index[row]
            first = members[0].offset - BLOCK
            file.seek(first)
            data = file.read(members[-1].offset + members[-1].size - first)
            sample = {m.extension: data[m.offset - first : m.offset - first + m.size] for m in members}
            try:
                check_sample({"__key__": members[0].key.encode(), **sample})
            except (ValueError, KeyError, OSError) as error:
                raise ShardError(f"{path}: sample {members[0].key} (row {row}) is not sound: {error}") from error
