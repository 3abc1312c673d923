"""How much of the label a note's text gives away: a bag-of-words classifier fitted on some notes, tested on others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def text_label_information(
    train_texts: Sequence[str],
    train_labels: Sequence[int],
    test_texts: Sequence[str],
    test_labels: Sequence[int],
    seed: int = 0,
) -> float:
    """Balanced accuracy on the test notes of a logistic regression over word counts, fitted on the training notes.

    Notes of one group (lesion or patient) must stand on one side. Labels: integers, the same classes on both sides.
    The mean of the recalls is over the classes among `test_labels`; chance is one over their number. NaN where either
    side is empty; where training knows one class alone, that class is the answer.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import recall_score
    from sklearn.pipeline import make_pipeline

    if not train_texts or not test_texts:
        return float("nan")
    if len(set(train_labels)) == 1:
        said = np.full(len(test_texts), train_labels[0])
    else:
        words = CountVectorizer(
            ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b", min_df=2 if len(train_texts) > 50 else 1
        )
        model = LogisticRegression(class_weight="balanced", max_iter=2000, C=1.0, random_state=seed)
        said = make_pipeline(words, model).fit(list(train_texts), list(train_labels)).predict(list(test_texts))
    present = sorted(set(test_labels))
    return float(recall_score(list(test_labels), said, labels=present, average="macro", zero_division=0))
