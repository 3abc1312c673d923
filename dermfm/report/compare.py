"""What is computed from the saved predictions: confusion matrices, and the model minus the frozen probe, paired."""

from __future__ import annotations

import dataclasses

import numpy as np

from dermfm.evaluate.classify import confusion_matrix, confusion_values
from dermfm.evaluate.shift import ProtocolConfig, Scope, make_scopes
from dermfm.evaluate.statistics import draw_groups, interval
from dermfm.records.vocabulary import CLASS_CODES
from dermfm.report.run import Evaluation


@dataclasses.dataclass(frozen=True)
class Difference:
    """Model minus probe of one metric in one scope, with the interval of the paired bootstrap."""

    value: float
    low: float | None
    high: float | None

    @property
    def decided(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclasses.dataclass(frozen=True)
class Confusion:
    """One confusion matrix of the model: counts [C][C], shade of each cell as a share of its row."""

    title: str
    n: int
    codes: list[str]
    counts: list[list[int]]
    shades: list[list[float]]


def predicted(evaluation: Evaluation, task: str) -> np.ndarray | None:
    """Predicted class of every record [N] (−1 where there is none), or None where the task was not scored."""
    place = {record_id: i for i, record_id in enumerate(evaluation.records.record_ids)}
    rows = [r for r in evaluation.predictions if r["task"] == task and r["class_set"] == "classes"]
    if not rows:
        return None
    out = np.full(len(place), -1)
    for row in rows:
        out[place[row["record_id"]]] = int(np.argmax(row["probabilities"]))
    return out


def scopes_of(evaluation: Evaluation) -> list[Scope]:
    """The scopes of the evaluation."""
    protocol = evaluation.protocol
    roles = ProtocolConfig(internal=protocol["internal"], external=protocol["external"])
    return make_scopes(evaluation.records, roles)


def differences(evaluation: Evaluation, metric: str) -> dict[str, Difference]:
    """Scope name → model minus probe; empty where one of them was not scored."""
    ours, probe = predicted(evaluation, "classify-image"), predicted(evaluation, "probe")
    if ours is None or probe is None:
        return {}
    records, about = evaluation.records, evaluation.protocol["intervals"]
    draws = draw_groups(records.groups, records.datasets, about["resamples"], about["seed"])
    out = {}
    for scope in scopes_of(evaluation):
        rows = np.flatnonzero(scope.mask & (records.labels >= 0))
        if len(rows):
            cells = [_cells(records.labels[rows], answers[rows]) for answers in (ours, probe)]
            point = [confusion_values(c.sum(axis=0))[metric] for c in cells]
            drawn = [confusion_values(draws.sums(c, rows))[metric] for c in cells]
            out[scope.name] = Difference(float(point[0] - point[1]), *interval(drawn[0] - drawn[1]))
    return out


def confusions(evaluation: Evaluation) -> list[Confusion]:
    """Confusion matrices of image classification for the internal and the external partition."""
    answers = predicted(evaluation, "classify-image")
    labels, out = evaluation.records.labels, []
    for scope in scopes_of(evaluation) if answers is not None else []:
        keep = scope.mask & (labels >= 0)
        if scope.name in ("internal", "external") and keep.any():
            assert answers is not None
            counts = confusion_matrix(labels[keep], answers[keep], len(CLASS_CODES))
            shades = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
            out.append(Confusion(scope.name, int(keep.sum()), CLASS_CODES, counts.tolist(), shades.tolist()))
    return out


def _cells(labels: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """[n, C, C]: one count for each record."""
    size = len(CLASS_CODES)
    out = np.zeros((len(labels), size, size))
    out[np.arange(len(labels)), labels, answers] = 1.0
    return out
