"""How much the notes tell about the label: rows `text_label_information` beside every task that reads them."""

from __future__ import annotations

from typing import Any

import numpy as np

from dermfm.evaluate.classify import Value
from dermfm.evaluate.embedding import Embedded
from dermfm.evaluate.records import RecordSet, TextSet, text_sets
from dermfm.evaluate.results import Row, make_row
from dermfm.evaluate.shift import Scope
from dermfm.notes.information import text_label_information

SCOPES = ("internal", "external")  # held-out groups of the training domain, and the domain shift


def information_rows(
    training: RecordSet, embedded: Embedded, scopes: list[Scope], seed: int, fields: dict[str, Any], one: TextSet
) -> list[Row]:
    """Rows of one strategy, fitted on its training notes; none where these tell of fewer than two classes.

    The chance level is what always the same class gets.
    """
    if one.strategy not in training.strategies():
        return []
    fitted = text_sets(training, [one.strategy])[0]
    texts, labels = _labelled(fitted, training.labels)
    if len(set(labels)) < 2:
        return []
    rows = []
    for scope in scopes:
        inside = scope.mask[one.rows]
        own = TextSet("", "", one.rows[inside], [], [t for t, k in zip(one.texts, inside, strict=True) if k])
        test_texts, test_labels = _labelled(own, embedded.records.labels)
        if scope.kind == "partition" and scope.name in SCOPES and test_texts:
            found = text_label_information(texts, labels, test_texts, test_labels, seed)
            value = Value(found, None, None, 1 / len(set(test_labels)), len(test_texts))
            about = fields | {"class_set": "classes", "track": one.track, "eval_strategy": one.strategy}
            rows.append(make_row("classify-text", scope.kind, scope.name, "text_label_information", value, **about))
    return rows


def _labelled(texts: TextSet, labels: np.ndarray) -> tuple[list[str], list[int]]:
    known = [(t, int(labels[row])) for t, row in zip(texts.texts, texts.rows, strict=True) if labels[row] >= 0]
    return [t for t, _ in known], [label for _, label in known]
