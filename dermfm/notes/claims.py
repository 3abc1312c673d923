"""What a sentence claims: terms of `terms.yaml` in it, whether each is negated, and whether it is of this lesion."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dermfm.notes.ages import in_figures
from dermfm.notes.facts import Facts, split_words, terms
from dermfm.notes.phrases import any_of
from dermfm.notes.shorthand import written_out

NEGATION_REACH = 6  # words between a negation and what it negates, within one clause
HEARSAY_REACH = 8  # words between "such as", "history of" and the like and what they keep from being a claim
WORD = re.compile(r"[a-z0-9]+(?:['.-][a-z0-9]+)*")
CLAUSE_END = re.compile(
    r"[,;:]\s|\s(?:but|however|although)\s|\sand\s(?=(?:the|it|its|this|is|has|was|there|he|she)\s)"
)
TITLES = (
    "[A-Z]",
    "[DMdm]r",
    "[Mm]s",
    "[Mm]rs",
    "[Pp]rof",
    r"i\.e",
    r"e\.g",
    "[Nn]o",
    "[Nn]r",
    "St",
    "[Tt]el",
    "[Ff]ax",
    "approx",
    "ca",
    "vs",
    "cf",
    "resp",
)  # a full stop behind them ends nothing
NO_TITLE = "".join(rf"(?<!\b{title}\.)" for title in TITLES)
SENTENCE_END = re.compile(rf"(?<=[.!?]){NO_TITLE}\s+|\n+")
# "no dots, globules or streaks": one negation for a whole list, which its commas do not end
ITEM = r"(?!which\b|who\b|that\b)[\w-]+(?: [\w-]+){0,2}"
DENIED_LIST = re.compile(rf"\b(?:no|without|neither|free of|lacks|lacking) {ITEM}(?:, {ITEM})*,? (?:or|nor) ")
# "melanoma is unlikely": the negation follows what it negates
DENIED_BEHIND = re.compile(
    r"(?:(?:,| and| or|,? nor) [\w-]+(?: [\w-]+)?){0,6}: ?(?:none|absent|not |nil|no\b|negative)| not (?:present|"
    r"seen|found|visible|detected|identified|confirmed)\b|"
    r"(?: or [\w-]+| \w+oma| (?:process|lesion|tumou?r|growth|change|disease|neoplasm|nature|cause|behaviou?r|"
    r"features?))?(?:(?:,| and| or|,? nor) (?!but\b|which\b|though\b|although\b|while\b|yet\b|because\b|"
    r"it\b)[\w -]{3,30}?){0,2}"
    r"(?: (?:is|was|are|were|has been|have been|can be|could be)| (?=not)| can(?= ?not)| could(?= not)) "
    r"(?:(?!not\b|never\b|excluded\b)\w+ )?"
    r"(?:absent|missing|lacking|wanting|nowhere (?:to be )?(?:found|seen)|spared|unaffected|uninvolved|excluded|"
    r"unlikely|ruled out|dismissed|rejected|improbable|"
    r"not (?:be )?(?:an? |the |in |on )?(?:\w+ )?(?:present|seen|found|visible|detected|made out|identified|discerned|"
    r"demonstrated|recogni[sz]ed|discernible|consideration|concern|issue|possibility|option|entertained|favou?red|"
    r"supported|evident|considered|apparent|the case|suspected|likely))\b"
)
NOT_ONLY = re.compile(  # it denies nothing
    r"\bnot (?=only|just|merely|simply|solely)|\bnothing (?=other than|but\b|short of|to (?:fear|worry))|"
    r"\bno (?=question|doubt|denying|dispute|mistaking|more than|other than|less than)"
)
MARKUP = re.compile(r"\*+|(?<!\w)#+ |(?<=\s)[•-] ")  # of Markdown; it carries no word
LAY = ("mole", "moles")  # what a patient calls a lesion, whatever it is: "noticed that a mole had changed"
ASIDE_END = re.compile(
    r"[.!?;]\s|, (?=(?:which is |that is )?(?:a|one) (?:\w+ )?(?:type|form|kind) of )|, (?=(?:hence|therefore|thus|"
    r"so) )"
)
BESIDE = re.compile(
    r"\b(?:in front of|near|next to|behind|below|beneath|above|beside|close to|adjacent to|beyond|towards?|over|"
    r"overlying|bordering) (?:the |his |her |their )?(?:left |right |upper |lower )*$"
)
NEAR = re.compile(
    r"\b(?:near|below|above|beneath|next to|beside|close to|adjacent to) (?:the |his |her |their )?(?:\w+ )?$"
)  # never at it
FOUND_ON = re.compile(
    r"\b(?:often|commonly|typically|usually|frequently|primarily|mostly|can|may) (?:\w+ )?"
    r"(?:found|occurs?|appears?|seen|develops?|arises?|affects?)\b[^.;]*$"
    r"|\b(?:most|more) (?:commonly|often|frequently) (?:\w+ )?(?:in|on|at)\b[^.;]*$"
)
# "melanoma risk" is said of no lesion
OF_ANOTHER_NOUN = re.compile(
    r" (?:risk|survivor|biology|treatment|specialist|doctor|foundation|journal|institute|detection|clinic|research|"
    r"screening|awareness|prevention|cell line|centre|center|service|patient|specialist)s?\b"
)
NOT_EXCLUDED = re.compile(  # a hedge that weighs the disease for this lesion, whatever stands before it
    r" (?:can ?not|can't|could not|couldn't) be (?:\w+ly )?(?:ruled out|excluded|dismissed)\b"
)
WEIGHED = re.compile(
    r"(?:,? (?:and|or|versus) [\w ]{3,40}?)? (?:was|were|has been|have been) (?:also |both )?"
    r"(?:considered|discussed|entertained|weighed|debated)\b"
    r"(?! to be| as| unlikely| improbable| an?\b| likely| malignant| benign)"
)
# "Melanoma is a type of cancer that …": what such lesions are in general. "Melanoma is suspected" is about this one.
GENERAL = re.compile(
    r"(?:\W|in general, |generally, |skin |malignant |cutaneous )*(?P<name>(?!(?:the|this|that|an?|it|her|his|she|he|"
    r"which)\b)[\w' -]+?) (?:(?:is|are) (?:an?|the most (?:common|frequent|serious|deadly|"
    r"dangerous|aggressive)|one of|often|usually|typically|generally|commonly|rarely|common|rare|caused|more|less|"
    r"known)|"
    r"can|may|might|often|usually|typically|generally|commonly|tends?|develops?|arises?|occurs?|starts?|grows?) "
)


@dataclass(frozen=True)
class Claim:
    """A term found in a text: its group (a class code, a malignancy, a colour), where it is, and how it is said.

    `aside`: it speaks of lesions in general, of other people or of the past, and claims nothing of this lesion.
    """

    group: str
    term: str
    start: int
    negated: bool
    aside: bool = False


@functools.lru_cache(maxsize=1024)
def normalise(text: str) -> str:
    """Lower case, single blanks, plain apostrophes and hyphens, shorthand written out: what all patterns expect."""
    plain = text.lower().replace("’", "'").replace("‑", "-").replace("–", "-")
    plain = " ".join(MARKUP.sub("", plain).split())
    plain = in_figures(plain)
    return written_out(plain)


def sentences(text: str) -> list[str]:
    """The text cut behind full stops (not those of initials and titles), question and exclamation marks, line ends."""
    return [s.strip() for s in SENTENCE_END.split(text.strip()) if s.strip()]


@functools.lru_cache(maxsize=1024)
def claims(clean: str, names: str) -> tuple[Claim, ...]:
    """All terms of the group list `names` of `terms.yaml` in a normalised sentence, in reading order."""
    pattern, group_of = _pattern(names)
    return tuple(
        Claim(
            group_of[m[0]],
            m[0],
            m.start(),
            is_negated(clean, m.start(), m.end()),
            NOT_EXCLUDED.match(clean, m.end()) is None
            and (
                is_aside(clean, m.start())
                or is_general(clean, m.start(), m.end())
                or is_weighed(clean, m.end())
                or OF_ANOTHER_NOUN.match(clean, m.end()) is not None
                or (m[0] in LAY and bool(found_words(clean, "history_words")))
            ),
        )
        for m in pattern.finditer(clean)
    )


def found_words(clean: str, name: str) -> list[str]:
    """The terms of a plain list of `terms.yaml` that the normalised sentence contains."""
    return [m[0] for m in _list_pattern(name).finditer(clean)]


def is_negated(clean: str, start: int, end: int, reach: int = NEGATION_REACH) -> bool:
    """Whether an odd number of negations stands shortly before `start`, in the same clause or list, or behind `end`."""
    before = _list_pattern("negations").findall(NOT_ONLY.sub("", _reach(clean, start, reach)))
    number = len(before) - ("neither" in before and "nor" in before) + bool(DENIED_BEHIND.match(clean, end))
    return number % 2 == 1


def is_aside(clean: str, start: int) -> bool:
    """Whether words like "such as" or "history of" shortly before `start` keep the term from being a claim."""
    before = re.sub(r"\bin other words\b", "", ASIDE_END.split(clean[:start])[-1])
    before = " ".join(before.split()[-HEARSAY_REACH:])
    return _list_pattern("asides").search(before) is not None


def is_beside(clean: str, place: re.Match[str], site: str) -> bool:
    """Whether a place is only one that the lesion lies by: "in front of the ear" of a face, near any other."""
    own = [p for p in split_places(site) if _is_place(p)]
    if own and NEAR.search(clean[: place.start()]):
        return True
    return bool(own) and BESIDE.search(clean[: place.start()]) is not None and not exclude_each_other([place[0], *own])


def is_weighed(clean: str, end: int) -> bool:
    """Whether the term is one of several that were thought of ("both melanoma and nevus were considered")."""
    return WEIGHED.match(clean, end) is not None


def is_general(clean: str, start: int, end: int) -> bool:
    """Whether the term, without an article, begins a statement about all such lesions ("Melanoma is a cancer …")."""
    first = max(clean.rfind(mark, 0, start) for mark in (". ", "! ", "? "))
    found = GENERAL.match(clean, first + 2 if first >= 0 else 0)
    return found is not None and found.start("name") <= start and found.end("name") == end


def general_subject(clean: str) -> str | None:
    """What a sentence speaks of in general; None where it speaks of something in particular."""
    found = GENERAL.match(clean)
    return found["name"] if found else None


def _reach(clean: str, start: int, words: int) -> str:
    before = CLAUSE_END.split(re.split(r"[.!?]\s", _without_list_commas(clean)[:start])[-1])[-1]
    return " ".join(before.split()[-words:])


@functools.lru_cache(maxsize=256)
def _without_list_commas(clean: str) -> str:
    """The text with blanks for the commas of denied lists."""
    return DENIED_LIST.sub(lambda m: m[0].replace(",", " "), clean)


def without(clean: str, phrases: Iterable[str]) -> str:
    """The text with the phrases (and their plurals) blanked out, same length."""
    return _blanked(clean, tuple(phrases))


@functools.lru_cache(maxsize=1024)
def _blanked(clean: str, phrases: tuple[str, ...]) -> str:
    for phrase in phrases:
        clean = _phrase(phrase).sub(lambda m: "_" * len(m[0]), clean)
    return clean


def without_words(clean: str, name: str) -> str:
    """The text with the terms of a plain list of `terms.yaml` blanked out, same length."""
    return _list_pattern(name).sub(lambda m: "_" * len(m[0]), clean)


def without_idle(clean: str) -> str:
    """The text without phrases in which the name of a place names no place of this lesion ("naked eye")."""
    for name in ("idle_phrases", "history_words", "treatment_words"):
        clean = without_words(clean, name)
    return clean


def is_of_all(clean: str, start: int) -> bool:
    """Whether a place is told of where such lesions are in general ("often found on the legs")."""
    return FOUND_ON.search(clean[:start]) is not None


@functools.cache
def phrase_pattern(phrase: str) -> str:
    """A pattern of the phrase in lower case that lets its last word stand in the plural, and bends punctuation."""
    escaped = r"[\s,/]+(?:and\s|or\s)?".join(re.escape(w) for w in re.split(r"[\s,/]+(?:and\s|or\s)?", phrase.lower()))
    escaped = escaped.replace("nevus", "(?:n(?:a?evus|a?evi)|moles?)").replace("keratosis", "keratos[ei]s")
    escaped = escaped.replace("seborrheic", "seborrh?o?eic").replace("hemangioma", "ha?emangioma")
    return rf"{escaped}(?:s|es)?"


def states_phrase(clean: str, phrase: str, reach: int = NEGATION_REACH) -> bool:
    """Whether the phrase stands in the text without a negation within `reach` words before it."""
    return any(not is_negated(clean, m.start(), m.end(), reach) for m in _phrase(phrase).finditer(clean))


@functools.lru_cache(maxsize=8192)
def _phrase(phrase: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w-]){phrase_pattern(phrase)}(?![\w-])")


@functools.cache
def word_set(name: str) -> frozenset[str]:
    """The single words of a list, or of all lists of a group, of `terms.yaml`."""
    return frozenset(word for phrase in phrases_of(name) for word in WORD.findall(phrase))


def phrases_of(name: str) -> list[str]:
    """All phrases of a list or of a group list of `terms.yaml`."""
    entry = terms()[name]
    return [str(p) for p in entry] if isinstance(entry, list) else [str(p) for group in entry.values() for p in group]


def site_fault(word: str, given: str | None) -> str | None:
    """What naming the place `word` is, with the site `given`: "contradiction", "unsupported", or None for no fault.

    A place that contains the given one is true of it, a place within it is a detail that nothing supports, and any
    other place contradicts it.
    """
    if given is None:
        return "unsupported"
    if word in terms()["site_aliases"].get(given, ()):
        return None
    own = [w for w in split_places(given) if w in parents() or w in parents().values()]
    if word in given.split() or not own or any(word in _line(place) for place in own):
        return None if own or word in given.split() else "unsupported"
    return "unsupported" if set(own) & set(_line(word)) else "contradiction"


def exclude_each_other(places: Iterable[str]) -> bool:
    """Whether two of the named places lie in different regions of the body; neighbours within one may touch."""
    return len({_line(place)[-1] for place in places}) > 1


def split_places(site: str) -> list[str]:
    """The places that a site names: "head, neck or face" → head, neck, face."""
    plain = site.replace(" or ", ", ").replace("/", ", ").replace("front of the ", "").replace("side of the ", "")
    places = [place.removesuffix(" area") for place in split_words(plain)]
    return [place if _is_place(place) else place.split()[-1] for place in places]


def _is_place(name: str) -> bool:
    return name in parents() or name in parents().values()


@functools.cache
def parents() -> Mapping[str, str]:
    """Place → the place that contains it."""
    return {str(child): parent for parent, children in terms()["places"].items() for child in children}


def _line(place: str) -> list[str]:
    """The place and all that contain it."""
    line = [place]
    while (above := parents().get(line[-1])) is not None:
        line.append(above)
    return line


@functools.cache
def places_pattern() -> re.Pattern[str]:
    """Any place of the body by name, longest first."""
    return re.compile(rf"(?<![\w-]){any_of({*parents(), *parents().values()})}(?![\w-])(?!'s breadth)")


@functools.cache
def other_diseases() -> re.Pattern[str]:
    """Any disease by name that belongs to none of the classes."""
    return _list_pattern("other_diagnoses")


def names_of(facts: Facts) -> list[str]:
    """The given phrases, and other ways to say the diagnosis, whose own words ("cancer", "blue") claim nothing more."""
    given = [facts[name] for name in ("findings", "diagnosis") if name in facts]
    return given + [way for name in given for way in terms()["same_diagnosis"].get(name.lower(), ())]


@functools.cache
def _pattern(names: str) -> tuple[re.Pattern[str], dict[str, str]]:
    """(one pattern for all terms of a group list, longest first; term → group)."""
    group_of = {str(term): group for group, found in terms()[names].items() for term in found}
    return re.compile(rf"(?<![\w-]){any_of(group_of)}(?![\w-])"), group_of


@functools.cache
def _list_pattern(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w-]){any_of(phrases_of(name))}(?![\w-])")
