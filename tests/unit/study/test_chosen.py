"""The model that validation chooses: its numbers by scikit-learn, what it stands beside, and the tables made anew."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import confusion_matrix, f1_score

from dermfm.config import InputError, load
from dermfm.evaluate.shift import ProtocolConfig
from dermfm.evaluate.statistics import draw_seeds
from dermfm.study import cells as stored
from dermfm.study.chosen import arms_of, chosen_models, pick, pooled
from dermfm.study.config import Cell, StudyConfig
from dermfm.study.effects import Truth
from dermfm.study.prepare import check_goals
from dermfm.study.run import best_of
from launch.cli import main

RESAMPLES = 300
PROTOCOL = ProtocolConfig(internal=["home"], external=["away", "far"])
ROOT = Path(__file__).resolve().parents[3]
ATLAS = "configs/study/atlas.yaml"
ENGINES = {"image-only": "none", "label": "template", "frozen-probe": "none"}


def make_scored() -> pa.Table:
    """240 records of three data sets, four classes, some without a label."""
    rng, n = np.random.default_rng(1), 240
    label = rng.integers(0, 4, n).tolist()
    return pa.table(
        {
            "record_id": [f"r{i}" for i in range(n)],
            "dataset": rng.choice(["home", "away", "far"], n, p=[0.4, 0.4, 0.2]).tolist(),
            "group_id": [f"g{i}" for i in rng.integers(0, 150, n)],
            "modality": ["dermoscopic"] * n,
            "split": ["test"] * n,
            "label": [None if i % 40 == 7 else label[i] for i in range(n)],
        }
    )


@pytest.fixture(scope="module")
def truth() -> Truth:
    return Truth(make_scored(), PROTOCOL, RESAMPLES, seed=3)


def make_cell(truth: Truth, tier: int, strategy: str, seed: int, right: float, valid: float) -> dict:
    """A finished cell that answers correctly with this probability and reached this macro F1 on validation."""
    rng = np.random.default_rng([tier, seed, len(strategy), round(right * 100)])
    guess = rng.integers(0, 4, len(truth.labels))
    answers = np.where(rng.random(len(guess)) < right, truth.labels.clip(0), guess)
    tries = [{"f1_macro": valid - 0.1, "lr": 0.1}, {"f1_macro": valid, "lr": 0.2}]
    probe = strategy == "frozen-probe"
    cell = Cell(tier, strategy, ENGINES.get(strategy, "plain"), "none" if probe else "standard", seed)
    return dataclasses.asdict(cell) | {
        "id": cell.id, "notes": {"num": 0, "tested": True}, "results": [], "manifest": "abc",
        "predicted": {"test": "".join(map(str, answers)), "valid": "0"}, "versions": {"torch": f"2.{tier}"},
        "search": {"c": 0.01, "tried": {"0.003": 0.1, "0.01": valid}} if probe else {"tries": tries, "chosen": 1},
        "made_of": {"internal": ["home"], "external": ["away", "far"], ("tokens", "train")[tier - 1]: {"epochs": tier}},
    }  # fmt: skip


# (tier, strategy): (share of right answers, macro F1 on validation of seed 0, 1, 2)
ARMS = {
    (1, "image-only"): (0.3, (0.40, 0.41, 0.42)),
    (1, "label"): (0.4, (0.50, 0.51, 0.52)),
    (1, "narrative"): (0.5, (0.49, 0.51, 0.50)),
    (2, "image-only"): (0.5, (0.60, 0.61, 0.62)),
    (2, "shuffled_within_class"): (0.6, (0.63, 0.64, 0.62)),
    (2, "narrative"): (0.8, (0.70, 0.72, 0.71)),
}


@pytest.fixture(scope="module")
def contents(truth) -> list[dict]:
    cells = [make_cell(truth, t, s, k, right, valid[k]) for (t, s), (right, valid) in ARMS.items() for k in range(3)]
    cells.append(make_cell(truth, 2, "abcd", 0, 0.99, 0.99))  # one lucky seed of an arm that is not finished
    return [*cells, make_cell(truth, 1, "frozen-probe", 0, 0.4, 0.99)]


@pytest.fixture(scope="module")
def found(truth, contents) -> dict:
    return chosen_models(contents, truth, {"internal": 0.2, "external": 0.99}, seed=3)


def weighted(truth: Truth, content: dict, datasets: list[str], times: np.ndarray | None = None) -> float:
    """Weighted F1 by scikit-learn over the pooled labelled records, each as often as `times` says."""
    rows = np.flatnonzero(np.isin(truth.datasets, datasets) & (truth.labels >= 0))
    rows = rows if times is None else np.repeat(rows, times[rows])
    return f1_score(truth.labels[rows], stored.predicted_classes(content)[rows], average="weighted")


@pytest.mark.parametrize(
    ("scope", "datasets"), [("external", ["away", "far"]), ("internal", ["home"]), ("far", ["far"])]
)
def test_weighted_f1_of_a_side_is_scikit_learns_over_its_pooled_records(truth, contents, scope, datasets):
    measured = pooled(contents[4], truth, scope)
    assert measured.value == pytest.approx(weighted(truth, contents[4], datasets), abs=1e-9)
    for draw in (0, 123, RESAMPLES - 1):
        times = truth.draws.weights[draw][truth.draws.group_of].astype(int)
        assert measured.draws[draw] == pytest.approx(weighted(truth, contents[4], datasets, times), abs=1e-9)


def test_validation_chooses_in_every_tier_and_test_records_and_unfinished_arms_do_not(truth, contents, found):
    assert [(c["tier"], c["strategy"], c["among"]) for c in found["choices"]] == [(1, "label", 3), (2, "narrative", 4)]
    assert found["choices"][0]["validation"] == pytest.approx(0.51)
    assert found["best"] == 2
    assert {(m["tier"], m["strategy"]) for m in found["models"] if m["chosen"]} == {(1, "label"), (2, "narrative")}
    turned = [c | {"predicted": {"test": c["predicted"]["test"][::-1]}} for c in contents]
    assert [pick(arms_of(turned), tier) for tier in (1, 2)] == [pick(arms_of(contents), tier) for tier in (1, 2)]
    probe = next(m for m in found["models"] if m["strategy"] == "frozen-probe")
    assert (probe["validation"], probe["seeds"], probe["chosen"]) == (0.99, 1, False)


def test_the_choice_has_the_mean_of_its_seeds_and_differences_to_the_baselines_of_its_tier(truth, contents, found):
    by = {(c["tier"], c["strategy"], c["seed"]): c for c in contents}
    values = {
        name: [weighted(truth, by[(*name, s)], ["away", "far"]) for s in (0, 1, 2) if (*name, s) in by]
        for name in [*ARMS, (1, "frozen-probe")]
    }
    choice = found["choices"][1]
    assert choice["scores"]["external"]["value"] == pytest.approx(np.mean(values[2, "narrative"]))
    rows = {row["reference"]: row for row in choice["differences"] if row["scope"] == "external"}
    assert set(rows) == {"image-only", "shuffled_within_class", "frozen-probe"}
    own = np.array(values[2, "narrative"])
    for reference, other in (("image-only", values[2, "image-only"]), ("frozen-probe", values[1, "frozen-probe"] * 3)):
        assert rows[reference]["per_seed"] == pytest.approx(own - np.array(other))
        assert rows[reference]["value"] == pytest.approx(np.mean(own - np.array(other)))
    cells = [pooled(by[2, "narrative", s], truth, "external").draws for s in (0, 1, 2)]
    others = [pooled(by[2, "image-only", s], truth, "external").draws for s in (0, 1, 2)]
    picked = draw_seeds(3, RESAMPLES, 3)
    drawn = [np.mean([cells[s][b] - others[s][b] for s in picked[b]]) for b in range(RESAMPLES)]
    bounds = (rows["image-only"]["ci_low"], rows["image-only"]["ci_high"])
    assert bounds == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])))


def test_the_confusion_of_the_choice_is_scikit_learns_summed_over_seeds(truth, contents, found):
    rows = np.flatnonzero(np.isin(truth.datasets, ["away", "far"]) & (truth.labels >= 0))
    own = [c for c in contents if (c["tier"], c["strategy"]) == (2, "narrative")]
    expected = sum(
        confusion_matrix(truth.labels[rows], stored.predicted_classes(c)[rows], labels=range(8)) for c in own
    )
    np.testing.assert_array_equal(found["choices"][1]["confusion"]["external"], expected)


def test_goals_stand_beside_the_models_value_and_must_be_known(found):
    assert set(found["goals"]) == {"internal", "external"}
    external = found["goals"]["external"]
    assert external == {"asked": 0.99, "value": found["choices"][1]["scores"]["external"]["value"]}
    check_goals({"far": 0.5}, PROTOCOL)
    with pytest.raises(InputError, match="goals: there is no 'extrnal'; did you mean 'external'"):
        check_goals({"extrnal": 0.3}, PROTOCOL)


def test_without_a_finished_arm_nothing_is_chosen(truth, contents):
    assert chosen_models([contents[-1]], truth, {}, 0) == {}


def write_folder(folder: Path, contents: list[dict]) -> Path:
    """The folder of a study as other days left it: cells and scored records, no images."""
    (folder / "cells").mkdir(parents=True)
    for content in contents:
        (folder / "cells" / f"{content['id']}.json").write_text(json.dumps(content))
    pq.write_table(make_scored(), folder / "scored.parquet")
    return folder


def study(*items: str) -> int:
    return main(["study", ATLAS, "resamples=200", "tables=true", "seeds=[0,1,2]", *items])


def test_tables_and_page_of_both_tiers_are_made_from_finished_cells_alone(contents, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    results, out = write_folder(tmp_path / "real", contents), tmp_path / "out"
    goals = ["goals={internal: 0.2, external: 0.99}", "other_looks={a trial before: 5}"]
    assert study(f"out={out}", f"results={results}", *goals) == 0
    told = json.loads((results / "study.json").read_text())
    assert told["looks_at_external"] == len(contents) + 5
    assert told["config"] == {"tier 1": {"epochs": 1}, "tier 2": {"epochs": 2}}
    assert told["family"]["comparisons"] == {"tier 1": 2, "tier 2": 4}
    assert told["versions"]["torch"] == "2.1 and 2.2"
    text = (results / "report.html").read_text()
    choice = next(c for c in told["chosen"]["choices"] if c["tier"] == 2)
    for part in (
        "real: study of note strategies",
        "<h3>Tier 2, fine-tuned towers</h3><p>Validation chooses narrative: macro F1 0.710",
        "so this is the study&#39;s model",
        f"Against the frozen probe: +{choice['differences'][-2]['value']:.3f}",
        f"at least 0.200 internally; reached: {choice['scores']['internal']['value']:.3f}",
        f"{0.99 - choice['scores']['external']['value']:.3f} short",
        f"scored {len(contents) + 5} times ({len(contents)} × finished cells, 5 × a trial before)",
        "Effects on the primary endpoint, Tier 1, frozen towers",
        "Effects on the primary endpoint, Tier 2, fine-tuned towers",
    ):
        assert part in text
    table = (results / "table.md").read_text()
    assert "Chosen by internal validation, Tier 2, fine-tuned towers. Validation chooses narrative" in table
    assert f"| **narrative** (chosen) | 2 | 3 | 0.710 | {choice['scores']['internal']['value']:.3f} |" in table
    before = (results / "study.json").read_text()
    assert study(f"out={results}", "results=null", *goals) == 0  # in place
    assert (results / "study.json").read_text() == before


def test_tables_without_a_finished_cell_are_one_line_and_leave_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert study(f"out={tmp_path / 'none'}") == 2
    error = capsys.readouterr().err
    assert "has no finished cell" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "none").exists()


def test_the_best_strategy_is_found_in_the_results_before_they_are_taken_up(contents, tmp_path):
    results = write_folder(tmp_path / "results", contents)
    items = ["tier=2", f"results={results}", f"out={tmp_path / 'out'}", "strategies=[narrative]"]
    assert best_of(load(StudyConfig, ROOT / ATLAS, items)) == ["narrative", "plain"]


def test_a_cell_that_is_made_again_is_one_more_look(tmp_path):
    content = {"made_of": {"a": 1}, "notes": {"tested": True}, "results": [], "predicted": {"test": "0"}, "search": {}}
    cell = Cell(1, "label", "template", "standard", 0)
    stored.write_cell(tmp_path / "out", cell, content, {})
    assert stored.num_replaced(tmp_path / "out") == 0
    stored.write_cell(tmp_path / "out", cell, content | {"made_of": {"a": 2}}, {})
    assert stored.num_replaced(tmp_path / "out") == 1
    stored.write_scored(tmp_path / "out", _no_records())
    stored.publish(tmp_path / "out", tmp_path / "results", ())
    stored.take_up(tmp_path / "other", tmp_path / "results")
    assert stored.num_replaced(tmp_path / "other") == 1


def _no_records():
    from dermfm.evaluate.records import record_set

    return record_set([], [], [])
