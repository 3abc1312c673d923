"""The export job: a run's checkpoint as a folder that stands alone, calibrated, with notes to retrieve and a card."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dermfm.checkpoint import load_model, read_state
from dermfm.config import InputError, check_choice, check_range, key
from dermfm.evaluate import embed, results
from dermfm.evaluate.parts import Parts
from dermfm.evaluate.ranks import Ranks
from dermfm.evaluate.records import RecordSet, read_split
from dermfm.evaluate.source import Source, find_source, shards_folder, train_strategy
from dermfm.export import bundle
from dermfm.export.calibrate import fit_temperature
from dermfm.export.card import describe_data, model_card
from dermfm.records.vocabulary import CLASSES
from shards.manifest import Manifest, ShardError


@dataclass(kw_only=True)
class ExportConfig:
    """A checkpoint as a folder that needs neither the run nor the shards."""

    run: str | None = key(None, "run directory; its newest checkpoint is exported")
    checkpoint: str | None = key(None, "a checkpoint folder ckpt/step-NNNNNNNN instead of a run's newest one")
    out: str | None = key(None, "folder to write; null: <run>/export")
    shards: str | None = key(None, "folder of shards for calibration and notes; null: that of the run's config.yaml")
    name: str | None = key(None, "name on the model card; null: the run's")
    max_notes: int = key(2000, "distinct training notes to take along for retrieval; 0: none")
    calibrate: bool = key(True, "fit a temperature on the valid split")
    batch_size: int = key(32, "images or texts in one forward pass")
    device: str = key("auto", "auto, cpu or cuda")
    seed: int = key(0, "choice of notes where there are more than max_notes")

    def __post_init__(self) -> None:
        check_range("max_notes", self.max_notes, 0)
        check_range("batch_size", self.batch_size, 1)
        check_choice("device", self.device, ("auto", "cpu", "cuda"))


@dataclass(frozen=True)
class Plan:
    """What one call will do, resolved from the configuration."""

    source: Source
    manifest: Manifest
    out: Path

    def lines(self) -> list[str]:
        """For people: checkpoint, shards, output."""
        return [
            f"checkpoint {self.source.checkpoint} (step {self.source.step})",
            f"shards {self.manifest.folder} ({self.manifest.fingerprint})",
            f"output {self.out}" + (", replaced" if bundle.is_export(self.out) else ""),
        ]


def make_plan(config: ExportConfig) -> Plan:
    """Resolve what is exported. InputError or ShardError for what is missing or an output that would be lost."""
    source = find_source(config.run, config.checkpoint)
    manifest = Manifest.load(shards_folder(config.shards, source))
    out = Path(config.out) if config.out else source.run / "export"
    bundle.check_target(out)
    return Plan(source, manifest, out)


def export(config: ExportConfig, device: str = "cpu") -> Path:
    """Write the folder; its path. InputError or ShardError for what cannot be exported."""
    plan = make_plan(config)
    model = load_model(str(plan.source.checkpoint), device)
    compute = embed.Compute(device, "fp32", config.batch_size, 0)
    train = _records(plan.manifest, "train")
    calibration = _calibrate(model, plan.manifest, compute) if config.calibrate else None
    notes = _notes(model, train, config, compute)
    about = _about(plan, config, train, len(notes.rows)) | {
        "temperature": calibration["temperature"] if calibration else None,
        "calibration": calibration,
        "towers": {"image": model.config.image.name, "text": model.config.text.name},
    }
    data = describe_data(train.fields if train else [], "train")
    parts = [dataclasses.asdict(part) for part in model.summary()]
    card = model_card(about, data, parts, _metrics(plan.source))
    bundle.write(bundle.Bundle(model, about, notes, card), plan.out)
    return plan.out


def _about(plan: Plan, config: ExportConfig, train: RecordSet | None, num_notes: int) -> dict[str, Any]:
    source = plan.source
    access = {
        str(note["strategy"]): str(note.get("label_access") or "given")
        for notes in (train.notes if train else [])
        for note in notes
    }
    return {
        "name": config.name or source.run.name,
        "dermfm": importlib.metadata.version("dermfm"),
        "run": source.run.name,
        "step": source.step,
        "samples_seen": read_state(source.checkpoint).samples_seen,
        "manifest": plan.manifest.fingerprint,
        "strategies": train_strategy(source.config),
        "note_access": access,
        "num_notes": num_notes,
        "classes": CLASSES,
    }


def _records(manifest: Manifest, split: str) -> RecordSet | None:
    """The records of a split, None where it is empty."""
    if not sum(s.num_samples for s in manifest.shards if s.split == split):
        return None
    return read_split(manifest, split)


def _calibrate(model: Any, manifest: Manifest, compute: embed.Compute) -> dict[str, Any] | None:
    """The fitted temperature with what it rests on, None where no labelled valid record is there."""
    try:
        labels = manifest.read_rows("valid")["label"]
    except ShardError:
        return None
    known = np.array([-1 if label is None else label for label in labels])
    with tempfile.TemporaryDirectory() as folder:
        forward = embed.image_outputs(model)
        parts = Parts(folder, "valid", [manifest.fingerprint])
        size = model.image_size
        found = embed.embed_images(forward, manifest, "valid", size, parts, compute, Ranks(), "valid images")
    fitted = fit_temperature(found["logits"], known[found["rows"]])
    return None if fitted is None else dataclasses.asdict(fitted)


def _notes(model: Any, train: RecordSet | None, config: ExportConfig, compute: embed.Compute) -> bundle.Notes:
    """Distinct texts of the training notes with their vectors; of more than `max_notes`, some of every class."""
    rows: dict[str, dict[str, Any]] = {}
    for i, notes in enumerate(train.notes if train is not None else []):
        assert train is not None
        for note in notes:
            text = (note.get("text") or "").strip()
            if text and text not in rows:
                own = {"text": text, "label": int(train.labels[i]), "dataset": str(train.datasets[i])}
                access = str(note.get("label_access") or "given")
                rows[text] = own | {"strategy": str(note["strategy"]), "label_access": access}
    chosen = choose_notes(list(rows.values()), config.max_notes, config.seed)
    if not chosen:
        return bundle.Notes()
    texts = [row["text"] for row in chosen]
    limit = model.config.text.max_tokens
    with tempfile.TemporaryDirectory() as folder:
        parts = Parts(folder, "notes", [len(texts)])
        found = embed.embed_texts(embed.text_outputs(model), model.tokenizer, limit, texts, parts, compute, Ranks())
    return bundle.Notes(chosen, found["embedding"])


def choose_notes(rows: list[dict[str, Any]], count: int, seed: int) -> list[dict[str, Any]]:
    """Up to `count` notes, drawn at random from the classes and strategies in turn, in their given order."""
    rng = np.random.default_rng(seed)
    kinds: dict[tuple, list[int]] = {}
    for place in rng.permutation(len(rows)):
        kinds.setdefault((rows[place]["label"], rows[place]["strategy"]), []).append(int(place))
    turns = sorted((turn, kind, place) for kind, places in kinds.items() for turn, place in enumerate(places))
    return [rows[place] for place in sorted(place for _, _, place in turns[:count])]


def _metrics(source: Source) -> dict[str, Any] | None:
    """The metrics.json of the exported step, or else of the last one evaluated."""
    found = {int(p.parent.name): p for p in source.run.glob(f"eval/*/{results.METRICS}") if p.parent.name.isdigit()}
    if not found:
        return None
    try:
        return results.read_metrics(found.get(source.step, found[max(found)]))
    except InputError:
        return None
