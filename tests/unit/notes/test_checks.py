"""Faithfulness checks, on sentences labelled by hand."""

from __future__ import annotations

import re

import pytest

from dermfm.notes.ages import AGES
from dermfm.notes.checks import class_of, find_faults
from dermfm.notes.claims import normalise
from dermfm.notes.phrases import any_of
from dermfm.notes.repair import repair_note

FACTS = {
    "image": "dermoscopic",
    "age": "55",
    "sex": "female",
    "site": "back",
    "diagnosis": "compound nevus",
    "malignancy": "benign",
}
MELANOMA = {"image": "clinical", "diagnosis": "melanoma in situ", "malignancy": "malignant"}
KERATOSIS = {"image": "clinical", "diagnosis": "actinic keratosis", "malignancy": "pre-cancerous"}

MEASURED = {
    "image": "dermoscopic",
    "asymmetry": "asymmetric",
    "border": "indistinct",
    "colours": "light brown and dark brown",
}

BASE = "Dermoscopic image of a compound nevus on the back of a 55-year-old woman. It is a benign lesion."
FAITHFUL = [
    (FACTS, "Dermoscopic image of a compound nevus on the back of a 55-year-old woman. It is a benign lesion."),
    (FACTS, "A 55-year-old female patient has a benign lesion on her back; dermoscopy shows a compound nevus."),
    (FACTS, "Dermoscopy: compound nevus on the back of a woman aged 55. The lesion is benign and not malignant."),
    (MELANOMA, "The clinical image shows a melanoma in situ. The lesion is malignant."),
    (MELANOMA, "The clinical image shows a melanoma in situ, which is not benign but malignant."),
    (FACTS, BASE + " Melanoma is unlikely."),
    (FACTS, BASE + " Basal cell carcinoma is unlikely."),
    (FACTS, BASE + " Seborrheic keratosis was ruled out."),
    (KERATOSIS, "The clinical photograph shows an actinic keratosis, a pre-cancerous skin lesion."),
    (KERATOSIS, "Clinical photo: AK, premalignant, not yet a cancer."),
    (FACTS, "F, 55. Back. Dermoscopy: compound mole. Benign."),
    (FACTS, "A nevus of compound type (benign) on the back of a patient of 55, dermoscopically imaged; sex: F."),
    (FACTS, BASE + " Melanoma, basal cell carcinoma and squamous cell carcinoma can be excluded."),
    (FACTS, BASE + " It is not only benign but typical."),
    (MEASURED, "Dermoscopy: the halves do not match, its edges melt into the surrounding skin; light and dark brown."),
    (MEASURED, "Asymmetric, the outline hard to trace, two browns (light and dark), in a dermoscopic image."),
]
FAULTY = [
    (FACTS, BASE.replace(" on the back", ""), "missing: site"),
    (FACTS, BASE.replace("55-year-old ", ""), "missing: age"),
    (FACTS, BASE.replace("55", "65"), "contradiction: age (65)"),
    (FACTS, BASE.replace("woman", "man"), "contradiction: sex (man)"),
    (FACTS, BASE.replace("back", "vulva"), "contradiction: site (vulva)"),
    (FACTS, BASE.replace("compound nevus", "melanoma"), "contradiction: diagnosis (melanoma)"),
    (FACTS, BASE.replace("compound nevus", "lesion"), "missing: diagnosis"),
    (FACTS, BASE.replace("a compound", "no compound"), "contradiction: diagnosis (not nevus)"),
    (FACTS, BASE.replace("benign", "malignant"), "contradiction: malignancy (malignant)"),
    (FACTS, BASE.replace("is a benign", "is not a benign"), "contradiction: malignancy (not benign)"),
    (FACTS, BASE.replace("Dermoscopic", "Clinical"), "contradiction: image (clinical image)"),
    (FACTS, BASE + " Melanoma is not excluded.", "contradiction: diagnosis (melanoma)"),
    (FACTS, BASE + " It measures 4 mm.", "unsupported: size (4 mm)"),
    (FACTS, BASE + " She has a history of itching.", "unsupported: symptom (itching)"),
    (FACTS, BASE + " It is a rare lesion.", "unsupported: other (rare)"),
    (FACTS, BASE + " It is a rare", "unfinished"),
    (FACTS, BASE + " " + BASE, "repetition"),
    (FACTS, "I'm sorry, I cannot write a note.", "refusal (i cannot)"),
    (FACTS, "", "empty"),
    (FACTS, BASE + " The lesion is shown." * 40, "too long"),
    (MELANOMA, "The clinical image shows a melanoma in situ, a non-malignant lesion.", "missing: malignancy"),
    (MELANOMA, "The clinical image shows a melanoma. The lesion is malignant.", "missing: diagnosis"),
    (MELANOMA, "The clinical image of a man shows a malignant melanoma in situ.", "unsupported: sex (man)"),
    (MELANOMA, "The clinical image shows a melanoma in situ on the leg. It is malignant.", "unsupported: site (leg)"),
    (
        MELANOMA,
        "A 60-year-old patient. Clinical image: malignant melanoma in situ.",
        "unsupported: age (60-year-old)",
    ),
    (
        KERATOSIS,
        "The clinical image shows actinic keratosis, a malignant lesion.",
        "contradiction: malignancy (malignant)",
    ),
    (KERATOSIS, "The clinical image shows actinic keratosis. It is not pre-cancerous.", "missing: malignancy"),
    (FACTS, BASE + " It is malignant.", "self-contradiction: malignancy"),
    (FACTS, BASE + " She is no longer 55 but 56 years old.", "self-contradiction: age"),
    (FACTS, BASE + " A wart is seen.", "contradiction: diagnosis (wart)"),
    (FACTS, BASE + " It could be followed up in six months.", "unsupported: treatment (six months)"),
    (FACTS, BASE + " It has slowly darkened.", "unsupported: history (has slowly darkened)"),
    (FACTS, BASE + " She should return.", "unsupported: treatment (should return)"),
    (FACTS, BASE + " It is star-like.", "unsupported: appearance (star-like)"),
    (MEASURED, "Dermoscopic image: perfect symmetry.", "contradiction: asymmetry (perfect symmetry)"),
    (MEASURED, "Dermoscopic image: the margin is crisply cut.", "contradiction: border (crisply cut)"),
]


@pytest.mark.parametrize(("facts", "text"), FAITHFUL)
def test_a_faithful_note_has_no_fault(facts, text):
    assert find_faults(text, facts) == []


@pytest.mark.parametrize(("facts", "text", "fault"), FAULTY)
def test_each_kind_of_fault_is_found(facts, text, fault):
    assert fault in find_faults(text, facts)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A woman, 3 papules on the arm.", set()),
        ("Photographed from 5m.", set()),
        ("62f with a nevus.", {"62"}),
        ("A woman (45) with a nevus.", {"45"}),
        ("Female, 50, with a nevus.", {"50"}),
    ],
)
def test_counts_and_distances_are_no_ages(text, found):
    clean = normalise(text)
    assert {m[1] for pattern in AGES for m in pattern.finditer(clean)} == found


def test_a_nevus_that_belongs_to_the_given_melanoma_contradicts_nothing():
    facts = {"diagnosis": "melanoma in situ associated with a nevus", "malignancy": "malignant"}
    text = "The diagnosis is melanoma in situ associated with a nevus. The lesion is malignant."
    assert find_faults(text, facts) == []


def test_the_word_cancer_in_a_class_name_says_nothing_about_malignancy():
    facts = {"diagnosis": "basal cell cancer", "malignancy": "malignant"}
    assert "missing: malignancy" in find_faults("The diagnosis is basal cell cancer.", facts)


@pytest.mark.parametrize(
    ("diagnosis", "code"),
    [
        ("hemangioma", "VASC"),
        ("keratoacanthoma", "SCC"),
        ("compound nevus", "NEV"),
        ("lentigo maligna", "MEL"),
        ("x", None),
    ],
)
def test_a_diagnosis_belongs_to_its_class(diagnosis, code):
    assert class_of(diagnosis) == code


@pytest.mark.parametrize("text", ["a mole", "no mole", "mole", "moles", "a moles"])
def test_of_many_phrases_the_longest_is_found(text):
    found = re.search(any_of(["mole", "moles", "a mole", "no mole"]), text)
    assert found is not None
    assert found[0] == {"a moles": "a mole"}.get(text, text)


def test_repair_removes_what_is_invented_and_states_what_is_missing():
    text = "The dermoscopic image shows a compound nevus on the back. It is rare. The lesion is benign."
    mended = repair_note(text, FACTS)
    assert mended is not None
    assert "rare" not in mended
    assert "55-year-old woman" in mended
    assert find_faults(mended, FACTS) == []


def test_a_note_without_one_sound_sentence_is_not_repaired():
    assert repair_note("It is a rare melanoma.", FACTS) is None


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("Dermoscpy of a compuond nevus on the back of a 55-year-old woman; it is bening.", FACTS),
        ("Dermosc.: compoundnevus, back, female, 55, benign.", FACTS),
        ("Clinical image: melanoma in situ (malig.).", MELANOMA),
    ],
)
def test_misspelt_cut_and_joined_words_state_the_given_facts(text, facts):
    assert find_faults(text, facts) == []


def test_a_word_that_is_only_somewhat_like_a_given_one_is_not_put_right():
    assert "missing: diagnosis" in find_faults("The clinical image shows a keraxis. It is pre-cancerous.", KERATOSIS)


@pytest.mark.timeout(60)  # a pattern that backtracks without end takes hours, any other a few milliseconds
@pytest.mark.parametrize("word", ["bilateral", "symmetrical", "no", "sharp", "nevus", "border,", "or", "melanoma or"])
def test_a_text_of_one_word_over_and_over_is_judged_like_any_other(word):
    facts = FACTS | {"asymmetry": "symmetric", "border": "sharp", "colours": "red"}
    assert "missing: site" in find_faults(f"The lesion is {' '.join([word] * 120)}.", facts)
