"""The shuffled controls: who gets whose note."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dermfm.config import InputError
from dermfm.notes import controls, store
from dermfm.notes.plan import NotesConfig


def tables(groups: list[str], labels: list[int | None], splits: list[str] | None = None) -> tuple[pa.Table, pa.Table]:
    """Records of these groups and labels, and a narrative note of each."""
    ids = [f"r{i}" for i in range(len(groups))]
    records = pa.table(
        {
            "record_id": ids,
            "split": pa.array(splits or ["train"] * len(ids)),
            "label": pa.array(labels, pa.int64()),
            "group_id": groups,
        }
    )
    row = {"strategy": "narrative", "engine": "transformers", "model": "m", "prompt_version": "1", "seed": 0}
    row |= {"attempt": 0, "label_access": "given", "facts_source": "metadata", "source": "repaired", "faults": []}
    row |= {"num_tokens": 3, "error": None}
    notes = [row | {"note_id": f"n{i}", "record_id": i, "text": f"note of {i}"} for i in ids]
    return pa.Table.from_pylist(notes, schema=store.NOTE_SCHEMA), records


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.integers(0, 5))
def test_nobody_gets_the_note_of_the_own_group_and_each_is_used_once_where_that_can_be(groups, seed):
    names = list(map(str, groups))
    donors = controls.assign(names, seed)
    if len(set(groups)) == 1:
        assert donors is None
        return
    assert donors is not None
    assert all(names[i] != names[d] for i, d in enumerate(donors))
    if 2 * max(Counter(names).values()) <= len(names):
        assert sorted(donors) == list(range(len(names)))
    assert np.array_equal(donors, controls.assign(names, seed))


def test_another_seed_shuffles_otherwise():
    names = list(map(str, range(50)))
    first, second = controls.assign(names, 0), controls.assign(names, 1)
    assert first is not None
    assert second is not None
    assert (first != second).mean() > 0.8


def test_within_class_keeps_the_class_and_counts_a_class_of_one_group():
    groups = ["a", "a", "b", "c", "d", "e", "e"]
    labels = [0, 0, 0, 1, 1, 2, 2]
    notes, records = tables(groups, labels)
    derived = controls.derive(notes, records, "shuffled_within_class", "narrative")
    assert derived.without == {"2": 2}
    place = {f"r{i}": i for i in range(len(groups))}
    for row in derived.rows:
        donor = place[row["text"].removeprefix("note of ")]
        own = place[row["record_id"]]
        assert labels[own] == labels[donor]
        assert groups[own] != groups[donor]
    assert len(derived.rows) == 5


def test_only_training_records_give_and_get_notes():
    notes, records = tables(["a", "b", "c", "d"], [0, 0, 0, 0], ["train", "train", "test", "valid"])
    rows = controls.derive(notes, records, "shuffled", "narrative").rows
    assert {row["record_id"]: row["text"] for row in rows} == {"r0": "note of r1", "r1": "note of r0"}


def test_a_row_tells_its_source_and_keeps_what_is_known_of_the_note():
    notes, records = tables(["a", "b"], [0, 1])
    row = controls.derive(notes, records, "shuffled", "narrative").rows[0]
    assert (row["engine"], row["model"], row["strategy"]) == ("derived", "narrative", "shuffled")
    assert (row["label_access"], row["source"]) == ("given", "repaired")
    assert len(row["note_id"]) == 16


def test_a_changed_source_note_makes_a_new_note():
    notes, records = tables(["a", "b"], [0, 1])
    before = {row["note_id"] for row in controls.derive(notes, records, "shuffled", "narrative").rows}
    changed = notes.set_column(notes.schema.get_field_index("text"), "text", pa.array(["x", "y"]))
    after = {row["note_id"] for row in controls.derive(changed, records, "shuffled", "narrative").rows}
    other = {row["note_id"] for row in controls.derive(notes, records, "shuffled", "narrative", seed=1).rows}
    assert before.isdisjoint(after)
    assert before.isdisjoint(other)


def test_they_join_the_folder_once(tmp_path: Path):
    notes, records = tables(["a", "b", "c"], [0, 0, 0])
    store.write_part(tmp_path, 3, notes.to_pylist())
    config = NotesConfig(records="unused", out=str(tmp_path), strategies=["shuffled", "shuffled_within_class"])
    assert controls.write_controls(config, records) == {"shuffled": 3, "shuffled_within_class": 3}
    assert controls.write_controls(config, records).total() == 0
    found = store.read_notes(tmp_path)
    assert Counter(found.column("strategy").to_pylist()) == {"narrative": 3, "shuffled": 3, "shuffled_within_class": 3}


def test_a_source_without_notes_is_named():
    notes, records = tables(["a", "b"], [0, 1])
    with pytest.raises(InputError, match=r"of: no training note of strategy 'narative'.*did you mean 'narrative'"):
        controls.derive(notes, records, "shuffled", "narative")
    with pytest.raises(ValueError, match="of: 'shuffled' is itself made"):
        NotesConfig(records="r", out="o", of="shuffled")
    with pytest.raises(ValueError, match="share: 'shuffled' needs all notes"):
        NotesConfig(records="r", out="o", strategies=["shuffled"], share=[0, 2])


def test_controls_without_the_notes_that_they_are_made_of_are_refused(tmp_path):
    settings = NotesConfig(records="r", out=str(tmp_path), strategies=["shuffled"])
    with pytest.raises(InputError, match=r"of: .* no notes of 'narrative' .*holds none at all"):
        controls.check_source(settings)
    notes, _ = tables(["a", "b"], [0, 1])
    store.write_part(tmp_path, 0, notes.to_pylist())
    controls.check_source(settings)
    with pytest.raises(InputError, match=r"no notes of 'narative' .* did you mean 'narrative'"):
        controls.check_source(NotesConfig(records="r", out=str(tmp_path), strategies=["shuffled"], of="narative"))
    controls.check_source(NotesConfig(records="r", out=str(tmp_path), strategies=["template"], of="narative"))


def test_a_folder_that_cannot_be_is_told_as_such(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/part-00000\.parquet: cannot be written"):
        store.write_part(tmp_path / "file", 0, [])
