"""Packing: records and their notes become WebDataset shards, one sample an image with all its notes.

A folder of shards belongs to one input (`plan.json` says which). Shards are planned before any is written, each is
packed by itself and leaves `.done/<shard>.json`; a second run packs what is not done. The manifest comes last.
"""

from __future__ import annotations

import fcntl
import io
import itertools
import json
import math
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import simplejpeg
from PIL import Image, ImageOps

from dermfm.config import InputError, canonical_json
from dermfm.pack_plan import NOTE_FIELDS, PLAN, Plan, ShardsConfig, make_plan, settings
from dermfm.progress import Meter
from dermfm.records.table import SPLITS
from shards.files import replacing, write_text
from shards.index import index_path
from shards.manifest import FILE_NAME, Manifest, ShardInfo, write_manifest
from shards.storage import check_local
from shards.writer import write_shard

DONE, ROWS = ".done", "rows.parquet"
MAX_BAD_FRACTION = 0.01
FEW = 2000  # images for which starting worker processes costs more than it saves
ROW_FIELDS = ("record_id", "dataset", "label", "group_id")
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Packed:
    """A shard that is done, as `.done/<shard>.json` keeps it. `info` is None where no image was usable."""

    images: str
    info: ShardInfo | None
    record_ids: list[str]
    skipped: list[dict[str, str]]


def pack(config: ShardsConfig, dry_run: bool = False) -> Manifest | None:
    """Pack what is not packed yet and write the manifest, saying what it does; None for a dry run.

    Raises InputError for inputs that cannot be packed, a folder that holds other shards, and too many bad images.
    """
    check_local(config.out, "out")
    plan = make_plan(config)
    out = Path(config.out)
    done = {name: packed for name in plan.shards if (packed := read_done(out, name, plan.images_of(name)))}
    _describe(config, plan, len(done))
    if dry_run:
        return None
    if len(done) == len(plan.shards) and (out / FILE_NAME).is_file() and (out / ROWS).is_file():
        print(f"{out}: nothing to do, all {len(done)} shards are packed")
        return Manifest.load(out)
    (out / DONE).mkdir(parents=True, exist_ok=True)
    if len(done) < len(plan.shards):
        (out / FILE_NAME).unlink(missing_ok=True)
    counts = {split: sum(name.startswith(f"{split}-") for name in plan.shards) for split in SPLITS}
    write_text(out / PLAN, canonical_json({"identity": plan.identity, "shards": counts}) + "\n")
    done.update(_pack_missing(config, plan, done))
    if config.share != [0, 1]:
        return _finish_last(config, plan)
    return _finish(config, plan, done)


def read_done(out: Path, name: str, images: str) -> Packed | None:
    """What an earlier run packed as `name`; None where it did not finish or the image files have changed since."""
    path = out / DONE / f"{name}.json"
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        info = ShardInfo(**values["info"]) if values["info"] else None
        packed = Packed(values["images"], info, values["record_ids"], values["skipped"])
    except (ValueError, KeyError, TypeError):
        return None  # damaged: the shard counts as not packed
    tar = out / name
    whole = info is None or (tar.is_file() and index_path(tar).is_file() and tar.stat().st_size == info.num_bytes)
    return packed if whole and packed.images == images else None


def encode_image(data: bytes, max_side: int, quality: int) -> tuple[bytes, int, int]:
    """(JPEG bytes, width, height) of an image file; the image is decoded to the last pixel.

    A sound upright JPEG of a size that may stay passes through byte for byte; all else is encoded anew. Raises
    ValueError or OSError for what cannot be decoded.
    """
    with Image.open(io.BytesIO(data)) as image:
        upright = image.getexif().get(_EXIF_ORIENTATION, 1) == 1
        small = not max_side or min(image.size) <= max_side
        if image.format == "JPEG" and image.mode in ("RGB", "L") and upright and small:
            height, width, _ = simplejpeg.decode_jpeg(data, "RGB").shape
            return data, width, height
        image.load()
        fixed = ImageOps.exif_transpose(image).convert("RGB")
    if not small:
        scale = max_side / min(fixed.size)
        fixed = fixed.resize((round(fixed.width * scale), round(fixed.height * scale)), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    fixed.save(encoded, "JPEG", quality=quality)
    return encoded.getvalue(), fixed.width, fixed.height


def pack_shard(config: ShardsConfig, root: Path, name: str, images: str, rows: list[dict[str, Any]]) -> Packed:
    """Pack one shard of `rows` (record fields with `notes`) and note it as done. Runs in a worker process."""
    record_ids: list[str] = []
    skipped: list[dict[str, str]] = []
    samples = _samples(config, root, name, rows, record_ids, skipped)
    first = next(samples, None)
    info = None
    if first is not None:
        info = write_shard(config.out, name, name.split("-")[0], itertools.chain([first], samples))
    packed = Packed(images, info, record_ids, skipped)
    write_text(Path(config.out) / DONE / f"{name}.json", json.dumps(asdict(packed)))
    return packed


def check_sample(sample: dict[str, bytes]) -> None:
    """Raise ValueError unless a packed sample's image decodes and its fields and notes are there; for `verify`."""
    fields = json.loads(sample["json"])
    if fields["record_id"] != sample["__key__"].decode():
        raise ValueError(f"its fields are those of record {fields['record_id']}")
    for note in fields["notes"]:
        missing = [name for name in NOTE_FIELDS if name not in note]
        if missing:
            raise ValueError(f"a note lacks '{missing[0]}'")
    simplejpeg.decode_jpeg(sample["jpg"], "RGB")


def verify(out: str) -> list[str]:
    """Read every byte and decode every image of a folder of shards; the faults found, one line for each bad shard."""
    manifest = Manifest.load(out)
    faults = []
    with Meter(len(manifest.shards), "verify", "shards") as meter:
        for shard in manifest.shards:
            fault = manifest.fault(shard, check_sample)
            faults += [fault] if fault else []
            meter.advance()
    return faults


def _samples(
    config: ShardsConfig,
    root: Path,
    name: str,
    rows: list[dict[str, Any]],
    record_ids: list[str],
    skipped: list[dict[str, str]],
) -> Iterator[dict[str, str | bytes]]:
    """The samples of a shard. Ids of good ones go to `record_ids`, bad ones to `skipped` with the reason."""
    for row in rows:
        try:
            data, width, height = encode_image((root / row["image"]).read_bytes(), config.max_side, config.jpeg_quality)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            reason = " ".join(str(error).split())[:200]
            skipped.append({"record_id": row["record_id"], "image": row["image"], "shard": name, "reason": reason})
            continue
        fields = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
        fields.update(width=width, height=height)
        record_ids.append(row["record_id"])
        sample: dict[str, str | bytes] = {"__key__": row["record_id"], "jpg": data}
        sample["json"] = canonical_json(fields).encode()
        if config.txt_strategy:
            text = next((n["text"] for n in row["notes"] if n["strategy"] == config.txt_strategy), "")
            sample["txt"] = text.encode()
        yield sample


def _pack_missing(config: ShardsConfig, plan: Plan, done: dict[str, Packed]) -> dict[str, Packed]:
    """Pack the shards that are not done; InputError as soon as too many images are bad."""
    packed: dict[str, Packed] = {}
    num_done = sum(len(plan.shards[name]) for name in done)
    skipped = [s for one in done.values() for s in one.skipped]
    with Meter(plan.records.num_rows, "pack", "images", start=num_done) as meter:
        own, num_shares = config.share
        for name, one in _each_packed(config, plan, [n for n in list(plan.shards)[own::num_shares] if n not in done]):
            packed[name] = one
            skipped += one.skipped
            meter.advance(len(plan.shards[name]))
            _check_skipped(skipped, plan.records.num_rows)
    return packed


def _each_packed(config: ShardsConfig, plan: Plan, names: list[str]) -> Iterator[tuple[str, Packed]]:
    """Pack shards side by side; at most two a process are in flight, so memory does not grow with the set."""
    workers = min(config.workers or min(os.cpu_count() or 1, 8), len(names))
    if workers <= 1 or sum(len(plan.shards[n]) for n in names) < FEW:
        for name in names:
            yield name, pack_shard(config, plan.root, name, plan.images_of(name), _rows_of(plan, name))
        return
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        running: dict[Future[Packed], str] = {}
        waiting = iter(names)
        while True:
            for name in itertools.islice(waiting, 2 * workers - len(running)):
                work = (config, plan.root, name, plan.images_of(name), _rows_of(plan, name))
                running[pool.submit(pack_shard, *work)] = name
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _rows_of(plan: Plan, name: str) -> list[dict[str, Any]]:
    rows = plan.shards[name]
    fields = plan.records.take(pa.array(rows)).to_pylist()
    return [{**record, "notes": plan.notes.of(int(row))} for row, record in zip(rows, fields, strict=True)]


def _check_skipped(skipped: list[dict[str, str]], num_records: int) -> None:
    allowed = max(1, int(MAX_BAD_FRACTION * num_records))
    if len(skipped) > allowed:
        last = skipped[-1]
        raise InputError(
            f"{last['image']} (record {last['record_id']}): {last['reason']}; with it {len(skipped)} images cannot be "
            f"used, at most {allowed} of {num_records} may be bad; mend or remove them in the records and run again"
        )


def _finish_last(config: ShardsConfig, plan: Plan) -> Manifest | None:
    """Finish where this job packed the last shard of all shares; else say how many are still to come."""
    out = Path(config.out)
    with (out / DONE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two shares may end at the same time
        done = {name: packed for name in plan.shards if (packed := read_done(out, name, plan.images_of(name)))}
        if len(done) < len(plan.shards):
            print(f"{out}: {len(plan.shards) - len(done)} of {len(plan.shards)} shards are left to the other shares")
            return None
        return Manifest.load(out) if (out / FILE_NAME).is_file() else _finish(config, plan, done)


def _finish(config: ShardsConfig, plan: Plan, done: dict[str, Packed]) -> Manifest:
    """Write rows.parquet and the manifest, and list what was skipped."""
    out = Path(config.out)
    skipped = [s for name in plan.shards for s in done[name].skipped]
    _check_skipped(skipped, plan.records.num_rows)
    infos = [info for name in plan.shards if (info := done[name].info)]
    write_rows(out, plan.records, [(name, done[name].record_ids) for name in plan.shards])
    about = {
        "identity": plan.identity,
        "settings": settings(config),
        "strategies": plan.notes.strategies,
        "skipped": skipped,
    }
    manifest = write_manifest(out, infos, about)
    for one in skipped:
        print(f"skipped {one['image']} (record {one['record_id']}): {one['reason']}")
    total = sum(i.num_bytes for i in infos)
    print(
        f"{out}: {sum(i.num_samples for i in infos)} samples in {len(infos)} shards, {total / 1e6:.1f} MB, "
        f"{len(skipped)} skipped, fingerprint {manifest.fingerprint}"
    )
    return manifest


def write_rows(out: Path, records: pa.Table, packed: Iterable[tuple[str, list[str]]]) -> None:
    """rows.parquet: shard, row, record_id, dataset, label, group_id, split of every sample, in manifest order."""
    shard: list[str] = []
    row: list[int] = []
    ids: list[str] = []
    for name, record_ids in packed:
        shard += [name] * len(record_ids)
        row += range(len(record_ids))
        ids += record_ids
    where = pc.index_in(pa.array(ids, pa.string()), value_set=records["record_id"].combine_chunks())
    fields = records.select([*ROW_FIELDS, "split"]).take(where)
    table = pa.table({"shard": pa.array(shard, pa.string()), "row": pa.array(row, pa.int64())})
    for name in fields.column_names:
        table = table.append_column(name, fields[name])
    with replacing(out / ROWS) as temporary:
        pq.write_table(table, temporary)


def _describe(config: ShardsConfig, plan: Plan, num_done: int) -> None:
    notes = ", ".join(f"{name} {count}" for name, count in plan.notes.strategies.items()) or "none"
    print(f"{config.out}: {plan.records.num_rows} records, {int(plan.image_sizes.sum()) / 1e6:.1f} MB of images")
    print(f"  notes: {notes}; {plan.notes.num_left_out} left out (without text, or of other records)")
    for split in SPLITS:
        sizes = [len(rows) for name, rows in plan.shards.items() if name.startswith(f"{split}-")]
        print(f"  {split}: {sum(sizes)} samples in {len(sizes)} shards")
    print(f"  shards packed by an earlier run: {num_done} of {len(plan.shards)}")
