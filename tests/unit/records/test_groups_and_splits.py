"""Groups and splits: nothing of a lesion, a patient or a copied photograph on two sides."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from threadpoolctl import threadpool_info, threadpool_limits

from dermfm.records import keypoints, processes
from dermfm.records.duplicates import NEAREST, THUMBNAIL, duplicate_pairs, looks_of, near_hashes, nearest_of, neighbours
from dermfm.records.groups import DROPPED, assign_groups, drop_copies
from dermfm.records.images import image_facts
from dermfm.records.keypoints import describe, num_agreeing
from dermfm.records.source import Losses
from dermfm.records.splits import LEAK, MOVED, assign_splits
from dermfm.records.table import Record

from .conftest import textured

ROOT = Path(__file__).resolve().parents[3]


def record(dataset: str, source_id: str, **fields: object) -> Record:
    return Record(dataset=dataset, source_id=source_id, path=Path(source_id), modality="clinical", **fields)  # type: ignore[arg-type]


def grouped(records: list[Record], pairs: list[tuple[int, int]] | None = None) -> list[list[int]]:
    """Positions of the records by group, in order of appearance."""
    assign_groups(records, pairs or [], Losses())
    found: dict[str, list[int]] = defaultdict(list)
    for i, r in enumerate(records):
        found[r.group_id].append(i)
    return list(found.values())


def test_a_record_without_lesion_patient_or_copy_is_its_own_group() -> None:
    one = record("A", "1")
    assert grouped([one, record("A", "2")]) == [[0], [1]]
    assert one.group_id == one.record_id


def test_lesion_patient_and_copies_join_into_one_group() -> None:
    records = [
        record("A", "1", lesion_id="L"),
        record("A", "2", lesion_id="L", patient_id="P"),
        record("A", "3", lesion_id="M", patient_id="P"),
        record("B", "4"),
        record("B", "5", lesion_id="L"),
    ]
    assert grouped(records, [(2, 3)]) == [[0, 1, 2, 3], [4]]


def test_the_two_images_of_a_milk10k_lesion_share_a_group_and_other_data_sets_ids_do_not() -> None:
    records = [record(name, name, lesion_id="IL_1") for name in ("Milk10k_dermo", "Milk10k_clinic", "MSK")]
    assert grouped(records) == [[0, 1], [2]]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=12), st.integers(0, 8), st.data())
def test_near_hashes_finds_exactly_the_pairs_within_the_distance(
    values: list[int], distance: int, data: st.DataObject
) -> None:
    flips = data.draw(st.lists(st.integers(0, 63), max_size=9, unique=True))
    values.append(values[0] ^ sum(1 << bit for bit in flips))
    expected = {(i, j) for (i, a), (j, b) in combinations(enumerate(values), 2) if (a ^ b).bit_count() <= distance}
    assert set(map(tuple, near_hashes([f"{value:016x}" for value in values], distance).tolist())) == expected


def test_near_hashes_by_bands_are_those_of_comparing_all_with_all() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**64, 4500, dtype=np.uint64)
    values[3000:] = values[:1500]
    for _ in range(11):  # copies that differ in up to eleven bits, some of them in a single band
        places = np.where(np.arange(1500) % 3, rng.integers(0, 64, 1500), rng.integers(0, 16, 1500))
        flip = rng.random(1500) < 0.4
        values[3000:][flip] ^= np.uint64(1) << places[flip].astype(np.uint64)
    for distance in (0, 8, 11):
        naive = [
            (i, i + 1 + int(j))
            for i in range(len(values))
            for j in np.flatnonzero(np.bitwise_count(values[i] ^ values[i + 1 :]) <= distance)
        ]
        assert len(naive) > 3
        assert near_hashes([f"{value:016x}" for value in values], distance).tolist() == [list(pair) for pair in naive]


def test_near_hashes_of_many_equal_ones_are_all_pairs() -> None:
    assert len(near_hashes(["00ff00ff00ff00ff"] * 600 + [f"{i * 7919:016x}" for i in range(4000)], 0)) == 600 * 599 // 2


def test_of_many_near_hashes_the_nearest_stay_and_all_copies_stay_connected() -> None:
    hashes = ["00ff00ff00ff00ff"] * 200 + [f"{0x00FF00FF00FF00FF ^ (1 << bit):016x}" for bit in range(5)]
    kept = nearest_of(near_hashes(hashes, 1), hashes)
    assert len(kept) <= 2 * NEAREST * len(hashes) < len(near_hashes(hashes, 1))
    linked = {0}
    for i, j in kept.tolist():  # in order, so that one pass is enough: every copy is paired with the first
        linked |= {i, j} if {i, j} & linked else set()
    assert linked == set(range(len(hashes)))
    few = near_hashes(hashes[:NEAREST], 0)
    assert nearest_of(few, hashes).tolist() == few.tolist()


def test_looks_tell_equal_thumbnails_and_take_up_a_stream_of_them() -> None:
    rng = np.random.default_rng(3)
    thumbnails = [rng.integers(0, 256, THUMBNAIL**2, dtype=np.uint8).tobytes() for _ in range(1030)]
    thumbnails[1029] = thumbnails[5]
    looks = looks_of(iter(thumbnails))
    assert looks.coarse.shape == (3, 1030, 64)
    same = (looks.digests[:, None] == looks.digests[None]).all(axis=2)
    assert np.argwhere(np.triu(same, 1)).tolist() == [[5, 1029]]
    assert np.allclose((looks.coarse**2).sum(axis=2), 1, atol=1e-5)


def copies_among(pictures: list[Image.Image], folder: Path, distance: int = 8) -> set[tuple[int, int]]:
    """What `duplicate_pairs` finds among the pictures, each saved at another JPEG quality."""
    paths = [folder / f"{i}.jpg" for i in range(len(pictures))]
    for i, (path, picture) in enumerate(zip(paths, pictures, strict=True)):
        picture.save(path, quality=92 - 5 * i)
    facts = [image_facts(path) for path in paths]
    assert {len(each.thumbnail) for each in facts} == {THUMBNAIL**2}
    looks = looks_of(f.thumbnail for f in facts)
    return set(duplicate_pairs(paths, [f.phash for f in facts], looks, distance, 8))


def test_recompressed_recoloured_cropped_and_magnified_copies_are_found_and_other_pictures_are_not(
    tmp_path: Path,
) -> None:
    original = textured(1, (240, 200))
    pictures = [
        original,
        original.resize((160, 133)),
        ImageEnhance.Brightness(original).enhance(1.15),
        original.crop((5, 4, 236, 198)),
        original.crop((36, 30, 204, 170)).resize((300, 250), Image.Resampling.BICUBIC),
        textured(2, (240, 200)),
    ]
    found = copies_among(pictures, tmp_path)
    assert {(0, i) for i in range(1, 5)} <= found
    assert not any(5 in pair for pair in found)
    assert copies_among(pictures, tmp_path, distance=-1) == set()


def spot_on_skin(seed: int) -> Image.Image:
    """A dark spot like that of every other seed, on skin and with a structure of its own."""
    rows, columns = np.mgrid[:160, :160] - 80
    angle, radius = np.arctan2(rows, columns), np.hypot(rows, columns)
    spot = 1 / (1 + np.exp((radius - 30 - 3 * np.cos(3 * angle + seed)) / 3))
    texture = np.asarray(textured(seed, (160, 160)).convert("L"), float) - 140
    picture = 190 + 0.15 * texture - spot * (110 + 0.5 * texture)
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def test_two_dark_spots_on_pale_skin_are_not_taken_for_the_same_photograph(tmp_path: Path) -> None:
    spots = [spot_on_skin(3), spot_on_skin(4)]
    assert copies_among(spots, tmp_path) == set()
    # They were candidates: it was the local features that told them apart.
    thumbnails = [image_facts(tmp_path / f"{i}.jpg").thumbnail for i in range(2)]
    assert set(map(tuple, neighbours(looks_of(thumbnails).coarse).tolist())) == {(0, 1)}
    assert copies_among([spots[0], spots[0].crop((10, 8, 152, 150))], tmp_path) == {(0, 1)}


def test_copies_are_confirmed_alike_in_one_process_and_in_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "POOL_FROM", 1)
    spots = [spot_on_skin(3), spot_on_skin(4), spot_on_skin(3).crop((10, 8, 152, 150))]
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, picture in zip(paths, spots, strict=True):
        picture.save(path)
    pairs = np.array([(0, 1), (0, 2), (1, 2)])
    for workers in (1, 2):
        assert keypoints.confirmed(paths, pairs, 8, workers).tolist() == [False, True, False]
    assert keypoints.confirmed(paths, pairs[:0], 8).tolist() == []


def test_small_work_is_mapped_in_this_process_on_one_thread_which_ends_with_it() -> None:
    def threads() -> list[int]:
        return [library["num_threads"] for library in threadpool_info()]

    with threadpool_limits(limits=2):
        before = threads()
        with processes.mapping(0, processes.POOL_FROM - 1) as mapped:
            assert list(mapped(lambda n: (n, set(threads())), [1, 2])) == [(1, {1}), (2, {1})]
        assert threads() == before
    assert 2 in before or max(before) == 1  # a machine of one core has no second thread


def test_processes_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    program = """
import os, time
from dermfm.records import processes

def note(folder):
    open(f"{folder}/{os.getpid()}", "w").close()
    time.sleep(0.2)

if __name__ == "__main__":
    with processes.mapping(2, processes.POOL_FROM) as mapped:
        for _ in mapped(note, [FOLDER] * 4000):
            pass
""".replace("FOLDER", repr(str(tmp_path / "ids")))
    (tmp_path / "ids").mkdir()
    (tmp_path / "job.py").write_text(program)
    job = subprocess.Popen([sys.executable, tmp_path / "job.py"], env={**os.environ, "PYTHONPATH": str(ROOT)})
    started = wait_for(lambda: [int(path.name) for path in (tmp_path / "ids").iterdir()])
    job.kill()
    job.wait()
    assert wait_for(lambda: not any(Path(f"/proc/{process}").exists() for process in started))


def wait_for(outcome: Callable[[], Any]) -> Any:
    """The first outcome that is true; that of the last look after two minutes."""
    end = time.monotonic() + 120
    while not (found := outcome()) and time.monotonic() < end:
        time.sleep(0.1)
    return found


def test_features_agree_only_where_one_similarity_transform_carries_them_over() -> None:
    grey = np.asarray(textured(5, (200, 160)).convert("L"))
    here = describe(grey)
    assert num_agreeing(here, here) > 50
    assert num_agreeing(here, describe(np.rot90(grey).copy())) > 30
    assert num_agreeing(here, describe(np.asarray(textured(6, (200, 160)).convert("L"))), 8) == 0
    assert num_agreeing(here, describe(np.full((128, 128), 90, np.uint8)), 8) == 0


def test_dropping_copies_keeps_the_external_and_labelled_one_and_what_they_link() -> None:
    records = [
        record("A", "1", label=0, lesion_id="L"),
        record("A", "2", label=0, lesion_id="L"),
        record("B", "3"),
        record("B", "4", label=0, lesion_id="M"),
        record("E", "5", label=0, test_only=True),
    ]
    losses = Losses()
    pairs = [(1, 4), (2, 3)]
    assign_groups(records, pairs, Losses())
    kept = drop_copies(records, pairs, losses)
    assert [r.source_id for r in kept] == ["1", "4", "5"]
    assert losses.kinds[DROPPED] == {"A/2": 1, "B/3": 1}
    # The other photograph of the lesion that was dropped stays with its external copy.
    assert kept[0].group_id == kept[2].group_id


def many(seed: int = 0, count: int = 400) -> list[Record]:
    rng = np.random.default_rng(seed)
    records = []
    for i in range(count):
        label = int(rng.choice(8, p=[0.1, 0.01, 0.5, 0.02, 0.07, 0.1, 0.15, 0.05]))
        lesion = f"{label}_{rng.integers(count // 2)}"
        records.append(record("A", str(i), label=label, lesion_id=lesion))
    return records


def split(records: list[Record], seed: int = 0, losses: Losses | None = None) -> dict[str, str]:
    assign_groups(records, [], Losses())
    assign_splits(records, seed, 0.1, 0.2, losses or Losses())
    return {r.source_id: r.split for r in records}


def test_no_group_is_on_two_sides_and_the_shares_are_those_asked_for() -> None:
    records = many()
    split(records)
    sides: dict[str, set[str]] = defaultdict(set)
    for r in records:
        sides[r.group_id].add(r.split)
    assert all(len(names) == 1 for names in sides.values())
    counts = Counter(r.split for r in records)
    assert abs(counts["test"] / len(records) - 0.2) < 0.04
    assert abs(counts["valid"] / len(records) - 0.1) < 0.04


def test_every_class_with_two_groups_appears_in_test() -> None:
    records = many()
    split(records)
    groups: dict[int | None, set[str]] = defaultdict(set)
    tested = {r.label for r in records if r.split == "test"}
    for r in records:
        groups[r.label].add(r.group_id)
    assert all(label in tested for label, ids in groups.items() if len(ids) >= 2)


def test_splits_depend_on_the_seed_and_not_on_the_order_of_the_records() -> None:
    forward, backward = many(), many()[::-1]
    assert split(forward) == split(backward)
    assert split(many(), seed=1) != split(many(), seed=0)


def test_a_group_shared_with_an_external_data_set_is_test_as_a_whole_and_counted() -> None:
    records = [record("A", str(i), label=0) for i in range(20)] + [record("E", "x", label=0, test_only=True)]
    losses = Losses()
    assign_groups(records, [(3, 20)], losses)
    assign_splits(records, 0, 0.1, 0.2, losses)
    assert records[3].split == records[20].split == "test"
    assert losses.count(MOVED) == 1


def test_a_given_split_is_kept_and_its_leaks_are_named() -> None:
    records = [
        record("A", "1", lesion_id="L", given_split="train"),
        record("A", "2", lesion_id="L", given_split="test"),
        record("A", "3", given_split="valid"),
    ]
    losses = Losses()
    assign_groups(records, [], losses)
    assign_splits(records, 0, 0.1, 0.2, losses)
    assert [r.split for r in records] == ["train", "test", "valid"]
    assert losses.count(LEAK) == 1
