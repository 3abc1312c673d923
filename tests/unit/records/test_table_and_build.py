"""records.parquet and the job that builds it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dermfm.config import InputError, load, short_hash
from dermfm.records.build import CONFLICTS, UNREADABLE, RecordsConfig, build_records
from dermfm.records.source import KEPT, Losses
from dermfm.records.summary import class_counts, print_summary
from dermfm.records.table import RECORD_COLUMNS, SCHEMA, Record, read_records, to_table, write_records
from dermfm.report.records import PER_CLASS, class_montage, totals

from .conftest import textured, write_csv

CONTRACT = [
    "record_id",
    "dataset",
    "source_id",
    "image",
    "modality",
    "split",
    "label",
    "malignancy",
    "class",
    "subclass",
    "findings",
    "matched_class",
    "matched_subclass",
    "lesion_id",
    "patient_id",
    "group_id",
    "age",
    "sex",
    "site",
    "fitzpatrick",
    "skin_tone_scale",
    "skin_tone_value",
    "licence",
    "phash",
    "width",
    "height",
]


def some_table(folder: Path, **changes: object) -> pa.Table:
    record = Record(dataset="A", source_id="1", path=folder / "images" / "1.jpg", modality="clinical", split="train")
    record.group_id = record.record_id
    for name, value in changes.items():
        setattr(record, name, value)
    return to_table([record], folder)


def test_the_columns_are_those_of_the_contract() -> None:
    assert RECORD_COLUMNS == CONTRACT


def test_a_written_table_is_read_back_with_its_measured_columns(tmp_path: Path) -> None:
    table = some_table(tmp_path, measured={"size": 0.25, "colours": ["red"]})
    assert table.column_names[-2:] == ["measured_size", "measured_colours"]
    write_records(table, tmp_path / "sub" / "records.parquet")
    assert read_records(tmp_path / "sub" / "records.parquet").equals(table)
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["records.parquet"]


def test_the_record_id_is_the_hash_of_data_set_and_source_id_and_the_image_is_relative(tmp_path: Path) -> None:
    row = some_table(tmp_path / "run").to_pylist()[0]
    assert row["record_id"] == short_hash(["A", "1"])
    assert row["image"] == "images/1.jpg"


def test_an_image_is_found_from_a_folder_that_is_a_link_to_another_disk(tmp_path: Path) -> None:
    (tmp_path / "disk" / "deep" / "run").mkdir(parents=True)
    (tmp_path / "run").symlink_to(tmp_path / "disk" / "deep" / "run")
    image = tmp_path / "images" / "1.jpg"
    image.parent.mkdir()
    image.write_bytes(b"pixels")
    record = Record(dataset="A", source_id="1", path=image, modality="clinical", split="train", group_id="g")
    row = to_table([record], tmp_path / "run").to_pylist()[0]
    assert (tmp_path / "run" / row["image"]).read_bytes() == b"pixels"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "holdout"}, "column 'split' holds 'holdout'"),
        ({"label": 8}, "column 'label' holds '8'"),
        ({"sex": "unknown"}, "column 'sex' holds 'unknown'"),
        ({"group_id": ""}, "group_id must never be empty"),
    ],
)
def test_values_outside_the_vocabulary_are_not_written(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        write_records(some_table(tmp_path, **changes), tmp_path / "records.parquet")
    assert not (tmp_path / "records.parquet").exists()


def test_reading_names_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    path = tmp_path / "records.parquet"
    path.write_text("record_id\n1\n")
    with pytest.raises(InputError, match="is not a Parquet file"):
        read_records(path)
    table = some_table(tmp_path)
    pq.write_table(table.drop_columns(["group_id"]), path)
    with pytest.raises(InputError, match="lacks the column 'group_id'"):
        read_records(path)
    pq.write_table(table.set_column(6, "label", pa.array(["6"])), path)
    with pytest.raises(InputError, match="column 'label' has the type string; int64"):
        read_records(path)
    pq.write_table(pa.concat_tables([table, table]), path)
    with pytest.raises(InputError, match="occurs more than once"):
        read_records(path)


@pytest.fixture
def two_sets(tmp_path: Path) -> list[str]:
    """Arguments for a generic table of an internal and an external data set, 12 images each, one unreadable."""
    rows = []
    for dataset in ("In", "Out"):
        for i in range(12):
            path = tmp_path / "images" / dataset / f"{dataset}{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            textured(i + 100 * (dataset == "Out")).save(path)
            rows.append({"dataset": dataset, "sample_id": path.stem, "label": i % 2 * 4 + 2, "modality": "clinical"})
    (tmp_path / "images" / "In" / "In0.jpg").write_bytes(b"no picture")
    whole = (tmp_path / "images" / "In" / "In1.jpg").read_bytes()
    (tmp_path / "images" / "In" / "In1.jpg").write_bytes(whole[: len(whole) // 2])
    table = write_csv(tmp_path / "t.csv", rows)
    out = tmp_path / "out" / "records.parquet"
    return ["layout=generic", f"images={tmp_path / 'images'}", f"table={table}", f"out={out}", "test_only=[Out]"]


def build(arguments: list[str], dry_run: bool = False) -> tuple[RecordsConfig, object]:
    config = load(RecordsConfig, None, arguments)
    return config, build_records(config, dry_run)


def test_a_build_writes_the_table_and_counts_unreadable_images(two_sets: list[str]) -> None:
    config = load(RecordsConfig, None, two_sets)
    built = build_records(config)
    table = read_records(config.out)
    assert table.equals(built.table)
    assert table.schema.remove_metadata() == SCHEMA
    assert table.num_rows == 22
    assert built.losses.count(UNREADABLE) == 2
    counts = class_counts(table)
    assert sum(counts["Out", "test"]) == 12
    assert ("Out", "train") not in counts
    for row in table.to_pylist():
        with Image.open(Path(config.out).parent / row["image"]) as image:
            assert image.size == (row["width"], row["height"])
        assert len(row["phash"]) == 16


def test_a_second_build_does_nothing_and_a_changed_table_or_setting_builds_again(two_sets: list[str]) -> None:
    config = load(RecordsConfig, None, two_sets)
    first = build_records(config)
    stamp = Path(config.out).stat().st_mtime_ns
    again = build_records(config)
    assert again.was_there
    assert again.table.equals(first.table)
    assert Path(config.out).stat().st_mtime_ns == stamp
    assert not build_records(load(RecordsConfig, None, [*two_sets, "seed=5"])).was_there
    with Path(config.table).open("a") as file:
        file.write("In,In99,2,clinical\n")
    assert not build_records(config).was_there


def test_the_same_input_gives_the_same_bytes(two_sets: list[str], tmp_path: Path) -> None:
    files = []
    for workers in (1, 2):
        out = tmp_path / "out" / f"{workers}.parquet"
        build_records(load(RecordsConfig, None, [*two_sets, f"out={out}", f"workers={workers}"]))
        files.append(out.read_bytes())
    assert files[0] == files[1]


def test_a_dry_run_counts_and_writes_nothing(two_sets: list[str]) -> None:
    config = load(RecordsConfig, None, two_sets)
    assert build_records(config, dry_run=True).table.num_rows == 24
    assert not Path(config.out).exists()


def test_conflicts_are_dropped_unless_they_are_wanted(tmp_path: Path, save_images: Callable[..., Path]) -> None:
    rows = [
        {"dataset": "A", "sample_id": "a", "label": 7, "class": "nevus", "modality": "clinical"},
        {"dataset": "A", "sample_id": "b", "label": 2, "class": "nevus", "modality": "clinical"},
    ]
    table = write_csv(tmp_path / "t.csv", rows)
    arguments = ["layout=generic", f"images={save_images('a', 'b')}", f"table={table}", f"out={tmp_path / 'r.parquet'}"]
    built = build_records(load(RecordsConfig, None, arguments))
    assert built.table.column("source_id").to_pylist() == ["b"]
    assert built.losses.count(CONFLICTS) == 1
    kept = build_records(load(RecordsConfig, None, [*arguments, "drop_conflicts=false"]))
    assert kept.table.num_rows == 2


def test_two_sources_may_not_hold_the_same_image(two_sets: list[str]) -> None:
    config = load(RecordsConfig, None, [*two_sets, "sources=[{splits: test}, {datasets: [Out]}]"])
    with pytest.raises(InputError, match="Out/Out0 is already in"):
        build_records(config)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("valid=0.9", "valid \\+ test"),
        ("layout=ham1000", "ham10000"),
        ("datasets=[In, Ot]", "has no data set 'Ot'"),
        ("splits=random", "lesions"),
    ],
)
def test_bad_settings_are_named_with_what_is_valid(argument: str, message: str, two_sets: list[str]) -> None:
    with pytest.raises(InputError, match=message):
        build_records(load(RecordsConfig, None, [*two_sets, argument]))


def test_no_records_at_all_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"x")
    row = {"dataset": "A", "sample_id": "a", "label": 1, "modality": "clinical"}
    table = write_csv(tmp_path / "t.csv", [row])
    arguments = ["layout=generic", f"images={folder}", f"table={table}", f"out={tmp_path / 'r.parquet'}"]
    with pytest.raises(InputError, match="no record is left"):
        build_records(load(RecordsConfig, None, arguments))


def test_terminal_and_page_tell_the_sums_over_all_data_sets(
    two_sets: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = load(RecordsConfig, None, two_sets)
    built = build_records(config)
    print_summary(built, config.out)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    shown = {cells[1]: int(cells[2]) for cells in lines if cells[:1] == ["all"]}
    splits = Counter(built.table.column("split").to_pylist())
    assert shown == dict(splits)
    told = {split: (images, sum(counts)) for split, images, _, counts in totals(built.table.to_pylist())}
    assert told == {**{split: (splits[split],) * 2 for split in ("train", "valid", "test")}, "all": (22, 22)}


def test_every_data_set_is_in_the_montage_of_a_class(tmp_path: Path) -> None:
    textured(1).save(tmp_path / "1.jpg")
    names = [f"Set{i:02d}" for i in range(PER_CLASS + 4)]
    rows = [{"dataset": name, "label": 6, "split": "train", "image": "1.jpg"} for name in names for _ in range(3)]
    ((_, count, pictures),) = class_montage(rows, tmp_path, np.random.default_rng(0))
    assert count == len(rows)
    assert sorted(picture.lines[0] for picture in pictures) == names


def test_names_that_the_file_does_not_keep_are_counted_and_not_shown_as_a_name() -> None:
    losses = Losses()
    for i in range(KEPT + 200):
        losses.add("odd", f"image {i}")
    again = Losses.from_json(losses.to_json())
    assert again.count("odd") == KEPT + 200
    assert again.lines() == losses.lines()
    assert again.most_common("odd", 2) == [("image 0", 1), ("image 1", 1)]
