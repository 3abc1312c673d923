"""The embedded atlas, part 4: draw both domains below `records/`, with their truth beside records.parquet.

    records/images/<dataset>/<id>.jpg     photographs
    records/truth/<dataset>/<id>.png      colour regions: 0 skin, else 1 + index of atlas_lesion.COLOURS
    atlas_truth.parquet                   one row a photograph, everything that is known about it

Only what is missing is drawn, unless another configuration drew what is there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dermfm.config import short_hash, to_dict
from dermfm.progress import track
from dermfm.records.atlas_draw import Layers, View, lesion_layers, photograph
from dermfm.records.atlas_lesion import CLINIC, COLOURS, DERMO, DIAGNOSES, DOMAINS, STRUCTURES, Lesion, draw_lesion
from dermfm.records.source import AtlasConfig
from dermfm.records.table import Record
from dermfm.records.vocabulary import CLASS_CODES, CLASS_OF_SUBCLASS, CLASSES, MALIGNANCY_OF
from shards.files import replacing

VERSION = 1  # raise it when the drawing changes: older pictures are drawn again
ASYMMETRIC = 0.13  # shape_asymmetry from which a lesion is called asymmetric
SHARP, INDISTINCT, MIXED = 0.6, 0.4, 0.45
ITA_SCALE = "ITA degrees"
TRUTH_FILE = "atlas_truth.parquet"
CHUNK = 24  # lesions drawn by one call of a worker


def draw_atlas(config: AtlasConfig, folder: Path, workers: int, dry_run: bool) -> list[Record]:
    """Records of both domains; their pictures and truth are drawn below `folder` unless it is a dry run."""
    lesions = [
        *_lesions(config, DERMO.dataset, config.num_dermo),
        *_lesions(config, CLINIC.dataset, config.num_clinic),
    ]
    if dry_run:
        return [_record(lesion, n, folder, None) for lesion in lesions for n in range(lesion.num_images)]
    truth = _draw_all(lesions, config, folder / "records", workers)
    folder.mkdir(parents=True, exist_ok=True)
    _write_truth(truth, folder / TRUTH_FILE)
    by_id = {(row["dataset"], row["source_id"]): row for row in truth}
    return [
        _record(lesion, n, folder, by_id[lesion.domain, source_id(lesion, n)])
        for lesion in lesions
        for n in range(lesion.num_images)
    ]


def source_id(lesion: Lesion, number: int) -> str:
    """Id of a lesion's image."""
    return f"{lesion.lesion_id}_{number + 1}"


def _lesions(config: AtlasConfig, dataset: str, num_images: int) -> list[Lesion]:
    """Lesions of a domain with exactly `num_images` images together."""
    lesions: list[Lesion] = []
    left = num_images
    while left > 0:
        lesion = draw_lesion(config.seed, DOMAINS[dataset], len(lesions), config.second_image, config.confusion)
        lesions.append(replace(lesion, num_images=min(lesion.num_images, left)))
        left -= lesions[-1].num_images
    return lesions


def _draw_all(lesions: list[Lesion], config: AtlasConfig, folder: Path, workers: int) -> list[dict[str, Any]]:
    """Truth rows of all lesions in order; lesions are drawn in chunks, each finished by its truth file."""
    chunks = [lesions[i : i + CHUNK] for i in range(0, len(lesions), CHUNK)]
    draw = partial(_draw_chunk, config=config, folder=folder)
    rows: list[dict[str, Any]] = []
    for part in track(_map(draw, chunks, workers), len(chunks), "drawing the atlas", "parts"):
        rows.extend(part)
    return rows


def _map(draw: Any, chunks: list[list[Lesion]], workers: int) -> Iterator[list[dict[str, Any]]]:
    workers = min(workers or os.cpu_count() or 1, len(chunks))
    if workers <= 1:
        yield from map(draw, chunks)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(draw, chunks)


def _draw_chunk(lesions: list[Lesion], *, config: AtlasConfig, folder: Path) -> list[dict[str, Any]]:
    """Draw the lesions' pictures, unless this very chunk was drawn before; return the truth rows."""
    identity = short_hash([VERSION, to_dict(config), lesions[0].domain, len(lesions), lesions[0].number])
    done = folder / "truth" / "parts" / f"{identity}.parquet"
    if done.is_file():
        rows = pq.read_table(done).to_pylist()
        if all(_image_path(folder, row["dataset"], row["source_id"]).is_file() for row in rows):
            return rows
    rows = []
    for lesion in lesions:
        layers = lesion_layers(lesion)
        for n in range(lesion.num_images):
            view = photograph(lesion, layers, n, config.size, config.quality)
            _save(view, folder, lesion.domain, source_id(lesion, n))
            rows.append(_truth_row(lesion, layers, view, n))
    done.parent.mkdir(parents=True, exist_ok=True)
    _write_truth(rows, done)
    return rows


def _save(view: View, folder: Path, dataset: str, name: str) -> None:
    image, mask = _image_path(folder, dataset, name), folder / "truth" / dataset / f"{name}.png"
    for path in (image, mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(mask, flush=False) as temporary:
        Image.fromarray(view.regions).save(temporary, "PNG")
    with replacing(image, flush=False) as temporary:
        temporary.write_bytes(view.jpeg)


def _image_path(folder: Path, dataset: str, name: str) -> Path:
    return folder / "images" / dataset / f"{name}.jpg"


def _write_truth(rows: list[dict[str, Any]], path: Path) -> None:
    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows), temporary, compression="zstd")


def _truth_row(lesion: Lesion, layers: Layers, view: View, number: int) -> dict[str, Any]:
    """Everything known about one photograph. Shares are of the lesion's area, sizes of the image's side."""
    inside = view.regions > 0
    rows, columns = np.nonzero(inside)
    side = view.regions.shape[0]
    shown = np.bincount(view.regions.ravel(), minlength=len(COLOURS) + 1)[1:] / max(int(inside.sum()), 1)
    return {
        "dataset": lesion.domain,
        "source_id": source_id(lesion, number),
        "record_id": short_hash([lesion.domain, source_id(lesion, number)]),
        "lesion_id": lesion.lesion_id,
        "label": lesion.label,
        "looks_like": lesion.looks_like,
        "asymmetry": layers.asymmetry,
        "asymmetry_word": asymmetry_word(layers.asymmetry),
        "border_sharpness": lesion.sharpness,
        "border_varies": lesion.sharpness_varies,
        "border_irregularity": lesion.irregularity,
        "border_word": border_word(lesion),
        "colours": named_colours(layers),
        **{
            f"share_{name.replace(' ', '_').replace('-', '_')}": float(s)
            for name, s in zip(COLOURS, shown, strict=True)
        },
        "structures": list(lesion.structures),
        "diameter_mm": lesion.diameter_mm,
        "field_mm": view.field_mm,
        "size": lesion.diameter_mm / view.field_mm,
        "area": float(inside.mean()),
        "centre_x": float(columns.mean() / side) if len(columns) else 0.5,
        "centre_y": float(rows.mean() / side) if len(rows) else 0.5,
        "num_hairs": view.num_hairs,
        "hair_share": view.hair_share,
        "skin_ita": lesion.ita,
    }


def asymmetry_word(asymmetry: float) -> str:
    """symmetric | asymmetric, from `shape_asymmetry`."""
    return "asymmetric" if asymmetry >= ASYMMETRIC else "symmetric"


def border_word(lesion: Lesion) -> str:
    """sharp | indistinct | mixed: mixed where the sharpness varies along the border or lies between."""
    if lesion.sharpness_varies >= MIXED or INDISTINCT < lesion.sharpness < SHARP:
        return "mixed"
    return "sharp" if lesion.sharpness >= SHARP else "indistinct"


def named_colours(layers: Layers) -> list[str]:
    """Colours with at least 5 % of the lesion, in the order of COLOURS."""
    return [name for name, share in zip(COLOURS, layers.shares, strict=True) if share >= 0.05]


def findings(truth: dict[str, Any]) -> str:
    """The truth as one reads it: 'asymmetric, indistinct border; dark brown, black; pigment network, dots'."""
    structures = [name for name in STRUCTURES if name in truth["structures"]]
    border = f"{truth['asymmetry_word']}, {truth['border_word']} border"
    return f"{border}; {', '.join(truth['colours'])}; {', '.join(structures)}"


def _record(lesion: Lesion, number: int, folder: Path, truth: dict[str, Any] | None) -> Record:
    domain = DOMAINS[lesion.domain]
    text, subclass = DIAGNOSES[lesion.label]
    class_label = CLASS_OF_SUBCLASS[subclass]
    assert class_label == lesion.label, CLASS_CODES[lesion.label]
    return Record(
        dataset=lesion.domain,
        source_id=source_id(lesion, number),
        path=_image_path(folder / "records", lesion.domain, source_id(lesion, number)),
        modality=domain.modality,
        label=lesion.label,
        class_label=class_label,
        malignancy=MALIGNANCY_OF[lesion.label],
        class_text=text,
        subclass_text=text,
        findings=findings(truth) if truth else None,
        matched_class=CLASSES[lesion.label],
        matched_subclass=subclass,
        lesion_id=lesion.lesion_id,
        age=float(lesion.age),
        sex=lesion.sex,
        site=lesion.site,
        skin_tone_scale=ITA_SCALE,
        skin_tone_value=round(lesion.ita, 1),
        licence=domain.licence,
    )
