"""A run directory that cannot be used is told in one line, before anything is started."""

from __future__ import annotations

import pytest

from dermfm import run
from dermfm.config import InputError


def test_a_run_directory_is_made_and_nothing_is_left_of_the_look_at_it(tmp_path):
    for _ in range(2):
        run.check_writable(tmp_path / "a" / "run")
    assert list((tmp_path / "a" / "run").iterdir()) == []


def test_one_that_cannot_be_written_is_bad_input(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"run: .*file/run cannot be written \(Not a directory\); give another run="):
        run.check_writable(tmp_path / "file" / "run")
