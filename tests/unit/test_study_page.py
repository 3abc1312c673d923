"""The study's page: from known numbers to known sentences, tables and pictures; bad input is one line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dermfm.report import verdicts
from dermfm.report.study import study_table, write_study_page
from dermfm.report.verdicts import BETTER, NO_TEST, SAME, UNCLEAR, WORSE, Effect
from launch.cli import main

EXTERNAL = ["Ext_a", "Ext_b"]
BASE = {"Int": 0.60, "Ext_a": 0.40, "Ext_b": 0.20}
ARMS = {"image-only": 0.0, "label": 0.02, "shuffled_within_class": 0.02, "narrative": 0.06, "template": 0.021}


def effect(strategy: str, against: str, difference: float, half: float, p: float, **fields: Any) -> Effect:
    """An effect with a symmetric interval and five seeds."""
    values = {
        "endpoint": "f1_macro, external", "strategy": strategy, "against": against, "difference": difference,
        "ci_low": difference - half, "ci_high": difference + half, "p": p / 3, "p_holm": p,
        "seeds": [difference] * 5, "primary": True, "n_groups": 100, "tier": 1,
    }  # fmt: skip
    return Effect(**values | fields)


def test_verdicts_need_interval_correction_seeds_and_a_real_test() -> None:
    assert effect("a", "label", 0.05, 0.02, 0.004).verdict == BETTER
    assert effect("a", "label", -0.05, 0.02, 0.004).verdict == WORSE
    assert effect("a", "label", 0.05, 0.02, 0.06).verdict == UNCLEAR
    assert effect("a", "label", 0.002, 0.01, 1.0).verdict == SAME
    assert effect("a", "label", 0.01, 0.03, 1.0).verdict == UNCLEAR
    assert effect("a", "label", 0.05, 0.02, 0.004, seeds=[0.05, 0.05]).verdict == UNCLEAR
    assert effect("a", "label", 0.05, 0.02, 0.004, ci_low=None, ci_high=None).verdict == UNCLEAR
    assert effect("a", "label", 0.05, 0.02, 0.004, p_holm=None).verdict == UNCLEAR
    assert effect("a", "label", 0.05, 0.02, 0.004, tested=False).verdict == NO_TEST


def test_a_clear_win_a_clear_null_and_an_unclear_effect_have_their_sentences() -> None:
    assert verdicts.sentence(effect("narrative", "image-only", 0.06, 0.02, 0.0003)) == (
        "narrative is better than image-only: +0.060 (95 % interval +0.040 to +0.080, corrected p < 0.001); "
        "5 of 5 seeds agree."
    )
    assert verdicts.sentence(effect("template", "label", 0.001, 0.008, 1.0)) == (
        "template and the class name alone differ by less than 0.02 either way: "
        "+0.001 (95 % interval −0.007 to +0.009, corrected p 1.000)."
    )
    assert verdicts.sentence(effect("abcd", "shuffled_within_class", 0.01, 0.04, 0.9)) == (
        "abcd against other images' notes of the same class: the evidence does not suffice, +0.010 (95 % interval "
        "−0.030 to +0.050, corrected p 0.900); a gain of 0.050 and a loss of 0.030 would fit the data as well as none."
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seeds": [0.05]}, "1 seed is too few, 3 are needed"),
        ({"p_holm": 0.08}, "not after correction for the number of comparisons"),
        ({"ci_low": None, "ci_high": None}, "it has no interval"),
        ({"ci_low": 0.004}, "the effect may be smaller than 0.02"),
        ({"tested": False}, "not a test of this strategy"),
    ],
)
def test_a_sentence_says_what_is_missing(changes: dict[str, Any], says: str) -> None:
    said = verdicts.sentence(effect("a", "image-only", 0.05, 0.02, 0.01, **changes))
    assert says in said


@pytest.mark.parametrize(
    ("differences", "says"),
    [
        ((0.06, 0.05, 0.05), "beyond the label, and by what they say of the image"),
        ((0.06, 0.05, 0.00), "beats image-only and the class name alone, but not shown"),
        ((0.06, 0.00, 0.00), "by more than the class name is not shown"),
        ((0.00, 0.00, 0.00), "No strategy helps under shift"),
        ((-0.06, -0.05, 0.0), "No strategy helps under shift"),
    ],
)
def test_the_conclusion_claims_what_all_three_comparisons_carry(
    differences: tuple[float, float, float], says: str
) -> None:
    effects = [
        effect("narrative", against, d, 0.015, 0.001 if abs(d) > 0.015 else 1.0)
        for against, d in zip(verdicts.AGAINST, differences, strict=True)
    ]
    assert says in verdicts.conclusion(effects)


def test_without_evidence_the_conclusion_claims_nothing() -> None:
    effects = [effect("narrative", against, 0.03, 0.05, 0.6) for against in verdicts.AGAINST]
    assert verdicts.conclusion(effects) == (
        "No strategy is shown to be better than image-only under shift: the evidence does not suffice for that claim."
    )
    assert [a.short for a in verdicts.answers(effects)] == ["Not shown: the evidence does not suffice."] * 3
    fallback = [effect("narrative", against, 0.06, 0.02, 0.001, tested=False) for against in verdicts.AGAINST]
    assert "nothing can be said" in verdicts.conclusion(fallback)


def test_secondary_endpoints_and_controls_carry_no_claim() -> None:
    wins = [effect("narrative", a, 0.06, 0.02, 0.001, primary=False) for a in verdicts.AGAINST]
    controls = [effect("shuffled", "image-only", 0.06, 0.02, 0.001)]
    assert verdicts.answers([*wins, *controls]) == []
    assert "nothing can be said" in verdicts.conclusion([*wins, *controls])


def study_rows() -> list[dict[str, Any]]:
    """study.parquet by closed form: the base value, the arm's gain on external sets, a step for each seed."""
    rows = []
    for strategy, gain in ARMS.items():
        for seed in range(3):
            head = {"cell": f"t1-{strategy}-s{seed}", "strategy": strategy, "engine": "none", "objective": "standard"}
            values = {d: v + (seed - 1) * 0.01 + (gain if d in EXTERNAL else 0) for d, v in BASE.items()}
            scopes = [("dataset", d, v) for d, v in values.items()]
            scopes += [("partition", "internal", values["Int"]), ("partition", "external", values["Ext_a"])]
            rows += [
                head | {"seed": seed, "tier": 1, "task": "classify-image", "scope_kind": kind, "scope": scope,
                        "class_set": "classes", "metric": "f1_macro", "value": v, "ci_low": v - 0.05,
                        "ci_high": v + 0.05, "n": 10, "chance": 0.1, "track": None, "eval_strategy": None}
                for kind, scope, v in scopes
            ]  # fmt: skip
    return rows


def study_effects() -> list[dict[str, Any]]:
    """effects.parquet: narrative wins everywhere; template equals the label; against image-only template is unclear."""
    told = {
        ("narrative", "image-only"): (0.06, 0.02, 0.001), ("narrative", "label"): (0.04, 0.015, 0.002),
        ("narrative", "shuffled_within_class"): (0.04, 0.015, 0.002), ("template", "image-only"): (0.021, 0.03, 0.4),
        ("template", "label"): (0.001, 0.01, 1.0), ("template", "shuffled_within_class"): (0.001, 0.01, 1.0),
    }  # fmt: skip
    return [
        {"tier": 1, "strategy": s, "engine": "none", "objective": "standard", "reference": r, "metric": "f1_macro",
         "scope": "external", "primary": True, "effect": d, "ci_low": d - h, "ci_high": d + h, "p": p / 2, "p_holm": p,
         "per_seed": [d - 0.01, d, d + 0.01], "tested": True, "groups": 123}
        for (s, r), (d, h, p) in told.items()
    ]  # fmt: skip


@pytest.fixture
def make_study(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a study's folder; `tested` False makes narrative mostly template."""

    def make(tested: bool = True) -> Path:
        folder = tmp_path / "a <study>"
        (folder / "cells").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(study_rows()), folder / "study.parquet")
        pq.write_table(pa.Table.from_pylist(study_effects()), folder / "effects.parquet")
        summary = {"protocol": {"internal": ["Int"], "external": EXTERNAL}, "looks_at_external": 15, "resamples": 2000}
        (folder / "study.json").write_text(json.dumps(summary | {"selection": "by validation <only>"}))
        (folder / "study.yaml").write_text("strategies: [narrative]\n")
        for strategy in ("narrative", "template"):
            cell = {
                "strategy": strategy, "engine": "none", "tier": 1, "manifest": "abc123", "versions": {"torch": "2.14"},
                "search": {"tries": [{"lr": 0.001, "f1_macro": 0.5}, {"lr": 0.003, "f1_macro": 0.6}], "chosen": 1},
                "notes": {"num": 90, "coverage": 0.9, "distinct": 80, "mean_words": 21.5, "label_access": ["given"],
                          "sources": {"generated": 30, "template": 60}, "fallback": 2 / 3,
                          "tested": tested or strategy != "narrative"},
            }  # fmt: skip
            (folder / "cells" / f"{strategy}.json").write_text(json.dumps(cell))
        return folder

    return make


def test_the_page_says_what_the_numbers_say(make_study: Callable[..., Path]) -> None:
    text = write_study_page(make_study()).read_text()
    assert "narrative beats image-only, the class name alone and other images&#39; notes of the same class" in text
    assert "Yes for narrative; not shown for template." in text
    assert "template against image-only: the evidence does not suffice" in text
    assert "template and the class name alone differ by less than 0.02" in text
    assert "15: every finished cell" in text
    assert "by validation &lt;only&gt;" in text
    assert "a &lt;study&gt;" in text
    for part in ("abc123", "torch 2.14", "lr 0.003", "2000", "67 %", "prefers-color-scheme: dark"):
        assert part in text


def test_the_page_of_a_study_loads_nothing_and_describes_its_drawings(make_study: Callable[..., Path]) -> None:
    text = write_study_page(make_study()).read_text()
    assert not re.search(r"<script|<link|<img|@import|url\((?!#)|(?:src|href)=\"(?!#)", text)
    drawings = re.findall(r'<svg [^>]*role="img" aria-label="([^"]+)"', text)
    assert len(drawings) == 5  # three forests, the seeds, the gaps
    assert "narrative +0.060 (better); template +0.021 (unclear)" in drawings[0]


def test_a_strategy_of_fallen_back_notes_is_no_test(make_study: Callable[..., Path]) -> None:
    text = write_study_page(make_study(tested=False)).read_text()
    assert "narrative: more than half of its notes fell back to the template; not a test of this strategy." in text
    assert "beats" not in text
    assert "No strategy is shown to be better than image-only" in text


def test_the_markdown_table_holds_means_and_effects(make_study: Callable[..., Path]) -> None:
    lines = study_table(make_study()).splitlines()
    cells = {
        line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in lines if line[:1] == "|"
    }
    assert cells["strategy"][:4] == ["Int", "Ext_a", "Ext_b", "external mean"]
    assert cells["image-only"][:4] == ["0.600", "0.400", "0.200", "0.300"]
    assert cells["narrative"][:5] == ["0.600", "0.460", "0.260", "0.360", "+0.060 (+0.040 to +0.080)\\*"]
    assert cells["template"][5] == "+0.001 (−0.009 to +0.011)"
    assert lines[0].startswith("Tier 1, frozen towers. narrative beats image-only")


def test_effects_may_come_as_json(make_study: Callable[..., Path]) -> None:
    folder = make_study()
    before = write_study_page(folder).read_text()
    (folder / "effects.parquet").unlink()
    renamed = {"reference": "against", "effect": "difference", "per_seed": "seeds", "groups": "n_groups"}
    rows = [{renamed.get(k, k): v for k, v in row.items()} for row in study_effects()]
    (folder / "effects.json").write_text(json.dumps(rows))
    assert write_study_page(folder).read_text() == before


def test_several_engines_stand_apart(make_study: Callable[..., Path]) -> None:
    folder = make_study()
    rows = study_rows()
    rows += [row | {"engine": "large", "value": row["value"] + 0.1} for row in rows if row["strategy"] == "narrative"]
    pq.write_table(pa.Table.from_pylist(rows), folder / "study.parquet")
    text = study_table(folder)
    assert "| narrative · large | 0.700 | 0.560 |" in text
    assert "| narrative · none | 0.600 | 0.460 |" in text


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: (f / "study.parquet").unlink(), "study.parquet: is missing; run `dermfm study`"),
        (lambda f: (f / "study.parquet").write_bytes(b"PAR1"), "study.parquet: cannot be read"),
        (lambda f: pq.write_table(pa.table({"strategy": ["a"]}), f / "study.parquet"), "no column 'engine'"),
        (lambda f: (f / "effects.parquet").unlink(), "effects.parquet: is missing"),
        (lambda f: pq.write_table(pa.table({"strategy": ["a"]}), f / "effects.parquet"), "an effect has no 'against'"),
        (lambda f: (f / "cells" / "template.json").write_text("{"), "template.json: cannot be read"),
        (lambda f: (f / "study.json").write_text("[1]"), "study.json: is not a JSON object"),
    ],
)
def test_a_damaged_study_is_one_line_and_exit_2(
    make_study: Callable[..., Path], capsys: pytest.CaptureFixture, spoil: Callable[[Path], Any], says: str
) -> None:
    folder = make_study()
    spoil(folder)
    assert main(["report", f"study={json.dumps(str(folder))}"]) == 2
    error = capsys.readouterr().err.strip()
    assert says in error
    assert "\n" not in error
    assert not (folder / "report.html").exists()


def test_run_and_study_contradict_each_other(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["report", f"study={tmp_path}", f"run={tmp_path}"]) == 2
    assert "run and study: give one of the two" in capsys.readouterr().err
    assert main(["report", f"study={tmp_path / 'nowhere'}"]) == 2
    assert "is not a folder" in capsys.readouterr().err


def test_seeds_of_a_mean_are_all_shown() -> None:
    from dermfm.report.study_tables import scores

    (line,) = [x for x in scores(study_rows(), 1, EXTERNAL).lines if x.name == "narrative"]
    np.testing.assert_allclose(line.endpoint, [0.35, 0.36, 0.37])
    assert line.cells[-1].interval == "seeds 0.350–0.370"
    assert line.cells[-1].best
