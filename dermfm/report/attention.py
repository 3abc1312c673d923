"""Where a word of the note looks in the image: attention of the decoder or the fusion, from the checkpoint itself."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
from matplotlib import colormaps
from PIL import Image

from dermfm.evaluate.records import TextSet
from dermfm.images import decode_image
from dermfm.model.maps import parts_with_maps, word_maps
from dermfm.report.gallery import choose_rows, class_name, shorten
from dermfm.report.run import Evaluation, Images, data_uri
from dermfm.samples import image_bytes

WORDS = [  # terms of two words before those of one: a decoder chooses 'dark brown' at its first
    "asymmetric",
    "asymmetry",
    "symmetric",
    "symmetry",
    "border",
    "sharp",
    "indistinct",
    "irregular",
    "ill-defined",
    "light brown",
    "dark brown",
    "blue-gray",
    "blue-grey",
    "white",
    "red",
    "brown",
    "black",
    "blue",
    "gray",
    "grey",
    "pink",
    "pigment network",
    "network",
    "pigment",
    "branched streaks",
    "streaks",
    "dots",
    "globules",
    "structureless",
    "scale",
    "crust",
    "ulcer",
    "ulcerated",
    "plaque",
    "nodule",
    "papule",
    "macule",
    "keratosis",
    "dermatofibroma",
    "nevus",
    "vascular",
    "melanoma",
    "carcinoma",
    "basal",
    "squamous",
    "actinic",
    "seborrheic",
    "melanocytic",
    "cancer",
    "lesion",
    "malignant",
    "benign",
    "pre-cancerous",
]
NUM_WORDS = 3
SIZE = 160


@dataclasses.dataclass(frozen=True)
class WordMap:
    """One word's attention over the image; `peak` is the largest weight as a multiple of an even spread."""

    word: str
    image: str
    peak: float


@dataclasses.dataclass(frozen=True)
class AttentionMap:
    """An image, its own note, and the maps of some words of the note."""

    label: str
    dataset: str
    text: str
    image: str
    words: list[WordMap]


def attention_maps(
    model: Any, evaluation: Evaluation, which: int, images: Images, count: int, seed: int
) -> list[AttentionMap]:
    """Maps of `count` records with their own notes of text set number `which`; records without a telling word go.

    None are shown where nothing of the model attends to images (fusion `late` or `none`, no decoder).
    """
    if not parts_with_maps(model):
        return []
    texts = evaluation.texts[which]
    records = evaluation.records
    with_words = np.array([i for i, text in enumerate(texts.texts) if telling_words(text)], dtype=np.int64)
    rows = texts.rows[with_words]
    chosen = choose_rows(records.datasets[rows], records.labels[rows], count, seed)
    return [_map_of(model, evaluation, texts, int(with_words[i]), images) for i in chosen]


def telling_words(text: str) -> list[tuple[str, tuple[int, int]]]:
    """(word, its characters) of at most three words of the note, rarer descriptions before class words."""
    found: list[tuple[str, tuple[int, int]]] = []
    lowered = text.casefold()
    for word in WORDS:
        match = re.search(rf"\b{re.escape(word)}\b", lowered)
        at = match.start() if match else -1
        if at >= 0 and not any(start <= at < end for _, (start, end) in found):
            found.append((text[at : at + len(word)], (at, at + len(word))))
    return sorted(found[:NUM_WORDS], key=lambda item: item[1])


def _map_of(model: Any, evaluation: Evaluation, texts: TextSet, place: int, images: Images) -> AttentionMap:
    row, text = int(texts.rows[place]), texts.texts[place]
    sample = images.sample(str(evaluation.records.record_ids[row]))
    pixels = decode_image(image_bytes(sample), model.image_size)
    telling = telling_words(text)
    grids = word_maps(model, pixels, text, [place for _, place in telling])
    picture = Image.fromarray(pixels.transpose(1, 2, 0)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    words = [
        WordMap(word, data_uri(blend(picture, grid), SIZE), float(grid.max() * grid.size))
        for (word, _), grid in zip(telling, grids, strict=True)
        if grid is not None
    ]
    label, dataset = class_name(evaluation.records.labels[row]), str(evaluation.records.datasets[row])
    return AttentionMap(label, dataset, shorten(text), data_uri(picture, SIZE), words)


def blend(picture: Image.Image, grid: np.ndarray) -> Image.Image:
    """Weights [rows, columns] as a colour map over the picture, from their least to their largest."""
    low, high = float(grid.min()), float(grid.max())
    scaled = (grid - low) / (high - low) if high > low else np.zeros_like(grid)
    smooth = Image.fromarray((scaled * 255).astype(np.uint8)).resize(picture.size, Image.Resampling.BICUBIC)
    heat = np.asarray(smooth, dtype=np.float32)[:, :, None] / 255
    colours = colormaps["inferno"](heat[:, :, 0])[:, :, :3] * 255
    grey = np.asarray(picture.convert("L").convert("RGB"), dtype=np.float32)
    mixed = grey * (0.75 - 0.45 * heat) + colours * (0.25 + 0.45 * heat)
    return Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8))
