"""What is computed from the saved predictions: confusion matrices, and the model minus the frozen probe, paired."""

from __future__ import annotations

import dataclasses

import numpy as np

from dermfm.evaluate.classify import confusion_matrix, confusion_values
from dermfm.evaluate.statistics import interval
from dermfm.records.vocabulary import CLASS_CODES
from dermfm.report.breakdown import METHODS, draws_of, probabilities, scopes_of
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
class Endpoint:
    """The primary endpoint's metric, over how many data sets, of model and probe, and their paired difference."""

    metric: str
    num_datasets: int
    model: Difference
    probe: Difference | None
    difference: Difference | None


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
    scores = probabilities(evaluation, task)
    if scores is None:
        return None
    return np.where(np.isfinite(scores[:, 0]), np.nan_to_num(scores).argmax(axis=1), -1)


def differences(evaluation: Evaluation, metrics: list[str]) -> dict[str, dict[str, Difference]]:
    """Metric → scope name → model minus probe; no scopes where one of them was not scored."""
    ours, probe = predicted(evaluation, "classify-image"), predicted(evaluation, "probe")
    out: dict[str, dict[str, Difference]] = {metric: {} for metric in metrics}
    if ours is None or probe is None:
        return out
    labels, draws = evaluation.records.labels, draws_of(evaluation)
    for scope in scopes_of(evaluation):
        rows = np.flatnonzero(scope.mask & (labels >= 0) & (ours >= 0) & (probe >= 0))
        if len(rows):
            cells = [_cells(labels[rows], answers[rows]) for answers in (ours, probe)]
            point = [confusion_values(c.sum(axis=0)) for c in cells]
            drawn = [confusion_values(draws.sums(c, rows)) for c in cells]
            for metric in metrics:
                value = float(point[0][metric] - point[1][metric])
                out[metric][scope.name] = Difference(value, *interval(drawn[0][metric] - drawn[1][metric]))
    return out


def endpoint(evaluation: Evaluation) -> Endpoint | None:
    """The protocol's primary endpoint: one metric of image classification, mean over the external data sets."""
    answers = {name: predicted(evaluation, task) for task, name in METHODS}
    metric, draws = evaluation.protocol["endpoint"], draws_of(evaluation)
    labels, external = evaluation.records.labels, evaluation.protocol["external"]
    points: dict[str, float] = {}
    drawn: dict[str, np.ndarray] = {}
    counted: dict[str, int] = {}  # an external data set without labels takes no part
    for name, found in answers.items():
        if found is None:
            continue
        values = []
        for dataset in external:
            rows = np.flatnonzero((evaluation.records.datasets == dataset) & (labels >= 0) & (found >= 0))
            if len(rows):
                cells = _cells(labels[rows], found[rows])
                summed = np.concatenate([cells.sum(axis=0)[None], draws.sums(cells, rows)])
                values.append(confusion_values(summed)[metric])
        if values:
            mean = np.mean(values, axis=0)
            points[name], drawn[name], counted[name] = float(mean[0]), mean[1:], len(values)
    if "model" not in points:
        return None
    bars = {name: Difference(points[name], *interval(drawn[name])) for name in points}
    apart = None
    if "frozen probe" in points:
        value = points["model"] - points["frozen probe"]
        apart = Difference(value, *interval(drawn["model"] - drawn["frozen probe"]))
    return Endpoint(metric, counted["model"], bars["model"], bars.get("frozen probe"), apart)


def confusions(evaluation: Evaluation) -> list[Confusion]:
    """Confusion matrices of image classification, one for every partition; partitions of the same records share one."""
    answers = predicted(evaluation, "classify-image")
    if answers is None:
        return []
    titles: dict[bytes, list[str]] = {}
    for scope in scopes_of(evaluation):
        if scope.kind == "partition":
            keep = scope.mask & (evaluation.records.labels >= 0) & (answers >= 0)
            titles.setdefault(keep.tobytes(), []).append(scope.name)
    out = []
    for mask, names in titles.items():
        keep = np.frombuffer(mask, bool)
        if keep.any():
            counts = confusion_matrix(evaluation.records.labels[keep], answers[keep], len(CLASS_CODES))
            out.append(make_confusion(" = ".join(names), counts))
    return out


def make_confusion(title: str, counts: np.ndarray) -> Confusion:
    """The matrix of counts [C, C], truth in rows, with its shades."""
    shades = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return Confusion(title, int(counts.sum()), CLASS_CODES, counts.tolist(), shades.tolist())


def _cells(labels: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """[n, C, C]: one count for each record."""
    size = len(CLASS_CODES)
    out = np.zeros((len(labels), size, size))
    out[np.arange(len(labels)), labels, answers] = 1.0
    return out
