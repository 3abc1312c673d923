"""Effects: each strategy against image-only, the label and notes of other images, with what chance alone would give.

The primary endpoint, named before, is the macro F1 of image classification averaged over the external data sets. A
difference is the mean over the seeds that both arms have. Groups are resampled within strata of data sets, the same
draw for both arms; seeds are resampled as a second level. The family of the primary comparisons is corrected by Holm.
All other endpoints are descriptive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from dermfm.evaluate.classify import confusion_matrix, confusion_values
from dermfm.evaluate.shift import ProtocolConfig
from dermfm.evaluate.statistics import Draws, draw_groups, draw_seeds, holm, interval, two_sided_p
from dermfm.study.cells import predicted_classes
from dermfm.study.config import ENDPOINT, REFERENCES, UNTESTED

LEVEL = 0.05
PRIMARY = (ENDPOINT, "external")
METRICS = ("f1_macro", "balanced_accuracy", "f1_weighted")
Arm = tuple[int, str, str, str]  # tier, strategy, engine, objective
Endpoint = tuple[str, str]  # metric, scope: external, internal (means over data sets), or a data set

EFFECT_SCHEMA = pa.schema(
    [
        ("tier", pa.int64()), ("strategy", pa.string()), ("engine", pa.string()), ("objective", pa.string()),
        ("reference", pa.string()), ("metric", pa.string()), ("scope", pa.string()), ("primary", pa.bool_()),
        ("value", pa.float64()), ("reference_value", pa.float64()), ("effect", pa.float64()),
        ("ci_low", pa.float64()), ("ci_high", pa.float64()), ("p", pa.float64()), ("p_holm", pa.float64()),
        ("significant", pa.bool_()), ("family", pa.int64()), ("seeds", pa.list_(pa.int64())),
        ("per_seed", pa.list_(pa.float64())), ("tested", pa.bool_()), ("n", pa.int64()), ("groups", pa.int64()),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """An endpoint of one cell: its value, and the value in every resample [resamples]."""

    value: float
    draws: np.ndarray


class Truth:
    """The scored records: labels, data sets and the resamples that all cells share."""

    def __init__(self, scored: pa.Table, protocol: ProtocolConfig, resamples: int, seed: int) -> None:
        self.protocol = protocol
        label = scored.column("label").to_pylist()
        self.labels = np.array([-1 if value is None else value for value in label], dtype=np.int64)
        self.datasets = np.array(scored.column("dataset").to_pylist(), dtype=object)
        self.groups = np.array(scored.column("group_id").to_pylist(), dtype=object)
        self.draws: Draws = draw_groups(self.groups, self.datasets, resamples, seed)
        self.num_classes = int(self.labels.max()) + 1

    def rows(self, dataset: str) -> np.ndarray:
        """The records of a data set with a known label."""
        return np.flatnonzero((self.datasets == dataset) & (self.labels >= 0))

    def scopes(self) -> dict[str, list[str]]:
        """Scope → data sets whose values are averaged."""
        both = {"external": self.protocol.external, "internal": self.protocol.internal}
        return both | {name: [name] for name in [*self.protocol.external, *self.protocol.internal]}


def measure(content: Mapping[str, Any], truth: Truth) -> dict[Endpoint, Measured]:
    """Every endpoint of a cell from its predicted classes."""
    points: dict[tuple[str, str], float] = {}
    drawn: dict[tuple[str, str], np.ndarray] = {}
    for dataset in [*truth.protocol.external, *truth.protocol.internal]:
        of_point, of_draws = (confusion_values(matrices) for matrices in confusions(content, truth, dataset))
        for metric in METRICS:
            points[metric, dataset], drawn[metric, dataset] = float(of_point[metric]), of_draws[metric]
    return {
        (metric, scope): Measured(
            float(np.mean([points[metric, d] for d in datasets])), np.mean([drawn[metric, d] for d in datasets], axis=0)
        )
        for metric in METRICS
        for scope, datasets in truth.scopes().items()
    }


def confusions(
    content: Mapping[str, Any], truth: Truth, dataset: str, resampled: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """A cell's confusion matrix [C, C] in a data set, and that of every resample [resamples, C, C] (or of none)."""
    predicted = predicted_classes(content)
    if len(predicted) != len(truth.labels):
        raise ValueError(f"{content['id']}: predicts {len(predicted)} records, but {len(truth.labels)} are scored")
    size = max(truth.num_classes, int(predicted.max(initial=0)) + 1)
    rows = truth.rows(dataset)
    labels, answers = truth.labels[rows], predicted[rows].astype(np.int64)
    point = confusion_matrix(labels, answers, size)
    if not resampled:
        return point, np.zeros((0, size, size))
    one_hot = np.zeros((len(rows), size, size))
    one_hot[np.arange(len(rows)), labels, answers] = 1.0
    return point, truth.draws.sums(one_hot, rows)


def effects(contents: Sequence[Mapping[str, Any]], truth: Truth, seed: int) -> list[dict[str, Any]]:
    """All effects of the finished cells as rows of EFFECT_SCHEMA, the primary ones first.

    An arm is compared with the reference of its own tier and objective, over the seeds that both have; for the shuffled
    reference that of its own engine where there is one. Arms without such seeds have no row.
    """
    cells = [c for c in contents if c["strategy"] in REFERENCES or c["strategy"] not in UNTESTED]
    arms: dict[Arm, dict[int, dict[Endpoint, Measured]]] = {}
    tested: dict[Arm, bool] = {}
    for content in cells:
        arm = (content["tier"], content["strategy"], content["engine"], content["objective"])
        arms.setdefault(arm, {})[content["seed"]] = measure(content, truth)
        tested[arm] = tested.get(arm, True) and content["notes"]["tested"]
    rows: list[dict[str, Any]] = []
    for arm in sorted(arms):
        if arm[1] in UNTESTED:
            continue
        for reference in REFERENCES:
            other = _reference(arm, reference, arms)
            shared = sorted(set(arms[arm]) & set(arms[other])) if other else []
            if other and shared:
                rows += _compare(arm, reference, arms[arm], arms[other], shared, truth, seed, tested[arm])
    _correct(rows)
    return sorted(rows, key=lambda row: not row["primary"])


def _reference(arm: Arm, reference: str, arms: Mapping[Arm, Any]) -> Arm | None:
    """The arm to compare with: the same tier and objective, the same engine if possible."""
    found = [a for a in arms if (a[0], a[1], a[3]) == (arm[0], reference, arm[3])]
    return max(found, key=lambda a: a[2] == arm[2], default=None)


def _compare(
    arm: Arm, reference: str, one: Mapping[int, dict[Endpoint, Measured]],
    other: Mapping[int, dict[Endpoint, Measured]], seeds: list[int], truth: Truth, seed: int, tested: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of one comparison, an endpoint each."""
    rows = []
    resamples = len(truth.draws.weights)
    picked = draw_seeds(len(seeds), resamples, seed)
    for endpoint in one[seeds[0]]:
        per_seed = np.array([one[s][endpoint].value - other[s][endpoint].value for s in seeds])
        drawn = np.stack([one[s][endpoint].draws - other[s][endpoint].draws for s in seeds], axis=1)
        resampled = np.take_along_axis(drawn, picked, axis=1).mean(axis=1)
        low, high = interval(resampled)
        datasets = truth.scopes()[endpoint[1]]
        used = np.concatenate([truth.rows(name) for name in datasets])
        rows.append(
            dict(zip(("tier", "strategy", "engine", "objective"), arm, strict=True))
            | {"reference": reference, "metric": endpoint[0], "scope": endpoint[1], "primary": endpoint == PRIMARY}
            | {"value": float(np.mean([one[s][endpoint].value for s in seeds])), "seeds": seeds}
            | {"reference_value": float(np.mean([other[s][endpoint].value for s in seeds]))}
            | {"effect": float(per_seed.mean()), "ci_low": low, "ci_high": high, "p": two_sided_p(resampled)}
            | {"per_seed": per_seed.tolist(), "tested": tested, "n": len(used), "groups": len(set(truth.groups[used]))}
        )
    return rows


def _correct(rows: list[dict[str, Any]]) -> None:
    """Holm's correction within each tier's family of primary comparisons; descriptive rows have none."""
    for tier in {row["tier"] for row in rows}:
        family = [row for row in rows if row["primary"] and row["tier"] == tier]
        for row, adjusted in zip(family, holm(np.array([row["p"] for row in family])), strict=True):
            row |= {"p_holm": float(adjusted), "family": len(family), "significant": bool(adjusted < LEVEL)}
