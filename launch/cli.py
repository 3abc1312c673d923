"""`dermfm <job> [verb …] [config.yaml] [key=value …]`: the only door. Parses, loads the config, calls one job."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import os
import sys
from collections.abc import Sequence

from cluster.process import ProcessError
from dermfm.config import InputError, explain, load, nearest
from shards.manifest import ShardError

DONE, FAILED, BAD_INPUT, RESUMABLE = 0, 1, 2, 75
# What a path that the user gave can cause: no such folder, no right to write, a full or read-only disk.
DISK_ERRORS = (
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR,
)  # fmt: skip

# job → (summary, verbs). Each job is the module launch.<job> with `schema(call)` and `run(config, call) -> int`.
JOBS: dict[str, tuple[str, tuple[str, ...]]] = {
    "records": ("read data sets' own tables and images into records.parquet", ()),
    "notes": ("synthesize clinical notes for the records with an LLM on Ray actors", ()),
    "shards": ("pack images and notes into WebDataset shards", ("add-notes", "verify", "index")),
    "train": ("pretrain the image-text model with DeepSpeed ZeRO", ()),
    "plan": ("memory per GPU, time, disk and communication of a training run on any nodes × GPUs", ()),
    "evaluate": ("score a checkpoint: classification, zero-shot, retrieval, per data set and partition", ()),
    "report": ("write one self-contained HTML page about a run", ()),
    "demo": ("run the whole chain on the embedded atlas or on a folder of real images", ()),
}
FLAGS = ("--explain", "--dry-run", "--help", "-h")


@dataclasses.dataclass(frozen=True)
class Call:
    """One parsed command line. `overrides` are the `key=value` items in order."""

    job: str
    verb: str | None
    config: str | None
    overrides: tuple[str, ...]
    dry_run: bool
    explain: bool
    help: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Run one job. Returns the exit code: 0 done, 1 failed, 2 bad input, 75 stopped and resumable."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("--help", "-h", "help"):
        print(usage())
        return DONE if argv else BAD_INPUT
    try:
        call = parse(argv)
        job = importlib.import_module(f"launch.{call.job}")
        schema = job.schema(call)
        if call.help:
            print(f"{(job.__doc__ or '').strip()}\n\nKeys (dermfm {call.job} --explain shows values and origins):")
            print(explain(schema))
            return DONE
        if call.explain:
            print(explain(schema, call.config, call.overrides))
            return DONE
        return int(job.run(load(schema, call.config, call.overrides), call))
    except OSError as error:
        if error.errno not in DISK_ERRORS or not error.filename or "DERMFM_TRACEBACK" in os.environ:
            raise
        if is_first_rank():
            print(f"dermfm {argv[0]}: {error.filename}: {error.strerror}; give another path", file=sys.stderr)
        return BAD_INPUT
    except (InputError, ShardError, ProcessError) as error:
        if is_first_rank():
            print(f"dermfm {argv[0]}: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"\ndermfm {argv[0]}: stopped; the same command continues", file=sys.stderr)
        return RESUMABLE


def parse(argv: Sequence[str]) -> Call:
    """Split a command line into job, verb, config file, overrides and flags; InputError names what is not valid."""
    job, *rest = argv
    if job not in JOBS:
        raise InputError(f"unknown job '{job}'; {nearest(job, JOBS)}")
    verbs = JOBS[job][1]
    flags = [a for a in rest if a.startswith("-")]
    for flag in flags:
        if flag not in FLAGS:
            raise InputError(f"unknown option '{flag}'; {nearest(flag, FLAGS)}")
    words = [a for a in rest if not a.startswith("-")]
    overrides = tuple(a for a in words if "=" in a)
    plain = [a for a in words if "=" not in a]
    verb = plain.pop(0) if plain and plain[0] in verbs else None
    config = plain.pop(0) if plain and plain[0].endswith((".yaml", ".yml")) else None
    if plain:
        hint = f"valid verbs: {', '.join(verbs)}; " if verbs else ""
        raise InputError(f"'{plain[0]}' is not understood; {hint}a config ends in .yaml and settings are key=value")
    chosen = {f.lstrip("-").replace("-", "_") for f in flags}
    return Call(
        job=job,
        verb=verb,
        config=config,
        overrides=overrides,
        dry_run="dry_run" in chosen,
        explain="explain" in chosen,
        help=bool(chosen & {"help", "h"}),
    )


def usage() -> str:
    """The text of `dermfm --help`."""
    jobs = "\n".join(f"  {name:10s}{summary}" for name, (summary, _) in JOBS.items())
    return (
        "dermfm <job> [verb] [config.yaml] [key=value …] [--explain | --dry-run | --help]\n\n"
        f"Jobs\n{jobs}\n\n"
        "--explain prints every key with its value and origin; --dry-run prints what would be done.\n"
        "Exit codes: 0 done, 1 failed, 2 bad input, 75 stopped and resumable (the same command continues)."
    )


def is_first_rank() -> bool:
    """Whether this process is the one of its job that talks."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


if __name__ == "__main__":
    sys.exit(main())
