"""What a run directory holds for its report: metrics, embeddings with their ids, predictions, records, images."""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError
from safetensors.numpy import load_file

from dermfm.config import InputError, read_yaml
from dermfm.evaluate import results
from dermfm.evaluate.records import RecordSet, TextSet, concatenate, read_split, text_sets
from dermfm.metrics import JSONL, read_rows
from dermfm.samples import image_bytes
from shards.manifest import Manifest
from shards.reader import ShardReader

THUMBNAIL = 160  # pixels of the longer side, at most
ATLAS = "Atlas_"  # the data sets of the embedded atlas begin with it
Row = dict[str, Any]


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
    config: dict[str, Any]
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
    manifest = Manifest.load(shards or config.get("shards") or "")
    if manifest.fingerprint != content["manifest"]:
        raise InputError(
            f"{manifest.folder}: its fingerprint {manifest.fingerprint} is not that of the evaluation "
            f"({content['manifest']}); give shards=<the folder that was evaluated>"
        )
    splits = content["protocol"]["splits"]
    evaluation = load_evaluation(path.parent, content, manifest, splits)
    text = file.read_text(encoding="utf-8") if config else ""
    return Run(run, config, text, read_rows(run / JSONL), evaluation, Images(manifest, splits))


def find_metrics(run: Path, step: int | None) -> Path:
    """The metrics.json of a step, or of the last one evaluated; InputError where there is none."""
    found = {int(p.parent.name): p for p in run.glob(f"eval/*/{results.METRICS}") if p.parent.name.isdigit()}
    if not found:
        raise InputError(f"{run}: has no eval/<step>/{results.METRICS}; run `dermfm evaluate run={run}` first")
    if step is not None and step not in found:
        raise InputError(f"step: {step} was not evaluated; evaluated steps: {', '.join(map(str, sorted(found)))}")
    return found[max(found) if step is None else step]


def load_evaluation(folder: Path, content: dict[str, Any], manifest: Manifest, splits: list[str]) -> Evaluation:
    """Embeddings, ids and predictions, aligned with the records of the shards. InputError where ids differ."""
    vectors = load_file(folder / results.EMBEDDINGS)
    ids = pq.read_table(folder / results.IDS).to_pylist()
    predictions = pq.read_table(folder / results.PREDICTIONS).to_pylist()
    everything = concatenate([read_split(manifest, split, quiet=True) for split in splits])
    place = {record_id: i for i, record_id in enumerate(everything.record_ids)}
    image_ids = [row["record_id"] for row in ids if row["kind"] == "image"]
    unknown = [record_id for record_id in image_ids if record_id not in place]
    if unknown or len(image_ids) != len(vectors["image"]):
        raise InputError(f"{folder / results.IDS}: does not belong to these shards; run `dermfm evaluate` again")
    records = everything.select(np.array([place[i] for i in image_ids], dtype=np.int64))
    texts = text_sets(records, [note["strategy"] for note in content["protocol"]["notes"]])
    sizes = np.cumsum([0, *(len(one.rows) for one in texts)])
    if sizes[-1] != len(vectors["text"]):
        raise InputError(
            f"{folder / results.EMBEDDINGS}: its notes are not those of the shards; run `dermfm evaluate` again"
        )
    text = [vectors["text"][a:b] for a, b in itertools.pairwise(sizes)]
    return Evaluation(folder, content, records, vectors["image"], texts, text, predictions)
