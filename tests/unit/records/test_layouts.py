"""Every publisher's layout: small tables with the true columns, read as the publisher ships them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from dermfm.config import InputError, load
from dermfm.records.adapters import ADAPTERS
from dermfm.records.adapters.derm7pt import SHARED
from dermfm.records.adapters.fitzpatrick17k import WRONG
from dermfm.records.adapters.folders import NO_MATCH
from dermfm.records.adapters.isic import NO_TYPE, OTHER_TYPE, REFUSED
from dermfm.records.adapters.mra_midas import CONTROL
from dermfm.records.adapters.reference import NO_IMAGES
from dermfm.records.adapters.tables import UNMAPPED, UNNAMED_IMAGE, UNSPLIT
from dermfm.records.build import RecordsConfig, resolved_sources
from dermfm.records.csvtable import NOT_UTF8
from dermfm.records.source import LAYOUTS, Losses, Reading, SourceConfig
from dermfm.records.splits import TWICE
from dermfm.records.table import Record

from .conftest import write_csv

Save = Callable[..., Path]


def read(layout: str, losses: Losses | None = None, **source: object) -> list[Record]:
    config = SourceConfig(layout=layout, **source)  # type: ignore[arg-type]
    return ADAPTERS[layout](config, Reading(Path("."), losses=losses or Losses()))


def from_config(root: Path, name: str, losses: Losses, **source: object) -> list[Record]:
    """Records by configs/data/<name>.yaml, as the command line reads it."""
    settings = [f"{key}={value}" for key, value in source.items()]
    config = load(RecordsConfig, root / f"configs/data/{name}.yaml", [*settings, "out=r.parquet"])
    (only,) = resolved_sources(config)
    return ADAPTERS[only.layout](only, Reading(Path("."), losses=losses))


def test_every_layout_has_a_config_that_says_where_the_data_comes_from(root: Path) -> None:
    seen = set()
    for path in sorted((root / "configs/data").glob("*.yaml")):
        assert path.read_text(encoding="utf-8").startswith("# "), path.name
        config = load(RecordsConfig, path, ["out=r.parquet"])
        seen |= {source.layout for source in resolved_sources(config)}
    assert seen == set(LAYOUTS)


def test_pad_ufes_20_is_read_from_its_own_table(tmp_path: Path, save_images: Save, root: Path) -> None:
    table = tmp_path / "metadata.csv"
    table.write_text(
        "patient_id,lesion_id,smoke,drink,background_father,background_mother,age,pesticide,gender,"
        "skin_cancer_history,cancer_history,has_piped_water,has_sewage_system,fitspatrick,region,diameter_1,diameter_2,"
        "diagnostic,itch,grew,hurt,changed,bleed,elevation,img_id,biopsed\n"
        "PAT_46,881,False,False,POMERANIA,POMERANIA,55,False,FEMALE,True,True,True,True,3.0,NECK,6.0,5.0,BCC,True,"
        "True,False,True,True,True,PAT_46_881_939.png,True\n"
    )
    images = save_images("imgs_part_1/PAT_46_881_939")
    (record,) = from_config(root, "pad_ufes_20", Losses(), images=images, table=table)
    assert (record.dataset, record.source_id, record.modality) == ("PAD_UFES_20", "PAT_46_881_939", "clinical")
    assert (record.lesion_id, record.patient_id) == ("PAT_46_881", "PAT_46")
    assert (record.label, record.malignancy, record.fitzpatrick) == (5, "malignant", 3)
    assert (record.age, record.sex, record.site, record.licence) == (55.0, "female", "neck", "CC BY 4.0")


ISIC_COLUMNS = (
    "isic_id,attribution,copyright_license,age_approx,anatom_site_general,diagnosis_1,diagnosis_2,diagnosis_3,"
    "diagnosis_4,image_type,lesion_id,patient_id,sex,fitzpatrick_skin_type"
)
ISIC_CELLS = (
    "x,CC-0,70,head/neck,Benign,Benign melanocytic proliferations,Nevus,Nevus; Reed,dermoscopic,IL_1234567,IP_1234567,"
    "male,II"
)


def isic_row(isic_id: str, **cells: str) -> dict[str, object]:
    texts = [isic_id, *(cell.replace(";", ",") for cell in ISIC_CELLS.split(","))]
    return {**dict(zip(ISIC_COLUMNS.split(","), texts, strict=True)), **cells}


def test_an_isic_export_is_read_with_the_most_specific_diagnosis(tmp_path: Path, save_images: Save, root: Path) -> None:
    table = write_csv(tmp_path / "metadata.csv", [isic_row("ISIC_0000001")])
    (record,) = from_config(root, "bcn20000", Losses(), images=save_images("ISIC_0000001"), table=table)
    assert (record.dataset, record.label, record.subclass_text) == ("BCN20000", 2, "nevus, reed")
    assert (record.matched_subclass, record.class_text) == ("congenital / special-pattern nevi", "nevus")
    assert (record.findings, record.site) == ("benign melanocytic proliferations", "head/neck")
    assert (record.lesion_id, record.patient_id, record.fitzpatrick) == ("IL_1234567", "IP_1234567", 2)
    assert (record.licence, record.age) == ("CC-0", 70.0)


def test_an_isic_export_of_milk10k_becomes_two_data_sets_and_confocal_images_are_left_out(
    tmp_path: Path, save_images: Save, root: Path
) -> None:
    types = ["dermoscopic", "clinical: close-up", "RCM: mosaic", ""]
    rows = [isic_row(f"ISIC_000000{i}", image_type=kind) for i, kind in enumerate(types)]
    losses = Losses()
    images = save_images(*(str(row["isic_id"]) for row in rows))
    records = from_config(root, "milk10k-isic", losses, images=images, table=write_csv(tmp_path / "metadata.csv", rows))
    assert [record.dataset for record in records] == ["Milk10k_dermo", "Milk10k_clinic"]
    # Their images have a row, so that they are not told as strangers too.
    assert (losses.count(OTHER_TYPE), losses.count(NO_TYPE), losses.count(UNNAMED_IMAGE)) == (1, 1, 0)
    with pytest.raises(InputError, match="no row has an image type that is read"):
        from_config(root, "milk10k-isic", losses, images=images, table=write_csv(tmp_path / "metadata.csv", rows[2:]))


def test_rows_that_the_archives_schema_refuses_are_counted_and_kept_unless_they_are_most(
    tmp_path: Path, save_images: Save
) -> None:
    good = [isic_row(f"ISIC_000000{i}") for i in range(3)]
    bad = isic_row("ISIC_0000009", sex="unknown")
    images = str(save_images(*(f"ISIC_000000{i}" for i in (0, 1, 2, 9))))
    losses = Losses()
    table = write_csv(tmp_path / "a.csv", [*good, bad])
    records = read("isic", losses, images=images, table=str(table), dataset="MSK")
    assert len(records) == 4
    assert losses.count(REFUSED) == 1
    assert "ISIC_0000009: sex" in losses.lines()[0]
    table = write_csv(tmp_path / "b.csv", [good[0], bad, dict(bad, isic_id="ISIC_0000001")])
    with pytest.raises(InputError, match="refuses 2 of 3 rows, first ISIC_0000009: sex"):
        read("isic", images=images, table=str(table), dataset="MSK")
    with pytest.raises(InputError, match="needs dataset=<name>"):
        read("isic", images=images, table=str(table))


DERM7PT_COLUMNS = (
    "case_num,diagnosis,seven_point_score,pigment_network,streaks,pigmentation,regression_structures,"
    "dots_and_globules,blue_whitish_veil,vascular_structures,level_of_diagnostic_difficulty,elevation,location,sex,"
    "management,clinic,derm,case_id,notes"
)


def derm7pt_row(case: int, derm: str, clinic: str, diagnosis: str = "clark nevus") -> dict[str, object]:
    criteria = "2,atypical,absent,absent,absent,irregular,absent,absent,low,flat,back,female,excision"
    cells = [str(case), diagnosis, *criteria.split(","), clinic, derm, "", ""]
    return dict(zip(DERM7PT_COLUMNS.split(","), cells, strict=True))


def derm7pt_tables(folder: Path, **indexes: list[int]) -> Path:
    rows = [
        derm7pt_row(1, "NEL/Nel026.jpg", "NEL/NEL025.JPG"),
        derm7pt_row(2, "NEL/Nel028.jpg", "NEL/NEL027.JPG", "melanoma (less than 0.76 mm)"),
        derm7pt_row(3, "NEL/Nel033.jpg", "NEL/NEL027.JPG", "melanosis"),
    ]
    for split, numbers in indexes.items():
        write_csv(folder / f"{split}_indexes.csv", [{"indexes": n} for n in numbers])
    return write_csv(folder / "meta.csv", rows)


def test_a_derm7pt_case_is_two_records_of_one_lesion_with_the_publishers_split(
    tmp_path: Path, save_images: Save
) -> None:
    table = derm7pt_tables(tmp_path / "meta", train=[0], valid=[1], test=[2, 1])
    images = save_images(*(f"NEL/{name}" for name in ("Nel026", "NEL025", "Nel028", "NEL027", "Nel033")))
    losses = Losses()
    records = read("derm7pt", losses, images=str(images), table=str(table), splits="given")
    assert [(r.source_id, r.modality) for r in records[:2]] == [("Nel026", "dermoscopic"), ("NEL025", "clinical")]
    assert records[0].lesion_id == records[1].lesion_id
    assert "pigment network: atypical" in (records[0].findings or "")
    assert [r.label for r in records] == [2, 2, 6, 6, None]
    assert [r.given_split for r in records] == ["train", "train", "test", "test", "test"]
    # Row 1 stands in two index files; case 3 names the clinical photograph of case 2.
    assert (losses.count(TWICE), losses.count(SHARED)) == (1, 1)
    assert records[4].lesion_id == records[3].lesion_id
    assert read("derm7pt", images=str(images), table=str(table))[0].given_split is None


def test_a_derm7pt_index_that_is_no_row_is_named(tmp_path: Path, save_images: Save) -> None:
    table = derm7pt_tables(tmp_path / "meta", train=[0], valid=[1], test=[3])
    with pytest.raises(InputError, match=r"test_indexes.csv: '3' is no row of .*; valid: 0 to 2"):
        read("derm7pt", images=str(save_images("NEL/Nel026")), table=str(table), splits="given")
    (tmp_path / "meta" / "test_indexes.csv").unlink()
    with pytest.raises(InputError, match=r"test_indexes\.csv: no such file"):
        read("derm7pt", images=str(save_images("NEL/Nel026")), table=str(table), splits="given")


def test_fitzpatrick17k_keeps_skin_types_and_gives_no_label_to_rows_marked_wrong(
    tmp_path: Path, save_images: Save, root: Path
) -> None:
    shared = {"nine_partition_label": "", "three_partition_label": "", "url": "", "url_alphanum": ""}
    rows = [
        {"md5hash": "aa", "fitzpatrick_scale": "5", "fitzpatrick_centaur": "4", "label": "lichen planus", "qc": ""},
        {"md5hash": "bb", "fitzpatrick_scale": "-1", "fitzpatrick_centaur": "-1", "label": "melanoma",
         "qc": "3 Wrongly labelled"},
    ]  # fmt: skip
    table = write_csv(tmp_path / "fitzpatrick17k.csv", [{**row, **shared} for row in rows])
    losses = Losses()
    one, two = from_config(root, "fitzpatrick17k", losses, images=save_images("aa", "bb"), table=table)
    assert (one.label, one.fitzpatrick, one.modality, one.test_only) == (0, 5, "clinical", True)
    assert (two.label, two.fitzpatrick, two.subclass_text) == (None, None, "melanoma")
    assert losses.count(WRONG) == 1


MIDAS = [
    ("s-prd-1.jpg", "dscope", "malignant- bcc", "no"),
    ("s-prd-2.jpeg", "6in", "benign-melanocytic nevus", "no"),
    ("s-prd-3.jpg", "1ft", "", "no"),
    ("s-prd-4.jpg", "1ft", "", "yes"),
    ("s-prd-5.jpg", "n/a - virtual", "other- melanocytic lesion, possible re-excision (severe, spitz, aimp)", "no"),
]


def midas_rows() -> list[dict[str, object]]:
    return [
        {
            "": i, "midas_record_id": 7, "midas_file_name": name, "midas_iscontrol": control,
            "midas_distance": distance, "midas_location": "l cheek", "midas_path": path,
            "midas_pathreport": "report", "midas_gender": "female", "midas_age": 71,
            "midas_fitzpatrick": "iii darker white skin", "midas_melanoma": "no", "length_(mm)": 5,
        }
        for i, (name, distance, path, control) in enumerate(MIDAS)
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", ["csv", "xlsx"])
def test_mra_midas_is_read_from_sheet_and_csv(suffix: str, tmp_path: Path, save_images: Save, root: Path) -> None:
    rows = midas_rows()
    table = tmp_path / f"release_midas.{suffix}"
    if suffix == "csv":
        write_csv(table, rows)
    else:
        openpyxl = pytest.importorskip("openpyxl")
        book = openpyxl.Workbook()
        for line in [list(rows[0]), *(list(row.values()) for row in rows)]:
            book.active.append([None if cell == "" else cell for cell in line])
        book.save(table)
    losses = Losses()
    images = save_images(*(f"s-prd-{i}" for i in range(1, 6)))
    records = from_config(root, "mra_midas", losses, images=images, table=table)
    assert [r.label for r in records] == [5, 2, None, 2]
    assert [r.modality for r in records] == ["dermoscopic", "clinical", "clinical", "clinical"]
    assert {(r.patient_id, r.fitzpatrick, r.age, r.sex) for r in records} == {("7", 3, 71.0, "female")}
    assert (losses.count(CONTROL), losses.count(UNNAMED_IMAGE)) == (1, 0)


PH2 = """\
||   Name ||   Histological Diagnosis || Clinical Diagnosis || Asymmetry | Pigment Network | Dots/Globules | Streaks | \
Regression Areas | Blue-Whitish Veil ||           Colors ||
|| IMD003 ||                        ||                  0 ||         0 |               T |             A |       A |\
                A |                 A ||                4 ||
|| IMD058 || Melanoma superficial   ||                  2 ||         2 |              AT |            AT |       P |\
                P |                 P ||             3  4 ||

Legends:
Asymmetry: 0 - Fully Symmetric
"""


def ph2_images(folder: Path) -> Path:
    for name in ("IMD003", "IMD058"):
        for kind, file in (("Dermoscopic_Image", name), ("lesion", f"{name}_lesion")):
            path = folder / "PH2 Dataset images" / name / f"{name}_{kind}" / f"{file}.bmp"
            path.parent.mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(path)
    return folder


def test_ph2_is_read_from_its_text_file_and_masks_are_no_images(tmp_path: Path, root: Path) -> None:
    (tmp_path / "PH2_dataset.txt").write_text(PH2)
    losses = Losses()
    images = ph2_images(tmp_path / "PH2Dataset")
    one, two = from_config(root, "ph2", losses, images=images, table=tmp_path / "PH2_dataset.txt")
    assert (one.label, one.matched_subclass, two.label) == (2, "benign melanocytic nevus", 6)
    assert one.path.name == "IMD003.bmp"
    assert one.findings == (
        "asymmetry: symmetric; pigment network: typical; dots/globules: absent; streaks: absent; "
        "regression areas: absent; blue-whitish veil: absent; colours: dark brown"
    )
    assert (two.findings or "").endswith("colours: light brown, dark brown")
    assert losses.count(UNNAMED_IMAGE) == 0
    (tmp_path / "bad.txt").write_text(PH2.replace("IMD058", "      "))
    with pytest.raises(InputError, match="row 3 has an empty 'name'"):
        from_config(root, "ph2", losses, images=images, table=tmp_path / "bad.txt")
    (tmp_path / "bad.txt").write_bytes(PH2.replace("Melanoma superficial", "Melanoma — in situ").encode("cp1252"))
    from_config(root, "ph2", losses, images=images, table=tmp_path / "bad.txt")
    assert losses.count(NOT_UTF8) == 1


def test_the_sheet_of_ph2_says_the_same_as_its_text_file(tmp_path: Path, root: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    header = [
        "Image Name", "Histological Diagnosis", "Common Nevus", "Atypical Nevus", "Melanoma", "Asymmetry\n(0/1/2)",
        "Pigment Network\n(AT/T)", "Dots/Globules\n(A/AT/T)", "Streaks\n(A/P)", "Regression Areas\n(A/P)",
        "Blue-Whitish Veil\n(A/P)", "White", "Red", "Light-Brown", "Dark-Brown", "Blue-Gray", "Black",
    ]  # fmt: skip
    one = ["IMD003", None, "X", None, None, 0, "T", "A", "A", "A", "A", None, None, None, "X", None, None]
    two = ["IMD058", "Melanoma superficial", None, None, "X", 2, "AT", "AT", "P", "P", "P", None, None, "X", "X"]
    for line in (["PH2 database"], [None], header, one, [*two, None, None]):
        book.active.append(line)
    book.save(tmp_path / "PH2_dataset.xlsx")
    (tmp_path / "PH2_dataset.txt").write_text(PH2)
    images = ph2_images(tmp_path / "PH2Dataset")
    both = [
        from_config(root, "ph2", Losses(), images=images, table=tmp_path / f"PH2_dataset.{suffix}")
        for suffix in ("txt", "xlsx")
    ]
    assert both[0] == both[1]


@pytest.mark.parametrize(
    ("config", "image", "expected"),
    [
        ("dermnet", "train/Actinic Keratosis and others/actinic-keratosis-face-21", (4, "actinic keratosis face")),
        ("dermnet", "test/Melanoma/malignant-melanoma-8", (6, "malignant melanoma")),
        ("dermnet", "train/Acne/acne-cystic-4", (None, "acne cystic")),
        ("fluo_sc", "SCC/CLI_CCE_12", (7, "squamous cell carcinoma")),
        ("sd198", "Bowen's_Disease/012345HB", (4, "bowen's disease")),
        ("skinl2", "Melanoma/0121_2_Dermatoscopic", (6, "melanoma")),
    ],
)
def test_class_folders_are_read_by_the_pattern_of_their_config(
    config: str, image: str, expected: tuple[int | None, str], save_images: Save, root: Path
) -> None:
    (record,) = from_config(root, config, Losses(), images=save_images(image))
    assert (record.label, record.subclass_text) == expected
    assert record.source_id == image.rpartition("/")[2]
    if config == "skinl2":
        assert (record.lesion_id, record.modality) == ("0121", "dermoscopic")


def test_class_folders_name_what_is_wrong_with_a_pattern(save_images: Save) -> None:
    images = str(save_images("Melanoma/a", "Nevus/b"))
    source = {"images": images, "dataset": "X", "modality": "clinical"}
    losses = Losses()
    assert len(read("folders", losses, **source, pattern="^(?P<diagnosis>Nevus)/")) == 1
    assert {kind: losses.count(kind) for kind in losses.kinds} == {NO_MATCH: 1}
    cases = {"(": "is no regular expression", "a": "needs the group", "(?P<diagnosis>x)x": "matches none"}
    for pattern, message in cases.items():
        with pytest.raises(InputError, match=message):
            read("folders", **source, pattern=pattern)
    with pytest.raises(InputError, match="needs modality=<value>"):
        read("folders", images=images, dataset="X")


def test_captions_are_kept_whole_as_findings_and_say_the_modality(tmp_path: Path, save_images: Save) -> None:
    shared = {"truncated_caption": "", "source": "youtube", "source_type": "edu", "symptoms": "No symptom information"}
    rows = [
        {"filename": "youtube/a.jpg", "caption": "A dark mole, seen in dermoscopy.", "disease_label": "Nevus",
         "hierarchical_disease_label": "neoplastic, melanocytic, Nevus", "skin_concept": "", "body_location": "face"},
        {"filename": "youtube/a.jpg", "caption": "A second caption.", "disease_label": "Nevus",
         "hierarchical_disease_label": "", "skin_concept": "", "body_location": ""},
        {"filename": "pubmed/a.png", "caption": "A red plaque.", "disease_label": "No definitive diagnosis",
         "hierarchical_disease_label": "No definitive diagnosis", "skin_concept": "plaque",
         "body_location": "No body location information"},
    ]  # fmt: skip
    table = write_csv(tmp_path / "Derm1M_v2_pretrain.csv", [{**row, **shared} for row in rows])
    losses = Losses()
    images = save_images("youtube/a", "pubmed/a")
    one, two = read("derm1m", losses, images=str(images), table=str(table))
    assert (one.source_id, one.modality, one.label, one.site) == ("youtube/a", "dermoscopic", 2, "face")
    assert one.findings == "A dark mole, seen in dermoscopy.\n\nA second caption."
    assert (two.source_id, two.modality, two.label, two.site) == ("pubmed/a", "clinical", None, None)
    assert two.path == images / "pubmed" / "a.jpg"
    assert losses.lines() == [f"{UNMAPPED}: 1 (Derm1M: (empty))"]


def reference_folder(folder: Path) -> Path:
    """Two data sets in the study's layout: Derm7pt with a leak and an unsplit row, and SD198."""
    rows = {
        "Derm7pt": [(name, "5", "malignant", "basal cell cancer") for name in ("Nel026", "Nel028", "Nel033", "Nel035")],
        "SD198": [("000493HB", "4", "indeterminate - pre-cancerous", "actinic keratosis")],
    }
    for dataset, lines in rows.items():
        (folder / dataset).mkdir(parents=True)
        text = "".join(f"{i},{label},{m},{name},{name},-,x,y\n" for i, label, m, name in lines)
        (folder / dataset / "classes_subclasses_metadata_mapping.csv").write_text(text)
    for split, names in {"train": ["Nel026"], "valid": ["Nel028", "Nel033"], "test": ["Nel033"]}.items():
        (folder / "Derm7pt" / f"labels_{split}.csv").write_text("".join(f"{name}.png,5\n" for name in names))
    return folder


def test_the_studys_own_split_is_taken_when_asked_for_and_its_leaks_are_named(
    tmp_path: Path, save_images: Save, root: Path
) -> None:
    table = reference_folder(tmp_path / "csv")
    images = save_images(*(f"Derm7pt/{name}" for name in ("Nel026", "Nel028", "Nel033", "Nel035")))
    losses = Losses()
    records = from_config(root, "reference", losses, images=images, table=table, splits="given")
    assert [r.given_split for r in records] == ["train", "valid", "test"]
    assert losses.kinds[TWICE] == {"Derm7pt/Nel033 in valid and test": 1}
    assert losses.kinds[UNSPLIT] == {"Derm7pt": 1}
    assert losses.kinds[NO_IMAGES] == {"SD198": 1}
    by_lesion = from_config(root, "reference", Losses(), images=images, table=table)
    assert [r.given_split for r in by_lesion] == [None] * 4
    with pytest.raises(InputError, match="layout=reference takes the folder"):
        read("reference", images=str(images), table=str(table / "SD198/classes_subclasses_metadata_mapping.csv"))
    with pytest.raises(InputError, match=r"holds no classes_subclasses_metadata_mapping\.csv"):
        read("reference", images=str(images), table=str(tmp_path / "images"))
