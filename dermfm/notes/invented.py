"""Statements that no given fact supports, by what they are about; and details that may point to a person."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping

from dermfm.notes import claims as said
from dermfm.notes.ages import age_words, ages
from dermfm.notes.claims import WORD, phrases_of, without, word_set
from dermfm.notes.events import MONTHS, events, past_events, told_to_somebody
from dermfm.notes.facts import APPEARANCE, Facts, split_words, terms
from dermfm.notes.phrases import any_of
from dermfm.notes.shape import shape_claims

LIST_MARK = re.compile(r"^\W*(?:\d{1,2}|[a-e])[.)]\s*|^\W*\d{1,2}\W*$|\s\d{1,2}\.$")  # "1. Site: back"
NO_LOOK = re.compile(  # "regular checks", "2 mm thick"
    r"\b(?:regular|fine) (?=(?:self|check|follow|monitor|skin|review|use|interval|visit|exam|control|dermat|screen)\w*)"
    r"|\b(?:mm|cm|millimet\w+|centimet\w+) (?:thick|raised|elevated)\b"
)
LOOKS_LIKE = re.compile(
    r"\b(?!(?:two|three|four|five|six)-colou?red)\w+-(?:like|shaped|colou?red|toned|edged|textured|tinged|hued|"
    r"tinted|bordered|patterned|surfaced|topped|rimmed)\b"
    r"|\b(?:resembl\w+|looks? like|looking like|reminiscent of) an? (?!benign|malignant|typical|"
    r"harmless)(?!(?:\w+ ){0,2}(?:lesion|skin|nevus|naevus|mole|\w+oma|keratosis|lentigo)\b)\w+"
    r"|\ban? (?!benign|malignant|typical|clinical|dermoscopic|characteristic|classic|normal|common|suspicious|first|"
    r"second|third|close|closer|good|quick|careful|further)[\w-]+ (?:look|feel|finish|sheen)\b"
    r"|\b(?:two|three|four|several|different|distinct) (?:\w+ )?(?:zones|layers|patterns)\b"
)
ANYWHERE = re.compile(r"\b(?:any|all) (?:part|area|region)s? of the (?:human )?(?:body|skin)\b")
# What a sentence that is talk otherwise may say of the disease ("I write about a patient with a very rare condition")
OF_A_DISEASE = re.compile(
    r"\b(?:lesion|skin|condition|disease|disorder|tumou?r|growth|nevus|\w+oma|keratos[ei]s|cancer)s?\b"
)
OF_DISEASES = frozenset([
    "rare", "uncommon", "common", "aggressive", "severe", "mild", "spread", "prevalent", "mutation", "gene", "risk",
    "prognosis", "survival", "dangerous", "deadly", "fatal", "stage",
])  # fmt: skip
# A colour that mixes colours where fewer than two are given, and looks that are called normal
MIXED_COLOURS = re.compile(
    r"\bmixed colou?r\w*|\b(?:mix|mixture) of (?:\w+ ){0,2}(?:colou?rs?|brown|shades?|hues?|tones?|white|red|black)\b"
)
NORMAL = re.compile(
    r"\bnormal (?:appearance|colou?r\w*|shade|tone|look|texture)\b|\bskin (?:colou?r|tone) (?:is|"
    r"appears?|looks?) (?:\w+ )?normal\b|\bskin around(?: it)? (?:is|looks|appears)\b"
)
NORMAL_CASE = re.compile(
    r"\bnormal (?:skin )?(?:condition|structure|characteristic|feature|lesion|growth|face|build|process|finding|"
    r"mole|variant|location|anatomical)\b"
)
UNLIKE = re.compile(r"\b(?:unlike|as opposed to|in contrast to)(?: \w+){0,3} $")
PERSONAL: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("name", re.compile(r"\b(?:Mr|Mrs|Ms|Miss|Dr|Prof)\b\.? ?(?=[A-Z\[])|"
     r"\bDear (?!Sir|Madam|Colleague|Doctor|Patient)[A-Z]|"
     r"\b[Nn]ame(?:d| is|:) [A-Z][a-z]+")),
    ("date", re.compile(
        rf"\b\d{{1,2}}(?:st|nd|rd|th)?\.? (?:of )?(?:{MONTHS}|(?:jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|"
        rf"dec)\b\.?(?= \d{{4}}\b)),?(?: \d{{4}})?\b|\b(?:{MONTHS}) (?:\d{{1,2}}(?:st|nd|rd|th)?,? )?\d{{4}}\b"
        r"|\b\d{4}-\d{2}-\d{2}\b|\b\d{1,2}[./]\d{1,2}[./]\d{2,4}\b", re.IGNORECASE)),
    ("phone", re.compile(r"(?<![\w.])\+?\d[\d ()/-]{7,}\d\b")),
    ("address", re.compile(r"\S+@\S+\.\w+|https?://|\bwww\.")),
    ("address", re.compile(r"\b\d{1,4} (?:[A-Z][a-z]+ ){1,2}(?:Street|St|Road|Rd|Avenue|Ave|Lane|Drive|Way|Square)\b")),
    ("id", re.compile(
        r"\b(?:patient|record|case|file|hospital|insurance|account|chart|social security)['\w]* ?"
        r"(?:no|nr|number|id|#)\b\.?(?: is| was)?[:#\s]*[\w/-]*\d", re.IGNORECASE)),
    ("id", re.compile(r"\b\d{6,}\b|\b\d{3}-\d{2}-\d{3,4}\b")),
    ("id", re.compile(r"\b(?:MRN|SSN|[Pp]atient (?:ID|id|number)|[Cc]ase number|ID)[:#\s]*\w*\d\w*")),
    ("id", re.compile(
        r"\b[A-Z]{2,5}[_-]\d{3,}|\b(?:[Tt]icket|[Rr]ef|[Cc]laim|[Pp]olicy)\b\.?(?: no\.?| number)?[:#\s]*\d[\w/-]{3,}"
    )),
    ("id", re.compile(
        r"\b(?:accession|specimen|slide|block|report|insurance|request|reference|ref|sample|study|image|"
        r"lab)\b[^.;]{0,12}\b[A-Z]*\d[\dA-Z]*"
        r"[-/]\d{3,}", re.IGNORECASE)),
)  # fmt: skip
PORTION = (
    r"(?:portion|part|half|side|edge|border|margin|pole)\b(?! of the (?:image|picture|photo|"
    r"frame))(?! of (?:his|her|their|(?:the )?(?:patient|body)))"
)
LESION_SIDE = re.compile(rf"\b\w+ {PORTION}")
# Words with a capital that the vocabulary does not know: two in a row inside a sentence or as its subject; one that
# is told to be so many years old, or follows "patient"; one behind an initial.
FULL_NAME = re.compile(
    r"(?<=[a-z,;:] )([A-Z][a-z]+) ([A-Z][a-z]+)\b|^([A-Z][a-z]+) ([A-Z][a-z]+)(?=, (?:the|her|his|a|an|who|our|my)\b)"
    r"|^([A-Z][a-z]+) ([A-Z][a-z]+)(?=,? (?:is|was|has|had|an?|aged?|presents?|presented|came)\b)"
)
ONE_NAME = re.compile(
    r"\b([A-Z][a-z]{2,}),? (?:(?:is|was|has been|aged?|an?|\() ?){1,2}\d{1,3}\b(?![.,]\d| ?(?:mm|cm|%))"
    r"|^([A-Z][a-z]{2,}), \d{1,3}\b"
    r"|^([A-Z][a-z]{2,}), an? (?:[\w-]+ )?(?:man|woman|boy|girl|lady|gentleman|male|female|patient)\b"
    r"|\b(?:[Pp]atient:?|Lady|Sir|named) ([A-Z][a-z]{2,})\b"
    r"|\b(?:mother|father|wife|husband|daughter|son|sister|brother|partner|colleague|dermatologist|doctor|nurse|"
    r"surgeon|physician|assistant|friend|neighbou?r),? ([A-Z][a-z]{2,})\b|^([A-Z][a-z]{2,}), (?:I|we|you)\b"
    r"|\b(?:patient|man|woman|boy|girl|lady|gentleman) \(([A-Z][a-z]{2,})\b"
)
INITIAL = re.compile(r"\b[A-Z]\. ?([A-Z][a-z]{2,})\b")


def personal_details(sentence: str) -> list[tuple[str, str]]:
    """(what, words) of names, dates, phone numbers, addresses and ids in a sentence as it was written."""
    told = [(what, f[0].strip()[:40]) for what, pattern in PERSONAL if (f := pattern.search(sentence)) is not None]
    names = [*FULL_NAME.finditer(sentence), *ONE_NAME.finditer(sentence), *INITIAL.finditer(sentence)]
    return told + [("name", n[0]) for n in names if not {w.lower() for w in n.groups() if w} & _known_words()]


def unsupported(
    clean: str, facts: Facts, sees: bool = False, is_talk: bool = False, is_wrong: bool = False
) -> Iterator[tuple[str, str, str]]:
    """("unsupported", what, term) for what the normalised sentence says beyond the facts.

    `sees`: the model had the image, so that nothing can be said here against what it reports of the lesion's look.
    `is_talk`: the sentence is at fault as a whole already, and its odd words say nothing more. `is_wrong`: it
    contradicts a fact, so that its tenses tell nothing either.
    """
    told = [event for event in events(clean, facts) if not is_talk or told_to_somebody(clean, *event)]
    told += _by_fact(clean, facts, sees)
    if not sees:
        told += _appearance(clean, facts)
    if not told and not is_talk and not is_wrong:
        told += past_events(clean)
    told += _general(clean, facts)
    known = given_words(facts)
    if "age" in facts:
        known |= set(terms()["age_bands"])
    if sees:
        known |= word_set("appearance_words")
    known |= _entailed(facts)
    explained = {word for _, term in told for word in WORD.findall(term)}
    told += [
        ("other", word)
        for word in _strange(said.without_words(_without_given_look(clean, facts), "idle_phrases"), known | explained)
    ]
    told = [
        (about, term)
        for about, term in dict.fromkeys(told)
        if about != "other" or not is_talk or (OF_A_DISEASE.search(clean) and term in OF_DISEASES)
    ]
    yield from (("unsupported", about, term) for about, term in told)


def _general(clean: str, facts: Facts) -> Iterator[tuple[str, str]]:
    """Talk about such lesions in general, and words of alarm."""
    blank = said.without_words(without(clean, said.names_of(facts)), "idle_phrases")
    own = WORD.findall(facts.get("diagnosis", "").lower())
    yield from (("other", term) for term in said.found_words(blank, "general_talk") if term not in own)
    yield from (("other", m[0]) for m in NORMAL_CASE.finditer(blank))
    for claim in said.claims(blank, "alarm_names"):
        denied = claim.negated and "malignancy" in facts
        if (facts.get("malignancy") or "benign") == "benign" and not denied and claim.term not in given_words(facts):
            yield "other", claim.term


def _by_fact(clean: str, facts: Facts, sees: bool) -> Iterator[tuple[str, str]]:
    """Age, sex, site, diagnosis and malignancy where they were not given; places and numbers beyond the given ones."""
    if "age" not in facts:
        yield from (("age", term) for term in re.findall(r"\b\d{1,3}[- ]years?[- ]?old\b|\baged? \d{1,3}\b", clean))
        yield from (("age", number) for number in ages(clean))
        yield from (("age", term) for term in age_words(clean, said.found_words(clean, "age_words")))
    if "sex" not in facts:
        yield from (("sex", claim.term) for claim in said.claims(clean, "sex_names"))
    for match in said.places_pattern().finditer(said.without_idle(clean)):
        fault = said.site_fault(match[0], facts.get("site", "").lower() or None)
        of_all = said.is_of_all(clean, match.start())
        beside = of_all or said.is_beside(clean, match, facts.get("site", "").lower())
        if (fault is not None and beside) or fault == "unsupported" or _is_one_of(match[0], clean, facts):
            yield "site", match[0]
    yield from (("site", m[0]) for m in ANYWHERE.finditer(clean))
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
            if claim.aside and not claim.negated and claim.group not in own and not UNLIKE.search(blank[: claim.start]):
                yield "other", claim.term


def _is_one_of(place: str, clean: str, facts: Facts) -> bool:
    """Whether the sentence names just one place of a site that leaves open which it is ("head, neck or face")."""
    own = said.split_places(facts.get("site", "").lower())
    return len(own) > 1 and place in own and sum(re.search(rf"\b{p}\b", clean) is not None for p in own) == 1


def _without_other_places(clean: str, facts: Facts) -> str:
    """The sentence without place names of several words, without sides of a place that contradicts ("left ear"), and
    without sides of the lesion itself."""
    site = facts.get("site", "").lower() or None

    def blank(match: re.Match[str]) -> str:
        if said.site_fault(match["place"], site) == "contradiction":
            return "_" * len(match[0])
        return match[0].replace(match["place"], "_" * len(match["place"])) if " " in match["place"] else match[0]

    clean = LESION_SIDE.sub(lambda m: m[0] if _is_of_given(clean, m.end(), site) else "_" * len(m[0]), clean)
    return re.sub(rf"(?:\b(?:left|right|upper|lower) )*(?P<place>{said.places_pattern().pattern})", blank, clean)


def _appearance(clean: str, facts: Facts) -> Iterator[tuple[str, str]]:
    """What is said of the lesion's look beyond the given attributes; a structure said to be absent is no fault."""
    blank = said.without_words(without(clean, said.names_of(facts)), "idle_phrases")
    own = given_words(facts) | _entailed(facts)
    for name in ("asymmetry", "border"):
        if name not in facts:
            yield from (("appearance", term) for _, term in shape_claims(blank, facts, name))
    yield from (("appearance", m[0]) for m in _two_colours().finditer(blank) if m[0] not in own)
    given = split_words(facts.get("colours", ""))
    if len(given) < 2:
        yield from (("appearance", m[0]) for m in MIXED_COLOURS.finditer(blank))
    for name in ("colours", "structures"):
        given = split_words(facts.get(name, ""))
        for claim in said.claims(blank, f"{name[:-1]}_names"):
            plain = claim.group == "brown" and any("brown" in g for g in given)
            if claim.group not in given and not plain and not claim.negated:
                yield "appearance", claim.term
    blank = NO_LOOK.sub(lambda m: "_" * len(m[0]), said.without_words(blank, "history_words"))
    blank = _without_other_look(_without_given_look(blank, facts), facts)
    yield from (("appearance", term) for term in said.found_words(blank, "appearance_words") if term not in own)
    yield from (("appearance", m[0]) for m in NORMAL.finditer(blank))
    yield from (("appearance", m[0]) for m in LOOKS_LIKE.finditer(blank) if m[0] not in own)
    sides = "|".join(w for w in terms()["side_words"] if not w.startswith(("ext", "flex")))
    for match in re.finditer(rf"\b(?:{sides}) {PORTION}", blank):
        if not _place_behind().match(blank, match.end()):
            yield "appearance", match[0]


def _entailed(facts: Facts) -> set[str]:
    """Words that follow from the given diagnosis."""
    code = class_of_facts(facts)
    return {word for way in terms()["entailed_words"][code] for word in WORD.findall(way)} if code else set()


def _without_given_look(clean: str, facts: Facts) -> str:
    """The sentence without the terms that say given attributes ("a bright red", "fading border") or contradict them."""
    for name in ("asymmetry", "border"):
        for _, term in shape_claims(clean, facts, name) if name in facts else ():
            clean = clean.replace(term.removeprefix("not "), "_" * len(term.removeprefix("not ")), 1)
    for name in APPEARANCE:
        names = f"{name[:-1]}_names" if name in ("colours", "structures") else f"{name}_names"
        for claim in said.claims(clean, names) if name in facts else ():
            if claim.group in split_words(facts[name]):
                clean = clean[: claim.start] + "_" * len(claim.term) + clean[claim.start + len(claim.term) :]
    return clean


def _without_other_look(clean: str, facts: Facts) -> str:
    """The sentence without the word before another disease than the given one ("no amelanotic melanoma")."""
    given = class_of_facts(facts)
    for claim in said.claims(clean, "class_names"):
        before = clean[: claim.start].rstrip().rpartition(" ")[0]
        if claim.aside or claim.negated or claim.group != given:
            clean = before + "_" * (claim.start - len(before)) + clean[claim.start :]
    for match in said.other_diseases().finditer(clean):
        before = clean[: match.start()].rstrip().rpartition(" ")[0]
        clean = before + "_" * (match.start() - len(before)) + clean[match.start() :]
    return clean


def _strange(clean: str, known: set[str]) -> Iterator[str]:
    """The words that are neither of narration, nor another check's, nor among `known`."""
    clean = LIST_MARK.sub("", clean)
    if clean[-1:].isalnum():
        clean = clean.rpartition(" ")[0]  # a text that was cut short ends within a word
    plain = plain_words()
    for found in dict.fromkeys(WORD.findall(clean)):
        word = found.removesuffix("'s").rstrip(".")
        singular = word.removesuffix("s")
        if word in plain or singular in plain or word in known or singular in known:
            continue
        parts_known = all(part in plain or part in known for part in word.split("-"))
        if not re.fullmatch(r"[a-d]|\d{1,3}-years?(-old)?", word) and (word[0].isdigit() or not parts_known):
            yield word


def _is_of_given(clean: str, end: int, site: str | None) -> bool:
    """Whether a side that ends at `end` is one of a place that the site does not exclude."""
    found = _place_behind().match(clean, end)
    return found is not None and said.site_fault(found["place"], site) != "contradiction"


@functools.cache
def _place_behind() -> re.Pattern[str]:
    """The name of a place behind "the left side": then it is no side of the lesion."""
    return re.compile(rf" of (?:the |his |her |their )?(?:\w+ )?(?P<place>{said.places_pattern().pattern})")


@functools.cache
def _two_colours() -> re.Pattern[str]:
    """A colour of two ("pinkish-brown") that is none of the listed ones."""
    colours = any_of({c for c in phrases_of("colour_names") if c.isalpha() and c not in ("light", "dark")})
    listed = any_of({c for c in phrases_of("colour_names") if "-" in c})
    return re.compile(rf"(?<![\w-])(?!{listed}(?![\w-])){colours}-{colours}(?![\w-])")


@functools.cache
def plain_words() -> frozenset[str]:
    return _all_listed() | word_set("plain_words") | word_set("function_words")


def class_of_facts(facts: Facts) -> str | None:
    """The class code of the given diagnosis; None where none is given or its class is not known by name."""
    found = said.claims(facts.get("diagnosis", "").lower(), "class_names")
    return min(found, key=lambda c: (c.start, -len(c.term))).group if found else None


@functools.cache
def _all_listed() -> frozenset[str]:
    """Words that another check judges: they are not strange, whatever that check says of them."""
    names = ("class_names", "malignancy_names", "sex_names", "asymmetry_names", "border_names", "colour_names")
    listed = (*names, "structure_names", "alarm_names", "negations", "side_words")
    places = {w for place in [*said.parents(), *said.parents().values()] for w in WORD.findall(place)}
    looks = {look for look in phrases_of("appearance_words") if " " not in look}
    return frozenset(places.union(looks, *(word_set(name) for name in listed)))


@functools.cache
def _known_words() -> frozenset[str]:
    return plain_words() | word_set("eponyms")


def given_words(facts: Mapping[str, str]) -> set[str]:
    """Every word of the facts' values, and simple plurals of them."""
    words = {word for value in facts.values() for word in WORD.findall(said.normalise(value))}
    for name in ("same_diagnosis", "site_aliases"):
        words |= {w for value in facts.values() for way in terms()[name].get(value, ()) for w in WORD.findall(way)}
    return words | {f"{word}s" for word in words if len(word) > 3}
