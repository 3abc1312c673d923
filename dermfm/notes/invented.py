"""Statements that no given fact supports, by what they are about; and details that may point to a person."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping

from dermfm.notes import claims as said
from dermfm.notes.ages import ages
from dermfm.notes.claims import WORD, without, word_set
from dermfm.notes.facts import Facts, split_words, terms

MONTHS = "january|february|march|april|may|june|july|august|september|october|november|december"
NUMBER = r"\d+(?:[.,]\d+)?"
LENGTH = re.compile(
    rf"\b{NUMBER}(?:\s?(?:x|by|×|-|to)\s?{NUMBER})*\s?-?(?:mm|cm|nm|µm|um|millimet(?:er|re)s?|centimet(?:er|re)s?|"
    rf"inch(?:es)?)\b"
)
DURATION = re.compile(
    r"\b(?:\d+|several|many|few|two|three|four|five|six|ten|forty) (?:years?|months?|weeks?|days?)\b(?! old| of age)"
    r"|\b(?:two|three|four|five|six|ten|several|a few) (?:years?|months?|weeks?) old\b"
    r"|\bfor (?:days|weeks|months|years|decades)\b|\b(?:past|following|preceding|recent|previous) "
    r"(?:days|weeks|months|years)\b"
    rf"|\bsince (?:{MONTHS}|\d{{4}})\b"
)
LIST_MARK = re.compile(r"^\W*(?:\d{1,2}|[a-e])[.)]\s*|^\W*\d{1,2}\W*$")  # "1. Site: back"
# What is planned or advised, against what was done
PLAN = re.compile(
    r"\b(?:recommend\w*|advi[sc]\w*|should|suggest\w*|plan(?:s|ned|ning)?|will|requires?|required|needs?|needed|"
    r"warrant\w*|"
    r"consider(?:ed)?|schedul\w*|indicated|necessary|must|ought|may|might|could|would|next|pending|encouraged|urged|"
    r"offered|discussed)\b"
)
UNLIKE = re.compile(r"\b(?:unlike|as opposed to|in contrast to)(?: \w+){0,3} $")
AHEAD = re.compile(r"\b(?:in|within|every|after|for|next|another|again in) $")  # "come back in six weeks"
EXTENT = re.compile(
    r"\b(?:occup\w+|cover\w*|spans?|spanning|involv\w+|tak\w+ up) (?:almost |nearly |about )?(?:the |an? )?(?:whole|"
    r"entire|most|half|third|"
    r"quarter|full|two thirds)(?: width| length| of)\b"
)
GROWTH_IN_SIZE = re.compile(r"\b(chang\w+|grow\w*|grew|increas\w+|enlarg\w+|decreas\w+|stable) in size\b")
KIN = re.compile(
    r"\b(?:mother|father|sister|brother|uncle|aunt|cousin|parents?|son|daughter|grand\w+|relatives?)\b[^.;]*$"
)
PERSONAL: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("name", re.compile(r"\b(?:Mr|Mrs|Ms|Miss|Dr|Prof)\b\.?|\bDear\b|\b[Nn]ame(?:d| is|:) [A-Z][a-z]+")),
    ("date", re.compile(
        rf"\b\d{{1,2}}(?:st|nd|rd|th)?\.? (?:of )?(?:{MONTHS}),?(?: \d{{4}})?\b|\b(?:{MONTHS}) \d{{1,4}}\b"
        r"|\b\d{4}-\d{2}-\d{2}\b|\b\d{1,2}[./]\d{1,2}[./]\d{2,4}\b", re.IGNORECASE)),
    ("phone", re.compile(r"(?<![\w.])\+?\d[\d ()/-]{7,}\d\b")),
    ("address", re.compile(r"\S+@\S+\.\w+|https?://|\bwww\.")),
    ("address", re.compile(r"\b\d{1,4} (?:[A-Z][a-z]+ ){1,2}(?:Street|St|Road|Rd|Avenue|Ave|Lane|Drive|Way|Square)\b")),
    ("id", re.compile(
        r"\b(?:patient|record|case|file|hospital|insurance|account|chart|social security)['\w]* ?"
        r"(?:no|nr|number|id|#)\b\.?[:#\s]*[\w/-]*\d", re.IGNORECASE)),
    ("id", re.compile(r"\b\d{6,}\b|\b\d{3}-\d{2}-\d{3,4}\b")),
    ("id", re.compile(r"\b(?:MRN|SSN|[Pp]atient (?:ID|id|number)|[Cc]ase number|ID)[:#\s]*\w*\d\w*")),
    ("id", re.compile(r"\b[A-Z]{2,5}[_-]\d{3,}")),
)  # fmt: skip
PORTION = r"(?:portion|part|half|side|edge|border|margin|pole)\b(?! of (?:his|her|their|the patient))"
# Words with a capital that the vocabulary does not know: two in a row inside a sentence or as its subject; one that
# is told to be so many years old, or follows "patient"; one behind an initial.
FULL_NAME = re.compile(
    r"(?<=[a-z,;:] )([A-Z][a-z]+) ([A-Z][a-z]+)\b"
    r"|^([A-Z][a-z]+) ([A-Z][a-z]+)(?=,? (?:is|was|has|had|an?|aged?|presents?|presented|came)\b)"
)
ONE_NAME = re.compile(
    r"\b([A-Z][a-z]{2,}),? (?:(?:is|was|has been|aged?|an?|\() ?){1,2}\d{1,3}\b"
    r"|^([A-Z][a-z]{2,}), \d{1,3}\b"
    r"|\b(?:[Pp]atient:?|Lady|Sir|named) ([A-Z][a-z]{2,})\b"
    r"|^([A-Z][a-z]{2,}), (?:I|we|you)\b"
)
INITIAL = re.compile(r"\b[A-Z]\. ?([A-Z][a-z]{2,})\b")


def personal_details(sentence: str) -> list[tuple[str, str]]:
    """(what, words) of names, dates, phone numbers, addresses and ids in a sentence as it was written."""
    told = [(what, f[0].strip()[:40]) for what, pattern in PERSONAL if (f := pattern.search(sentence)) is not None]
    names = [*FULL_NAME.finditer(sentence), *ONE_NAME.finditer(sentence), *INITIAL.finditer(sentence)]
    return told + [("name", n[0]) for n in names if not {w.lower() for w in n.groups() if w} & _known_words()]


def unsupported(clean: str, facts: Facts, sees: bool = False, is_talk: bool = False) -> Iterator[tuple[str, str, str]]:
    """("unsupported", what, term) for what the normalised sentence says beyond the facts.

    `sees`: the model had the image, so that nothing can be said here against what it reports of the lesion's look.
    `is_talk`: the sentence is at fault as a whole already, and its odd words say nothing more.
    """
    told = [*_by_list(clean, facts), *_by_fact(clean, facts, sees)]
    if not sees:
        told += _appearance(clean, facts)
    known = _given_words(facts)
    if "age" in facts:
        known |= set(terms()["age_bands"])
    if sees:
        known |= word_set("appearance_words")
    if (code := class_of_facts(facts)) is not None:
        known |= {word for way in terms()["entailed_words"][code] for word in WORD.findall(way)}
    explained = {word for _, term in told for word in WORD.findall(term)}
    told += [("other", word) for word in _strange(clean, known | explained)]
    told = [(about, term) for about, term in dict.fromkeys(told) if about != "other" or not is_talk]
    yield from (("unsupported", about, term) for about, term in told)


def _by_list(clean: str, facts: Facts) -> Iterator[tuple[str, str]]:
    """Sizes, symptoms, history and treatment: no fact of ours gives any, so each is unsupported, denied or not."""
    blank = said.without_words(without(clean, said.names_of(facts)), "idle_phrases")
    blank = re.sub(
        r"\b(?:large|small|big) (?:but \w+ )?(?:amount|number|part|risk|chance|percentage|proportion|genetic|"
        r"mutation)s?\b",
        lambda m: "_" * len(m[0]),
        blank,
    )
    blank = GROWTH_IN_SIZE.sub(r"\1", blank)
    planned = PLAN.search(clean) is not None
    for match in (*LENGTH.finditer(blank), *EXTENT.finditer(blank)):
        yield "size", match[0]
    for match in DURATION.finditer(blank):
        if match[0].split()[0] not in ages(clean) and not re.match(rf"{facts.get('age', 'x')} years\b", match[0]):
            is_ahead = AHEAD.search(blank[: match.start()]) and (planned or said.found_words(blank, "treatment_words"))
            yield "treatment" if is_ahead else "history", match[0]
    for term in said.found_words(blank, "work_up_words"):
        yield "treatment" if planned else "history", term
    blank = said.without_words(blank, "work_up_words")
    for about in ("size", "symptom", "history", "treatment"):
        for term in said.found_words(blank, f"{about}_words"):
            if about != "treatment" or not KIN.search(blank[: blank.index(term)]):
                yield about, term
    yield from (("other", term) for term in said.found_words(blank, "general_talk"))
    for claim in said.claims(blank, "alarm_names"):
        if (facts.get("malignancy") or "benign") == "benign" and not (claim.negated and "malignancy" in facts):
            yield "other", claim.term


def _by_fact(clean: str, facts: Facts, sees: bool) -> Iterator[tuple[str, str]]:
    """Age, sex, site, diagnosis and malignancy where they were not given; places and numbers beyond the given ones."""
    if "age" not in facts:
        yield from (("age", term) for term in re.findall(r"\b\d{1,3}[- ]years?[- ]?old\b|\baged? \d{1,3}\b", clean))
        yield from (("age", number) for number in ages(clean))
        yield from (("age", term) for term in said.found_words(clean, "age_words"))
    if "sex" not in facts:
        yield from (("sex", claim.term) for claim in said.claims(clean, "sex_names"))
    for match in said.places_pattern().finditer(said.without_idle(clean)):
        fault = said.site_fault(match[0], facts.get("site", "").lower() or None)
        if fault is not None and said.is_of_all(clean, match.start()):
            yield "other", match[0]
        elif fault == "unsupported":
            yield "site", match[0]
    given = set(WORD.findall(facts.get("site", "").lower()))
    for word in said.found_words(_without_other_places(said.without_idle(clean), facts), "side_words"):
        if word not in given:
            yield "site", word
    blank = without(clean, said.names_of(facts))
    for what, names in (("diagnosis", "class_names"), ("malignancy", "malignancy_names")):
        if what not in facts and not sees:
            yield from ((what, c.term) for c in said.claims(blank, names) if not c.negated)
    if "diagnosis" in facts:
        own = {c.group for c in said.claims(facts["diagnosis"].lower(), "class_names")}
        for claim in said.claims(blank, "class_names"):
            if claim.aside and claim.group not in own and not UNLIKE.search(blank[: claim.start]):
                yield "other", claim.term


def _without_other_places(clean: str, facts: Facts) -> str:
    """The sentence without place names of several words, without sides of a place that contradicts ("left ear"), and
    without sides of the lesion itself."""
    site = facts.get("site", "").lower() or None

    def blank(match: re.Match[str]) -> str:
        if said.site_fault(match["place"], site) == "contradiction":
            return "_" * len(match[0])
        return match[0].replace(match["place"], "_" * len(match["place"])) if " " in match["place"] else match[0]

    places = re.sub(rf"(?:\b(?:left|right|upper|lower) )?(?P<place>{said.places_pattern().pattern})", blank, clean)
    return re.sub(rf"\b\w+ {PORTION}", lambda m: "_" * len(m[0]), places)


def _appearance(clean: str, facts: Facts) -> Iterator[tuple[str, str]]:
    """What is said of the lesion's look beyond the given attributes; a structure said to be absent is no fault."""
    blank = said.without_words(without(clean, said.names_of(facts)), "idle_phrases")
    for name in ("asymmetry", "border"):
        if name not in facts:
            yield from (("appearance", c.term) for c in said.claims(blank, f"{name}_names"))
    for name in ("colours", "structures"):
        given = split_words(facts.get(name, ""))
        for claim in said.claims(blank, f"{name[:-1]}_names"):
            plain = claim.group == "brown" and any("brown" in g for g in given)
            if claim.group not in given and not plain and not claim.negated:
                yield "appearance", claim.term
    own = _given_words(facts)
    yield from (("appearance", term) for term in said.found_words(blank, "appearance_words") if term not in own)
    sides = "|".join(terms()["side_words"])
    yield from (("appearance", term) for term in re.findall(rf"\b(?:{sides}) {PORTION}", blank))


def _strange(clean: str, known: set[str]) -> Iterator[str]:
    """The words that are neither of narration, nor another check's, nor among `known`."""
    clean = LIST_MARK.sub("", clean)
    if clean[-1:].isalnum():
        clean = clean.rpartition(" ")[0]  # a text that was cut short ends within a word
    plain = _plain_words()
    for found in dict.fromkeys(WORD.findall(clean)):
        word = found.removesuffix("'s").rstrip(".")
        singular = word.removesuffix("s")
        if word in plain or singular in plain or word in known or singular in known:
            continue
        parts_known = all(part in plain or part in known for part in word.split("-"))
        if not re.fullmatch(r"[a-d]|\d{1,3}-years?(-old)?", word) and (word[0].isdigit() or not parts_known):
            yield word


@functools.cache
def _plain_words() -> frozenset[str]:
    return _all_listed() | word_set("plain_words") | word_set("function_words")


def class_of_facts(facts: Facts) -> str | None:
    """The class code of the given diagnosis; None where none is given or its class is not known by name."""
    found = said.claims(facts.get("diagnosis", "").lower(), "class_names")
    return min(found, key=lambda c: (c.start, -len(c.term))).group if found else None


@functools.cache
def _all_listed() -> frozenset[str]:
    """Words that another check judges: they are not strange, whatever that check says of them."""
    names = ("class_names", "malignancy_names", "sex_names", "asymmetry_names", "border_names", "colour_names")
    listed = (*names, "structure_names", "alarm_names", "negations", "side_words", "appearance_words")
    places = {w for place in [*said.parents(), *said.parents().values()] for w in WORD.findall(place)}
    return frozenset(places.union(*(word_set(name) for name in listed)))


@functools.cache
def _known_words() -> frozenset[str]:
    return _plain_words() | word_set("eponyms")


def _given_words(facts: Mapping[str, str]) -> set[str]:
    """Every word of the facts' values, and simple plurals of them."""
    words = {word for value in facts.values() for word in WORD.findall(said.normalise(value))}
    for name in ("same_diagnosis", "site_aliases"):
        words |= {w for value in facts.values() for way in terms()[name].get(value, ()) for w in WORD.findall(way)}
    return words | {f"{word}s" for word in words if len(word) > 3}
