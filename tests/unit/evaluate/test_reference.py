"""The protocol `reference`: its pool and formulas, and the levels that the reference study's own label tables give."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file
from sklearn import metrics as sk

from dermfm.evaluate.classify import classification
from dermfm.evaluate.job import EvaluateConfig, evaluate
from dermfm.evaluate.ranks import Ranks
from dermfm.evaluate.scoring import RetrievalRules, Side, retrieval_rows, retrieve
from dermfm.evaluate.shift import ProtocolConfig, Scope
from dermfm.evaluate.statistics import draw_groups

INTERNAL = ("BCN20000", "derm12345", "Derm7pt", "DermNet", "FLUO_SC", "MRA_MIDAS")


def reference(run: SimpleNamespace, **quirks: bool) -> tuple[dict[str, Any], Path]:
    """metrics.json and the folder of an evaluation under the reference protocol."""
    asked = ["classify-image", "zero-shot", "retrieval-i2t", "retrieval-i2i"]
    protocol = ProtocolConfig(name="reference", **quirks)
    config = EvaluateConfig(run=str(run.run), protocol=protocol, tasks=asked, resamples=20, text_information=False)
    path = evaluate(config)
    return json.loads(path.read_text()), path.parent


def naive(folder: Path, task: str, *, every: bool, itself: bool, once: bool) -> tuple[float, float, int]:
    """(mean AP, P@5, pool) as the study computes them: the whole similarity, ordered, one query after the other."""
    ids, vectors = pq.read_table(folder / "ids.parquet").to_pylist(), load_file(folder / "embeddings.safetensors")
    images = [i for i in ids if i["kind"] == "image"]
    pool = images if task == "retrieval-i2i" else [i for i in ids if i["strategy"] == "template"]
    space = vectors["image" if task == "retrieval-i2i" else "text"]
    pool = [i for i in pool if i["label"] is not None and (every or i["split"] == "test")]
    if once:
        first = np.sort(np.unique(space[[i["row"] for i in pool]], axis=0, return_index=True)[1])
        pool = [pool[k] for k in first]
    found, hits = [], []
    for query in (i for i in images if i["split"] == "test" and i["label"] is not None):
        allowed = [i for i in pool if itself or i["group_id"] != query["group_id"]]
        scores = np.round(space[[i["row"] for i in allowed]] @ vectors["image"][query["row"]], 7)
        truth = np.array([i["label"] == query["label"] for i in allowed])
        if truth.any():
            found.append(sk.average_precision_score(truth, scores))
            hits.append(truth[np.argsort(-scores, kind="stable")[:5]].mean())
    return float(np.mean(found)), float(np.mean(hits)), len(pool)


@pytest.mark.parametrize("quirks", [{}, {"all_splits_in_pool": False}, {"self_in_pool": False}])
def test_retrieval_is_that_of_a_loop_over_the_ordered_pool(tiny_run: SimpleNamespace, quirks: dict[str, bool]) -> None:
    content, folder = reference(tiny_run, **quirks)
    rules = {"every": quirks.get("all_splits_in_pool", True), "itself": quirks.get("self_in_pool", True), "once": True}
    for task in ("retrieval-i2i", "retrieval-i2t"):
        ap, precision, pool = naive(folder, task, **rules)
        strategy = "template" if task == "retrieval-i2t" else None
        rows = {
            r["metric"]: r
            for r in content["results"]
            if (r["task"], r["scope"], r["eval_strategy"]) == (task, "all", strategy)
        }
        assert rows["map_micro"]["value"] == pytest.approx(ap, abs=1e-6)
        assert rows["p@5"]["value"] == pytest.approx(precision, abs=1e-6)
        assert rows["p@5"]["pool"] == pool
        assert ("r@1" in rows) == (not rules["itself"])  # with the query in its pool there is no own item to look for


def test_training_images_are_in_the_pool_but_are_not_scored(tiny_run: SimpleNamespace) -> None:
    content, folder = reference(tiny_run)
    about = content["protocol"]
    assert (about["splits"], about["scored_splits"]) == (["test", "train", "valid"], ["test"])
    assert (about["num_embedded"], about["num_records"]) == (135, 80)
    predicted = {p["record_id"] for p in pq.read_table(folder / "predictions.parquet").to_pylist()}
    assert predicted == {r["record_id"] for r in tiny_run.records if r["split"] == "test"}
    assert {r["eval_strategy"] for r in content["results"] if r["task"] == "zero-shot"} == {"bare"}
    assert max(r["n"] for r in content["results"]) <= 80


@pytest.fixture(scope="module")
def labels(shared_data: Path) -> dict[str, dict[str, np.ndarray]]:
    """Side → labels of its test images (`queries`) and of all images (`pool`), by the study's own tables."""
    sides: dict[str, dict[str, list[int]]] = {s: {"queries": [], "pool": []} for s in ("internal", "external")}
    for folder in sorted(p for p in (shared_data / "reference_csv").iterdir() if p.is_dir()):
        side = sides["internal" if folder.name in INTERNAL else "external"]
        for name, file in (("queries", "labels_test.csv"), ("pool", "labels.csv")):
            with open(folder / file, newline="") as lines:
                side[name] += [int(row[-1]) for row in csv.reader(lines) if row]
    return {s: {name: np.array(values) for name, values in side.items()} for s, side in sides.items()}


def test_chance_of_retrieval_is_that_of_the_studys_labels(labels: dict[str, dict[str, np.ndarray]]) -> None:
    """Every image embedded alike: P@K over random order within the one tie is the level of chance."""
    pool = np.concatenate([labels[s]["pool"] for s in labels])
    some = {s: np.sort(labels[s]["queries"])[::4] for s in labels}  # a quarter of each class
    queries = np.concatenate(list(some.values()))
    count = len(queries)
    everything = np.concatenate([queries, pool])
    vectors = np.ones((len(everything), 4), np.float32) / 2
    groups = np.arange(len(everything))
    rows = np.arange(len(everything))
    rules = RetrievalRules(self_in_pool=True)
    sides = Side(vectors[:count], rows[:count]), Side(vectors[count:], rows[count:])
    found = retrieve("retrieval-i2i", *sides, everything, groups, Ranks(), rules=rules)
    inside = np.arange(len(everything)) < len(some["internal"])
    masks = {"internal": inside, "external": ~inside & (rows < count)}
    draws = draw_groups(groups[:1], groups[:1], 20, 0)
    draws = type(draws)(draws.weights, np.zeros(len(everything), int))
    assert len(pool) == 62_693
    for name, expected in (("internal", 0.281), ("external", 0.255)):
        made = {r["metric"]: r for r in retrieval_rows(found, [Scope("partition", name, masks[name])], draws)}
        for metric in ("p@1", "p@10", "p@100"):
            assert made[metric]["value"] == pytest.approx(expected, abs=1e-3)
            assert made[metric]["chance"] == pytest.approx(expected, abs=1e-3)
        assert made["map_micro"]["value"] == pytest.approx(expected, abs=2e-3)


def test_always_nevus_scores_what_the_studys_labels_give(labels: dict[str, dict[str, np.ndarray]]) -> None:
    for name, weighted, accuracy in (("internal", 0.329, 0.496), ("external", 0.223, 0.394)):
        truth = labels[name]["queries"]
        rows = np.arange(len(truth))
        draws = draw_groups(rows[:1], rows[:1], 20, 0)
        draws = type(draws)(draws.weights, np.zeros(len(truth), int))
        found = classification(truth, np.eye(8)[np.full(len(truth), 2)], rows, draws)
        assert found["f1_weighted"].value == pytest.approx(weighted, abs=5e-4)
        assert found["f1_weighted"].chance == pytest.approx(weighted, abs=5e-4)
        assert found["accuracy"].value == pytest.approx(accuracy, abs=5e-4)
