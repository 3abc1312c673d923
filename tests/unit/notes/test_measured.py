"""The strategy without a model and without the label: measured attributes in words."""

from __future__ import annotations

import re

import pytest

from dermfm.config import InputError
from dermfm.notes.checks import examine
from dermfm.notes.facts import visible_facts
from dermfm.notes.plan import NotesConfig, make_plan
from dermfm.notes.strategies import find_strategies
from dermfm.records.measure.columns import COLOURS, SHARE_COLUMNS
from dermfm.records.table import read_records

FIELDS = [
    "modality", "age", "sex", "site", "measured_asymmetry_word", "measured_border_word", "measured_colours",
    "measured_dots", "measured_globules", "measured_structureless",
]  # fmt: skip


def measured_record(record, k):
    """A record with one of many combinations of measured values."""
    shares = dict.fromkeys(SHARE_COLUMNS, 0.0)
    colours = [COLOURS[k % 6], COLOURS[(k + 2) % 6]][: 1 + k % 2]
    shares |= {SHARE_COLUMNS[COLOURS.index(c)]: 0.5 for c in colours}
    return record(
        f"m{k}", [2, 5, 6][k % 3], **shares,
        measured_asymmetry_word=["symmetric", "asymmetric"][k % 2], measured_asymmetry=0.02 * (k % 20),
        measured_border_word=["sharp", "indistinct", "mixed"][k % 3], measured_border_irregularity=0.03 * (k % 10),
        measured_colours=[c for c in COLOURS if c in colours], measured_size=0.1 + 0.1 * (k % 9),
        measured_dots=20 * (k % 6), measured_globules=4 * (k % 6), measured_structureless=0.1 * (k % 8),
        measured_texture=1.0 + k % 7,
        measured_skin_tone=["light", "brown", None][k % 3], measured_border_sharpness=0.5,
    )  # fmt: skip


def test_the_text_states_every_measured_word_and_contradicts_none(record):
    (strategy,) = find_strategies(["measured"])
    texts = set()
    for k in range(120):
        one = measured_record(record, k)
        text = strategy.fallback(one)
        wrong = [f for f in examine(text, visible_facts(one, FIELDS)) if f.kind in ("missing", "contradiction")]
        assert not wrong, (text, wrong)
        assert not re.search(r"nevus|carcinoma|melanoma|benign|malignant|None|  |\{", text), text
        texts.add(text)
    assert len(texts) == 120


def test_the_same_record_always_gets_the_same_text(record):
    (strategy,) = find_strategies(["measured"])
    assert strategy.fallback(measured_record(record, 3)) == strategy.fallback(measured_record(record, 3))


def test_a_record_whose_lesion_was_not_found_gets_no_measured_note(record):
    (strategy,) = find_strategies(["measured"])
    assert strategy.fallback(measured_record(record, 3) | {"measured_border_word": None}) is None


def test_records_without_measured_columns_are_refused_with_the_remedy(records_file, tmp_path):
    path = records_file()
    config = NotesConfig(records=str(path), out=str(tmp_path / "notes"), strategies=["measured"])
    with pytest.raises(InputError, match="measure=true"):
        make_plan(config, read_records(path), "")
