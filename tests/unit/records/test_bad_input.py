"""What bad tables get: one line that names the file, what is wrong and what it looks like, or a counted warning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dermfm.config import InputError, load
from dermfm.records.adapters import ADAPTERS
from dermfm.records.adapters.folders import SAME_NAME
from dermfm.records.adapters.tables import COPIED_FILES, MISSING_IMAGE, PARTIAL_NAME, SEVERAL_FILES, UNNAMED_IMAGE
from dermfm.records.build import RecordsConfig, build_records
from dermfm.records.csvtable import NOT_UTF8, read_rows
from dermfm.records.groups import LESION_LABELS
from dermfm.records.source import NAMED, Losses, Reading, SourceConfig
from dermfm.records.table import Record

from .conftest import write_csv

Save = Callable[..., Path]


def read(layout: str, losses: Losses | None = None, **source: object) -> list[Record]:
    config = SourceConfig(layout=layout, **{name: str(value) for name, value in source.items()})  # type: ignore[arg-type]
    return ADAPTERS[layout](config, Reading(Path("."), losses=losses or Losses()))


def generic_row(sample_id: str, label: int | str = 1, **cells: object) -> dict[str, object]:
    return {"dataset": "Set", "sample_id": sample_id, "label": label, "modality": "clinical", **cells}


def test_missing_ids_are_counted_and_the_first_row_is_named(tmp_path: Path, save_images: Save) -> None:
    table = write_csv(tmp_path / "t.csv", [generic_row("a"), generic_row(""), generic_row("")])
    with pytest.raises(InputError, match=r"t.csv: row 3 and 1 more has an empty 'sample_id'"):
        read("generic", images=save_images("a"), table=table)


def test_repeated_ids_with_conflicting_labels_are_named_not_resolved(tmp_path: Path, save_images: Save) -> None:
    rows = [generic_row(name, label) for name in ("a", "b") for label in (1, 6)]
    table = write_csv(tmp_path / "t.csv", rows)
    with pytest.raises(InputError, match="'Set/a' and 1 other ids occur more than once"):
        read("generic", images=save_images("a"), table=table)


def test_images_of_one_lesion_with_different_labels_are_counted(tmp_path: Path, save_images: Save) -> None:
    rows = [generic_row("a", 1, lesion_id="L"), generic_row("b", 6, lesion_id="L"), generic_row("c", 6, lesion_id="M")]
    table = write_csv(tmp_path / "t.csv", rows)
    settings = [f"images={save_images('a', 'b', 'c')}", f"table={table}", f"out={tmp_path / 'r.parquet'}"]
    built = build_records(load(RecordsConfig, None, ["layout=generic", *settings]), dry_run=True)
    assert built.losses.kinds[LESION_LABELS] == {"Set/L: DF and MEL": 1}


def test_an_id_that_is_only_a_part_of_a_name_is_never_matched_and_said(tmp_path: Path, save_images: Save) -> None:
    table = write_csv(tmp_path / "t.csv", [generic_row("CLI_1"), generic_row("x")])
    losses = Losses()
    records = read("generic", losses, images=save_images("CLI_10", "CLI_100", "x"), table=table)
    assert [record.source_id for record in records] == ["x"]
    assert losses.kinds[PARTIAL_NAME] == {"CLI_1 / CLI_10": 1}
    with pytest.raises(InputError, match="ids must equal the file names, CLI_1 / CLI_10 match only in part"):
        read("generic", images=tmp_path / "images", table=write_csv(tmp_path / "u.csv", [generic_row("CLI_1")]))


def test_upper_and_lower_case_may_differ_only_where_that_is_unambiguous(tmp_path: Path, save_images: Save) -> None:
    table = write_csv(tmp_path / "t.csv", [generic_row("NEL025"), generic_row("Ab"), generic_row("q")])
    losses = Losses()
    records = read("generic", losses, images=save_images("Nel025", "AB", "ab", "q"), table=table)
    assert [record.source_id for record in records] == ["NEL025", "q"]
    assert losses.kinds == {SEVERAL_FILES: {"Ab: AB.jpg and ab.jpg": 1}}


def test_rows_without_images_and_images_without_rows_are_counted_and_ten_are_named(
    tmp_path: Path, save_images: Save
) -> None:
    table = write_csv(tmp_path / "t.csv", [generic_row(f"row{i}") for i in range(15)] + [generic_row("both")])
    losses = Losses()
    images = save_images("both", *(f"file{i}" for i in range(12)))
    assert len(read("generic", losses, images=images, table=table)) == 1
    assert (losses.count(MISSING_IMAGE), losses.count(UNNAMED_IMAGE)) == (15, 12)
    lines = {line.partition(":")[0]: line for line in losses.lines()}
    for kind in (MISSING_IMAGE, UNNAMED_IMAGE):
        assert lines[kind].count(",") == NAMED
        assert lines[kind].endswith(", …)")


def test_of_an_image_in_two_folders_equal_bytes_are_taken_once_and_different_ones_not_at_all(
    tmp_path: Path, save_images: Save
) -> None:
    images = save_images("part_1/a", "part_1/b", "part_2/b")
    (images / "part_2" / "a.jpg").write_bytes((images / "part_1" / "a.jpg").read_bytes())
    table, losses = write_csv(tmp_path / "t.csv", [generic_row("a"), generic_row("b")]), Losses()
    (record,) = read("generic", losses, images=images, table=table)
    assert record.path == images / "part_1" / "a.jpg"
    assert losses.kinds == {
        COPIED_FILES: {"part_2/a.jpg": 1},
        SEVERAL_FILES: {"b: part_1/b.jpg and part_2/b.jpg": 1},
    }
    with pytest.raises(InputError, match=r"several different files have each name, first .*part_1/b\.jpg and"):
        read("generic", images=images, table=write_csv(tmp_path / "u.csv", [generic_row("b")]))


def test_hidden_files_are_no_images_and_files_below_a_data_sets_folder_are_counted(
    tmp_path: Path, save_images: Save
) -> None:
    images = save_images("Set/a", "Set/part_2/extra", "Other/b")
    (images / "Set" / "._a.jpg").write_bytes(b"what another system writes beside a file")
    losses = Losses()
    read("generic", losses, images=images, table=write_csv(tmp_path / "t.csv", [generic_row("a")]))
    assert losses.kinds == {UNNAMED_IMAGE: {"extra.jpg": 1}}


def test_columns_without_a_name_are_left_out_and_an_empty_file_is_named(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text(",sample_id,label,,\n0,a,1,,\n")
    assert read_rows(table, ["sample_id"], "generic") == [{"sample_id": "a", "label": "1"}]
    for text in ("", "\n", ",,\n"):
        table.write_text(text)
        with pytest.raises(InputError, match=r"t\.csv: is empty, or its first line is"):
            read_rows(table, ["sample_id"], "generic")


def test_tabs_divide_the_cells_of_files_that_are_named_so(tmp_path: Path) -> None:
    for suffix in ("tab", "tsv"):
        table = tmp_path / f"t.{suffix}"
        table.write_text('sample_id\tlabel\n"a"\t1\n')
        assert read_rows(table, ["sample_id"], "generic") == [{"sample_id": "a", "label": "1"}]
        table.write_text("sample_id,label\na,1\n")
        with pytest.raises(InputError, match="separated by ','; a tab is needed"):
            read_rows(table, ["sample_id"], "generic")


def test_files_of_one_name_in_two_class_folders_are_told_apart_by_their_path(save_images: Save) -> None:
    images = save_images("Melanoma/1", "Nevus/1", "Nevus/2")
    losses = Losses()
    records = read("folders", losses, images=images, dataset="X", modality="clinical")
    assert {(r.source_id, r.label) for r in records} == {("Melanoma/1", 6), ("Nevus/1", 2), ("2", 2)}
    assert losses.kinds == {SAME_NAME: {"1": 2}}


def test_another_delimiter_is_named(tmp_path: Path, save_images: Save) -> None:
    for delimiter, shown in ((";", "';'"), ("\t", "'tab'"), ("|", r"'\|'")):
        table = write_csv(tmp_path / "t.csv", [generic_row("a")], delimiter)
        with pytest.raises(InputError, match=f"separated by {shown}; a comma is needed"):
            read("generic", images=save_images("a"), table=table)


def test_encodings_are_read_counted_or_refused(tmp_path: Path, save_images: Save) -> None:
    text = "sample_id,dataset,modality,class\na,Münster,clinical,nevus\n"
    images = save_images("a")
    for encoding, counted in (("utf-8", 0), ("utf-8-sig", 0), ("utf-16", 0), ("cp1252", 1)):
        (tmp_path / "t.csv").write_bytes(text.encode(encoding))
        losses = Losses()
        (record,) = read("generic", losses, images=images, table=tmp_path / "t.csv")
        assert (record.dataset, losses.count(NOT_UTF8)) == ("Münster", counted)
    (tmp_path / "t.csv").write_bytes(text.encode("utf-16-le"))
    with pytest.raises(InputError, match=r"t.csv: is not a text file \(or UTF-16 without its mark\)"):
        read("generic", images=images, table=tmp_path / "t.csv")


def test_broken_rows_and_open_quotes_are_named(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("sample_id,label\na,1\nb,1,2\n")
    with pytest.raises(InputError, match=r"t.csv: line 3 has 3 cells, the header has 2"):
        read_rows(table, ["sample_id"], "generic")
    table.write_text('sample_id,label\na,"1\n' + "b,1\n" * 50000)
    with pytest.raises(InputError, match="is a quotation mark left open"):
        read_rows(table, ["sample_id"], "generic")
    table.write_text("sample_id,label\n")
    with pytest.raises(InputError, match="a header but no rows"):
        read_rows(table, ["sample_id"], "generic")


HEADERS = {
    "ham10000": "lesion_id,image_id,dx,dx_type,age,sex,localization",
    "milk10k": "lesion_id,image_type,isic_id,attribution,copyright_license,age_approx,sex,skin_tone_class,site",
    "isic": "isic_id,attribution,copyright_license,diagnosis_1,image_type",
    "pad_ufes_20": "patient_id,lesion_id,age,gender,fitspatrick,region,diagnostic,img_id",
    "derm7pt": "case_num,diagnosis,seven_point_score,clinic,derm",
    "fitzpatrick17k": "md5hash,fitzpatrick_scale,label,url",
    "mra_midas": ",midas_record_id,midas_file_name,midas_path",
    "ph2": "|| Name || Histological Diagnosis || Clinical Diagnosis || Asymmetry | Pigment Network || Colors ||",
    "derm1m": "filename,caption,disease_label",
    "reference": "ISIC_0024306,2,benign,nevus,nevus,-,melanocytic / benign nevus,benign melanocytic nevus",
    "generic": "dataset,sample_id,label,modality",
}


@pytest.mark.parametrize("given", [name for name in HEADERS if name != "reference"])
def test_a_table_of_another_data_set_is_recognised(given: str, tmp_path: Path, save_images: Save) -> None:
    images = save_images("a")
    for other, header in HEADERS.items():
        if other == given:
            continue
        table = tmp_path / f"{other}.csv"
        table.write_text(f"{header}\n{header}\n")
        source = {"dataset": "X"} if given == "isic" else {}
        if given == "ph2":
            table = table.rename(tmp_path / f"{other}.txt")
        with pytest.raises(InputError) as caught:
            read(given, images=images, table=table, **source)
        assert f"(layout={other}" in str(caught.value), other
        assert str(table) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_table_without_a_layout_is_recognised(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text(HEADERS["pad_ufes_20"] + "\n")
    config = load(RecordsConfig, None, [f"table={table}", f"images={tmp_path}", f"out={tmp_path / 'r.parquet'}"])
    with pytest.raises(InputError, match=r"layout is required; .*t.csv looks like .*layout=pad_ufes_20"):
        build_records(config)


def test_a_generic_parquet_table_is_read_like_a_csv_and_a_false_one_is_named(tmp_path: Path, save_images: Save) -> None:
    rows = [generic_row("a", 1, age=50.5), generic_row("b", 6, age=None)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    one, two = read("generic", images=save_images("a", "b"), table=tmp_path / "t.parquet")
    assert (one.label, one.age, two.label, two.age) == (1, 50.5, 6, None)
    for suffix in ("parquet", "xlsx"):
        (tmp_path / f"false.{suffix}").write_text("sample_id,label\n")
        with pytest.raises(InputError, match=f"false.{suffix}: is not an? .* file"):
            read("generic", images=tmp_path / "images", table=tmp_path / f"false.{suffix}")


def test_a_sheet_without_openpyxl_gets_one_line(
    tmp_path: Path, save_images: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openpyxl", None)
    (tmp_path / "t.xlsx").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"reading xlsx needs openpyxl \(pip install 'dermfm\[xlsx\]'\)"):
        read("generic", images=save_images("a"), table=tmp_path / "t.xlsx")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (HEADERS["ham10000"] + ",dataset", r"the label 'image_id' is not valid, 0 to 7; it looks like HAM10000"),
        (HEADERS["reference"].replace(",2,", ",nevus,"), "the label 'nevus' is not valid, 0 to 7; a line is id, label"),
        (HEADERS["reference"].replace(",", ";"), "8 are needed; they are separated by ';', a comma is needed"),
        ("", "is empty"),
    ],
)
def test_a_false_table_in_the_studys_folder_is_named(
    line: str, message: str, tmp_path: Path, save_images: Save
) -> None:
    table = tmp_path / "csv/HAM10000/classes_subclasses_metadata_mapping.csv"
    table.parent.mkdir(parents=True)
    table.write_text(f"{line}\n" if line else "")
    with pytest.raises(InputError, match=f"{table}: .*{message}"):
        read("reference", images=save_images("a"), table=tmp_path / "csv")


def test_a_place_that_cannot_hold_the_table_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out, told in ((tmp_path, "is a folder; name the file"), (tmp_path / "file/a/r.parquet", "file is a file")):
        with pytest.raises(InputError, match=told):
            build_records(RecordsConfig(layout="ham10000", table="none.csv", images="none", out=str(out)))


def test_what_a_generic_table_does_not_say_may_be_said_for_all_rows(tmp_path: Path, save_images: Save) -> None:
    table = write_csv(tmp_path / "t.csv", [{"sample_id": "a", "label": 2}])
    images = save_images("a")
    with pytest.raises(InputError, match=r"t.csv: lacks the column 'dataset'; add it, or say dataset=<name>"):
        read("generic", images=images, table=table)
    with pytest.raises(InputError, match=r"t.csv: lacks the column 'modality'.*modality=dermoscopic\|clinical"):
        read("generic", images=images, table=table, dataset="Mine")
    (one,) = read("generic", images=images, table=table, dataset="Mine", modality="clinical")
    assert (one.dataset, one.modality, one.label) == ("Mine", "clinical", 2)


def test_a_folder_that_is_not_there_is_told_with_its_neighbour(tmp_path: Path, save_images: Save) -> None:
    table = write_csv(tmp_path / "t.csv", [generic_row("a")])
    images = save_images("a")
    with pytest.raises(InputError, match=f"no such folder; did you mean '{images.name}'"):
        read("generic", images=images.parent / f"{images.name}s", table=table)
