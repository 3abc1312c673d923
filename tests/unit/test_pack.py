"""`dermfm shards`: what is packed is what was given, twice the same, and a stopped run continues."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

import dermfm.pack
from dermfm.add_notes import AddNotesConfig, add_notes
from dermfm.config import InputError, short_hash
from dermfm.notes.store import NOTE_SCHEMA
from dermfm.pack import encode_image, pack, verify
from dermfm.pack_plan import ShardsConfig
from dermfm.records.table import SCHEMA
from launch.cli import main
from shards.foreign import index_folder
from shards.manifest import Manifest, ShardError


def jpeg(seed: int, size: tuple[int, int] = (48, 36), **options) -> bytes:
    noise = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8))
    data = io.BytesIO()
    noise.resize(size, Image.Resampling.BICUBIC).save(data, "JPEG", **options)
    return data.getvalue()


def record_of(number: int, split: str) -> dict:
    dataset = ("A", "B")[number % 2]
    record_id = short_hash([dataset, str(number)])
    return {
        "record_id": record_id, "dataset": dataset, "source_id": str(number), "image": f"images/{number}.jpg",
        "modality": "dermoscopic", "split": split, "label": number % 8 if number % 5 else None, "group_id": record_id,
        "age": float("nan") if number == 1 else 50.0, "width": 48, "height": 36,
    }  # fmt: skip


def note_of(record_id: str, strategy: str, text: str) -> dict:
    note_id = short_hash([record_id, strategy, text])
    return {"note_id": note_id, "record_id": record_id, "strategy": strategy, "engine": "template",
            "label_access": "given", "text": text, "faults": []}  # fmt: skip


def filled(row: dict, schema: pa.Schema) -> dict:
    blanks = {"string": "", "int64": 0, "int32": 0, "double": 0.0}
    return {f.name: row.get(f.name, None if f.nullable else blanks.get(str(f.type), "")) for f in schema}


def write_table(path: Path, rows: list[dict], schema: pa.Schema) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([filled(r, schema) for r in rows], schema=schema), path)


class Source:
    """Forty records with images, and notes of two strategies for most of them, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records = [record_of(i, "train" if i < 30 else "test") for i in range(40)]
        (folder / "images").mkdir()
        for i in range(40):
            (folder / "images" / f"{i}.jpg").write_bytes(jpeg(i))
        self.notes = [note_of(r["record_id"], "template", f"a {i}") for i, r in enumerate(self.records)]
        self.notes += [note_of(r["record_id"], "open", f"o {i}") for i, r in enumerate(self.records) if i % 3 == 0]
        self.notes += [note_of(self.records[0]["record_id"], "abcd", ""), note_of("stranger", "open", "x")]
        self.write()

    def write(self) -> None:
        write_table(self.folder / "records.parquet", self.records, SCHEMA)
        write_table(self.folder / "notes" / "part-00000.parquet", self.notes[1::2], NOTE_SCHEMA)
        write_table(self.folder / "notes" / "part-00001.parquet", self.notes[::2], NOTE_SCHEMA)

    def config(self, out: str = "shards", **settings) -> ShardsConfig:
        settings = {"records": f"{self.folder}/records.parquet", "notes": f"{self.folder}/notes"} | settings
        return ShardsConfig(out=f"{self.folder}/{out}", **({"shard_bytes": 10_000} | settings))


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path)


def samples_in(folder: Path | str) -> dict[str, dict]:
    """record_id → {extension: bytes} of all tars of a folder, as webdataset reads them."""
    tars = sorted(str(p) for p in Path(folder).glob("*.tar"))
    return {s["__key__"]: s for s in webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)}


def files_of(folder: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.is_file()}


def test_a_sample_is_the_image_byte_for_byte_and_the_record_with_all_its_notes(source):
    pack(source.config())
    found = samples_in(source.folder / "shards")
    assert set(found) == {r["record_id"] for r in source.records}
    for i, record in enumerate(source.records):
        sample = found[record["record_id"]]
        assert sample["jpg"] == (source.folder / record["image"]).read_bytes()
        fields = json.loads(sample["json"])
        assert {k: fields[k] for k in ("dataset", "label", "split")} == {
            k: record[k] for k in ("dataset", "label", "split")
        }
        assert set(SCHEMA.names) <= set(fields)
        notes = {n["strategy"]: n["text"] for n in fields["notes"]}
        assert notes == {"template": f"a {i}"} | ({"open": f"o {i}"} if i % 3 == 0 else {})
        assert all(set(n) == {"note_id", "strategy", "engine", "label_access", "text"} for n in fields["notes"])


def test_unknown_numbers_become_null_in_strict_json(source):
    pack(source.config())
    fields = samples_in(source.folder / "shards")[source.records[1]["record_id"]]["json"]
    assert json.loads(fields, parse_constant=lambda name: pytest.fail(name))["age"] is None


def test_splits_have_shards_of_their_own_in_which_data_sets_mix(source):
    manifest = pack(source.config())
    counts = Counter()
    for shard in manifest.shards:
        assert shard.name.startswith(shard.split)
        counts[shard.split] += shard.num_samples
    assert counts == {"train": 30, "test": 10}
    assert len(manifest.split("train")) >= 2
    rows = manifest.read_rows("train")
    assert {d for d, s in zip(rows["dataset"], rows["shard"], strict=True) if s == "train-00000.tar"} == {"A", "B"}


def test_packing_twice_gives_the_same_files_whatever_the_order_of_the_inputs(source):
    one = pack(source.config("one"))
    source.notes.reverse()
    source.write()
    other = pack(source.config("other"))
    assert one.fingerprint == other.fingerprint
    assert files_of(one.folder) == files_of(other.folder)


def test_worker_processes_pack_the_same_bytes(source, monkeypatch):
    alone = pack(source.config("alone"))
    monkeypatch.setattr(dermfm.pack, "FEW", 0)
    together = pack(source.config("together", workers=2))
    assert together.fingerprint == alone.fingerprint
    assert files_of(together.folder) == files_of(alone.folder)


def test_rows_name_every_sample_where_it_lies(source):
    manifest = pack(source.config())
    rows = pq.read_table(f"{manifest.folder}/rows.parquet")
    assert rows.column_names == ["shard", "row", "record_id", "dataset", "label", "group_id", "split"]
    by_id = {r["record_id"]: r for r in source.records}
    for row in rows.to_pylist():
        with tarfile.open(f"{manifest.folder}/{row['shard']}") as tar:
            keys = list(dict.fromkeys(m.name.split(".")[0] for m in tar))
        assert keys[row["row"]] == row["record_id"]
        assert row["label"] == by_id[row["record_id"]]["label"]
    assert rows.num_rows == 40


def test_the_manifest_counts_notes_by_strategy(source):
    assert pack(source.config()).about["strategies"] == {"open": 14, "template": 40}


def test_without_notes_samples_have_an_empty_list(source):
    pack(source.config(notes=None))
    assert all(json.loads(s["json"])["notes"] == [] for s in samples_in(source.folder / "shards").values())


def test_a_second_run_does_nothing_and_says_so(source, capsys):
    manifest = pack(source.config())
    times = {p: p.stat().st_mtime_ns for p in Path(manifest.folder).iterdir()}
    assert pack(source.config()) == manifest
    assert "nothing to do" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in Path(manifest.folder).iterdir()} == times


def test_a_run_that_was_killed_continues_with_the_missing_shards_only(source, monkeypatch):
    whole = pack(source.config("whole"))
    packed, write = [], dermfm.pack.write_shard

    def killed_at_the_third(folder, name, split, samples):
        if len(packed) == 2:
            raise KeyboardInterrupt
        packed.append(name)
        return write(folder, name, split, samples)

    monkeypatch.setattr(dermfm.pack, "write_shard", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        pack(source.config("part"))
    assert not (source.folder / "part" / "manifest.json").exists()
    again = []
    monkeypatch.setattr(dermfm.pack, "write_shard", lambda *a: again.append(a[1]) or write(*a))
    resumed = pack(source.config("part"))
    assert sorted(packed + again) == sorted(s.name for s in whole.shards)
    assert files_of(resumed.folder) == files_of(whole.folder)


def test_a_shard_that_was_lost_is_packed_again(source):
    manifest = pack(source.config())
    before = files_of(manifest.folder)
    manifest.path(manifest.shards[1]).unlink()
    pack(source.config())
    assert files_of(manifest.folder) == before


def test_images_that_changed_are_packed_again(source):
    before = pack(source.config())
    (source.folder / source.records[3]["image"]).write_bytes(jpeg(99, (50, 50)))
    after = pack(source.config())
    changed = [a.name for a, b in zip(before.shards, after.shards, strict=True) if a.sha256 != b.sha256]
    assert len(changed) == 1
    assert after.fingerprint != before.fingerprint


@pytest.mark.parametrize("change", ["records", "notes", "settings"])
def test_a_folder_with_shards_of_other_inputs_is_refused_and_left_alone(source, change):
    manifest = pack(source.config())
    before = files_of(manifest.folder)
    settings = {}
    if change == "records":
        source.records[0]["label"] = 7
    elif change == "notes":
        source.notes[0]["text"] = "another"
    else:
        settings = {"jpeg_quality": 50}
    source.write()
    with pytest.raises(InputError, match=rf"holds shards of other inputs \({change} differ\); give another out="):
        pack(source.config(**settings))
    assert files_of(manifest.folder) == before


def test_a_folder_with_foreign_tars_is_refused(source):
    (source.folder / "shards").mkdir()
    (source.folder / "shards" / "x.tar").write_bytes(b"")
    with pytest.raises(InputError, match="another program or version"):
        pack(source.config())


def test_a_bad_image_is_skipped_counted_and_listed(source, capsys):
    (source.folder / source.records[7]["image"]).write_bytes(jpeg(1)[:400])
    manifest = pack(source.config())
    (skipped,) = manifest.about["skipped"]
    assert skipped["record_id"] == source.records[7]["record_id"]
    assert sum(s.num_samples for s in manifest.shards) == 39
    assert manifest.read_rows("train")["record_id"].count(skipped["record_id"]) == 0
    assert "skipped images/7.jpg" in capsys.readouterr().out
    assert verify(manifest.folder) == []


def test_too_many_bad_images_fail_the_job_with_exit_2_naming_one(source, capsys):
    (source.folder / source.records[7]["image"]).write_bytes(b"no image")
    (source.folder / source.records[8]["image"]).unlink()
    code = main(["shards", f"records={source.folder}/records.parquet", f"out={source.folder}/shards"])
    assert code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "images/" in line
    assert "2 images cannot be used, at most 1 of 40" in line
    assert not (source.folder / "shards" / "manifest.json").exists()


def test_a_split_whose_only_image_is_bad_leaves_no_empty_shard(source):
    source.records[30]["split"] = "valid"
    source.write()
    (source.folder / source.records[30]["image"]).write_bytes(b"")
    manifest = pack(source.config())
    assert {s.split for s in manifest.shards} == {"train", "test"}
    assert verify(manifest.folder) == []


def test_a_dry_run_prints_counts_and_writes_nothing(source, capsys):
    code = main(["shards", f"records={source.folder}/records.parquet", f"out={source.folder}/shards", "--dry-run"])
    assert code == 0
    assert "train: 30 samples in 1 shards" in capsys.readouterr().out
    assert not (source.folder / "shards").exists()


def test_verify_names_a_flipped_byte_with_exit_2(source, capsys):
    manifest = pack(source.config())
    assert main(["shards", "verify", f"out={manifest.folder}"]) == 0
    path = manifest.path(manifest.shards[0])
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(bytes(data))
    capsys.readouterr()
    assert main(["shards", "verify", f"out={manifest.folder}"]) == 2
    assert str(path) in capsys.readouterr().err


def test_the_key_of_open_clips_reader_holds_the_first_note_of_a_strategy(source):
    pack(source.config(txt_strategy="open"))
    found = samples_in(source.folder / "shards")
    texts = [found[r["record_id"]]["txt"].decode() for r in source.records]
    assert texts == [f"o {i}" if i % 3 == 0 else "" for i in range(40)]


def test_an_unknown_txt_strategy_is_refused_with_the_nearest(source):
    with pytest.raises(InputError, match="did you mean 'template'"):
        pack(source.config(txt_strategy="tempalte"))


def test_notes_of_no_packed_record_at_all_are_an_error(source):
    source.notes = [note_of("stranger", "open", "x"), note_of("another", "open", "y")]
    source.write()
    with pytest.raises(InputError, match="none of its 2 notes belongs to a record"):
        pack(source.config())


def test_a_manifest_loads_after_the_folder_was_moved(source):
    manifest = pack(source.config())
    moved = Path(manifest.folder).rename(source.folder / "moved")
    assert Manifest.load(moved).fingerprint == manifest.fingerprint
    assert str(source.folder) not in (moved / "manifest.json").read_text()


def test_large_images_are_encoded_anew_and_small_ones_pass():
    small, large = jpeg(0, (300, 200)), jpeg(0, (900, 600))
    assert encode_image(small, 200, 90) == (small, 300, 200)
    data, width, height = encode_image(large, 200, 90)
    assert (width, height) == Image.open(io.BytesIO(data)).size == (300, 200)
    assert encode_image(large, 0, 90)[0] == large


def test_rotated_cmyk_and_png_images_become_upright_rgb_jpegs():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    assert encode_image(jpeg(0, (48, 36), exif=exif), 0, 90)[1:] == (36, 48)
    for mode, kind in (("CMYK", "JPEG"), ("RGBA", "PNG"), ("P", "PNG"), ("L", "PNG")):
        data = io.BytesIO()
        Image.open(io.BytesIO(jpeg(0))).convert(mode).save(data, kind)
        encoded = Image.open(io.BytesIO(encode_image(data.getvalue(), 0, 90)[0]))
        assert (encoded.format, encoded.mode, encoded.size) == ("JPEG", "RGB", (48, 36))


def test_a_jpeg_that_ends_too_early_is_found_when_packing():
    whole = jpeg(3, (400, 300))
    for cut in (2, len(whole) // 3, len(whole) - 20):
        with pytest.raises((ValueError, OSError)):
            encode_image(whole[:cut], 0, 90)


def further_notes(source: Source) -> Path:
    rows = [note_of(r["record_id"], "narrative", f"n {i}") for i, r in enumerate(source.records) if i % 2]
    write_table(source.folder / "more" / "part-00000.parquet", [*rows, source.notes[0]], NOTE_SCHEMA)
    return source.folder / "more"


def test_a_new_generation_keeps_images_and_order_and_has_the_further_notes(source):
    old = pack(source.config())
    config = AddNotesConfig(shards=old.folder, notes=str(further_notes(source)), out=f"{source.folder}/second")
    new = add_notes(config)
    assert new.about["strategies"] == {"narrative": 20, "open": 14, "template": 40}
    assert new.read_rows("train") == old.read_rows("train")
    before, after = samples_in(old.folder), samples_in(new.folder)
    for i, record in enumerate(source.records):
        one, other = before[record["record_id"]], after[record["record_id"]]
        assert one["jpg"] == other["jpg"]
        texts = {n["text"] for n in json.loads(other["json"])["notes"]}
        assert texts == {n["text"] for n in json.loads(one["json"])["notes"]} | ({f"n {i}"} if i % 2 else set())
    assert verify(new.folder) == []
    (source.folder / "second" / new.shards[0].name).unlink()
    (source.folder / "second" / "manifest.json").unlink()
    assert add_notes(config).fingerprint == new.fingerprint


def test_a_new_generation_needs_a_folder_of_its_own(source):
    old = pack(source.config())
    notes = str(further_notes(source))
    with pytest.raises(InputError, match="needs another folder"):
        add_notes(AddNotesConfig(shards=old.folder, notes=notes, out=old.folder))
    pack(source.config("other"))
    with pytest.raises(InputError, match="holds shards of another generation"):
        add_notes(AddNotesConfig(shards=old.folder, notes=notes, out=f"{source.folder}/other"))


def test_a_lost_index_is_written_again_as_it_was(source):
    manifest = pack(source.config())
    before = files_of(manifest.folder)
    manifest.path(manifest.shards[0]).with_suffix(".idx").unlink()
    list(index_folder(manifest.folder, lambda name: pytest.fail(name)))
    assert files_of(manifest.folder) == before


def test_foreign_tars_get_index_and_manifest_and_a_key_in_two_of_them_is_refused(tmp_path):
    for name, keys in (("train-0.tar", "ab"), ("test-0.tar", "cd")):
        with webdataset.TarWriter(str(tmp_path / name)) as tar:
            for k in keys:
                tar.write({"__key__": k, "jpg": jpeg(ord(k)), "txt": "note"})
    list(index_folder(tmp_path, lambda name: name.split("-")[0]))
    assert {s.split: s.num_samples for s in Manifest.load(tmp_path).shards} == {"train": 2, "test": 2}
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "train-1.tar").write_bytes((tmp_path / "train-0.tar").read_bytes())
    with pytest.raises(ShardError, match=r"train-1\.tar: key 'a' is also in train-0\.tar"):
        list(index_folder(tmp_path, lambda name: "train"))
