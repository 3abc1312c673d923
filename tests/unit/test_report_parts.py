"""The parts of the report that need no run: bars of subgroups, the map, marks of facts, the protocol's lines."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import f1_score

from dermfm.evaluate.statistics import draw_groups
from dermfm.report import breakdown, compare, embedding_map, figures, generated, protocol, tables, tasks
from dermfm.report.generated import CONTRADICTED, MISSING, SUPPORTED, UNSUPPORTED

FACTS = {"image": "dermoscopic", "age": "55", "sex": "female", "diagnosis": "melanoma", "malignancy": "malignant"}


def row(task: str, scope: str, metric: str, value: float, **fields: Any) -> dict[str, Any]:
    """One row of metrics.json."""
    empty = dict.fromkeys(("track", "train_strategy", "eval_strategy", "pool", "chance", "seed"))
    known = {"task": task, "scope_kind": "partition", "scope": scope, "class_set": "classes", "metric": metric}
    return known | empty | {"value": value, "ci_low": value - 0.1, "ci_high": value + 0.1, "n": 10} | fields


def test_reliability_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    scores = rng.dirichlet(np.ones(8), 400)
    labels = rng.integers(0, 8, 400)
    found = breakdown.reliability("all", "model", labels, scores, bins=10)
    hit, confidence = scores.argmax(axis=1) == labels, scores.max(axis=1)
    accuracy, mean = calibration_curve(hit, confidence, n_bins=10)
    used = found.counts > 0
    np.testing.assert_allclose(found.accuracy[used], accuracy)
    np.testing.assert_allclose(found.confidence[used], mean)
    assert found.ece == pytest.approx(np.sum(found.counts[used] / 400 * np.abs(accuracy - mean)))


def test_an_external_data_set_without_labels_is_not_counted_in_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, answers = np.array([0, 1, 1, 0, -1, -1]), np.array([0, 1, 0, 0, 1, 1])
    records = SimpleNamespace(labels=labels, datasets=np.array([*"AAAABB"], dtype=object))
    evaluation = SimpleNamespace(records=records, protocol={"endpoint": "f1_macro", "external": ["A", "B"]})
    draws = draw_groups(np.arange(6), records.datasets, 20, 0)
    monkeypatch.setattr(compare, "predicted", lambda _, task: answers if task == "classify-image" else None)
    monkeypatch.setattr(compare, "draws_of", lambda _: draws)
    found = compare.endpoint(evaluation)  # type: ignore[arg-type]
    assert found is not None
    assert found.num_datasets == 1
    assert found.model.value == pytest.approx(f1_score(labels[:4], answers[:4], average="macro"))


def test_subgroups_are_grouped_by_attribute_and_ordered() -> None:
    def group(task: str, scope: str) -> dict[str, Any]:
        return row(task, scope, "balanced_accuracy", 0.5, scope_kind="subgroup")

    names = ["age=0-29", "age=75+", "age=30-44", *(f"skin_tone=ITA {t}" for t in ("tan", "very light", "light"))]
    rows = [group(task, name) for task in ("classify-image", "probe") for name in names]
    found = breakdown.subgroups([*rows, row("classify-image", "all", "balanced_accuracy", 0.9)])
    assert [(g.title, g.names) for g in found] == [
        ("age", ["0-29", "30-44", "75+"]),
        ("skin tone", ["ITA very light", "ITA light", "ITA tan"]),
    ]
    assert list(found[0].bars) == ["model", "frozen probe"]
    assert breakdown.subgroups([]) == []


def test_a_map_keeps_clusters_together_and_is_the_same_again() -> None:
    rng = np.random.default_rng(1)
    centres = np.eye(3, 16) * 6
    labels = np.repeat([0, 2, -1], 20)
    image = (centres[np.repeat(range(3), 20)] + rng.normal(0, 0.3, (60, 16))).astype(np.float32)
    records = SimpleNamespace(labels=labels, datasets=np.array(["A", "B"] * 30, dtype=object))
    found = embedding_map.embedding_map(SimpleNamespace(image=image, records=records), seed=3)  # type: ignore[arg-type]
    assert found is not None
    assert found.class_names == ["SK", "NEV"]
    assert found.dataset_names == ["A", "B"]
    assert set(found.classes) == {0, 1, -1}
    apart = np.linalg.norm(found.points[:, None] - found.points[None], axis=-1)
    nearest = np.argsort(apart + np.eye(60) * 1e9, axis=1)[:, 0]
    assert (labels[nearest] == labels).all()
    again = embedding_map.embedding_map(SimpleNamespace(image=image, records=records), seed=3)  # type: ignore[arg-type]
    assert again is not None
    np.testing.assert_array_equal(again.points, found.points)


def test_too_few_or_collapsed_embeddings_have_no_map() -> None:
    records = SimpleNamespace(labels=np.zeros(30, int), datasets=np.array(["A"] * 30, dtype=object))
    for image in (np.ones((30, 4)), np.random.default_rng(0).normal(size=(5, 4))):
        assert embedding_map.embedding_map(SimpleNamespace(image=image, records=records), 0) is None  # type: ignore[arg-type]


def marks(text: str) -> dict[str, list[str]]:
    """Mark → the pieces of the text that carry it."""
    out: dict[str, list[str]] = {}
    for piece in generated.mark_text(text, FACTS):
        out.setdefault(piece.mark, []).append(piece.text)
    return out


def test_the_pieces_make_the_text_again() -> None:
    text = "Dermoscopic image. A 55-year-old woman with  melanoma; it is malignant, not benign. Fuzzy border."
    assert "".join(p.text for p in generated.mark_text(text, FACTS)) == text


def test_stated_facts_are_supported() -> None:
    text = "Dermoscopic image of a 55-year-old woman. Diagnosis: melanoma. The lesion is malignant."
    assert [(f.name, f.status) for f in generated.fact_states(text, FACTS)] == [(n, SUPPORTED) for n in FACTS]
    assert marks(text)[SUPPORTED] == ["Dermoscopic", "55-year-old", "woman", "melanoma", "malignant"]
    assert CONTRADICTED not in marks(text)


def test_what_is_against_the_record_is_contradicted_and_what_it_lacks_unsupported() -> None:
    text = "Dermoscopic image of a 55-year-old man. Diagnosis: nevus. The lesion is benign with a fuzzy veil."
    status = {f.name: f.status for f in generated.fact_states(text, FACTS)}
    assert status == {
        "image": SUPPORTED, "age": SUPPORTED, "sex": CONTRADICTED, "diagnosis": CONTRADICTED, "malignancy": CONTRADICTED
    }  # fmt: skip
    assert marks(text)[CONTRADICTED] == ["man", "nevus", "benign"]
    assert {"fuzzy", "veil"} <= set(marks(text)[UNSUPPORTED])


def test_a_fact_that_is_not_told_is_missing() -> None:
    assert {f.status for f in generated.fact_states("A lesion of the skin.", FACTS)} == {MISSING}


def test_every_part_of_a_protocol_is_shown() -> None:
    about = {
        "name": "strict", "datasets": {"A": 3}, "modality": {"A": ["clinical"]}, "splits": ["test"], "internal": ["A"],
        "endpoint": "f1_macro", "looks": 7, "new_rule": {"depth": 2, "parts": ["x", "y"]}, "external": [],
        "intervals": {"method": "bootstrap", "resamples": 100, "seed": 5}, "versions": {"torch": "2.14"},
    }  # fmt: skip
    lines = dict(protocol.protocol_lines(about))
    assert lines["Scored records"] == "A 3 (clinical); split test"
    assert lines["Looks at external test sets"] == "7"
    assert lines["New rule"] == "depth 2; parts x, y"
    assert lines["Intervals"] == "bootstrap, 100 resamples, seed 5"
    assert lines["Versions"] == "torch 2.14"


def test_tasks_name_their_track_and_stand_in_its_order() -> None:
    rows = [
        row("classify-text", side, "f1_macro", 0.5, track=track, eval_strategy="narrative")
        for track in ("label-blind", "label-given", "label-masked")
        for side in ("external", "internal")
    ]
    (table,) = tasks.task_tables(rows)
    assert [line.title for line in table.lines] == ["internal", "external"] * 3
    assert list(dict.fromkeys(line.kind for line in table.lines)) == [
        f"8 classes · narrative ({track})" for track in ("label-given", "label-masked", "label-blind")
    ]
    assert tasks.tracks_of(rows) == ["label-given", "label-masked", "label-blind"]


def test_a_task_that_nobody_has_named_is_shown_too() -> None:
    (table,) = tasks.task_tables([row("segment", "all", "dice", 0.25)])
    assert (table.title, table.columns, table.lines[0].cells[0].value) == ("segment", ["dice"], "0.250")


def test_text_label_information_stands_by_track_and_not_among_the_tasks() -> None:
    rows = [
        row("classify-text", "external", tasks.TEXT_LABEL, v, track=t, eval_strategy="narrative", chance=0.125)
        for t, v in (("label-blind", 0.2), ("label-given", 0.99))
    ]
    assert [(t.track, t.cell.value, t.cell.chance) for t in tasks.text_label_lines(rows)] == [
        ("label-given", "0.990", "0.125"),
        ("label-blind", "0.200", "0.125"),
    ]
    assert tasks.task_tables(rows) == []


def test_retrieval_within_the_own_class_is_a_column_of_its_block() -> None:
    own = {"track": "label-blind", "pool": 30, "eval_strategy": "narrative"}
    rows = [
        row("retrieval-i2t", "all", "p@1", 0.5, **own),
        row("retrieval-i2t", "all", "r@10", 0.3, **own),
        row("retrieval-i2t", "all", "r@10", 0.7, **own | {"eval_strategy": "narrative+same-class"}),
    ]
    (block,) = tables.retrieval_blocks(rows)
    assert [title for _, _, title in tables.retrieval_columns(rows)] == ["P@1", "R@10", "R@10 in class"]
    assert [cell.value for cell in block.lines[0].cells] == ["0.500", "0.300", "0.700"]
    assert (block.strategy, block.track) == ("narrative", "label-blind")


def test_a_drawing_escapes_its_words() -> None:
    bars = {"model": [breakdown.Bar(0.5, 0.4, 0.6, 9), breakdown.Bar(None, None, None, 0)]}
    drawn = figures.interval_bars('a "b" <c>', ["<i>x</i>", "y"], bars, "recall")
    assert 'aria-label="a &quot;b&quot; &lt;c&gt;"' in drawn
    assert "<i>" not in drawn
    assert "n = 9" in drawn
    assert "n = 0" not in drawn
