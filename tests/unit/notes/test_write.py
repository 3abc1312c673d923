"""From generation to row: checks, second tries, repair, fallback, and errors of single requests."""

from __future__ import annotations

import pytest

from cluster.replicas import ReplicaLost
from dermfm.notes import synthesize as job
from dermfm.notes.engines.protocol import EngineConfig, Generation
from dermfm.notes.plan import NotesConfig, make_plan, record_of
from dermfm.notes.synthesize import TooManyFailures, make_item, plan_notes, synthesize
from dermfm.notes.write import NoteWriter, generate_surely
from dermfm.records.table import read_records

GOOD = "Dermoscopic image of a compound nevus on the back of a 55-year-old woman. It is benign."


class Scripted:
    """An engine that answers from a list, one entry an attempt; an entry that is an exception is raised."""

    def __init__(self, *answers):
        self.answers = answers

    def generate(self, requests):
        answers = [self.answers[min(r.attempt, len(self.answers) - 1)] for r in requests]
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return [a if isinstance(a, Generation) else Generation(a, 9) for a in answers]


@pytest.fixture
def item(records_file, tmp_path, record):
    path = records_file([record("a")])
    settings = NotesConfig(records=str(path), out=str(tmp_path / "notes"), strategies=["narrative"])
    table = read_records(path)
    (note,) = make_plan(settings, table, "1").notes.values()
    return make_item(note, record_of(table, 0), settings)


def written(item, *answers, **keys):
    (row,) = NoteWriter(EngineConfig(**keys), engine=Scripted(*answers)).work([item])
    return row


def test_a_good_note_is_kept_as_generated(item):
    row = written(item, GOOD)
    assert (row["source"], row["text"], row["faults"], row["attempt"]) == ("generated", GOOD, [], 0)
    assert (row["label_access"], row["engine"], row["model"]) == ("given", "transformers", "smollm2")


def test_a_bad_note_is_tried_again(item):
    row = written(item, "It is malignant.", GOOD)
    assert (row["source"], row["text"], row["attempt"]) == ("regenerated", GOOD, 1)


def test_a_note_that_can_be_mended_is_repaired_and_keeps_its_faults(item):
    row = written(item, GOOD + " It is rare.")
    assert (row["source"], row["text"]) == ("repaired", GOOD)
    assert row["faults"] == ["unsupported: other (rare)"]


def test_a_note_that_drops_the_class_and_contradicts_is_replaced_by_the_template(item):
    row = written(item, "It is a malignant melanoma.")
    assert row["source"] == "template"
    assert "contradiction: diagnosis (melanoma)" in row["faults"]
    assert row["text"] == (
        "Dermoscopic image of a skin lesion. The patient is a 55-year-old woman. Site: back. "
        "Diagnosis: compound nevus. The lesion is benign."
    )


def test_an_answer_that_hit_the_token_limit_is_unfinished(item):
    row = written(item, Generation(GOOD, 80, finished=False), attempts=1)
    assert "unfinished" in row["faults"]


def test_one_request_that_always_fails_costs_no_other(item):
    class Picky:
        def generate(self, requests):
            if any(r.seed == 3 for r in requests):
                raise RuntimeError("seed 3")
            return [Generation(GOOD) for _ in requests]

    from dataclasses import replace

    requests = [replace(item.request, seed=k) for k in range(8)]
    answers = generate_surely(Picky(), requests)
    assert [a.error for a in answers] == [None, None, None, "RuntimeError: seed 3", None, None, None, None]


def test_a_request_that_fails_gets_the_template_and_its_error(item):
    row = written(item, RuntimeError("no memory"))
    assert row["source"] == "template"
    assert row["error"] == "RuntimeError: no memory"
    assert row["text"] == item.request.fallback


def test_a_second_try_that_fails_does_not_cost_the_first_ones_repair(item):
    row = written(item, GOOD + " It is rare.", RuntimeError("no memory"))
    assert (row["source"], row["text"], row["error"]) == ("repaired", GOOD, None)


def test_too_many_errors_stop_the_job(records_file, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "prepare_engine", lambda config: "1")
    monkeypatch.setattr(
        job, "NoteWriter", lambda config, repair: NoteWriter(config, engine=Scripted(ValueError("bad")))
    )
    settings = NotesConfig(
        records=str(records_file()), out=str(tmp_path / "notes"), strategies=["narrative"], ray="never", lease=5
    )
    plan, table = plan_notes(settings)
    with pytest.raises(TooManyFailures, match="max_failed_fraction"):
        synthesize(settings, plan, table)


def test_a_part_is_leased_in_equal_pieces(records_file, tmp_path, monkeypatch):
    class Counting(Scripted):
        def generate(self, requests):
            sizes.append(len(requests))
            return super().generate(requests)

    sizes: list[int] = []
    monkeypatch.setattr(job, "prepare_engine", lambda config: "1")
    monkeypatch.setattr(job, "NoteWriter", lambda config, repair: NoteWriter(config, engine=Counting(GOOD)))
    keys = {"records": str(records_file()), "out": str(tmp_path / "notes"), "strategies": ["narrative"]}
    once = EngineConfig(attempts=1)
    settings = NotesConfig(**keys, ray="never", lease=7, part_size=16, engine=once)
    plan, table = plan_notes(settings)
    synthesize(settings, plan, table)
    assert sizes == [5, 5, 6, 7, 7]  # 30 notes: parts of 16 and 14


def test_a_refusal_is_a_fault_and_no_text(item):
    row = written(item, Generation("I cannot help with that.", refused=True))
    assert (row["source"], row["faults"], row["error"]) == ("template", ["refusal"], None)


def test_a_replica_that_is_lost_is_no_fault_of_a_request(item):
    class Lost(Scripted):
        def generate(self, requests):
            raise ReplicaLost("gone")

    with pytest.raises(ReplicaLost):
        generate_surely(Lost(), [item.request] * 4)
