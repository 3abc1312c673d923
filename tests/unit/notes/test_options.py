"""Structured strategies: their schema, reading an answer, and the text that a structure becomes."""

from __future__ import annotations

import json

import pytest

from dermfm.config import InputError
from dermfm.notes.checks import find_faults
from dermfm.notes.engines.protocol import EngineConfig, Generation
from dermfm.notes.options import read_structure
from dermfm.notes.plan import NotesConfig, PlannedNote
from dermfm.notes.strategies import find_strategies
from dermfm.notes.synthesize import make_item
from dermfm.notes.write import NoteWriter

MEASURED = {
    "measured_asymmetry_word": "asymmetric", "measured_border_word": "sharp", "measured_colours": ["red", "black"],
    "measured_dots": 90, "measured_globules": 2, "measured_structureless": 0.5,
}  # fmt: skip
RIGHT = {
    "asymmetry": "asymmetric",
    "border": "sharp",
    "colours": ["red", "black"],
    "structures": ["structureless areas", "dots"],
}
VALID = [
    json.dumps(RIGHT),
    "```json\n" + json.dumps(RIGHT, indent=1) + "\n```",
    json.dumps({**RIGHT, "colours": ["red", "red", "black"]}),
    json.dumps({**RIGHT, "structures": []}),
]
INVALID = [
    ("", "option: no JSON object"),
    ("asymmetric, sharp", "option: no JSON object"),
    (json.dumps(RIGHT)[:-1], "option: no JSON object"),
    ("[" * 5000, "option: no JSON object"),
    ("[]", "option: no JSON object"),
    (json.dumps({**RIGHT, "border": "jagged"}), "option: border (jagged)"),
    (json.dumps({**RIGHT, "border": ["sharp"]}), "option: border (['sharp'])"),
    (json.dumps({**RIGHT, "colours": "red"}), "option: colours (not a list of at least 1)"),
    (json.dumps({**RIGHT, "colours": []}), "option: colours (not a list of at least 1)"),
    (json.dumps({**RIGHT, "colours": ["red", "teal", {}]}), "option: colours (teal)"),
    (json.dumps({**RIGHT, "size": "4 mm"}), "option: size (not asked for)"),
    (json.dumps({"border": "sharp"}), "option: asymmetry (not given)"),
    (json.dumps({**RIGHT, "structures": ["pigment network"]}), "option: structures (pigment network)"),
]


@pytest.fixture
def abcd(record):
    (strategy,) = find_strategies(["abcd"])
    return strategy, {**record("a"), **MEASURED}


@pytest.mark.parametrize("answer", VALID)
def test_a_valid_answer_becomes_a_structure(abcd, answer):
    structure, faults = read_structure(answer, abcd[0].options)
    assert faults == []
    assert structure["colours"] == ["red", "black"]


@pytest.mark.parametrize(("answer", "fault"), INVALID)
def test_an_answer_outside_the_options_is_a_fault_by_name(abcd, answer, fault):
    structure, faults = read_structure(answer, abcd[0].options)
    assert structure == {}
    assert fault in faults


def test_an_engine_without_images_is_offered_only_what_can_be_measured():
    blind, seeing = (find_strategies(["abcd", "characteristics"], takes_images=lambda v=v: v) for v in (False, True))
    structures = [s.options["properties"]["structures"]["items"]["enum"] for s in (blind[0], seeing[0])]
    assert [len(s) for s in structures] == [3, 5]
    assert "lesion_type" not in blind[1].options["properties"]
    assert "lesion_type" in seeing[1].options["required"]
    assert [s[0].facts_source for s in (blind, seeing)] == ["measured", "image"]
    assert not any(field.startswith("measured_") for field in seeing[0].fields)


@pytest.mark.parametrize("name", ["abcd", "characteristics"])
def test_the_text_of_the_measured_structure_passes_the_checks_in_every_wording(name, record):
    (strategy,) = find_strategies([name])
    texts = set()
    for k in range(60):
        border = ("sharp", "indistinct", "mixed")[k % 3]
        one = {**record(f"r{k}", [2, 5, 6][k % 3]), **MEASURED, "measured_border_word": border}
        text = strategy.fallback(one)
        assert find_faults(text, strategy.facts(one), strategy.rules) == [], text
        texts.add(text)
    assert len(texts) > 20


def test_the_text_of_a_structure_depends_on_the_record_alone(abcd):
    strategy, record = abcd
    assert strategy.realise(RIGHT, record) == strategy.realise(dict(RIGHT), {**record, "label": 6})


def written(abcd, answer, **keys):
    strategy, record = abcd

    class Scripted:
        def generate(self, requests):
            return [Generation(answer, 9) for _ in requests]

    item = make_item(PlannedNote("id", 0, strategy, 1), record, NotesConfig(records="r", out="o"))
    (row,) = NoteWriter(EngineConfig(**keys), engine=Scripted()).work([item])
    return row, item


def test_a_valid_answer_that_miscopies_an_attribute_is_repaired_and_says_so(abcd):
    row, item = written(abcd, json.dumps({**RIGHT, "border": "indistinct"}))
    assert any(fault.startswith("contradiction: border") for fault in row["first_faults"])
    assert row["source"] in ("repaired", "template")
    assert find_faults(row["text"], item.facts) == []


def test_an_invalid_answer_falls_back_to_the_measured_structure(abcd):
    row, item = written(abcd, "{}")
    assert row["source"] == "template"
    assert row["text"] == item.request.fallback
    assert row["faults"][0].startswith("option: ")


def test_a_right_answer_is_kept_as_realised(abcd):
    row, _ = written(abcd, json.dumps(RIGHT))
    assert (row["source"], row["first_faults"]) == ("generated", [])
    assert "{" not in row["text"]
    assert row["seconds"] >= 0


@pytest.mark.parametrize("name", ["open", "native", "native_blind"])
def test_a_strategy_that_needs_the_image_is_refused_for_an_engine_without(name):
    with pytest.raises(InputError, match=f"'{name}' needs an engine that takes images"):
        find_strategies([name])


def test_a_mix_cannot_be_written_and_names_what_can():
    with pytest.raises(InputError, match="abcd, characteristics, template"):
        find_strategies(["all"])
