"""The training job's configuration and its arithmetic: what is known before any process starts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dermfm import initial
from dermfm.compute import check_parts
from dermfm.config import REQUIRED, InputError, check_choice, check_range, key
from dermfm.images import AugmentConfig
from dermfm.model.attention import choose_kernel
from dermfm.model.bodies import check_name, check_weights
from dermfm.model.dermfm import ModelConfig
from dermfm.model.text import encoder_folder
from dermfm.model.weights import weights_file
from dermfm.objectives import ObjectiveConfig, check_objectives
from dermfm.optimizer import OptimizerConfig
from dermfm.samples import check_strategies
from dermfm.storage import CacheConfig, remote
from dermfm.validation import ValidationConfig
from dermfm.zero import DTYPES, ZeroConfig
from shards.manifest import Manifest


@dataclass(kw_only=True)
class RayTrainConfig:
    """Ranks on a Ray cluster instead of processes of this machine."""

    workers: Any = key(0, "ranks on a Ray cluster; [a, b]: as many of a to b as there is room for; 0: not on Ray")
    address: str | None = key(None, "cluster to join (auto, host:port); null: an own one of this machine")
    cpus: float = key(1.0, "CPUs of a rank")
    gpus: float = key(1.0, "GPUs of a rank, where device is cuda, or auto and the cluster has some")
    max_failures: int = key(3, "how often lost ranks are started again, from the last checkpoint; -1: without end")

    def __post_init__(self) -> None:
        pair = self.workers if isinstance(self.workers, list) else [self.workers, self.workers]
        if len(pair) != 2 or not all(type(n) is int for n in pair) or not (0 < pair[0] <= pair[1] or pair == [0, 0]):
            raise ValueError(f"ray.workers: {self.workers} is not valid; give a number, or [a, b] with 1 <= a <= b")
        check_range("ray.cpus", self.cpus, 0.01)
        check_range("ray.gpus", self.gpus, 0.01)
        check_range("ray.max_failures", self.max_failures, -1)

    @property
    def least(self) -> int:
        """Ranks with which the run may go on."""
        return self.workers[0] if isinstance(self.workers, list) else self.workers

    @property
    def most(self) -> int:
        """Ranks that are asked for; 0: not on Ray."""
        return self.workers[1] if isinstance(self.workers, list) else self.workers


@dataclass(kw_only=True)
class TrainConfig:
    """What a pretraining run is made of."""

    run: str = key(REQUIRED, "run directory")
    shards: str = key(REQUIRED, "folder, or s3://, gs://, http(s):// address, of WebDataset shards with manifest.json")
    cache: CacheConfig = key(CacheConfig, "how shards at an address are read")
    split: str = key("train", "split of the shards to train on")
    model: ModelConfig = key(ModelConfig, "towers, fusion and heads")
    objectives: ObjectiveConfig = key(ObjectiveConfig, "weights of the objectives")
    strategies: dict[str, float] = key({"template": 1.0}, "note strategies and how often each is drawn")
    augment: AugmentConfig = key(AugmentConfig, "random changes of training images")
    contrastive_batch: int = key(64, "pairs in one softmax and one optimizer step, over all ranks")
    micro_batch: int = key(32, "samples of one forward pass of one rank")
    epochs: float = key(10.0, "passes over the split")
    balance: float = key(0.0, "0: classes as often as they are; 1: all classes equally often; between: in between")
    optimizer: OptimizerConfig = key(OptimizerConfig, "AdamW and its schedule")
    zero: ZeroConfig = key(ZeroConfig, "DeepSpeed")
    activation_checkpointing: list[str] = key(
        [], "parts whose blocks are run again in the backward pass to save memory: image, text, fusion, decoder, or all"
    )
    compile: bool = key(False, "compile towers and fusion with torch.compile (stages 0 to 2)")
    init_from: str | None = key(
        None, "run, checkpoint or export folder whose weights a new run starts from, with a fresh schedule"
    )
    seed: int = key(0, "initialisation, data order, augmentation and note choice")
    num_lanes: int | None = key(None, "lanes of the data order; null: chosen from the number of samples")
    window: int = key(4096, "samples a shuffle window")
    num_workers: int = key(0, "loader processes a rank; 0: one thread")
    max_bad_fraction: float = key(0.01, "share of undecodable samples that stops the run")
    checkpoint_every: int = key(0, "samples between checkpoints; 0: one an epoch")
    keep_last: int = key(2, "checkpoints that are kept")
    keep_every: int = key(0, "steps whose multiples are kept for good; 0: none")
    log_every: int = key(10, "steps a log line")
    ranks: int = key(0, "processes to start here where no launcher did; 0: one a CUDA device, or one")
    ray: RayTrainConfig = key(RayTrainConfig, "ranks on a Ray cluster")
    threads: int = key(0, "CPU threads a process; 0: cores of the machine / processes on it")
    device: str = key("auto", "auto, cuda or cpu")
    resume: str | None = key(None, "checkpoint folder to resume from instead of the run's newest")
    allow_change: list[str] = key([], "identity keys that a resumed run may change")
    async_checkpoint: bool = key(True, "write checkpoints while training goes on; needs host memory for a rank's part")
    validation: ValidationConfig = key(ValidationConfig, "scores on a small fixed set while training; gives the best")
    on_nonfinite: str = key("stop", "a loss or gradient that is not finite: stop, or skip the step")
    max_skips: int = key(10, "steps that a run may skip before it stops")
    spike_factor: float = key(10.0, "a loss so many median deviations over the last ones is told; 0: none is")
    skip_samples: list[int] = key([], "[a, b): steps that would read these stream indices are left out")
    stall_s: float = key(600.0, "seconds without a step after which every rank writes its stacks to its log")
    stall_end_s: float = key(1800.0, "seconds without a step after which the job ends; 0: never")
    images_every: int = key(0, "steps between image-note pairs with attention maps in TensorBoard; 0: none")
    profile: list[int] = key([], "[a, b): steps whose torch profiler trace is written to <run>/profile")
    peak_tflops: float = key(0.0, "a device's peak TFLOP/s for MFU; 0: by its name (CPUs: no MFU)")

    def __post_init__(self) -> None:
        check_range("contrastive_batch", self.contrastive_batch, 1)
        check_objectives(self.objectives, self.model, self.contrastive_batch)
        check_range("micro_batch", self.micro_batch, 1)
        check_range("epochs", self.epochs, 1e-6)
        check_range("balance", self.balance, 0, 1)
        check_range("keep_last", self.keep_last, 2)
        check_range("log_every", self.log_every, 1)
        for name in ("ranks", "seed", "checkpoint_every", "keep_every", "num_workers", "threads"):
            check_range(name, getattr(self, name), 0)
        check_range("window", self.window, 1)
        check_range("num_lanes", 1 if self.num_lanes is None else self.num_lanes, 1)
        check_range("max_bad_fraction", self.max_bad_fraction, 0, 1)
        if self.model.text.cache_mb and self.zero.stage == 3:
            raise ValueError(
                "model.text.cache_mb: a rank that skips a forward pass would stall ZeRO stage 3; set it to 0"
            )
        check_choice("device", self.device, ("auto", "cuda", "cpu"))
        check_parts("activation_checkpointing", self.activation_checkpointing)
        if self.compile and self.zero.stage == 3:
            raise ValueError(
                "compile: does not go with zero.stage=3, whose hooks gather parameters; use stage 0, 1 or 2"
            )
        if self.init_from and self.resume:
            raise ValueError(
                "init_from: starts a new run, resume= continues an old one; give one of them (a run that has "
                "checkpoints of its own continues from these, whatever init_from says)"
            )
        check_choice("on_nonfinite", self.on_nonfinite, ("stop", "skip"))
        for name in ("max_skips", "spike_factor", "stall_end_s", "images_every", "peak_tflops"):
            check_range(name, getattr(self, name), 0)
        check_range("stall_s", self.stall_s, 1)
        for name in ("skip_samples", "profile"):
            pair = getattr(self, name)
            if pair and not (len(pair) == 2 and 0 <= pair[0] < pair[1]):
                raise ValueError(f"{name}: {pair} is not valid; give [a, b] with 0 <= a < b")
        if self.objectives.uses_text and not any(w > 0 for w in self.strategies.values()):
            raise ValueError("strategies: objectives read notes, but no strategy has a positive weight")


@dataclass(frozen=True)
class Plan:
    """Arithmetic of a run, known before any process starts."""

    num_samples: int
    total_steps: int
    num_micro: int
    micro_batch: int
    checkpoint_steps: int


def plan(config: TrainConfig, manifest: Manifest, world: int) -> Plan:
    """Batch and step arithmetic for `world` ranks; InputError names legal neighbours of a batch that does not fit."""
    return arithmetic(config, sum(s.num_samples for s in manifest.split(config.split)), world)


def arithmetic(config: TrainConfig, num_samples: int, world: int) -> Plan:
    """The same for a split of `num_samples` samples."""
    batch = config.contrastive_batch
    if batch % world:
        low = batch // world * world
        near = f"{low} and {low + world} are" if low else f"{world} is the smallest that is"
        raise InputError(f"contrastive_batch: {batch} is not divisible by {world} ranks; {near}")
    own = batch // world
    micro = min(config.micro_batch, own)
    if own % micro:
        low = next(d for d in range(micro, 0, -1) if own % d == 0)
        high = next(d for d in range(micro, own + 1) if own % d == 0)
        raise InputError(f"micro_batch: {micro} does not divide the {own} samples of a rank; {low} and {high} do")
    total = max(math.ceil(config.epochs * num_samples / batch), 1)
    every = config.checkpoint_every or num_samples
    return Plan(num_samples, total, own // micro, micro, max(round(every / batch), 1))


def describe(config: TrainConfig, world: int) -> str:
    """What `--dry-run` prints: counts, steps, batch arithmetic; nothing is built."""
    manifest = Manifest.load(config.shards, remote(config.cache))
    check_notes(config, manifest)
    check_sources(config.model)
    if config.init_from:
        initial.check(config.init_from)
    p = plan(config, manifest, world)
    shape = f"{world} ranks × {p.num_micro} micro-batches × {p.micro_batch}"
    return (
        f"{p.num_samples} samples in {len(manifest.split(config.split))} shards of split '{config.split}'\n"
        f"{p.total_steps} steps of {config.contrastive_batch} = {shape}\n"
        f"{p.num_samples / config.contrastive_batch:.1f} steps an epoch, {config.epochs:g} epochs\n"
        f"a checkpoint every {p.checkpoint_steps} steps under {Path(config.run) / 'ckpt'}\n"
        f"ZeRO stage {config.zero.stage}, {config.zero.precision}, image tower {config.model.image.name} at "
        f"{config.model.image.size} px, text tower {config.model.text.name}"
    )


def check_notes(config: TrainConfig, manifest: Manifest) -> None:
    """InputError where the shards lack a note strategy that the run draws."""
    if config.objectives.uses_text:
        check_strategies(config.strategies, manifest.about.get("strategies", {}))


def check_here(config: TrainConfig) -> None:
    """InputError where the image weights do not fit their tower, or this machine cannot run a kernel that is asked for.

    What `train` would find out when its ranks build the model, and at their first step. On Ray ranks are elsewhere.
    """
    image = config.model.image
    check_weights(image.name, image.size, image.weights)
    if config.ray.most:
        return
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = config.model
    for part, kernel in (
        ("image", model.image.kernel),
        ("text", model.text.kernel),
        ("fusion", model.fusion.kernel),
        ("decoder", model.decoder.kernel),
    ):
        try:
            choose_kernel(kernel, device, DTYPES[config.zero.precision])
        except InputError as error:
            raise InputError(f"model.{part}.{error}") from error


def check_sources(config: ModelConfig) -> None:
    """InputError where a tower's name is unknown or its local weights are not there; nothing is loaded."""
    check_name(config.image.name)
    if config.image.weights and config.image.weights != "timm":
        weights_file(config.image.weights, "image.weights")
    encoder_folder(config.text.name)
