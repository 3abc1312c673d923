"""Classification measures against scikit-learn, and resampled ones against resampled records."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sk

from dermfm.evaluate import classify
from dermfm.evaluate.statistics import draw_groups


def example(seed: int, count: int = 200, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Labels that lack class 3, and probabilities that often hit."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([c for c in range(classes) if c != 3], count)
    logits = rng.normal(size=(count, classes)) + 1.2 * np.eye(classes)[labels]
    grown = np.exp(logits)
    return labels, grown / grown.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("seed", range(3))
def test_values_are_those_of_scikit_learn_over_the_classes_present(seed: int) -> None:
    labels, probabilities = example(seed)
    answers, present = probabilities.argmax(axis=1), np.unique(labels)
    rows = np.arange(len(labels))
    found = classify.classification(labels, probabilities, rows, draw_groups(rows, rows * 0, 20, 0))
    kept = {"labels": present, "zero_division": 0.0}
    expected = {
        "accuracy": sk.accuracy_score(labels, answers),
        "f1_weighted": sk.f1_score(labels, answers, average="weighted", **kept),
        "f1_macro": sk.f1_score(labels, answers, average="macro", **kept),
        "f1_micro": sk.f1_score(labels, answers, average="micro"),
        "precision_macro": sk.precision_score(labels, answers, average="macro", **kept),
        "recall_macro": sk.recall_score(labels, answers, average="macro", **kept),
        "kappa": sk.cohen_kappa_score(labels, answers),
        "kappa_linear": sk.cohen_kappa_score(labels, answers, weights="linear", labels=range(5)),
        "auroc": np.mean([sk.roc_auc_score(labels == c, probabilities[:, c]) for c in present]),
    }
    for name, value in expected.items():
        assert found[name].value == pytest.approx(value, abs=1e-12), name
    with pytest.warns(UserWarning, match="y_pred contains classes"):
        assert found["balanced_accuracy"].value == pytest.approx(sk.balanced_accuracy_score(labels, answers))


@pytest.mark.parametrize("seed", range(5))
def test_confusion_matrices_give_what_scikit_learn_gives_from_records(seed: int) -> None:
    labels, probabilities = example(seed, count=60)
    answers = probabilities.argmax(axis=1)
    found = classify.confusion_values(classify.confusion_matrix(labels, answers, 5))
    for name, value in classify.point_values(labels, answers, 5).items():
        assert float(found[name]) == pytest.approx(value, abs=1e-12), name


def test_chance_is_what_always_the_most_frequent_class_gets() -> None:
    labels, probabilities = example(0)
    rows = np.arange(len(labels))
    found = classify.classification(labels, probabilities, rows, draw_groups(rows, rows * 0, 20, 0))
    majority = np.full_like(labels, np.bincount(labels).argmax())
    assert found["accuracy"].chance == pytest.approx((labels == majority).mean())
    assert found["f1_weighted"].chance == pytest.approx(sk.f1_score(labels, majority, average="weighted"))
    assert found["balanced_accuracy"].chance == pytest.approx(1 / 4)
    assert (found["kappa"].chance, found["auroc"].chance, found["ece"].chance) == (0.0, 0.5, None)


def test_calibration_error_is_that_of_a_loop_over_bins() -> None:
    labels, probabilities = example(4)
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    total = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert classify.calibration_error(labels, probabilities) == pytest.approx(total, abs=1e-9)


def test_a_single_class_leaves_undefined_measures_empty_instead_of_nan() -> None:
    labels, rows = np.zeros(10, np.int64), np.arange(10)
    probabilities = np.tile([0.9, 0.1], (10, 1))
    found = classify.classification(labels, probabilities, rows, draw_groups(rows, rows * 0, 20, 0))
    assert (found["auroc"].value, found["auroc"].ci_low, found["kappa"].value) == (None, None, None)
    assert (found["accuracy"].value, found["f1_macro"].value) == (1.0, 1.0)


def test_resampled_values_are_those_of_the_records_drawn() -> None:
    """Every draw repeated record by record, for measures of all kinds."""
    labels, probabilities = example(1, count=80)
    groups, rows = np.arange(80) // 3, np.arange(80)
    draws = draw_groups(groups, rows * 0, 25, 7)
    cells = classify._one_hot(labels, probabilities.argmax(axis=1), 5)
    found = classify.confusion_values(draws.sums(cells, rows))
    areas = classify.auroc_draws(probabilities, labels, rows, draws)
    errors = classify._calibration_draws(labels, probabilities, rows, draws)
    for k, weights in enumerate(draws.weights):
        drawn = np.repeat(rows, weights[draws.group_of].astype(int))
        values = classify.point_values(labels[drawn], probabilities[drawn].argmax(axis=1), 5)
        for name, value in values.items():
            assert found[name][k] == pytest.approx(value, abs=1e-12), name
        assert areas[k] == pytest.approx(classify.auroc(labels[drawn], probabilities[drawn]), abs=1e-12)
        assert errors[k] == pytest.approx(classify.calibration_error(labels[drawn], probabilities[drawn]), abs=1e-12)


def test_class_matched_values_are_those_of_weighted_records() -> None:
    """Weights that make the classes as frequent as elsewhere, where one is missing; a class that is missing here counts
    on neither side."""
    labels, probabilities = example(2)
    prior = np.array([10, 0, 5, 70, 25])
    rows = np.arange(len(labels))
    found = classify.class_matched(labels, probabilities, rows, draw_groups(rows, rows * 0, 50, 0), prior)
    answers, weight = probabilities.argmax(axis=1), (prior / np.maximum(np.bincount(labels, minlength=5), 1))[labels]
    kept = weight > 0
    labels, answers, weight = labels[kept], answers[kept], weight[kept]
    own = {"labels": [0, 2, 4], "sample_weight": weight, "zero_division": 0.0}
    for name, value in {
        "accuracy": sk.accuracy_score(labels, answers, sample_weight=weight),
        "f1_weighted": sk.f1_score(labels, answers, average="weighted", **own),
        "f1_macro": sk.f1_score(labels, answers, average="macro", **own),
        "kappa": sk.cohen_kappa_score(labels, answers, labels=range(5), sample_weight=weight),
    }.items():
        assert found[name].value == pytest.approx(value, abs=1e-9), name
        assert found[name].ci_low < value < found[name].ci_high
    assert found["accuracy"].chance == pytest.approx(25 / 40)
