"""The vocabulary: words to classes, on the reference study's own tables."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from dermfm.config import read_yaml
from dermfm.records.vocabulary import (
    CLASS_CODES,
    CLASS_OF_SUBCLASS,
    CLASSES,
    MALIGNANCY_OF,
    SUBCLASSES,
    correction,
    find_diagnosis,
    malignancy_word,
    tidy,
)


def test_there_are_eight_classes_and_fifteen_subclasses_in_the_order_of_the_study() -> None:
    assert len(CLASSES) == len(CLASS_CODES) == len(MALIGNANCY_OF) == 8
    assert len(SUBCLASSES) == 15
    assert set(CLASS_OF_SUBCLASS.values()) == set(range(8))
    assert [MALIGNANCY_OF[i] for i in (0, 3, 4, 5, 7)] == [
        "benign",
        "benign",
        "pre-cancerous",
        "malignant",
        "malignant",
    ]


@pytest.mark.parametrize("spelling", ["Nevus, NOS, Compound", "nevus- nos- compound", "NEVUS NOS  COMPOUND"])
def test_the_spelling_of_a_diagnosis_does_not_matter(spelling: str) -> None:
    found = find_diagnosis("any", [spelling])
    assert found is not None
    assert (found.label, found.subclass) == (2, "benign melanocytic nevus")


def test_a_word_is_never_matched_by_its_part() -> None:
    assert find_diagnosis("any", ["melanoma of the eye"]) is None
    assert find_diagnosis("any", ["mel"]) is None
    assert find_diagnosis("any", ["", None]) is None


def test_the_first_known_text_decides() -> None:
    found = find_diagnosis("any", [None, "something unheard of", "melanoma"])
    assert found is not None
    assert found.label == 6


def test_one_text_may_have_another_label_in_another_data_set() -> None:
    text = "squamous cell carcinoma in situ, Bowen's disease"
    elsewhere, milk10k = find_diagnosis("derm12345", [text]), find_diagnosis("Milk10k_dermo", [text])
    assert elsewhere is not None
    assert milk10k is not None
    assert (elsewhere.label, elsewhere.class_label) == (7, 7)
    assert (milk10k.label, milk10k.class_label, milk10k.malignancy) == (4, 7, "malignant")


def test_a_correction_holds_for_exactly_the_listed_image() -> None:
    listed = "ISIC_0024329"
    assert correction("HAM10000", listed) == "squamous cell carcinoma, NOS"
    assert correction("HAM10000", listed[:-1]) is None
    assert correction("MSK", listed) is None


def test_texts_are_tidied_and_malignancy_words_unified() -> None:
    assert tidy("nevus- nos- compound\xa0") == "nevus, nos, compound"
    assert tidy(" - ") is None
    assert tidy("baso-squamous carcinoma") == "baso-squamous carcinoma"
    assert malignancy_word("indeterminate - pre-cancerous") == "pre-cancerous"
    assert malignancy_word("unheard of") is None


def reference_rows(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(data set, row) of the reference study's 15 tables."""
    for table in sorted((folder / "reference_csv").glob("*/classes_subclasses_metadata_mapping.csv")):
        with table.open(encoding="utf-8", newline="") as file:
            yield from ((table.parent.name, row) for row in csv.reader(file))


def listed_defects(root: Path, kind: str) -> dict[tuple[str, str], str]:
    """(data set, id) → reason, from the committed list."""
    entries = read_yaml(root / "results/reference_defects.yaml")[kind]
    return {(entry["dataset"], i): entry["reason"] for entry in entries for i in entry["ids"].split()}


def test_the_mapping_reproduces_the_label_of_every_row_of_the_reference_tables(shared_data: Path, root: Path) -> None:
    rows, unlike, contradicting = 0, set(), set()
    for dataset, row in reference_rows(shared_data):
        source_id, label, malignancy, text, subtext, _, matched_class, matched_subclass = row
        rows += 1
        if CLASSES[int(label)] != matched_class:
            contradicting.add((dataset, source_id))
        found = find_diagnosis(dataset, [subtext, text])
        assert found is not None, row
        # Class and subclass of the text, whatever the label says.
        assert (CLASSES[found.class_label], found.subclass) == (matched_class, matched_subclass), row
        if found.label != int(label):
            unlike.add((dataset, source_id))
            continue
        assert found.malignancy == malignancy_word(malignancy), row
    assert rows == 62693
    # The text of these contradicts label and file name; `corrections` gives their true diagnosis by id.
    assert unlike == {("FLUO_SC", f"CLI_CCE_{i}") for i in range(1, 79)}
    assert {find_diagnosis(d, [correction(d, i)]).label for d, i in unlike} == {7}  # type: ignore[union-attr]
    defects = listed_defects(root, "label")
    assert contradicting == set(defects)
    assert unlike < set(defects)
    assert len(defects) == 493


def test_the_listed_leaks_are_those_of_the_studys_split_files(shared_data: Path, root: Path) -> None:
    leaks = set()
    for folder in (shared_data / "reference_csv").iterdir():
        files = folder.glob("labels_*.csv") if folder.is_dir() else ()
        ids = Counter(Path(line.split(",")[0]).stem for file in files for line in file.read_text().split())
        leaks |= {(folder.name, i) for i, n in ids.items() if n > 1}
    assert leaks == set(listed_defects(root, "split"))
    assert len(leaks) == 79
