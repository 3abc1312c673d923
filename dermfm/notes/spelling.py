"""Misspelt and cut words of a note, put right where they can only be a word of the given facts or a usual one."""

from __future__ import annotations

import difflib
import re

from dermfm.notes.claims import WORD
from dermfm.notes.facts import Facts
from dermfm.notes.invented import given_words, plain_words

LIKE = 0.82  # least share of letters in common (difflib's ratio): "kerosis" is keratosis, "keraxis" is no word
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
        right = _whole(word, clean, expected) or joined.get(word) or _parted(word, given) or _like(word, expected)
        if right is not None:
            clean = re.sub(rf"(?<![\w-]){re.escape(word)}(?![\w-])", right, clean)
    return clean


def _is_known(word: str, given: set[str]) -> bool:
    return any(form in plain_words() or form in given for form in (word, word.removesuffix("s")))


def _whole(word: str, clean: str, expected: list[str]) -> str | None:
    """The one word that a full stop in the middle of a sentence cuts."""
    cut = word.removesuffix(".")
    behind = re.search(rf"\b{re.escape(cut)}(?:\.(?=[:,;/)]| [a-z])|(?<=\w{{4}})(?=[,;/)]))", clean)
    whole = [w for w in expected if w.startswith(cut)]
    return min(whole, key=len) if behind and whole else None


def _parted(word: str, given: set[str]) -> str | None:
    """Two given words written as one ("benignseborrheic")."""
    firsts = (first for first in sorted(given) if word.startswith(first) and word.removeprefix(first) in given)
    return next((f"{first} {word.removeprefix(first)}" for first in firsts), None)


def _like(word: str, expected: list[str]) -> str | None:
    near = difflib.get_close_matches(word, [w for w in expected if w[0] == word[0]], 1, LIKE)
    return near[0] if near else None
