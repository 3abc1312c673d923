"""What lies under the averages: calibration, recall of each class, and the values of subgroups of patients."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from dermfm.evaluate.classify import ECE_BINS, calibration_error
from dermfm.evaluate.shift import ProtocolConfig, Scope, make_scopes
from dermfm.evaluate.statistics import Draws, draw_groups, interval, mean_draws
from dermfm.records.measure.skin import BANDS, DARKEST
from dermfm.records.vocabulary import CLASS_CODES
from dermfm.report.run import Evaluation

Row = dict[str, Any]
METHODS = (("classify-image", "model"), ("probe", "frozen probe"))
SIDES = ("internal", "external")
SUBGROUP_METRICS = (("balanced_accuracy", "balanced accuracy"), ("accuracy", "accuracy"), ("f1_macro", "macro F1"))
TONES = [*(name for _, name in BANDS), DARKEST]


@dataclasses.dataclass(frozen=True)
class Reliability:
    """Calibration of the top class: mean confidence, accuracy and number of answers in each bin [bins]."""

    scope: str
    method: str
    n: int
    ece: float
    confidence: np.ndarray
    accuracy: np.ndarray
    counts: np.ndarray


@dataclasses.dataclass(frozen=True)
class Bar:
    """One value with its interval (None where undefined) over n records."""

    value: float | None
    low: float | None
    high: float | None
    n: int


@dataclasses.dataclass(frozen=True)
class Subgroups:
    """One attribute's subgroups: names, and a bar for each of them in each series."""

    title: str
    metric: str
    names: list[str]
    bars: dict[str, list[Bar]]


def probabilities(evaluation: Evaluation, task: str) -> np.ndarray | None:
    """Class probabilities of every record [N, C] (NaN where there are none), or None where the task was not scored."""
    rows = [r for r in evaluation.predictions if r["task"] == task and r["class_set"] == "classes"]
    if not rows:
        return None
    place = {record_id: i for i, record_id in enumerate(evaluation.records.record_ids)}
    out = np.full((len(place), len(CLASS_CODES)), np.nan)
    out[[place[row["record_id"]] for row in rows]] = np.array([row["probabilities"] for row in rows], dtype=float)
    return out


def scopes_of(evaluation: Evaluation) -> list[Scope]:
    """The data sets and partitions of the evaluation."""
    protocol = evaluation.protocol
    roles = ProtocolConfig(internal=protocol["internal"], external=protocol["external"])
    return make_scopes(evaluation.records, roles)


def draws_of(evaluation: Evaluation) -> Draws:
    """The resamples that the evaluation itself drew."""
    records, about = evaluation.records, evaluation.protocol["intervals"]
    return draw_groups(records.groups, records.datasets, about["resamples"], about["seed"])


def reliabilities(evaluation: Evaluation) -> list[Reliability]:
    """Model and probe on the internal and the external partition, where they were scored."""
    labels, out = evaluation.records.labels, []
    for task, method in METHODS:
        scores = probabilities(evaluation, task)
        for scope in scopes_of(evaluation) if scores is not None else []:
            assert scores is not None
            keep = scope.mask & (labels >= 0) & np.isfinite(scores[:, 0])
            if scope.name in SIDES and keep.any():
                out.append(reliability(scope.name, method, labels[keep], scores[keep]))
    return out


def reliability(scope: str, method: str, labels: np.ndarray, scores: np.ndarray, bins: int = ECE_BINS) -> Reliability:
    """The diagram of labels [n] and probabilities [n, C], in the bins of the calibration error."""
    confidence, hit = scores.max(axis=1), scores.argmax(axis=1) == labels
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(place, minlength=bins)
    surely, rightly = (
        np.divide(np.bincount(place, weights=v, minlength=bins), counts, out=np.zeros(bins), where=counts > 0)
        for v in (confidence, hit)
    )
    return Reliability(scope, method, len(labels), calibration_error(labels, scores, bins), surely, rightly, counts)


def class_recalls(evaluation: Evaluation) -> dict[str, list[Bar]]:
    """Partition → recall of each class (in the order of CLASS_CODES); empty where the image head was not scored."""
    scores = probabilities(evaluation, "classify-image")
    if scores is None:
        return {}
    labels, draws, out = evaluation.records.labels, draws_of(evaluation), {}
    known = (labels >= 0) & np.isfinite(scores[:, 0])
    hit = (np.nan_to_num(scores).argmax(axis=1) == labels).astype(float)
    for scope in scopes_of(evaluation):
        if scope.name in SIDES:
            bars = []
            for c in range(len(CLASS_CODES)):
                rows = np.flatnonzero(scope.mask & known & (labels == c))
                bounds = interval(mean_draws(hit[rows], rows, draws)) if len(rows) else (None, None)
                bars.append(Bar(float(hit[rows].mean()) if len(rows) else None, *bounds, len(rows)))
            out[scope.name] = bars
    return out


def subgroups(rows: Iterable[Row]) -> list[Subgroups]:
    """The subgroup rows of image classification, one entry for each attribute ("sex=female" belongs to "sex").

    Of the metrics that the rows hold, the first of SUBGROUP_METRICS is shown, for the model and the probe.
    """
    own = [r for r in rows if r["scope_kind"] == "subgroup" and r["class_set"] in (None, "classes")]
    held = {r["metric"] for r in own}
    metric, title = next(((m, t) for m, t in SUBGROUP_METRICS if m in held), (None, ""))
    out = []
    values = [(*_attribute(r["scope"]), r) for r in own if r["metric"] == metric]
    for attribute in dict.fromkeys(a for a, _, _ in values):
        names = sorted({name for a, name, _ in values if a == attribute}, key=_natural)
        bars = {}
        for task, method in METHODS:
            found = {name: r for a, name, r in values if a == attribute and r["task"] == task}
            if found:
                bars[method] = [_bar(found.get(name)) for name in names]
        if bars:
            out.append(Subgroups(attribute, title, names, bars))
    return out


def _bar(row: Row | None) -> Bar:
    return Bar(None, None, None, 0) if row is None else Bar(row["value"], row["ci_low"], row["ci_high"], row["n"])


def _attribute(scope: str) -> tuple[str, str]:
    """("skin tone", "ITA light") of "skin_tone=ITA light"."""
    attribute, _, value = scope.partition("=")
    return attribute.replace("_", " "), value or attribute


def _natural(name: str) -> list[tuple[bool, float, str]]:
    """A sort key by which 2 comes before 10, and bands of skin tone go from light to dark."""
    for place, tone in enumerate(TONES):
        name = re.sub(rf"\b{tone}$", str(place), name)
    parts = re.findall(r"\d+(?:\.\d+)?|[^\d]+", name)
    return [(not p[0].isdigit(), float(p) if p[0].isdigit() else 0.0, p) for p in parts]
