"""Where a run goes on: decided once, by the first rank, before any process group exists."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.process import Process
from cluster.watchdog import Unwatched
from dermfm import checkpoint, run, zero
from dermfm.checkpoint import Source, State
from dermfm.config import InputError, to_dict
from dermfm.model.attention import choose_kernel
from dermfm.model.dermfm import ModelConfig
from dermfm.plan import TrainConfig, check_notes, plan
from dermfm.samples import balanced_weights
from dermfm.storage import remote
from shards.manifest import Manifest
from shards.order import SampleOrder
from shards.reader import ShardReader

# How the model computes, not what it is.
NO_SHAPE = (
    "model.text.cache_mb",
    "model.text.kernel",
    "model.text.packed",
    "model.image.kernel",
    "model.fusion.kernel",
    "model.decoder.kernel",
)
DECISION_TIMEOUT_S = 4 * 3600.0  # a large checkpoint is hashed and converted within
LEAST_FREE = 1e9  # bytes of disk without which nothing is started


def open_data(config: TrainConfig, manifest: Manifest) -> tuple[SampleOrder, ShardReader]:
    """The order of the run's samples and the reader of its shards."""
    shards = manifest.split(config.split)
    reader = ShardReader(manifest.folder, shards, manifest.remote)
    check_notes(config, manifest)
    weights = None
    if config.balance:
        weights = balanced_weights(manifest.read_rows(config.split)["label"], config.balance)
    return SampleOrder(reader.shard_sizes, config.seed, config.num_lanes, config.window, weights), reader


def identity_of(config: TrainConfig, manifest: Manifest, order: SampleOrder) -> dict[str, Any]:
    """What must not change between a run and its resumption: data order, batch, model shape."""
    shape = _flat(to_dict(config.model), "model")
    return {
        "shards": manifest.fingerprint,
        "contrastive_batch": config.contrastive_batch,
        "balance": config.balance,
        "strategies": dict(config.strategies),
        **{name: value for name, value in shape.items() if name not in NO_SHAPE},
        "num_lanes": order.num_lanes,
        "window": order.window,
        "seed": config.seed,
    }


def _flat(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Nested dictionaries as one with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}.{name}") if isinstance(value, dict) else {f"{prefix}.{name}": value}
    return flat


def resume_source(config: TrainConfig, process: Process, watch: Unwatched) -> Source | None:
    """The checkpoint that this run goes on from, readable at this world size, or None; the same on every rank.

    The first rank checks the inputs, hashes and converts, and writes the run's record; the others are told. InputError
    where an input or the run directory cannot be used, an identity key differs, or all checkpoints are damaged.
    """
    told = watch.first_decides("resume", lambda: _decide(config, process), DECISION_TIMEOUT_S)
    if told is None:
        return None
    return Source(Path(told["checkpoint"]), State(**told["state"]), Path(told["folder"]))


def _decide(config: TrainConfig, process: Process) -> dict[str, Any] | None:
    prepare(config, process.world)
    try:
        source = _source(config, process)
    except InputError:
        with contextlib.suppress(OSError):  # a run that never began leaves no empty folder; one with content stays
            (Path(config.run) / "ckpt").rmdir()
        raise
    run.record(Path(config.run), config)  # only now: a refused resume leaves the run's record as it was
    if source is None:
        return None
    return {"checkpoint": str(source.checkpoint), "folder": str(source.folder), "state": asdict(source.state)}


def _source(config: TrainConfig, process: Process) -> Source | None:
    check_kernels(config, process.device)
    found = choose(config)
    if found is None:
        return None
    check_same_run(config, found)
    return checkpoint.source_for(found, process.world, config.zero.stage)


def check_same_run(config: TrainConfig, found: Path) -> None:
    """InputError where data order, batch or model of checkpoint `found` are not those of this configuration."""
    manifest = Manifest.load(config.shards, remote(config.cache))
    identity = identity_of(config, manifest, open_data(config, manifest)[0])
    # A key of the model that the run's version did not have yet was what its default is now.
    known = {n: v for n, v in _flat(to_dict(ModelConfig()), "model").items() if n not in NO_SHAPE}
    old = known | checkpoint.read_state(found).identity
    run.check_identity(old, identity, list(config.allow_change), Path(config.run))


def check_kernels(config: TrainConfig, device: str) -> None:
    """InputError where an attention kernel that was asked for cannot run on this device."""
    model = config.model
    for kernel in {model.image.kernel, model.text.kernel, model.fusion.kernel, model.decoder.kernel} - {"auto"}:
        choose_kernel(kernel, device.split(":")[0], zero.DTYPES[config.zero.precision])


def choose(config: TrainConfig) -> Path | None:
    """The checkpoint to go on from: the run's newest; one named by `resume=` until the run has one that came of it.

    So a job that is requeued with its `resume=` goes on instead of back. InputError if all of the run's are damaged.
    """
    folder = Path(config.run) / "ckpt"
    if config.resume:
        steps = checkpoint.complete_steps(folder)
        came_of_it = [s for s in steps if _origin(folder / checkpoint.step_name(s)) == origin_of(config)]
        if not came_of_it or came_of_it[-1] != steps[-1]:
            return checkpoint.find(config.resume)
    found = checkpoint.newest(folder)
    if found is None and (steps := checkpoint.complete_steps(folder)):
        raise InputError(f"{folder}: all {len(steps)} checkpoints are damaged; remove them to begin anew")
    return found


def origin_of(config: TrainConfig) -> str:
    """What a checkpoint remembers of a `resume=`; the same one with other samples left out is another start."""
    if not config.resume:
        return ""
    without = f" without {list(config.skip_samples)}" if config.skip_samples else ""
    return f"{Path(config.resume).resolve()}{without}"


def _origin(found: Path) -> str | None:
    try:
        return checkpoint.read_state(found).origin
    except InputError:
        return None


def is_done(config: TrainConfig, world: int) -> bool:
    """Whether the run's newest checkpoint is its last one. InputError where it is of another model or data set.

    So that this is told before any rank starts, also of a run that goes on.
    """
    folder = Path(config.run) / "ckpt"
    steps = checkpoint.complete_steps(folder)
    if not steps:
        return False
    newest = folder / checkpoint.step_name(steps[-1])
    origin = _origin(newest)
    if origin is None or (config.resume and origin != origin_of(config)):
        return False  # damaged, or not what this start goes on from: the ranks find out what is
    check_same_run(config, newest)
    total = plan(config, Manifest.load(config.shards, remote(config.cache)), world).total_steps
    return steps[-1] >= total and checkpoint.damage(newest) is None


def prepare(config: TrainConfig, world: int) -> None:
    """Check inputs, the run directory and its disk. InputError names what cannot be used."""
    manifest = Manifest.load(config.shards, remote(config.cache))
    plan(config, manifest, world)
    check_notes(config, manifest)
    manifest.check_indexes(config.split)
    folder = Path(config.run)
    run.check_writable(folder / "ckpt")
    free = shutil.disk_usage(folder).free
    if free < LEAST_FREE:
        raise InputError(f"run: {folder} has {free / 1e9:.1f} GB free; a run needs at least {LEAST_FREE / 1e9:.0f}")
