"""What is wrong with a generated note: facts dropped, contradicted or invented, refusals, and broken text.

A note is held against the facts that its prompt gave, and against nothing else. The world is closed: a word that
neither the facts nor plain narration (`terms.yaml`) accounts for is an unsupported fact, so the checks err on the
strict side. Faults are strings "kind: detail" with the kinds of KINDS.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from dermfm.notes.facts import Facts, terms
from dermfm.records.vocabulary import CLASS_CODES

KINDS = ("empty", "refusal", "unfinished", "too long", "repetition", "missing", "contradiction", "unsupported")
MAX_WORDS = 120
NEGATION_REACH = 6  # words between a negation and what it negates, within one clause
WORD = re.compile(r"[a-z0-9]+(?:['’.-][a-z0-9]+)*")
CLAUSE_END = re.compile(r"[,;:]\s|\s(?:but|however|although)\s")


@dataclass(frozen=True)
class Claim:
    """A term found in a text: its group (a class code, a malignancy, a sex), where it is, and whether it is negated."""

    group: str
    term: str
    start: int
    negated: bool


def find_faults(text: str, facts: Facts) -> list[str]:
    """Every fault of the note `text` whose prompt gave `facts`, in reading order of KINDS; [] for a faithful note."""
    clean = " ".join(text.lower().replace("’", "'").split())
    if len(WORD.findall(clean)) < 3:
        return ["empty"]
    faults = list(_form_faults(clean))
    faults += [f"missing: {name}" for name in facts if not states(clean, name, facts)]
    faults += _contradictions(clean, facts)
    faults += _unsupported(clean, facts)
    return list(dict.fromkeys(faults))


def sentences(text: str) -> list[str]:
    """The text cut behind full stops, question and exclamation marks and line ends."""
    return [s.strip() for s in re.split(r"(?<=[.!?])\s+|\n+", text.strip()) if s.strip()]


def states(clean: str, name: str, facts: Facts) -> bool:
    """Whether the lower-case text states the fact `name`, without a negation."""
    value = facts[name].lower()
    if name == "image":
        stem = "dermoscop|dermatoscop" if value == "dermoscopic" else re.escape(value)
        return re.search(rf"\b(?:{stem})", clean) is not None
    if name == "age":
        return re.search(rf"\b{value}[- ]year|\baged? (?:of |is )?{value}\b", clean) is not None
    if name == "sex":
        return any(c.group == value for c in _claims(clean, "sex_names"))
    if name == "malignancy":
        return any(c.group == value and not c.negated for c in _malignancy_claims(clean, facts))
    phrase = re.escape(value)
    return any(not _is_negated(clean, m.start()) for m in re.finditer(rf"(?<![\w-]){phrase}(?![\w-])", clean))


def _form_faults(clean: str) -> Iterator[str]:
    for phrase in terms()["refusals"]:
        if re.search(rf"(?<!\w){re.escape(phrase)}", clean):
            yield f"refusal: {phrase}"
    if clean[-1] not in ".!?":
        yield "unfinished"
    if len(WORD.findall(clean)) > MAX_WORDS:
        yield "too long"
    said = [re.sub(r"\W+", " ", s).strip() for s in sentences(clean)]
    if len(set(said)) < len(said):
        yield "repetition"


def _contradictions(clean: str, facts: Facts) -> Iterator[str]:
    if "diagnosis" in facts:
        yield from _class_contradictions(clean, facts)
    if (given := facts.get("malignancy")) is not None:
        for claim in _malignancy_claims(clean, facts):
            if _opposes(claim, given):
                yield f"contradiction: malignancy ({'not ' * claim.negated}{claim.term})"
    if (given := facts.get("sex")) is not None:
        for claim in _claims(clean, "sex_names"):
            if claim.group != given:
                yield f"contradiction: sex ({claim.term})"
    for number in re.findall(r"\b\d+(?:\.\d+)?\b", _without(clean, facts)):
        if "age" in facts and number != facts["age"]:
            yield f"contradiction: age ({number})"
    if "image" in facts:
        other = {"dermoscopic": r"clinical(?:ly)? (?:image|photo|picture)", "clinical": r"derm(?:at)?oscop"}
        if (found := re.search(other[facts["image"]], clean)) is not None:
            yield f"contradiction: image ({found[0]})"


def _class_contradictions(clean: str, facts: Facts) -> Iterator[str]:
    given = facts["diagnosis"].lower()
    code = class_of(given)
    for claim in _claims(clean, "class_names"):
        if claim.group == code and claim.negated:
            yield f"contradiction: diagnosis (not {claim.term})"
        elif claim.group != code and not claim.negated and claim.term not in given:
            yield f"contradiction: diagnosis ({claim.term})"


def class_of(diagnosis: str) -> str | None:
    """The class code of a plain diagnosis, by the first class name of the longest match in it; None if none."""
    claims = _claims(diagnosis.lower(), "class_names")
    return min(claims, key=lambda c: (c.start, -len(c.term))).group if claims else None


def _opposes(claim: Claim, given: str) -> bool:
    """Whether a claim about malignancy cannot be true of a lesion of the `given` category."""
    return claim.group == given if claim.negated else claim.group != given


def _malignancy_claims(clean: str, facts: Facts) -> list[Claim]:
    """Claims about malignancy outside the given diagnosis and findings, whose own words ("cancer") claim nothing."""
    return _claims(_without(clean, facts), "malignancy_names")


def _without(clean: str, facts: Facts) -> str:
    """The text with the given diagnosis and findings blanked out (same length)."""
    for name in ("diagnosis", "findings"):
        if name in facts:
            phrase = facts[name].lower()
            clean = re.sub(rf"(?<![\w-]){re.escape(phrase)}(?![\w-])", lambda m: "_" * len(m[0]), clean)
    return re.sub(r"basal cell cancer|squamous cell cancer", lambda m: "_" * len(m[0]), clean)


def _unsupported(clean: str, facts: Facts) -> Iterator[str]:
    given_words = _given_words(facts)
    plain, sites, sexes = (_word_set(name) for name in ("plain_words", "site_words", "sex_names"))
    for word in dict.fromkeys(WORD.findall(clean)):
        word = word.removesuffix("'s").rstrip(".")
        if word in given_words or _is_age(word, facts):
            continue
        if word in sites:
            yield f"unsupported: site ({word})"
        elif word in sexes:
            if "sex" not in facts:
                yield f"unsupported: sex ({word})"
        elif word[0].isdigit():
            yield f"unsupported: number ({word})"
        elif word not in plain and not set(word.split("-")) <= plain | given_words:
            yield f"unsupported: {word}"


def _is_age(word: str, facts: Facts) -> bool:
    return "age" in facts and word in (
        facts["age"],
        f"{facts['age']}-year-old",
        f"{facts['age']}-year",
        f"{facts['age']}-years-old",
    )


def _given_words(facts: Mapping[str, str]) -> set[str]:
    """Every word of the facts' values, the accepted names of their groups, and simple plurals of them."""
    words: set[str] = set()
    for value in facts.values():
        words |= set(WORD.findall(value.lower().replace("’", "'")))
    if (given := facts.get("malignancy")) is not None:
        names = [name for group in terms()["malignancy_names"].values() for name in group]
        words |= {w for name in names for w in WORD.findall(name)} if given else set()
        words |= set(terms()["negations"])
    return words | {f"{word}s" for word in words if len(word) > 3}


@functools.cache
def _word_set(name: str) -> frozenset[str]:
    """The single words of a list, or of all lists of a group, of `terms.yaml`."""
    entry = terms()[name]
    phrases: Iterable[str] = entry if isinstance(entry, list) else [p for group in entry.values() for p in group]
    return frozenset(word for phrase in phrases for word in WORD.findall(str(phrase)))


@functools.cache
def _pattern(names: str) -> tuple[re.Pattern[str], dict[str, str]]:
    """(one pattern for all terms of a group list, longest first; term → group)."""
    group_of = {term: group for group, found in terms()[names].items() for term in found}
    longest = sorted(group_of, key=len, reverse=True)
    return re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, longest))})(?![\w-])"), group_of


def _claims(clean: str, names: str) -> list[Claim]:
    pattern, group_of = _pattern(names)
    return [Claim(group_of[m[0]], m[0], m.start(), _is_negated(clean, m.start())) for m in pattern.finditer(clean)]


@functools.cache
def _negation() -> re.Pattern[str]:
    words = "|".join(re.escape(str(n)) for n in sorted(terms()["negations"], key=len, reverse=True))
    return re.compile(rf"(?<![\w-])(?:{words})(?![\w-])")


def _is_negated(clean: str, start: int) -> bool:
    """Whether a negation stands within NEGATION_REACH words before `start`, in the same sentence and clause."""
    before = re.split(r"[.!?]\s", clean[:start])[-1]
    before = CLAUSE_END.split(before)[-1]
    reach = " ".join(before.split()[-NEGATION_REACH:])
    return len(_negation().findall(reach)) % 2 == 1


assert set(terms()["class_names"]) == set(CLASS_CODES), "terms.yaml must name every class"
