"""Subgroups of the scored records by skin tone, age, sex and site: scopes of kind `subgroup`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dermfm.evaluate.records import RecordSet
from dermfm.evaluate.shift import Scope
from dermfm.notes.facts import plain_site
from dermfm.records.atlas import ITA_SCALE

AGE_BANDS = ((0, 30), (30, 45), (45, 60), (60, 75), (75, None))  # years, upper end excluded
FITZPATRICK = ("I-II", "I-II", "III-IV", "III-IV", "V-VI", "V-VI")

# Individual typology angle: Chardon et al., "Skin colour typology and suntanning pathways", 1991.
ITA_BANDS = ((55, "very light"), (41, "light"), (28, "intermediate"), (10, "tan"), (-30, "brown"), (-360, "dark"))


def subgroup_scopes(records: RecordSet, scored: np.ndarray, by: list[str], minimum: int) -> list[Scope]:
    """One scope for every value of each field in `by` (of SUBGROUPS) that at least `minimum` scored records have."""
    scopes = []
    for field in by:
        values = np.array([SUBGROUPS[field](record) or "" for record in records.fields], dtype=object)
        for value in sorted(set(values[scored]) - {""}):
            mask = scored & (values == value)
            if mask.sum() >= minimum:
                scopes.append(Scope("subgroup", f"{field}={value}", mask))
    return scopes


def skin_tone(record: Mapping[str, Any]) -> str | None:
    """Fitzpatrick types in pairs, ITA degrees in Chardon's bands, any other scale with its value."""
    kind = record.get("fitzpatrick")
    if kind is not None and 1 <= int(kind) <= len(FITZPATRICK):
        return f"Fitzpatrick {FITZPATRICK[int(kind) - 1]}"
    scale, value = record.get("skin_tone_scale"), record.get("skin_tone_value")
    if not scale or value is None:
        return None
    if scale == ITA_SCALE:
        return "ITA " + next(name for low, name in ITA_BANDS if float(value) > low)
    return f"{scale}: {round(float(value))}"


def age_band(record: Mapping[str, Any]) -> str | None:
    """The band of AGE_BANDS that the age falls into."""
    if record.get("age") is None:
        return None
    age = float(record["age"])
    low, high = next(band for band in AGE_BANDS if band[1] is None or age < band[1])
    return f"{low}+" if high is None else f"{low}-{high - 1}"


def _sex(record: Mapping[str, Any]) -> str | None:
    return record.get("sex") or None


def _site(record: Mapping[str, Any]) -> str | None:
    return plain_site(str(record["site"])) if record.get("site") else None


SUBGROUPS: dict[str, Callable[[Mapping[str, Any]], str | None]] = {
    "skin_tone": skin_tone,
    "age": age_band,
    "sex": _sex,
    "site": _site,
}
