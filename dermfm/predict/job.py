"""The predict job: a model and a folder of images → predictions.csv and index.html, continued where it stopped."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dermfm.config import REQUIRED, InputError, check_choice, check_range, key, short_hash
from dermfm.export import bundle
from dermfm.export.job import ExportConfig, export
from dermfm.export.model import Exported, load
from dermfm.predict.answer import Answer, Pictures, answer_batch, read_pixels
from dermfm.predict.page import render
from dermfm.progress import Meter
from dermfm.records.vocabulary import CLASS_CODES, MALIGNANCIES
from shards.files import file_sha256, write_text

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
CSV, PAGE, PICTURES, MARK = "predictions.csv", "index.html", "pictures", "predict.json"
PART = 32  # images in one piece on disk: what an interruption costs at most


@dataclass(kw_only=True)
class PredictConfig:
    """What a trained model says about images. Not a medical device."""

    model: str = key(REQUIRED, "an exported folder, or a run directory (exported into <run>/export first)")
    images: str = key(REQUIRED, "an image file, or a folder with images at any depth")
    out: str = key(REQUIRED, "folder to write predictions.csv, index.html and pictures/ to")
    num_notes: int = key(3, "nearest notes an image; 0: none")
    attention: bool = key(True, "draw where the words of the report or of the nearest note look")
    limit: int = key(0, "at most this many images, in order of name; 0: all")
    device: str = key("auto", "auto, cpu or cuda")

    def __post_init__(self) -> None:
        check_range("num_notes", self.num_notes, 0, 100)
        check_range("limit", self.limit, 0)
        check_choice("device", self.device, ("auto", "cpu", "cuda"))


@dataclass(frozen=True)
class Outcome:
    """What one call did: how many images were answered, and which could not be read."""

    folder: Path
    num_images: int
    bad: list[Answer]


def find_images(config: PredictConfig) -> tuple[Path, list[str]]:
    """(folder, image names below it in order). InputError where there is none."""
    path = Path(config.images)
    if path.is_file():
        return path.parent, [path.name]
    if not path.is_dir():
        raise InputError(f"images: no such file or folder: {path}")
    own = (Path(config.out) / PICTURES).resolve()  # pictures of an earlier call, where it wrote among the images
    every = (p for p in path.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
    found = (p for p in every if own not in p.resolve().parents)
    names = sorted(p.relative_to(path).as_posix() for p in found)
    if not names:
        raise InputError(f"images: {path} holds no image ({', '.join(ENDINGS)})")
    return path, names[: config.limit or None]


def check(config: PredictConfig) -> None:
    """InputError where the model or the output folder cannot be used; nothing is loaded or written."""
    model, out = Path(config.model), Path(config.out)
    if not model.is_dir():
        raise InputError(f"model: no such folder: {model}; give an export or a run directory")
    if not bundle.is_export(model) and not (model / "config.yaml").is_file():
        raise InputError(f"model: {model} is neither an export nor a run directory; `dermfm export run=…` writes one")
    if out.is_file():
        raise InputError(f"out: {out} is a file; give a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / MARK).is_file():
        raise InputError(f"out: {out} is not empty and holds no predictions; give another folder")


def predict(config: PredictConfig, device: str = "cpu") -> Outcome:
    """Answer every image; the files are written at the end, pictures on the way. InputError for what cannot be used."""
    root, names = find_images(config)
    check(config)
    where = exported_folder(config.model, device)
    model, out = load(where, device), Path(config.out)
    parts = _parts_folder(config, where, root, names, out)
    with Meter(len(names), "predicting", "images") as meter:
        for start in range(0, len(names), PART):
            part = parts / f"part-{start:09d}.json"
            if not part.is_file():
                answers = _answer_part(model, config, root, names[start : start + PART], out, start)
                write_text(part, json.dumps([dataclasses.asdict(a) for a in answers]))
            meter.advance(len(names[start : start + PART]))
    texts = [part.read_text(encoding="utf-8") for part in sorted(parts.glob("part-*.json"))]
    answers = [Answer(**row) for text in texts for row in json.loads(text)]
    bad = [a for a in answers if a.error]
    if len(bad) == len(answers):
        raise InputError(f"images: none of {len(bad)} can be read; first: {bad[0].image} ({bad[0].error})")
    write_text(out / CSV, table(answers, config.num_notes))
    write_text(out / PAGE, render(model, answers, root.name))
    shutil.rmtree(parts)
    return Outcome(out, len(answers) - len(bad), bad)


def exported_folder(path: str, device: str) -> Path:
    """The export itself, or that of a run's newest checkpoint, written where it is missing or older."""
    folder = Path(path)
    if bundle.is_export(folder):
        return folder
    from dermfm.evaluate.source import find_source

    inner = folder / "export"
    step = find_source(path, None).step
    current = json.loads((inner / bundle.CONFIG).read_text(encoding="utf-8")) if bundle.is_export(inner) else {}
    if (current.get("step"), current.get("format")) != (step, bundle.FORMAT):
        export(ExportConfig(run=path, device=device), device)
    return inner


def _parts_folder(config: PredictConfig, model: Path, root: Path, names: list[str], out: Path) -> Path:
    """Where this call's finished pieces lie; those of another model or other images are removed."""
    stats = [(n, (root / n).stat().st_size, (root / n).stat().st_mtime_ns) for n in names]
    weights = file_sha256(model / bundle.WEIGHTS), file_sha256(model / bundle.CONFIG)
    identity = short_hash([weights, stats, config.num_notes, config.attention])
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / MARK, json.dumps({"model": str(model), "images": str(root), "identity": identity}))
    folder = out / f"parts-{identity}"
    for other in out.glob("parts-*"):
        if other != folder:
            shutil.rmtree(other)
    if not folder.is_dir():
        shutil.rmtree(out / PICTURES, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    (out / PICTURES).mkdir(exist_ok=True)
    return folder


def _answer_part(
    model: Exported, config: PredictConfig, root: Path, names: list[str], out: Path, start: int
) -> list[Answer]:
    """Answers of some images in their order, their pictures written; an unreadable one has an error."""
    read = [read_pixels(root / name, model.model.image_size) for name in names]
    good = [i for i, (pixels, _) in enumerate(read) if pixels is not None]
    answers = [Answer(name, error=error) for name, (_, error) in zip(names, read, strict=True)]
    if good:
        pixels = np.stack([p for p, _ in read if p is not None])
        found = answer_batch(model, [names[i] for i in good], pixels, config.num_notes, config.attention)
        for i, (answer, pictures) in zip(good, found, strict=True):
            answers[i] = answer
            _save(pictures, out / PICTURES, start + i)
    return answers


def _save(pictures: Pictures, folder: Path, number: int) -> None:
    named = {"image": pictures.thumbnail, "map": pictures.whole}
    named |= {f"word{i}": picture for i, picture in enumerate(pictures.by_word)}
    for kind, picture in named.items():
        if isinstance(picture, Image.Image):
            encoded = io.BytesIO()
            picture.save(encoded, "JPEG", quality=85)
            (folder / f"{number:06d}-{kind}.jpg").write_bytes(encoded.getvalue())


def table(answers: list[Answer], num_notes: int) -> str:
    """predictions.csv: one row an image, unreadable ones with their error."""
    chances = [f"p_{code}" for code in CLASS_CODES] + [f"p_{m}" for m in MALIGNANCIES]
    notes = [f"note_{i + 1}{part}" for i in range(num_notes) for part in ("", "_score")]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["image", "class", "probability", *chances, *notes, "report", "map_text", "error"])
    for a in answers:
        best = int(np.argmax(a.probabilities)) if a.probabilities else None
        named = ["", ""] if best is None else [CLASS_CODES[best], f"{a.probabilities[best]:.6f}"]
        near = [part for note in a.notes for part in (note["text"], f"{note['score']:.6f}")]
        numbers = [f"{v:.6f}" for v in (*a.probabilities, *a.malignancy)] or [""] * len(chances)
        padded = near + [""] * (2 * num_notes - len(near))
        writer.writerow([a.image, *named, *numbers, *padded, a.report, a.map_text, a.error])
    return out.getvalue()
