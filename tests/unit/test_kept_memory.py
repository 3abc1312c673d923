"""What a process frees it takes again without asking the operating system for every page."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

SIZES = (24, 80)  # megabytes of a piece
STEPS = """
import json, resource, sys
from dermfm.batch_memory import keep_freed
if sys.argv[1] == "kept":
    keep_freed()
told = []
for size in json.loads(sys.argv[2]):
    faults = []
    for step in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        pieces = [b"x" * (size << 20) for _ in range(3)]
        del pieces
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    told.append(max(faults[2:]))
print(json.dumps(told))
"""


def faults_of(how: str) -> list[int]:
    """The most page faults of a step, for each size."""
    command = [sys.executable, "-c", STEPS, how, json.dumps(SIZES)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="how this C library keeps memory is its own matter")
def test_freed_memory_is_taken_again_without_a_page_fault():
    for size, given_back, kept in zip(SIZES, faults_of("given back"), faults_of("kept"), strict=True):
        pages = 3 * size * 2**20 // 4096
        assert given_back > pages // 4
        assert kept < pages // 100
