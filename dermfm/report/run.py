"""What a run directory holds for its report: metrics, embeddings with their ids, predictions, records, images."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.numpy import load_file

from dermfm.config import InputError, nearest, read_yaml
from dermfm.evaluate import results
from dermfm.evaluate.records import RecordSet, TextSet, concatenate, read_split
from dermfm.evaluate.shift import ENDPOINTS
from dermfm.metrics import JSONL, read_rows
from dermfm.samples import image_bytes
from shards.manifest import Manifest
from shards.reader import ShardReader

THUMBNAIL = 160  # pixels of the longer side, at most
ATLAS = "Atlas_"  # the data sets of the embedded atlas begin with it
# Columns of an evaluation's tables that a page cannot do without.
NEEDED = {
    results.IDS: ("kind", "record_id", "strategy", "track", "note_id", "text", "row"),
    results.PREDICTIONS: ("task", "record_id", "class_set", "eval_strategy", "probabilities"),
}
Row = dict[str, Any]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One evaluation with what it saved. `records` [N] and `image` [N, d] are aligned; one of `texts` a strategy."""

    folder: Path
    content: dict[str, Any]
    records: RecordSet
    image: np.ndarray
    texts: list[TextSet]
    text: list[np.ndarray]
    predictions: list[Row]

    @property
    def rows(self) -> list[Row]:
        """The rows of metrics.json."""
        return self.content["results"]

    @property
    def protocol(self) -> dict[str, Any]:
        """The protocol of metrics.json."""
        return self.content["protocol"]


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory with its newest (or the asked-for) evaluation."""

    folder: Path
    config_text: str
    curves: list[Row]
    evaluation: Evaluation
    images: Images


class Images:
    """Thumbnails of the samples in a folder of shards, by record id."""

    def __init__(self, manifest: Manifest, splits: list[str]) -> None:
        self._readers, self._places = {}, {}
        for split in splits:
            shards = manifest.split(split)
            self._readers[split] = ShardReader(manifest.folder, shards, manifest.remote)
            number = {info.name: i for i, info in enumerate(shards)}
            rows = manifest.read_rows(split)
            for name, row, record_id in zip(rows["shard"], rows["row"], rows["record_id"], strict=True):
                self._places[record_id] = (split, number[name], row)

    def sample(self, record_id: str) -> dict[str, bytes]:
        """The bytes of one sample."""
        split, shard, row = self._places[record_id]
        return self._readers[split].read(shard, row)

    def thumbnail(self, record_id: str) -> str:
        """The image as a data URI of a small JPEG; empty where it cannot be decoded."""
        try:
            with Image.open(io.BytesIO(image_bytes(self.sample(record_id)))) as image:
                return data_uri(image.convert("RGB"))
        except (OSError, UnidentifiedImageError):
            return ""


def data_uri(image: Image.Image, size: int = THUMBNAIL) -> str:
    """An image as a data URI of a JPEG of at most `size` pixels a side."""
    image = image.copy()
    image.thumbnail((size, size), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def load_run(folder: str, step: int | None, shards: str | None) -> Run:
    """Read a run directory. InputError where it has no evaluation, or shards and embeddings do not belong together."""
    run = Path(folder)
    if not run.is_dir():
        raise InputError(f"run: '{run}' is not a folder; give the run directory of `dermfm train`")
    file = run / "config.yaml"
    config = read_yaml(file) if file.is_file() else {}
    path = find_metrics(run, step)
    content = results.read_metrics(path)
    check_parts(path, content["protocol"], ("splits", "internal", "external", "endpoint", "classes"))
    endpoint = content["protocol"]["endpoint"]
    if endpoint not in ENDPOINTS:
        raise InputError(f"{path}: the endpoint '{endpoint}' is not valid; {nearest(endpoint, ENDPOINTS)}")
    manifest = Manifest.load(shards or config.get("shards") or "")
    if manifest.fingerprint != content["manifest"]:
        raise InputError(
            f"{manifest.folder}: its fingerprint {manifest.fingerprint} is not that of the evaluation "
            f"({content['manifest']}); give shards=<the folder that was evaluated>"
        )
    splits = content["protocol"]["splits"]
    evaluation = load_evaluation(path.parent, content, manifest, splits)
    text = file.read_text(encoding="utf-8") if config else ""
    return Run(run, text, read_rows(run / JSONL), evaluation, Images(manifest, splits))


def find_metrics(run: Path, step: int | None) -> Path:
    """The metrics.json of a step, or of the last one evaluated, or that of the folder itself (`dermfm evaluate out=`).

    InputError where there is none.
    """
    if step is None and (run / results.METRICS).is_file():
        return run / results.METRICS
    found = {int(p.parent.name): p for p in run.glob(f"eval/*/{results.METRICS}") if p.parent.name.isdigit()}
    if not found:
        raise InputError(f"{run}: has no eval/<step>/{results.METRICS}; run `dermfm evaluate run={run}` first")
    if step is not None and step not in found:
        raise InputError(f"step: {step} was not evaluated; evaluated steps: {', '.join(map(str, sorted(found)))}")
    return found[max(found) if step is None else step]


def read_saved(path: Path, read: Callable[[Path], T], job: str = "evaluate") -> T:
    """A file of a finished job by its reader; InputError where it is missing or damaged."""
    if not path.is_file():
        raise InputError(f"{path}: is missing; run `dermfm {job}` again")
    try:
        return read(path)
    except (pa.ArrowException, SafetensorError, OSError, ValueError) as error:
        told = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: cannot be read ({told}); run `dermfm {job}` again") from error


def check_parts(path: Path, held: Container[str], needed: Iterable[str]) -> None:
    """InputError where a file of an evaluation lacks an array or a column."""
    lacking = next((name for name in needed if name not in held), None)
    if lacking is not None:
        raise InputError(f"{path}: has no '{lacking}'; run `dermfm evaluate` again")


def _rows(path: Path, columns: Iterable[str]) -> list[Row]:
    table = read_saved(path, pq.read_table)
    check_parts(path, table.column_names, columns)
    return table.to_pylist()


def load_evaluation(folder: Path, content: dict[str, Any], manifest: Manifest, splits: list[str]) -> Evaluation:
    """Embeddings, ids and predictions, aligned with the records of the shards. InputError where ids differ."""
    vectors = read_saved(folder / results.EMBEDDINGS, load_file)
    check_parts(folder / results.EMBEDDINGS, vectors, ("image", "text"))
    ids, predictions = (_rows(folder / name, columns) for name, columns in NEEDED.items())
    everything = concatenate([read_split(manifest, split, quiet=True) for split in splits])
    place = {record_id: i for i, record_id in enumerate(everything.record_ids)}
    image_ids = [row["record_id"] for row in ids if row["kind"] == "image"]
    scored = {*image_ids, *(row["record_id"] for row in predictions)}
    unknown = [record_id for record_id in scored if record_id not in place]
    if unknown or len(image_ids) != len(vectors["image"]):
        raise InputError(f"{folder / results.IDS}: does not belong to these shards; run `dermfm evaluate` again")
    records = everything.select(np.array([place[i] for i in image_ids], dtype=np.int64))
    saved = [row for row in ids if row["kind"] == "text"]
    if len(saved) != len(vectors["text"]):
        raise InputError(f"{folder / results.EMBEDDINGS}: is not that of {results.IDS}; run `dermfm evaluate` again")
    texts = saved_texts(records, saved)
    text = [vectors["text"][[row["row"] for row in own]] for own in by_kind(saved).values()]
    return Evaluation(folder, content, records, vectors["image"], texts, text, predictions)


def by_kind(saved: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows of the saved notes by strategy and track."""
    out: dict[tuple[str, str], list[Row]] = {}
    for row in saved:
        out.setdefault((row["strategy"], row["track"]), []).append(row)
    return out


def saved_texts(records: RecordSet, saved: list[Row]) -> list[TextSet]:
    """The notes whose embeddings were saved, one set for each strategy and track; InputError where one is not there.

    A text that the evaluation saved (a masked one) goes before the note's own.
    """
    place = {record_id: i for i, record_id in enumerate(records.record_ids)}
    notes = {note["note_id"]: note["text"] for own in records.notes for note in own}
    lost = [row for row in saved if row["record_id"] not in place or not (row["text"] or row["note_id"] in notes)]
    if lost:
        raise InputError(
            f"note '{lost[0]['note_id']}' of the evaluation is not in the shards; run `dermfm evaluate` again"
        )
    return [
        TextSet(
            strategy=strategy,
            track=track,
            rows=np.array([place[row["record_id"]] for row in own], dtype=np.int64),
            note_ids=[row["note_id"] for row in own],
            texts=[row["text"] or notes[row["note_id"]] for row in own],
        )
        for (strategy, track), own in by_kind(saved).items()
    ]
