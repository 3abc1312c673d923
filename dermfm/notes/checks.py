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
from dermfm.notes.ages import age_band, ages
from dermfm.notes.claims import WORD, normalise, phrases_of, sentences, states_phrase, without
from dermfm.notes.facts import APPEARANCE, Facts, split_words, terms
from dermfm.notes.invented import class_of_facts, personal_details, unsupported
from dermfm.notes.talk import talk
from dermfm.records.vocabulary import CLASS_CODES

KINDS = (
    "empty", "refusal", "unfinished", "too long", "repetition", "option", "personal",
    "missing", "contradiction", "self-contradiction", "unsupported",
)  # fmt: skip
SITE_REACH = 3  # "not on the back"; in "rather than a nevus of the back" the nevus is denied
PARTLY = re.compile(
    r"\b(?:partly|partially|in part|in parts|in places|in some|on one side|elsewhere|in others|focally)\b"
)
THESE = re.compile(r"\b(?:are|is|was|were|these|as|has|have)(?: \w+){0,3} $")
OTHER_IMAGE = {
    "dermoscopic": re.compile(r"\b(?:clinical(?:ly)?|macroscopic) (?:close-up )?(?:image|photo|picture)"),
    "clinical": re.compile(r"\bderm(?:at)?oscop(?:[iey]|es?\b)\w*"),
}
OPPOSITE = {"symmetric": "asymmetric", "asymmetric": "symmetric"}
# "clinical" says nothing of a picture before these
NO_PICTURE = (
    r"(?!\w* (?:note|significan|issue|diagnos|history|context|correlation|trial|practice|relevance|concern|course|"
    r"setting|management|decision|suspicion|dermatolog|record|stud))"
)
HEADING = re.compile(r"\bmalignancy(?: status)?(?::| is| was)(?= (?:benign|pre|malignant))")  # it claims nothing itself


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
    """Every fault of the note: those of the whole text first, then sentence by sentence."""
    clean = normalise(text)
    if len(WORD.findall(clean)) < 3:
        return [Fault("empty")]
    faults = list(_form_faults(clean, rules))
    faults += [Fault("missing", name) for name in facts if not states(clean, name, facts)]
    faults += [Fault("self-contradiction", about) for about in _own_contradictions(clean, facts)]
    people = [personal_details(sentence) for sentence in sentences(text)]
    for place, (sentence, person) in enumerate(zip(sentences(text), people, strict=True)):
        plain = normalise(sentence)
        is_talk = bool(person or talk(plain))  # its odd words are names or the talk itself
        found = [("contradiction", about, term) for about, term in _contradicted(plain, facts)]
        found = [f for f in found if not (is_talk and f[2].startswith("not "))]  # "I can't diagnose a nevus"
        found += unsupported(plain, facts, rules.sees, is_talk)
        found += [("personal", about, term) for about, term in person]
        names = set(re.findall(r"\b[A-Z][a-z]+", sentence)) if any(people) else set()
        named = [f for f in found if f[1] != "other"]
        rest = [f for f in found if f[1] == "other" and f[2].capitalize() not in names]
        faults += [Fault(*fault, place) for fault in named or rest]
    return faults


def states(clean: str, name: str, facts: Facts) -> bool:
    """Whether the normalised text states the fact `name`, without a negation."""
    value = facts[name].lower()
    if name == "image":
        stem = r"derm(?:at)?oscop" if value == "dermoscopic" else rf"{re.escape(value)}{NO_PICTURE}"
        return re.search(rf"\b{stem}", clean) is not None
    if name == "age":
        return value in ages(clean) or re.search(rf"\b{value}[- ]year", clean) is not None
    if name == "sex":
        return any(c.group == value for c in said.claims(clean, "sex_names"))
    if name == "malignancy":
        return any(c.group == value and not c.negated for c in _malignancy_claims(clean, facts))
    if name in ("asymmetry", "border"):
        return value in {group for group, _ in _shape_claims(clean, facts, name)}
    if name in ("colours", "structures"):
        return all(_states_word(clean, word, f"{name[:-1]}_names", facts) for word in split_words(value))
    if name == "site":
        ways = [value, *terms()["site_aliases"].get(value, ())]
        return any(states_phrase(clean, way, SITE_REACH) for way in ways)
    return any(states_phrase(clean, way) for way in [value, *terms()["same_diagnosis"].get(value, ())])


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
        yield from (("diagnosis", term) for term in _against_diagnosis(clean, facts["diagnosis"].lower()))
    for claim in _malignancy_of_it(clean, facts) if "malignancy" in facts else ():
        if (claim.group == facts["malignancy"]) == claim.negated:
            yield "malignancy", f"{'not ' * claim.negated}{claim.term}"
    for claim in said.claims(clean, "sex_names") if "sex" in facts else ():
        if claim.group != facts["sex"]:
            yield "sex", claim.term
    for number in ages(clean) if "age" in facts else ():
        if number != facts["age"]:
            yield "age", number
    for word in said.found_words(said.without_words(clean, "idle_phrases"), "age_words") if "age" in facts else ():
        if int(facts["age"]) not in age_band(word):
            yield "age", word
    if "site" in facts:
        for match in said.places_pattern().finditer(said.without_idle(clean)):
            if said.site_fault(match[0], facts["site"].lower()) == "contradiction" and not _is_idle(clean, match):
                yield "site", match[0]
    if "image" in facts:
        found = OTHER_IMAGE[facts["image"]].search(clean)
        if found is not None and not said.is_negated(clean, found.start(), found.end()):
            yield "image", found[0]
    for name in ("asymmetry", "border"):
        if name in facts:
            for group, term in _shape_claims(clean, facts, name):
                if group == f"not {facts[name]}" or (group != facts[name] and not group.startswith("not ")):
                    yield name, term
    for word in split_words(facts.get("structures", "")):
        for claim in said.claims(clean, "structure_names"):
            if claim.group == word and claim.negated:
                yield "structures", f"not {claim.term}"
    yield from _against_findings(clean, facts)


def _places(sentence: str) -> set[str]:
    """The places on the body at which the sentence puts the lesion."""
    found = said.places_pattern().finditer(said.without_idle(sentence))
    return {m[0] for m in found if not _is_idle(sentence, m)}


def _is_idle(clean: str, match: re.Match[str]) -> bool:
    """Whether a place is named without the lesion being put there."""
    at = match.start()
    return said.is_negated(clean, at, match.end()) or said.is_aside(clean, at) or said.is_of_all(clean, at)


def _against_diagnosis(clean: str, given: str) -> Iterator[str]:
    code = class_of(given)
    for claim in said.claims(clean, "class_names"):
        if claim.group == code and claim.negated and not claim.aside:
            yield f"not {claim.term}"
        elif claim.group != code and not claim.negated and not claim.aside and claim.term not in given:
            yield claim.term
    if code == "MEL" and (found := re.search(r"\bnon-?melanoma", clean)) is not None:
        yield found[0]
    if (denied := denied_head(clean, given)) is not None:
        yield f"not {denied}"
    blank = without(clean, [*phrases_of("class_names"), given])
    for match in re.finditer(rf"(?<![\w-])(?:{'|'.join(terms()['other_diagnoses'])})\b", blank):
        if (
            not (said.is_negated(clean, match.start(), match.end()) or said.is_aside(clean, match.start()))
            and match[0] not in given
        ):
            yield match[0]
    for one, other in (("in situ", "invasive"), ("invasive", "in situ")):
        if one in given and other not in given and states_phrase(clean, other):
            yield other


def denied_head(clean: str, given: str) -> str | None:
    """The last word of the given diagnosis where the sentence denies that ("no lentigo" of a solar lentigo)."""
    head = given.split(" (")[0].split()[-1] if given else ""
    denial = (
        rf"\b(?:no|not|not an?|without an?|never an?) (?:evidence of |signs? of )?(?:an? |the )?{re.escape(head)}s?\b"
    )
    return head if head and re.search(denial, clean) else None


def _against_findings(clean: str, facts: Facts) -> Iterator[tuple[str, str]]:
    """Proliferations are the findings' noun: another first word than the given one is another finding."""
    if "findings" in facts:
        for match in re.finditer(r"\b(benign|malignant|indeterminate) (?:\w+ ){0,3}proliferations?", clean):
            if not facts["findings"].lower().startswith(match[1]):
                yield "findings", match[0]


def class_of(diagnosis: str) -> str | None:
    """The class code of a plain diagnosis, by the first class name of the longest match in it; None if none."""
    return class_of_facts({"diagnosis": diagnosis})


def _malignancy_claims(clean: str, facts: Facts) -> list[said.Claim]:
    """Claims about this lesion's malignancy outside diagnosis and findings, whose own words claim nothing."""
    idle = ("basal cell cancer", "squamous cell cancer")
    blank = said.without_words(without(clean, [*said.names_of(facts), *idle]), "idle_phrases")
    blank = HEADING.sub(lambda m: "_" * len(m[0]), blank)
    if "findings" in facts:
        blank = re.sub(
            r"\b(?:benign|malignant|indeterminate) (?:\w+ ){0,3}proliferations?", lambda m: "_" * len(m[0]), blank
        )
    claims = [claim for claim in said.claims(blank, "malignancy_names") if not claim.aside]
    return [c for c in claims if c.term != "cancers" or THESE.search(blank[: c.start])]  # else of cancers in general


def _malignancy_of_it(sentence: str, facts: Facts) -> list[said.Claim]:
    """The claims of one sentence about this lesion's malignancy: none where it speaks of other tumours in general."""
    subject = said.general_subject(sentence)
    if subject is not None and class_of(subject) not in (None, class_of(facts.get("diagnosis", ""))):
        return []
    return _malignancy_claims(sentence, facts)


def _shape_claims(clean: str, facts: Facts, name: str) -> list[tuple[str, str]]:
    """(word of the options, term) of what is claimed about `name` (asymmetry, border); a negation turns symmetry, and
    makes "not sharp" of a sharp border."""
    return [
        claim for sentence in sentences(clean) for claim in _shapes_of(without(sentence, said.names_of(facts)), name)
    ]


def _shapes_of(sentence: str, name: str) -> list[tuple[str, str]]:
    told = said.claims(sentence, f"{name}_names")
    if name == "border" and len({c.group for c in told}) > 1 and PARTLY.search(sentence):
        return [("mixed", "partly")]
    found: list[tuple[str, str]] = []
    for claim in told:
        if name == "asymmetry" and claim.negated:
            found.append((OPPOSITE[claim.group], f"not {claim.term}"))
        elif claim.negated:
            found.append((f"not {claim.group}", f"not {claim.term}"))
        else:
            found.append((claim.group, claim.term))
    return found


def _own_contradictions(clean: str, facts: Facts) -> Iterator[str]:
    """What the note says two things about that cannot both be true, whatever the facts are."""
    parts = [without(sentence, said.names_of(facts)) for sentence in sentences(clean)]
    held = {c.group for part in parts for c in _malignancy_of_it(part, facts) if not c.negated}
    denied = {c.group for part in parts for c in _malignancy_of_it(part, facts) if c.negated}
    if len(held) > 1 or held & denied:
        yield "malignancy"
    named = [c for s in sentences(clean) for c in said.claims(s, "class_names") if not c.aside]
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
    bands = [age_band(word) for word in said.found_words(said.without_words(clean, "idle_phrases"), "age_words")]
    if len(told_ages) > 1 or any(int(age) not in band for age in told_ages for band in bands):
        yield "age"
    if said.exclude_each_other({p for s in sentences(clean) for p in _places(s)}):
        yield "site"
    for name in ("asymmetry", "border"):
        told = {group for part in parts for group, _ in _shape_claims(part, facts, name)}
        plain = {group for group in told if not group.startswith("not ")}
        if len(plain) > 1 or any(f"not {group}" in told for group in plain):
            yield name


assert set(terms()["class_names"]) == set(CLASS_CODES), "terms.yaml must name every class"
assert set(APPEARANCE) == {"asymmetry", "border", "colours", "structures"}, "the checks know these by name"
