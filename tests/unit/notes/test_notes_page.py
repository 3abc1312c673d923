"""The page about a notes folder, and the measures on it."""

from __future__ import annotations

import math
import re

import pytest

from dermfm.notes import store
from dermfm.notes.information import text_label_information
from dermfm.notes.plan import NotesConfig, make_plan, record_of
from dermfm.notes.synthesize import make_item
from dermfm.notes.write import NoteWriter
from dermfm.records.table import read_records
from dermfm.report.synthesis import distinct_share, self_overlap, write_notes_page


class Careless:
    """An engine that adds a sentence to every second note, and a symptom to every fourth."""

    def generate(self, requests):
        from dermfm.notes.engines.protocol import Generation

        more = ["", " It is rare.", "", " It itches."]
        return [Generation(r.fallback + more[r.seed % 4], 20) for r in requests]


@pytest.fixture
def folder(records_file, record, tmp_path):
    path = records_file([record(f"i{k}", [2, 5, 6][k % 3], findings="<i>odd</i>") for k in range(30)])
    table = read_records(path)
    config = NotesConfig(records=str(path), out=str(tmp_path / "notes"), strategies=["template", "narrative"])
    plan = make_plan(config, table, "1")
    writer = NoteWriter(config.engine, engine=Careless())
    for index, ids in plan.parts.items():
        notes = [plan.notes[note_id] for note_id in ids]
        store.write_part(config.out, index, writer.work([make_item(n, record_of(table, n.row), config) for n in notes]))
    return config, table


def test_the_page_shows_faults_before_and_after_and_loads_nothing(folder, tmp_path):
    page = write_notes_page(*folder, tmp_path / "page.html").read_text()
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", page)
    assert "<i>odd" not in page
    assert "&lt;i&gt;odd" in page
    faults = page[page.index('id="faults"') : page.index('id="content"')]
    released = faults[faults.index("released") :]
    assert re.search(r">100.0 %</td></tr>", released), "every given fact is stated in what is released"
    assert not re.search(r"<td>[1-9][\d.]* %</td>(?=<td>)", released), "no kind of fault is left in what is released"
    assert re.search(r"--alpha: 0\.[1-4]", faults), "the first answers had some"


def test_notes_of_before_the_later_columns_can_still_be_read(folder):
    import pyarrow.parquet as pq

    config, _ = folder
    path = store.done_parts(config.out)[0]
    pq.write_table(pq.read_table(path).drop_columns(["first_faults", "seconds"]), path)
    rows = store.read_notes(config.out).to_pylist()
    assert any(row["seconds"] is None for row in rows)


def test_label_information_is_one_where_texts_name_the_class_and_chance_where_they_do_not():
    labels = [k % 4 for k in range(200)]
    told = [f"a lesion of kind {'abcd'[label]}" for label in labels]
    mute = [f"a lesion number {k // 4 % 7}" for k in range(200)]
    assert text_label_information(told[:100], labels[:100], told[100:], labels[100:]) == 1
    assert text_label_information(mute[:100], labels[:100], mute[100:], labels[100:]) == pytest.approx(0.25, abs=0.01)
    assert text_label_information(told[:1], [2], told[100:], labels[100:]) == 0.25
    assert math.isnan(text_label_information([], [], told, labels))


def test_diversity_counts_what_repeats():
    assert distinct_share(["a b", "a c"], 1) == 3 / 4
    assert distinct_share(["a b", "a b"], 2) == 1 / 2
    assert self_overlap(["a b c d e", "a b c d f"]) == 1 / 2
    assert math.isnan(distinct_share([], 1))
