"""The run directory: resolved config, command, code, lock; what a resumed run may change."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from dermfm.config import InputError, short_hash, to_yaml
from shards.files import write_text

LOCK_TRIES, LOCK_PAUSE_S = 20, 0.1


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


@contextlib.contextmanager
def take_lock(folder: Path) -> Iterator[None]:
    """Hold a job's output folder, made where it is not there; InputError if a living process holds it.

    The lock's file is gone afterwards. A killed process leaves it, but not the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lock"
    with _held(path, folder):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _held(path: Path, folder: Path) -> IO[str]:
    """The locked file at `path`. Who held it before may remove it between our opening and locking it, and who only
    looks (`check_free`) holds it for a moment: then again."""
    refused = InputError(f"{path}: cannot be locked, it is replaced all the time; remove it, or give another folder")
    for _ in range(LOCK_TRIES):
        file = path.open("w")
        try:
            _flock(file, fcntl.LOCK_EX, folder)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except FileNotFoundError:
            pass
        except InputError as error:
            refused = error
        except BaseException:
            file.close()
            raise
        file.close()
        time.sleep(LOCK_PAUSE_S)
    raise refused


def check_writable(folder: Path) -> None:
    """Make a run directory where there is none; InputError where nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass  # what permissions say is not all: quotas, read-only mounts
    except OSError as error:
        raise InputError(f"run: {folder} cannot be written ({error.strerror}); give another run=") from error


def check_free(folder: Path) -> None:
    """InputError if a living process holds a job's output folder; nothing is made."""
    with contextlib.suppress(FileNotFoundError), (folder / "lock").open() as file:
        _flock(file, fcntl.LOCK_SH, folder)


def _flock(file: IO[str], kind: int, folder: Path) -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        raise InputError(
            f"{folder}: another process works in this folder; wait for it, stop it, or give another one"
        ) from error


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
