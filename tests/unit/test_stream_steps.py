"""Which steps a run takes and what each reads: positions are arithmetic, also where samples are left out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dermfm.stream import Steps


def test_without_anything_left_out_every_step_reads_the_next_batch():
    steps = Steps(done=3, total=6, position=24, batch=8)
    assert list(steps) == [4, 5, 6]
    assert [(steps.start(s), steps.end(s)) for s in steps] == [(24, 32), (32, 40), (40, 48)]
    assert steps.last == 6


def test_steps_that_would_read_a_skipped_sample_are_left_out_and_the_others_read_what_they_always_read():
    whole = Steps(done=0, total=10, position=0, batch=8)
    without = Steps(done=0, total=10, position=0, batch=8, skip=[20, 33])
    assert list(without) == [1, 2, 6, 7, 8, 9, 10]
    assert [without.start(s) for s in without] == [whole.start(s) for s in without]


def test_a_run_whose_last_steps_are_left_out_ends_before_them():
    assert Steps(0, 4, 0, 8, [16, 999]).last == 2
    assert Steps(2, 4, 16, 8, [0, 999]).pieces() == []
    assert Steps(2, 4, 16, 8, [0, 999]).last == 2


@given(st.integers(0, 20), st.integers(0, 20), st.integers(1, 9), st.integers(0, 300), st.integers(1, 90))
def test_exactly_the_steps_that_touch_the_range_are_left_out(done, more, batch, low, width):
    position = done * batch + 5
    steps = Steps(done, done + more, position, batch, [low, low + width])
    expected = [
        s
        for s in range(done + 1, done + more + 1)
        if not {*range(steps.start(s), steps.end(s))} & {*range(low, low + width)}
    ]
    assert list(steps) == expected


def test_a_resumed_run_leaves_out_the_same_steps():
    whole = Steps(0, 12, 0, 8, [30, 50])
    resumed = Steps(3, 12, 24, 8, [30, 50])
    assert list(resumed) == [s for s in whole if s > 3]
    assert [resumed.start(s) for s in resumed] == [whole.start(s) for s in resumed]


@pytest.mark.parametrize("pair", [[5], [5, 5], [7, 3], [-1, 4]])
def test_a_range_that_is_none_is_bad_input(pair):
    from dermfm.plan import TrainConfig

    for name in ("skip_samples", "profile"):
        with pytest.raises(ValueError, match=rf"{name}: .* give \[a, b\] with 0 <= a < b"):
            TrainConfig(run="r", shards="s", **{name: pair})
