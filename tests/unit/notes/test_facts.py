"""Facts in plain words."""

from __future__ import annotations

import pytest

from dermfm.notes.checks import find_faults
from dermfm.notes.facts import facts_note, plain_diagnosis, plain_site, visible_facts, with_article
from dermfm.notes.strategies import FIXED


@pytest.mark.parametrize(
    ("spelled", "plain"),
    [
        ("nevus, nos, compound", "compound nevus"),
        ("nevus- nos- compound", "compound nevus"),
        ("melanoma- nos", "melanoma"),
        ("squamous cell carcinoma, invasive", "invasive squamous cell carcinoma"),
        ("nevus, atypical, dysplastic, or clark", "dysplastic nevus"),
        ("blue nevus", "blue nevus"),
    ],
)
def test_a_diagnosis_is_said_in_plain_words(spelled, plain):
    assert plain_diagnosis(spelled) == plain


def test_a_site_is_said_in_plain_words_and_an_unknown_one_is_not_said():
    assert plain_site("head_neck_face") == "head or neck"
    assert plain_site("UNKNOWN") is None


@pytest.mark.parametrize(
    ("phrase", "said"),
    [("80-year-old man", "an"), ("18-year-old man", "an"), ("11-year-old girl", "an"), ("1-year-old boy", "a")],
)
def test_the_article_fits_the_number(phrase, said):
    assert with_article(phrase) == f"{said} {phrase}"


def test_only_allowed_fields_give_facts(record):
    facts = visible_facts(record("a"), ["age", "site"])
    assert facts == {"age": "55", "site": "back"}


def test_the_plain_note_of_all_facts_passes_its_own_checks(record):
    for label in (2, 5, 6):
        facts = visible_facts(record("a", label), ["modality", "age", "sex", "site", "subclass", "malignancy"])
        assert find_faults(facts_note(facts), facts) == []


def test_the_template_has_the_four_items_of_the_reference_and_no_patient(record):
    text = FIXED["template"].fallback(record("a", findings="benign melanocytic proliferations"))
    assert text == (
        "The lesion is benign. Diagnosis: nevus (compound nevus). Findings: benign melanocytic proliferations. "
        "Category: melanocytic / benign nevus (benign melanocytic nevus)."
    )


def test_the_label_note_is_the_bare_class_name(record):
    assert FIXED["label"].fallback(record("a", 5)) == "basal cell cancer"
    assert FIXED["label"].fallback({**record("a", 5), "label": None, "matched_class": None}) is None
