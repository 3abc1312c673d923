"""The exported folder: what lies in it, written whole or not at all, and read back.

`model.safetensors` (float32), `config.json` (model, classes, calibration, where it came from), `text/` (the encoder's
configuration and tokenizer), `notes.parquet` and `notes.safetensors` (texts to retrieve, and their vectors), and
`README.md` (the model card).
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
import safetensors.torch

from dermfm.config import InputError, from_dict, nearest, to_dict
from dermfm.model.dermfm import DermFM, ModelConfig

FORMAT = "dermfm-export-1"
CONFIG, WEIGHTS, CARD, TEXT = "config.json", "model.safetensors", "README.md", "text"
NOTES, NOTE_VECTORS = "notes.parquet", "notes.safetensors"
NOTE_COLUMNS = ("text", "label", "dataset", "strategy", "label_access")


@dataclass
class Notes:
    """Distinct notes to retrieve: text, label (−1 unknown), dataset, strategy, label access of each; vectors [M, d]."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    vectors: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))


@dataclass
class Bundle:
    """Everything that an export holds. `about`: classes, temperature, run, step, shards' fingerprint, …"""

    model: DermFM
    about: dict[str, Any]
    notes: Notes
    card: str = ""


def check_target(out: Path) -> None:
    """InputError where `out` holds something that is not an export: it would be lost."""
    if out.is_file():
        raise InputError(f"out: {out} is a file; give a folder")
    if out.is_dir() and any(out.iterdir()) and not is_export(out):
        raise InputError(f"out: {out} is not empty and is no export of this program; give another folder")


def is_export(folder: Path) -> bool:
    """Whether a folder was written by `write`."""
    try:
        return json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("format", "").startswith("dermfm-export-")
    except (OSError, ValueError, AttributeError):
        return False


def write(bundle: Bundle, out: Path) -> None:
    """Write the folder under another name, then rename it over an older export. InputError for others' folders."""
    check_target(out)
    partial, old = (out.with_name(out.name + ending) for ending in (".tmp", ".old"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_files(bundle, partial)
    if out.exists():
        out.replace(old)
    partial.replace(out)
    shutil.rmtree(old, ignore_errors=True)


def _write_files(bundle: Bundle, folder: Path) -> None:
    model = bundle.model
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    model.text.body.config.save_pretrained(folder / TEXT)
    model.tokenizer.save_pretrained(folder / TEXT)
    columns = {name: [row[name] for row in bundle.notes.rows] for name in NOTE_COLUMNS}
    types = [pa.int64() if name == "label" else pa.string() for name in NOTE_COLUMNS]
    pq.write_table(pa.table(columns, schema=pa.schema(zip(NOTE_COLUMNS, types, strict=True))), folder / NOTES)
    vectors = np.ascontiguousarray(bundle.notes.vectors, dtype=np.float32)
    safetensors.numpy.save_file({"text": vectors}, folder / NOTE_VECTORS)
    for name in (WEIGHTS, NOTE_VECTORS):
        (folder / name).chmod(0o644)  # safetensors writes files that only their owner can read
    (folder / CARD).write_text(bundle.card, encoding="utf-8")
    values = {"format": FORMAT, **bundle.about, "model": to_dict(model.config)}
    with (folder / CONFIG).open("w", encoding="utf-8") as file:  # last: where it is, the others are whole
        json.dump(values, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def read(folder: str | Path, device: str = "cpu") -> Bundle:
    """The export in `folder`, its model in eval mode on `device`. InputError where it is none or is damaged."""
    folder = Path(folder)
    if not is_export(folder):
        beside = [p.name for p in folder.parent.iterdir() if is_export(p)] if folder.parent.is_dir() else []
        hint = nearest(folder.name, beside) if beside else "`dermfm export run=… out=…` writes one"
        raise InputError(f"{folder}: is not an exported model (no {CONFIG} of one); {hint}")
    about = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if about["format"] != FORMAT:
        raise InputError(f"{folder / CONFIG}: format {about['format']} is not {FORMAT}; export the run again")
    try:
        return Bundle(_read_model(folder, about.pop("model"), device), about, _read_notes(folder))
    except (OSError, RuntimeError, KeyError, safetensors.SafetensorError, pa.ArrowException) as error:
        raise InputError(f"{folder}: the export is damaged ({str(error).splitlines()[0][:160]})") from error


def _read_model(folder: Path, values: dict[str, Any], device: str) -> DermFM:
    values["image"]["weights"], values["text"]["pretrained"] = None, False  # the file brings every weight
    values["text"]["name"], values["text"]["cache_mb"] = str(folder / TEXT), 0
    model = DermFM(from_dict(ModelConfig, values, str(folder / CONFIG)))
    model.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS))
    return model.to(device).eval()


def _read_notes(folder: Path) -> Notes:
    rows = pq.read_table(folder / NOTES).to_pylist()
    vectors = safetensors.numpy.load_file(folder / NOTE_VECTORS)["text"]
    if len(rows) != len(vectors):
        raise RuntimeError(f"{NOTES} has {len(rows)} notes, {NOTE_VECTORS} {len(vectors)} vectors")
    return Notes(rows, vectors)
