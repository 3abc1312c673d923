"""How much a note tells about the label: a bag-of-words classifier from note to label."""

from __future__ import annotations

from collections.abc import Sequence


def text_label_information(
    train_texts: Sequence[str],
    train_labels: Sequence[int],
    test_texts: Sequence[str],
    test_labels: Sequence[int],
    seed: int = 0,
) -> float:
    """Balanced accuracy on the test notes of a balanced logistic regression on counts of words and word pairs.

    ValueError where the training notes hold fewer than two labels or no word, or there is no test note.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import recall_score
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(
        CountVectorizer(ngram_range=(1, 2)),
        LogisticRegression(class_weight="balanced", max_iter=1000, random_state=seed),
    )
    model.fit(list(train_texts), list(train_labels))
    present = sorted(set(test_labels))
    answers = model.predict(list(test_texts))
    return float(recall_score(list(test_labels), answers, labels=present, average="macro", zero_division=0.0))
