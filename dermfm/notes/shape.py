"""What a sentence claims of a lesion's symmetry and of its border, by the terms of `terms.yaml` and by grammar.

A border is described by an adverb and a verb ("crisply delimited"), by an adjective before or behind its noun ("blurred
edges", "the margin is clear"), or by what it does ("melts into the skin"); symmetry by what the halves do.
"""

from __future__ import annotations

import functools
import re

from dermfm.notes import claims as said
from dermfm.notes.claims import sentences, without
from dermfm.notes.facts import Facts

Claims = tuple[tuple[str, str], ...]  # (word of the options or "not WORD", term)

OPPOSITE = {"symmetric": "asymmetric", "asymmetric": "symmetric"}
PARTLY = re.compile(
    r"\b(?:partly|partially|in part|in parts|in places|in some|on one side|elsewhere|in others|focally|while|whereas|"
    r"at one|along one|one part|some parts?|other parts?|some areas|other areas|some stretches|others|half|varies|"
    r"here\b.*\bthere|neither|variable|variably|here and|alternat\w+|both|part of)\b"
)
# "shows perfect symmetry" says symmetric; "symmetry: …" and "the asymmetry is …" only name what follows
SYMMETRY = re.compile(
    r"\b(?:(?:perfect|clear|good|complete|overall|marked|bilateral|high|near|full|absolute|great|remarkable|evident|"
    r"obvious|significant|noticeable|pronounced|striking|strong|slight|mild|moderate|definite|notable|visible|some|"
    r"a?symmetric(?:al)?|degree of|lack of|want of|mirror|severe|maintained|preserved|shows?|showing|displays?|"
    r"displaying|exhibits?|exhibiting|demonstrates?|has|"
    r"have|having|with|reveals?|there is|is|an?|lacks?|lacking|without|no|any|by|"
    r"devoid of) )+(?P<word>a?symmetry)\b(?! ?:| (?:is|was|score|index|axis|axes))"
    r"|\b(?P<about>a?symmetry) (?:about|along|in|across|on|around) (?:both|all|every|either|each|one|two|the two|any)\b"
    r"|\b(?P<seen>a?symmetry)(?: of (?:\w+ ){0,2}\w+)? (?:is|was|should be|can be|must be|"
    r"may be) (?:\w+ly )?(?:striking|obvious|marked|clear|plain|present|seen|noted|evident|"
    r"observed|apparent|visible|preserved|maintained|found)\b"
    r"|\b(?P<kept>a?symmetry)(?: -|:)? (?:present|kept|maintained|preserved|evident|seen|noted|intact)\b"
    r"|(?:^|[,:;] )(?P<listed>a?symmetry)(?=, |[.;]|$)"
    r"|\b(?:its|the lesion's) (?P<own>a?symmetry)\b(?! ?:| (?:is|was|score|index|axis|axes|or|and border)\b)"
)
HALVES = {
    "asymmetric": re.compile(
        r"\b(?:halves|sides|parts)(?: of (?:the|this) lesion| of it)? (?:\w+ )?(?:(?:do|does|did|will|would|"
        r"can) ?not|don't|won't|fail to|"
        r"are not|aren't|hardly|never|differ|are (?:un|dif)\w+)(?! differ)|\b(?:is|are|looks?|appears?) (?:lopsided|"
        r"skewed|off-balance)\b|\bhalves (?:\w+ ){0,2}nothing alike|\bdevoid of symmetry"
        r"|\bnot (?:a |the )?mirror|\bneither half (?:mirrors|matches)|\bone half (?:\w+ ){0,2}(?:unlike|differ|not)"
    ),
    "symmetric": re.compile(
        r"\b(?:one|each) (?:half|side)(?: of (?:the|this) \w+| of it)? (?:\w+ly )?"
        r"(?:mirrors|matches|equals|repeats|answers|echoes|is like|looks like|corresponds to|is the mirror "
        r"of|is the twin of) the other|\bsame on (?:both|either) sides?\b|"
        r"\b(?:one|each) (?:half|side) (?:is )?the (?:mirror |very )?(?:image|twin|copy|double) of the other|"
        r"\bneither half \w+ the other|\bhalves (?:\w+ ){0,4}in a mirror|"
        r"\b(?:matching|equal|identical|congruent|like) halves\b|\bhalves (?:of (?:the|this|its) \w+ |of it )?"
        r"(?:\w+ly )?(?:match|mirror|correspond|agree|are (?:\w+ly )?(?:alike|equal|identical|the same|"
        r"mirror|congruent|matching)|look (?:alike|the same|equal))|\bmirrors? itself|\bmirror images? of (?:each|"
        r"one an)other"
    ),
}
EDGE = (
    r"(?:border|edge|margin|outline|contour|boundar(?:y|ie)|demarcation|delimitation|rim|transition|periphery|limit|"
    r"perimeter)s?"
)
DRAWN = (
    r"(?:defined|demarcated|circumscribed|delimited|delineated|outlined|bordered|marginated|cut|limited|bounded|"
    r"separated|set off|contoured|traced|marked|edged|drawn|visible|distinguishable|discernible|recogni[sz]able)"
)
CRISP = (
    r"(?:sharp|razor-sharp|knife-sharp|crisp|clean|clear|distinct|neat|precise|definite|well-defined|"
    r"well-demarcated|well-circumscribed|abrupt|clear-cut|clean-cut|sharp-cut)"
)
BLURRED = (
    r"(?:blurred|blurry|fuzzy|hazy|vague|indistinct|unclear|soft|smudgy|smudged|diffuse|ill-defined|poor|washed-out|"
    r"faint|undefined|unsharp|indefinite|imprecise|faded|fading|gradual|nebulous|obscure|elusive|woolly|feathered)"
)
BE = r"(?:is|are|was|were|appears?|looks?|seems?|remains?|being|stays?)"
BORDER = {
    "mixed": re.compile(
        rf"\b{EDGE}:? mixed\b(?! colou?r)|\bpart (?:{CRISP}|{BLURRED}),? (?:and )?part (?:{CRISP}|{BLURRED})\b|"
        rf"\bin places {CRISP}\b[^.;]*\bin places\b|"
        rf"\bhere\b[^.;]*\b{CRISP}\b[^.;]*\bthere\b|\bhere\b[^.;]*\b{BLURRED}\b[^.;]*\bthere\b|"
        rf"\b{EDGE}(?: \w+){{0,2}} {BE} (?:of (?:an? )?)?mixed\b(?! colou?r| with)|\bmixed (?:\w+ )?{EDGE}\b"
        rf"|\bin part (?:sharp|crisp|clear|well|neat)\w*(?: \w+){{0,3}} in part\b|"
        rf"\bpartly {CRISP},? (?:and )?partly \w+|\b{EDGE},? (?:\w+ )?of (?:an? |the )?mixed\b(?! colou?r| hue|"
        rf" shade| tone)|\b{EDGE}(?: \w+){{0,2}} (?:neither|not) (?:\w+ )?{CRISP} n?or (?:\w+ )?\w+"
    ),
    "sharp": re.compile(
        rf"\b{EDGE} stands? out (?:clearly|sharply|crisply|well)\b|\b{CRISP}-(?:edged|bordered|rimmed|margined|"
        rf"outlined)\b|"
        rf"\b(?:sharply|keenly|crisply|clearly|well|neatly|cleanly|precisely|distinctly|abruptly|strictly|"
        rf"exactly)[- ]{DRAWN}\b"
        rf"|\b{CRISP}(?:,? (?:and )?\w+)?,? {EDGE}\b|\b{EDGE}(?: \w+){{0,3}} {BE} (?:\w+ly |very |quite |"
        rf"rather )?{CRISP}\b"
        rf"|\b(?:ends?|stops?|ceases?|terminat\w+) abruptly|\b{EDGE} (?:that |which )?(?:is|are) clearly visible"
        rf"|\b{EDGE}:? {CRISP}(?=[.,;]|$)|\b(?:cut|drawn) (?:out )?as (?:if|though)? ?(?:with|by) an? (?:knife|"
        rf"ruler|compass|blade|scalpel|pen)"
        rf"|\b{EDGE} can be (?:traced|followed|drawn) (?:easily|clearly|precisely|all)"
    ),
    "indistinct": re.compile(
        rf"\b{EDGE} (?:is |are |was |were )?not (?:very |at all )?{CRISP}\b|"
        rf"\b{BLURRED}-(?:edged|bordered|rimmed|margined|outlined)\b|"
        rf"\b{EDGE},? (?:that |which )?(?:can ?not|can't|could not|is not|are not|isn't|not|nobody can|nobody could|"
        rf"no one can|no one could) "
        rf"(?:be )?(?:\w+ly |well )?(?:to see|traced?|seen|made out|followed|drawn|discerned|told|visible|"
        rf"discernible|found|fixed)\b|"
        rf"\b(?:hard|hardly|impossible|difficult|cannot|can not|can't|nobody|no one|unclear|not clear)\b[^.;,]*"
        rf"\bwhere (?:it|the lesion|one) (?:ends|stops|begins)\b|\bwhere (?:it|the lesion) (?:ends|stops)\b[^.;]*"
        rf"\b(?:hard|impossible|difficult|unclear|nobody)\b|\bno line (?:says|shows|marks|tells) where\b|"
        rf"\b(?:poorly|fuzzily|hazily|softly|ill|vaguely|badly|indistinctly|hardly|barely|weakly|faintly|"
        rf"imprecisely|loosely|"
        rf"scarcely)[- ]{DRAWN}\b|\b(?:not|cannot|can't|without|no) (?:\w+ )?(?:well|clearly|sharply|"
        rf"crisply)[- ]{DRAWN}\b"
        rf"|\b{BLURRED}(?:,? (?:and )?\w+)?,? {EDGE}\b|\b{EDGE}(?: \w+){{0,3}} {BE} (?:\w+ly |very |quite |"
        rf"rather )?{BLURRED}\b"
        rf"|\b(?:melt|fray|fade|blend|merge|dissolve|bleed|trail|shade|peter|fizzle|diffuse|vanish|run|pass)(?:s|es|"
        rf"ing)? "
        r"(?:\w+ ){0,2}?(?:into|out|away|off|gradually|imperceptibly|seamlessly) (?:\w+ ){0,3}?(?:skin|surround\w+|"
        rf"neighbou?r\w+|background|environment|tissue)|\b{EDGE} (?:that |which )?(?:\w+ly )?(?:melts?|fades?|blends?|"
        rf"merges?|"
        r"dissolves?|trails?|shades?|blurs?|peters?|bleeds?|fading|blurred|smudged|melting|dissolving|(?:dies?|"
        r"peters?) out)\b"
        rf"|\b{EDGE}:? {BLURRED}(?=[.,;]|$)"
        rf"|\b(?:hard|difficult|impossible) to (?:\w+ )?(?:trace|tell|define|discern|delineate|make out|follow|"
        rf"determine)\b"
        rf"|\b(?:no|without(?: an?)?|lacks? an?|lacking an?) (?:\w+ )?(?:sharp|clear|crisp|distinct|discernible|"
        rf"definite|definable|clear-cut) {EDGE}"
    ),
}  # fmt: skip
AN_EDGE = re.compile(rf"\b{EDGE}\b")
MIXTURE = re.compile(r"\b(?:mixture|mix|combination|blend) of\b")
BOTH = (re.compile(rf"\b(?:{CRISP}|crisply|sharply)\b"), re.compile(rf"\b(?:{BLURRED}|blurring|fades?)\b"))


def shape_claims(clean: str, facts: Facts, name: str) -> Claims:
    """(word of the options, term) of what is claimed about `name` (asymmetry, border); a negation turns symmetry, and
    makes "not sharp" of a sharp border."""
    parts = [without(sentence, said.names_of(facts)) for sentence in sentences(clean)]
    find = _symmetry if name == "asymmetry" else _border
    return tuple(claim for part in parts for claim in find(part))


@functools.lru_cache(maxsize=1024)
def _symmetry(sentence: str) -> Claims:
    told = [c for c in said.claims(sentence, "asymmetry_names") if not _is_of_a_limb(sentence, c)]
    found = [(OPPOSITE[c.group], f"not {c.term}") if c.negated else (c.group, c.term) for c in told]
    noun = SYMMETRY.search(sentence)
    word = noun and next(filter(None, noun.groups()))
    if noun and word and not any(word in claim.term for claim in told):
        group = "asymmetric" if word == "asymmetry" else "symmetric"
        at = noun.start() + noun[0].index(word)
        denied = (
            said.is_negated(sentence, at, noun.end()) or re.search(r"\b(?:lack|want|devoid) of\b", noun[0]) is not None
        )
        found.append((OPPOSITE[group] if denied else group, noun[0]))
    if not found:
        found = [(group, m[0]) for group, pattern in HALVES.items() if (m := pattern.search(sentence))][:1]
    return tuple(found)


def _is_of_a_limb(sentence: str, claim: said.Claim) -> bool:
    """Whether a part of the body is called so, not the lesion: "a symmetrical upper extremity"."""
    place = said.places_pattern().match(sentence, claim.start + len(claim.term) + 1)
    return (
        place is not None
        and re.match(r" (?:skin )?(?:lesion|\w+oma|nevus|growth|tumou?r)", sentence[place.end() :]) is None
    )


def _is_both(sentence: str) -> bool:
    """Whether a border is said to be sharp and blurred at once: "a mixture of sharp and fading stretches"."""
    if MIXTURE.search(sentence) is None or AN_EDGE.search(sentence) is None:
        return False
    found = [pattern.search(sentence) for pattern in BOTH]
    return all(m is not None and not said.is_negated(sentence, m.start(), m.end()) for m in found)


@functools.lru_cache(maxsize=1024)
def _border(sentence: str) -> Claims:
    if _is_both(sentence):
        return (("mixed", "mixed"),)
    told = said.claims(sentence, "border_names")
    groups = {claim.group for claim in told}
    found = [(f"not {c.group}", f"not {c.term}") if c.negated else (c.group, c.term) for c in told]
    for group, pattern in BORDER.items():
        match = pattern.search(sentence)
        if match is not None and group not in groups and "mixed" not in groups:
            denied = said.is_negated(sentence, match.start(), match.end())
            found.append((f"not {group}" if denied else group, match[0]))
    named = {group for group, _ in found}
    held = {group for group in named if not group.startswith("not ")}
    at_odds = len(held) > 1 or any(f"not {group}" in named for group in held)
    if len(held) == 3 or (at_odds and PARTLY.search(sentence)):  # "mixed: sharp above and indistinct below"
        return (("mixed", "partly"),)
    return tuple(found)
