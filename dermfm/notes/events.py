"""Sizes, symptoms, histories and treatments in a sentence: what no fact of a record gives, said or denied.

Word lists (`terms.yaml`) name what medical writing calls by a name; the patterns here find what has a grammar: spans of
time, perfects of change, people who do or say something, advice and plans, and numbers with a unit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from dermfm.notes import claims as said
from dermfm.notes.ages import ages
from dermfm.notes.claims import without
from dermfm.notes.facts import Facts

MONTHS = "january|february|march|april|may|june|july|august|september|october|november|december"
NUMBER = r"\d+(?:[.,]\d+)?"
COUNT = (
    r"(?:\d+|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|fifteen|eighteen|twenty|thirty|forty|"
    r"fifty|several|many|few|couple of|number of|half a)"
)
PERIOD = r"(?:years?|months?|weeks?|days?|decades?)"
LENGTH = re.compile(
    rf"\b{NUMBER}(?:\s?(?:x|by|×|-|to)\s?{NUMBER})*\s?-?(?:mm|cm|nm|µm|um|mm2|cm2|mm²|cm²|millimet(?:er|re)s?|"
    r"centimet(?:er|re)s?|inch(?:es)?)(?![\w])"
    rf"|\b{NUMBER} ?[x×] ?{NUMBER}\b|\b[\w-]+-sized\b|\b(?:the )?size of an? \w+"
    r"|\bdeep\b(?!,? (?:\w+ )?(?:white|red|brown|blue|black|purple|pink|shade|hue|colou?r|tone)s?\b)"
    r"|\blittle (?:\w+ )?(?:lesion|mole|spot|bump|growth|patch|nodule|papule|nevus|mark|thing|tumou?r)\b"
)
EXTENT = re.compile(
    r"\b(?:occup\w+|cover\w*|spans?|spanning|involv\w+|tak\w+ up) (?:almost |nearly |about )?(?:the |an? )?(?:whole|"
    r"entire|most|half|third|quarter|full|two thirds)(?: width| length| of)\b"
)
DURATION = re.compile(
    rf"\b{COUNT}[ -]{PERIOD}\b(?![ -]old| of age)|\b(?:two|three|four|five|six|ten|several|a few) (?:years?|months?|"
    r"weeks?) old\b|\b(?:for|over|within|about|almost|nearly) (?:days|weeks|months|years|decades|an? (?:year|month|"
    r"week|decade))\b|\b(?:past|following|preceding|recent|previous|last|coming) (?:\w+ )?(?:days?|weeks?|months?|"
    r"years?|decades?|summer|winter|spring|autumn|fall)\b"
    rf"|\b(?:since|in|over) (?:the |last |this |one |a |late |early |mid-?)?(?:{MONTHS}|(?:19|20)\d\d|spring|summer|"
    r"autumn|winter)\b(?! image)"
)
AHEAD = re.compile(r"\b(?:in|within|every|after|for|next|another|again in|of|coming|following)(?: the)? $")
GROWTH_IN_SIZE = re.compile(
    r"\b(chang\w+|grow\w*|grew|doubl\w+|tripl\w+|quadrupled|shr[aiu]nk\w*|increas\w+|enlarg\w+|decreas\w+|"
    r"stable) in size\b"
)
BE_CHANGING = (
    r"(?:growing|changing|enlarging|increasing|spreading|darkening|getting|becoming|expanding|evolving|there|present|"
    r"stable|known|visible|noticed|unchanged|bothering|observed for|watched)"
)
CHANGED = (
    r"(?:grown|changed|enlarged|increased|decreased|darkened|lightened|thickened|doubled|shrunk|expanded|evolved|"
    r"existed|appeared|arisen|recurred|regressed|lived|worked|spent|smoked|used|taken|suffered|noticed|ignored|tried|"
    r"moved|travelled|traveled|lost|persisted|remained|stayed|(?:become|got|gotten|turned|grown) (?:\w+er|more|less)\b)"
)
PEOPLE = r"(?:she|he|they|patient|man|woman|who|wife|husband|family|parents|daughter|son)"
OFTEN = r"(?:also |never |always |usually |often |regularly |first |now |still |not |had |has |\w+ly )*"
RECENT = r"\b(?:recently|lately|newly) (?:developed|appeared|noticed|formed|grew|undergone)\b"
PAST = (
    re.compile(RECENT),
    re.compile(
        r"\b(?:may|might|must|could) have (?:\w+ly )?(?!been\b|contributed|caused|resulted)\w+ed\b|"
        r"\bpreviously (?:been )?(?:misdiagnosed|treated|"
        r"biopsied|removed|excised|known)\b|\bthank(?:s| you) for (?:referring|sending|asking)\b"
    ),
    re.compile(rf"\b(?:has|have|had|having|'s|'ve) {OFTEN}(?:been {OFTEN}{BE_CHANGING}|{CHANGED})\b"),
    re.compile(
        rf"\b{PEOPLE} {OFTEN}(?:works?|worked|smokes?|smoked|drinks|drank|plays?|played|swims?|swam|"
        r"sails?|gardens?|enjoys?|enjoyed|loves?|loved|spends?|spent|travels?|traveled|travelled|noticed|noted|"
        r"remembers?|remembered|recalls?|recalled|grew|moved|retired|served|tans|burns|avoided|ignored|tried|forgot|"
        r"picked|discovered|spotted|observed|saw)\b"
    ),
    re.compile(
        r"\bhad (?:\w+ly |never |already )?(?:(?!diagnosed|presented|examined|imaged)\w+ed|seen|known|grown|begun|"
        r"taken|gone|come)\b|\b(?:cut|nicked|burned|burnt|scratched|hurt|injured|knocked|bumped|hit) (?:herself|"
        r"himself|themselves|it)\b"
    ),
    re.compile(
        r"\b(?:noticed|discovered|spotted|found|detected|seen|noted) (?:\w+ )?(?:by (?:her|his|their|the patient's) |"
        r"by (?:chance|accident|the patient)|(?:when|while) (?:she|he|the patient|they|showering|bathing|dressing)|"
        r"on holiday|on vacation|at work|at home)"
    ),
    re.compile(
        r"\b(?:when|while) (?:she|he|the patient|they) (?:was|were|had) |\bas an? (?:child|teenager|youth|young|boy|"
        r"girl|student|baby|infant)\b|\bever since\b|\b(?:onset|duration|evolution) (?:of|is|was|over)\b"
    ),
)
# What a patient is said to say is history where it is nothing else
REPORTED = re.compile(
    rf"\b{PEOPLE} {OFTEN}(?:reports?|reported|states?|stated|mentions?|mentioned|says|said|tells|told|claims?|claimed|"
    r"admits?|admitted|denies|denied|believes?|thinks?|thought|wonders?|asks?|asked)\b"
)
# What is planned or advised, against what was done
PLAN = re.compile(
    r"\b(?:recommend\w*|advi[sc]\w*|should|suggest\w*|plan(?:s|ned|ning)?|will|requires?|required|needs?|needed|"
    r"warrant\w*|consider(?:ed)?|schedul\w*|indicated|necessary|must|ought|may|might|could|would|next|pending|"
    r"encouraged|urged|offered|discussed|arranged?|booked|propos\w+|request\w*|awaits?|awaiting|awaited|ordered|"
    r"please|if|decision|appropriate|can|to be|undergoing|for an? (?:\w+ )?(?:biopsy|histology|histopathology)|"
    r"to confirm|to exclude|to rule out|following)\b"
)
TO_SAY = (  # what should be thought or said of a lesion is no advice
    r"(?:considered|regarded|classed|counted|ruled|noted|interpreted|seen|called|classified|understood|mentioned|"
    r"emphasi[sz]ed|stressed|"
    r"kept in mind|remembered|confused|distinguished|differentiated|correlated|read|viewed|thought|taken as|"
    r"reported|documented|described|labell?ed|named|recorded|assumed|used only|given|diagnosed|able|present|visible|"
    r"difficult|mistaken|cause|worry|guide|concern)"
)
ADVICE = (
    re.compile(
        rf"\b(?:should|must|ought to|needs? to|has to|have to|shall)(?: not| also| only| now| then| always| never|"
        rf" \w+ly)?(?: be)?(?: \w+ly)? (?!be\b|not\b|{TO_SAY})[a-z]+"
    ),
    re.compile(
        r"\b(?:is|are|was|were|has been|have been|being|seems|appears|be) (?:\w+ly |also |not |therefore |now |then "
        r"|further )*(?:recommended|advised|advisable|warranted|planned|scheduled|required|needed|necessary|prudent|"
        r"mandatory|arranged|booked|ordered|encouraged|instructed|urged|asked to|told to|reminded|counsell?ed|"
        r"indicated(?! by)|offered|proposed|prescribed|pending|awaited|sufficient|enough)\b"
    ),
    re.compile(
        r"\b(?:requir|need|demand|deserv)\w* (?:an? |your |the |some |for an? )?(?:\w+ ){0,2}(?:examination|"
        r"evaluation|attention|"
        r"assessment|investigation|work-up|review|testing)\b|\b(?:refer|referring) (?:you|me) to (?:an?|my|the|our)\b|"
        r"\b(?:recommend(?:s|ed|ing|ations?)?|advis(?:e|es|ed|ing)|advice|schedul(?:e|es|ed|ing)|arrang(?:e|es|ed|"
        r"ing)|urg(?:e|es|ed|ing)|encourag(?:e|es|ed|ing)|instruct(?:s|ed|ing)|warrants?|"
        r"counsels?)\b(?! as| attention| concern| like)|\bplan(?:s|ned|ning)? (?:is|to|for|was|of)\b"
        rf"|\b(?:she|he|patient|they|we|lesion|it|tumou?r|mole) will (?:be )?(?!be\b|{TO_SAY})\w+\b"
    ),
    re.compile(
        r"^(?:\W*(?:plan|recommendations?|advice|next steps?|management|treatment|follow-up|therapy|"
        r"disposition)\b ?[:,-])"
        r"|^\W*(?:avoid|apply|monitor|excise|repeat|refer|biopsy|schedule|return|wear|recheck|continue|start|stop|"
        r"perform|treat|remove|protect|limit|watch|arrange|book|reassess|re-examine|stay|discontinue|use|keep|observe|"
        r"recommend|suggest|advise|reassure|follow up|review in|discharge)\b(?! (?:is|was|of|by)\b)"
    ),
)
# What talk tells of this patient, and what only of the trade of the one who talks
CARE = re.compile(
    r"treat|(?:requir|need)\w* |referr?\w* (?:you|me) |therap|sun cream|sunscreen|chemo|radio|biops|surg|excis|"
    r"remov|refer h|further ev|(?:we|patient|they) will be|seek"
)
CARE_AS_WORK = re.compile(
    r"\b(?:a|as an?|the) (?:\w+ )?(?:dermatologist|doctor|specialist|surgeon)s? (?:who|treating|speciali\w+)|"
    r"speciali[sz](?!t)|\btreating (?:a |the )?(?:patient|physician|doctor)|\bhistory of the patient|^please consult|"
    r"\b(?:article|text|textbook|knowledge|techniques|sentence|information about|steps|successful treatment|"
    r"context of|new|right|also describe|surgery center)\b"
)
OF_THE_LESION = re.compile(r"\b(?:lesion|melanoma|carcinoma|nevus|growth|tumou?r|spot|mole|keratosis|mm|cm)\b")
HAPPENED = re.compile(
    rf"{RECENT}|\bthank(?:s| you) for (?:referring|sending|asking|(?:your|the) (?:\w+ )?referral)\b|"
    rf"\bpreviously been\b|"
    r"\b(?:referred|sent) (?:to )?(?:me|us|her|him)\b|\breceived (?:\w+ )?referral\b|"
    r"\b(?:new|recent) (?:skin )?(?:lesion|growth|mole|spot)\b"
)
HAD = (
    r"\b(?:been|being|was|were|have|undergo\w* an?|completed an?|(?:patient|man|woman|male|female|he|she) (?:with|"
    r"has|had) an?)(?: \w+ly| skin)? "
)
CAUSED = re.compile(
    r"\b(?:(?:caused|induced|triggered|brought about) by|(?:associated|linked) with|linked to|related to|"
    r"factors?,? such as) (?:\w+ ){0,3}$"
)  # a cause, not what happened
TOLD_OF_KIN = re.compile(  # what makes the mention of a relative a family history or a report
    r"\b(?:had|has|history|suffer\w*|died|diagnosed|affected|also|whose|similar|noticed|reports?|reported|says|said|"
    r"states?|stated|told|saw|watch\w*|remember\w*|spotted|found|pointed|treated|melanoma|cancer|with)\b"
)
KIN = re.compile(
    r"\b(?:mother|father|sister|brother|uncle|aunt|cousin|parents?|son|daughter|grand\w+|relatives?)\b[^.;]*$"
)
# What drugs are called
DRUG = re.compile(
    r"\b\w{3,}(?:mab|nib|cillin|mycin|azole|trexate|statin|olol|pril|sone|olone|cycline|caine|quimod|parib)\b"
)


def events(clean: str, facts: Facts) -> Iterator[tuple[str, str]]:
    """(what, term) of sizes, symptoms, history and treatment in the normalised sentence."""
    blank = said.without_words(without(clean, said.names_of(facts)), "idle_phrases")
    blank = re.sub(
        r"\b(?:large|small|big) (?:but \w+ )?(?:amount|number|part|risk|chance|percentage|proportion|genetic|"
        r"mutation)s?\b",
        lambda m: "_" * len(m[0]),
        blank,
    )
    blank = re.sub(r"\bnon-(?=\w)", "non ", blank)
    blank = GROWTH_IN_SIZE.sub(r"\1", blank)
    told = [("size", m[0]) for pattern in (LENGTH, EXTENT) for m in pattern.finditer(blank)]
    told += [("treatment", m[0]) for m in DRUG.finditer(blank)]
    told += _spans_of_time(clean, blank, facts)
    told += _by_words(clean, blank)
    if not any(about != "size" for about, _ in told):
        told += [("history", m[0]) for pattern in PAST if (m := pattern.search(blank))]
    if not any(about == "treatment" for about, _ in told):
        told += [("treatment", m[0]) for pattern in ADVICE if (m := pattern.search(blank))]
    yield from told


def past_events(clean: str) -> Iterator[tuple[str, str]]:
    """What tells a history only where a sentence has nothing else that is unsupported."""
    blank = said.without_words(clean, "idle_phrases")
    blank = re.sub(r"\bhad been (?=(?:\w+ly )?(?:diagnosed|confirmed|classified|identified)\b)", "", blank)
    yield from (("history", term) for term in said.found_words(blank, "past_words"))
    yield from (("history", m[0]) for m in REPORTED.finditer(blank))


def _is_planned(clean: str) -> bool:
    return PLAN.search(clean) is not None or ADVICE[-1].search(clean) is not None


def told_to_somebody(clean: str, about: str, term: str) -> bool:
    """Whether a sentence that is talk tells the event of this patient: "I was referred to you" tells of a referral,
    "your treatment will be successful" of a treatment, "this is no medical advice" of nothing."""
    if about == "size":
        return OF_THE_LESION.search(clean) is not None
    if about == "treatment" and CARE.match(term) and not CARE_AS_WORK.search(clean):
        return True
    return HAPPENED.search(clean) is not None or re.search(HAD + re.escape(term) + r"\b", clean) is not None


def _spans_of_time(clean: str, blank: str, facts: Facts) -> Iterator[tuple[str, str]]:
    planned = _is_planned(clean)
    for match in DURATION.finditer(blank):
        if match[0].split()[0] in ages(clean) or re.match(rf"{facts.get('age', 'x')} years\b", match[0]):
            continue
        is_ahead = match[0].startswith("in ") and planned
        cared_for = planned or bool(said.found_words(blank, "treatment_words"))
        is_ahead = is_ahead or (cared_for and AHEAD.search(blank[: match.start()]) is not None)
        yield "treatment" if is_ahead else "history", match[0]


def _by_words(clean: str, blank: str) -> Iterator[tuple[str, str]]:
    planned = _is_planned(clean)
    for term in said.found_words(blank, "work_up_words"):
        ahead = planned or re.search(rf"\b(?:is|are|being|be|will be) (?:\w+ly )?{re.escape(term)}\b", blank)
        yield "treatment" if ahead else "history", term
    blank = said.without_words(blank, "work_up_words")
    for about in ("size", "symptom", "history", "treatment"):
        for term in said.found_words(blank, f"{about}_words"):
            before = blank[: blank.index(term)]
            if about == "history" and (
                CAUSED.search(before) or (term in said.word_set("bystanders") and not TOLD_OF_KIN.search(blank))
            ):
                yield "other", term
            elif about != "treatment" or not KIN.search(before):
                yield about, term
