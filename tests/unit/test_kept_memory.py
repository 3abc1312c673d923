"""What a process frees it takes again without asking the operating system for every page."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

STEPS = """
import resource, sys
from dermfm.batch_memory import keep_freed
if sys.argv[1] == "kept":
    keep_freed()
faults = []
for step in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pieces = [b"x" * (24 << 20) for _ in range(4)]
    del pieces
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(max(faults[2:]))
"""


def faults_of(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", STEPS, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="how this C library keeps memory is its own matter")
def test_freed_memory_is_taken_again_without_a_page_fault():
    pages = 4 * 24 * 2**20 // 4096
    assert faults_of("given back") > pages // 4
    assert faults_of("kept") < pages // 100
