"""The model that internal validation chose, in words and as a table: the part `chosen` of a study's study.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dermfm.records.vocabulary import CLASS_CODES, CLASSES
from dermfm.report.compare import Confusion, make_confusion
from dermfm.report.study_tables import arm_name, tier_name
from dermfm.report.verdicts import CONTROLS, IMAGE_ONLY, NAMES, signed

Part = Mapping[str, Any]
PLACES = {"internal": "internally", "external": "on the external sets together"}
PROBE_NAME = "the frozen probe"


@dataclasses.dataclass(frozen=True)
class ModelLine:
    """One arm of the table: seeds, validation macro F1 and weighted F1 by column as text."""

    name: str
    tier: Any
    chosen: bool
    num_seeds: int
    validation: str
    values: list[str]


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What the page shows: (tier, its sentences) for every tier, the model that counts first; the table of all arms.

    Of the model that counts also its name, number of seeds and confusion matrices; `classes` are (code, name).
    """

    paragraphs: list[tuple[str, list[str]]]
    columns: list[str]
    lines: list[ModelLine]
    name: str
    num_seeds: int
    confusions: list[Confusion]
    classes: list[tuple[str, str]]


def chosen_part(summary: Part) -> Chosen | None:
    """The words and the table; None for a study.json without that part."""
    part = summary.get("chosen")
    if not part:
        return None
    choices = sorted(part["choices"], key=lambda choice: choice["tier"] != part["best"])
    paragraphs = [(tier_name(c["tier"]), list(_sentences(c, part))) for c in choices]
    best = choices[0]
    return Chosen(
        paragraphs=paragraphs,
        columns=list(part["models"][0][part["metric"]]),
        lines=[_line(model, part) for model in part["models"]],
        name=_name(best, part["models"]),
        num_seeds=len(best["seeds"]),
        confusions=[make_confusion(side, np.array(counts)) for side, counts in best["confusion"].items()],
        classes=list(zip(CLASS_CODES, CLASSES, strict=True)),
    )


def looks_sentence(summary: Part) -> str:
    """How often the external sets were scored; "" where study.json does not say."""
    count, parts = summary.get("looks_at_external"), summary.get("looks") or {}
    if not count:
        return ""
    told = f" ({', '.join(f'{number} × {what}' for what, number in parts.items())})" if len(parts) > 1 else ""
    return f"The external sets were scored {count} times{told}; none of these scores chose anything."


def markdown(found: Chosen, summary: Part) -> str:
    """The same as Markdown."""
    told = [f"Chosen by internal validation, {tier}. {' '.join(sentences)}" for tier, sentences in found.paragraphs]
    head = ["weighted F1", "tier", "seeds", "validation (macro F1)", *map(_title, found.columns)]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for line in found.lines:
        name = f"**{line.name}** (chosen)" if line.chosen else line.name
        rows.append([name, str(line.tier), str(line.num_seeds), line.validation, *line.values])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return "\n\n".join(filter(None, [*told, looks_sentence(summary), table]))


def _line(model: Part, part: Part) -> ModelLine:
    values = [f"{value:.3f}" for value in model[part["metric"]].values()]
    name = _name(model, part["models"])
    return ModelLine(name, model["tier"], model["chosen"], model["seeds"], f"{model['validation']:.3f}", values)


def _title(column: str) -> str:
    return "external together" if column == "external" else column


def _name(model: Part, models: Sequence[Part]) -> str:
    same = [other for other in models if other["tier"] == model["tier"]]
    return arm_name((model["strategy"], model["engine"], model["objective"]), [dict(other) for other in same])


def _sentences(choice: Part, part: Part) -> Iterator[str]:
    """What a choice is, what it reaches, what stands beside it, and for the model that counts what was asked for."""
    best = choice["tier"] == part["best"]
    others = len(part["choices"]) > 1
    yield (
        f"Validation chooses {_name(choice, part['models'])}: macro F1 {choice['validation']:.3f} on internal "
        f"validation records, mean over {_seeds(choice)}, the highest of {choice['among']} ways of training, controls "
        "included" + ("; the highest of all tiers, so this is the study's model." if best and others else ".")
    )
    scores = choice["scores"]
    whole = ", ".join(f"{_value(scores[scope])} {PLACES[scope]}" for scope in PLACES)
    single = ", ".join(f"{name} {score['value']:.3f}" for name, score in scores.items() if name not in PLACES)
    yield f"Weighted F1: {whole}; {single}."
    if choice["strategy"] == IMAGE_ONLY:
        yield "It reads no notes, so notes have no part in these numbers."
    elif choice["strategy"] in CONTROLS:
        yield "It is a control: what it gains over image-only is not the content of an image's own note."
    yield from _differences(choice)
    if best:
        yield from _goals(part)


def _differences(choice: Part) -> Iterator[str]:
    found: dict[str, dict[str, Part]] = {}
    for row in choice["differences"]:
        found.setdefault(row["reference"], {})[row["scope"]] = row
    for reference, by_scope in found.items():
        told = ", ".join(f"{_apart(row)} {PLACES[scope]}" for scope, row in by_scope.items())
        name = f"{NAMES[reference]} in the same tier" if reference in NAMES else PROBE_NAME
        yield f"Against {name}: {told}; {_reading(by_scope['external'])}."


def _reading(row: Part) -> str:
    """What the external difference shows by itself; it stands outside the family of primary comparisons."""
    if row["ci_low"] is None:
        return "it has no interval"
    if row["ci_low"] <= 0 <= row["ci_high"]:
        return "under shift no difference is shown"
    side = "above" if row["ci_low"] > 0 else "below"
    return f"under shift the interval lies {side} zero, before any correction for the number of comparisons"


def _goals(part: Part) -> Iterator[str]:
    for scope, goal in part["goals"].items():
        apart = goal["value"] - goal["asked"]
        told = (
            f"reached: {goal['value']:.3f}" if apart >= 0 else f"not reached: {goal['value']:.3f}, {-apart:.3f} short"
        )
        place = PLACES.get(scope, f"on {scope}")
        yield f"Asked for beforehand: at least {goal['asked']:.3f} {place}; {told}."


def _value(score: Part) -> str:
    bounds = "" if score["ci_low"] is None else f" ({score['ci_low']:.3f} to {score['ci_high']:.3f})"
    return f"{score['value']:.3f}{bounds}"


def _apart(row: Part) -> str:
    bounds = "" if row["ci_low"] is None else f" ({signed(row['ci_low'])} to {signed(row['ci_high'])})"
    return f"{signed(row['value'])}{bounds}"


def _seeds(choice: Part) -> str:
    return "1 seed" if len(choice["seeds"]) == 1 else f"{len(choice['seeds'])} seeds"
