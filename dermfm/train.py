"""Pretraining: stream → optimizer step → log → checkpoint, until the samples are seen or a stop is asked for."""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cluster.preemption import StopFlag
from cluster.process import Process
from dermfm import checkpoint, metrics, run, zero
from dermfm.config import InputError, to_dict
from dermfm.model.dermfm import DermFM, ModelConfig
from dermfm.optimizer import OptimizerConfig, parameter_groups, rate_factor
from dermfm.plan import Plan, TrainConfig, check_notes, plan
from dermfm.samples import Batch, Collate, SampleFn, balanced_weights
from dermfm.step import optimizer_step
from dermfm.storage import remote
from shards.loader import stream
from shards.manifest import Manifest
from shards.order import SampleOrder
from shards.reader import ShardReader

DONE, RESUMABLE = 0, 75
NO_SHAPE = (
    "model.text.cache_mb",
    "model.fusion.kernel",
    "model.decoder.kernel",
    "model.image.kernel",
    "model.text.kernel",
    "model.text.packed",
)  # how the model computes, not what it is
_log = logging.getLogger(__name__)


def train(config: TrainConfig, process: Process, source: checkpoint.Source | None, stop: StopFlag) -> int:
    """Run until done (0) or stopped by `stop` with a checkpoint (75), from `source` if given. Called by every rank."""
    folder = Path(config.run)
    manifest = Manifest.load(config.shards)
    arithmetic = plan(config, manifest, process.world)
    order, reader = _data(config, manifest)
    identity = _identity(config, manifest, order)
    engine = _engine(config, arithmetic, source, process)
    state = _restore(engine, config, identity, source, process)
    if process.is_first:
        checkpoint.set_aside(folder / "ckpt", state.step)
    batches = _batches(config, engine.module, reader, order, state, arithmetic, process)
    log = metrics.MetricsLog(folder, state.step, process.is_first)
    speed = metrics.Speed()
    try:
        for step in range(state.step + 1, arithmetic.total_steps + 1):
            asked = time.monotonic()
            batch = next(batches).to(process.device, non_blocking=True)
            waited = time.monotonic() - asked
            rates = _set_rates(engine, config.optimizer, state.samples_seen / _total_samples(config, arithmetic))
            values = optimizer_step(engine, batch, arithmetic.micro_batch, config.objectives)
            _check_finite(values, step, batch)
            engine.step()
            norm = _gradient_norm(engine, config, step, batch)
            state.step, state.samples_seen = step, state.samples_seen + config.contrastive_batch
            speed.add(config.contrastive_batch, waited)
            stopping, last = _agree(bool(stop)), step == arithmetic.total_steps
            saving = stopping or last or step % arithmetic.checkpoint_steps == 0
            if step % config.log_every == 0 or saving or step == 1:
                values |= rates | speed.values() | {"grad_norm": norm} | _progress(state, arithmetic)
                if saving:
                    values["checkpoint_s"] = _save(engine, folder / "ckpt", state, config, process)
                _report(log, step, arithmetic, values, process)
                speed.reset()
            if stopping and not last:
                name = stop.signal_name or "a peer"
                return _say(process, f"stopped by {name} at step {step}; the same command continues", RESUMABLE)
        where = folder / "ckpt" / checkpoint.step_name(state.step)
        return _say(process, f"done: {state.step} steps, {state.samples_seen} samples; checkpoint {where}", DONE)
    finally:
        log.close()


def _data(config: TrainConfig, manifest: Manifest) -> tuple[SampleOrder, ShardReader]:
    shards = manifest.split(config.split)
    reader = ShardReader(manifest.folder, shards, remote(config.cache))
    check_notes(config, manifest)
    weights = None
    if config.balance:
        weights = balanced_weights(manifest.read_rows(config.split)["label"], config.balance)
    return SampleOrder(reader.shard_sizes, config.seed, config.num_lanes, config.window, weights), reader


def _identity(config: TrainConfig, manifest: Manifest, order: SampleOrder) -> dict[str, Any]:
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


def _engine(config: TrainConfig, arithmetic: Plan, source: checkpoint.Source | None, process: Process) -> Any:
    torch.manual_seed(config.seed)
    settings = zero.deepspeed_json(
        config.zero,
        micro_batch=arithmetic.micro_batch,
        num_micro=arithmetic.num_micro,
        world=process.world,
        optimizer={"lr": config.optimizer.lr, "betas": list(config.optimizer.betas), "eps": config.optimizer.eps},
        device=process.device,
        load_universal=source is not None and source.is_universal,
    )
    with zero.towers_in_shards(settings, process.device):
        model = DermFM(config.model).train()
    return zero.initialize(model, parameter_groups(model, config.optimizer), settings, process.device)


def _total_samples(config: TrainConfig, arithmetic: Plan) -> int:
    return arithmetic.total_steps * config.contrastive_batch


def _set_rates(engine: Any, config: OptimizerConfig, done: float) -> dict[str, float]:
    factor = rate_factor(config, done)
    for group in engine.optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    return {"lr": config.lr * factor}


def resume_source(config: TrainConfig, process: Process) -> checkpoint.Source | None:
    """The checkpoint that this run goes on from, readable at this world size, or None. Before the group exists.

    InputError where an identity key differs from it, or where all checkpoints of the run are damaged.
    """
    folder = Path(config.run) / "ckpt"
    found = checkpoint.find(config.resume) if config.resume else checkpoint.newest(folder)
    if found is None:
        if steps := checkpoint.complete_steps(folder):
            raise InputError(f"{folder}: all {len(steps)} checkpoints are damaged; remove them to begin anew")
        return None
    manifest = Manifest.load(config.shards)
    identity = _identity(config, manifest, _data(config, manifest)[0])
    # A key of the model that the run's version did not have yet was what its default is now.
    known = {n: v for n, v in _flat(to_dict(ModelConfig()), "model").items() if n not in NO_SHAPE}
    run.check_identity(
        known | checkpoint.read_state(found).identity, identity, list(config.allow_change), Path(config.run)
    )
    return checkpoint.source_for(found, process.world, config.zero.stage, process.is_first)


def is_done(config: TrainConfig, world: int) -> bool:
    """Whether the run's newest checkpoint is its last one."""
    folder = Path(config.run) / "ckpt"
    steps = checkpoint.complete_steps(folder)
    if config.resume or not steps or steps[-1] < plan(config, Manifest.load(config.shards), world).total_steps:
        return False
    return checkpoint.damage(folder / checkpoint.step_name(steps[-1])) is None


def _restore(
    engine: Any, config: TrainConfig, identity: dict[str, Any], source: checkpoint.Source | None, process: Process
) -> checkpoint.State:
    """Load the source into the engine; the state to go on from."""
    state = checkpoint.State(0, 0, identity, process.world, config.zero.stage, torch.get_num_threads())
    if source is None:
        return state
    zero.load(engine, source.folder.parent, source.folder.name)
    state.step, state.samples_seen = source.state.step, source.state.samples_seen
    how = f", saved by {source.state.world} ranks" if source.is_universal else ""
    _say(process, f"resuming {source.checkpoint.name} at {state.samples_seen} samples{how}", DONE)
    return state


def _batches(
    config: TrainConfig,
    model: DermFM,
    reader: ShardReader,
    order: SampleOrder,
    state: checkpoint.State,
    arithmetic: Plan,
    process: Process,
) -> Iterator[Batch]:
    size = config.model.image.size
    strategies = dict(config.strategies) if config.objectives.uses_text else {}
    return stream(
        reader,
        order,
        start=state.samples_seen,
        global_batch=config.contrastive_batch,
        rank=process.rank,
        world=process.world,
        seed=config.seed,
        sample_fn=SampleFn(size, strategies, config.augment),
        collate_fn=Collate(model.tokenizer, config.model.text.max_tokens, size),
        num_workers=config.num_workers,
        num_steps=arithmetic.total_steps - state.step,
        max_bad_fraction=config.max_bad_fraction,
    )


def _agree(flag: bool) -> bool:
    """Whether any rank has the flag set. Collective."""
    value = torch.tensor(float(flag))
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    value = value.to(device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return bool(value.item())


def _check_finite(values: dict[str, float], step: int, batch: Batch) -> None:
    """Losses are sums over all ranks: every rank sees the same value and raises together."""
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        shown = ", ".join(batch.record_ids[:4])
        raise FloatingPointError(f"step {step}: {', '.join(bad)} is not finite; records of this rank: {shown}, …")


def _gradient_norm(engine: Any, config: TrainConfig, step: int, batch: Batch) -> float:
    """Global norm before clipping, the same on every rank; NaN where DeepSpeed does not tell (stage 0 in fp32)."""
    norm = engine.get_global_grad_norm()
    if norm is None:
        return math.nan
    if config.zero.precision != "fp16":  # fp16 skips such a step and lowers its loss scale
        _check_finite({"grad_norm": float(norm)}, step, batch)
    return float(norm)


def _progress(state: checkpoint.State, arithmetic: Plan) -> dict[str, float]:
    return {"samples_seen": float(state.samples_seen), "epoch": state.samples_seen / arithmetic.num_samples}


def _save(engine: Any, folder: Path, state: checkpoint.State, config: TrainConfig, process: Process) -> float:
    """Write a checkpoint and prune; seconds it took. No rank goes on, or ends, before the first one has pruned."""
    began = time.monotonic()
    checkpoint.save(engine, folder, state)
    if process.is_first:
        checkpoint.prune(folder, config.keep_last, config.keep_every)
    dist.barrier()
    return time.monotonic() - began


def _report(log: metrics.MetricsLog, step: int, arithmetic: Plan, values: dict[str, float], process: Process) -> None:
    log.write(step, values)
    if process.is_first:
        _log.info(metrics.line(step, arithmetic.total_steps, values))


def _say(process: Process, text: str, code: int) -> int:
    if process.is_first:
        _log.info(text)
    return code


def prepare(config: TrainConfig) -> None:
    """What the first process of a run does before any group exists: check inputs, the run directory and its disk."""
    manifest = Manifest.load(config.shards)
    check_notes(config, manifest)
    manifest.split(config.split)
    folder = Path(config.run)
    try:
        (folder / "ckpt").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"run: {folder} cannot be made ({error.strerror})") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"run: {folder} cannot be written")
    free = shutil.disk_usage(folder).free
    if free < 1e9:
        raise InputError(f"run: {folder} has {free / 1e9:.1f} GB free; a checkpoint needs more")
