"""DeepSpeed as this project starts it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from dermfm import zero


def test_deepspeed_builds_with_the_ninja_of_this_environment_whatever_stands_first_on_the_path(monkeypatch):
    own = Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"/usr/bin:{own}")
    zero.ready("cpu")
    assert shutil.which("ninja") == str(own / "ninja")
