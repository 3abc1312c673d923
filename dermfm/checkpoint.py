"""Sharded checkpoints: written under a temporary name by all ranks, verified, committed by one rename, pruned.

`ckpt/step-NNNNNNNN/` holds each rank's files, `state.json` (step, samples seen, identity, every file with size and
sha256) and the empty file `COMPLETE`; `ckpt/latest` names the newest one and is replaced atomically.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dermfm import zero
from dermfm.config import InputError, from_dict, nearest, read_yaml
from dermfm.model.dermfm import DermFM, ModelConfig
from shards.manifest import file_sha256, write_text

LATEST, COMPLETE, STATE = "latest", "COMPLETE", "state.json"
UNIVERSAL, ASIDE = ".universal", ".aside"
CONVERSION_TIMEOUT_S = 3600.0
_log = logging.getLogger(__name__)


@dataclass
class State:
    """What a run needs, besides weights and optimizer, to go on where it was."""

    step: int
    samples_seen: int
    identity: dict[str, Any]
    world: int
    stage: int
    threads: int
    best: float | None = None
    files: list[dict[str, Any]] = field(default_factory=list)


def step_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def save(engine: Any, folder: Path, state: State) -> Path:
    """Write, verify and commit a checkpoint. Collective over all ranks; returns its folder."""
    name = step_name(state.step)
    partial, final = folder / f"{name}.tmp", folder / name
    rank, world = dist.get_rank(), dist.get_world_size()
    if rank == 0 and partial.exists():
        shutil.rmtree(partial)
    dist.barrier()
    zero.save(engine, folder, partial.name, {"samples_seen": state.samples_seen})
    dist.barrier()
    paths = sorted(p for p in partial.rglob("*") if p.is_file())
    parts: list[list[dict[str, Any]]] = [[] for _ in range(world)]
    dist.all_gather_object(parts, [describe_file(p, partial) for p in paths[rank::world]])
    if rank == 0:
        _commit(
            partial,
            final,
            State(**{**asdict(state), "files": sorted(itertools.chain(*parts), key=lambda f: f["name"])}),
        )
    dist.barrier()
    return final


def describe_file(path: Path, root: Path) -> dict[str, Any]:
    """Name below `root`, size and sha256 of a file, synced to disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"name": str(path.relative_to(root)), "size": path.stat().st_size, "sha256": file_sha256(path)}


def _commit(partial: Path, final: Path, state: State) -> None:
    ranks = sum("optim_states" in f["name"] or "model_states" in f["name"] for f in state.files)
    assert ranks >= state.world, f"{ranks} state files of {state.world} ranks"
    write_text(partial / STATE, json.dumps(asdict(state), indent=1))
    write_text(partial / COMPLETE, "")
    for older in (final, final.with_name(final.name + UNIVERSAL)):
        if older.exists():
            shutil.rmtree(older)
    partial.replace(final)
    write_text(final.parent / LATEST, final.name + "\n")


def prune(folder: Path, keep_last: int, keep_every: int) -> None:
    """Delete all but the last `keep_last` checkpoints and those whose step is a multiple of `keep_every` (0: none).

    What else lies beside checkpoints (half-written, converted, set aside) goes once its step is passed.
    """
    steps = complete_steps(folder)
    for step in steps[: max(len(steps) - keep_last, 0)]:
        if not keep_every or step % keep_every:
            shutil.rmtree(folder / step_name(step))
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
    for entry in read_state(checkpoint).files:
        path = checkpoint / entry["name"]
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != entry["size"]:
            return f"{path} has {path.stat().st_size} bytes, {entry['size']} were written"
        if hashes and describe_file(path, checkpoint)["sha256"] != entry["sha256"]:
            return f"{path} has changed since it was written (sha256 differs)"
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


def universal_form(checkpoint: Path, first: bool) -> Path:
    """The folder of the checkpoint's universal form, converted once by the first rank; the others wait for the file.

    Runs before the process group exists, so no collective can time out meanwhile.
    """
    target = checkpoint.with_name(checkpoint.name + UNIVERSAL)
    if first and not target.is_dir():
        shutil.rmtree(target.with_name(target.name + ".tmp"), ignore_errors=True)
        zero.convert_universal(checkpoint, target)
    deadline = time.monotonic() + CONVERSION_TIMEOUT_S
    while not target.is_dir():
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"{target}: the first rank has not converted the checkpoint in {CONVERSION_TIMEOUT_S:.0f} s"
            )
        time.sleep(0.5)
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


def source_for(checkpoint: Path, world: int, stage: int, first: bool) -> Source:
    """The checkpoint as `world` ranks can read it: natively at the same world, else converted once.

    Call on every rank before the process group exists. InputError where the ZeRO stage differs.
    """
    state = read_state(checkpoint)
    if state.stage != stage:
        raise InputError(
            f"{checkpoint}: was written at zero.stage={state.stage}, the run asks for {stage}; "
            f"resume with zero.stage={state.stage}"
        )
    # Stage 0 keeps everything whole on every rank: any world reads it.
    native = state.world == world or stage == 0
    return Source(checkpoint, state, checkpoint if native else universal_form(checkpoint, first))


def load_model(path: str | Path, device: str = "cpu") -> DermFM:
    """The model of a run folder (newest checkpoint) or of one checkpoint folder, in eval mode, float32."""
    checkpoint = find(path)
    values = read_yaml(checkpoint.parent.parent / "config.yaml")["model"]
    values["image"]["weights"], values["text"]["pretrained"] = None, False  # the checkpoint brings every weight
    values["text"]["cache_mb"] = 0  # each note is encoded once here, faster in batches
    model = DermFM(from_dict(ModelConfig, values, str(checkpoint)))
    model.load_state_dict(zero.consolidated_weights(checkpoint.parent, checkpoint.name))
    return model.to(device).eval()


def _siblings(path: Path) -> str:
    names = [step_name(s) for s in complete_steps(path.parent)]
    return nearest(path.name, names) if names else "no complete checkpoint lies beside it"
