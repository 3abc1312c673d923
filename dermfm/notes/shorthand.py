"""Clinical shorthand in a note, written out: "58 y/o M, BCC" is "58-year-old male, basal cell carcinoma"."""

from __future__ import annotations

import re

# What it looks like in lower case, and what it stands for; in this order
SHORTHAND = (
    (re.compile(r"\b(\d{1,3}) ?-?(?:y/o|y\.o\.?|yo|yrs?[- ]old)\b"), r"\1-year-old"),
    (re.compile(r"\b(\d{1,3}) ?(?:yrs?)\b\.?"), r"\1 years"),
    (re.compile(r"\b(\d{1,3}) ?y(?:rs?|ears?)?\.?(?: old)? (?=(?:fe)?male\b|(?:wo)?man\b|[mf]\b)"), r"\1-year-old "),
    (re.compile(r"\babd\b\.?"), "abdomen"),
    (re.compile(r"\bclin\b\.?"), "clinical"),
    (re.compile(r"\bderm\. (?=image|photo|picture)"), "dermoscopic "),
    (re.compile(r"\bpt\b\.?"), "patient"),
    (re.compile(r"(?:^|(?<=\ba )|(?<=\bpatient ))(\d{1,2})m\b"), r"\1-year-old male"),
    (re.compile(r"(?:^|(?<=\ba )|(?<=\bpatient ))(\d{1,2})f\b"), r"\1-year-old female"),
    (re.compile(r"\banything but\b"), "not"),
    (re.compile(r"\basymmetry: ?(?:yes|present|seen|\+)(?=\W|$)"), "asymmetric"),
    (re.compile(r"\bdx\b"), "diagnosis"),
    (re.compile(r"\bfhx?\b"), "family history"),
    (re.compile(r"\b(?:pmh|h/o|s/p)\b"), "history of"),
    (re.compile(r"\b(?:tx|rx)\b"), "treatment"),
    (re.compile(r"\bbx\b"), "biopsy"),
    (re.compile(r"\bf/u\b"), "follow-up"),
    (re.compile(r"\brtc\b"), "return to clinic"),
    (re.compile(r"\bc/o\b"), "complains of"),
    (re.compile(r"\br/o\b"), "rule out"),
    (re.compile(r"\bw/ "), "with "),
    (re.compile(r"\bmalig\."), "malignant"),
    (re.compile(r"\bue\b"), "upper extremity"),
    (re.compile(r"\ble\b"), "lower extremity"),
    (re.compile(r"\bdf\b"), "dermatofibroma"),
    (re.compile(r"\bx ?(\d+) ?(?:y|yrs?)\b"), r"for \1 years"),
    (re.compile(r"(?<![\w.-])(\d{2,3}) ?m(?=[,.:;)]|$)"), r"\1-year-old male"),
    (re.compile(r"(?<![\w.-])(\d{2,3}) ?f(?=[,.:;)]|$)"), r"\1-year-old female"),
    (re.compile(r"\b(light|dark),? as well as (light|dark) brown\b"), r"\1 brown and \2 brown"),
    (re.compile(r"\bhx\b"), "history"),
    (re.compile(r"\bw/o\b"), "without"),
    (re.compile(r"\bi\.e\.(?=[ ,])"), "that is"),
    (re.compile(r"\be\.g\.(?=[ ,])"), "such as"),
    (re.compile(r"\b(squamous|basal)-cell\b"), r"\1 cell"),
    (re.compile(r"\b(?:m|male)(?:, ?|/)(\d{1,3})\b|\b(\d{1,3}) ?/ ?m\b"), r"\1\2-year-old male"),
    (re.compile(r"\b(?:f|female)(?:, ?|/)(\d{1,3})\b|\b(\d{1,3}) ?/ ?f\b"), r"\1\2-year-old female"),
    (
        re.compile(
            r"\b(?:the )?backs? of (?:the |his |her |their )?(?=(?:hand|neck|head|knee|foot|ear|leg|thigh|arm|forearm)"
            r"s?\b)"
        ),
        "the ",
    ),
    (re.compile(r"\bin[- ]situ\b"), "in situ"),
    (re.compile(r"\bscc\b"), "squamous cell carcinoma"),
    (re.compile(r"\bbcc\b"), "basal cell carcinoma"),
    (re.compile(r"\b(?:a |an )?(?:sk|seb\.? ?k)\b(?!-)"), "seborrheic keratosis"),
    (re.compile(r"(?<!-)\bak\b(?!-)"), "actinic keratosis"),
    (re.compile(r"\bssm\b"), "superficial spreading melanoma"),
    (re.compile(r"\bmis\b"), "melanoma in situ"),
    (re.compile(r"\b(light|dark)er brown\b"), r"\1 brown"),
    (
        re.compile(
            r"\b(?:two |both |shades of |tones of |hues of )*browns?,? ?\(?(light|dark) (and|or|to) (light|"
            r"dark)\)?(?! brown)"
        ),
        r"\1 brown \2 \3 brown",
    ),
    (
        re.compile(r"\b(light|dark)-? (and|or|to) (light|dark) (?:shades?|tones?|hues?|tints?) of brown\b"),
        r"\1 brown \2 \3 brown",
    ),
    (re.compile(r"\b(light|dark)- (and|or|to) (light|dark)-brown\b"), r"\1 brown \2 \3 brown"),
    (re.compile(r"\b(\d{1,3}-year-old) m\b"), r"\1 male"),
    (re.compile(r"\b(\d{1,3}-year-old) f\b"), r"\1 female"),
    (re.compile(r"\bmid-(?=\w+ties\b|teens\b)"), "mid "),
    (re.compile(r"\b(light|dark) (and|or|to) (light|dark) brown\b"), r"\1 brown \2 \3 brown"),
    (re.compile(r"\b(?:sex|gender): ?m\b"), "sex: male"),
    (re.compile(r"\b(?:sex|gender): ?f\b"), "sex: female"),
)


def written_out(plain: str) -> str:
    """The text in lower case without shorthand."""
    for pattern, words in SHORTHAND:
        plain = pattern.sub(words, plain)
    return plain
