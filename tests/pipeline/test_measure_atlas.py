"""Measured attributes against the atlas's truth, on a seed that nothing was tuned on."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.stats import spearmanr
from sklearn.metrics import f1_score

from dermfm.records.atlas import TRUTH_FILE, draw_atlas
from dermfm.records.measure.attributes import measure
from dermfm.records.measure.columns import COLOURS
from dermfm.records.source import AtlasConfig

HELD_OUT_SEED = 4242  # the measures were tuned on seeds 1, 2, 3, 11, 57, 101 and 202
NUM_IMAGES = 110  # of each domain


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[dict, dict]]]:
    """(truth, measured) of atlas images of a seed of their own, by domain."""
    cv2.setNumThreads(1)
    folder = tmp_path_factory.mktemp("atlas")
    settings = AtlasConfig(seed=HELD_OUT_SEED, num_dermo=NUM_IMAGES, num_clinic=NUM_IMAGES, second_image=0)
    draw_atlas(settings, folder, 2, dry_run=False)
    pairs: dict[str, list[tuple[dict, dict]]] = {}
    for truth in pq.read_table(folder / TRUTH_FILE).to_pylist():
        path = Path(folder, "records/images", truth["dataset"], f"{truth['source_id']}.jpg")
        pairs.setdefault(truth["dataset"], []).append((truth, measure(np.asarray(Image.open(path)))))
    return pairs


@pytest.mark.parametrize(
    ("domain", "name", "least"),
    [
        ("Atlas_dermo", "asymmetry", 0.8),
        ("Atlas_dermo", "border_sharpness", 0.8),
        ("Atlas_dermo", "size", 0.8),
        ("Atlas_dermo", "skin_ita", 0.7),
        ("Atlas_clinic", "asymmetry", 0.8),
        # At the goal of 0.8, not safely above: on 200 images each of five other seeds asymmetry lay between 0.78 and
        # 0.85 (mean 0.81), sharpness between 0.80 and 0.85 (mean 0.82). The true outline gives asymmetry 0.99: ours
        # misses parts of the skin's own colour. In a small lesion the camera's blur is as wide as the border.
        ("Atlas_clinic", "border_sharpness", 0.8),
        ("Atlas_clinic", "size", 0.8),
        ("Atlas_clinic", "skin_ita", 0.7),
    ],
)
def test_measures_rank_the_held_out_atlas_as_its_truth_does(
    held_out: dict, domain: str, name: str, least: float
) -> None:
    pairs = [(t[name], m[f"measured_{name}"]) for t, m in held_out[domain] if m[f"measured_{name}"] is not None]
    assert len(pairs) > 0.95 * NUM_IMAGES
    assert spearmanr(*zip(*pairs, strict=True)).statistic >= least


@pytest.mark.parametrize("domain", ["Atlas_dermo", "Atlas_clinic"])
def test_colour_names_agree_with_the_held_out_atlas(held_out: dict, domain: str) -> None:
    pairs = [(t["colours"], m["measured_colours"] or []) for t, m in held_out[domain]]
    truth, named = (np.array([[c in words for c in COLOURS] for words in side]) for side in zip(*pairs, strict=True))
    assert f1_score(truth, named, average="micro") >= 0.8
