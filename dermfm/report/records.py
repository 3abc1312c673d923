"""`dermfm records … --report`: one self-contained page about records.parquet: what is there, missing, and how it
looks."""

from __future__ import annotations

import base64
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from dermfm.records.groups import ACROSS, OTHER_LABEL, WITHIN
from dermfm.records.measure.attributes import JUDGED, MIN_CONFIDENCE
from dermfm.records.measure.columns import COLOURS
from dermfm.records.measure.mask import WORKING_SIDE, find_lesion
from dermfm.records.parts import Row, read_rows
from dermfm.records.preprocess.decode import ImageError, decode
from dermfm.records.preprocess.image import FRAMED, HAIRY, encode
from dermfm.records.preprocess.job import PARTS, SCHEMA
from dermfm.records.source import Losses
from dermfm.records.table import SPLITS
from dermfm.records.vocabulary import CLASS_CODES, CLASSES
from dermfm.report import figures
from dermfm.report.template import render_template
from shards.files import write_text

THUMBNAIL, QUALITY = 112, 82
MAX_PIXELS = 200_000_000
PER_CLASS, NUM_OVERLAYS, NUM_PAIRS, NUM_COPIES = 9, 35, 12, 8
NAMED = 40  # names of one kind of loss that are shown
FIELDS = (
    "label", "malignancy", "subclass", "age", "sex", "site", "lesion_id", "patient_id", "fitzpatrick",
    "skin_tone_value", "licence",
)  # fmt: skip
HISTOGRAMS = (
    ("measured_size", "Size of the lesion", "diameter over the picture's shorter side"),
    ("measured_asymmetry", "Asymmetry", "share that does not fold onto itself"),
    ("measured_border_sharpness", "Border sharpness", "0 fades away, 1 a step"),
    ("measured_border_irregularity", "Border irregularity", "0 disc, towards 1 notched"),
    ("measured_texture", "Texture", "local deviation of L*"),
    ("measured_skin_ita", "Skin tone", "individual typology angle, degrees"),
    ("measured_mask_confidence", "Confidence of the mask", "0 none, 1 certain"),
)
WORDS = (
    ("measured_asymmetry_word", "Asymmetry"), ("measured_border_word", "Border"), ("measured_skin_tone", "Skin tone"),
    ("measured_fitzpatrick", "Fitzpatrick type, estimated"),
)  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """A thumbnail as data URI with what stands below it; `after` is the second picture of a pair."""

    image: str
    lines: tuple[str, ...]
    after: str = ""


def write_records_page(table: pa.Table, losses: Losses, path: Path, out: Path, seed: int = 0) -> Path:
    """Write the page about the table of `path` (records.parquet) to `out`; its path. Needs no network to be read."""
    values = page_values(table, losses, path, np.random.default_rng(seed))
    write_text(out, render_template("records.html", values))
    return out


def page_values(table: pa.Table, losses: Losses, path: Path, rng: np.random.Generator) -> dict[str, Any]:
    """Everything that the template shows."""
    shown = {"dataset", "source_id", "image", "modality", "split", "group_id", *FIELDS, "measured_colours"}
    shown |= {name for name, *_ in (*HISTOGRAMS, *WORDS)}
    rows = table.select([name for name in table.column_names if name in shown]).to_pylist()
    duplicates = {WITHIN, ACROSS, OTHER_LABEL}
    kinds = [(kind, losses.count(kind), losses.most_common(kind, NAMED)) for kind in losses.kinds]
    is_measured = "measured_size" in table.column_names
    return {
        "title": path.name,
        "num_records": len(rows),
        "num_groups": len({row["group_id"] for row in rows}),
        "num_datasets": len({row["dataset"] for row in rows}),
        "codes": CLASS_CODES,
        "classes": list(zip(CLASS_CODES, CLASSES, strict=True)),
        "counts": count_lines(rows),
        "totals": totals(rows),
        "fields": FIELDS,
        "missing": missing_lines(rows),
        "duplicates": [one for one in kinds if one[0] in duplicates],
        "unmapped": [one for one in kinds if "without a class" in one[0]],
        "kinds": [one for one in kinds if one[0] not in duplicates and "without a class" not in one[0]],
        "copies": copy_pairs(rows, losses, path.parent),
        "montage": class_montage(rows, path.parent, rng),
        "histograms": histograms(rows) if is_measured else [],
        "words": word_tables(rows) if is_measured else [],
        "min_confidence": MIN_CONFIDENCE,
        "judged": JUDGED,
        "failed": failed_masks(rows) if is_measured else [],
        "overlays": overlays(rows, path.parent, rng),
        "pairs": before_after(rows, path.parent, rng),
    }


def count_lines(rows: list[Row]) -> list[dict[str, Any]]:
    """A line for each data set, split and modality: images, groups, and images of each class and of none."""
    lines: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in rows:
        key = (row["dataset"], row["split"], row["modality"])
        line = lines.setdefault(key, {"groups": set(), "counts": [0] * (len(CLASS_CODES) + 1)})
        line["groups"].add(row["group_id"])
        line["counts"][len(CLASS_CODES) if row["label"] is None else row["label"]] += 1
    ordered = sorted(lines, key=lambda key: (key[0], SPLITS.index(key[1]), key[2]))
    out, last = [], None
    for key in ordered:
        counts = lines[key]["counts"]
        out.append(
            {
                "name": key, "images": sum(counts), "groups": len(lines[key]["groups"]), "counts": counts,
                "first": key[0] != last,
            }
        )  # fmt: skip
        last = key[0]
    return out


def totals(rows: list[Row]) -> list[tuple[str, int, int, list[int]]]:
    """(split or "all", images, groups, images of each class and of none) of all data sets together."""
    out = []
    for split in [*SPLITS, "all"]:
        own = [row for row in rows if split in (row["split"], "all")]
        classes = Counter(row["label"] for row in own)
        counts = [classes[label] for label in [*range(len(CLASS_CODES)), None]]
        out.append((split, len(own), len({row["group_id"] for row in own}), counts))
    return out


def missing_lines(rows: list[Row]) -> list[tuple[str, int, list[float]]]:
    """(data set, images, share of records in which each of FIELDS is unknown)."""
    by_dataset: dict[str, list[Row]] = {}
    for row in rows:
        by_dataset.setdefault(row["dataset"], []).append(row)
    return [
        (name, len(own), [sum(row[field] in (None, "") for row in own) / len(own) for field in FIELDS])
        for name, own in sorted(by_dataset.items())
    ]


def copy_pairs(rows: list[Row], losses: Losses, folder: Path) -> list[Picture]:
    """Pictures of some of the duplicates that were found, those with different labels and across data sets first."""
    place = {f"{row['dataset']}/{row['source_id']}": row for row in rows}
    names = [name for kind in (OTHER_LABEL, ACROSS, WITHIN) for name in losses.kinds.get(kind, Counter())]
    shown: dict[tuple[str, str], Picture] = {}
    for name in names:
        one, _, two = re.sub(r": [A-Z]+ and [A-Z]+$", "", name).partition(" = ")
        if one in place and two in place and (one, two) not in shown and len(shown) < NUM_COPIES:
            first, second = (thumbnail(folder / place[each]["image"]) for each in (one, two))
            if first and second:
                labels = " / ".join(class_code(place[each]["label"]) for each in (one, two))
                shown[one, two] = Picture(first, (one, two, labels), second)
    return list(shown.values())


def class_montage(rows: list[Row], folder: Path, rng: np.random.Generator) -> list[tuple[str, int, list[Picture]]]:
    """(class, images, some of them): drawn at random from the data sets in turn, one of each at least."""
    count = max(PER_CLASS, len({row["dataset"] for row in rows}))
    out = []
    for label, (code, name) in enumerate(zip(CLASS_CODES, CLASSES, strict=True)):
        own = [row for row in rows if row["label"] == label]
        pictures = _pictures(in_turn(own, rng), folder, count, lambda row: (row["dataset"], row["split"]))
        if pictures:
            out.append((f"{code} · {name}", len(own), pictures))
    return out


def in_turn(rows: list[Row], rng: np.random.Generator) -> Iterator[Row]:
    """The rows in random order, the data sets in turn."""
    by_dataset: dict[str, list[Row]] = {}
    for i in rng.permutation(len(rows)):
        by_dataset.setdefault(rows[i]["dataset"], []).append(rows[i])
    lists = [by_dataset[name] for name in sorted(by_dataset)]
    return (row for together in itertools.zip_longest(*lists) for row in together if row is not None)


def histograms(rows: list[Row]) -> list[tuple[str, str]]:
    """(title, SVG) of every measured value, one series a modality, and of the colours named."""
    out = []
    modalities = sorted({row["modality"] for row in rows})
    for name, title, unit in HISTOGRAMS:
        series = {m: [r[name] for r in rows if r["modality"] == m and r[name] is not None] for m in modalities}
        if any(series.values()):
            out.append((title, figures.histogram_figure(title, unit, series)))
    shares = {}
    for modality in modalities:
        own = [r["measured_colours"] for r in rows if r["modality"] == modality and r["measured_colours"] is not None]
        if own:
            shares[modality] = [sum(colour in one for one in own) / len(own) for colour in COLOURS]
    if shares:
        out.append(("Colours named", figures.bar_figure("Colours named", COLOURS, shares)))
    return out


def word_tables(rows: list[Row]) -> list[tuple[str, list[tuple[str, int]]]]:
    """(attribute, [(word, images)])."""
    out = []
    for name, title in WORDS:
        counts = Counter(row[name] for row in rows if row[name] is not None)
        out.append((title, [(str(word), n) for word, n in sorted(counts.items(), key=lambda item: str(item[0]))]))
    return out


def failed_masks(rows: list[Row]) -> list[tuple[str, int, int]]:
    """(data set, images, images in which no lesion was found with enough confidence)."""
    failed = Counter(r["dataset"] for r in rows if (r["measured_mask_confidence"] or 0) < MIN_CONFIDENCE)
    return [(name, n, failed[name]) for name, n in sorted(Counter(r["dataset"] for r in rows).items())]


def overlays(rows: list[Row], folder: Path, rng: np.random.Generator) -> list[Picture]:
    """The outline that the mask gives, on pictures drawn from the data sets in turn."""
    shown = []
    for row in itertools.islice(in_turn(rows, rng), NUM_OVERLAYS):
        pixels = read_pixels(folder / row["image"], WORKING_SIDE)
        if pixels is None:
            continue
        found = find_lesion(pixels)
        reduced = small(found.pixels, 2 * THUMBNAIL)
        mask = cv2.resize(found.mask.astype(np.uint8), reduced.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        drawn = cv2.drawContours(reduced.copy(), outlines, -1, (255, 255, 255), 3)
        drawn = cv2.drawContours(drawn, outlines, -1, (0, 90, 200), 1)
        told = f"{found.confidence:.2f}" + ("" if found.confidence >= MIN_CONFIDENCE else ", not used")
        shown.append(Picture(data_uri(drawn), (row["dataset"], f"confidence {told}")))
    return shown


def before_after(rows: list[Row], folder: Path, rng: np.random.Generator) -> list[Picture]:
    """Original and result of some preprocessed images, those with frames or hair first."""
    made = {row["target"]: row for row in read_rows(folder / "records" / PARTS, SCHEMA.names).values() if row["kinds"]}
    done = [made[p] for row in rows if (p := str((folder / row["image"]).resolve())) in made]
    order = [done[i] for i in rng.permutation(len(done))]
    order.sort(key=lambda row: -len({FRAMED, HAIRY} & set(row["kinds"])))
    shown: list[Picture] = []
    for row in order:
        before, after = thumbnail(Path(row["source"])), thumbnail(Path(row["target"]))
        if before and after:
            shown.append(Picture(before, (Path(row["source"]).name, "; ".join(row["kinds"])), after))
        if len(shown) == NUM_PAIRS:
            break
    return shown


def class_code(label: int | None) -> str:
    """Short name of a class."""
    return "no class" if label is None else CLASS_CODES[label]


def thumbnail(path: Path) -> str:
    """A small copy as data URI; "" where the file cannot be read."""
    pixels = read_pixels(path, THUMBNAIL)
    return "" if pixels is None else data_uri(small(pixels, 2 * THUMBNAIL))


def read_pixels(path: Path, at_least: int) -> np.ndarray | None:
    """RGB pixels of an image file, reduced while decoding where it allows that; None where it cannot be read."""
    try:
        return decode(path.read_bytes(), MAX_PIXELS, at_least).pixels
    except (ImageError, OSError):
        return None


def small(pixels: np.ndarray, side: int) -> np.ndarray:
    """The picture with its longer side at most `side`."""
    scale = min(1.0, side / max(pixels.shape[:2]))
    size = [max(1, round(n * scale)) for n in pixels.shape[1::-1]]
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)


def data_uri(pixels: np.ndarray) -> str:
    """RGB pixels as a JPEG data URI."""
    return "data:image/jpeg;base64," + base64.b64encode(encode(np.ascontiguousarray(pixels), QUALITY)).decode()


def _pictures(rows: Iterable[Row], folder: Path, count: int, lines: Any) -> list[Picture]:
    shown: list[Picture] = []
    for row in rows:
        image = thumbnail(folder / row["image"])
        if image:
            shown.append(Picture(image, lines(row)))
        if len(shown) == count:
            break
    return shown
