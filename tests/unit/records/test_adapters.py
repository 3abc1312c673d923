"""Adapters: the generic table, HAM10000 and MILK10k, and what bad tables get."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from dermfm.config import InputError
from dermfm.records.adapters import ADAPTERS
from dermfm.records.adapters.isic import REFUSED
from dermfm.records.adapters.milk10k import DISAGREE, NOT_ONE_GROUP
from dermfm.records.adapters.tables import MISSING_IMAGE, UNMAPPED, UNNAMED_IMAGE
from dermfm.records.source import LAYOUTS, Losses, Reading, SourceConfig
from dermfm.records.table import Record

from .conftest import write_csv

HAM_ROW = {
    "lesion_id": "HAM_1",
    "image_id": "ISIC_1",
    "dx": "mel",
    "dx_type": "histo",
    "age": "50.0",
    "sex": "male",
    "localization": "unknown",
}


def read(layout: str, losses: Losses | None = None, **source: object) -> list[Record]:
    config = SourceConfig(layout=layout, **source)  # type: ignore[arg-type]
    return ADAPTERS[layout](config, Reading(Path("."), losses=losses or Losses()))


def generic_row(sample_id: str, **cells: object) -> dict[str, object]:
    return {"dataset": "Set", "sample_id": sample_id, "label": "", "class": "", "modality": "clinical", **cells}


def test_every_layout_of_the_config_has_an_adapter() -> None:
    assert set(ADAPTERS) == set(LAYOUTS)


def test_a_generic_table_keeps_what_it_says_and_leaves_the_rest_unknown(
    tmp_path: Path, save_images: Callable[..., Path]
) -> None:
    cells = {
        "label": "6",
        "class": "melanoma- nos",
        "sex": "FEMALE",
        "site": "lower_extremity",
        "age": "",
        "lesion_id": "L",
    }
    table = write_csv(tmp_path / "t.csv", [generic_row("a", **cells, fitzpatrick="2.0", skin_tone_class="4")])
    (record,) = read("generic", images=str(save_images("Set/a")), table=str(table))
    assert (record.label, record.malignancy, record.matched_class) == (6, "malignant", "melanoma")
    assert (record.class_text, record.sex, record.site) == ("melanoma, nos", "female", "lower extremity")
    assert (record.age, record.patient_id, record.lesion_id, record.fitzpatrick) == (None, None, "L", 2)
    assert (record.skin_tone_scale, record.skin_tone_value) == ("MILK10k 0-5", 4.0)


def test_a_generic_row_without_a_label_takes_it_from_its_texts_or_stays_unlabelled(
    tmp_path: Path, save_images: Callable[..., Path]
) -> None:
    rows = [generic_row("a", **{"class": "Blue nevus"}), generic_row("b", **{"class": "acne"})]
    table = write_csv(tmp_path / "t.csv", rows)
    losses = Losses()
    known, unknown = read("generic", losses, images=str(save_images("a", "b")), table=str(table))
    assert (known.label, known.matched_subclass) == (2, "blue nevus")
    assert (unknown.label, unknown.malignancy, unknown.class_text) == (None, None, "acne")
    assert losses.lines() == [f"{UNMAPPED}: 1 (Set: acne)"]


def test_a_label_that_contradicts_the_text_is_a_conflict(tmp_path: Path, save_images: Callable[..., Path]) -> None:
    rows = [generic_row("a", label="7", **{"class": "nevus"}), generic_row("b", label="2", **{"class": "nevus"})]
    table = write_csv(tmp_path / "t.csv", rows)
    records = read("generic", images=str(save_images("a", "b")), table=str(table))
    assert [record.has_conflict for record in records] == [True, False]


def test_ids_are_matched_exactly_and_missing_and_superfluous_images_are_counted(
    tmp_path: Path, save_images: Callable[..., Path]
) -> None:
    table = write_csv(tmp_path / "t.csv", [generic_row("img_1", label=0), generic_row("img_2", label=0)])
    losses = Losses()
    records = read(
        "generic", losses, images=str(save_images("Set/img_1", "Set/img_10", "Set/img_20")), table=str(table)
    )
    assert [record.source_id for record in records] == ["img_1"]
    assert losses.count(MISSING_IMAGE) == 1
    assert losses.count(UNNAMED_IMAGE) == 2


def test_the_patient_of_a_pad_ufes_image_is_read_from_its_id(tmp_path: Path, save_images: Callable[..., Path]) -> None:
    row = generic_row("PAT_12_345_6", label=5, dataset="PAD_UFES_20")
    table = write_csv(tmp_path / "t.csv", [row])
    (record,) = read("generic", images=str(save_images("PAD_UFES_20/PAT_12_345_6")), table=str(table))
    assert record.patient_id == "PAT_12"


def bad_tables(folder: Path) -> dict[str, tuple[str, Path, str]]:
    """name → (layout, table, what the message must hold)."""
    plain = [generic_row("a", label=1)]
    ham = [dict(HAM_ROW)]
    renamed = [{("name" if k == "sample_id" else k): v for k, v in plain[0].items()}]
    return {
        "missing column": ("generic", write_csv(folder / "1.csv", renamed), "lacks the column 'sample_id'"),
        "duplicate id": ("generic", write_csv(folder / "2.csv", plain * 2), "'Set/a' occurs more than once"),
        "other delimiter": ("generic", write_csv(folder / "3.csv", plain, ";"), "separated by ';'"),
        "table of another layout": ("generic", write_csv(folder / "4.csv", ham), "layout=ham10000"),
        "label out of range": (
            "generic",
            write_csv(folder / "5.csv", [generic_row("a", label=9)]),
            "the label '9' is not valid; 0 to 7",
        ),
        "unknown modality": (
            "generic",
            write_csv(folder / "6.csv", [generic_row("a", label=1, modality="xray")]),
            "clinical, dermoscopic",
        ),
        "duplicate HAM id": (
            "ham10000",
            write_csv(folder / "7.csv", ham * 2),
            "image_id 'ISIC_1' occurs more than once",
        ),
        "generic as HAM10000": ("ham10000", write_csv(folder / "8.csv", plain), "a generic table (layout=generic)"),
        "none of the images": (
            "generic",
            write_csv(folder / "9.csv", [generic_row("z", label=1)]),
            "none of the 1 images",
        ),
    }


@pytest.mark.parametrize("case", range(9))
def test_a_bad_table_gets_one_line_that_names_it(case: int, tmp_path: Path, save_images: Callable[..., Path]) -> None:
    name, (layout, table, message) = list(bad_tables(tmp_path).items())[case]
    with pytest.raises(InputError) as caught:
        read(layout, images=str(save_images("Set/a", "ISIC_1")), table=str(table))
    assert message in str(caught.value), name
    assert str(table) in str(caught.value)


def test_a_missing_folder_or_table_is_named(tmp_path: Path, save_images: Callable[..., Path]) -> None:
    table = write_csv(tmp_path / "t.csv", [generic_row("a", label=1)])
    with pytest.raises(InputError, match="no such folder"):
        read("generic", images=str(tmp_path / "nowhere"), table=str(table))
    with pytest.raises(InputError, match="no such file"):
        read("generic", images=str(save_images("a")), table=str(tmp_path / "u.csv"))
    with pytest.raises(InputError, match="needs table=<path>"):
        read("generic", images=str(tmp_path))


def test_ham10000_is_read_from_its_own_table(tmp_path: Path, save_images: Callable[..., Path]) -> None:
    rows = [dict(HAM_ROW), dict(HAM_ROW, image_id="ISIC_2", dx="bkl", age="", localization="back")]
    table = write_csv(tmp_path / "HAM10000_metadata.csv", rows)
    images = save_images("part_1/ISIC_1", "part_2/ISIC_2")
    one, two = read("ham10000", images=str(images), table=str(table))
    assert (one.label, one.site, one.age, one.lesion_id, one.modality) == (6, None, 50.0, "HAM_1", "dermoscopic")
    assert (two.label, two.site, two.age, two.class_text) == (0, "back", None, "benign keratosis")


def milk10k_tables(folder: Path) -> Path:
    shared = {"attribution": "", "age_approx": "70", "sex": "male", "skin_tone_class": "3", "site": "head_neck_face"}
    pair = [("IL_1", "dermoscopic", "ISIC_1"), ("IL_1", "clinical: close-up", "ISIC_2")]
    rows = [{"lesion_id": a, "image_type": b, "isic_id": c, **shared} for a, b, c in pair]
    truth = dict.fromkeys(["AKIEC", "BCC", "BEN_OTH", "BKL", "DF", "INF", "MAL_OTH", "MEL", "NV", "SCCKA", "VASC"], 0.0)
    write_csv(folder / "X_GroundTruth.csv", [{"lesion_id": "IL_1", **truth, "NV": 1.0}])
    write_csv(folder / "X_Supplement.csv", [{"isic_id": c, "diagnosis_full": "Nevus, Reed"} for _, _, c in pair])
    return write_csv(folder / "X_Metadata.csv", rows)


def test_milk10k_makes_two_data_sets_of_one_lesion(tmp_path: Path, save_images: Callable[..., Path]) -> None:
    table = milk10k_tables(tmp_path)
    dermo, clinic = read("milk10k", images=str(save_images("ISIC_1", "ISIC_2")), table=str(table))
    assert (dermo.dataset, dermo.modality) == ("Milk10k_dermo", "dermoscopic")
    assert (clinic.dataset, clinic.modality) == ("Milk10k_clinic", "clinical")
    assert dermo.lesion_id == clinic.lesion_id == "IL_1"
    assert (dermo.label, dermo.matched_subclass) == (2, "congenital / special-pattern nevi")


def test_a_ground_truth_that_names_no_group_or_several_is_counted_not_compared(
    tmp_path: Path, save_images: Callable[..., Path]
) -> None:
    table = milk10k_tables(tmp_path)
    truth = tmp_path / "X_GroundTruth.csv"
    images = str(save_images("ISIC_1", "ISIC_2"))
    for cells, counted in (("0,0,0", {"IL_1: none": 1}), ("1,1,0", {"IL_1: AKIEC, BCC": 1})):
        truth.write_text(f"{truth.read_text().splitlines()[0]}\nIL_1,{cells}{',0' * 8}\n")
        losses = Losses()
        read("milk10k", losses, images=images, table=str(table))
        assert losses.kinds == {NOT_ONE_GROUP: counted}
    truth.write_text(f"{truth.read_text().splitlines()[0]}\nIL_1,0,1{',0' * 9}\n")
    losses = Losses()
    read("milk10k", losses, images=images, table=str(table))
    assert losses.kinds == {DISAGREE: {"ISIC_1: Nevus, Reed / BCC": 1, "ISIC_2: Nevus, Reed / BCC": 1}}


def test_milk10k_says_which_table_is_missing_or_mistaken(tmp_path: Path, save_images: Callable[..., Path]) -> None:
    table = milk10k_tables(tmp_path)
    images = str(save_images("ISIC_1", "ISIC_2"))
    with pytest.raises(InputError, match="it looks like MILK10k supplement"):
        read("milk10k", images=images, table=str(tmp_path / "X_Supplement.csv"))
    (tmp_path / "X_GroundTruth.csv").unlink()
    with pytest.raises(InputError, match="give ground_truth=<file>"):
        read("milk10k", images=images, table=str(table))


HAM_LAST = (
    "ISIC_0034320"  # of the published table; the ISIC Archive added the later images of the 2018 challenge's test
)


@pytest.mark.parametrize(
    ("layout", "table", "datasets"),
    [
        ("ham10000", "HAM10000_metadata.csv", ["HAM10000"]),
        ("milk10k", "MILK10k_Training_Metadata.csv", ["Milk10k_dermo", "Milk10k_clinic"]),
        ("isic", "isic_archive_milk10k_metadata.csv", ["Milk10k_dermo", "Milk10k_clinic"]),
        ("pad_ufes_20", "pad_ufes_20_metadata.csv", ["PAD_UFES_20"]),
    ],
)
def test_native_labels_agree_with_the_shared_table_for_every_image(
    layout: str, table: str, datasets: list[str], shared_data: Path
) -> None:
    with (shared_data / "metadata.csv").open(encoding="utf-8", newline="") as file:
        given = {(r["dataset"], r["sample_id"]): r for r in csv.DictReader(file) if r["dataset"] in datasets}
    dataset = "Milk10k" if layout == "isic" else ""
    losses = Losses()
    native = str(shared_data / "native" / table)
    records = read(layout, losses, images=str(shared_data / "images"), table=native, dataset=dataset)
    # Not independent for HAM10000's dx "akiec": 197 of its images get their label from the `corrections` of
    # diagnoses.yaml, which come from the same reference table; without them exactly these would differ.
    exceptions = {key for key in given if key[0] == "HAM10000" and key[1] > HAM_LAST}
    assert len(exceptions) == (505 if layout == "ham10000" else 0)
    assert {(record.dataset, record.source_id) for record in records} == set(given) - exceptions
    assert losses.count(REFUSED) == 0
    for record in records:
        row = given[record.dataset, record.source_id]
        assert str(record.label) == row["label"], record.source_id
        assert record.lesion_id == row["lesion_id"]
        assert (record.matched_class, record.matched_subclass) == (row["matched_class"], row["matched_subclass"])
        assert record.age == (float(row["age"]) if row["age"] else None)
        if layout == "pad_ufes_20":
            assert record.fitzpatrick == (int(float(row["fitzpatrick"])) if row["fitzpatrick"] else None)
