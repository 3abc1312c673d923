"""SLURM from the outside: batch scripts with other directives, sbatch, the state of a job, requeue and cancel."""

from __future__ import annotations

import difflib
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

CALL_S = 60.0
DIRECTIVE = "#SBATCH --"
REMEDY = "run this on a login node of the cluster, or give --dry-run to see the script"
# What sbatch says where it refuses a script → what to do about it, in the words of a submission.
REMEDIES = {
    "node configuration is not available|More processors|Node count": (
        "no node here gives all that is asked for ({asked}); lower cpus=, memory=, gpus=, nodes=, or name a partition="
    ),
    "feature specification": "constraint= names features of nodes; sinfo -o '%N %f' lists them",
    "node name": "directives.nodelist= and directives.exclude= name nodes; sinfo -N lists them",
    "account": "account= names an account that may use this partition; sacctmgr show associations lists yours",
    "qos|QOS": "qos= names a quality of service; sacctmgr show qos lists them",
    "--time|time limit": "time= is minutes (90), 24:00:00 or 2-12:00:00, within the partition's limit (sinfo -o %l)",
    "--mem": "memory= is written as 64G, a node's",
    "unrecognized option": "directives.<name>= takes options of sbatch; sbatch --help lists them",
}
ASKED = ("nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "gpus-per-node", "mem", "partition", "nodelist")
# What the parts of `scontrol show job` are called here.
FIELDS = {"JobState": "state", "Reason": "reason", "Restarts": "restarts", "NodeList": "nodes", "RunTime": "run_time"}


class SlurmError(ValueError):
    """SLURM is not here or refuses; one line with the remedy."""


def render(template: str, directives: Mapping[str, str | None], lines: Sequence[str]) -> str:
    """A batch script with other `#SBATCH` directives, and with `lines` before its first command.

    `template` is a script whose directives stand together. `directives` maps option names ("nodes", "requeue") to
    values; "" is an option without a value, null takes it out, and what is not named stays as the template has it.
    `lines` are put after the line that starts with `set -`.
    """
    rows = template.splitlines()
    own = {m[1]: m[2] or "" for row in rows if (m := re.match(r"#SBATCH --([\w-]+)(?:=(.*?))?\s*(?:#.*)?$", row))}
    wanted = {**own, **directives}
    first = next(i for i, row in enumerate(rows) if row.startswith(DIRECTIVE))
    block = [
        f"{DIRECTIVE}{name}" + (f"={value}" if value else "") for name, value in wanted.items() if value is not None
    ]
    rest = [row for row in rows[first:] if not row.startswith(DIRECTIVE)]
    start = next(i for i, row in enumerate(rest) if row.startswith("set -")) + 1
    shebang = [row for row in rows[:first] if row.startswith("#!")]
    return "\n".join([*shebang, *block, *rest[:start], *lines, *rest[start:]]) + "\n"


def quoted(value: str) -> str:
    """A directive's value that sbatch reads as it is: quoted; SlurmError for a line break."""
    if "\n" in value or "\r" in value:
        raise SlurmError(f"'{value!r}' holds a line break, which a batch script cannot; give another name or path")
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def submit(script: Path, after: int | None = None) -> int:
    """Queue a script, to start once job `after` has ended well (and never, if it has not); the job's id.

    Raises SlurmError with SLURM's own reason where it refuses.
    """
    options = ["--parsable"]
    if after is not None:
        options += [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    return int(_call("sbatch", *options, str(script)).split(";")[0])


def check(script: Path) -> str:
    """What `sbatch --test-only` says of a script; SlurmError with the reason where it would be refused."""
    try:
        return _call("sbatch", "--test-only", str(script), with_errors=True)
    except SlurmError as error:
        told = next((remedy for said, remedy in REMEDIES.items() if re.search(said, str(error))), f"see {script}")
        raise SlurmError(f"{error}; {told.format(asked=_asked(script))}") from error


def _asked(script: Path) -> str:
    """The resources in a script's directives, those that its template has by itself too."""
    rows = re.findall(r'(?m)^#SBATCH --([\w-]+)="?(.*?)"?$', script.read_text(encoding="utf-8"))
    return " ".join(f"--{name}={value}" for name, value in rows if name in ASKED)


def job(job_id: int) -> dict[str, str]:
    """state, reason, restarts, nodes and run_time of a job, {} once SLURM has forgotten it.

    Of an array, those of the first task that has not ended well, or else of its first task.
    """
    try:
        shown = _call("scontrol", "show", "job", "--oneliner", str(job_id))
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return {}
        raise
    rows = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in shown.splitlines() if line.strip()]
    tasks = [{FIELDS[name]: value for name, value in row.items() if name in FIELDS} for row in rows]
    return next((task for task in tasks if task.get("state") != "COMPLETED"), tasks[0] if tasks else {})


def cancel(job_id: int) -> None:
    """End a job; nothing happens to one that has ended."""
    _call("scancel", str(job_id))


def settings() -> dict[str, str]:
    """SLURM's own configuration (`scontrol show config`), for example MaxArraySize."""
    return {m[1]: m[2].strip() for m in re.finditer(r"^(\w+)\s*=(.*)$", _call("scontrol", "show", "config"), re.M)}


def partitions() -> dict[str, int]:
    """Partition → the most GPUs that a node of it has."""
    found: dict[str, int] = {}
    for row in _call("sinfo", "--noheader", "--format=%R %G").splitlines():  # one a partition and kind of node
        name, gres = row.split(maxsplit=1)
        found[name] = max(found.get(name, 0), _num_gpus(gres))
    return found


def check_site(partition: str | None, gpus: int, array: int) -> None:
    """SlurmError where the partition does not exist, its nodes have fewer GPUs, or the site allows no such array."""
    known = partitions()
    if partition is not None and partition not in known:
        near = difflib.get_close_matches(partition, known, n=1) or sorted(known)
        raise SlurmError(f"partition: '{partition}' does not exist here; it may be {' or '.join(near)}")
    has = max((num for name, num in known.items() if partition in (None, name)), default=0)
    if gpus > has:
        where = f"partition '{partition}'" if partition else "any partition"
        raise SlurmError(
            f"gpus: {gpus} a node are asked for, the nodes of {where} have {has}; lower it or name another"
        )
    if array > 1 and array > (limit := int(settings().get("MaxArraySize", "1001"))) - 1:
        raise SlurmError(f"array: {array} tasks are more than this site's {limit - 1}; lower it")


def _num_gpus(gres: str) -> int:
    """The GPUs in a node's generic resources: "gpu:a100:4(S:0-1),tmpdisk:900" has 4."""
    return sum(int(m[1]) for m in re.finditer(r"(?:^|,)gpu(?::[\w.-]+)?:(\d+)", gres))


def _call(program: str, *arguments: str, with_errors: bool = False) -> str:
    if shutil.which(program) is None:
        raise SlurmError(f"{program} is not on this machine's PATH; {REMEDY}")
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=CALL_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise SlurmError(
            f"{program} did not answer in {CALL_S:g} s; SLURM's controller may be down, try later"
        ) from error
    if done.returncode:
        told = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
        told = [line for line in told if not line.startswith("Try ")] or told
        raise SlurmError(f"{program} refuses: {told[-1].removeprefix(program).lstrip(': ')}")
    return (done.stdout + done.stderr if with_errors else done.stdout).strip()
