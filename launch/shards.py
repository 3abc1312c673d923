"""`dermfm shards`: pack records and their notes into WebDataset shards. A second run packs only what is missing.

dermfm shards            write `out`/train-00000.tar, .idx, …, rows.parquet and manifest.json
dermfm shards add-notes  a new generation of shards in `out` with further notes; images are copied, not encoded
dermfm shards verify     check sizes, sha256, indexes and every image of the folder `out`
dermfm shards index      write index and manifest of a folder `out` of WebDataset tars from elsewhere
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from dermfm.add_notes import AddNotesConfig, add_notes
from dermfm.config import InputError, key
from dermfm.pack import pack, verify
from dermfm.pack_plan import ShardsConfig, check_inputs
from dermfm.progress import track
from shards.foreign import index_folder
from shards.manifest import Manifest
from shards.storage import check_local


@dataclass(kw_only=True)
class VerifyConfig:
    """Which shards `dermfm shards verify` reads."""

    out: str = key("shards", "the folder, or address, that holds manifest.json")


@dataclass(kw_only=True)
class IndexConfig:
    """Which tars `dermfm shards index` reads, and to which split they belong."""

    out: str = key("shards", "the folder that holds the tars; indexes and manifest.json are written into it")
    splits: dict[str, str] = key(
        {"train*": "train", "val*": "valid", "test*": "test"}, "file name pattern: split, the first that fits"
    )


SCHEMAS: dict[str | None, type] = {
    None: ShardsConfig,
    "add-notes": AddNotesConfig,
    "verify": VerifyConfig,
    "index": IndexConfig,
}


def schema(call: Any) -> type:
    """The configuration of the verb."""
    return SCHEMAS[call.verb]


def check(config: ShardsConfig, _: int) -> None:
    """What packing would refuse at its start, for `submit`."""
    check_inputs(config)


def run(config: Any, call: Any) -> int:
    """0 when packed, or when all shards are sound; InputError names the first fault."""
    jobs: dict[str | None, Callable[..., Any]] = {
        None: pack,
        "add-notes": add_notes,
        "verify": _verify,
        "index": _index,
    }
    jobs[call.verb](config, dry_run=call.dry_run)
    return 0


def _verify(config: VerifyConfig, dry_run: bool) -> None:
    manifest = Manifest.load(config.out)
    num_bytes = sum(s.num_bytes for s in manifest.shards)
    print(f"{config.out}: {len(manifest.shards)} shards, {num_bytes / 1e6:.1f} MB, {manifest.fingerprint}")
    faults = [] if dry_run else verify(config.out)
    if faults:
        print("\n".join(faults))
        raise InputError(f"{faults[0]} ({len(faults)} of {len(manifest.shards)} shards are not sound)")
    if not dry_run:
        print(f"{config.out}: all {len(manifest.shards)} shards are sound")


def _index(config: IndexConfig, dry_run: bool) -> None:
    check_local(config.out, "out")
    tars = sorted(Path(config.out).glob("*.tar"))
    print(f"{config.out}: {len(tars)} tars, {sum(t.stat().st_size for t in tars) / 1e6:.1f} MB")
    if dry_run:
        return
    shards = list(track(index_folder(config.out, lambda name: _split_of(config, name)), len(tars), "index", "shards"))
    print(f"{config.out}: {sum(s.num_samples for s in shards)} samples in {len(shards)} shards are indexed")


def _split_of(config: IndexConfig, name: str) -> str:
    for pattern, split in config.splits.items():
        if fnmatch(name, pattern):
            return split
    raise InputError(
        f"{config.out}/{name}: no pattern of splits fits ({', '.join(config.splits)}); give splits.'*'=train"
    )
