"""Sharded checkpoints: written under a temporary name by all ranks, verified, committed by one rename, pruned.

`ckpt/step-NNNNNNNN/` holds each rank's files, `state.json` (step, samples seen, identity, every file with size and
sha256) and the empty file `COMPLETE`; `ckpt/latest` names the newest one and `ckpt/best` the best by the validation
metric, both replaced atomically. A checkpoint with a file `KEEP` (it holds the reason) is never pruned.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dermfm import zero
from dermfm.config import InputError, from_dict, nearest, read_yaml
from dermfm.model.dermfm import DermFM, ModelConfig
from dermfm.writer import in_threads
from shards.files import file_sha256, write_text

LATEST, BEST, COMPLETE, STATE, KEEP = "latest", "best", "COMPLETE", "state.json", "KEEP"
UNIVERSAL, ASIDE = ".universal", ".aside"
_log = logging.getLogger(__name__)


@dataclass
class State:
    """What a run needs, besides weights and optimizer, to go on where it was.

    `samples_seen` is the position in the stream. `origin` is the `resume=` by which the run came about, "" for none.
    `best` is the best value of the validation metric so far, `best_step` its step. `meter`: seconds trained, steps
    skipped, the last losses. `schedule`, `code`, `config` say what the run was made with.
    """

    step: int
    samples_seen: int
    identity: dict[str, Any]
    world: int
    stage: int
    threads: int
    best: float | None = None
    best_step: int | None = None
    origin: str = ""
    fingerprint: str = ""
    code: str = ""
    config: str = ""
    schedule: dict[str, Any] = field(default_factory=dict)
    meter: dict[str, Any] = field(default_factory=dict)
    files: list[dict[str, Any]] = field(default_factory=list)


def step_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def begin(engine: Any, folder: Path, state: State) -> Path:
    """Hand every rank's part to its writer, under a temporary name; returns the folder to be. Collective."""
    partial = folder / f"{step_name(state.step)}.tmp"
    if dist.get_rank() == 0 and partial.exists():
        shutil.rmtree(partial)
    dist.barrier()
    zero.save(engine, folder, partial.name, {"samples_seen": state.samples_seen})
    return partial


def commit(engine: Any, partial: Path, state: State) -> Path:
    """Wait for the writers, verify, rename into place and replace `latest`. Collective; returns the checkpoint.

    OSError on every rank where any could not write its part; nothing is committed then.
    """
    own: tuple[list[dict[str, Any]], str | None]
    try:
        own = zero.written(engine, partial), None
    except OSError as error:
        own = [], f"rank {dist.get_rank()}: {error.strerror or error}"
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    errors = [error for _, error in parts if error]
    if dist.get_rank() == 0 and not errors:
        try:
            _commit(partial, state, list(itertools.chain(*(files for files, _ in parts))))
        except OSError as error:
            errors = [f"rank 0: {error.strerror or error}"]
    told = [errors]
    dist.broadcast_object_list(told, src=0)
    if told[0]:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{partial.name} could not be written: {told[0][0]}")
    return partial.with_name(step_name(state.step))


def save(engine: Any, folder: Path, state: State) -> Path:
    """Write, verify and commit a checkpoint before going on. Collective; returns its folder."""
    return commit(engine, begin(engine, folder, state), state)


def describe_file(path: Path, root: Path) -> dict[str, Any]:
    """Name below `root`, size and sha256 of a file, synced to disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"name": str(path.relative_to(root)), "size": path.stat().st_size, "sha256": file_sha256(path)}


def _commit(partial: Path, state: State, files: list[dict[str, Any]]) -> None:
    """By the first rank: see that every file is there as its writer says, describe the others, commit by one rename."""
    known = {f["name"]: f["size"] for f in files}
    paths = {str(p.relative_to(partial)): p for p in sorted(partial.rglob("*")) if p.is_file()}
    for name, size in known.items():
        if name not in paths or paths[name].stat().st_size != size:
            raise OSError(f"{partial / name} is not what was written ({size} bytes)")
    files = files + [describe_file(path, partial) for name, path in paths.items() if name not in known]
    ranks = sum("optim_states" in f["name"] or "model_states" in f["name"] for f in files)
    expected = state.world if state.stage else 1  # without ZeRO all ranks hold the same, and the first one writes it
    assert ranks >= expected, f"{ranks} state files of {state.world} ranks"
    final = partial.with_name(step_name(state.step))
    described = {**asdict(state), "files": sorted(files, key=lambda f: f["name"])}
    write_text(partial / STATE, json.dumps(described, indent=1))
    write_text(partial / COMPLETE, "")
    for older in (final, final.with_name(final.name + UNIVERSAL)):
        if older.exists():
            shutil.rmtree(older)
    partial.replace(final)
    _sync_folder(final.parent)
    write_text(final.parent / LATEST, final.name + "\n")
    if state.best_step == state.step:
        write_text(final.parent / BEST, final.name + "\n")


def _sync_folder(folder: Path) -> None:
    """Make a rename durable."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def keep(checkpoint: Path, reason: str) -> None:
    """Except a checkpoint from pruning, for good."""
    write_text(checkpoint / KEEP, reason + "\n")


def best(folder: Path) -> Path | None:
    """The checkpoint that `ckpt/best` names, if it is there."""
    try:
        found = folder / (folder / BEST).read_text().strip()
    except OSError:
        return None
    return found if (found / COMPLETE).is_file() else None


def point_best(folder: Path, step: int | None) -> None:
    """Let `ckpt/best` name the checkpoint of a step, where it is there, else nothing."""
    if step is not None and (folder / step_name(step) / COMPLETE).is_file():
        write_text(folder / BEST, step_name(step) + "\n")
    else:
        (folder / BEST).unlink(missing_ok=True)


def num_bytes(checkpoint: Path) -> int:
    """Size of a committed checkpoint."""
    return sum(f["size"] for f in read_state(checkpoint).files)


def prune(folder: Path, keep_last: int, keep_every: int) -> None:
    """Delete all but the last `keep_last` checkpoints, those whose step is a multiple of `keep_every` (0: none), the
    best one and those marked `KEEP`.

    What else lies beside checkpoints (half-written, converted, set aside) goes once its step is passed.
    """
    steps = complete_steps(folder)
    for step in steps[: max(len(steps) - keep_last, 0)]:
        home = folder / step_name(step)
        if (keep_every and step % keep_every == 0) or home == best(folder) or (home / KEEP).is_file():
            continue
        (home / COMPLETE).unlink()  # half deleted, it must not count
        shutil.rmtree(home)
    for leftover in folder.glob("step-????????.*"):
        if int(leftover.name[5:13]) < (steps[-1] if steps else 0):
            shutil.rmtree(leftover, ignore_errors=True)


def set_aside(folder: Path, step: int) -> None:
    """Rename the checkpoints after `step`, loudly: a run that goes on from there writes its own of those steps.

    Under their names they would be the newest ones: resumed from next, and kept in place of those of this run.
    """
    for name in (step_name(s) for s in complete_steps(folder) if s > step):
        aside = folder / f"{name}{ASIDE}"
        shutil.rmtree(aside, ignore_errors=True)
        (folder / name).replace(aside)
        _log.warning("checkpoint %s is set aside as %s: the run goes on from step %d", name, aside.name, step)


def complete_steps(folder: Path) -> list[int]:
    """Steps of the committed checkpoints in `folder`, ascending."""
    return sorted(int(p.parent.name[5:]) for p in folder.glob(f"step-????????/{COMPLETE}"))


def read_state(checkpoint: Path) -> State:
    """The state of a committed checkpoint; InputError where it is not one."""
    if not (checkpoint / COMPLETE).is_file():
        raise InputError(f"{checkpoint}: is not a complete checkpoint (no {COMPLETE}); {_siblings(checkpoint)}")
    try:
        return State(**json.loads((checkpoint / STATE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{checkpoint / STATE}: is damaged ({error})") from error


def damage(checkpoint: Path, hashes: bool = True) -> str | None:
    """What is wrong with the files of a committed checkpoint, or None."""
    files = read_state(checkpoint).files
    for entry in files:
        path = checkpoint / entry["name"]
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != entry["size"]:
            return f"{path} has {path.stat().st_size} bytes, {entry['size']} were written"
    found = in_threads(file_sha256, [checkpoint / entry["name"] for entry in files]) if hashes else []
    for entry, digest in zip(files, found, strict=False):
        if digest != entry["sha256"]:
            return f"{checkpoint / entry['name']} has changed since it was written (sha256 differs)"
    return None


def newest(folder: Path) -> Path | None:
    """The newest undamaged checkpoint, or None; damaged ones are passed over loudly."""
    for step in reversed(complete_steps(folder)):
        checkpoint = folder / step_name(step)
        try:
            wrong = damage(checkpoint)
        except InputError as error:
            wrong = str(error)
        if wrong is None:
            return checkpoint
        _log.warning("checkpoint %s is damaged and passed over: %s", checkpoint.name, wrong)
    return None


def find(path: str | Path) -> Path:
    """The checkpoint that a path names: its own folder, or a run folder's newest. InputError if there is none."""
    path = Path(path)
    if path.name.startswith("step-"):
        wrong = damage(path)
        if wrong is not None:
            raise InputError(f"{path}: the checkpoint is damaged: {wrong}; {_siblings(path)}")
        return path
    if not path.is_dir():
        raise InputError(f"{path}: no such run folder")
    found = newest(path / "ckpt")
    if found is None:
        raise InputError(f"{path}: holds no complete checkpoint under ckpt/; run `dermfm train` first")
    return found


def universal_form(checkpoint: Path) -> Path:
    """The folder of the checkpoint's universal form, converted where it is not there yet.

    By one process, before the process group exists, so that no collective can time out meanwhile.
    """
    target = checkpoint.with_name(checkpoint.name + UNIVERSAL)
    if not target.is_dir():
        shutil.rmtree(target.with_name(target.name + ".tmp"), ignore_errors=True)
        zero.convert_universal(checkpoint, target)
    return target


@dataclass(frozen=True)
class Source:
    """What a run resumes from: a committed checkpoint and the folder that DeepSpeed reads at this world size."""

    checkpoint: Path
    state: State
    folder: Path

    @property
    def is_universal(self) -> bool:
        """Whether `folder` is the converted form."""
        return self.folder.name.endswith(UNIVERSAL)


def source_for(checkpoint: Path, world: int, stage: int) -> Source:
    """The checkpoint as `world` ranks can read it: natively at the same world, else converted once.

    By one process, before the process group exists. InputError where the ZeRO stage differs.
    """
    state = read_state(checkpoint)
    if state.stage != stage:
        raise InputError(
            f"{checkpoint}: was written at zero.stage={state.stage}, the run asks for {stage}; "
            f"resume with zero.stage={state.stage}"
        )
    # Stage 0 keeps everything whole on every rank: any world reads it.
    native = state.world == world or stage == 0
    return Source(checkpoint, state, checkpoint if native else universal_form(checkpoint))


def load_model(path: str | Path, device: str = "cpu") -> DermFM:
    """The model of a run folder (newest checkpoint) or of one checkpoint folder, in eval mode, float32."""
    checkpoint = find(path)
    values = read_yaml(checkpoint.parent.parent / "config.yaml")["model"]
    values["image"]["weights"], values["text"]["pretrained"] = None, False  # the checkpoint brings every weight
    values["text"]["cache_mb"] = 0  # each note is encoded once here, faster in batches
    model = DermFM(from_dict(ModelConfig, values, str(checkpoint)))
    try:
        model.load_state_dict(zero.consolidated_weights(checkpoint.parent, checkpoint.name))
    except RuntimeError as error:
        first = " ".join(str(error).split())[:160]
        raise InputError(
            f"{checkpoint}: holds another model than {checkpoint.parent.parent / 'config.yaml'} names ({first})"
        ) from error
    return model.to(device).eval()


def _siblings(path: Path) -> str:
    names = [name for s in complete_steps(path.parent) if (name := step_name(s)) != path.name]
    return nearest(path.name, names) if names else "no complete checkpoint lies beside it"
