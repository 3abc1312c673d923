"""The model card: what the model is for and is not, what it was trained on under which licences, how well it does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from dermfm.evaluate.records import TRACKS

NO_DEVICE = "Not a medical device. For research only; it must not be used to diagnose or treat people."
METRICS = (("f1_weighted", "weighted F1"), ("balanced_accuracy", "balanced accuracy"), ("f1_macro", "macro F1"))
TASKS = (("classify-image", "image head"), ("probe", "frozen probe"), ("zero-shot", "zero-shot"))
Row = dict[str, Any]


def model_card(about: dict[str, Any], data: list[Row], parts: list[Row], metrics: dict[str, Any] | None) -> str:
    """The card as Markdown. `data`: one row a data set and split; `parts`: of the model; `metrics`: a metrics.json."""
    sections = [
        _head(about),
        _use(about),
        _data(about, data),
        _parts(parts),
        _calibration(about),
        results_section(metrics, about["step"]),
        _limits(about),
    ]
    return "\n".join(sections)


def _head(about: dict[str, Any]) -> str:
    return (
        f"# {about['name']}\n\n**{NO_DEVICE}**\n\n"
        f"An image-text model for skin lesions, exported by dermfm {about['dermfm']} from run `{about['run']}` at step "
        f"{about['step']} ({about['samples_seen']} samples seen). Image tower `{about['towers']['image']}`, text tower "
        f'`{about["towers"]["text"]}`.\n\n```python\nimport dermfm\n\nmodel = dermfm.load("path/to/this/folder")\n'
        'probabilities = model.classify(["lesion.jpg"])  # or encode_image, encode_text, match, write_report\n```\n'
    )


def _use(about: dict[str, Any]) -> str:
    return (
        "## Intended use\n\nResearch on image-text models for dermatology: retrieval, zero-shot and linear "
        "classification, maps of where a word looks, comparison of training methods. Out of scope: any use on a "
        "patient, triage, photographs of other things than single lesions, and groups of people that the data below "
        f"do not hold. Classes: {', '.join(about['classes'])}.\n"
    )


def _data(about: dict[str, Any], data: list[Row]) -> str:
    lines = [f"| {r['dataset']} | {r['split']} | {r['count']} | {r['modality']} | {r['licence']} |" for r in data]
    notes = ", ".join(f"{name} ({TRACKS.get(a, a)})" for name, a in sorted(about["note_access"].items())) or "none"
    return (
        f"## Data\n\nShards `{about['manifest']}`. The licences are those of the images; what they allow for a model "
        "trained on them is for its user to clear.\n\n| data set | split | images | modality | licence |\n"
        f"|---|---|---|---|---|\n{chr(10).join(lines)}\n\nNotes were synthesized, not written by clinicians: {notes}. "
        f"Drawn in training: {about['strategies'] or 'none'}. {about['num_notes']} distinct training notes are part of "
        "this export, for retrieval.\n"
    )


def _parts(parts: list[Row]) -> str:
    lines = [f"| {p['name']} | {p['parameters']:,} | {p['trainable']:,} |" for p in parts]
    return "## Size\n\n| part | parameters | trained |\n|---|---|---|\n" + "\n".join(lines) + "\n"


def _calibration(about: dict[str, Any]) -> str:
    fitted = about["calibration"]
    if fitted is None:
        return "## Calibration\n\nNone: no labelled validation records. The probabilities are uncalibrated.\n"
    return (
        f"## Calibration\n\nTemperature {fitted['temperature']:.3f}, fitted on {fitted['num_records']} validation "
        f"records (log loss {fitted['log_loss'][0]:.3f} → {fitted['log_loss'][1]:.3f}, expected calibration error "
        f"{fitted['ece'][0]:.3f} → {fitted['ece'][1]:.3f}). On other data than those it does not hold.\n"
    )


def results_section(metrics: dict[str, Any] | None, step: int) -> str:
    """The part of the card on `metrics` (a metrics.json, None: not evaluated) for a checkpoint of `step`."""
    if metrics is None:
        return "## Results\n\nThis checkpoint was not evaluated (`dermfm evaluate`) when it was exported.\n"
    title = f"## Results\n\nOn the splits {', '.join(metrics['protocol']['splits'])}, in brackets 95 % intervals."
    if metrics["step"] != step:
        title += f" **They are those of step {metrics['step']}, not of the exported one.**"
    head = f"| data | n | method | {' | '.join(name for _, name in METRICS)} |\n|---|---|---|{'---|' * len(METRICS)}"
    return f"{title}\n\n{head}\n" + "\n".join(_result_lines(metrics["results"])) + "\n"


def _result_lines(rows: list[Row]) -> Iterable[str]:
    picked = [r for r in rows if r["class_set"] == "classes" and r["scope_kind"] in ("partition", "dataset")]
    for scope in dict.fromkeys(r["scope"] for r in picked):
        for task, title in TASKS:
            of_task = [r for r in picked if (r["scope"], r["task"]) == (scope, task)]
            own = {r["metric"]: r for r in of_task if task != "zero-shot" or r["eval_strategy"] == "ensemble"}
            if own:
                cells = " | ".join(_cell(own.get(metric)) for metric, _ in METRICS)
                yield f"| {scope} | {next(iter(own.values()))['n']} | {title} | {cells} |"


def _cell(row: Row | None) -> str:
    if row is None or row["value"] is None:
        return "–"
    interval = f" ({row['ci_low']:.3f}–{row['ci_high']:.3f})" if row["ci_low"] is not None else ""
    return f"{row['value']:.3f}{interval}"


def _limits(about: dict[str, Any]) -> str:
    given = [name for name, access in about["note_access"].items() if access == "given"]
    leak = (
        f"Notes of {', '.join(sorted(given))} were written from the diagnosis: numbers that use their text measure to "
        "a large part the reading of the class word. "
        if given
        else ""
    )
    return (
        f"## Limits\n\n{leak}Class frequencies of the data are not those of any clinic. Accuracy falls under a change "
        "of camera, clinic or population; see the external rows above. Skin tone is unevenly covered.\n"
    )


def describe_data(fields: Iterable[dict[str, Any]], split: str) -> list[Row]:
    """One row a data set of a split: images, modalities, licences."""
    by_set: dict[str, list[dict[str, Any]]] = {}
    for f in fields:
        by_set.setdefault(str(f.get("dataset") or "unknown"), []).append(f)
    return [
        {"dataset": name, "split": split, "count": len(own)}
        | {k: ", ".join(sorted(Counter(str(f.get(k) or "not stated") for f in own))) for k in ("modality", "licence")}
        for name, own in sorted(by_set.items())
    ]
