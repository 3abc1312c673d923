"""One image's answer: calibrated classes, malignancy, nearest notes, a report, and an attention map."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from dermfm.export.model import Exported
from dermfm.images import decode_image
from dermfm.model.maps import parts_with_maps, word_maps
from dermfm.records.vocabulary import MALIGNANCIES, MALIGNANCY_OF
from dermfm.report.attention import SIZE, blend, telling_words


@dataclass
class Answer:
    """What is said of one image. `map_text` is the text whose words the map is of; `error` why there is no answer."""

    image: str
    probabilities: list[float] = field(default_factory=list)
    malignancy: list[float] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)
    report: str = ""
    map_text: str = ""
    words: list[str] = field(default_factory=list)
    error: str = ""


@dataclass
class Pictures:
    """The shown image and its maps: one over all words, one a word. None where the model has none."""

    thumbnail: Image.Image
    whole: Image.Image | None = None
    by_word: list[Image.Image] = field(default_factory=list)


def read_pixels(path: Path, size: int) -> tuple[np.ndarray | None, str]:
    """(uint8 [3, S, S], "") of an image file, or (None, why it cannot be read)."""
    try:
        return np.ascontiguousarray(decode_image(path.read_bytes(), size)), ""
    except UnidentifiedImageError:
        return None, "is not an image"
    except (OSError, ValueError, RuntimeError) as error:
        return None, " ".join(str(error).split()) or type(error).__name__


def answer_batch(
    model: Exported, names: list[str], pixels: np.ndarray, num_notes: int, with_map: bool
) -> list[tuple[Answer, Pictures]]:
    """Answers and pictures of readable images: uint8 pixels [B, 3, S, S]."""
    tensor = torch.from_numpy(pixels)
    probabilities = model.classify(tensor).numpy()
    notes = model.nearest_notes(model.encode_image(tensor), num_notes)
    reports = model.write_report(tensor) if model.writes_reports else [""] * len(names)
    sums = np.array([[MALIGNANCY_OF[c] == m for m in MALIGNANCIES] for c in range(len(MALIGNANCY_OF))], dtype=float)
    out = []
    for i, name in enumerate(names):
        malignancy = probabilities[i] @ sums
        answer = Answer(name, probabilities[i].tolist(), malignancy.tolist(), notes[i], reports[i])
        pictures = Pictures(_picture(pixels[i]))
        if with_map and parts_with_maps(model.model):
            _add_maps(model, answer, pictures, pixels[i])
        out.append((answer, pictures))
    return out


def _add_maps(model: Exported, answer: Answer, pictures: Pictures, pixels: np.ndarray) -> None:
    """Where the words of the report look, or of the nearest note, or of the name of the likeliest class."""
    name = model.classes[int(np.argmax(answer.probabilities))]
    answer.map_text = answer.report or (answer.notes[0]["text"] if answer.notes else f"a photo of {name}")
    telling = telling_words(answer.map_text)
    named = telling or [(found.group(), found.span()) for found in re.finditer(r"\w+", answer.map_text)]
    grids = word_maps(model.model, pixels, answer.map_text, [place for _, place in named])
    shown = [(word, grid) for (word, _), grid in zip(named, grids, strict=True) if grid is not None]
    for word, grid in shown if telling else []:
        answer.words.append(word)
        pictures.by_word.append(blend(pictures.thumbnail, grid))
    if shown:
        pictures.whole = blend(pictures.thumbnail, np.mean([grid for _, grid in shown], axis=0))
    else:
        answer.map_text = ""


def _picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.transpose(1, 2, 0)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
