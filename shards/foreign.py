"""Index and manifest for tars that another program wrote, or for our own where an index was lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from shards.files import file_sha256
from shards.index import Member, ShardError, index_path, scan_tar, write_index
from shards.manifest import FILE_NAME, Manifest, ShardInfo, read_manifest, write_manifest


def index_folder(folder: str | Path, split_of: Callable[[str], str]) -> Iterator[ShardInfo]:
    """Write `.idx` of every tar in `folder` and then manifest.json; yields each shard when it is indexed.

    `split_of`: file name → split, for tars that no manifest names yet. Raises ShardError for a folder without tars,
    a damaged tar, a key that occurs twice in the folder, and a tar that differs from what an existing manifest says.
    """
    folder = Path(folder)
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise ShardError(f"{folder}: holds no .tar file to index")
    known, about = _known(folder)
    shards: list[ShardInfo] = []
    home: dict[str, str] = {}
    for tar in tars:
        samples = scan_tar(tar)
        _check_keys(tar, samples, home)
        split = known[tar.name].split if tar.name in known else split_of(tar.name)
        info = ShardInfo(tar.name, split, len(samples), tar.stat().st_size, file_sha256(tar))
        if known and known.get(tar.name) != info:
            raise ShardError(f"{tar}: is not the shard that manifest.json names so; remove one of the two")
        write_index(index_path(tar), samples)
        shards.append(info)
        yield info
    missing = sorted(set(known) - {s.name for s in shards})
    if missing:
        raise ShardError(f"{folder / missing[0]}: missing, though the manifest lists it; copy it anew or pack again")
    if known:
        order = list(known)
        shards.sort(key=lambda s: order.index(s.name))
    write_manifest(folder, shards, about or {"foreign": True})


def _known(folder: Path) -> tuple[dict[str, ShardInfo], dict[str, object]]:
    if not (folder / FILE_NAME).is_file():
        return {}, {}
    manifest: Manifest = read_manifest(folder)
    return {s.name: s for s in manifest.shards}, manifest.about


def _check_keys(tar: Path, samples: list[list[Member]], home: dict[str, str]) -> None:
    for sample in samples:
        key = sample[0].key
        if key in home:
            raise ShardError(f"{tar}: key '{key}' is also in {home[key]}; keys must be unique over all shards")
        home[key] = tar.name
