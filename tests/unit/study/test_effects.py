"""Effects against a plain computation: sklearn on resampled records, means over seeds, closed forms of p values."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score

from dermfm.evaluate.shift import ProtocolConfig
from dermfm.evaluate.statistics import draw_seeds, holm, two_sided_p
from dermfm.study import cells as stored
from dermfm.study.config import Cell
from dermfm.study.effects import Truth, effects, measure

RESAMPLES = 500
PROTOCOL = ProtocolConfig(internal=["home"], external=["away", "far"])


@pytest.fixture(scope="module")
def scored() -> pa.Table:
    rng = np.random.default_rng(0)
    n = 240
    return pa.table(
        {
            "record_id": [f"r{i}" for i in range(n)],
            "dataset": rng.choice(["home", "away", "far"], n).tolist(),
            "group_id": [f"g{i}" for i in rng.integers(0, 150, n)],
            "label": rng.integers(0, 4, n).tolist(),
        }
    )


@pytest.fixture(scope="module")
def truth(scored) -> Truth:
    return Truth(scored, PROTOCOL, RESAMPLES, seed=3)


def cell(truth: Truth, strategy: str, seed: int, right: float, engine: str = "e", tested: bool = True) -> dict:
    """A finished cell that answers correctly with this probability."""
    rng = np.random.default_rng([seed, len(strategy), round(right * 100)])
    guess = rng.integers(0, 4, len(truth.labels))
    answers = np.where(rng.random(len(guess)) < right, truth.labels, guess)
    content = {"tier": 1, "strategy": strategy, "engine": engine, "objective": "standard", "seed": seed}
    content |= {"id": f"{strategy}-{seed}", "predicted": {"test": "".join(map(str, answers))}, "results": []}
    return content | {"made_of": {}, "notes": {"tested": tested}, "search": {"tries": [{"f1_macro": 0.5}], "chosen": 0}}


@pytest.fixture(scope="module")
def contents(truth) -> list[dict]:
    rights = {"image-only": 0.4, "label": 0.5, "shuffled_within_class": 0.5, "shuffled": 0.3, "good": 0.9, "same": 0.5}
    return [cell(truth, name, seed, right) for name, right in rights.items() for seed in (0, 1, 2)]


def test_endpoints_are_those_of_scikit_learn(truth, contents):
    found = measure(contents[0], truth)
    answers = stored.predicted_classes(contents[0])
    by_dataset = {}
    for dataset in ("away", "far", "home"):
        rows = truth.rows(dataset)
        by_dataset[dataset] = f1_score(truth.labels[rows], answers[rows], average="macro")
        assert found["f1_macro", dataset].value == pytest.approx(by_dataset[dataset], abs=1e-9)
        expected = balanced_accuracy_score(truth.labels[rows], answers[rows])
        assert found["balanced_accuracy", dataset].value == pytest.approx(expected, abs=1e-9)
    both = (by_dataset["away"] + by_dataset["far"]) / 2
    assert found["f1_macro", "external"].value == pytest.approx(both, abs=1e-9)


def test_a_resample_is_the_score_of_the_records_of_the_drawn_groups(truth, contents):
    found = measure(contents[3], truth)
    answers = stored.predicted_classes(contents[3])
    for draw in (0, 7, 499):
        values = []
        for dataset in ("away", "far"):
            rows = truth.rows(dataset)
            times = truth.draws.weights[draw][truth.draws.group_of[rows]].astype(int)
            drawn = np.repeat(rows, times)
            labels = np.unique(truth.labels[drawn])
            values.append(f1_score(truth.labels[drawn], answers[drawn], average="macro", labels=labels))
        assert found["f1_macro", "external"].draws[draw] == pytest.approx(np.mean(values), abs=1e-6)


def test_an_effect_is_the_mean_difference_of_the_seeds_with_both_levels_resampled(truth, contents):
    rows = effects(contents, truth, seed=3)
    row = next(r for r in rows if (r["strategy"], r["reference"], r["primary"]) == ("good", "label", True))
    cells = {(c["strategy"], c["seed"]): measure(c, truth)["f1_macro", "external"] for c in contents}
    differences = [cells["good", s].value - cells["label", s].value for s in (0, 1, 2)]
    assert row["per_seed"] == pytest.approx(differences)
    assert row["effect"] == pytest.approx(np.mean(differences))
    picked = draw_seeds(3, RESAMPLES, 3)
    resampled = [
        np.mean([cells["good", s].draws[b] - cells["label", s].draws[b] for s in picked[b]]) for b in range(RESAMPLES)
    ]
    assert (row["ci_low"], row["ci_high"]) == pytest.approx(tuple(np.quantile(resampled, [0.025, 0.975])))
    assert row["significant"]
    assert row["effect"] > 0.2


def test_the_family_is_each_strategy_against_three_references_and_no_control_is_in_it(truth, contents):
    rows = effects(contents, truth, seed=0)
    primary = [r for r in rows if r["primary"]]
    assert {(r["strategy"], r["reference"]) for r in primary} == {
        (s, r) for s in ("good", "same") for r in ("image-only", "label", "shuffled_within_class")
    }
    assert all(r["family"] == 6 for r in primary)
    assert all(r.get("p_holm") is None for r in rows if not r["primary"])
    assert not next(r for r in primary if (r["strategy"], r["reference"]) == ("same", "label"))["significant"]


def test_only_seeds_that_both_arms_have_are_compared(truth, contents):
    fewer = [c for c in contents if not (c["strategy"] == "label" and c["seed"] == 1)]
    row = next(r for r in effects(fewer, truth, 0) if (r["strategy"], r["reference"]) == ("good", "label"))
    assert row["seeds"] == [0, 2]
    without = [c for c in contents if c["strategy"] != "label"]
    assert all(r["reference"] != "label" for r in effects(without, truth, 0))


def test_the_shuffled_notes_of_the_own_engine_are_the_reference(truth):
    arms = [cell(truth, "good", 0, 0.9, "two"), cell(truth, "shuffled_within_class", 0, 0.3, "one")]
    arms.append(cell(truth, "shuffled_within_class", 0, 0.8, "two"))
    row = effects(arms, truth, 0)[0]
    expected = measure(arms[2], truth)["f1_macro", "external"].value
    assert row["reference_value"] == pytest.approx(expected)


def test_predictions_of_other_records_are_refused(truth, contents):
    with pytest.raises(ValueError, match="predicts 3 records, but 240 are scored"):
        measure(contents[0] | {"predicted": {"test": "012"}}, truth)


def test_holm_is_its_textbook_example_and_never_falls():
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([0.9, 0.8])) == pytest.approx([1.0, 1.0])
    assert holm(np.array([])).shape == (0,)


def test_a_bootstrap_p_value_is_never_zero_and_one_where_nothing_differs():
    assert two_sided_p(np.ones(199)) == pytest.approx(2 / 200)
    assert two_sided_p(-np.ones(199)) == pytest.approx(2 / 200)
    assert two_sided_p(np.zeros(50)) == 1.0
    assert np.isnan(two_sided_p(np.array([np.nan])))


def test_a_strategy_that_fell_back_to_the_template_is_marked_in_its_effects(truth, contents):
    some = [c for c in contents if c["strategy"] != "good"]
    some += [cell(truth, "good", seed, 0.9, tested=False) for seed in (0, 1, 2)]
    found = effects(some, truth, 0)
    assert {r["tested"] for r in found if r["strategy"] == "good"} == {False}


def test_a_cell_comes_back_as_it_was_written(tmp_path):
    probabilities = {"test": np.eye(4)[[2, 0, 3]], "valid": np.eye(4)[[1]]}
    content = {"made_of": {"a": {"b": 1}}, "results": [{"metric": "f1_macro", "value": 0.5}], "notes": {"tested": True}}
    content |= {"predicted": {split: stored.digits(p) for split, p in probabilities.items()}}
    one = Cell(1, "label", "template", "standard", 0)
    path = stored.write_cell(tmp_path, one, content, probabilities)
    (back,) = stored.read_cells(tmp_path)
    assert back["id"] == one.id
    assert back["predicted"] == {"test": "203", "valid": "1"}
    assert stored.predicted_classes(back).tolist() == [2, 0, 3]
    assert np.load(path.with_suffix(".npz"))["test"].argmax(1).tolist() == [2, 0, 3]
    assert stored.stale(back, {"a": {"b": 1}}) == []
    assert stored.stale(back, {"a": {"b": 2}}) == ["a.b"]
    path.write_text("{")
    with pytest.raises(ValueError, match="cannot be read as a cell"):
        stored.read_cells(tmp_path)
