"""Training on a Ray cluster: the same ranks, started, grouped and started again by Ray Train instead of a scheduler."""

from __future__ import annotations

import functools
import os
import sys
import time
from pathlib import Path

from cluster.preemption import StopFlag
from cluster.process import BAD_INPUT, Process
from cluster.ray import RayError, ray_session
from cluster.ray_train import Ranks, Verdict, check_all_fit, has_gpus, run_on_ray
from dermfm.border import is_bad_input
from dermfm.config import InputError
from dermfm.plan import TrainConfig
from dermfm.rank import run_rank

RAY_NOTES = ".ray"  # Ray Train's own notes in the run directory, while it runs


def train_on_ray(config: TrainConfig) -> int:
    """Run `ray.workers` ranks on the cluster at `ray.address`, or on an own one of this machine; the exit code.

    The ranks go on from the run's newest checkpoint, at the first start and at each one after a rank was lost. The run
    directory and the shards must be seen by all nodes. Raises InputError where there is no cluster or no room.
    """
    most = config.ray.most
    try:
        with ray_session(config.ray.address):
            gpus = config.ray.gpus if config.device == "cuda" or (config.device == "auto" and has_gpus()) else 0.0
            ranks = Ranks(config.ray.least, most, config.ray.cpus, gpus, config.ray.max_failures)
            if config.ray.address is None:
                check_all_fit(ranks)
            return run_on_ray(functools.partial(_rank, config), ranks, Path(config.run) / RAY_NOTES)
    except RayError as error:
        raise InputError(f"ray: {error}") from error


def _rank(config: TrainConfig, process: Process, stop: StopFlag, verdict: Verdict) -> int:
    """One rank; what a launcher's process would print on its way out is printed here."""
    os.environ["DERMFM_STARTED"] = str(time.time())  # Ray's worker may have waited long before
    try:
        return run_rank(config, process, stop, verdict)
    except Exception as error:
        if not is_bad_input(error):
            raise
        if process.is_first:
            print(f"dermfm train: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
