"""Pretraining: stream → optimizer step → log → checkpoint, until the samples are seen or a stop is asked for."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.preemption import StopFlag
from cluster.process import DONE, RESUMABLE, Process
from cluster.watchdog import Unwatched
from dermfm import checkpoint, compute, flops, initial, metrics, zero
from dermfm.border import Agreed, Feed, agree
from dermfm.config import fingerprint, to_dict
from dermfm.gradients import Gradients, Update, part_of
from dermfm.guard import Guard, Spikes
from dermfm.model.dermfm import DermFM
from dermfm.optimizer import OptimizerConfig, parameter_groups, rate_factor
from dermfm.pictures import Pictures
from dermfm.plan import Plan, TrainConfig, plan
from dermfm.resume import identity_of, open_data, origin_of
from dermfm.run import code_hash
from dermfm.samples import Batch, Collate, SampleFn
from dermfm.saver import Keeping, Saver
from dermfm.speed import Forwards, Laps, Speed
from dermfm.step import optimizer_step
from dermfm.storage import remote
from dermfm.stream import Steps, batches
from dermfm.tracing import Tracer
from dermfm.validation import NoValidation, Validation
from shards.manifest import Manifest
from shards.order import SampleOrder
from shards.reader import ShardReader

UNWATCHED = Unwatched()
_log = logging.getLogger(__name__)


def train(
    config: TrainConfig,
    process: Process,
    source: checkpoint.Source | None,
    stop: StopFlag,
    watch: Unwatched = UNWATCHED,
    laps: Laps | None = None,
) -> int:
    """Run until done (0) or stopped by `stop` with a checkpoint (75), from `source` if given. Called by every rank."""
    laps = laps or Laps()
    job = _begin(config, process, source, watch, laps)
    try:
        for step in job.steps:
            told = _learn(job, step)
            job.feed.fetch()
            agreed = agree(bool(stop), job.saver.is_writing, job.feed.error)
            watch.border(step)
            if step == job.steps.done + 1:
                laps.lap("first step")
                _say(process, str(laps))
            _keep_and_tell(job, step, told, agreed)
            if agreed.stop and step != job.steps.last:
                name = stop.signal_name or "a peer"
                return _say(process, f"stopped by {name} at step {step}; the same command continues", RESUMABLE)
        state, where = job.state, job.saver.folder / checkpoint.step_name(job.state.step)
        return _say(process, f"done: {state.step} steps, {state.samples_seen} samples; checkpoint {where}", DONE)
    finally:
        job.tracer.close()
        job.log.close()


@dataclass(kw_only=True)
class Job:
    """What a run is made of, in the hands of one rank."""

    config: TrainConfig
    process: Process
    watch: Unwatched
    arithmetic: Plan
    engine: Any
    state: checkpoint.State  # of the last step; what a checkpoint holds
    steps: Steps
    feed: Feed
    guard: Guard
    spikes: Spikes
    validation: NoValidation
    saver: Saver
    speed: Speed
    tracer: Tracer
    log: metrics.MetricsLog
    pictures: Pictures


def _begin(
    config: TrainConfig, process: Process, source: checkpoint.Source | None, watch: Unwatched, laps: Laps
) -> Job:
    """Everything up to the first batch, which waits in the feed. Collective."""
    folder, manifest = Path(config.run), Manifest.load(config.shards, remote(config.cache))
    arithmetic = plan(config, manifest, process.world)
    order, reader = open_data(config, manifest)
    laps.lap("data")
    engine, speed = _engine(config, arithmetic, source, process)
    laps.lap("model")
    state = _restore(engine, config, manifest, order, arithmetic, source, process)
    saver = Saver(engine, folder / "ckpt", Keeping(config.keep_last, config.keep_every), config.async_checkpoint, watch)
    saver.start(state)
    laps.lap("checkpoint")
    steps = Steps(state.step, arithmetic.total_steps, state.samples_seen, config.contrastive_batch, config.skip_samples)
    feed = Feed(_batches(config, engine.module, reader, order, steps, process), process.device, watch)
    alone, text = config.zero.precision == "fp16", config.objectives.uses_text
    log = metrics.MetricsLog(folder, state.step, process.is_first)
    job = Job(
        config=config,
        process=process,
        watch=watch,
        arithmetic=arithmetic,
        engine=engine,
        state=state,
        steps=steps,
        feed=feed,
        guard=Guard(Gradients(engine), config.on_nonfinite, config.max_skips, alone, state.meter, text),
        spikes=Spikes(folder / "ckpt", config.spike_factor, config.contrastive_batch, state.meter),
        validation=_validation(config, manifest, engine.module, arithmetic, process),
        saver=saver,
        speed=speed,
        tracer=Tracer(folder, config.profile, process.is_first),
        log=log,
        pictures=Pictures(log, config.images_every, _has_maps(config)),
    )
    speed.next_is_logged(True)
    feed.fetch()
    agree(False, False, feed.error)
    laps.lap("first batch")
    return job


@dataclass(kw_only=True)
class Told:
    """What one step has told so far: losses, rates, the update, and the batch itself."""

    batch: Batch
    losses: dict[str, float]
    rates: dict[str, float]
    update: Update


def _learn(job: Job, step: int) -> Told:
    """Gradients of one contrastive batch and the update by them. Collective."""
    config = job.config
    job.tracer.before(step)
    batch = job.feed.take()
    job.watch.phase("forward and backward")
    rates = _set_rates(job.engine, config.optimizer, job.steps.start(step), _total_samples(config, job.arithmetic))
    losses = optimizer_step(job.engine, batch, job.arithmetic.micro_batch, config.objectives)
    job.watch.phase("optimizer step")
    update = job.guard.update(job.engine, step, losses, batch, job.arithmetic.micro_batch)
    job.state.step, job.state.samples_seen = step, job.steps.end(step)
    job.spikes.look(step, job.state.samples_seen, losses["loss"])
    job.speed.add(config.contrastive_batch, job.feed.waited_s)
    return Told(batch=batch, losses=losses, rates=rates, update=update)


def _keep_and_tell(job: Job, step: int, told: Told, agreed: Agreed) -> None:
    """What follows a step, where it is due: validation, checkpoint, pictures, log. Collective."""
    state, last = job.state, step == job.steps.last
    job.watch.phase("validation")
    scores = job.validation.run(job.engine, step, last=last, stopping=agreed.stop)
    save = agreed.stop or last or step % job.arithmetic.checkpoint_steps == 0
    save |= job.saver.is_best(state, scores.get(job.validation.metric))
    job.saver.border(state, writing=agreed.writing, save=save, last=agreed.stop or last)
    job.watch.phase("log")
    job.pictures.show(step, job.engine.module, told.batch)
    values = told.losses | told.rates
    if _is_logged(job, step) or save or scores:
        values |= job.speed.values() | told.update.named() | _progress(job.engine, state, job.arithmetic)
        _report(job.log, step, job.arithmetic, values | job.saver.cost() | scores, job.process)
        job.speed.reset()
    job.speed.next_is_logged(_is_logged(job, step + 1))
    if last:
        job.log.summary(to_dict(job.config), values | scores)


def _is_logged(job: Job, step: int) -> bool:
    """Whether step `step` has a log line, as far as this is known before it."""
    periods = job.config.log_every, job.arithmetic.checkpoint_steps
    return any(step % period == 0 for period in periods) or step in (job.steps.done + 1, job.steps.last)


def _engine(
    config: TrainConfig, arithmetic: Plan, source: checkpoint.Source | None, process: Process
) -> tuple[Any, Speed]:
    """DeepSpeed's engine over a new model, and the meter of its speed."""
    torch.manual_seed(config.seed)
    if config.init_from and source is None:
        model = DermFM(config.model).train()
        initial.start_from(model, config.init_from, process.device)
    else:
        with zero.towers_in_shards(_settings(config, arithmetic, source, process), process.device):
            model = DermFM(config.model).train()
    settings = _settings(config, arithmetic, source, process, model)
    peak = flops.peak_tflops(process.device, config.zero.precision, config.peak_tflops)
    per_sample = sum(flops.count(config.model, config.objectives)) if peak and process.is_first else 0.0
    compute.prepare(model, config.activation_checkpointing, config.compile)
    engine = zero.initialize(model, parameter_groups(model, config.optimizer), settings, process.device)
    return engine, Speed(per_sample, peak, Forwards(engine.module))


def _settings(
    config: TrainConfig,
    arithmetic: Plan,
    source: checkpoint.Source | None,
    process: Process,
    model: DermFM | None = None,
) -> dict[str, Any]:
    """DeepSpeed's configuration. Without a model, buckets have their least size: enough to build towers in shards."""
    parameters = list(model.parameters()) if model is not None else []
    return zero.deepspeed_json(
        config.zero,
        micro_batch=arithmetic.micro_batch,
        num_micro=arithmetic.num_micro,
        world=process.world,
        optimizer={"lr": config.optimizer.lr, "betas": list(config.optimizer.betas), "eps": config.optimizer.eps},
        device=process.device,
        num_learning=sum(zero.num_elements(p) for p in parameters if p.requires_grad),
        num_parameters=sum(zero.num_elements(p) for p in parameters),
        load_universal=source is not None and source.is_universal,
    )


def _total_samples(config: TrainConfig, arithmetic: Plan) -> int:
    return arithmetic.total_steps * config.contrastive_batch


def _set_rates(engine: Any, config: OptimizerConfig, seen: int, total: int) -> dict[str, float]:
    factor = rate_factor(config, seen, total)
    rates: dict[str, float] = {}
    for group in engine.optimizer.param_groups:
        group["lr"] = group["peak"] * factor
        name = f"lr/{part_of(group)}"
        rates[name] = max(rates.get(name, 0.0), group["lr"])
    return {"lr": config.lr * factor, **rates}


def _restore(
    engine: Any,
    config: TrainConfig,
    manifest: Manifest,
    order: SampleOrder,
    arithmetic: Plan,
    source: checkpoint.Source | None,
    process: Process,
) -> checkpoint.State:
    """Load the source into the engine; the state to go on from."""
    schedule = {
        "total_samples": _total_samples(config, arithmetic),
        "warmup": config.optimizer.warmup,
        "form": config.optimizer.schedule,
    }
    state = checkpoint.State(
        0,
        0,
        identity_of(config, manifest, order),
        process.world,
        config.zero.stage,
        torch.get_num_threads(),
        origin=origin_of(config),
        fingerprint=manifest.fingerprint,
        code=code_hash(),
        config=fingerprint(config),
        schedule=schedule,
    )
    if source is None:
        return state
    zero.load(engine, source.folder.parent, source.folder.name)
    for name in ("step", "samples_seen", "best", "best_step", "meter"):
        setattr(state, name, getattr(source.state, name))
    how = f", saved by {source.state.world} ranks" if source.is_universal else ""
    _say(process, f"resuming {source.checkpoint.name} at {state.samples_seen} samples{how}")
    return state


def _batches(
    config: TrainConfig, model: DermFM, reader: ShardReader, order: SampleOrder, steps: Steps, process: Process
) -> Iterator[Batch]:
    return batches(
        steps,
        reader,
        order,
        process,
        seed=config.seed,
        sample_fn=SampleFn(config.model.image.size, _strategies(config), config.augment),
        collate_fn=_collate(config, model),
        num_workers=config.num_workers,
        max_bad_fraction=config.max_bad_fraction,
    )


def _collate(config: TrainConfig, model: DermFM) -> Collate:
    objectives, size = config.objectives, config.model.image.size
    return Collate(model.tokenizer, config.model.text.max_tokens, size, concepts=objectives.uses("concepts"))


def _strategies(config: TrainConfig) -> dict[str, float]:
    return dict(config.strategies) if config.objectives.uses_text else {}


def _validation(
    config: TrainConfig, manifest: Manifest, model: DermFM, arithmetic: Plan, process: Process
) -> NoValidation:
    """The validation pass, or the null one where the shards lack its split or it is switched off."""
    every, split, size = config.validation.every, config.validation.split, config.model.image.size
    if every < 0 or not any(s.split == split and s.num_samples for s in manifest.shards):
        return NoValidation()
    return Validation(
        config.validation,
        manifest,
        config.objectives,
        SampleFn(size, _strategies(config)),
        _collate(config, model),
        arithmetic.micro_batch,
        max(round((every or arithmetic.num_samples) / config.contrastive_batch), 1),
        process.device,
    )


def _has_maps(config: TrainConfig) -> bool:
    """Whether note tokens attend to image tokens in this run."""
    return config.objectives.uses("fusion") and config.model.fusion.kind in ("cross", "early")


def _progress(engine: Any, state: checkpoint.State, arithmetic: Plan) -> dict[str, float]:
    told = {"samples_seen": float(state.samples_seen), "epoch": state.samples_seen / arithmetic.num_samples}
    scale = engine.module.logit_scale
    if scale.numel():  # ZeRO-3 may hold it elsewhere between steps
        told["logit_scale"] = math.exp(float(scale.detach()))
    if state.meter["skipped"]:
        told["skipped_steps"] = float(state.meter["skipped"])
    return told


def _report(log: metrics.MetricsLog, step: int, arithmetic: Plan, values: dict[str, float], process: Process) -> None:
    log.write(step, values)
    if process.is_first:
        _log.info(metrics.line(step, arithmetic.total_steps, values))


def _say(process: Process, text: str, code: int = DONE) -> int:
    if process.is_first:
        _log.info(text)
    return code
