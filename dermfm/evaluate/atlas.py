"""What a model learnt of the embedded atlas, where truth is known: maps, reports, and notes told apart.

Read from what the job `records` left: records.parquet, atlas_truth.parquet, and below records/ the photographs and
their colour regions. Notes are the truth in words, as the strategy `findings` writes them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from dermfm.config import InputError
from dermfm.evaluate.readout import Example, choose_read_out, score_read_outs
from dermfm.images import decode_image
from dermfm.model.maps import default_read_out
from dermfm.records.atlas import TRUTH_FILE, findings
from dermfm.records.atlas_lesion import COLOURS, STRUCTURES
from dermfm.samples import tokenize

MIN_SHARE = 0.05  # of the lesion's pixels: less of a colour is no region to look at
BATCH = 32
CANDIDATES = 32  # other notes that a note is told from, the most similar one of them
KINDS = ("asymmetry", "border", "colours", "structures")


@dataclass(frozen=True)
class Case:
    """One photograph: pixels uint8 [3, S, S], note, attributes by kind, and the bool [S, S] region of each colour."""

    pixels: np.ndarray
    text: str
    attributes: dict[str, frozenset[str]]
    regions: dict[str, np.ndarray]


def read_cases(folder: Path, split: str, size: int, limit: int = 0) -> list[Case]:
    """The first `limit` (0: all) lesions of a split, one photograph each. InputError where the atlas is not there."""
    if not (folder / TRUTH_FILE).is_file():
        raise InputError(f"{folder}: no {TRUTH_FILE}; `python benchmarks/atlas.py` makes one")
    columns = ["dataset", "source_id", "split", "image"]
    records = pq.read_table(folder / "records.parquet", columns=columns).to_pylist()
    kept = {(r["dataset"], r["source_id"]): r["image"] for r in records if r["split"] == split}
    truth = pq.read_table(folder / TRUTH_FILE).to_pylist()
    by_lesion = {row["lesion_id"]: row for row in reversed(truth) if (row["dataset"], row["source_id"]) in kept}
    rows = [by_lesion[lesion] for lesion in sorted(by_lesion)][: limit or None]
    return [_case(row, folder, kept[row["dataset"], row["source_id"]], size) for row in rows]


def _case(row: dict[str, Any], folder: Path, image: str, size: int) -> Case:
    regions = np.asarray(Image.open(folder / "records" / "truth" / row["dataset"] / f"{row['source_id']}.png"))
    inside = max(int((regions > 0).sum()), 1)
    shown = {name: regions == 1 + COLOURS.index(name) for name in row["colours"]}
    text = f"{findings(row)}."
    return Case(
        decode_image((folder / image).read_bytes(), size),
        text,
        attributes_of(text),
        {name: region for name, region in shown.items() if region.sum() / inside >= MIN_SHARE},
    )


def attributes_of(text: str) -> dict[str, frozenset[str]]:
    """What a note or a report states, by kind."""
    said = text.casefold()

    def named(words: Sequence[str]) -> frozenset[str]:
        return frozenset(w for w in words if re.search(rf"(?<![\w-]){re.escape(w)}(?![\w-])", said))

    borders = re.findall(r"\b(sharp|indistinct|mixed) border", said)
    return {
        "asymmetry": named(["asymmetric", "symmetric"]),
        "border": frozenset(borders),
        "colours": named(COLOURS),
        "structures": named(STRUCTURES),
    }


def examples(cases: Sequence[Case]) -> list[Example]:
    """The cases with at least two coloured regions, for `dermfm.evaluate.readout`."""
    found = []
    for case in cases:
        words = {name: (case.text.index(name), case.text.index(name) + len(name)) for name in case.regions}
        if len(words) > 1:
            found.append(Example(case.pixels, case.text, words, case.regions))
    return found


def colour_maps(model: Any, valid: Sequence[Case], test: Sequence[Case]) -> dict[str, Any]:
    """`read_out` chosen on `valid`, its share of hits there, and on `test` those of pairs and of images.

    `shown`: the same shares on `test` for the read-out that reports and predictions show, which nothing chose.
    """
    chosen, rate = choose_read_out(model, examples(valid))
    scores, shown = score_read_outs(model, examples(test), [chosen, default_read_out(model)])
    return {"read_out": chosen.name, "valid_pairs": rate, **scores, "shown": shown}


def report_scores(model: Any, cases: Sequence[Case]) -> dict[str, float]:
    """F1 of the attributes that greedy reports state, over all of them (`all`) and by kind."""
    said: list[dict[str, frozenset[str]]] = []
    for start in range(0, len(cases), BATCH):
        pixels = torch.from_numpy(np.stack([c.pixels for c in cases[start : start + BATCH]]))
        said += [attributes_of(text) for text in model.write_report(pixels.to(_device(model)))]
    return attribute_f1(said, [c.attributes for c in cases])


def attribute_f1(
    said: Sequence[dict[str, frozenset[str]]], true: Sequence[dict[str, frozenset[str]]]
) -> dict[str, float]:
    """F1 over all stated and drawn attributes (micro), and by kind; 0 where nothing is stated or drawn."""
    counts = {
        kind: np.sum([[len(s[kind] & t[kind]), len(s[kind]), len(t[kind])] for s, t in zip(said, true, strict=True)], 0)
        for kind in KINDS
    }
    counts["all"] = np.sum(list(counts.values()), 0)
    return {kind: float(2 * both / max(stated + drawn, 1)) for kind, (both, stated, drawn) in counts.items()}


@torch.no_grad()
def matching_accuracy(model: Any, cases: Sequence[Case]) -> dict[str, float]:
    """How often the own note's match logit exceeds another's: of a `random` and of a `hard` other note.

    Other notes have another text. The hard one is, of up to CANDIDATES, the one whose embedding is nearest the image.
    """
    device, limit = _device(model), model.config.text.max_tokens
    tokens, lengths = (t.to(device) for t in tokenize(model.tokenizer, [c.text for c in cases], limit))
    texts = np.array([c.text for c in cases])
    rng = np.random.default_rng(0)
    wins: dict[str, list[bool]] = {"random": [], "hard": []}
    embedded, states = model.encode_text(tokens, lengths)
    for i, case in enumerate(cases):
        others = rng.permutation(np.flatnonzero(texts != case.text))[:CANDIDATES]
        if not len(others):
            continue
        image, seen = model.encode_image(torch.from_numpy(case.pixels)[None].to(device))
        hard = others[int((embedded[torch.from_numpy(others).to(device)] @ image[0]).argmax())]
        rows = torch.tensor([i, int(others[0]), int(hard)], device=device)
        own, *rest = model.match(seen.expand(3, -1, -1), states[rows], lengths[rows]).tolist()
        for kind, other in zip(wins, rest, strict=True):
            wins[kind].append(own > other)
    return {kind: float(np.mean(won)) for kind, won in wins.items()}


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device
