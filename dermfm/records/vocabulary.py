"""One vocabulary for all data sets: 8 classes, 15 subclasses, malignancy, and the words that map to them.

The table itself is `diagnoses.yaml` beside this file: words of every source, overrides per data set, corrections of
single images. Words that are not in it get no label; nothing is guessed.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dermfm.config import read_yaml

CLASSES: list[str] = [
    "benign/seborrheic keratosis",
    "dermatofibroma",
    "melanocytic / benign nevus",
    "vascular lesion",
    "actinic keratosis",
    "basal cell cancer",
    "melanoma",
    "squamous cell cancer",
]
CLASS_CODES: list[str] = ["SK", "DF", "NEV", "VASC", "AK", "BCC", "MEL", "SCC"]
MALIGNANCIES: list[str] = ["benign", "pre-cancerous", "malignant"]
MALIGNANCY_OF: list[str] = ["benign"] * 4 + ["pre-cancerous"] + ["malignant"] * 3
CLASS_OF_SUBCLASS: dict[str, int] = {
    "actinic keratosis": 4,
    "basal cell carcinoma": 5,
    "benign melanocytic nevus": 2,
    "blue nevus": 2,
    "bowen disease / SCC in situ": 7,
    "congenital / special-pattern nevi": 2,
    "dermatofibroma / fibrous lesions": 1,
    "dysplastic / atypical nevus (clark-type)": 2,
    "lentigo maligna": 6,
    "lichenoid keratosis": 0,
    "melanoma": 6,
    "seborrheic keratosis & pigmented keratoses": 0,
    "solar lentigo": 0,
    "squamous cell carcinoma (invasive)": 7,
    "vascular lesions": 3,
}
SUBCLASSES: list[str] = list(CLASS_OF_SUBCLASS)
MODALITIES: list[str] = ["dermoscopic", "clinical"]
TABLE = Path(__file__).with_name("diagnoses.yaml")

# Data sets whose lesion and patient ids mean the same lesions and patients.
FAMILY_OF: dict[str, str] = {"Milk10k_dermo": "Milk10k", "Milk10k_clinic": "Milk10k"}


@dataclass(frozen=True)
class Diagnosis:
    """What the vocabulary says about one diagnosis text. `label` may differ from `class_label` (a conflict)."""

    label: int
    class_label: int
    subclass: str
    malignancy: str


def word_key(text: str) -> str:
    """The spelling-independent form of a diagnosis: lower case, words separated by single blanks."""
    return " ".join(re.sub(r"[^a-z0-9]+", " ", re.sub(r"['’]", "", text.casefold())).split())


def tidy(text: str | None) -> str | None:
    """A source's text as one reads it ("nevus- nos- compound" → "nevus, nos, compound"); None for empty or "-"."""
    text = " ".join((text or "").replace("\xa0", " ").split()).strip(" ,;")
    return None if text in ("", "-") else re.sub(r"(?<=\w)- ", ", ", text)


def find_diagnosis(dataset: str, texts: Iterable[str | None]) -> Diagnosis | None:
    """The vocabulary's answer for the first of `texts` (most specific first) that it knows; None if it knows none."""
    for text in texts:
        if text and (found := _lookup(dataset, word_key(text))) is not None:
            return found
    return None


def correction(dataset: str, source_id: str) -> str | None:
    """The diagnosis that replaces the one in the data set's own table for this image, or None."""
    return _corrections().get((dataset, source_id))


def malignancy_word(text: str | None) -> str | None:
    """benign | pre-cancerous | malignant from a source's word; None for an empty or unknown one."""
    key = word_key(text or "")
    if "pre cancer" in key or key in ("indeterminate", "precancerous", "premalignant"):
        return "pre-cancerous"
    return key if key in MALIGNANCIES else None


@functools.cache
def vocabulary_table() -> dict[str, Any]:
    """`diagnoses.yaml` as plain containers, with every subclass checked."""
    table = read_yaml(TABLE)
    wrong = set(table["diagnoses"]) - set(SUBCLASSES)
    assert not wrong, f"{TABLE.name} names unknown subclasses {sorted(wrong)}"
    return table


@functools.cache
def _words() -> dict[str, str]:
    """word key → subclass, for all data sets."""
    table = vocabulary_table()["diagnoses"]
    return {word_key(word): subclass for subclass, words in table.items() for word in words}


@functools.cache
def _corrections() -> dict[tuple[str, str], str]:
    entries = vocabulary_table()["corrections"]
    return {
        (dataset, source_id): entry["diagnosis"]
        for dataset, group in entries.items()
        for entry in group
        for source_id in entry["ids"].split()
    }


@functools.cache
def _lookup(dataset: str, key: str) -> Diagnosis | None:
    override = _overrides(dataset).get(key, {})
    subclass = override.get("subclass", _words().get(key))
    if subclass is None:
        return None
    class_label = int(override.get("class", CLASS_OF_SUBCLASS[subclass]))
    malignancy = vocabulary_table()["malignancy"].get(key, MALIGNANCY_OF[class_label])
    return Diagnosis(int(override.get("label", class_label)), class_label, subclass, malignancy)


@functools.cache
def _overrides(dataset: str) -> dict[str, dict[str, Any]]:
    return {word_key(word): entry for word, entry in vocabulary_table()["overrides"].get(dataset, {}).items()}
