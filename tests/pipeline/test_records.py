"""`dermfm records` from the command line."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import pytest

from dermfm.records.table import read_records
from launch.cli import main


def test_the_atlas_config_draws_both_domains_and_a_second_call_does_nothing(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "records.parquet"
    call = ["records", str(root / "configs/data/atlas.yaml"), f"out={out}", "atlas.num_dermo=60", "atlas.num_clinic=20"]
    assert main([*call, "--dry-run"]) == 0
    assert not out.exists()
    assert main(call) == 0
    table = read_records(out)
    assert table.num_rows == 80
    rows = table.to_pylist()
    assert {row["split"] for row in rows if row["dataset"] == "Atlas_clinic"} == {"test"}
    assert {row["split"] for row in rows if row["dataset"] == "Atlas_dermo"} == {"train", "valid", "test"}
    assert all((tmp_path / row["image"]).is_file() for row in rows)
    capsys.readouterr()
    assert main(call) == 0
    assert "up to date" in capsys.readouterr().out


def test_bad_input_is_one_line_and_exit_code_two(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(root / "configs/data/ham10000.yaml")
    table = tmp_path / "t.csv"
    table.write_text("sample_id,label\na,1\n")
    assert main(["records", config, f"images={tmp_path}", f"table={table}", f"out={tmp_path / 'r.parquet'}"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    assert str(table) in error
    assert "layout=generic" in error
    assert main(["records", config, "image=x", f"out={tmp_path / 'r.parquet'}"]) == 2
    assert "did you mean 'images'" in capsys.readouterr().err
    assert not (tmp_path / "r.parquet").exists()


def test_the_six_real_data_sets_are_split_without_leaks(root: Path, shared_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "records.parquet"
    config = str(root / "configs/data/real-small.yaml")
    images, table = shared_data / "images", shared_data / "metadata.csv"
    # Copies have the next test: describing all images takes most of a minute.
    call = ["records", config, f"images={images}", f"table={table}", f"out={out}", "duplicate_distance=-1"]
    assert main([*call, "workers=2"]) == 0
    rows = read_records(out).to_pylist()
    # 6,032 images less the 144 of Milk10k whose label (AK) and diagnosis (SCC in situ) name different classes.
    assert len(rows) == 5888
    sides: dict[str, set[str]] = defaultdict(set)
    lesions: dict[tuple[str, str], set[str]] = defaultdict(set)
    for row in rows:
        sides[row["group_id"]].add(row["split"])
        for name in ("lesion_id", "patient_id"):
            if row[name]:
                lesions[row["dataset"].split("_")[0], row[name]].add(row["group_id"])
    assert all(len(splits) == 1 for splits in sides.values())
    assert all(len(groups) == 1 for groups in lesions.values())
    internal = [row for row in rows if row["dataset"] in ("HAM10000", "MSK", "UDA")]
    tested = [row for row in internal if row["split"] == "test"]
    assert {row["label"] for row in tested} == set(range(8))
    assert 0.17 < len(tested) / len(internal) < 0.24
    assert {row["split"] for row in rows if row not in internal} == {"test"}


def test_copies_of_one_photograph_in_two_real_data_sets_share_a_group(
    root: Path, shared_data: Path, tmp_path: Path
) -> None:
    # Seen by eye: the same photographs in other colours, and of HAM10000 and Milk10k in other magnifications.
    copies = {
        ("MSK", "ISIC_0015124"): ("UDA", "ISIC_0000171"),
        ("HAM10000", "ISIC_0028163"): ("Milk10k_dermo", "ISIC_7778901"),
        ("HAM10000", "ISIC_0035276"): ("Milk10k_dermo", "ISIC_2516006"),
        ("HAM10000", "ISIC_0032076"): ("Milk10k_dermo", "ISIC_7134919"),
    }
    # Two of the pairs that a hash within 2 bits alone would merge; they show different lesions.
    others = {("MSK", "ISIC_0014945"): ("MSK", "ISIC_0015273"), ("MSK", "ISIC_0010137"): ("MSK", "ISIC_0010356")}
    wanted = {*copies, *copies.values(), *others, *others.values()}
    with (shared_data / "metadata.csv").open(encoding="utf-8", newline="") as file:
        every = list(csv.DictReader(file))
    rows = [row for i, row in enumerate(every) if i % 20 == 0 or (row["dataset"], row["sample_id"]) in wanted]
    with (tmp_path / "some.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(every[0]))
        writer.writeheader()
        writer.writerows(rows)
    out = tmp_path / "records.parquet"
    config = str(root / "configs/data/real-small.yaml")
    call = ["records", config, f"images={shared_data / 'images'}", f"table={tmp_path / 'some.csv'}", f"out={out}"]
    assert main(call) == 0
    table = read_records(out).to_pylist()
    group = {(row["dataset"], row["source_id"]): row["group_id"] for row in table}
    split = {(row["dataset"], row["source_id"]): row["split"] for row in table}
    assert all(group[one] == group[two] for one, two in copies.items())
    assert all(group[one] != group[two] for one, two in others.items())
    assert {split[one] for one, two in copies.items() if two[0] == "Milk10k_dermo"} == {"test"}
    assert main([*call, "copies=drop", f"out={tmp_path / 'dropped.parquet'}"]) == 0
    kept = {(row["dataset"], row["source_id"]) for row in read_records(tmp_path / "dropped.parquet").to_pylist()}
    assert all((one in kept) + (two in kept) == 1 for one, two in copies.items())
    assert ("Milk10k_dermo", "ISIC_7778901") in kept
