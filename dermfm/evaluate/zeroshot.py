"""Zero-shot classification: class words, bare or in a few sentences, against image embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from dermfm.evaluate.records import CLASS_SETS

BARE = "{}"
TEMPLATES: dict[str, tuple[str, ...]] = {
    "classes": (
        BARE,
        "a photo of {}",
        "an image of a skin lesion: {}",
        "a dermoscopic image of {}",
        "the diagnosis is {}",
    ),
    "malignancy": (BARE, "a photo of a {} skin lesion", "a {} lesion", "a dermoscopic image of a {} lesion"),
}
TEMPLATES["subclasses"] = TEMPLATES["classes"]
PROMPT_SETS = ("bare", "ensemble")


@dataclasses.dataclass(frozen=True)
class Prompts:
    """P prompts: text, class set, class index, and whether it is the bare word, each [P]."""

    texts: list[str]
    class_sets: list[str]
    classes: np.ndarray
    bare: np.ndarray


def make_prompts(templates: Mapping[str, Sequence[str]] = TEMPLATES) -> Prompts:
    """Every template filled with every word of every class set; the bare word is always among them."""
    rows = [
        (template.replace("{}", word), name, index, template == BARE)
        for name, words in CLASS_SETS.items()
        for template in dict.fromkeys((BARE, *templates.get(name, ())))
        for index, word in enumerate(words)
    ]
    texts, sets, classes, bare = (list(column) for column in zip(*rows, strict=True))
    return Prompts(texts, sets, np.array(classes), np.array(bare))


def class_vectors(prompts: Prompts, vectors: np.ndarray, class_set: str, prompt_set: str) -> np.ndarray:
    """[C, d] of unit length: the bare word's vector, or the mean over all templates (bare one included), normalised."""
    own = np.array([name == class_set for name in prompts.class_sets])
    if prompt_set == "bare":
        own &= prompts.bare
    means = [
        vectors[own & (prompts.classes == c)].astype(float).mean(axis=0) for c in range(len(CLASS_SETS[class_set]))
    ]
    stacked = np.stack(means)
    return stacked / np.linalg.norm(stacked, axis=1, keepdims=True)


def zero_shot_scores(
    images: np.ndarray, prompts: Prompts, vectors: np.ndarray, class_set: str, prompt_set: str
) -> np.ndarray:
    """Cosines [N, C] of image embeddings [N, d] with the class vectors; the class is the largest."""
    return images.astype(float) @ class_vectors(prompts, vectors, class_set, prompt_set).T
