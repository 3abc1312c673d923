"""What is wrong with a generated note: facts dropped, contradicted or invented, refusals, and broken text.

A note is held against the facts that its prompt gave, and against nothing else. The world is closed: a word that
neither the facts nor plain narration (`terms.yaml`) accounts for is an unsupported fact, so the checks err on the
strict side. Faults are strings "kind", "kind: about" or "kind: about (term)"; the kinds and what they are about:

  empty                  fewer than three words
  refusal                an apology, a remark to the asker, or talk about the note instead of a note
  unfinished             no end of a sentence at the end
  too long               more words than the prompt allows
  repetition             a sentence twice
  option                 a structured answer that is no valid structure
  personal               a name, date, phone number, address or id that may point to a person
  missing: FACT          a given fact is not stated
  contradiction: FACT    a given fact is contradicted
  self-contradiction     two statements of the note exclude each other
  unsupported: WHAT      something is said that no given fact supports: age, sex, site, size, symptom, history,
                         treatment, appearance, diagnosis, malignancy, other; "other" is the residual kind: it is named
                         only of a sentence with which nothing else is wrong
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from dermfm.notes import claims as said
from dermfm.notes.against import against_diagnosis, class_of, denied_head, same_diagnosis
from dermfm.notes.ages import age_band, age_words, ages
from dermfm.notes.claims import WORD, normalise, phrases_of, sentences, states_phrase, without
from dermfm.notes.facts import APPEARANCE, Facts, split_words, terms
from dermfm.notes.invented import personal_details, unsupported
from dermfm.notes.shape import shape_claims
from dermfm.notes.spelling import put_right
from dermfm.notes.talk import talk
from dermfm.records.vocabulary import CLASS_CODES

KINDS = (
    "empty", "refusal", "unfinished", "too long", "repetition", "option", "personal",
    "missing", "contradiction", "self-contradiction", "unsupported",
)  # fmt: skip
SITE_REACH = 3  # "not on the back"; in "rather than a nevus of the back" the nevus is denied
THESE = re.compile(r"\b(?:are|is|was|were|these|as|has|have)(?: \w+){0,3} $")
DERMOSCOPIC = (
    r"(?<!non-)(?<!non)(?<!\bno )(?<!without )(?<!without a )(?<!without the )\bderm(?:at)?oscop|\bepiluminescence|"
    r"\bsurface microscopy"
)
OTHER_IMAGE = {
    "dermoscopic": re.compile(
        r"\b(?:clinical(?:ly)?|macroscopic|non-dermoscopic|naked-eye),? (?:close-up,? |overview,? |"
        r"non-dermoscopic,? |macro |digital |standard |smartphone |colou?r )?"
        r"(?:image|photo|picture|photograph|photography|view|shot|snapshot|snap|frame|pic|close-up)s?\b|"
        r"\bno derm(?:at)?oscope\b|\bnon-?derm(?:at)?oscop\w+|\bwithout (?:a |the )?(?:derm(?:at)?oscop\w+)"
    ),
    "clinical": re.compile(
        r"(?<!non-)(?<!non)\bderm(?:at)?oscop(?:[iey]|es?\b)\w*|\bepiluminescence|\bsurface microscopy|\bthrough the "
        r"dermatoscope"
    ),
}
OF_A_LESION = re.compile(
    r"\b(?:lesion|mole|man|woman|lady|gentleman|photo\w*|skin|patient|diagnos\w+|image|tumou?r|growth|nevus|"
    r"carcinoma|melanoma|keratos[ei]s|he|she|his|her)s?\b"
)
# What has one value: a note that both states the given one and contradicts it contradicts itself
OF_ONE_VALUE = ("age", "sex", "site", "asymmetry", "border", "diagnosis", "malignancy")
# "clinical" says nothing of a picture before these
NO_PICTURE = (
    r"(?!\w* (?:note|significan|issue|diagnos|history|context|correlation|trial|practice|impression|nurse|staff|"
    r"team|relevance|concern|course|setting|management|decision|suspicion|dermatolog|record|stud))"
)
# "tumours that can be benign or malignant"
EITHER = re.compile(r"\bbenign(?:,| or| and|, or) malignant\b|\bmalignant (?:or|and) benign\b")
# "has a small nose": what somebody looks like, not where the lesion is
OF_THE_PERSON = re.compile(
    r"\b(?:(?:has|had|have|having|with|and) an?|, a) (?:very )?(?:small|large|big|symmetric(?:al)?|"
    r"asymmetric(?:al)?|delicate|normal|pretty|round|long) $"
)
# What makes a number no age: words before it, and what follows
COUNTED = tuple(
    f"{word} "
    for word in (
        "room",
        "case",
        "no",
        "no.",
        "nr",
        "number",
        "grade",
        "page",
        "type",
        "figure",
        "of about",
        "spf",
        "bed",
    )
)
BEHIND_NO_AGE = (
    r"\w|[.,:/-]\d| ?[%°]| ?(?:mm|cm|x|×|skin|percent|per cent|months?|weeks?|days?|hours?|minutes?|lesions|times)\b"
)
HEADING = re.compile(
    r"\bmalignancy(?: status)?(?::| is| was)?(?= (?:benign|pre|malignant))"
)  # it claims nothing itself


@dataclass(frozen=True)
class Rules:
    """How a strategy's notes are judged: whether the model saw the image, and how many words a note may have."""

    sees: bool = False
    max_words: int = 120


@dataclass(frozen=True)
class Fault:
    """One fault: its kind (of KINDS), what it is about, the words it was found by, the sentence (None: the whole)."""

    kind: str
    about: str = ""
    term: str = ""
    sentence: int | None = None

    def __str__(self) -> str:
        about = f": {self.about}" if self.about else ""
        return f"{self.kind}{about}{f' ({self.term})' if self.term else ''}"


def find_faults(text: str, facts: Facts, rules: Rules = Rules()) -> list[str]:
    """Every fault of the note `text` whose prompt gave `facts`, as strings, each once; [] for a faithful note."""
    return list(dict.fromkeys(map(str, examine(text, facts, rules))))


def examine(text: str, facts: Facts, rules: Rules = Rules()) -> list[Fault]:
    """Every fault of the note: of the whole text, sentence by sentence, and where it contradicts itself."""
    clean = put_right(normalise(text), facts)
    if len(WORD.findall(clean)) < 3:
        return [Fault("empty")]
    faults = list(_form_faults(clean, rules))
    faults += [Fault("missing", name) for name in facts if not states(clean, name, facts)]
    own = set(_own_contradictions(clean, facts))
    general = set(phrases_of("general_talk"))
    people = [personal_details(sentence) for sentence in sentences(text)]
    for place, (sentence, person) in enumerate(zip(sentences(text), people, strict=True)):
        plain = put_right(normalise(sentence), facts)
        head, _, tail = plain.partition(": ")
        is_talk = bool(talk(plain)) and (not tail or bool(talk(tail)))  # its odd words are no facts
        told = tail if tail and talk(head) and not is_talk else plain  # "Here is the note: …"
        of_it = not is_talk or OF_A_LESION.search(plain) is not None
        found = [("contradiction", about, term) for about, term in _contradicted(plain, facts) if of_it]
        found = [f for f in found if not (is_talk and f[2].startswith("not "))]  # "I can't diagnose a nevus"
        found += unsupported(told, facts, rules.sees, is_talk, bool(found))
        found += [("personal", about, term) for about, term in person]
        names = set(re.findall(r"\b[A-Z][a-z]+", sentence)) if any(people) else set()
        named = [f for f in found if f[1] != "other"]
        rest = [
            f
            for f in found
            if f[1] == "other" and f[2].capitalize() not in names and not (person and f[2] not in general)
        ]
        faults += [Fault(*fault, place) for fault in named or rest]
    absent = {fault.about for fault in faults if fault.kind == "missing"}
    own |= {f.about for f in faults if f.kind == "contradiction" and f.about in OF_ONE_VALUE} - absent
    return [*faults, *(Fault("self-contradiction", about) for about in sorted(own))]


def states(clean: str, name: str, facts: Facts) -> bool:
    """Whether the normalised text states the fact `name`, without a negation."""
    value = facts[name].lower()
    if name == "image":
        stem = DERMOSCOPIC if value == "dermoscopic" else rf"\b{re.escape(value)}{NO_PICTURE}"
        return re.search(stem, clean) is not None
    if name == "age":
        alone = rf"(?<![\w.,/#-])(?<!{')(?<!'.join(COUNTED)}){value}(?!{BEHIND_NO_AGE})"
        return value in ages(clean) or re.search(alone, clean) is not None
    if name == "sex":
        return any(c.group == value and not _denied(clean, c) for c in said.claims(clean, "sex_names"))
    if name == "malignancy":
        told = _malignancy_claims(clean, facts, asides=True)
        return any(c.group == value and not c.negated and not c.term.startswith("non") for c in told)
    if name in ("asymmetry", "border"):
        return value in {group for group, _ in shape_claims(clean, facts, name)}
    if name in ("colours", "structures"):
        return all(_states_word(clean, word, f"{name[:-1]}_names", facts) for word in split_words(value))
    if name == "site":
        ways = [value, *terms()["site_aliases"].get(value, ())]
        clean = re.sub(r"\bof (?:his|her|their) ", "of the ", clean)  # "the front of her torso"
        return any(states_phrase(clean, way, SITE_REACH) for way in ways)
    plain = re.sub(r" \([^()]*\)", "", clean)  # "dysplastic (atypical) nevus"
    ways = [value, *same_diagnosis(value), *_of_type(value)]
    return any(states_phrase(text, way) for way in ways for text in {clean, plain})


def _of_type(diagnosis: str) -> list[str]:
    """ "nevus of compound type", "carcinoma of the basal cell type"."""
    first, _, head = diagnosis.rpartition(" ")
    front, _, rest = diagnosis.partition(" ")  # "squamous cell carcinoma of invasive type"
    parts = {(head, first), (rest, front)} if first.isascii() and first else set()
    return [f"{noun} of {article}{kind} type" for noun, kind in sorted(parts) for article in ("", "the ", "a ")]


def _denied(clean: str, claim: said.Claim) -> bool:
    """Whether the patient's sex is denied: "not a woman"."""
    return re.search(r"\b(?:not|neither|never)(?: an?)? $", clean[: claim.start]) is not None


def _states_word(clean: str, word: str, names: str, facts: Facts) -> bool:
    blank = without(clean, said.names_of(facts))
    return any(c.group == word and not c.negated for c in said.claims(blank, names))


def _form_faults(clean: str, rules: Rules) -> Iterator[Fault]:
    for phrase in dict.fromkeys(phrase for sentence in sentences(clean) for phrase in talk(sentence)):
        yield Fault("refusal", term=phrase)
    if clean.rstrip("\"')”’]")[-1:] not in (".", "!", "?"):
        yield Fault("unfinished")
    if len(WORD.findall(clean)) > rules.max_words:
        yield Fault("too long")
    told = [re.sub(r"\W+", " ", s).strip() for s in sentences(clean)]
    told = [s for s in told if len(s.split()) > 3]
    if len(set(told)) < len(told):
        yield Fault("repetition")


def _contradicted(clean: str, facts: Facts) -> Iterator[tuple[str, str]]:
    """(fact, term) of what the sentence says against the given facts."""
    if "diagnosis" in facts:
        yield from (("diagnosis", term) for term in against_diagnosis(clean, facts["diagnosis"].lower()))
    for claim in _malignancy_of_it(clean, facts) if "malignancy" in facts else ():
        if (claim.group == facts["malignancy"]) == claim.negated and not _goes_with(claim, facts["malignancy"]):
            yield "malignancy", f"{'not ' * claim.negated}{claim.term}"
    for claim in said.claims(clean, "sex_names") if "sex" in facts else ():
        if (claim.group == facts["sex"]) == _denied(clean, claim):
            yield "sex", claim.term
    for number in ages(clean) if "age" in facts else ():
        if number != facts["age"]:
            yield "age", number
    for word in _age_words(clean) if "age" in facts else ():
        if int(facts["age"]) not in age_band(word):
            yield "age", word
    if "site" in facts:
        for match in said.places_pattern().finditer(said.without_idle(clean)):
            fault = said.site_fault(match[0], facts["site"].lower())
            if (
                fault == "contradiction"
                and not _is_idle(clean, match)
                and not said.is_beside(clean, match, facts["site"].lower())
            ):
                yield "site", match[0]
    if "image" in facts:
        found = OTHER_IMAGE[facts["image"]].search(clean)
        if found is not None and not said.is_negated(clean, found.start(), found.end()):
            yield "image", found[0]
    for name in ("asymmetry", "border"):
        if name in facts:
            for group, term in shape_claims(clean, facts, name):
                if group == f"not {facts[name]}" or (group != facts[name] and not group.startswith("not ")):
                    yield name, term
    for word in split_words(facts.get("structures", "")):
        for claim in said.claims(clean, "structure_names"):
            if claim.group == word and claim.negated:
                yield "structures", f"not {claim.term}"
    yield from _against_findings(clean, facts)


def _goes_with(claim: said.Claim, given: str) -> bool:
    """Whether "non-cancerous" is said of a pre-cancerous lesion: it is not cancerous yet."""
    return given == "pre-cancerous" and re.match(r"non-?(?:cancerous|malignant)", claim.term) is not None


def _counts(claim: said.Claim) -> bool:
    return not claim.negated and not _goes_with(claim, "pre-cancerous")


def _age_words(clean: str) -> list[str]:
    return age_words(clean, said.found_words(said.without_words(clean, "idle_phrases"), "age_words"))


def _places(sentence: str) -> set[str]:
    """The places on the body at which the sentence puts the lesion."""
    found = said.places_pattern().finditer(said.without_idle(sentence))
    return {m[0] for m in found if not _is_idle(sentence, m) and not said.BESIDE.search(sentence[: m.start()])}


def _is_idle(clean: str, match: re.Match[str]) -> bool:
    """Whether a place is named without the lesion being put there."""
    at = match.start()
    if OF_THE_PERSON.search(clean[:at]) is not None:
        return True
    return said.is_negated(clean, at, match.end()) or said.is_aside(clean, at) or said.is_of_all(clean, at)


def _against_findings(clean: str, facts: Facts) -> Iterator[tuple[str, str]]:
    """Proliferations are the findings' noun: another first word than the given one is another finding."""
    if "findings" in facts:
        for match in re.finditer(r"\b(benign|malignant|indeterminate) (?:\w+ ){0,3}proliferations?", clean):
            if not facts["findings"].lower().startswith(match[1]):
                yield "findings", match[0]


def _malignancy_claims(clean: str, facts: Facts, asides: bool = False) -> list[said.Claim]:
    """Claims about this lesion's malignancy outside diagnosis and findings, whose own words claim nothing.

    `asides`: also what the class is said to be in general ("melanoma is a cancer").
    """
    idle = ("basal cell cancer", "squamous cell cancer", "lentigo maligna")
    blank = said.without_words(without(clean, [*said.names_of(facts), *idle]), "idle_phrases")
    blank = EITHER.sub(lambda m: "_" * len(m[0]), blank)
    blank = HEADING.sub(lambda m: "_" * len(m[0]), blank)
    if "findings" in facts:
        blank = re.sub(
            r"\b(?:benign|malignant|indeterminate) (?:\w+ ){0,3}proliferations?", lambda m: "_" * len(m[0]), blank
        )
    claims = [c for c in said.claims(blank, "malignancy_names") if not c.aside or (asides and _is_a(blank, c.start))]
    return [c for c in claims if c.term != "cancers" or THESE.search(blank[: c.start])]  # else of cancers in general


def _is_a(clean: str, start: int) -> bool:
    """Whether the term is what something is said to be: "is the most common …", "as a form of …"."""
    return (
        re.search(
            r"\b(?:is|are|as|being|a type of|a form of) (?:(?!not|mistaken|confused|like)[\w-]+ ){0,6}$", clean[:start]
        )
        is not None
    )


def _malignancy_of_it(sentence: str, facts: Facts) -> list[said.Claim]:
    """The claims of one sentence about this lesion's malignancy: none where it speaks of other tumours in general."""
    subject = said.general_subject(sentence)
    if subject is not None and class_of(subject) not in (None, class_of(facts.get("diagnosis", ""))):
        return []
    return _malignancy_claims(sentence, facts)


def _own_contradictions(clean: str, facts: Facts) -> Iterator[str]:
    """What the note says two things about that cannot both be true, whatever the facts are."""
    parts = [without(sentence, said.names_of(facts)) for sentence in sentences(clean)]
    held = {c.group for part in parts for c in _malignancy_of_it(part, facts) if not c.negated}
    denied = {c.group for part in parts for c in _malignancy_of_it(part, facts) if c.negated}
    if "pre-cancerous" in held:  # "non-cancerous" goes with it
        held = {c.group for part in parts for c in _malignancy_of_it(part, facts) if _counts(c)}
    if len(held) > 1 or held & denied:
        yield "malignancy"
    of_each = [said.claims(s, "class_names") for s in sentences(clean)]
    named = [
        c
        for found in of_each
        for c in found
        if not c.aside and not (c.term in said.LAY and any(other.term not in said.LAY for other in found))
    ]
    classes = {c.group for c in named if not c.negated}
    mixed = {c.group for c in said.claims(facts.get("diagnosis", "").lower(), "class_names")}
    denied_own = any(denied_head(s, facts.get("diagnosis", "").lower()) for s in sentences(clean))
    if (
        (len(classes) > 1 and not classes <= mixed)
        or classes & {c.group for c in named if c.negated}
        or (denied_own and classes & mixed)
    ):
        yield "diagnosis"
    if len({c.group for part in parts for c in said.claims(part, "sex_names")}) > 1:
        yield "sex"
    told_ages = set(ages(clean))
    bands = [age_band(word) for word in _age_words(clean)]
    apart = any(min(one[-1], other[-1]) < max(one[0], other[0]) for one in bands for other in bands)
    if len(told_ages) > 1 or apart or any(int(age) not in band for age in told_ages for band in bands):
        yield "age"
    if said.exclude_each_other({p for s in sentences(clean) for p in _places(s)}):
        yield "site"
    for name in ("asymmetry", "border"):
        told = {group for part in parts for group, _ in shape_claims(part, facts, name)}
        plain = {group for group in told if not group.startswith("not ")}
        if len(plain) > 1 or any(f"not {group}" in told for group in plain):
            yield name


assert set(terms()["class_names"]) == set(CLASS_CODES), "terms.yaml must name every class"
assert set(APPEARANCE) == {"asymmetry", "border", "colours", "structures"}, "the checks know these by name"
