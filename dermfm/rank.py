"""One rank of a training job: from its start to its exit code, and the one line that tells why it failed."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from cluster.preemption import StopFlag
from cluster.process import BAD_INPUT, FAILED, RESUMABLE, Process, close_group, default_threads, meet, start_group
from cluster.watchdog import Watch
from dermfm.batch_memory import keep_freed
from dermfm.border import RunError, agree, is_bad_input
from dermfm.plan import TrainConfig
from dermfm.resume import resume_source
from dermfm.run import check_writable, take_lock
from dermfm.speed import Laps

_log = logging.getLogger(__name__)


def run_rank(
    config: TrainConfig,
    process: Process,
    stop: StopFlag | None = None,
    verdict: Callable[[int], object] = lambda _: None,
) -> int:
    """Train as one rank; the exit code. Raises what this rank is the first to fail with; the others end quietly.

    The rank meets the others at the job's store first: from then on each hears of any failure, also of one that comes
    before the process group, in which the first rank decides where to go on. `stop` null: the one that this process's
    signals set. `verdict(code)` hears of an end that no new start would change: bad input, or agreed by all ranks.
    """
    laps = Laps()
    for package in ("dermfm", "cluster"):  # what comes before `write_logs` is told by the one line of `_fail`
        logging.getLogger(package).addHandler(logging.NullHandler())
    stop = StopFlag.of_process() if stop is None else stop
    watch = Watch(process, meet(process, "watch"), log_of(config, process), config.stall_s, config.stall_end_s)
    try:
        laps.lap("meeting")
        code = _train(config, process, stop, watch, laps)
        watch.close()
        close_group()
    except BaseException as error:
        if is_bad_input(error) or isinstance(error, RunError):
            verdict(BAD_INPUT if is_bad_input(error) else FAILED)
        return _fail(error, process, watch)
    return code


def _train(config: TrainConfig, process: Process, stop: StopFlag, watch: Watch, laps: Laps) -> int:
    import torch

    from dermfm import zero
    from dermfm.train import train

    zero.ready(process.device)  # its import takes seconds that are no work of the run's
    laps.lap("imports")
    if process.device == "cpu":
        keep_freed()
    torch.set_num_threads(default_threads(config.threads, process.local_world))
    check_writable(Path(config.run))
    with take_lock(Path(config.run)) if process.is_first else contextlib.nullcontext():
        write_logs(log_of(config, process), process)
        source = resume_source(config, process, watch)
        laps.lap("resume")
        start_group(process)
        laps.lap("group")
        if agree(bool(stop), writing=False).stop:  # nothing is new: no model is built to be stopped at its first step
            _log.info("stopped before the first step; the same command continues")
            return RESUMABLE
        return train(config, process, source, stop, watch, laps)


def log_of(config: TrainConfig, process: Process) -> Path:
    """The file that a rank logs to."""
    return Path(config.run) / "log" / f"rank{process.rank}.log"


def _fail(error: BaseException, process: Process, watch: Watch) -> int:
    """Tell the other ranks, and the user once. The exit code, or the error itself where it is this rank's to raise."""
    bad_input = is_bad_input(error)
    told = None if bad_input or isinstance(error, RunError) else error
    _log.error("failed: %s", error, exc_info=told, extra={"quiet": True})
    by_all = isinstance(error, RunError) or getattr(error, "agreed", False)
    theirs = watch.failed(error, BAD_INPUT if bad_input else FAILED, by_all)
    if theirs is not None:
        return theirs
    if isinstance(error, RunError):
        if process.is_first:
            print(f"dermfm train: {error}", file=sys.stderr)
        return FAILED
    raise error


def write_logs(log: Path, process: Process) -> None:
    """Log to the terminal (of the other ranks only warnings) and to <run>/log/rank<N>.log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    terminal = logging.StreamHandler(sys.stdout)
    terminal.setLevel(logging.INFO if process.is_first else logging.WARNING)
    terminal.setFormatter(logging.Formatter("%(message)s" if process.is_first else f"rank {process.rank}: %(message)s"))
    terminal.addFilter(_is_for_people)
    file = logging.FileHandler(log)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[terminal, file])


def _is_for_people(entry: logging.LogRecord) -> bool:
    """Whether a log entry goes to the terminal, too; the file has all.

    Python prints a traceback once, on its way out. Below a warning, what no named logger says is chatter of packages:
    commands of a compiler, for one.
    """
    nameless = entry.name == "root" and entry.levelno < logging.WARNING
    return entry.exc_info is None and not getattr(entry, "quiet", False) and not nameless
