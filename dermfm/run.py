"""The run directory: resolved config, command, code, lock; what a resumed run may change."""

from __future__ import annotations

import fcntl
import shlex
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

from dermfm.config import InputError, short_hash, to_yaml
from shards.manifest import write_text


def record(run: Path, config: Any) -> None:
    """Write config.yaml, command.txt and code.txt (commit and diff, where the code is a git checkout)."""
    run.mkdir(parents=True, exist_ok=True)
    write_text(run / "config.yaml", to_yaml(config))
    with (run / "command.txt").open("a") as file:
        file.write(shlex.join(["dermfm", *sys.argv[1:]]) + "\n")
    write_text(run / "code.txt", code_version())


def code_version() -> str:
    """`git rev-parse HEAD` and the diff of this package's checkout, or a line that says there is none."""
    root = Path(__file__).resolve().parents[1]
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        diff = subprocess.run(["git", "diff", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout\n"
    return head.stdout + diff.stdout


def code_hash() -> str:
    """Hash of `code_version`."""
    return short_hash(code_version())


def take_lock(folder: Path) -> IO[str]:
    """Hold a job's output folder until the returned file is closed; InputError if a living process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise InputError(
            f"{folder}: another process works in this folder; wait for it, stop it, or give another one"
        ) from error
    return file


def check_identity(old: dict[str, Any], new: dict[str, Any], allowed: list[str], where: Path) -> None:
    """InputError where a resumed run changes a key that its data order or model rests on, unless it is allowed.

    `allowed` names keys, or the first parts of dotted ones: `model` allows every change of `model.*`.
    """
    changed = [
        name
        for name in sorted(set(old) | set(new))
        if old.get(name) != new.get(name) and not any(name == a or name.startswith(f"{a}.") for a in allowed)
    ]
    if changed:
        told = ", ".join(f"'{name}' is {new.get(name)!r} (it was started with {old.get(name)!r})" for name in changed)
        raise InputError(
            f"{where}: {told}; give another run=, restore the value, or allow_change=[{','.join(changed)}]"
        )
