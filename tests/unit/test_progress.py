"""Progress off a terminal is plain lines with an ETA; every item passes through."""

from __future__ import annotations

import pytest

from dermfm import progress
from dermfm.progress import Meter, duration, track


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock whose hand is the list's only number."""
    hand = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: hand[0])
    return hand


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00"), (59.4, "0:59"), (61, "1:01"), (3599.6, "1:00:00"), (90061, "25:01:01")]
)
def test_durations_read_as_hours_minutes_seconds(seconds, shown):
    assert duration(seconds) == shown


def test_track_yields_every_item_and_prints_a_line_no_more_often_than_every_ten_seconds(clock, capsys):
    seen = []
    for item in track(range(30), 30, "images", "images"):
        seen.append(item)
        clock[0] += 1
    lines = capsys.readouterr().err.splitlines()
    assert seen == list(range(30))
    assert [line.split(":")[1].split("/")[0].strip() for line in lines] == ["10", "20", "30"]
    assert lines[0] == "images: 10/30 images 1.0/s ETA 0:20"


def test_the_rate_counts_only_this_run_and_not_what_an_earlier_one_has_done(clock):
    meter = Meter(100, "notes", start=60)
    clock[0] += 4
    meter.advance(20)
    assert meter.line() == "notes: 80/100 5.0/s ETA 0:04"


def test_the_time_left_is_unknown_before_the_first_item(clock):
    assert Meter(100, "notes").line().endswith("ETA ?")


def test_a_bar_is_drawn_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    assert list(track("abc", 3, "letters")) == ["a", "b", "c"]
    assert "letters" in capsys.readouterr().err
