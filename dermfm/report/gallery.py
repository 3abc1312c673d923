"""What the model retrieves: for some images their best notes, for some notes their best images, right and wrong."""

from __future__ import annotations

import dataclasses

import numpy as np

from dermfm.evaluate.records import TextSet
from dermfm.records.vocabulary import CLASS_CODES, CLASSES
from dermfm.report.run import Evaluation, Images

NUM_NOTES, NUM_IMAGES = 4, 5
LONGEST = 320  # characters of a note that are shown


@dataclasses.dataclass(frozen=True)
class Hit:
    """One retrieved item: similarity, class, whether it is the query's (None: unknown), a note's text or an image."""

    score: float
    label: str
    right: bool | None
    dataset: str
    text: str = ""
    image: str = ""
    copies: int = 1


@dataclasses.dataclass(frozen=True)
class Query:
    """One query with what came back, best first."""

    label: str
    dataset: str
    hits: list[Hit]
    text: str = ""
    image: str = ""


def image_queries(evaluation: Evaluation, which: int, images: Images, count: int, seed: int) -> list[Query]:
    """Images with their best notes of text set number `which`; equal notes are shown once with their number."""
    records, texts = evaluation.records, evaluation.texts[which]
    chosen = choose_rows(records.datasets, records.labels, count, seed)
    out = []
    for row in chosen:
        scores = evaluation.text[which] @ evaluation.image[row]
        allowed = records.groups[texts.rows] != records.groups[row]
        hits = _best_notes(evaluation, texts, scores, allowed, int(records.labels[row]))
        title, dataset = class_name(records.labels[row]), str(records.datasets[row])
        out.append(Query(title, dataset, hits, image=images.thumbnail(str(records.record_ids[row]))))
    return out


def text_queries(evaluation: Evaluation, which: int, images: Images, count: int, seed: int) -> list[Query]:
    """Notes of text set number `which` with their best images."""
    records, texts = evaluation.records, evaluation.texts[which]
    chosen = choose_rows(records.datasets[texts.rows], records.labels[texts.rows], count, seed)
    out = []
    for place in chosen:
        row = texts.rows[place]
        scores = evaluation.image @ evaluation.text[which][place]
        scores = np.where(records.groups != records.groups[row], scores, -np.inf)
        best = [i for i in np.argsort(-scores, kind="stable")[:NUM_IMAGES] if np.isfinite(scores[i])]
        hits = [
            Hit(
                score=float(scores[i]),
                label=class_name(records.labels[i]),
                right=same_class(int(records.labels[i]), int(records.labels[row])),
                dataset=str(records.datasets[i]),
                image=images.thumbnail(str(records.record_ids[i])),
            )
            for i in best
        ]
        out.append(
            Query(class_name(records.labels[row]), str(records.datasets[row]), hits, shorten(texts.texts[place]))
        )
    return out


def choose_rows(datasets: np.ndarray, labels: np.ndarray, count: int, seed: int) -> list[int]:
    """Up to `count` rows of known label, drawn at random from the data sets in turn, rarer classes first."""
    rng = np.random.default_rng(seed)
    left = {d: list(rng.permutation(np.flatnonzero((datasets == d) & (labels >= 0)))) for d in sorted(set(datasets))}
    chosen: list[int] = []
    used: dict[int, int] = {}
    while len(chosen) < count and any(left.values()):
        for rows in left.values():
            if rows and len(chosen) < count:
                row = min(rows, key=lambda r: used.get(int(labels[r]), 0))
                rows.remove(row)
                used[int(labels[row])] = used.get(int(labels[row]), 0) + 1
                chosen.append(int(row))
    return chosen


def class_name(label: int) -> str:
    """Short and full name of a class."""
    return "unknown class" if label < 0 else f"{CLASS_CODES[label]} · {CLASSES[label]}"


def same_class(label: int, other: int) -> bool | None:
    """Whether two labels are the same class; None where one is unknown."""
    return None if min(label, other) < 0 else label == other


def shorten(text: str) -> str:
    """A note, cut at a blank where it is long."""
    return text if len(text) <= LONGEST else text[:LONGEST].rsplit(" ", 1)[0] + " …"


def _best_notes(
    evaluation: Evaluation, texts: TextSet, scores: np.ndarray, allowed: np.ndarray, label: int
) -> list[Hit]:
    """The best distinct notes outside the query's group. A text counts as right by the class of its own record."""
    records, hits, seen = evaluation.records, [], set()
    for place in np.argsort(-scores, kind="stable"):
        text = texts.texts[place]
        if not allowed[place] or text in seen:
            continue
        seen.add(text)
        own = int(records.labels[texts.rows[place]])
        copies = sum(other == text for other in texts.texts)
        dataset = str(records.datasets[texts.rows[place]])
        hits.append(
            Hit(float(scores[place]), class_name(own), same_class(own, label), dataset, shorten(text), copies=copies)
        )
        if len(hits) == NUM_NOTES:
            break
    return hits
