"""The tasks that need more than embeddings: fused head, finer heads, re-ranking, reports, few-shot, subgroups; each is
computed again from the model itself or from what was saved, one record at a time."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file
from sklearn import metrics as sk
from sklearn.linear_model import LogisticRegression

from dermfm.config import InputError
from dermfm.evaluate import job
from dermfm.evaluate.job import EvaluateConfig, evaluate
from dermfm.evaluate.reports import bleu, bleu_counts, fact_shares, supported
from dermfm.evaluate.rerank import lifted, top_vectors
from dermfm.evaluate.results import METRICS
from dermfm.evaluate.shift import ProtocolConfig
from dermfm.images import decode_image
from dermfm.model.decoder import DecoderConfig
from dermfm.model.dermfm import DermFM, ModelConfig
from dermfm.records.vocabulary import CLASSES, MALIGNANCIES, SUBCLASSES
from dermfm.samples import image_bytes, tokenize
from shards.manifest import Manifest
from shards.reader import ShardReader

TOP = 4


def settings(run: SimpleNamespace, **changes: Any) -> EvaluateConfig:
    return EvaluateConfig(**({"run": str(run.run), "resamples": 25, "batch_size": 16, "device": "cpu"} | changes))


@pytest.fixture(scope="module")
def saved(
    tmp_path_factory: pytest.TempPathFactory, model_config: ModelConfig, make_run: Callable[..., SimpleNamespace]
) -> SimpleNamespace:
    """An evaluation with every task, of a model with finer heads and a decoder."""
    decoder = DecoderConfig(depth=1, width=16, heads=2)
    config = replace(copy.deepcopy(model_config), heads=["subclass", "malignancy"], decoder=decoder)
    torch.manual_seed(1)
    model = DermFM(config).eval()
    with pytest.MonkeyPatch.context() as patch:
        run = make_run(tmp_path_factory.mktemp("tasks"), model, config, patch)
        chosen = {"tasks": list(job.TASKS), "rerank": TOP, "shots": [2], "few_shot_draws": 3, "subgroup_min": 5}
        path = evaluate(settings(run, **chosen))
    content = json.loads(path.read_text())
    tables = {name: pq.read_table(path.parent / f"{name}.parquet").to_pylist() for name in ("ids", "predictions")}
    records = [r for r in run.records if r["split"] == "test"]
    return SimpleNamespace(
        run=run,
        model=model,
        folder=path.parent,
        content=content,
        records=records,
        ids=tables["ids"],
        predictions=tables["predictions"],
        vectors=load_file(path.parent / "embeddings.safetensors"),
        pixels=pixels_of_test(run.shards, model.image_size),
    )


def pixels_of_test(shards: str, size: int) -> torch.Tensor:
    """uint8 [N, 3, S, S]: all images of the test split, read once more."""
    manifest = Manifest.load(shards)
    infos = manifest.split("test")
    reader = ShardReader(manifest.folder, infos, manifest.remote)
    places = [(s, row) for s, info in enumerate(infos) for row in range(info.num_samples)]
    return torch.from_numpy(np.stack([decode_image(image_bytes(reader.read(*place)), size) for place in places]))


def rows_of(saved: SimpleNamespace, **wanted: Any) -> list[dict[str, Any]]:
    return [r for r in saved.content["results"] if all(r[k] == v for k, v in wanted.items())]


def value(saved: SimpleNamespace, **wanted: Any) -> float:
    found = rows_of(saved, **wanted)
    assert len(found) == 1, (wanted, len(found))
    return found[0]["value"]


def note(record: dict[str, Any], strategy: str = "narrative") -> str:
    return next(n["text"] for n in record["notes"] if n["strategy"] == strategy)


@torch.no_grad()
def test_fused_probabilities_are_those_of_image_and_note_one_by_one(saved: SimpleNamespace) -> None:
    note_ids = {n["note_id"]: n["strategy"] for r in saved.records for n in r["notes"]}
    for strategy in ("template", "narrative"):
        own = [p for p in saved.predictions if p["task"] == "classify-fused" and note_ids[p["note_id"]] == strategy]
        assert [p["record_id"] for p in own] == [r["record_id"] for r in saved.records]
        for i in (0, 7, 33, 79):
            states, lengths = text_states(saved, [note(saved.records[i], strategy)])
            logits = saved.model.classify_fused(saved.model.image(saved.pixels[i : i + 1])[0], states, lengths)
            np.testing.assert_allclose(own[i]["probabilities"], logits.softmax(1)[0].numpy(), atol=1e-5)
        labels = np.array([-1 if r["label"] is None else r["label"] for r in saved.records])
        answers = np.stack([p["probabilities"] for p in own]).argmax(axis=1)
        where = {"task": "classify-fused", "scope": "all", "eval_strategy": strategy, "class_set": "classes"}
        accuracy = sk.accuracy_score(labels[labels >= 0], answers[labels >= 0])
        assert value(saved, metric="accuracy", **where) == pytest.approx(accuracy, abs=1e-6)
        assert rows_of(saved, metric="accuracy", **where)[0]["track"] == "label-given"


def text_states(saved: SimpleNamespace, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, lengths = tokenize(saved.model.tokenizer, texts, saved.model.config.text.max_tokens)
    return saved.model.text(tokens, lengths)[0], lengths


@pytest.mark.parametrize(("class_set", "names", "field"), [
    ("subclasses", SUBCLASSES, "matched_subclass"), ("malignancy", MALIGNANCIES, "malignancy"),
])  # fmt: skip
@torch.no_grad()
def test_finer_heads_are_scored_on_their_own_class_sets(
    saved: SimpleNamespace, class_set: str, names: list[str], field: str
) -> None:
    head = saved.model.heads["subclass" if class_set == "subclasses" else class_set]
    chances = head(saved.model.image.pooled(saved.pixels)).softmax(1).numpy()
    known = [i for i, r in enumerate(saved.records) if r[field] is not None]
    truth = np.array([names.index(saved.records[i][field]) for i in known])
    where = {"task": "classify-image", "scope": "all", "class_set": class_set}
    assert value(saved, metric="accuracy", **where) == pytest.approx(
        sk.accuracy_score(truth, chances[known].argmax(axis=1)), abs=1e-6
    )
    kappa = sk.cohen_kappa_score(truth, chances[known].argmax(axis=1), weights="linear", labels=range(len(names)))
    assert value(saved, metric="kappa_linear", **where) == pytest.approx(kappa, abs=1e-6)
    area = np.mean([sk.roc_auc_score(truth == c, chances[known][:, c]) for c in np.unique(truth)])
    assert value(saved, metric="auroc", **where) == pytest.approx(area, abs=1e-6)


@pytest.mark.parametrize("task", ["retrieval-i2t", "retrieval-t2i"])
@torch.no_grad()
def test_reranking_orders_the_first_items_by_their_match_logit(saved: SimpleNamespace, task: str) -> None:
    image = saved.vectors["image"]
    places = [i["row"] for i in saved.ids if i["kind"] == "text" and i["strategy"] == "narrative"]
    text, records = saved.vectors["text"][places], saved.records
    states, lengths = text_states(saved, [note(r) for r in records])
    tokens = saved.model.image(saved.pixels)[0]
    queries, pool = (image, text) if task == "retrieval-i2t" else (text, image)
    groups = np.array([r["group_id"] for r in records])
    same = np.unique(pool, axis=0, return_inverse=True)[1].ravel()  # equal notes stand once among the first
    hits, ranks = [], []
    for q in range(len(records)):
        allowed = np.flatnonzero((groups != groups[q]) | (np.arange(len(records)) == q))
        score = np.round(pool @ queries[q], 6)
        distinct = allowed[np.unique(same[allowed], return_index=True)[1]]
        for item in distinct[np.argsort(-score[distinct], kind="stable")[:TOP]]:
            i, t = (q, item) if task == "retrieval-i2t" else (item, q)
            match = saved.model.match(tokens[[i]], states[[t]], lengths[[t]])
            score[same == same[item]] = 100 + float(match)
        ranks.append(middle_rank(score[allowed], score[q]))
        hits.append(max(0.0, 1 - (score[allowed] > score[q]).sum()) / (score[allowed] == score[q]).sum())
    where = {"task": task, "scope": "all", "eval_strategy": f"narrative+match@{TOP}"}
    assert value(saved, metric="r@1", **where) == pytest.approx(np.mean(hits), abs=1e-6)
    assert value(saved, metric="median_rank", **where) == pytest.approx(np.median(ranks), abs=1e-6)


def middle_rank(scores: np.ndarray, own: float) -> float:
    """Rank of the score `own` among `scores`, at the middle of its ties."""
    return float((scores > own).sum() + ((scores == own).sum() + 1) / 2)


def test_same_class_distractors_rank_the_own_note_among_notes_of_the_class(saved: SimpleNamespace) -> None:
    places = [i["row"] for i in saved.ids if i["kind"] == "text" and i["strategy"] == "narrative"]
    image, text = saved.vectors["image"], saved.vectors["text"][places]
    labels = np.array([-1 if r["label"] is None else r["label"] for r in saved.records])
    groups = np.array([r["group_id"] for r in saved.records])
    ranks = []
    for q in np.flatnonzero(labels >= 0):
        allowed = (labels == labels[q]) & ((groups != groups[q]) | (np.arange(len(labels)) == q))
        scores = np.round(text @ image[q], 6)
        ranks.append(middle_rank(scores[allowed], scores[q]))
    where = {"task": "retrieval-i2t", "scope": "all", "eval_strategy": "narrative+same-class"}
    assert value(saved, metric="median_rank", **where) == pytest.approx(np.median(ranks), abs=1e-6)


def test_note_to_note_retrieval_leaves_the_own_group_out(saved: SimpleNamespace) -> None:
    places = [i["row"] for i in saved.ids if i["kind"] == "text" and i["strategy"] == "narrative"]
    text = saved.vectors["text"][places]
    labels = np.array([-1 if r["label"] is None else r["label"] for r in saved.records])
    groups = np.array([r["group_id"] for r in saved.records])
    found = []
    for q in np.flatnonzero(labels >= 0):
        others = (groups != groups[q]) & (labels >= 0)
        found.append(average_precision(labels[others] == labels[q], np.round(text[others] @ text[q], 6)))
    where = {"task": "retrieval-t2t", "scope": "all", "eval_strategy": "narrative"}
    assert value(saved, metric="map_micro", **where) == pytest.approx(np.mean(found), abs=1e-6)


def average_precision(truth: np.ndarray, scores: np.ndarray) -> float:
    """The mean over random orders within ties, estimated by no sampling: each tie block by its closed form."""
    total, seen, place = 0.0, 0, 0
    for score in sorted(set(scores), reverse=True):
        size, inside = int((scores == score).sum()), int(truth[scores == score].sum())
        for j in range(1, size + 1):
            before = (j - 1) * (inside - 1) / (size - 1) if size > 1 else 0
            total += inside / size * (seen + 1 + before) / (place + j)
        seen, place = seen + inside, place + size
    return total / seen


def test_few_shot_is_the_mean_over_draws_of_classifiers_on_a_few_images(saved: SimpleNamespace) -> None:
    own = [p for p in saved.predictions if p["task"] == "few-shot"]
    labels = {r["record_id"]: r["label"] for r in saved.records if r["label"] is not None}
    values = []
    for draw in range(3):
        kept = [p for p in own if p["seed"] == draw and p["record_id"] in labels]
        truth = [labels[p["record_id"]] for p in kept]
        values.append(sk.accuracy_score(truth, np.stack([p["probabilities"] for p in kept]).argmax(axis=1)))
    where = {"task": "few-shot", "scope": "all", "class_set": "classes", "eval_strategy": "2-shot"}
    assert value(saved, metric="accuracy", **where) == pytest.approx(np.mean(values), abs=1e-6)


def test_few_examples_a_class_are_drawn_and_fitted_by_logistic_regression() -> None:
    from dermfm.evaluate.probe import FEW_SHOT_C, few_shot

    rng = np.random.default_rng(0)
    labels = np.array([0] * 9 + [4] * 2)
    features = rng.normal(size=(11, 5)) + labels[:, None]
    found = few_shot(features, labels, features, 3, 1, 8)
    rows = np.concatenate([np.random.default_rng([1, 0]).permutation(9)[:3], [9, 10]])
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    model = LogisticRegression(class_weight="balanced", C=FEW_SHOT_C, max_iter=1000).fit(unit[rows], labels[rows])
    np.testing.assert_allclose(found[:, [0, 4]], model.predict_proba(unit), atol=1e-3)
    assert found[:, [1, 2, 3, 5, 6, 7]].sum() == 0


@torch.no_grad()
def test_reports_are_what_the_decoder_writes_and_score_as_the_libraries_say(saved: SimpleNamespace) -> None:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU

    table = pq.read_table(saved.folder / "reports.parquet").to_pylist()
    written = {row["record_id"]: row["text"] for row in table}
    ours = [written[r["record_id"]] for r in saved.records]
    assert ours[:3] == saved.model.write_report(saved.pixels[:3])
    theirs = [note(r) for r in saved.records]
    where = {"task": "report", "scope": "all", "eval_strategy": "narrative"}
    expected = BLEU().corpus_score(ours, [theirs]).score / 100
    assert value(saved, metric="bleu", **where) == pytest.approx(expected, abs=1e-6)
    scorer = RougeScorer(["rougeL"])
    overlap = [scorer.score(t, o)["rougeL"].fmeasure for o, t in zip(ours, theirs, strict=True)]
    assert value(saved, metric="rouge_l", **where) == pytest.approx(np.mean(overlap), abs=1e-6)
    shares = [len(row["stated"]) / len(row["facts"]) for row in table if row["facts"]]
    assert value(saved, metric="facts_recall", task="report", scope="all") == pytest.approx(np.mean(shares), abs=1e-6)


def test_corpus_bleu_of_good_texts_is_that_of_sacrebleu() -> None:
    from sacrebleu.metrics import BLEU

    theirs = ["a red lesion with a sharp border on the left arm", "a brown nevus of the back with pigment network"]
    ours = ["a red lesion with sharp border on the left arm", "a brown nevus of the back"]
    counts = bleu_counts(ours, theirs)
    assert bleu(counts.sum(axis=0)) == pytest.approx(BLEU().corpus_score(ours, [theirs]).score / 100, abs=1e-9)
    assert 0.3 < bleu(counts.sum(axis=0)) < 1


def test_facts_count_as_stated_contradicted_or_unsupported() -> None:
    facts = {"sex": "female", "diagnosis": "melanoma", "malignancy": "malignant"}
    stated, wrong = supported("The patient is a woman. Diagnosis: melanoma.", facts)
    assert stated == ["sex", "diagnosis"]
    assert wrong == []
    stated, wrong = supported("The patient is a man. Diagnosis: melanoma.", facts)
    assert stated == ["diagnosis"]
    assert len(wrong) == 1
    reports = SimpleNamespace(facts=[facts, {}], stated=[["sex", "diagnosis"], []], unsupported=[["x"], []])
    recall, precision = fact_shares(reports)  # type: ignore[arg-type]
    np.testing.assert_allclose(recall, [2 / 3, np.nan])
    np.testing.assert_allclose(precision, [2 / 3, np.nan])


def test_per_class_rows_and_confusion_are_those_of_scikit_learn_and_absent_classes_are_marked(
    saved: SimpleNamespace,
) -> None:
    tables = json.loads((saved.folder / "per_class.json").read_text())["results"]
    where = {"task": "classify-image", "scope_kind": "partition", "scope": "external", "class_set": "classes"}
    (table,) = [t for t in tables if all(t[k] == v for k, v in where.items())]
    labels = {r["record_id"]: r["label"] for r in saved.records if r["dataset"] != "Ours"}
    own = [p for p in saved.predictions if p["task"] == "classify-image" and p["class_set"] == "classes"]
    own = [p for p in own if p["record_id"] in labels]
    truth, answers = [labels[p["record_id"]] for p in own], [int(np.argmax(p["probabilities"])) for p in own]
    assert table["labels"] == CLASSES
    np.testing.assert_array_equal(table["confusion"], sk.confusion_matrix(truth, answers, labels=range(8)))
    report = sk.classification_report(truth, answers, labels=range(8), output_dict=True, zero_division=0)
    for c, row in enumerate(table["per_class"]):
        assert row["absent"] == (truth.count(c) == 0)
        assert row["n"] == report[str(c)]["support"]
        if row["absent"]:
            assert row["recall"] is None
            assert row["f1"] is None
        else:
            assert row["f1"] == pytest.approx(report[str(c)]["f1-score"])
            area = sk.roc_auc_score(np.array(truth) == c, [p["probabilities"][c] for p in own])
            assert row["auroc"] == pytest.approx(area)


def test_subgroups_have_rows_of_the_image_tasks_on_their_own_records(saved: SimpleNamespace) -> None:
    answers = {
        p["record_id"]: int(np.argmax(p["probabilities"]))
        for p in saved.predictions
        if p["task"] == "classify-image" and p["class_set"] == "classes"
    }
    for scope, belongs in {
        "sex=female": lambda r: r.get("sex") == "female",
        "age=45-59": lambda r: r.get("age") and 45 <= r["age"] < 60,
        "skin_tone=Fitzpatrick I-II": lambda r: r.get("fitzpatrick") in (1, 2),
        "site=head or neck": lambda r: r.get("site") == "head_neck_face",
    }.items():
        own = [r for r in saved.records if belongs(r) and r["label"] is not None]
        assert len(own) >= 5
        expected = sk.accuracy_score([r["label"] for r in own], [answers[r["record_id"]] for r in own])
        where = {"task": "classify-image", "scope_kind": "subgroup", "scope": scope, "metric": "accuracy"}
        assert value(saved, **where) == pytest.approx(expected, abs=1e-6)
    assert {r["task"] for r in rows_of(saved, scope_kind="subgroup")} == {
        "classify-image", "classify-fused", "zero-shot", "probe",
    }  # fmt: skip


def test_text_information_is_high_where_the_note_names_the_class(saved: SimpleNamespace) -> None:
    for scope in ("internal", "external"):
        (row,) = rows_of(saved, metric="text_label_information", scope=scope, eval_strategy="template")
        assert row["value"] == pytest.approx(1.0)
        assert row["track"] == "label-given"
        assert row["chance"] < 0.5


def test_a_head_that_the_run_did_not_train_is_left_out_and_told(
    tmp_path: Path, model: DermFM, model_config: ModelConfig, make_run: Callable[..., Any], monkeypatch: Any
) -> None:
    run = make_run(tmp_path, model, model_config, monkeypatch)
    file = run.run / "config.yaml"
    weights = {"classify_image": 1.0, "classify_text": 0.0, "classify_fused": 0.0}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"objectives": weights}))
    asked = ["classify-image", "classify-text", "classify-fused", "report"]
    content = json.loads(evaluate(settings(run, tasks=asked, text_information=False)).read_text())
    assert {r["task"] for r in content["results"]} == {"classify-image"}
    assert set(content["protocol"]["left_out"]) == {"classify-text", "classify-fused", "report"}


def test_the_first_items_are_lifted_above_all_others_and_equal_logits_stay_ties() -> None:
    score = np.array([0.9, 0.5, 0.7, 0.1], np.float32)
    found = lifted(score, np.array([0, 2, 1]), np.array([0.1, 3.0, 0.1]))
    assert found[2] > found[0] == found[1] > 1 > found[3]
    pool = SimpleNamespace(counts=np.array([1, 2, 1, 1]), vector_of=np.array([0, 1, 1, 2, 3]))
    assert list(top_vectors(score, pool, np.array([0, 1]), 2)) == [2, 1]  # type: ignore[arg-type]


def test_scored_records_without_any_label_are_refused(
    tiny_run: SimpleNamespace, tmp_path: Path, write_shards: Callable[..., str]
) -> None:
    records = [r | {"label": None} if r["split"] == "test" else r for r in tiny_run.records]
    shards = write_shards(tmp_path / "unlabelled", records, np.random.default_rng(0))
    with pytest.raises(InputError, match=r"classify-image needs labels and no scored record of Other_clinic, .* has"):
        evaluate(settings(tiny_run, shards=shards, tasks=["classify-image"]))
    path = evaluate(settings(tiny_run, shards=shards, tasks=["retrieval-i2t"], text_information=False))
    assert {r["metric"] for r in json.loads(path.read_text())["results"]} == {"r@1", "r@5", "r@10", "median_rank"}


def test_reference_quirks_are_refused_under_the_strict_protocol() -> None:
    with pytest.raises(ValueError, match="self_in_pool: true exists in the reference protocol only"):
        ProtocolConfig(self_in_pool=True)
    assert ProtocolConfig(name="reference").has("merge_identical")
    assert not ProtocolConfig(name="reference", merge_identical=False).has("merge_identical")
    assert METRICS == "metrics.json"


def test_a_checkpoint_of_another_model_is_refused(
    tmp_path: Path, model: DermFM, model_config: ModelConfig, make_run: Callable[..., Any], monkeypatch: Any
) -> None:
    from dermfm import checkpoint as checkpoints

    load = checkpoints.load_model
    run = make_run(tmp_path, model, model_config, monkeypatch)
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("image_head")}
    monkeypatch.setattr(checkpoints.zero, "consolidated_weights", lambda *_: weights)
    monkeypatch.setattr(job, "load_model", load)
    with pytest.raises(InputError, match=r"holds another model than .*config\.yaml names .*image_head"):
        evaluate(settings(run, tasks=["classify-image"]))
    other = DermFM(replace(copy.deepcopy(model_config), num_classes=5)).eval()
    monkeypatch.setattr(job, "load_model", lambda *_: other)
    with pytest.raises(InputError, match="a model of 5 classes; the protocol's are 8"):
        evaluate(settings(run, tasks=["classify-image"]))
