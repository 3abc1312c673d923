"""What is refused before a model is loaded, how fast work is told, and a disk that is full."""

from __future__ import annotations

import errno

import psutil
import pyarrow.parquet as pq
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster import replicas
from cluster.ray import RayError
from cluster.replicas import Resources, room_for
from dermfm.config import InputError
from dermfm.notes import room
from dermfm.notes.engines.protocol import EngineConfig
from dermfm.notes.pace import Pace
from dermfm.notes.plan import NotesConfig
from dermfm.notes.prompts import load_prompt
from dermfm.notes.store import read_notes
from dermfm.notes.synthesize import plan_notes, synthesize


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    return str(tiny.write_tiny_llm(tmp_path_factory.mktemp("models") / "llm"))


def nodes(monkeypatch, *found):
    monkeypatch.setattr(replicas, "_nodes", lambda: [{"CPU": 8.0, **n} for n in found])


def config(model, **keys):
    return NotesConfig(records="r", out="o", engine=EngineConfig(model=model), **keys)


def test_replicas_fill_the_cluster_a_bundle_a_shard_on_one_node_each_where_one_can_hold_them(monkeypatch):
    nodes(monkeypatch, {"GPU": 8.0}, {"GPU": 8.0}, {"GPU": 3.0})
    assert room_for(Resources(gpus=1.0)) == 19
    assert room_for(Resources(gpus=1.0, shards=4)) == 4
    assert room_for(Resources(gpus=1.0, shards=8)) == 2
    assert room_for(Resources(gpus=1.0, shards=16)) == 1  # over nodes: no node has 16


def test_a_replica_that_the_cluster_cannot_hold_is_refused_with_what_it_has(monkeypatch):
    nodes(monkeypatch, {"GPU": 2.0}, {"GPU": 2.0})
    with pytest.raises(RayError, match=r"8 bundles of 1 CPUs and 1 GPUs; the cluster holds 4 of them"):
        room_for(Resources(gpus=1.0, shards=8))
    with pytest.raises(RayError, match="no node has them"):
        room_for(Resources(gpus=4.0))


def test_a_model_in_main_memory_asks_for_that_memory(monkeypatch, model):
    settings = config(model)
    need = room.resources_of(settings, settings.engine)
    assert 300e6 < need.memory < 301e6
    nodes(monkeypatch, {"memory": 0.65e9})
    assert room_for(need) == 2
    nodes(monkeypatch, {"memory": 0.2e9})
    with pytest.raises(InputError, match=r"engine.model: .*0\.3 GB; no node has them"):
        room.check_cluster(settings, settings.engine, need)


def test_weights_larger_than_the_gpu_or_the_machine_are_refused(monkeypatch, model):
    settings = config(model, gpus_per_actor=1.0)
    monkeypatch.setattr(room, "weight_bytes", lambda engine: 90e9)
    nodes(monkeypatch, {"GPU": 4.0, "accelerator_type:A100-80G": 1.0})
    with pytest.raises(InputError, match=r"take 90\.0 GB a process, a GPU there has 80\.0 GB"):
        room.check_cluster(settings, settings.engine, Resources(gpus=1.0))
    assert room.check_cluster(settings, settings.engine, Resources(gpus=1.0, shards=2)) is None
    monkeypatch.setattr(room, "weight_bytes", lambda engine: psutil.virtual_memory().total + 1)
    with pytest.raises(InputError, match="this machine has"):
        room.check_here(settings.engine)


def test_more_replicas_than_fit_are_refused_and_a_number_must_be_one(monkeypatch, model):
    nodes(monkeypatch, {"memory": 64e9})
    settings = config(model, replicas="9")
    with pytest.raises(InputError, match="replicas: 9 do not fit, the cluster has room for 8"):
        room.check_cluster(settings, settings.engine, Resources())
    with pytest.raises(ValueError, match="replicas: 'many' is not valid"):
        config(model, replicas="many")


def test_rates_are_told_on_the_terminal_and_in_tensorboard(tmp_path):
    row = {"num_tokens": 7, "error": None, "source": "generated"}
    with Pace(str(tmp_path), 40, 10) as pace:
        pace.advance([row] * 20)
        assert "30/40 notes" in pace.meter.line()
        assert "tokens/s" in pace.meter.line()
        pace.write()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    told = {tag: events.Scalars(tag)[-1] for tag in events.Tags()["scalars"]}
    assert told["notes/tokens_per_s"].value == pytest.approx(7 * told["notes/notes_per_s"].value, rel=1e-3)
    assert told["notes/notes_per_s"].step == 30
    assert told["notes/eta_s"].value > 0
    assert told["notes/share/generated"].value == 1


def test_another_model_or_prompt_makes_new_notes_and_keeps_the_old_ones(tiny, records_file, tmp_path, model):
    records, out = str(records_file()), str(tmp_path / "notes")
    other = str(tiny.write_tiny_llm(tmp_path / "other", heads=2, kv_heads=2))
    prompts = tmp_path / "prompts"
    prompts.mkdir()

    def write(folder, version, wording):
        text = f'version: "{version}"\nfields: [modality, class, malignancy]\nuser: "{wording} {{{{ diagnosis }}}}"\n'
        (prompts / "mine.yaml").write_text(text)
        engine = EngineConfig(model=folder, max_new_tokens=2, attempts=1)
        settings = NotesConfig(
            records=records, out=out, strategies=["mine"], engine=engine, ray="never", limit=4, prompts=str(prompts)
        )
        plan, table = plan_notes(settings)
        synthesize(settings, plan, table)
        return plan

    write(model, "1", "Write:")
    before = read_notes(out)
    again = write(other, "1", "Write:")
    assert len(again.notes) == 4
    notes = read_notes(out)
    assert notes.num_rows == 8
    assert notes.slice(0, 4).equals(before)
    assert set(notes.column("model").to_pylist()) == {model, other}
    load_prompt.cache_clear()  # another process would read the file anew
    write(model, "2", "Write:")
    assert read_notes(out).num_rows == 12
    assert read_notes(out).slice(0, 8).equals(notes)


def test_a_full_disk_is_one_line(records_file, tmp_path, monkeypatch):
    settings = NotesConfig(records=str(records_file()), out=str(tmp_path / "notes"), strategies=["template"])
    plan, table = plan_notes(settings)
    write = pq.write_table

    def full(table, path, **keys):
        if "part-" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(table, path, **keys)

    monkeypatch.setattr("dermfm.notes.store.pq.write_table", full)
    with pytest.raises(InputError, match=r"part-00000\.parquet: cannot be written \(No space left on device\)"):
        synthesize(settings, plan, table)
    assert not list((tmp_path / "notes").glob("part-*"))
