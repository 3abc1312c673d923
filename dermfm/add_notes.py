"""A new generation of shards: the same images, byte for byte, with further notes. No image is decoded or encoded."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dermfm.config import InputError, canonical_json, key
from dermfm.notes.store import read_notes
from dermfm.pack import DONE, ROWS
from dermfm.pack_plan import NOTE_FIELDS, PLAN, table_hash
from dermfm.progress import Meter
from dermfm.storage import CacheConfig, remote
from shards.files import write_text
from shards.index import index_path
from shards.manifest import FILE_NAME, Manifest, ShardInfo, write_manifest
from shards.reader import ShardReader
from shards.storage import check_local, is_remote
from shards.writer import write_shard


@dataclass(kw_only=True)
class AddNotesConfig:
    """Which notes join which shards."""

    shards: str = key("shards", "folder, or address, of the shards whose images and notes are kept")
    notes: str = key("notes", "folder of notes/part-*.parquet; those that a sample has not yet are added to it")
    cache: CacheConfig = key(CacheConfig, "how shards at an address are read")
    out: str = key("shards-2", "folder for the new generation of shards")


def add_notes(config: AddNotesConfig, dry_run: bool = False) -> Manifest | None:
    """Write the new generation shard by shard, only those that are missing; None for a dry run.

    Raises InputError where `out` is the folder itself or holds other shards, or no note belongs to a sample.
    """
    old = Manifest.load(config.shards, remote(config.cache))
    check_local(config.out, "out")
    out = Path(config.out)
    if not is_remote(config.shards) and out.resolve() == Path(config.shards).resolve():
        raise InputError(f"out: {out} is the folder of the shards themselves; a new generation needs another folder")
    notes, identity = _notes_to_add(config, old)
    done = _done(out, old, identity)
    num_notes = sum(map(len, notes.values()))
    print(
        f"{out}: {num_notes} notes of {len(notes)} records may join {len(old.shards)} shards, {len(done)} done before"
    )
    if dry_run:
        return None
    if len(done) == len(old.shards) and (out / FILE_NAME).is_file():
        print(f"{out}: nothing to do")
        return Manifest.load(out)
    (out / DONE).mkdir(parents=True, exist_ok=True)
    write_text(out / PLAN, canonical_json({"identity": identity, "shards": {}}) + "\n")
    reader = ShardReader(config.shards, old.shards, old.remote)
    with Meter(len(old.shards), "add notes", "shards", start=len(done)) as meter:
        for number, shard in enumerate(old.shards):
            if shard.name not in done:
                done[shard.name] = _rewrite(out, reader, number, notes)
                meter.advance()
    return _finish(out, old, identity, done)


def _notes_to_add(config: AddNotesConfig, old: Manifest) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """record_id → its new notes, and the identity of shards and notes."""
    table = read_notes(config.notes).select(["record_id", *NOTE_FIELDS]).sort_by("note_id")
    ids = {i for split in {s.split for s in old.shards} for i in old.read_rows(split)["record_id"]}
    by_record: dict[str, list[dict[str, Any]]] = {}
    for note in table.to_pylist():
        record_id = note.pop("record_id")
        if record_id in ids and note["text"]:
            by_record.setdefault(record_id, []).append(note)
    if not by_record:
        raise InputError(f"{config.notes}: none of its {table.num_rows} notes belongs to a sample of {config.shards}")
    return by_record, {"shards": old.fingerprint, "notes": table_hash(table)}


def _done(out: Path, old: Manifest, identity: dict[str, str]) -> dict[str, tuple[ShardInfo, dict[str, int]]]:
    """Shards of an earlier, stopped run; InputError where the folder holds anything else."""
    remedy = "give another out=, or delete the folder to write it anew"
    if not (out / PLAN).is_file():
        if out.is_dir() and any(out.glob("*.tar")):
            raise InputError(f"{out}: holds other shards; {remedy}")
        return {}
    if json.loads((out / PLAN).read_text(encoding="utf-8")).get("identity") != identity:
        raise InputError(f"{out}: holds shards of another generation or other notes; {remedy}")
    done = {}
    for shard in old.shards:
        note = out / DONE / f"{shard.name}.json"
        if note.is_file():
            values = json.loads(note.read_text(encoding="utf-8"))
            info, tar = ShardInfo(**values["info"]), out / shard.name
            if tar.is_file() and index_path(tar).is_file() and tar.stat().st_size == info.num_bytes:
                done[shard.name] = (info, values["strategies"])
    return done


def _rewrite(
    out: Path, reader: ShardReader, number: int, notes: dict[str, list[dict[str, Any]]]
) -> tuple[ShardInfo, dict[str, int]]:
    """Write one shard with its notes merged; its info and the number of notes by strategy."""
    shard = reader.shards[number]
    strategies: Counter[str] = Counter()
    info = write_shard(out, shard.name, shard.split, _merged(reader, number, notes, strategies))
    values = {"info": asdict(info), "strategies": dict(sorted(strategies.items()))}
    write_text(out / DONE / f"{shard.name}.json", json.dumps(values))
    return info, dict(strategies)


def _merged(
    reader: ShardReader, number: int, notes: dict[str, list[dict[str, Any]]], strategies: Counter[str]
) -> Iterator[dict[str, str | bytes]]:
    for row in range(reader.shards[number].num_samples):
        sample: dict[str, Any] = dict(reader.read(number, row))
        sample["__key__"] = sample["__key__"].decode()
        fields = json.loads(sample["json"])
        known = {note["note_id"] for note in fields["notes"]}
        added = [note for note in notes.get(fields["record_id"], []) if note["note_id"] not in known]
        fields["notes"] = sorted(fields["notes"] + added, key=lambda note: (note["strategy"], note["note_id"]))
        strategies.update(note["strategy"] for note in fields["notes"])
        sample["json"] = canonical_json(fields).encode()
        yield sample


def _finish(
    out: Path, old: Manifest, identity: dict[str, str], done: dict[str, tuple[ShardInfo, dict[str, int]]]
) -> Manifest:
    strategies: Counter[str] = Counter()
    for _, counts in done.values():
        strategies.update(counts)
    (out / f"{ROWS}.tmp").write_bytes(old.file(ROWS))
    (out / f"{ROWS}.tmp").replace(out / ROWS)
    about = {
        **old.about,
        "identity": identity,
        "generation": int(old.about.get("generation", 1)) + 1,
        "strategies": dict(sorted(strategies.items())),
    }
    manifest = write_manifest(out, [done[s.name][0] for s in old.shards], about)
    listed = ", ".join(f"{name} {count}" for name, count in manifest.about["strategies"].items())
    print(f"{out}: generation {about['generation']}, notes: {listed}, fingerprint {manifest.fingerprint}")
    return manifest
