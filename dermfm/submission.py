"""A job frozen for a scheduler: resolved config and code in its folder, and the batch script that runs them."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import slurm
from dermfm.config import InputError, check_range, key, nearest, short_hash, to_yaml
from dermfm.journal import note
from shards.files import file_sha256, write_text

if TYPE_CHECKING:
    from dermfm.pipeline import PipelineConfig

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("launch", "cluster", "dermfm", "shards", "configs", "slurm")
# `python <folder of the code>` puts that folder, and not the working directory, first on the path of modules.
PROGRAM = "import sys\n\nfrom launch.cli import main\n\nif __name__ == '__main__':\n    sys.exit(main())\n"
# job → the file in slurm/ that runs it. Jobs of `PLAIN` run on one node without GPUs, whatever is asked for.
TEMPLATES = {
    "records": "shards.sbatch",
    "notes": "notes.sbatch",
    "shards": "shards.sbatch",
    "train": "train.sbatch",
    "evaluate": "evaluate.sbatch",
    "report": "shards.sbatch",
    "study": "shards.sbatch",
}
PLAIN = ("records", "shards", "report")
ARRAYS = ("notes", "shards", "study")
ONE_TASK = ("notes", "study")  # one process a node, which starts others itself
GUESTS = ("evaluate", "report")  # they work in a training run's folder


@dataclass(kw_only=True)
class SlurmConfig:
    """What a job asks of SLURM; null leaves it to the site, or to the file in slurm/."""

    nodes: int = key(1, "nodes; records, shards and report take one")
    gpus: int = key(0, "GPUs a node")
    tasks_per_node: int = key(0, "processes a node of train and evaluate; 0: one a GPU, or one")
    cpus: int | None = key(None, "CPUs a task")
    time: str | None = key(None, "longest time of one start, as SLURM writes it (24:00:00); restarts chain to the end")
    partition: str | None = key(None, "partition")
    account: str | None = key(None, "account that pays")
    qos: str | None = key(None, "quality of service")
    constraint: str | None = key(None, "features that nodes must have")
    memory: str | None = key(None, "memory a node (64G)")
    array: int = key(1, "notes, shards and study: so many jobs side by side, each with its share")
    name: str | None = key(None, "job name; null: dermfm-<job>")
    warn_s: int = key(120, "seconds before the time limit at which the job is told to stop")
    setup: list[str] = key([], "shell lines that run first, as they are (module load cuda)")
    container: str | None = key(None, "Apptainer image that holds Python and the packages")
    directives: dict[str, str | None] = key({}, "further sbatch options: {reservation: weekend, exclusive: null}")

    def __post_init__(self) -> None:
        for name in ("nodes", "array"):
            check_range(name, getattr(self, name), 1)
        for name in ("gpus", "tasks_per_node"):
            check_range(name, getattr(self, name), 0)
        check_range("warn_s", self.warn_s, 1)


@dataclass(kw_only=True)
class RayConfig:
    """The Ray cluster that a job is sent to. Its nodes see the same files as this machine."""

    address: str = key("http://127.0.0.1:8265", "job server of the cluster, http://<head node>:8265")
    environment: dict[str, str] = key({}, "further environment variables of the job")


@dataclass(frozen=True)
class RayCommand:
    """What the job server is given: a shell command, the folder of the code, environment variables."""

    command: str
    code: Path
    environment: dict[str, str]


@dataclass(frozen=True)
class Submission:
    """A job that is ready to be queued: its name, folder, batch script and log (SLURM's pattern)."""

    job: str
    folder: Path
    script: Path
    log: str


def folder_of(job: str, config: Any) -> Path:
    """The folder that a job works in: the run, the notes' or shards' folder, the folder of records.parquet."""
    if job == "records":
        return Path(config.out).parent
    place = config.out if job in ARRAYS else config.run
    if place is None:
        raise InputError(f"{job}: run= is needed to submit it, it names the folder of script and log")
    return Path(place)


def world_of(job: str, site: SlurmConfig) -> int:
    """Processes that a job will have."""
    return 1 if job in (*PLAIN, *ONE_TASK) else site.nodes * (site.tasks_per_node or max(site.gpus, 1))


def prepare(
    job: str, config: Any, site: SlurmConfig, root: Path | None = None, script: str | None = None
) -> Submission:
    """Write the resolved config, the code and the batch script into the job's folder.

    `root` is the folder of code and journal where it is not the job's own (a chain's). `script` is the script's name;
    null: submit.sbatch, or submit-<job>.sbatch for a job in a training run's folder.
    """
    settings = settings_of(job, config, site, script)
    folder, stem = settings.parent, settings.stem
    (folder / "log").mkdir(parents=True, exist_ok=True)
    write_text(settings, to_yaml(config))
    log = str(folder / "log" / f"slurm-{job}-")
    told = render(job, site, settings, freeze_code((root or folder).absolute()), log)
    write_text(folder / f"{stem}.sbatch", told)
    return Submission(job, (root or folder).absolute(), folder / f"{stem}.sbatch", log)


def settings_of(job: str, config: Any, site: SlurmConfig, script: str | None = None) -> Path:
    """Where the resolved config goes, beside the script; InputError for an array of a job that has no shares."""
    if site.array > 1 and job not in ARRAYS:
        raise InputError(f"array: '{job}' cannot be cut into shares, only {', '.join(ARRAYS)} can; leave array= out")
    stem = (script or (f"submit-{job}.sbatch" if job in GUESTS else "submit.sbatch")).removesuffix(".sbatch")
    return folder_of(job, config).absolute() / f"{stem}.yaml"


def render(job: str, site: SlurmConfig, settings: Path, code: Path, log: str) -> str:
    """The batch script of a job: the file in slurm/ with these resources, this config and this code."""
    template = (ROOT / "slurm" / TEMPLATES[job]).read_text(encoding="utf-8")
    return slurm.render(template, _directives(job, site, log), _lines(job, site, settings, code))


def freeze_code(folder: Path) -> Path:
    """Copy the packages to <folder>/code/<hash>, so that later edits do not reach a queued job; that folder."""
    files = sorted(
        p for name in PACKAGES for p in (ROOT / name).rglob("*") if p.is_file() and "__pycache__" not in p.parts
    )
    names = [str(p.relative_to(ROOT)) for p in files]
    target = folder / "code" / short_hash([[n, file_sha256(p)] for n, p in zip(names, files, strict=True)])
    if target.is_dir():
        return target
    partial = target.with_name(target.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    for name, path in zip(names, files, strict=True):
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, partial / name)
    (partial / "__main__.py").write_text(PROGRAM)
    partial.replace(target)
    return target


def queue(submission: Submission, after: int | None = None) -> int:
    """Hand a script to SLURM and note it in the folder's journal; the job's id."""
    job_id = slurm.submit(submission.script, after)
    suffix = "%A_%a.out" if "array" in _options(submission.script) else "%j.out"
    entry = {
        "job": submission.job,
        "scheduler": "slurm",
        "id": job_id,
        "after": after,
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "script": str(submission.script),
        "log": submission.log + suffix.replace("%A", str(job_id)).replace("%j", str(job_id)).replace("%a", "*"),
    }
    note(submission.folder, entry)
    return job_id


def check_ray(job: str, config: Any) -> None:
    """InputError for a training job that does not say how many ranks it wants of the cluster."""
    if job == "train" and not config.ray.most:
        raise InputError("ray.workers: submit ray train needs the number of ranks; give ray.workers=N, or [a, b]")


def ray_command(job: str, config: Any, site: RayConfig, folder: Path, dry_run: bool = False) -> RayCommand:
    """Freeze a job into its folder for a Ray cluster. Records, notes and ranks made there join that cluster."""
    if job in ("records", "notes") and config.address is None:
        config = dataclasses.replace(config, address="auto")
    if job == "train" and config.ray.address is None:
        config = dataclasses.replace(config, ray=dataclasses.replace(config.ray, address="auto"))
    folder = folder.absolute()
    settings = folder / (f"submit-{job}.yaml" if job in GUESTS else "submit.yaml")
    code = folder / "code"
    if not dry_run:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(settings, to_yaml(config))
        code = freeze_code(folder)
    run = shlex.join([job, str(settings)])
    # The job server's own working directory is the code; relative paths of the config mean this one.
    # This machine's Python where the cluster has it, else the one of the image that Ray runs in.
    start = f'code="$PWD" python={shlex.quote(sys.executable)}; [ -x "$python" ] || python=python'
    start += '; export PYTHONPATH="$code" PYTHONSAFEPATH=1'
    command = f'{start}; cd {shlex.quote(str(Path.cwd()))} && exec "$python" "$code" {run}'
    return RayCommand(command, code, dict(site.environment))


def _options(script: Path) -> set[str]:
    rows = script.read_text(encoding="utf-8").splitlines()
    return {row.removeprefix(slurm.DIRECTIVE).split("=")[0] for row in rows if row.startswith(slurm.DIRECTIVE)}


def _directives(job: str, site: SlurmConfig, log: str) -> dict[str, str | None]:
    plain = job in PLAIN
    is_array = site.array > 1
    found: dict[str, str | None] = {
        "job-name": slurm.quoted(site.name or f"dermfm-{job}"),
        "nodes": "1" if plain else str(site.nodes),
        "gpus-per-node": str(site.gpus) if site.gpus and not plain else None,
        "output": slurm.quoted(log).replace("%", "%%").removesuffix('"') + ('%A_%a.out"' if is_array else '%j.out"'),
        "chdir": slurm.quoted(str(Path.cwd())),
        "array": f"0-{site.array - 1}" if is_array else None,
    }
    if not plain and job not in ONE_TASK:
        found["ntasks-per-node"] = str(site.tasks_per_node or max(site.gpus, 1))
    optional = {
        "cpus-per-task": site.cpus,
        "time": site.time,
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "constraint": site.constraint,
        "mem": site.memory,
    }
    found |= {name: slurm.quoted(str(value)) for name, value in optional.items() if value is not None}
    found["signal"] = f"USR1@{site.warn_s}"
    return found | {name: slurm.quoted(value) if value else "" for name, value in site.directives.items()}


def _lines(job: str, site: SlurmConfig, settings: Path, code: Path) -> Sequence[str]:
    """Shell lines that a submitted script has before the file's own: the frozen code and config."""
    command = [sys.executable, str(code)]
    if site.container:
        command = ["apptainer", "exec", *(["--nv"] if site.gpus else []), site.container, "python", str(code)]
    quoted = shlex.quote(str(code))
    return [
        "",
        "# Frozen at submission: this code, this configuration. This file can be submitted again by hand.",
        *site.setup,
        f'export PYTHONPATH={quoted}"${{PYTHONPATH:+:$PYTHONPATH}}" PYTHONSAFEPATH=1',
        f"DERMFM=({shlex.join(command)})",
        *([f"JOB={job}"] if TEMPLATES[job] == "shards.sbatch" else []),
        f"set -- {shlex.quote(str(settings))}",
    ]


def own_keys(schema: type) -> tuple[str, ...]:
    """The keys of a command line that are the scheduler's and not the job's."""
    return tuple(f.name for f in dataclasses.fields(schema))


def check_words(schema: type, site: type, words: Sequence[str]) -> None:
    """InputError for a `key=value` that is no key of the job, with the nearest one of the job's or the scheduler's."""
    valid = [f.name for f in dataclasses.fields(schema)]
    for word in words:
        name = word.split("=")[0].split(".")[0]
        if name not in valid:
            raise InputError(f"command line: unknown key '{name}'; {nearest(name, [*valid, *own_keys(site)])}")


def chain(config: PipelineConfig) -> dict[str, Any]:
    """The jobs of a chain in their order, each with its own configuration."""
    from dermfm.pipeline import JOBS  # all jobs' modules, torch with them: not for those who submit one

    return {job: getattr(config, job) for job in JOBS}


def site_of(job: str, site: SlurmConfig, in_chain: bool) -> SlurmConfig:
    """What one job of a chain asks for: `array` is for those that can be cut, one node for evaluation."""
    if not in_chain:
        return site
    own = dataclasses.replace(site, array=site.array if job in ARRAYS else 1, name=site.name and f"{site.name}-{job}")
    return dataclasses.replace(own, nodes=1) if job == "evaluate" else own
