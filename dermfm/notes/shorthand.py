"""Clinical shorthand in a note, written out: "58 y/o M, BCC" is "58-year-old male, basal cell carcinoma"."""

from __future__ import annotations

import re

from dermfm.notes.phrases import any_of

ABBREVIATIONS = {
    "dx": "diagnosis", "fh": "family history", "fhx": "family history", "hx": "history", "pmh": "history of",
    "h/o": "history of", "s/p": "history of", "tx": "treatment", "rx": "treatment", "bx": "biopsy",
    "f/u": "follow-up", "rtc": "return to clinic", "c/o": "complains of", "r/o": "rule out", "w/o": "without",
    "ue": "upper extremity", "le": "lower extremity", "df": "dermatofibroma", "scc": "squamous cell carcinoma",
    "cscc": "squamous cell carcinoma",
    "bcc": "basal cell carcinoma", "ssm": "superficial spreading melanoma", "mis": "melanoma in situ",
    "ka": "keratoacanthoma",
}  # fmt: skip
DECADES = ["twenties", "thirties", "forties", "fifties", "sixties", "seventies", "eighties", "nineties"]
SHADE = r"(light|dark)"
OF_A_LIMB = r"(?=(?:hand|neck|head|knee|foot|ear|leg|thigh|arm|forearm)s?\b)"


# The letter, the sign, what is meant, and another word for it
SEXES = (("m", "♂", "male", r"masc(?:uline)?\b\.?"), ("f", "♀", "female", r"feminine\b"))


def _alone(letter: str, sign: str, sex: str, word: str) -> list[tuple[str, str]]:
    """ "; f;", "♀", "f 58", "feminine"."""
    return [
        (rf"(?<=[;,/] ){letter}(?= ?[;,/.])", sex),
        (sign, f" {sex} "),
        (rf"(?:^|(?<=[,;:] )){letter} ?(\d{{2}})(?=\W|$)", rf"\1-year-old {sex}"),
        (rf"\b{word}", sex),
    ]


def _of_sex(letter: str, sex: str) -> list[tuple[str, str]]:
    """ "58m", "m/58", "a 58-year-old m", "sex: m"."""
    aged = rf"\1-year-old {sex}"
    return [
        (rf"(?:^|(?<=\ba )|(?<=\bpatient ))(\d{{1,2}}){letter}\b", aged),
        (rf"(?<![\w.,-])(\d{{2,3}}) ?{letter}(?=[,.:;)]|$| /| w/| with\b| who\b)", aged),
        (rf"\b(?:{letter}|{sex})(?:, ?|/)(\d{{1,3}})\b|\b(\d{{1,3}}) ?/ ?{letter}\b", rf"\1\2-year-old {sex}"),
        (rf"\b(\d{{1,3}}-year-old) {letter}\b", rf"\1 {sex}"),
        (rf"\b(?:sex|gender): ?{letter}\b", f"sex: {sex}"),
    ]


# What it looks like in lower case, and what it stands for; in this order
PATTERNS = [
    (r"\b(\d{1,3}) ?-?(?:y/o|y\.o\.?|yo|yrs?[- ]old)\b", r"\1-year-old"),
    (r"\b(\d{1,3}) ?(?:yrs?)\b(?:\.(?! ?$))?", r"\1 years"),
    *(row for who in SEXES for row in _alone(*who)),
    (r"\b(upper|lower) ext\b\.?(?! ?$)", r"\1 extremity"),
    (r"\b(\d{1,3}) ?y(?:rs?|ears?)?\.?(?: old)? (?=(?:fe)?male\b|(?:wo)?man\b|[mf]\b)", r"\1-year-old "),
    (r"\bx ?(\d+) ?(?:y|yrs?)\b", r"for \1 years"),
    *(row for letter, _, sex, _ in SEXES for row in _of_sex(letter, sex)),
    (r"\bpt\b\.?", "patient"),
    (r"\babd\b\.?", "abdomen"),
    (r"\bclin\b\.?", "clinical"),
    (r"\bderm\. (?=image|photo|picture)", "dermoscopic "),
    (r"\bmalig\.", "malignant"),
    (r"\bw/ ", "with "),
    (r"\bc/w\b", "consistent with"),
    (r"\bdk\b\.?", "dark"),
    (r"\blt\b\.? (?=brown)", "light "),
    (r"\bimg\b\.?", "image"),
    (r"\bfoto\b", "photo"),
    (r"\basymm?\b\.?", "asymmetric"),
    (r"\bsymm?\b\.?", "symmetric"),
    (r"\bh ?& ?n\b|\bhead-and-neck\b", "head and neck"),
    (r"\bhead(?:-or-|-)neck\b", "head or neck"),
    (r"\bcell ca\b\.?", "cell carcinoma"),
    (r"\b(\d{1,3}) years? old\b", r"\1-year-old"),
    (r"\bd'?scopy\b", "dermoscopy"),
    *(
        (rf"\b(in (?:her|his|their) (?:early |mid[- ]?|late )?){first}0s\b", rf"\1{word}")
        for first, word in enumerate(DECADES, start=2)
    ),
    (r"\bbrn\b", "brown"),
    (r"\bblk\b", "black"),
    (r"\bi\.e\.(?=[ ,])", "that is"),
    (r"\be\.g\.(?=[ ,])", "such as"),
    (r"\banything but\b", "not"),
    (
        r"\b(?:(?:that|which) )?(?:has |had )?(?:arisen|arose|arising) (?:in|from|within|on|"
        r"inside) (an?)\b",
        r"arising in \1",
    ),
    (r"\bin (?:association|company) with\b", "associated with"),
    (rf"\b{SHADE} ?[+&] ?{SHADE} brown\b", r"\1 brown and \2 brown"),
    (r"\bsymmetry(?::| -)? (?:none|absent|no(?=[.,;]|$))\b", "asymmetric"),
    (r"(?<!a)\bsymmetry(?::| -)? (?:yes|full|given)\b", "symmetric"),
    (r"\bsolar lentiginous(?= lesion|[.,;]|$)", "solar lentigo"),
    (r"\bin[- ]situ\b", "in situ"),
    (r"\bin situ melanoma\b|\bmelanoma, (?:still |yet )?in situ\b", "melanoma in situ"),
    (r"\bmelanoma, invasive\b", "invasive melanoma"),
    (r"\bmid-(?=\w+ties\b|teens\b)", "mid "),
    (r"\b(squamous|basal)-cell\b", r"\1 cell"),
    (r"\b(?:a |an )?(?:sk|seb\.? ?k)\b(?!-)", "seborrheic keratosis"),
    (r"\bseb\.? (?=keratos|wart)", "seborrheic "),
    (r"(?<!-)\bak\b(?!-)", "actinic keratosis"),
    (rf"\b(?:the )?backs? of (?:the |his |her |their )?{OF_A_LIMB}", "the "),
    (r"\basymmetry(?::| -)? ?(?:yes|present|seen|\+)(?=\W|$)", "asymmetric"),
    (rf"\b{SHADE},? as well as {SHADE} brown\b", r"\1 brown and \2 brown"),
    (rf"\bbrown[ -]{SHADE}\b(?! brown)", r"\1 brown"),
    (rf"\b{SHADE}er brown\b", r"\1 brown"),
    (
        rf"\b(?:two |both |shades of |tones of |hues of )*browns?,? ?\(?{SHADE} (and|or|to) {SHADE}\)?(?! brown)",
        r"\1 brown \2 \3 brown",
    ),
    (rf"\b{SHADE}-? (and|or|to) {SHADE} (?:shades?|tones?|hues?|tints?) of brown\b", r"\1 brown \2 \3 brown"),
    (rf"\b{SHADE}-? (and|or|to) {SHADE}[ -]brown\b", r"\1 brown \2 \3 brown"),
]
_ABBREVIATED = re.compile(rf"\b{any_of(ABBREVIATIONS)}\b")
_PATTERNS = [(re.compile(pattern), words) for pattern, words in PATTERNS]


def written_out(plain: str) -> str:
    """The text in lower case without shorthand."""
    plain = _ABBREVIATED.sub(lambda m: ABBREVIATIONS[m[0]], plain)
    for pattern, words in _PATTERNS:
        plain = pattern.sub(words, plain)
    return " ".join(plain.split())
