"""A whole study on the embedded atlas: its cells, tables and effects; what is done is not done again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score

ROOT = Path(__file__).resolve().parents[2]
STRATEGIES = ("image-only", "label", "narrative", "shuffled", "shuffled_within_class", "template")
SMALL = ["tokens.epochs=2", "tokens.search.text_weight=[1.0]", "tokens.search.image_only_lr=[0.003]"]
pytestmark = pytest.mark.timeout(900)


def study(out: Path, *items: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.cli", "study", "configs/study/atlas.yaml", f"out={out}", *SMALL, *items]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """A finished study."""
    folder = tmp_path_factory.mktemp("study") / "atlas"
    done = study(folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def cells(out) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in (out / "cells").glob("*.json")}


def engine_of(strategy: str) -> str:
    return {"image-only": "none", "label": "template", "template": "template"}.get(strategy, "plain")


def test_every_cell_and_the_frozen_probe_are_there_and_small(out, cells):
    names = {f"t1-{s}-{engine_of(s)}-standard-s{seed}" for s in STRATEGIES for seed in (0, 1)}
    assert set(cells) == {*names, "t1-frozen-probe-none-none-s0"}
    assert max(path.stat().st_size for path in (out / "cells").glob("*.json")) < 60_000


def test_every_metric_is_that_of_scikit_learn_on_the_stored_predictions(out, cells):
    scored = pq.read_table(out / "scored.parquet").to_pydict()
    labels, datasets = np.array(scored["label"]), np.array(scored["dataset"])
    for content in cells.values():
        answers = np.array([int(digit) for digit in content["predicted"]["test"]])
        probabilities = np.load(out / "cells" / f"{content['id']}.npz")["test"]
        assert probabilities.shape == (len(labels), 8)
        for row in content["results"]:
            if (
                row["task"] in ("classify-image", "probe")
                and row["class_set"] == "classes"
                and row["scope_kind"] == "dataset"
            ):
                own = datasets == row["scope"]
                present = np.unique(labels[own])
                expected = {
                    "f1_macro": f1_score(labels[own], answers[own], average="macro", labels=present, zero_division=0),
                    "balanced_accuracy": balanced_accuracy_score(labels[own], answers[own]),
                }.get(row["metric"])
                assert expected is None or row["value"] == pytest.approx(expected, abs=1e-6)


def test_the_tables_hold_every_cell_and_the_family_of_comparisons(out, cells):
    table = pq.read_table(out / "study.parquet").to_pylist()
    assert {row["cell"] for row in table} == set(cells)
    assert {"strategy", "engine", "objective", "seed", "tier", "task", "scope", "metric", "value", "ci_low"} <= set(
        table[0]
    )
    kind = {"task": "classify-image", "metric": "f1_macro", "class_set": "classes", "scope": "Atlas_clinic"}
    kind["scope_kind"] = "dataset"
    endpoint = {row["cell"]: row["value"] for row in table if kind.items() <= row.items()}
    primary = [row for row in pq.read_table(out / "effects.parquet").to_pylist() if row["primary"]]
    assert {(r["strategy"], r["reference"]) for r in primary} == {
        (s, r) for s in ("narrative", "template") for r in ("image-only", "label", "shuffled_within_class")
    }
    for row in primary:
        names = [
            [f"t1-{s}-{engine_of(s)}-standard-s{seed}" for seed in (0, 1)] for s in (row["strategy"], row["reference"])
        ]
        expected = np.mean([endpoint[a] - endpoint[b] for a, b in zip(*names, strict=True)])
        assert row["effect"] == pytest.approx(expected, abs=1e-5)
        assert row["ci_low"] <= row["effect"] <= row["ci_high"]
    summary = json.loads((out / "study.json").read_text())
    assert summary["cells"]["missing"] == []
    assert summary["looks_at_external"] == len(cells)


def test_cells_of_a_seed_differ_in_their_notes_only(cells):
    first = cells["t1-label-template-standard-s0"]
    for strategy in ("narrative", "shuffled", "template"):
        other = cells[f"t1-{strategy}-{engine_of(strategy)}-standard-s0"]
        unlike = {name for name in first["made_of"] if first["made_of"][name] != other["made_of"][name]}
        assert unlike == {"notes", "strategies"}
    assert first["notes"]["coverage"] == 1.0
    assert cells["t1-image-only-none-standard-s0"]["losses"].keys() == {"loss", "loss/classify_image"}


def test_the_same_command_makes_only_the_missing_cell_and_the_same_one(out, cells, tmp_path):
    shutil.copytree(out, tmp_path / "atlas")
    folder = tmp_path / "atlas" / "cells"
    lost, kept = folder / "t1-narrative-plain-standard-s1.json", folder / "t1-label-template-standard-s0.json"
    before, stamp = json.loads(lost.read_text()), kept.stat().st_mtime_ns
    lost.unlink()
    results = tmp_path / "results"
    (results / "cells").mkdir(parents=True)
    other = folder / "t1-template-template-standard-s1.json"
    other.rename(results / "cells" / other.name)  # as a later day finds it: in version control only
    given = [
        f"{job}.out={out}/{name}"
        for job, name in (("records", "records.parquet"), ("shards", "shards"), ("notes", "notes"))
    ]
    done = study(tmp_path / "atlas", f"results={results}", *given)
    assert done.returncode == 0, done.stderr
    assert "cells: 12, 11 done, 1 to do here" in done.stdout
    after = json.loads(lost.read_text())
    assert {n: after[n] for n in ("results", "predicted", "search")} == {
        n: before[n] for n in ("results", "predicted", "search")
    }
    assert kept.stat().st_mtime_ns == stamp
    assert len(list((results / "cells").glob("*.json"))) == len(cells)
    assert {"scored.parquet", "study.parquet", "effects.parquet", "table.md", "report.html"} <= {
        p.name for p in results.iterdir()
    }


def test_a_dry_run_tells_the_cells_and_what_they_share(out):
    done = study(out, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "t1-shuffled_within_class-plain-standard-s1  done" in done.stdout
    assert "12 cells of tier 1, 12 done" in done.stdout
    assert "shared by all: records" in done.stdout


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["controls=[image-only,shuffled,shuffled_within_class,template]"], "controls: 'label' is left out"),
        (["strategies=[narrative,narativ]"], "no strategy 'narativ'"),
        (["tier=2", "out=runs/none-such"], "'best' needs finished cells of tier 1"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, items, message):
    done = study(tmp_path / "none", *items)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.timeout(1200)
def test_tier_2_trains_the_best_strategy_of_tier_1_with_fine_tuned_towers(out):
    done = study(out, "tier=2", "seeds=[0]")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    made = {path.stem for path in (out / "cells").glob("t2-*.json")}
    assert len(made) == 2
    assert "t2-image-only-none-standard-s0" in made
    effects = [row for row in pq.read_table(out / "effects.parquet").to_pylist() if row["tier"] == 2 and row["primary"]]
    assert {row["reference"] for row in effects} == {"image-only"}
    assert len({row["tier"] for row in pq.read_table(out / "study.parquet").to_pylist()}) == 2
