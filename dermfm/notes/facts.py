"""From a record's fields to the facts that a note may state, in plain words, and the sentence that states each.

A fact's value is what a note has to say ("compound nevus", "head or neck"), not the data set's own spelling
("nevus, nos, compound", "head_neck_face"). Only the fields that a strategy allows are ever looked at.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dermfm.config import read_yaml
from dermfm.records.measure.columns import SHARE_COLUMNS

Facts = dict[str, str]  # name → plain value, in the order of FACTS; absent where unknown or not allowed

# What each fact is made of, the most specific field first. The order is the order in a prompt and in a note.
FIELDS_OF: dict[str, tuple[str, ...]] = {
    "image": ("modality",),
    "age": ("age",),
    "sex": ("sex",),
    "site": ("site",),
    "asymmetry": ("measured_asymmetry_word",),
    "border": ("measured_border_word",),
    "colours": ("measured_colours",),
    "structures": ("measured_dots", "measured_globules", "measured_structureless"),
    "diagnosis": ("subclass", "class", "matched_class"),
    "malignancy": ("malignancy",),
    "findings": ("findings",),
}
LABEL_FIELDS = ("label", "malignancy", "class", "subclass", "findings", "matched_class", "matched_subclass")
# Measured columns that texts of the strategy `measured` use beside the facts; none of them is made from the label.
DEGREE_FIELDS = (
    "measured_size", "measured_asymmetry", "measured_border_sharpness", "measured_border_irregularity",
    "measured_texture", "measured_skin_tone", *SHARE_COLUMNS,
)  # fmt: skip
VISIBLE_FIELDS = (*(field for fields in FIELDS_OF.values() for field in fields), *DEGREE_FIELDS)
APPEARANCE = ("asymmetry", "border", "colours", "structures")  # facts that an image shows and a table does not hold
# From how many small blobs on, and from which flat share of the lesion's area, a structure is called present. Near the
# medians of public dermoscopic sets, so that the word tells images apart.
MANY_DOTS, MANY_GLOBULES, MUCH_FLAT = 60, 16, 0.25
TERMS = Path(__file__).with_name("terms.yaml")


def visible_facts(record: Mapping[str, Any], fields: Iterable[str]) -> Facts:
    """The facts of `record` that the allowed `fields` give; nothing else of the record is read."""
    allowed = set(fields)
    facts: Facts = {}
    for name, sources in FIELDS_OF.items():
        known = [(field, record.get(field)) for field in sources if field in allowed]
        values = [structure_words(dict(known))] if name == "structures" else (_plain(name, v) for _, v in known)
        if (value := next((v for v in values if v), None)) is not None:
            facts[name] = value
    return facts


def structure_words(measured: Mapping[str, Any]) -> str | None:
    """The structures that the measured counts and shares show, as words; None where none was found or measured."""
    found = [
        ("structureless areas", "measured_structureless", MUCH_FLAT),
        ("dots", "measured_dots", MANY_DOTS),
        ("globules", "measured_globules", MANY_GLOBULES),
    ]
    return join_words(word for word, field, least in found if (measured.get(field) or 0) >= least) or None


def join_words(words: Iterable[str]) -> str:
    """ "red", "red and black", "red, white and black"."""
    *first, last = [*words] or [""]
    return f"{', '.join(first)} and {last}" if first else last


def split_words(value: str) -> list[str]:
    """The words that `join_words` joined."""
    return [word for word in re.split(r", | and ", value) if word]


def patient(facts: Mapping[str, str]) -> str | None:
    """ "55-year-old woman", "woman", "55-year-old patient"; None where neither age nor sex is given."""
    age, sex = facts.get("age"), facts.get("sex")
    if not age and not sex:
        return None
    noun = {"male": "man", "female": "woman", None: "patient"}[sex]
    if age and int(age) < 18:
        noun = {"male": "boy", "female": "girl", None: "patient"}[sex]
    return f"{age}-year-old {noun}" if age else noun


def with_article(phrase: str) -> str:
    """The phrase with its indefinite article: "an 80-year-old man", "a nevus", "an invasive melanoma"."""
    vowel = re.match(r"(?:[aeiou]|8|1[18](?!\d))", phrase.lower()) and not phrase.lower().startswith(("uni", "eu"))
    return f"{'an' if vowel else 'a'} {phrase}"


PLAIN_SENTENCES = {
    "site": "Site: {}.",
    "asymmetry": "The outline is {}.",
    "border": "Border: {}.",
    "colours": "Colours: {}.",
    "structures": "Structures: {}.",
    "diagnosis": "Diagnosis: {}.",
    "malignancy": "The lesion is {}.",
    "findings": "Findings: {}.",
}


def statements(facts: Mapping[str, str]) -> dict[str, str]:
    """The plain sentence for each fact; "age" and "sex" share one, filed under the first of the two given."""
    said: dict[str, str] = {}
    if "image" in facts:
        said["image"] = f"{facts['image'].capitalize()} image of a skin lesion."
    if (who := patient(facts)) is not None:
        said["age" if "age" in facts else "sex"] = f"The patient is {with_article(who)}."
    said |= {name: wording.format(facts[name]) for name, wording in PLAIN_SENTENCES.items() if name in facts}
    return said


def facts_note(facts: Mapping[str, str]) -> str:
    """The note that states exactly the given facts, one plain sentence each: what a failing note is replaced by."""
    return " ".join(statements(facts).values())


def _plain(name: str, value: Any) -> str | None:
    if value is None or value == "":
        return None
    if name == "age":
        return str(round(float(value)))
    if name == "site":
        return plain_site(str(value))
    if isinstance(value, list | tuple):
        return join_words(map(str, value)) or None
    return plain_diagnosis(str(value)) if name == "diagnosis" else str(value).strip()


@functools.cache
def terms() -> dict[str, Any]:
    """`terms.yaml`: plain names, synonyms and word lists."""
    return read_yaml(TERMS)


@functools.cache
def plain_site(site: str) -> str | None:
    """A data set's site as one says it ("head_neck_face" → "head or neck"); None for an unknown one."""
    words = " ".join(re.sub(r"[_/]+", " ", site.lower()).split())
    return None if words in ("", "unknown", "nan", "other") else terms()["plain_sites"].get(words, words)


@functools.cache
def plain_diagnosis(text: str) -> str:
    """A data set's diagnosis as one says it ("nevus, nos, compound" → "compound nevus")."""
    key = " ".join(re.sub(r"\s*-\s+|\s*,\s*", ", ", text.strip()).split())
    if (special := terms()["plain_diagnoses"].get(key.lower())) is not None:
        return special
    head, *rest = [part for part in key.split(", ") if part.lower() != "nos"] or [key]
    if len(rest) == 1 and len(rest[0].split()) == 1:
        return f"{rest[0]} {head}"
    return f"{head} ({', '.join(rest)})" if rest else head
