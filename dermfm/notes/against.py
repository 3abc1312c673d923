"""What a sentence says against the given diagnosis: another class, another disease, a denial of the given one."""

from __future__ import annotations

import re
from collections.abc import Iterator

from dermfm.notes import claims as said
from dermfm.notes.claims import phrases_of, states_phrase, without
from dermfm.notes.facts import terms
from dermfm.notes.invented import class_of_facts

BECOMING = re.compile(
    r"\b(?:become|becomes|becoming|turn|turns|turning|progress\w*|grow|grows) (?:to |into )?(?:an? )?invasive\b"
)
# Kinds of nevi and of melanomas: one excludes the others
KINDS = (
    (("compound", "junctional", "dermal", "blue", "spitz", "reed", "halo"), r"(?:nev\w+|naev\w+|moles?)"),
    (("nodular", "superficial spreading", "acral", "desmoplastic"), "melanomas?"),
)
OF_AN_ORGAN = re.compile(
    r"\b(?:diagnosis|lesion|it|this) (?:is|was) (?:an? )?(?:(?!not\b|no\b|never\b|neither\b)\w+ )?(?:lung|breast|"
    r"prostate|colon|cervical|bladder|ovarian) cancer\b"
)
NOT_INVASIVE = re.compile(
    r"\bnot (?:become |yet |turned )?invasive\b|\b(?:is|was) an? non-?invasive\b|"
    r"\bnon-?invasive (?:squamous|melanoma|carcinoma|form)"
)


def against_diagnosis(clean: str, given: str) -> Iterator[str]:
    """The terms by which the normalised sentence contradicts the diagnosis `given` (in lower case)."""
    code = class_of(given)
    names_given = any(c.group == code and c.term not in said.LAY for c in said.claims(clean, "class_names"))
    for claim in said.claims(clean, "class_names"):
        if claim.group == code and claim.negated and not claim.aside:
            yield f"not {claim.term}"
        elif claim.term in said.LAY and (names_given or claim.term == "moles"):
            continue  # "the mole is a melanoma"
        elif claim.group != code and not claim.negated and not claim.aside and claim.term not in given:
            yield claim.term
    found = re.search(r"\bnon-?melanoma", clean) if code == "MEL" else None
    if found is not None and not said.is_aside(clean, found.start()):
        yield found[0]
    if (denied := denied_head(clean, given)) is not None:
        yield f"not {denied}"
    is_named = said.other_diseases().search(clean) is not None
    blank = without(clean, [*phrases_of("class_names"), given, *same_diagnosis(given)]) if is_named else ""
    for match in said.other_diseases().finditer(blank):
        if (
            not (said.is_negated(clean, match.start(), match.end()) or said.is_aside(clean, match.start()))
            and match[0] not in given
        ):
            yield match[0]
    yield from _other_kinds(clean, given)
    if (found := OF_AN_ORGAN.search(clean)) is not None:
        yield found[0]
    if "invasive" in given and (found := NOT_INVASIVE.search(clean)) is not None:
        yield found[0]
    for one, other in (("in situ", "invasive"), ("invasive", "in situ")):
        if one in given and other not in given and states_phrase(BECOMING.sub("", clean), other):
            yield other


def _other_kinds(clean: str, given: str) -> Iterator[str]:
    """The terms that name another kind than the given one: "a junctional nevus" of a compound one."""
    for kinds, noun in KINDS:
        own = {kind for kind in kinds if re.search(rf"\b(?:intra)?{kind}\b", given)}
        if not own:
            continue
        for match in re.finditer(rf"\b(?:intra)?(?P<kind>{'|'.join(kinds)}) (?:\w+cytic )?{noun}\b", clean):
            aside = said.is_aside(clean, match.start()) or said.is_negated(clean, match.start(), match.end())
            if match["kind"] not in own and not aside:
                yield match[0]


def denied_head(clean: str, given: str) -> str | None:
    """The last word of the given diagnosis where the sentence denies that ("no lentigo" of a solar lentigo)."""
    head = given.split(" (")[0].split()[-1] if given else ""
    denial = (
        rf"\b(?:no|not|not an?|without an?|never an?) (?:evidence of |signs? of )?(?:an? |the )?{re.escape(head)}s?\b"
    )
    return head if head and re.search(denial, clean) else None


def class_of(diagnosis: str) -> str | None:
    """The class code of a plain diagnosis, by the first class name of the longest match in it; None if none."""
    return class_of_facts({"diagnosis": diagnosis})


def same_diagnosis(diagnosis: str) -> list[str]:
    """Other ways to say the diagnosis (in lower case)."""
    return next((ways for name, ways in terms()["same_diagnosis"].items() if name.lower() == diagnosis), [])
