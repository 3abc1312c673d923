"""The whole job on a small synthetic run; its numbers are computed again from what it saved."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file
from sklearn import metrics as sk

from dermfm.config import InputError
from dermfm.evaluate import embed, job
from dermfm.evaluate.job import EvaluateConfig, evaluate
from dermfm.evaluate.results import ROW_KEYS
from dermfm.evaluate.shift import ProtocolConfig
from dermfm.model.dermfm import DermFM, ModelConfig
from launch.cli import main
from shards.manifest import ShardError

READING_NOTES = ("retrieval-i2t", "retrieval-t2i", "retrieval-t2t", "classify-text", "classify-fused")
ONE_PASS = [task for task in job.TASKS if task not in ("classify-fused", "few-shot")]


def settings(run: SimpleNamespace, **changes: Any) -> EvaluateConfig:
    return EvaluateConfig(**({"run": str(run.run), "resamples": 40, "batch_size": 16, "device": "cpu"} | changes))


class Rows(list):
    """Rows of a table as dicts, with the columns as arrays."""

    def where(self, **wanted: Any) -> Rows:
        """The rows with these values."""
        return Rows(r for r in self if all(r[k] == v for k, v in wanted.items()))

    def __getattr__(self, name: str) -> np.ndarray:
        return np.array([r[name] for r in self])


@pytest.fixture(scope="module")
def saved(
    tmp_path_factory: pytest.TempPathFactory,
    model: DermFM,
    model_config: ModelConfig,
    make_run: Callable[..., SimpleNamespace],
) -> SimpleNamespace:
    """Everything that an evaluation of the tiny run leaves."""
    with pytest.MonkeyPatch.context() as patch:
        run = make_run(tmp_path_factory.mktemp("saved"), model, model_config, patch)
        path = evaluate(settings(run))
    content = json.loads(path.read_text())
    ids = Rows(pq.read_table(path.parent / "ids.parquet").to_pylist())
    predictions = Rows(pq.read_table(path.parent / "predictions.parquet").to_pylist())
    vectors = load_file(path.parent / "embeddings.safetensors")
    return SimpleNamespace(run=run, path=path, content=content, ids=ids, predictions=predictions, vectors=vectors)


def test_what_is_saved_can_be_read_by_colleagues(saved: SimpleNamespace) -> None:
    names = ("metrics.json", "embeddings.safetensors", "ids.parquet", "predictions.parquet")
    assert {(saved.path.parent / name).stat().st_mode & 0o044 for name in names} == {0o044}


def value(saved: SimpleNamespace, **wanted: Any) -> float:
    rows = [r for r in saved.content["results"] if all(r[k] == v for k, v in wanted.items())]
    assert len(rows) == 1, (wanted, len(rows))
    return rows[0]["value"]


def images(saved: SimpleNamespace) -> Rows:
    return saved.ids.where(kind="image")


def test_the_files_are_as_documented(saved: SimpleNamespace) -> None:
    assert saved.path == saved.run.run / "eval" / "00000012" / "metrics.json"
    assert set(saved.content) == {"run", "step", "manifest", "protocol", "results"}
    assert all(tuple(row) == ROW_KEYS for row in saved.content["results"])
    assert {r["seed"] for r in saved.content["results"]} == {3}
    for name, kind in (("image", "image"), ("text", "text"), ("prompt", "prompt")):
        own = saved.ids.where(kind=kind)
        assert saved.vectors[name].dtype == np.float32
        assert list(own.row) == list(range(len(saved.vectors[name])))
        np.testing.assert_allclose(np.linalg.norm(saved.vectors[name], axis=1), 1, atol=1e-5)
    assert list(images(saved).record_id) == [r["record_id"] for r in saved.run.records if r["split"] == "test"]
    assert not list(saved.path.parent.glob("*.tmp"))


@pytest.mark.parametrize(
    ("task", "scope"), [("classify-image", "external"), ("probe", "Ours"), ("classify-image", "all")]
)
def test_classification_is_what_scikit_learn_computes_from_the_predictions(
    saved: SimpleNamespace, task: str, scope: str
) -> None:
    by_id = {row["record_id"]: row for row in images(saved)}
    own = Rows(by_id[p["record_id"]] | p for p in saved.predictions.where(task=task))
    members = {
        "external": ["Other_dermo", "Other_clinic"],
        "Ours": ["Ours"],
        "all": ["Ours", "Other_dermo", "Other_clinic"],
    }
    own = Rows(r for r in own if r["dataset"] in members[scope] and r["label"] is not None)
    truth, answers = own.label, np.stack(own.probabilities).argmax(axis=1)
    kind = "dataset" if scope == "Ours" else "partition"
    where = {"task": task, "scope": scope, "scope_kind": kind, "class_set": "classes"}
    present = np.unique(truth)
    kept = {"labels": present, "zero_division": 0.0}
    assert value(saved, metric="accuracy", **where) == pytest.approx(sk.accuracy_score(truth, answers), abs=1e-6)
    weighted = sk.f1_score(truth, answers, average="weighted", **kept)
    assert value(saved, metric="f1_weighted", **where) == pytest.approx(weighted, abs=1e-6)
    macro = sk.f1_score(truth, answers, average="macro", **kept)
    assert value(saved, metric="f1_macro", **where) == pytest.approx(macro, abs=1e-6)


@pytest.mark.parametrize("class_set", ["classes", "subclasses", "malignancy"])
@pytest.mark.parametrize("prompts", ["bare", "ensemble"])
def test_zero_shot_is_what_the_saved_embeddings_give(saved: SimpleNamespace, class_set: str, prompts: str) -> None:
    own = saved.ids.where(kind="prompt", class_set=class_set)
    own = own.where(strategy="bare") if prompts == "bare" else own
    labels = sorted(set(own.label))
    means = np.stack([saved.vectors["prompt"][own.where(label=c).row].mean(axis=0) for c in labels])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    truth = _truth(saved, class_set)
    answers = (saved.vectors["image"] @ means.T).argmax(axis=1)
    where = {"task": "zero-shot", "scope": "all", "class_set": class_set, "eval_strategy": prompts}
    expected = sk.accuracy_score(truth[truth >= 0], answers[truth >= 0])
    assert value(saved, metric="accuracy", **where) == pytest.approx(expected, abs=1e-6)


def _truth(saved: SimpleNamespace, class_set: str) -> np.ndarray:
    from dermfm.records.vocabulary import MALIGNANCIES, SUBCLASSES

    field, names = {
        "classes": ("label", list(range(8))),
        "subclasses": ("matched_subclass", SUBCLASSES),
        "malignancy": ("malignancy", MALIGNANCIES),
    }[class_set]
    records = [r for r in saved.run.records if r["split"] == "test"]
    return np.array([names.index(r[field]) if r[field] is not None else -1 for r in records])


@pytest.mark.parametrize("task", ["retrieval-i2t", "retrieval-t2i", "retrieval-i2i"])
def test_class_level_retrieval_is_what_scikit_learn_computes_pair_by_pair(saved: SimpleNamespace, task: str) -> None:
    strategy = None if task == "retrieval-i2i" else "narrative"
    text = saved.ids.where(kind="text", strategy="narrative")
    sides = {"i": (images(saved), saved.vectors["image"]), "t": (text, saved.vectors["text"][text.row])}
    (queries, q_vectors), (pool, p_vectors) = sides[task[-3]], sides[task[-1]]
    found, classes, hits = [], [], []
    for query, vector in zip(queries, q_vectors, strict=True):
        allowed = (pool.group_id != query["group_id"]) & (pool.label != None)  # noqa: E711
        truth = (pool.label == query["label"])[allowed] & (query["label"] is not None)
        if truth.any():
            scores = p_vectors[allowed] @ vector
            found.append(average_precision(truth, scores))
            hits.append(truth[np.argsort(-scores, kind="stable")[:1]].mean())
            classes.append(query["label"])
    where = {"task": task, "scope": "all", "eval_strategy": strategy}
    assert value(saved, metric="map_micro", **where) == pytest.approx(np.mean(found), abs=1e-6)
    means = [np.mean([ap for ap, c in zip(found, classes, strict=True) if c == wanted]) for wanted in set(classes)]
    assert value(saved, metric="map_macro", **where) == pytest.approx(np.mean(means), abs=1e-6)


def average_precision(truth: np.ndarray, scores: np.ndarray) -> float:
    """Mean over random orders within ties, by drawing none: equal scores are rare but exact duplicates are spread."""
    total, seen = 0.0, 0.0
    order = np.argsort(-scores, kind="stable")
    place = 0
    while place < len(order):
        block = order[place:][scores[order[place:]] == scores[order[place]]]
        size, inside = len(block), truth[block].sum()
        for j in range(1, size + 1):
            before = (j - 1) * (inside - 1) / (size - 1) if size > 1 else 0
            total += inside / size * (seen + 1 + before) / (place + j)
        seen, place = seen + inside, place + size
    return total / truth.sum()


def test_instance_level_retrieval_is_what_counting_gives(saved: SimpleNamespace) -> None:
    text = saved.ids.where(kind="text", strategy="narrative")
    vectors, pool = saved.vectors["text"][text.row], images(saved)
    hits, ranks = [], []
    for place, query in enumerate(pool):
        mine = text.record_id == query["record_id"]
        allowed = (text.group_id != query["group_id"]) | mine
        scores = vectors @ saved.vectors["image"][place]
        own = scores[mine][0]
        better, tied = (allowed & (scores > own)).sum(), (allowed & (scores == own)).sum()
        hits.append(np.clip((10 - better) / tied, 0, 1))
        ranks.append(better + (tied + 1) / 2)
    where = {"task": "retrieval-i2t", "scope": "all", "eval_strategy": "narrative"}
    assert value(saved, metric="r@10", **where) == pytest.approx(np.mean(hits), abs=1e-6)
    assert value(saved, metric="median_rank", **where) == pytest.approx(np.median(ranks), abs=1e-6)


def test_intervals_hold_the_value_and_text_rows_name_their_track(saved: SimpleNamespace) -> None:
    for row in saved.content["results"]:
        if row["ci_low"] is not None and row["metric"] != "ece":
            assert row["ci_low"] - 0.2 * abs(row["value"]) - 0.2 <= row["value"]
        assert (row["track"] == "label-given") == (row["task"] in READING_NOTES)


def test_a_second_call_reads_no_image_again(tiny_run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    first = evaluate(settings(tiny_run)).read_text()

    def fail(*_: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(embed, "decode_image", fail)
    assert evaluate(settings(tiny_run)).read_text() == first


def test_an_interrupted_call_continues_with_the_stored_pieces(
    tiny_run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"batch_size": 4, "tasks": ONE_PASS}
    whole = evaluate(settings(tiny_run, out=str(tiny_run.run / "whole"), **asked)).read_text()
    forward, calls = tiny_run.model.image.forward, []

    def stops(pixels: torch.Tensor) -> Any:
        calls.append(len(pixels))
        if len(calls) == 12:
            raise KeyboardInterrupt
        return forward(pixels)

    monkeypatch.setattr(tiny_run.model.image, "forward", stops)
    with pytest.raises(KeyboardInterrupt):
        evaluate(settings(tiny_run, **asked))
    assert not (tiny_run.run / "eval" / "00000012").exists()
    calls.clear()
    monkeypatch.setattr(tiny_run.model.image, "forward", lambda pixels: (calls.append(len(pixels)), forward(pixels))[1])
    assert evaluate(settings(tiny_run, **asked)).read_text() == whole
    assert len(calls) == 20 - 8  # of twenty batches, one piece of eight was stored


def test_an_unreadable_image_is_left_out_and_named(
    tiny_run: SimpleNamespace, tmp_path: Path, write_shards: Callable[..., str]
) -> None:
    rng = np.random.default_rng(0)
    broken = next(i for i, r in enumerate(tiny_run.records) if r["split"] == "test")
    shards = write_shards(tmp_path / "broken", tiny_run.records, rng, damaged=broken)
    content = json.loads(evaluate(settings(tiny_run, shards=shards)).read_text())
    assert content["protocol"]["unreadable_images"] == [tiny_run.records[broken]["record_id"]]
    assert content["protocol"]["num_records"] == 79


def test_roles_come_from_the_training_split_unless_given(tiny_run: SimpleNamespace) -> None:
    content = json.loads(evaluate(settings(tiny_run, tasks=["classify-image"])).read_text())
    assert (content["protocol"]["internal"], content["protocol"]["external"]) == (
        ["Ours"],
        ["Other_clinic", "Other_dermo"],
    )
    given = ProtocolConfig(internal=["Ours", "Other_dermo"])
    content = json.loads(evaluate(settings(tiny_run, tasks=["classify-image"], protocol=given)).read_text())
    assert content["protocol"]["external"] == ["Other_clinic"]
    assert content["protocol"]["absent_classes"]["partition internal"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"protocol": ProtocolConfig(internal=["Oours"])}, "did you mean 'Ours'"),
        ({"protocol": ProtocolConfig(internal=["Ours"], external=["Other_dermo"])}, "neither internal nor external"),
        ({"eval_strategies": ["templat"]}, "did you mean 'template'"),
    ],
)
def test_wrong_names_are_refused_with_the_nearest_valid_one(
    tiny_run: SimpleNamespace, changes: dict, says: str
) -> None:
    with pytest.raises(InputError, match=says):
        evaluate(settings(tiny_run, **changes))


def test_an_empty_split_and_a_missing_run_are_one_line_and_exit_2(
    tiny_run: SimpleNamespace, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(ShardError, match="the split 'tset' holds no sample"):
        evaluate(settings(tiny_run, splits=["tset"]))
    for arguments in (["evaluate"], ["evaluate", "run=nowhere"], ["evaluate", "tasks=[zero]"]):
        assert main(arguments) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    (tiny_run.run / "ckpt" / "step-00000012" / "COMPLETE").unlink()
    assert main(["evaluate", f"run={tiny_run.run}"]) == 2
    assert "no complete checkpoint" in capsys.readouterr().err


def test_dry_run_says_what_would_be_scored_and_writes_nothing(
    tiny_run: SimpleNamespace, capsys: pytest.CaptureFixture
) -> None:
    assert main(["evaluate", f"run={tiny_run.run}", "--dry-run"]) == 0
    assert "80 test records" in capsys.readouterr().out
    assert not (tiny_run.run / "eval").exists()


def test_embeddings_that_are_not_finite_are_refused(tiny_run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = copy.deepcopy(tiny_run.model)
    with torch.no_grad():
        broken.image_projection.weight.fill_(float("nan"))
    monkeypatch.setattr(job, "load_model", lambda path, device="cpu": broken)
    with pytest.raises(InputError, match="not finite"):
        evaluate(settings(tiny_run))


def test_the_frozen_tower_is_not_run_a_second_time_for_the_probe(
    tiny_run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dermfm.evaluate import frozen

    built = []
    monkeypatch.setattr(frozen, "ImageTower", lambda config: (built.append(1), tiny_run.model.image)[1])
    evaluate(settings(tiny_run, tasks=ONE_PASS))
    names = sorted(p.name.rsplit("-", 1)[0] for p in (tiny_run.run / "eval" / "cache").iterdir())
    assert names == ["features-train", "features-valid", "images-test", "texts"]
    assert job.TASKS[-1] == "probe"
