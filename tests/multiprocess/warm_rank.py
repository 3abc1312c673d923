"""A forked rank: becomes the script that `JOB` names, with its arguments, environment and output files.

Run by `runpy.run_path` with `JOB` = {script, arguments, env, out, err} among its globals.
"""

from __future__ import annotations

import os
import runpy
import sys
from typing import Any


def become(job: dict[str, Any]) -> None:
    """Run the script as if Python had been started with it."""
    os.environ.clear()
    os.environ.update(job["env"])
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, number)
        os.close(file)
    sys.path[:0] = job["env"]["PYTHONPATH"].split(os.pathsep)
    sys.argv = [job["script"], *job["arguments"]]
    runpy.run_path(job["script"], run_name="__main__")


become(globals()["JOB"])
