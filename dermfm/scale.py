"""`dermfm plan`: what a run needs on any nodes × GPUs, before anyone has them: memory, time, disk, communication."""

from __future__ import annotations

import dataclasses
import functools
import typing
from dataclasses import dataclass
from typing import Any

from dermfm import compute, memory, simulate
from dermfm.config import check_range, key
from dermfm.memory import Sharding
from dermfm.model import lean
from dermfm.model.summary import Part
from dermfm.plan import Plan, TrainConfig, arithmetic, check_notes, plan
from dermfm.storage import remote
from shards.manifest import Manifest

GB = 1e9


@dataclass(kw_only=True)
class ScaleConfig(TrainConfig):
    """A training config, and the machine that it is planned for."""

    run: str = key("runs/plan", "run directory (not touched)")
    shards: str = key("", "folder of WebDataset shards; empty: num_samples says how many samples there are")
    num_samples: int = key(0, "samples of the split where no shards are given")
    nodes: int = key(1, "number of nodes")
    gpus: int = key(8, "GPUs a node; every GPU is one rank")
    gpu_memory_gb: float = key(80.0, "memory of one GPU")
    host_memory_gb: float = key(0.0, "memory of one node, for what is offloaded; 0: not checked")
    reserve_gb: float = key(
        2.0, "GPU memory for the CUDA context, kernels' workspace and fragmentation (an assumption)"
    )
    samples_per_s: float = key(0.0, "samples/s of all GPUs together, as a run's metrics.jsonl has it; 0: not known")
    disk_gb_s: float = key(1.0, "GB/s that all ranks together write to the run directory's disk")
    network_gb_s: float = key(0.0, "GB/s that a GPU sends to the others; 0: not known")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("nodes", self.nodes, 1, 100_000)
        check_range("gpus", self.gpus, 1, 1024)
        for name in ("gpu_memory_gb", "disk_gb_s"):
            check_range(name, getattr(self, name), 1e-3)
        for name in ("host_memory_gb", "reserve_gb", "samples_per_s", "network_gb_s", "num_samples"):
            check_range(name, getattr(self, name), 0)
        if bool(self.shards) == bool(self.num_samples):
            raise ValueError("shards: give shards=<folder> or num_samples=<number>, one of them")

    @property
    def world(self) -> int:
        """Ranks: one a GPU."""
        return self.nodes * self.gpus


@dataclass(frozen=True)
class Sizes:
    """What is counted and traced of a model and its step, in elements and bytes."""

    learning: int
    frozen: int
    by_part: dict[str, int]
    saved: float  # by autograd for one micro-batch
    passing: float  # most bytes alive in one micro-batch's passes, saved tensors included
    contrast: float

    @property
    def total(self) -> int:
        """All parameters."""
        return self.learning + self.frozen


@dataclass(frozen=True)
class Need:
    """Bytes of one rank's memory by part; the parts of `backward` and of `update` are not alive together."""

    states: memory.States
    buffers: float
    batch: float
    activations: float
    contrast: float
    together: bool  # one micro-batch: its activations are alive during the contrast
    update: float
    reserve: float

    @property
    def peak(self) -> float:
        """The most that is needed at one time on the device."""
        step = self.activations + self.contrast if self.together else max(self.activations, self.contrast)
        return self.states.device + self.batch + max(step + self.buffers, self.update) + self.reserve


def measure(config: TrainConfig, world: int, p: Plan) -> Sizes:
    """Count the model's parameters and trace one step of it, without weights, data or peers (`dermfm.simulate`)."""
    prepare = functools.partial(compute.recompute_activations, parts=config.activation_checkpointing)
    tokens, size = config.model.text.max_tokens, config.model.image.size
    model = simulate.build(config.model, config.zero.precision, prepare)
    with simulate.fake_group(1), lean.kept(config.zero.stage == 3):
        count = min(p.num_micro, memory.TOGETHER) * p.micro_batch  # as many as any pass has
        traced = simulate.trace_step(model, config.objectives, count, p.micro_batch, tokens, size)
    with simulate.fake_group(world):
        rows = config.contrastive_batch // world
        contrast = simulate.trace_contrast(config.objectives, rows, config.model.embed_dim)
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0] if name.split(".")[0] in compute.PARTS else "heads"
        parts[part] = parts.get(part, 0) + parameter.numel()
    learning = sum(q.numel() for q in model.parameters() if q.requires_grad)
    return Sizes(learning, sum(parts.values()) - learning, parts, traced.saved, traced.peak, contrast)


def sharding(config: TrainConfig, world: int) -> Sharding:
    """What of the configuration decides how states lie on ranks."""
    zero = config.zero
    return Sharding(zero.stage, zero.precision, world, zero.offload_optimizer, zero.offload_parameters)


def need(config: TrainConfig, sizes: Sizes, how: Sharding, p: Plan, reserve: float) -> Need:
    """A rank's memory. Activations grow with the micro-batch that `p` says, from the one that was traced."""
    zero = config.zero
    own = p.num_micro * p.micro_batch
    bucket = zero.bucket_elements or memory.bucket_elements(sizes.learning)
    overlap = zero.stage >= 2 if zero.overlap is None else zero.overlap
    pixels = 3 * config.model.image.size**2
    return Need(
        states=memory.states(sizes.learning, sizes.frozen, how),
        buffers=memory.buffers(sizes.learning, sizes.total, bucket, how, overlap),
        batch=float(own * (pixels + row_bytes(config))),
        activations=sizes.passing,
        contrast=sizes.contrast,
        together=p.num_micro == 1,
        update=memory.update(sizes.learning, how),
        reserve=reserve,
    )


def row_bytes(config: TrainConfig) -> int:
    """Bytes of one sample's note tokens, hashes, label and lengths (int64)."""
    return (config.model.text.max_tokens + 6) * 8


def sent_bytes(config: TrainConfig) -> int:
    """Bytes of one sample that travel between ranks beside its features: its note's tokens only where one is mined."""
    if not config.objectives.compares:
        return 0
    return row_bytes(config) if config.objectives.matching else 6 * 8


def largest_micro_batch(config: TrainConfig, sizes: Sizes, world: int, p: Plan, limit: float, reserve: float) -> int:
    """The largest micro-batch of a rank's samples whose need is within `limit` bytes; 0 where none is."""
    own = config.contrastive_batch // world
    for micro in sorted((d for d in range(1, own + 1) if own % d == 0), reverse=True):
        scaled = dataclasses.replace(sizes, passing=sizes.passing * micro / p.micro_batch)
        changed = dataclasses.replace(p, num_micro=own // micro, micro_batch=micro)
        if need(config, scaled, sharding(config, world), changed, reserve).peak <= limit:
            return micro
    return 0


def remedies(config: ScaleConfig, sizes: Sizes, p: Plan) -> list[str]:
    """What would make a run fit that does not: changes by themselves, each with the memory that it would need."""
    limit, reserve = config.gpu_memory_gb * GB, config.reserve_gb * GB
    found = []
    if micro := largest_micro_batch(config, sizes, config.world, p, limit, reserve):
        found.append(f"micro_batch={micro} (the contrastive batch stays: grad cache)")
    for stage in range(config.zero.stage + 1, 4):
        changed = dataclasses.replace(sharding(config, config.world), stage=stage)
        zero = dataclasses.replace(config.zero, stage=stage)
        peak = need(dataclasses.replace(config, zero=zero), sizes, changed, p, reserve).peak
        if peak <= limit:
            found.append(f"zero.stage={stage} ({peak / GB:.1f} GB)")
            break
    if config.zero.precision == "fp32":
        found.append("zero.precision=bf16 (halves parameters, gradients and activations)")
    if not config.activation_checkpointing:
        found.append("activation_checkpointing=[all] (plan again to see what it saves)")
    if config.zero.stage and not config.zero.offload_optimizer:
        changed = dataclasses.replace(sharding(config, config.world), offload_optimizer=True)
        peak = need(config, sizes, changed, p, reserve).peak
        if peak <= limit:
            found.append(f"zero.offload_optimizer=true ({peak / GB:.1f} GB; slower steps)")
    return found or ["more GPUs, a smaller model or a smaller contrastive batch"]


def steps_of(config: ScaleConfig) -> Plan:
    """Batch and step arithmetic of the planned world, from shards or from a number of samples."""
    if not config.shards:
        return arithmetic(config, config.num_samples, config.world)
    manifest = Manifest.load(config.shards, remote(config.cache))
    check_notes(config, manifest)
    return plan(config, manifest, config.world)


def parts_of(config: TrainConfig) -> list[Part]:
    """Parameters, work and activations of each part of the model, without its weights."""
    model = simulate.build(config.model, "fp32")
    mode = typing.cast(Any, model.logit_scale).fake_mode
    with mode, simulate.Tracker(config.model.text.max_tokens):
        return model.summary()
