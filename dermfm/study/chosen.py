"""The model that internal validation chooses, and what it reaches inside and on the external sets together.

Of every tier that arm counts whose settings reach the highest macro F1 on the internal validation split, mean over its
seeds; controls take part, arms with fewer seeds than others of the tier do not yet, and the frozen probe is a baseline.
Weighted F1 is over the pooled records of a side (an endpoint of the effects is a mean over data sets), as the reference
study gives it. All of it is descriptive; the family of primary comparisons is that of `dermfm.study.effects`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dermfm.evaluate.classify import confusion_values
from dermfm.evaluate.statistics import draw_seeds, interval, two_sided_p
from dermfm.records.vocabulary import CLASSES
from dermfm.study.config import NO_OBJECTIVE, PROBE, REFERENCES
from dermfm.study.effects import Arm, Measured, Truth, confusions

METRIC, SELECTION = "f1_weighted", "f1_macro"
SIDES = ("internal", "external")
Content = Mapping[str, Any]
Seeds = Mapping[int, Content]


def chosen_models(contents: Sequence[Content], truth: Truth, goals: Mapping[str, float], seed: int) -> dict[str, Any]:
    """The part `chosen` of study.json: `models` (every arm with its numbers), `choices` (one a tier, with intervals and
    differences to its baselines), `best` (the tier of the highest validation score) and `goals` (scope → asked value).

    {} without a finished cell of an arm.
    """
    arms = arms_of(contents)
    choices = [_choice(arms, arm, truth, seed) for tier in sorted({a[0] for a in arms}) if (arm := pick(arms, tier))]
    if not choices:
        return {}
    best = max(choices, key=lambda choice: choice["validation"])
    return {
        "rule": "the highest macro F1 on the internal validation split, mean over seeds, among the arms of the tier "
        "that have all its seeds, controls included; external sets took no part",
        "metric": METRIC,
        "best": best["tier"],
        "goals": {
            scope: {"asked": asked, "value": best["scores"][scope]["value"]}
            for scope, asked in goals.items()
            if scope in best["scores"]
        },
        "choices": choices,
        "models": [_model(arm, seeds, truth, pick(arms, arm[0]) == arm) for arm, seeds in sorted(arms.items())],
    }


def arms_of(contents: Iterable[Content]) -> dict[Arm, dict[int, Content]]:
    """Arm → seed → finished cell."""
    arms: dict[Arm, dict[int, Content]] = {}
    for content in contents:
        arm = (content["tier"], content["strategy"], content["engine"], content["objective"])
        arms.setdefault(arm, {})[content["seed"]] = content
    return arms


def pick(arms: Mapping[Arm, Seeds], tier: int) -> Arm | None:
    """The arm of a tier that validation chooses (the first by name on a tie); None where the tier has none."""
    own = {arm: seeds for arm, seeds in arms.items() if arm[0] == tier and arm[3] != NO_OBJECTIVE}
    most = max((len(seeds) for seeds in own.values()), default=0)
    whole = sorted(arm for arm, seeds in own.items() if len(seeds) == most)
    return max(whole, key=lambda arm: validation(own[arm]), default=None)


def validation(seeds: Seeds) -> float:
    """Macro F1 on the internal validation split of an arm's chosen settings, mean over its seeds."""
    return float(np.mean([_validated(content["search"]) for content in seeds.values()]))


def pooled(content: Content, truth: Truth, scope: str) -> Measured:
    """Weighted F1 over all records of a side or of one data set together, and in every resample."""
    found = [confusions(content, truth, dataset) for dataset in truth.scopes()[scope]]
    point, drawn = (confusion_values(np.sum(matrices, axis=0))[METRIC] for matrices in zip(*found, strict=True))
    return Measured(float(point), drawn)


def _validated(search: Mapping[str, Any]) -> float:
    """What the setting that was chosen reached on validation; the probe names it by its C."""
    if "tries" in search:
        return float(search["tries"][search["chosen"]][SELECTION])
    return float(search["tried"][str(search["c"])])


def _choice(arms: Mapping[Arm, Seeds], arm: Arm, truth: Truth, seed: int) -> dict[str, Any]:
    scopes = [*SIDES, *truth.protocol.external, *truth.protocol.internal]
    own = {scope: {s: pooled(content, truth, scope) for s, content in arms[arm].items()} for scope in scopes}
    names = dict(zip(("tier", "strategy", "engine", "objective"), arm, strict=True))
    return names | {
        "validation": validation(arms[arm]),
        "seeds": sorted(arms[arm]),
        "among": sum(a[0] == arm[0] and a[3] != NO_OBJECTIVE for a in arms),
        "scores": {scope: _resampled(measured, seed) for scope, measured in own.items()},
        "confusion": {side: _summed_confusion(arms[arm].values(), truth, side) for side in SIDES},
        "differences": [
            {"reference": other[1], "scope": scope} | _difference(own[scope], arms[other], truth, scope, seed)
            for other in _baselines(arms, arm)
            for scope in SIDES
        ],
    }


def _summed_confusion(contents: Iterable[Content], truth: Truth, side: str) -> list[list[int]]:
    """Counts [C][C] of a side, truth in rows, summed over an arm's seeds."""
    out: np.ndarray = np.zeros((len(CLASSES), len(CLASSES)), dtype=np.int64)
    for content in contents:
        for dataset in truth.scopes()[side]:
            counts = confusions(content, truth, dataset, resampled=False)[0]
            out[: len(counts), : len(counts)] += counts
    return out.tolist()


def _baselines(arms: Mapping[Arm, Seeds], arm: Arm) -> list[Arm]:
    """What a choice stands beside: the references of its tier and objective that share a seed, and the frozen probe."""
    found = []
    for reference in REFERENCES:
        same = [a for a in arms if (a[0], a[1], a[3]) == (arm[0], reference, arm[3]) and set(arms[a]) & set(arms[arm])]
        if reference != arm[1] and same:
            found.append(max(same, key=lambda a: a[2] == arm[2]))
    return found + [a for a in arms if a[1] == PROBE]


def _difference(own: Mapping[int, Measured], other: Seeds, truth: Truth, scope: str, seed: int) -> dict[str, Any]:
    """Choice minus baseline over the seeds of both; the frozen probe has one fit, which every seed is compared with."""
    fitted = {s: pooled(content, truth, scope) for s, content in other.items()}
    alone = next(iter(fitted.values())) if next(iter(other.values()))["strategy"] == PROBE else None
    pairs = {s: (mine, alone or fitted[s]) for s, mine in own.items() if alone or s in fitted}
    apart = {s: Measured(a.value - b.value, a.draws - b.draws) for s, (a, b) in pairs.items()}
    return _resampled(apart, seed) | {"p": two_sided_p(_draws(apart, seed))}


def _resampled(measured: Mapping[int, Measured], seed: int) -> dict[str, Any]:
    """Mean over seeds with its interval: groups and, as a second level, seeds are drawn."""
    low, high = interval(_draws(measured, seed))
    per_seed = [measured[s].value for s in sorted(measured)]
    return {"value": float(np.mean(per_seed)), "ci_low": low, "ci_high": high, "per_seed": per_seed}


def _draws(measured: Mapping[int, Measured], seed: int) -> np.ndarray:
    stacked = np.stack([measured[s].draws for s in sorted(measured)], axis=1)
    return np.take_along_axis(stacked, draw_seeds(stacked.shape[1], len(stacked), seed), axis=1).mean(axis=1)


def _model(arm: Arm, seeds: Seeds, truth: Truth, chosen: bool) -> dict[str, Any]:
    """One arm's numbers without intervals, means over its seeds."""
    scopes = ["internal", *truth.protocol.internal, *truth.protocol.external, "external"]
    points = {scope: [_point(content, truth, scope) for content in seeds.values()] for scope in scopes}
    return dict(zip(("tier", "strategy", "engine", "objective"), arm, strict=True)) | {
        "seeds": len(seeds),
        "chosen": chosen,
        "validation": validation(seeds),
        METRIC: {scope: float(np.mean(values)) for scope, values in points.items()},
    }


def _point(content: Content, truth: Truth, scope: str) -> float:
    matrices = [confusions(content, truth, dataset, resampled=False)[0] for dataset in truth.scopes()[scope]]
    return float(confusion_values(np.sum(matrices, axis=0))[METRIC])
