"""The smaller pieces: agreement of ranks, stored pieces, roles of data sets, the probe, prompts."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from dermfm.config import InputError
from dermfm.evaluate.parts import Parts
from dermfm.evaluate.probe import C_GRID, fit_probe
from dermfm.evaluate.ranks import Ranks, on_first, spread, together
from dermfm.evaluate.records import record_set, text_sets
from dermfm.evaluate.shift import ProtocolConfig, empty_partitions, make_scopes, resolve_roles
from dermfm.evaluate.zeroshot import class_vectors, make_prompts


def run_ranks(world: int, work: Any) -> list[Any]:
    """What `work(ranks)` returns or raises on each of `world` ranks that meet in threads."""
    barrier, held, results = threading.Barrier(world, timeout=20), [None] * world, [None] * world

    def rank(number: int) -> None:
        def gather(value: Any) -> list[Any]:
            held[number] = value
            barrier.wait()
            values = list(held)
            barrier.wait()
            return values

        try:
            results[number] = work(Ranks(number, world, gather))
        except (ValueError, OSError) as error:
            results[number] = error

    threads = [threading.Thread(target=rank, args=(i,)) for i in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_bad_input_on_one_rank_ends_every_rank_with_the_reason() -> None:
    def work(ranks: Ranks) -> None:
        def read() -> None:
            if ranks.rank == 2:
                raise InputError("shard 7 is truncated")

        together(ranks, read)

    assert [str(r) for r in run_ranks(4, work)] == ["shard 7 is truncated"] * 4


def test_a_failure_of_the_first_rank_reaches_the_waiting_ones() -> None:
    def work(ranks: Ranks) -> None:
        def write() -> None:
            assert ranks.first
            raise OSError("no space left")

        on_first(ranks, write)

    assert [str(r) for r in run_ranks(3, work)] == ["no space left"] * 3


@pytest.mark.parametrize("world", [1, 2, 3])
def test_spread_work_comes_back_in_order_on_every_rank(world: int) -> None:
    results = run_ranks(world, lambda ranks: spread(ranks, list("abcdefg"), lambda x: [x, x * 2][: 1 + (x > "c")]))
    assert results == [["a", "b", "c", "d", "dd", "e", "ee", "f", "ff", "g", "gg"]] * world


def test_pieces_of_any_order_make_one_array_and_bad_rows_go(tmp_path: Path) -> None:
    parts = Parts(tmp_path, "images", ["checkpoint"])
    values = np.arange(12.0).reshape(6, 2).astype(np.float32)
    parts.write({"rows": np.array([4, 5]), "good": np.array([True, False]), "x": values[[4]]}, 1)
    assert parts.done(6).tolist() == [False] * 4 + [True] * 2
    parts.write({"rows": np.array([0, 1, 2, 3]), "good": np.array([True] * 4), "x": values[:4]}, 0)
    parts.write({"rows": np.array([3]), "good": np.array([True]), "x": values[[3]]}, 2)
    parts.merge()
    found = parts.load()
    assert found["rows"].tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(found["x"], values[:5])
    assert [p.name for p in parts.folder.iterdir()] == ["all.safetensors"]
    assert not Parts(tmp_path, "images", ["another checkpoint"]).done(6).any()


def test_a_damaged_piece_is_named(tmp_path: Path) -> None:
    parts = Parts(tmp_path, "images", [])
    parts.folder.mkdir()
    (parts.folder / "part-0000-0-1.safetensors").write_bytes(b"half")
    with pytest.raises(InputError, match="remove the folder"):
        parts.done(3)


def records(count: int = 6) -> list[dict[str, Any]]:
    return [
        {"record_id": f"r{i}", "dataset": "AB"[i % 2], "modality": "dermoscopic", "group_id": f"g{i}", "label": i % 3}
        for i in range(count)
    ]


def test_roles_are_filled_in_and_checked() -> None:
    assert resolve_roles(ProtocolConfig(), ["A", "B"], ["A"]).external == ["B"]
    assert resolve_roles(ProtocolConfig(external=["A"]), ["A", "B"], ["A", "B"]).internal == ["B"]
    with pytest.raises(InputError, match="did you mean 'A'"):
        resolve_roles(ProtocolConfig(internal=["AA"]), ["A", "B"], [])
    with pytest.raises(ValueError, match="one role"):
        ProtocolConfig(internal=["A"], external=["A"])


def test_an_empty_partition_is_left_out_and_named() -> None:
    own = record_set(records(), [[] for _ in range(6)], ["test"] * 6)
    scopes = make_scopes(own, ProtocolConfig(internal=["A", "B"]))
    assert empty_partitions(scopes) == ["external", "clinical"]
    assert all(scope.mask.any() for scope in scopes)


def test_the_same_one_of_several_notes_is_read_and_mixed_access_is_refused() -> None:
    def note(number: int, access: str = "given") -> dict[str, str]:
        return {"note_id": f"n{number}", "strategy": "open", "text": f"text {number}", "label_access": access}

    own = record_set(records(2), [[note(3), note(1)], [note(2, "blind")]], ["test"] * 2)
    with pytest.raises(InputError, match="label_access"):
        text_sets(own, [])
    own = record_set(records(2), [[note(3, "blind"), note(1, "blind")], []], ["test"] * 2)
    (found,) = text_sets(own, ["open"])
    assert (found.note_ids, found.rows.tolist(), found.track) == (["n1"], [0], "label-blind")


def test_the_probe_takes_the_penalty_that_is_best_on_validation_records() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    features = rng.normal(size=(300, 20)) + 0.6 * np.eye(20)[labels]
    probe = fit_probe(features[:200], labels[:200], features[200:], labels[200:])
    assert set(probe.tried) == set(C_GRID)
    assert probe.tried[probe.c] == max(probe.tried.values())
    alone = LogisticRegression(C=probe.c, class_weight="balanced", max_iter=1000).fit(features[:200], labels[:200])
    np.testing.assert_allclose(probe.probabilities(features[200:], 3), alone.predict_proba(features[200:]), atol=2e-3)


def test_classes_without_training_records_get_no_probability() -> None:
    rng = np.random.default_rng(1)
    probe = fit_probe(rng.normal(size=(40, 4)), np.arange(40) % 2 * 3, np.zeros((0, 4)), np.zeros(0, np.int64))
    found = probe.probabilities(rng.normal(size=(5, 4)), 5)
    assert (found[:, [1, 2, 4]] == 0).all()
    np.testing.assert_allclose(found.sum(axis=1), 1)
    with pytest.raises(ValueError, match="fewer than two classes"):
        fit_probe(np.zeros((3, 2)), np.zeros(3, np.int64), np.zeros((0, 2)), np.zeros(0, np.int64))


def test_the_ensemble_is_the_mean_of_all_prompts_of_a_class() -> None:
    prompts = make_prompts()
    vectors = np.random.default_rng(2).normal(size=(len(prompts.texts), 4))
    own = [i for i, s in enumerate(prompts.class_sets) if s == "classes" and prompts.classes[i] == 6]
    mean = vectors[own].mean(axis=0)
    np.testing.assert_allclose(class_vectors(prompts, vectors, "classes", "ensemble")[6], mean / np.linalg.norm(mean))
    (bare,) = [i for i in own if prompts.texts[i] == "melanoma"]
    unit = vectors[bare] / np.linalg.norm(vectors[bare])
    np.testing.assert_allclose(class_vectors(prompts, vectors, "classes", "bare")[6], unit)


@pytest.mark.parametrize("label", [8, -2])
def test_a_label_that_is_no_class_is_refused_with_its_record(label: int) -> None:
    fields = [{"record_id": f"r{i}", "dataset": "A", "label": value} for i, value in enumerate((0, None, label))]
    with pytest.raises(InputError, match=f"record 'r2' of A: label {label} is not valid; the classes are 0 to 7"):
        record_set(fields, [[]] * 3, ["test"] * 3)
