"""Planning, parts, and what a second run does."""

from __future__ import annotations

from collections import Counter

import pytest

from dermfm.config import InputError
from dermfm.notes import store
from dermfm.notes.engines.protocol import EngineConfig
from dermfm.notes.plan import NotesConfig, make_plan, spread
from dermfm.notes.synthesize import plan_notes, synthesize
from dermfm.records.table import read_records
from launch.cli import main


def config(path, out, **keys):
    keys.setdefault("strategies", ["template", "label"])
    return NotesConfig(records=str(path), out=str(out), ray="never", **keys)


def run(config_):
    plan, table = plan_notes(config_)
    return plan, synthesize(config_, plan, table)


def test_each_note_is_in_the_folder_once_and_a_second_run_makes_nothing(records_file, tmp_path):
    settings = config(records_file(), tmp_path / "notes", part_size=7)
    plan, tally = run(settings)
    assert sum(tally.made.values()) == 60
    files = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "notes").glob("part-*.parquet")}
    again, tally = run(settings)
    assert again.num_missing == 0
    assert not tally.made
    assert files == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "notes").glob("part-*.parquet")}
    ids = store.read_notes(tmp_path / "notes").column("note_id").to_pylist()
    assert sorted(ids) == sorted(plan.notes)
    assert len(set(ids)) == 60


def test_a_lost_part_is_made_again_with_the_same_notes_in_the_same_order(records_file, tmp_path):
    settings = config(records_file(), tmp_path / "notes", part_size=7)
    run(settings)
    lost = tmp_path / "notes" / "part-00003.parquet"
    before = lost.read_bytes()
    lost.unlink()
    plan, _ = run(settings)
    assert plan.missing == [3]
    assert lost.read_bytes() == before


def test_another_strategy_is_added_beside_what_is_done(records_file, tmp_path):
    path = records_file()
    run(config(path, tmp_path / "notes", strategies=["label"]))
    plan, tally = run(config(path, tmp_path / "notes", strategies=["template", "label"]))
    assert set(tally.made) == {("template", "template")}
    assert len(store.read_notes(tmp_path / "notes")) == 60
    assert plan.num_missing == 30


def test_a_part_of_an_older_plan_that_is_no_longer_wanted_whole_is_cut_anew(records_file, tmp_path):
    path = records_file()
    settings = config(path, tmp_path / "notes", part_size=100)
    table = read_records(path)
    plan = make_plan(settings, table, "")
    store.write_plan(tmp_path / "notes", plan.parts)
    only = config(path, tmp_path / "notes", part_size=100, strategies=["label"])
    again = make_plan(only, table, "")
    assert sum(len(again.parts[i]) for i in again.missing) == 30
    assert {n.strategy.name for n in again.notes.values()} == {"label"}


def test_corrected_metadata_makes_a_new_note_and_other_fields_do_not(records_file, tmp_path, record):
    settings = config(tmp_path / "records.parquet", tmp_path / "notes")
    old = set(make_plan(settings, read_records(records_file([record("a")])), "").notes)
    same = set(make_plan(settings, read_records(records_file([record("a", age=80.0)])), "").notes)
    new = set(make_plan(settings, read_records(records_file([record("a", 5)])), "").notes)
    assert same == old
    assert not new & old


def test_the_limit_is_spread_over_classes_and_a_larger_one_contains_a_smaller(record):
    records = [record(f"i{k}", 6 if k < 4 else 2, split="train") for k in range(100)]
    few = spread(records, range(100), 6, seed=0)
    assert Counter(records[i]["label"] for i in few) == {6: 3, 2: 3}
    assert set(few) < set(spread(records, range(100), 20, seed=0))
    assert few != spread(records, range(100), 6, seed=1)


def test_records_of_other_splits_get_no_note(records_file, tmp_path, record):
    path = records_file([record("a", split="train"), record("b", split="test")])
    plan, _ = plan_notes(config(path, tmp_path / "notes", splits=["test"], strategies=["label"]))
    assert len(plan.notes) == 1


def test_a_folder_without_parts_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no part"):
        store.read_notes(tmp_path)


def test_a_broken_part_is_named(tmp_path):
    (tmp_path / "part-00000.parquet").write_bytes(b"no parquet")
    with pytest.raises(InputError, match="part-00000"):
        store.read_notes(tmp_path)


def test_the_written_schema_is_the_contract(records_file, tmp_path):
    run(config(records_file(), tmp_path / "notes"))
    names = "note_id record_id strategy engine model prompt_version seed attempt text label_access facts_source source"
    names += " faults num_tokens error first_faults seconds"
    assert store.read_notes(tmp_path / "notes").column_names == names.split()


@pytest.mark.parametrize(("key", "value"), [("strategies", []), ("limit", 0), ("ray", "maybe"), ("splits", ["tset"])])
def test_a_bad_key_is_refused(key, value):
    with pytest.raises(ValueError, match=key):
        NotesConfig(records="r", out="o", **{key: value})


def test_a_model_over_several_processes_without_ray_is_refused_before_anything_is_planned():
    with pytest.raises(ValueError, match="3 processes are started on Ray only"):
        NotesConfig(records="r", out="o", ray="never", engine=EngineConfig(tensor_parallel=3))


def test_a_share_of_an_array_with_nothing_to_do_ends_well_and_so_does_a_node_that_would_help_it(
    records_file, tmp_path, capsys, monkeypatch
):
    words = ["notes", f"records={records_file()}", f"out={tmp_path / 'notes'}", "strategies=[template]", "share=[1,2]"]
    assert main(words) == 0
    monkeypatch.setenv("SLURM_PROCID", "1")  # the second task of the job: it waits for no Ray that nobody starts
    assert main([*words, "address=slurm"]) == 0
    said = capsys.readouterr()
    assert "0 done, 0 to do, 30 left to the other shares" in said.out
    assert said.err == ""
