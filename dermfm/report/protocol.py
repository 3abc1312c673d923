"""The protocol of an evaluation as terms and what stands behind them: nothing of it is left out of the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Lines = list[tuple[str, str]]
# Keys that other parts of the page show, or that a line below shows together with others.
ELSEWHERE = ("name", "num_records", "num_groups", "classes", "absent_classes", "modality", "splits", "notes")
TITLES = {
    "internal": "Internal",
    "external": "External",
    "trained_on": "Trained on",
    "empty_partitions": "Partitions without records",
    "unreadable_images": "Unreadable images, left out",
    "looks": "Looks at external test sets",
    "external_looks": "Looks at external test sets",
    "num_looks": "Looks at external test sets",
}


def protocol_lines(protocol: Mapping[str, Any]) -> Lines:
    """Every part of the protocol as (term, text); known parts as sentences, others as "key value" lists."""
    lines: Lines = []
    for name, value in protocol.items():
        if name in ELSEWHERE or value in (None, [], {}, ""):
            continue
        written = _WRITERS.get(name)
        if written is None:
            lines.append((TITLES.get(name, name.replace("_", " ").capitalize()), plain(value)))
        else:
            lines.append(written(value, protocol))
    return lines


def plain(value: Any) -> str:
    """A value for people: lists with commas, mappings as "key value" with semicolons."""
    if isinstance(value, Mapping):
        return "; ".join(f"{str(k).replace('_', ' ')} {plain(v)}" for k, v in value.items() if v not in (None, [], {}))
    if isinstance(value, list | tuple):
        return ", ".join(plain(v) for v in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _records(datasets: Any, protocol: Mapping[str, Any]) -> tuple[str, str]:
    kinds = protocol.get("modality", {})
    parts = [f"{name} {n}" + (f" ({', '.join(kinds[name])})" if name in kinds else "") for name, n in datasets.items()]
    return "Scored records", f"{'; '.join(parts)}; split {plain(protocol.get('splits', []))}"


def _endpoint(metric: Any, protocol: Mapping[str, Any]) -> tuple[str, str]:
    return "Primary endpoint", f"{metric} of image classification, mean over the external data sets"


def _prompts(templates: Any, protocol: Mapping[str, Any]) -> tuple[str, str]:
    shown = templates.get("classes", []) if isinstance(templates, Mapping) else templates
    quoted = [f"“{t.replace('{}', '⟨class⟩')}”" for t in shown]
    return "Zero-shot prompts", f"{', '.join(quoted)}; bare words are the first alone, the ensemble is the mean"


def _intervals(about: Any, protocol: Mapping[str, Any]) -> tuple[str, str]:
    return "Intervals", f"{about['method']}, {about['resamples']} resamples, seed {about['seed']}"


def _probe(about: Any, protocol: Mapping[str, Any]) -> tuple[str, str]:
    told = f"{about['classifier']} on {about['features']}; C = {about['c']} chosen on {about['num_valid']} validation "
    return "Frozen probe", told + f"records, fitted on {about['num_train']}"


_WRITERS = {
    "datasets": _records,
    "endpoint": _endpoint,
    "zero_shot_templates": _prompts,
    "intervals": _intervals,
    "probe": _probe,
}
