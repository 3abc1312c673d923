"""Hand a job to a scheduler: `dermfm submit (slurm | ray) (<job> | pipeline) [config.yaml] [key=value …]`.

  dermfm submit slurm train configs/gpu/pretrain.yaml run=runs/my shards=… nodes=4 gpus=8 time=12:00:00 partition=gpu
  dermfm submit slurm pipeline configs/demo.yaml out=runs/chain nodes=2 gpus=8
  dermfm submit ray notes records=runs/my/records.parquet out=runs/my/notes address=http://head:8265
  dermfm submit ray train configs/gpu/pretrain.yaml run=runs/my shards=… ray.workers=16 address=http://head:8265

The config is checked here, not in the queue. It is written resolved, together with a copy of the code, into the job's
folder, and SLURM's script with it: submit.sbatch can be submitted again by hand. --dry-run prints the script.
"""

from __future__ import annotations

import importlib
import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import ray_job, slurm
from dermfm import submission
from dermfm.config import InputError, load
from dermfm.journal import note
from dermfm.run import check_free
from dermfm.status import check_idle
from dermfm.submission import RayConfig, SlurmConfig

if TYPE_CHECKING:
    from launch.cli import Call

PIPELINE = "pipeline"
JOBS = {"slurm": (*submission.TEMPLATES, PIPELINE), "ray": tuple(submission.TEMPLATES)}
SCHEMAS = {"slurm": SlurmConfig, "ray": RayConfig}


def keys(verb: str) -> tuple[str, ...]:
    """The keys of a command line that are the scheduler's."""
    return submission.own_keys(SCHEMAS[verb])


def schema(call: Call) -> type:
    """What is asked of the scheduler."""
    return SCHEMAS[str(call.verb)]


def run(site: Any, call: Call) -> int:
    """Check, freeze, queue; of a Ray job also follow its log, and return its exit code."""
    target = call.target
    assert target is not None
    job = target.job
    left = target.verb or ("--report" if target.report else None)
    if left:
        raise InputError(f"submit: '{job} {left}' cannot be submitted; submit '{job}', and run that here")
    own = importlib.import_module(f"launch.{job}").schema(target)
    submission.check_words(own, SCHEMAS[str(call.verb)], target.overrides)
    config = load(own, target.config, target.overrides)
    if call.verb == "ray":
        return submit_ray(job, config, site, call.dry_run)
    parts = {job: config} if job != "demo" else submission.chain(config)
    return submit_slurm(parts, site, None if job != "demo" else Path(config.out), call.dry_run)


def submit_slurm(parts: dict[str, Any], site: SlurmConfig, root: Path | None, dry_run: bool) -> int:
    """Queue one job, or a chain of them in the folder `root`, each after the one before."""
    if dry_run:
        with tempfile.TemporaryDirectory() as folder:
            for job, config in parts.items():
                own = submission.site_of(job, site, root is not None)
                settings = submission.settings_of(job, config, own, name_in_chain(job, root))
                print(submission.render(job, own, settings, Path(folder), "slurm-"))
        return 0
    if root is None and "dependency" not in site.directives:  # else its inputs may still be made
        job, config = next(iter(parts.items()))
        check(job, config, submission.world_of(job, site))
    slurm.check_site(site.partition, site.gpus, site.array)
    check_idle((root or submission.folder_of(*next(iter(parts.items())))).absolute(), parts)
    after = None
    ready = [
        submission.prepare(job, config, submission.site_of(job, site, root is not None), root, name_in_chain(job, root))
        for job, config in parts.items()
    ]
    for one in ready:
        slurm.check(one.script)
    for one in ready:
        after = submission.queue(one, after)
        print(f"{one.job}: SLURM job {after}, {one.script}")
    print(f"watch it with: dermfm status {shlex.quote(str(ready[0].folder))}")
    return 0


def name_in_chain(job: str, root: Path | None) -> str | None:
    """A chain's records share the run's folder with its training: the script has the job in its name."""
    return f"submit-{job}.sbatch" if root is not None and job == "records" else None


def check(job: str, config: Any, world: int) -> None:
    """What the job itself would refuse at its start, with the world that it will have."""
    module = importlib.import_module(f"launch.{job}")
    if hasattr(module, "check"):
        module.check(config, world)
    if job == "train":
        check_free(Path(config.run))


def submit_ray(job: str, config: Any, site: RayConfig, dry_run: bool) -> int:
    """Send a job to a running Ray cluster, follow its log, and return its exit code."""
    folder = submission.folder_of(job, config)
    submission.check_ray(job, config)
    if not dry_run:
        check(job, config, 1)
        ray_job.check(site.address)
        check_idle(folder.absolute(), [job])
    told = submission.ray_command(job, config, site, folder, dry_run)
    if dry_run:
        print(told.command)
        return 0
    number = ray_job.submit(site.address, told.command, str(told.code), told.environment)
    note(folder, {"job": job, "scheduler": "ray", "id": number, "address": site.address})
    print(f"{job}: Ray job {number} at {site.address}; it goes on without this terminal", flush=True)
    try:
        return ray_job.follow(site.address, number)
    except KeyboardInterrupt:
        name = shlex.quote(str(folder))
        print(f"\n{job} goes on; dermfm status {name}, and dermfm cancel {name} ends it", flush=True)
        return 0
