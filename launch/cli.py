"""`dermfm <job> [verb …] [config.yaml] [key=value …]`: the only door. Parses, loads the config, calls one job."""

from __future__ import annotations

import dataclasses
import importlib
import os
import signal
import sys
import threading
from collections.abc import Sequence

from cluster.preemption import StopFlag
from cluster.process import BAD_INPUT, DONE, RESUMABLE, ProcessError, is_launched
from cluster.ray import RayError
from cluster.ray_job import RayJobError
from cluster.slurm import SlurmError
from dermfm.config import DISK_ERRORS, InputError, explain, load, nearest
from shards.manifest import ShardError

# job → (summary, verbs). Each job is the module launch.<job> with `schema(call)` and `run(config, call) -> int`.
JOBS: dict[str, tuple[str, tuple[str, ...]]] = {
    "records": ("read data sets' own tables and images into records.parquet", ()),
    "notes": ("synthesize clinical notes for the records with an LLM on Ray actors", ()),
    "shards": ("pack images and notes into WebDataset shards", ("add-notes", "verify", "index")),
    "train": ("pretrain the image-text model with DeepSpeed ZeRO", ()),
    "plan": ("memory per GPU, time, disk and communication of a training run on any nodes × GPUs", ()),
    "evaluate": ("score a checkpoint: classification, zero-shot, retrieval, per data set and partition", ()),
    "study": ("compare ways of writing notes with their controls: cells, effects with intervals", ()),
    "export": ("write a checkpoint as a folder that stands alone: weights, processor, calibration, model card", ()),
    "predict": ("classes, nearest notes, reports and attention maps for a folder of images, as CSV and HTML", ()),
    "report": ("write one self-contained HTML page about a run", ()),
    "submit": ("hand a job, or the pipeline of all, to SLURM or to a Ray cluster", ("slurm", "ray")),
    "status": ("state, step, speed, time left and last log lines of a submitted or running job", ()),
    "cancel": ("end what was submitted for a folder", ()),
    "doctor": ("check a node, or all nodes of an allocation, before a job burns hours", ()),
    "demo": ("run the whole chain on the embedded atlas or on a folder of real images", ()),
}
FOLDER_JOBS = ("status", "cancel")  # `dermfm status runs/my` is `dermfm status run=runs/my`
PIPELINE = "pipeline"
FLAGS = ("--explain", "--dry-run", "--report", "--help", "-h")
REPORTING = ("records", "notes")  # jobs that take --report


@dataclasses.dataclass(frozen=True)
class Call:
    """One parsed command line. `overrides` are the `key=value` items in order, of `submit` those of the scheduler."""

    job: str
    verb: str | None
    config: str | None
    overrides: tuple[str, ...]
    dry_run: bool
    explain: bool
    help: bool
    report: bool = False
    target: Call | None = None  # of `submit`: the job that is handed over


def main(argv: Sequence[str] | None = None) -> int:
    """Run one job. Returns the exit code: 0 done, 1 failed, 2 bad input, 75 stopped and resumable."""
    # C++ warnings of torch (host names, lost connections of a rank that ends) hide the one line that tells.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("--help", "-h", "help"):
        show(usage())
        return DONE if argv else BAD_INPUT
    heed_stops(argv[0])
    try:
        call = parse(argv)
        job = importlib.import_module(f"launch.{call.job}")
        schema = job.schema(call)
        if call.help:
            head = f"{(job.__doc__ or '').strip()}\n\nKeys (dermfm {call.job} --explain shows values and origins):"
            show(f"{head}\n{explain(schema)}")
            return DONE
        if call.explain:
            show(explain(schema, call.config, call.overrides))
            return DONE
        config = load(schema, call.config, call.overrides)
        return int(job.run(config, call))
    except OSError as error:
        if error.errno not in DISK_ERRORS or not error.filename or "DERMFM_TRACEBACK" in os.environ:
            raise
        if is_first_rank():
            print(f"dermfm {argv[0]}: {error.filename}: {error.strerror}; give another path", file=sys.stderr)
        return BAD_INPUT
    except (InputError, ShardError, ProcessError, SlurmError, RayError, RayJobError) as error:
        if is_first_rank():
            print(f"dermfm {argv[0]}: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"\ndermfm {argv[0]}: stopped; the same command continues", file=sys.stderr)
        return RESUMABLE


def show(text: str) -> None:
    """Print a text to be read; a reader that has read enough (`| head`) is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter tells of it at its end


def parse(argv: Sequence[str]) -> Call:
    """Split a command line into job, verb, config file, overrides and flags; InputError names what is not valid."""
    job, *rest = argv
    if job not in JOBS:
        raise InputError(f"unknown job '{job}'; {nearest(job, JOBS)}")
    if job == "submit":
        return _parse_submit(rest)
    verbs = JOBS[job][1]
    flags = [a for a in rest if a.startswith("-")]
    for flag in flags:
        if flag not in FLAGS:
            raise InputError(f"unknown option '{flag}'; {nearest(flag, FLAGS)}")
    if "--report" in flags and job not in REPORTING:
        raise InputError(f"{job} takes no --report; jobs that do: {', '.join(REPORTING)}")
    words = [a for a in rest if not a.startswith("-")]
    overrides = tuple(a for a in words if "=" in a)
    plain = [a for a in words if "=" not in a]
    verb = plain.pop(0) if plain and plain[0] in verbs else None
    config = plain.pop(0) if plain and plain[0].endswith((".yaml", ".yml")) else None
    if job in FOLDER_JOBS and len(plain) == 1:
        overrides += (f"run={plain.pop()}",)
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
        report="report" in chosen,
    )


def _parse_submit(rest: Sequence[str]) -> Call:
    """`submit (slurm | ray) (<job> | pipeline) …`: the scheduler's keys apart from the job's."""
    module = importlib.import_module("launch.submit")
    flags = [a for a in rest if a.startswith("-")]
    verb, job, *others = [*[a for a in rest if not a.startswith("-")], "", ""][: max(len(rest) - len(flags), 2)]
    asks = set(flags) & {"--help", "-h", "--explain"}
    if verb not in JOBS["submit"][1] and not (asks and not verb):
        raise InputError(f"submit: '{verb}' takes no jobs; {nearest(verb, JOBS['submit'][1])}")
    if asks and not job:
        return Call("submit", verb or "slurm", None, (), False, "--explain" in flags, "--explain" not in flags)
    if job not in module.JOBS[verb]:
        raise InputError(f"submit {verb}: '{job}' cannot be submitted; {nearest(job, module.JOBS[verb])}")
    keys = module.keys(verb)
    own = tuple(a for a in others if "=" in a and a.split("=")[0].split(".")[0] in keys)
    inner = parse(["demo" if job == PIPELINE else job, *flags, *[a for a in others if a not in own]])
    return dataclasses.replace(inner, job="submit", verb=verb, config=None, overrides=own, target=inner)


def usage() -> str:
    """The text of `dermfm --help`."""
    jobs = "\n".join(f"  {name:10s}{summary}" for name, (summary, _) in JOBS.items())
    return (
        "dermfm <job> [verb] [config.yaml] [key=value …] [--explain | --dry-run | --help]\n\n"
        f"Jobs\n{jobs}\n\n"
        "--explain prints every key with its value and origin; --dry-run prints what would be done;\n"
        "records --report and notes --report write a page about what they made.\n"
        "Exit codes: 0 done, 1 failed, 2 bad input, 75 stopped and resumable (the same command continues)."
    )


def heed_stops(job: str) -> None:
    """From the first moment SIGTERM and SIGUSR1 (of a scheduler) do what Ctrl-C does: exit code 75, what is done stays.

    A rank of a training only notes them: it must meet the others before it leaves, or they would wait for it.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    if job == "train" and is_launched():
        StopFlag.of_process()
        return
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.default_int_handler)


def is_first_rank() -> bool:
    """Whether this process is the one of its job that talks."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


if __name__ == "__main__":
    sys.exit(main())
