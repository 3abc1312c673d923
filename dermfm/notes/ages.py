"""Ages as notes say them: numbers, numbers in words, and words for a time of life."""

from __future__ import annotations

import re

from dermfm.notes.facts import terms

TENS = {"twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90}
ONES = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NUMBER_WORD = rf"({'|'.join(TENS)})(?:[- ]({'|'.join(ONES)})|(?![- ](?:{'|'.join(ONES)})\b))\b"
NUMBER_IN_WORDS = re.compile(rf"\b{NUMBER_WORD}")
TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
CHILD_AGES = (*ONES, *TEENS.split())
CHILD = re.compile(
    rf"\b({'|'.join(CHILD_AGES)})(?=-years?-olds?\b| years? of age\b)"
    rf"|(?:(?<=girl, )|(?<=boy, )|(?<=girl of )|(?<=boy of ))({'|'.join(CHILD_AGES)})(?= years?\b|[,.;)]|$| with\b|"
    rf" who\b)"
)
OLDEST = 120  # years
BEHIND_AGE = r"(?=[,.;:)]|$| (?:with|who|has|had|presents|presented|and|stop)\b)"  # not "a woman, 3 papules on the arm"
PERSON = r"(?:patient|man|woman|male|female|person|individual|adult|boy|girl|lady|gentleman|gent|chap|fellow)"
AGES = (
    re.compile(r"\b(\d{1,3})[- ]years?[- ]?olds?\b"),
    re.compile(r"\b(\d{1,3}) years of age\b"),
    re.compile(r"\b(?:at )?(?:the |an )?age (?:of )?(?:only |just |about |around )?(\d{1,3})\b"),
    re.compile(r"\b(?:her|his|their|born) (\d{1,3}) years\b"),
    re.compile(r"\baged?:? (?:of |is |was )?(\d{1,3})\b"),
    re.compile(rf"\b{PERSON}(?:,? of |, | \(|, aged? | (?=\d\d))(\d{{1,3}}){BEHIND_AGE}"),
    re.compile(rf"\b{PERSON},? (?:of |aged )?(\d{{1,3}}) years?\b"),
    re.compile(rf"\b{PERSON} of (\d{{1,3}})\b(?! ?[mc]m)"),
    re.compile(
        rf"\b{PERSON}(?: of| aged)? (?:about|around|approximately|roughly|nearly|almost|some) (\d{{1,3}})\b"
        r"(?! ?(?:mm|cm|%))"
    ),
    re.compile(
        rf"\b(?:he|she|{PERSON}(?: who)?|(?:mrs?|ms)\.? \w+),? (?:is|was|is now|now|being) (\d{{1,3}}){BEHIND_AGE}"
    ),
    re.compile(r"^(\d{2,3}), (?:fe)?male\b"),
    re.compile(r"\b(?:mrs?|ms|miss)\.? \w+(?: \w+)?, (\d{2,3})\b"),
    re.compile(r"\bat (?:barely |just |only |nearly |almost )?(\d{2,3}),? (?:he|she|the patient|this)\b"),
    re.compile(r"(?:^|[,;:(.] ?|male ?|man |gent |lady )(\d{1,3}) ?(?:y|yrs?|years?)(?=[.,;)]|$)"),
    re.compile(r"\b(\d{2,3})(?: /|,) (?:wo)?man\b"),
    re.compile(r"\b(?:fe)?male / (\d{2,3})\b"),
    re.compile(r"[a-z](?:, | \()(\d{1,3})(?=, (?!\d)|\)|\.?$|, and\b)(?! ?(?:mm|cm))"),
)  # each with the number


def ages(clean: str) -> list[str]:
    """The numbers that are said as somebody's age: none beyond a human life."""
    return [number for pattern in AGES for number in pattern.findall(clean) if int(number) <= OLDEST]


def age_words(clean: str, words: list[str]) -> list[str]:
    """Those of the words for an age that tell today's: not "since her teens", "when she was a girl" or "as a child"."""
    return [word for word in words if not re.search(rf"\b(?:{_earlier(word)}) {word}\b", clean)]


def _earlier(word: str) -> str:
    """What makes the word for an age one of former days; "as an octogenarian" tells of today."""
    young = "" if age_band(word).start > 39 else r"|as an?(?: \w+)?"
    return r"(?:since|until|during)(?: \w+)?|(?:when|since) (?:he|she|they) (?:was|were) an?(?: \w+)?" + young


def age_band(word: str) -> range:
    """The ages that a word like "elderly" may be said of."""
    first, last = terms()["age_bands"][word]
    return range(first, last + 1)


def in_figures(clean: str) -> str:
    """The text with numbers in words from twenty on, and the ages of children, in figures ("fifty-five" → "55")."""

    def figures(match: re.Match[str]) -> str:
        return str(TENS[match[1]] + (ONES.index(match[2]) + 1 if match[2] else 0))

    return CHILD.sub(lambda m: str(CHILD_AGES.index(m[1] or m[2]) + 1), NUMBER_IN_WORDS.sub(figures, clean))
