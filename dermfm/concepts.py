"""The 63 concept words of the reference study in seven groups, and which of them a note says.

The concepts of an image are the words of the note that was drawn for it, so they know as much about the label as that
note's strategy does: a label-blind note gives label-blind concepts. `objectives.concept_groups` leaves groups out.
"""

from __future__ import annotations

import functools
import re

import numpy as np

# "blue" is named as a colour and as a kind of nevus in the study; as a word it is one concept, the colour.
CONCEPT_GROUPS: dict[str, list[str]] = {
    "asymmetry": ["symmetry", "asymmetry", "symmetric", "asymmetric"],
    "border": ["irregular", "well-defined", "regular", "indistinct", "distinct", "sharp", "ill-defined"],
    "colour": ["white", "pink", "red", "yellow", "brown", "dark", "black", "blue", "grey", "multicolored"],
    "structure": [
        "flat", "nodule", "plaque", "ulcer", "cyst", "pigment", "dot", "globule", "structureless", "macule", "papule",
        "follicular", "plug",
    ],
    "malignancy": ["benign", "non-malignant", "pre-cancerous", "malignant", "non-benign", "tumor", "cancer"],
    "lesion": ["seborrheic", "nevus", "vascular", "dermatofibroma", "actinic", "basal", "melanoma", "squamous"],
    "subclass": [
        "lentigo", "solar lentigo", "lichenoid", "lichen", "planus", "compound", "halo", "dysplastic", "pyogenic",
        "angioma", "bowen", "kaposi", "maligna", "metastatic",
    ],
}  # fmt: skip
CONCEPTS: list[str] = [word for words in CONCEPT_GROUPS.values() for word in words]
_PLACE = {word: place for place, word in enumerate(CONCEPTS)}
_TOKEN = re.compile(r"[a-z]+(?:[-‐‑][a-z]+)*")
_SPELLINGS = {"gray": "grey", "multicoloured": "multicolored", "tumour": "tumor"}
_PHRASES = [word for word in CONCEPTS if " " in word]


def find_concepts(text: str) -> np.ndarray:
    """bool [63]: the concept words that a text says, as whole words.

    A plural s and British spelling make no difference. The parts of a hyphenated word count ("blue-gray"), unless the
    whole is a concept itself ("well-defined") or the first part is "non".
    """
    tokens = _TOKEN.findall(text.casefold())
    found = np.zeros(len(CONCEPTS), dtype=bool)
    for token in set(tokens):
        found[list(_places(token))] = True
    spoken = f" {' '.join(tokens)} "
    for phrase in _PHRASES:
        if f" {phrase} " in spoken or f" {phrase}s " in spoken:
            found[_PLACE[phrase]] = True
    return found


@functools.lru_cache(maxsize=100_000)
def _places(token: str) -> tuple[int, ...]:
    """Places of the concepts that one word of a text stands for."""
    token = re.sub("[‐‑]", "-", token)
    if (whole := _concept(token)) is not None:
        return (whole,)
    parts = token.split("-")
    if len(parts) == 1 or parts[0] == "non":
        return ()
    return tuple(place for part in parts if (place := _concept(part)) is not None)


def _concept(word: str) -> int | None:
    forms = (word, word.removesuffix("s"))
    return next((_PLACE[_SPELLINGS.get(f, f)] for f in forms if _SPELLINGS.get(f, f) in _PLACE), None)
