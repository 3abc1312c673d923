"""Misspelt, cut and joined words of a note, put right where they are nearly a given fact's word or a usual one."""

from __future__ import annotations

import difflib
import re

from dermfm.notes.claims import WORD
from dermfm.notes.facts import Facts
from dermfm.notes.invented import given_words, plain_words

LIKE = 0.82  # least share of letters in common (difflib's ratio): "kerosis" is keratosis, "keraxis" is no word
LETTERS = 2  # by which the lengths may differ at most
ANOTHER = re.compile(r"sarcomas?$|lysis$|blastomas?$|itis$")  # ends of words that name another disease
USUAL = frozenset([
    "dermoscopic", "dermoscopy", "dermatoscopic", "clinical", "image", "photograph", "lesion", "border", "borders",
    "margin", "symmetric", "asymmetric", "sharply", "indistinct", "bordered", "extremity", "patient", "female", "male",
    "colours", "structures", "diagnosis",
])  # fmt: skip


def put_right(clean: str, facts: Facts) -> str:
    """The normalised text with its misspelt words put right, and words that a full stop cuts ("malig.") written out."""
    given = given_words(facts)
    strange = {word for word in WORD.findall(clean) if len(word) > 3 and not _is_known(word, given)}
    if not strange:
        return clean
    expected = sorted(word for word in given | USUAL if len(word) > 4)
    joined = {value.lower().replace(" ", ""): value.lower() for value in facts.values() if " " in value}
    for word in sorted(strange, key=len, reverse=True):
        word = word.removesuffix(".")
        right = _whole(word, clean, expected) or joined.get(word) or _parted(word, given) or _like(word, expected)
        if right is not None:
            clean = re.sub(rf"(?<![\w-]){re.escape(word)}(?![\w-])", right, clean)
    return clean


def _is_known(word: str, given: set[str]) -> bool:
    return any(form in plain_words() or form in given for form in (word, word.removesuffix("s")))


def _whole(word: str, clean: str, expected: list[str]) -> str | None:
    """The word that is cut by a full stop within a sentence, or from four letters on before another mark; the shortest
    where several begin so."""
    behind = re.search(rf"\b{re.escape(word)}(?:\.(?=[:,;/)]| [a-z])|(?<=\w{{4}})(?=[,;/)]))", clean)
    whole = [w for w in expected if w.startswith(word)]
    return min(whole, key=len) if behind and whole else None


def _parted(word: str, given: set[str]) -> str | None:
    """Two given words written as one ("benignseborrheic")."""
    firsts = (first for first in sorted(given) if word.startswith(first) and word.removeprefix(first) in given)
    return next((f"{first} {word.removeprefix(first)}" for first in firsts), None)


def _like(word: str, expected: list[str]) -> str | None:
    if ANOTHER.search(word):
        return None
    able = [w for w in expected if w[0] == word[0] and abs(len(w) - len(word)) <= LETTERS]
    near = difflib.get_close_matches(word, able, 1, LIKE)
    return near[0] if near else None
