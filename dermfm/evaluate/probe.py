"""Linear probes: balanced logistic regression on pooled features, on all training records or on a few a class."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

C_GRID = (0.0003, 0.001, 0.003, 0.01, 0.03)
DEFAULT_C = 0.003
FEW_SHOT_C = 10.0  # features of unit length and few examples: a weak penalty
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


def few_shot(
    features: np.ndarray, labels: np.ndarray, scored: np.ndarray, shots: int, draw: int, num_classes: int
) -> np.ndarray:
    """Class probabilities [n, C] for features `scored` [n, F] of a logistic regression on `shots` examples a class.

    Examples are drawn by (draw, class) from features [m, F] with labels [m]; a class with fewer gives all it has, one
    without any gets probability 0. Features are scaled to unit length.
    """
    chosen = [_few(np.flatnonzero(labels == c), shots, draw, int(c)) for c in np.unique(labels)]
    rows = np.concatenate(chosen)
    model = LogisticRegression(class_weight="balanced", max_iter=MAX_ITER, C=FEW_SHOT_C)
    model.fit(_unit(features[rows]), labels[rows])
    out = np.zeros((len(scored), num_classes))
    out[:, model.classes_] = model.predict_proba(_unit(scored))
    return out


def _few(rows: np.ndarray, shots: int, draw: int, label: int) -> np.ndarray:
    return np.random.default_rng([draw, label]).permutation(rows)[:shots]


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def _macro_f1(model: LogisticRegression, features: np.ndarray, labels: np.ndarray) -> float:
    return float(
        f1_score(labels, model.predict(features), average="macro", labels=np.unique(labels), zero_division=0.0)
    )
