"""The report job: read a run, make its tables and pictures, write one HTML file that needs no network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dermfm import checkpoint as checkpoints
from dermfm.checkpoint import load_model
from dermfm.config import InputError, check_range, key
from dermfm.notes.store import done_parts
from dermfm.records.vocabulary import CLASS_CODES
from dermfm.report import attention, breakdown, compare, embedding_map, figures, gallery, generated, tables, tasks
from dermfm.report.notes import note_table
from dermfm.report.protocol import protocol_lines
from dermfm.report.run import ATLAS, Run, load_run
from dermfm.report.study import write_study_page
from dermfm.report.template import render_template
from shards.files import write_text


@dataclass(kw_only=True)
class ReportConfig:
    """One page about one evaluation of a run."""

    run: str | None = key(None, "run directory with an evaluation, or the folder of an evaluation")
    study: str | None = key(None, "folder of a study: one page about it instead of about a run")
    out: str | None = key(None, "HTML file to write; null: <run>/report.html")
    step: int | None = key(None, "step whose evaluation is shown; null: the last one evaluated")
    shards: str | None = key(None, "folder of shards that was evaluated; null: that of the run's config.yaml")
    notes: str | None = key(None, "folder of notes for the yield table; null: <run>/notes where it exists")
    title: str | None = key(None, "heading; null: the run's name")
    gallery: int = key(8, "queries in each retrieval gallery")
    attention: int = key(4, "images with attention maps; 0: none (no checkpoint is loaded then)")
    images: bool = key(True, "show images; false makes a page without photographs")
    seed: int = key(0, "choice of the shown records")

    def __post_init__(self) -> None:
        check_range("gallery", self.gallery, 0, 200)
        check_range("attention", self.attention, 0, 100)
        if self.run and self.study:
            raise ValueError("run and study: give one of the two; a page is about one of them")


def write_report(config: ReportConfig, dry_run: bool = False) -> Path:
    """Write the page (a dry run only reads); its path. InputError where the run cannot be reported on."""
    if config.study:
        return write_study_page(config.study, config.out, dry_run)
    if not config.run:
        raise InputError("run: give run=<run directory> (or study=<folder of a study>)")
    run = load_run(config.run, config.step, config.shards)
    path = Path(config.out) if config.out else run.folder / "report.html"
    if not dry_run:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, render_template("page.html", page_values(config, run)))
    return path


def page_values(config: ReportConfig, run: Run) -> dict[str, Any]:
    """Everything that the template shows."""
    evaluation = run.evaluation
    rows, protocol = evaluation.rows, evaluation.protocol
    gaps = tables.shift_gaps(rows)
    codes = dict(zip(protocol["classes"], CLASS_CODES, strict=True))
    differences = compare.differences(evaluation, [metric for metric, _ in tables.MAIN_METRICS])
    return {
        "title": config.title or evaluation.content["run"],
        "step": evaluation.content["step"],
        "manifest": evaluation.content["manifest"],
        "protocol": protocol,
        "protocol_lines": protocol_lines(protocol),
        "atlas": is_atlas(protocol),
        "endpoint": compare.endpoint(evaluation),
        "metric_titles": dict(tables.MAIN_METRICS),
        "findings": findings(rows, differences["f1_weighted"]),
        "main": [(name, tables.main_table(rows, m), differences[m]) for m, name in tables.MAIN_METRICS],
        "methods": [name for _, _, name in tables.METHODS],
        "task_tables": tasks.task_tables(rows),
        "tracks": tasks.tracks_of(rows),
        "text_labels": tasks.text_label_lines(rows),
        "image_reference": tasks.image_reference(rows),
        "retrieval": tables.retrieval_blocks(rows),
        "retrieval_columns": tables.retrieval_columns(rows),
        "gaps": gaps,
        "gap_figure": figures.gap_figure(gaps) if gaps else "",
        "confusions": compare.confusions(evaluation),
        "notes": note_table(config.notes or own_notes(run)),
        "config": run.config_text,
        "absent": {s: [codes[name] for name in names] for s, names in protocol["absent_classes"].items()},
        "classes": list(zip(CLASS_CODES, protocol["classes"], strict=True)),
    } | (figure_values(config, run) | picture_values(config, run))


def figure_values(config: ReportConfig, run: Run) -> dict[str, Any]:
    """The drawn parts: training curves, calibration, recall of classes, subgroups, the map of the embeddings."""
    recalls = breakdown.class_recalls(run.evaluation)
    groups = breakdown.subgroups(run.evaluation.rows)
    found = embedding_map.embedding_map(run.evaluation, config.seed)
    return {
        "curves": figures.training_figures(run.curves),
        "reliability": [(r, figures.reliability_figure(r)) for r in breakdown.reliabilities(run.evaluation)],
        "recall_figure": figures.interval_bars("recall of each class", CLASS_CODES, recalls, "recall")
        if recalls
        else "",
        "subgroups": [
            (g, figures.interval_bars(f"{g.metric} by {g.title}", g.names, g.bars, g.metric)) for g in groups
        ],
        "map": found,
        "map_figures": [] if found is None else embedding_figures(found),
    }


def embedding_figures(found: embedding_map.EmbeddingMap) -> list[tuple[str, str]]:
    """(title, SVG): the same map coloured by class, and by data set."""
    panels = (("class", found.classes, found.class_names), ("data set", found.datasets, found.dataset_names))
    return [
        (
            f"By {name}",
            figures.map_figure(f"image embeddings by t-SNE, coloured by {name}", found.points, groups, names),
        )
        for name, groups, names in panels
    ]


def picture_values(config: ReportConfig, run: Run) -> dict[str, Any]:
    """Galleries, attention maps and generated reports; without pictures where they are not wanted or impossible."""
    images = run.images if config.images else None
    values: dict[str, Any] = {
        "i2t": [],
        "t2i": [],
        "attention": [],
        "shown_texts": None,
        "reports": generated.marked_reports(run.evaluation, images, config.gallery, config.seed),
        "fact_counts": generated.fact_counts(run.evaluation),
    }
    which = shown_texts(run) if config.images else None
    if which is None:
        return values
    given = (run.evaluation, which, run.images, config.gallery, config.seed)
    return values | {
        "i2t": gallery.image_queries(*given),
        "t2i": gallery.text_queries(*given),
        "attention": _attention(config, run, which),
        "shown_texts": run.evaluation.texts[which],
    }


def own_notes(run: Run) -> str | None:
    """The notes folder inside the run directory, where there is one with finished notes."""
    return str(run.folder / "notes") if done_parts(run.folder / "notes") else None


def is_atlas(protocol: dict[str, Any]) -> bool:
    """Whether the scored images were drawn by the embedded atlas."""
    return all(name.startswith(ATLAS) for name in protocol["datasets"])


def shown_texts(run: Run) -> int | None:
    """The text set of the galleries: the one of the most distinct notes among those of at least half of the records."""
    texts, half = run.evaluation.texts, len(run.evaluation.records) / 2
    shown = [(len(one.rows) >= half, len(set(one.texts)), i) for i, one in enumerate(texts)]
    return max(shown)[2] if shown else None


@dataclass(frozen=True)
class Finding:
    """One sentence's numbers: model against probe in a partition."""

    scope: str
    model: float
    probe: float
    difference: compare.Difference


def findings(rows: list[dict[str, Any]], differences: dict[str, compare.Difference]) -> list[Finding]:
    """Model against frozen probe, internal and external, in weighted F1."""
    out = []
    for scope in ("internal", "external"):
        wanted = {"scope_kind": "partition", "scope": scope, "metric": "f1_weighted", "class_set": "classes"}
        model, probe = tables.find(rows, task="classify-image", **wanted), tables.find(rows, task="probe", **wanted)
        if model and probe and scope in differences:
            out.append(Finding(scope, model["value"], probe["value"], differences[scope]))
    return out


def _attention(config: ReportConfig, run: Run, which: int) -> list[attention.AttentionMap]:
    """Attention maps, where the evaluated checkpoint is still there."""
    folder = run.folder / "ckpt" / checkpoints.step_name(run.evaluation.content["step"])
    if not config.attention or not folder.is_dir():
        return []
    model = load_model(folder)
    return attention.attention_maps(model, run.evaluation, which, run.images, config.attention, config.seed)
