"""Classification measures, and their intervals from resampled confusion matrices; tests hold them to scikit-learn.

Macro means are over the classes present in the truth; what a missing class leaves undefined is None, never NaN.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from scipy.stats import rankdata
from sklearn import metrics as sk

from dermfm.evaluate.statistics import Draws, auroc_draws, interval

ECE_BINS = 15
METRICS = (
    "accuracy",
    "balanced_accuracy",
    "f1_weighted",
    "f1_macro",
    "f1_micro",
    "precision_macro",
    "recall_macro",
    "kappa",
    "kappa_linear",
    "auroc",
    "ece",
)


@dataclasses.dataclass(frozen=True)
class Value:
    """One measured number: value, interval and chance level, None where undefined; n items it is over."""

    value: float | None
    ci_low: float | None
    ci_high: float | None
    chance: float | None
    n: int
    pool: int | None = None


def classification(
    labels: np.ndarray, scores: np.ndarray, rows: np.ndarray, draws: Draws, calibrated: bool = True
) -> dict[str, Value]:
    """Every metric of labels [n] against scores [n, C] of the records `rows` [n].

    Scores [R, n, C] are R repetitions of one method: value and interval are of the mean over them. `calibrated` says
    that the scores are probabilities (else no calibration error). The chance level is what always answering the scope's
    most frequent class gets.
    """
    num_classes = scores.shape[-1]
    repeats = scores if scores.ndim == 3 else scores[None]
    measured = [_measured(labels, one, rows, draws, calibrated) for one in repeats]
    points = {name: float(np.mean([one[0][name] for one in measured])) for name in measured[0][0]}
    drawn = {name: np.mean([one[1][name] for one in measured], axis=0) for name in points}
    majority = np.full_like(labels, np.bincount(labels, minlength=num_classes).argmax())
    constant = confusion_values(confusion_matrix(labels, majority, num_classes))
    chance = {name: float(value) for name, value in constant.items()} | {"auroc": 0.5}
    return {
        name: Value(_number(points[name]), *interval(drawn[name]), _number(chance.get(name)), len(labels))
        for name in METRICS
        if name in points
    }


def class_matched(
    labels: np.ndarray, scores: np.ndarray, rows: np.ndarray, draws: Draws, prior: np.ndarray
) -> dict[str, Value]:
    """The measures that need predicted classes only, as if the classes were as frequent as in `prior` [C] counts.

    Every record weighs as much as makes its class so frequent. Classes that either side lacks are left out. The chance
    level is what always answering the most frequent class gets.
    """
    num_classes = scores.shape[1]

    def matched(matrices: np.ndarray) -> np.ndarray:
        wanted = np.broadcast_to(prior.astype(float), matrices.shape[:-1])
        return matrices * _safe(wanted, matrices.sum(axis=-1))[..., None]

    predicted = scores.argmax(axis=1)
    points = confusion_values(matched(confusion_matrix(labels, predicted, num_classes).astype(float)))
    drawn = confusion_values(matched(draws.sums(_one_hot(labels, predicted, num_classes), rows)))
    present = prior * (np.bincount(labels, minlength=num_classes) > 0)
    constant = np.zeros((num_classes, num_classes))
    constant[:, present.argmax()] = present
    chance = confusion_values(constant)
    return {
        name: Value(_number(float(points[name])), *interval(drawn[name]), _number(float(chance[name])), len(labels))
        for name in points
    }


def _measured(
    labels: np.ndarray, scores: np.ndarray, rows: np.ndarray, draws: Draws, calibrated: bool
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Every metric as it is, and of every resample [resamples]."""
    num_classes, predicted = scores.shape[1], scores.argmax(axis=1)
    matrix = confusion_matrix(labels, predicted, num_classes)  # many times faster here than scikit-learn's checks
    points = {name: float(value) for name, value in confusion_values(matrix).items()}
    points["auroc"] = auroc(labels, scores)
    drawn = confusion_values(draws.sums(_one_hot(labels, predicted, num_classes), rows))
    drawn["auroc"] = auroc_draws(scores, labels, rows, draws)
    if calibrated:
        points["ece"] = calibration_error(labels, scores)
        drawn["ece"] = _calibration_draws(labels, scores, rows, draws)
    return points, drawn


def per_class(
    labels: np.ndarray, scores: np.ndarray, rows: np.ndarray, draws: Draws, names: list[str]
) -> dict[str, Any]:
    """The confusion matrix [C][C] (truth in rows) and one entry a class: n, precision, recall, F1 with its interval,
    AUROC. What a class without record, or without answer, leaves undefined is None; `absent` marks the former."""
    num_classes, predicted = scores.shape[1], scores.argmax(axis=1)
    matrix = confusion_matrix(labels, predicted, num_classes)
    drawn = draws.sums(_one_hot(labels, predicted, num_classes), rows)
    truth, answer, hit = drawn.sum(axis=2), drawn.sum(axis=1), np.diagonal(drawn, axis1=1, axis2=2)
    f1 = np.where(truth > 0, _safe(2 * hit, truth + answer), np.nan)
    out = []
    for c, name in enumerate(names):
        support, answers, hits = int(matrix[c].sum()), int(matrix[:, c].sum()), int(matrix[c, c])
        low, high = interval(f1[:, c]) if support else (None, None)
        area = _area(labels == c, scores[:, c]) if 0 < support < len(labels) else None
        out.append(
            {
                "class": name,
                "n": support,
                "absent": support == 0,
                "precision": hits / answers if answers else None,
                "recall": hits / support if support else None,
                "f1": 2 * hits / (support + answers) if support else None,
                "f1_ci_low": low,
                "f1_ci_high": high,
                "auroc": _number(area),
            }
        )
    return {"labels": names, "confusion": matrix.tolist(), "per_class": out}


def point_values(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> dict[str, float]:
    """The measures that need predicted classes only, by scikit-learn; classes are 0 … num_classes − 1."""
    present, every = np.unique(labels), np.arange(num_classes)
    precision, recall, f1, support = sk.precision_recall_fscore_support(
        labels, predicted, labels=present, average=None, zero_division=0.0
    )
    accuracy = sk.accuracy_score(labels, predicted)
    one_sided = len(present) == 1 and bool((predicted == present[0]).all())
    kappa = {
        name: float("nan") if one_sided else sk.cohen_kappa_score(labels, predicted, labels=every, weights=weights)
        for name, weights in (("kappa", None), ("kappa_linear", "linear"))
    }
    return {
        "accuracy": accuracy,
        "balanced_accuracy": recall.mean(),
        "f1_weighted": np.average(f1, weights=support),
        "f1_macro": f1.mean(),
        "f1_micro": accuracy,
        "precision_macro": precision.mean(),
        "recall_macro": recall.mean(),
    } | kappa


def auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    """One-versus-rest area under the ROC curve, mean over the classes of the truth; NaN with a single class."""
    present = np.unique(labels)
    if len(present) < 2:
        return float("nan")
    return float(np.mean([_area(labels == c, scores[:, c]) for c in present]))


def _area(hit: np.ndarray, score: np.ndarray) -> float:
    """Area under the ROC curve by the rank sum of the hits, ties at their middle (Mann and Whitney, 1947)."""
    num = int(hit.sum())
    return float((rankdata(score)[hit].sum() - num * (num + 1) / 2) / (num * (len(hit) - num)))


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts [C, C]: truth in rows, answer in columns."""
    flat = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return flat.reshape(num_classes, num_classes)


def confusion_values(matrices: np.ndarray) -> dict[str, np.ndarray]:
    """The measures of `point_values` for confusion matrices [..., C, C]; NaN where undefined."""
    matrices = np.asarray(matrices, dtype=float)
    truth, answer = matrices.sum(axis=-1), matrices.sum(axis=-2)
    hit, total = np.diagonal(matrices, axis1=-2, axis2=-1), matrices.sum(axis=(-2, -1))
    present = truth > 0
    recall, precision = _safe(hit, truth), _safe(hit, answer)
    f1 = _safe(2 * hit, truth + answer)
    num_present = present.sum(axis=-1)

    def macro(values: np.ndarray) -> np.ndarray:
        return _defined((values * present).sum(axis=-1), num_present)

    accuracy = _defined(hit.sum(axis=-1), total)
    return {
        "accuracy": accuracy,
        "balanced_accuracy": macro(recall),
        "f1_weighted": _defined((f1 * truth).sum(axis=-1), total),
        "f1_macro": macro(f1),
        "f1_micro": accuracy,
        "precision_macro": macro(precision),
        "recall_macro": macro(recall),
        "kappa": _kappa(matrices, np.ones(matrices.shape[-2:]) - np.eye(matrices.shape[-1])),
        "kappa_linear": _kappa(matrices, np.abs(np.subtract.outer(*[np.arange(matrices.shape[-1])] * 2)).astype(float)),
    }


def calibration_error(labels: np.ndarray, probabilities: np.ndarray, bins: int = ECE_BINS) -> float:
    """Expected calibration error of the top class over equally wide confidence bins (Guo et al., ICML 2017)."""
    return float(_gap(_calibration_terms(labels, probabilities, bins).sum(axis=0))) / len(labels)


def _calibration_terms(labels: np.ndarray, probabilities: np.ndarray, bins: int) -> np.ndarray:
    """[n, bins]: hit − confidence in the item's own bin; the absolute column sums over n give the error."""
    confidence = probabilities.max(axis=1)
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    terms = np.zeros((len(labels), bins))
    terms[np.arange(len(labels)), place] = (probabilities.argmax(axis=1) == labels) - confidence
    return terms


def _calibration_draws(labels: np.ndarray, probabilities: np.ndarray, rows: np.ndarray, draws: Draws) -> np.ndarray:
    terms = _calibration_terms(labels, probabilities, ECE_BINS)
    sums = draws.sums(np.concatenate([terms, np.ones((len(labels), 1))], axis=1), rows)
    return _defined(_gap(sums[:, :-1]), sums[:, -1])


def _gap(sums: np.ndarray) -> np.ndarray:
    return np.abs(sums).sum(axis=-1)


def _kappa(matrices: np.ndarray, cost: np.ndarray) -> np.ndarray:
    total = matrices.sum(axis=(-2, -1))[..., None, None]
    expected = matrices.sum(axis=-1)[..., :, None] * matrices.sum(axis=-2)[..., None, :] / np.where(total > 0, total, 1)
    return 1 - _defined((matrices * cost).sum(axis=(-2, -1)), (expected * cost).sum(axis=(-2, -1)))


def _one_hot(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    out = np.zeros((len(labels), num_classes, num_classes))
    out[np.arange(len(labels)), labels, predicted] = 1.0
    return out


def _safe(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    return np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)


def _defined(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    return np.divide(top, bottom, out=np.full(np.shape(top), np.nan), where=bottom > 0)


def _number(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)
