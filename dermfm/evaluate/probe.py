"""A linear probe: balanced logistic regression on frozen pooled features, its C chosen on validation records."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

C_GRID = (0.0003, 0.001, 0.003, 0.01, 0.03)
DEFAULT_C = 0.003
MAX_ITER = 1000


@dataclasses.dataclass(frozen=True)
class Probe:
    """A fitted probe and the macro F1 on validation records of every C tried (empty without validation records)."""

    model: LogisticRegression
    c: float
    tried: dict[float, float]

    def probabilities(self, features: np.ndarray, num_classes: int) -> np.ndarray:
        """[n, C]; classes that the training records lack get probability 0."""
        out = np.zeros((len(features), num_classes))
        out[:, self.model.classes_] = self.model.predict_proba(features)
        return out


def fit_probe(features: np.ndarray, labels: np.ndarray, valid_features: np.ndarray, valid_labels: np.ndarray) -> Probe:
    """Fit on features [n, F] with labels [n]; C is the best of a small grid by macro F1 on the validation records.

    Raises ValueError where the training records hold fewer than two classes.
    """
    if len(np.unique(labels)) < 2:
        raise ValueError("probe: the training records hold fewer than two classes; set probe=false")
    models: dict[float, LogisticRegression] = {}
    model = LogisticRegression(class_weight="balanced", max_iter=MAX_ITER, warm_start=True)
    for c in C_GRID if len(valid_labels) else (DEFAULT_C,):  # each starts where the stronger penalty before it ended
        models[c] = copy.deepcopy(model.set_params(C=c).fit(features, labels))
    tried = {c: _macro_f1(model, valid_features, valid_labels) for c, model in models.items() if len(valid_labels)}
    best = max(tried, key=lambda c: tried[c]) if tried else DEFAULT_C
    return Probe(models[best], best, tried)


def _macro_f1(model: LogisticRegression, features: np.ndarray, labels: np.ndarray) -> float:
    return float(
        f1_score(labels, model.predict(features), average="macro", labels=np.unique(labels), zero_division=0.0)
    )
