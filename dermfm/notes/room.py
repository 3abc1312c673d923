"""Whether a model fits where it is to run, checked before anything of it is loaded."""

from __future__ import annotations

import psutil

from cluster.ray import RayError
from cluster.replicas import Resources, accelerators, room_for
from dermfm.config import InputError
from dermfm.notes.engines.folders import on_cuda
from dermfm.notes.engines.protocol import EngineConfig, weight_bytes
from dermfm.notes.plan import NotesConfig

OVERHEAD = 1.2  # memory of a process with a model, over its weights
PROCESS_BYTES = 300e6  # of a process without a model
# Memory of accelerators by Ray's names of them; the largest version where there are several.
DEVICE_GB = {
    "V100": 32, "T4": 16, "P4": 8, "P100": 16, "K80": 12, "L4": 24, "L40": 48, "L40S": 48, "A10": 24, "A10G": 24,
    "A30": 24, "A40": 48, "A100": 80, "A100-40G": 40, "A100-80G": 80, "H100": 94, "H200": 141, "H20": 141, "GH200": 144,
    "B200": 192, "B300": 288, "RTX-PRO-6000": 96,
}  # fmt: skip


def resources_of(config: NotesConfig, engine: EngineConfig) -> Resources:
    """What one replica asks of Ray: a bundle a shard; with a model in main memory, that memory too."""
    own = engine.kind == "vllm" and engine.shards > 1
    memory = 0.0
    if engine.kind != "template" and not config.gpus_per_actor and (weights := weight_bytes(engine)):
        memory = PROCESS_BYTES + OVERHEAD * weights / engine.shards
    gpus = config.gpus_per_actor if engine.kind != "template" else 0.0
    return Resources(float(config.threads_per_actor), gpus, config.threads_per_actor, engine.shards, own, memory)


def check_here(engine: EngineConfig) -> None:
    """Raise InputError where the weights are larger than this machine's memory."""
    weights = weight_bytes(engine)
    have, where = float(psutil.virtual_memory().total), "this machine has"
    if engine.kind in ("transformers", "vllm") and on_cuda(engine):
        import torch

        if not torch.cuda.is_available():
            raise InputError("engine.device: cuda is asked for and this machine shows no GPU; use auto or cpu")
        have, where = float(torch.cuda.get_device_properties(0).total_memory), "the GPU has"
    _compare(engine, weights, have, where)


def check_cluster(config: NotesConfig, engine: EngineConfig, need: Resources) -> int | None:
    """The number of replicas to start, null for as many as fit; InputError or RayError where it cannot be."""
    names = accelerators()
    if need.gpus and names and all(name in DEVICE_GB for name in names):
        largest = max(DEVICE_GB[name] for name in names)
        _compare(engine, weight_bytes(engine) / need.shards, largest * 1e9 * min(need.gpus, 1), "a GPU there has")
    try:
        room = room_for(need)
    except RayError as error:
        what = f"engine.model: {engine.model}" if need.memory else "threads_per_actor, gpus_per_actor"
        raise InputError(f"{what}: {error}") from error
    if config.replicas == "auto":
        return 1 if engine.kind == "openai" else None
    if int(config.replicas) > room:
        raise InputError(
            f"replicas: {config.replicas} do not fit, the cluster has room for {room}; lower it or use auto"
        )
    return int(config.replicas)


def _compare(engine: EngineConfig, need: float, have: float, where: str) -> None:
    if need > have:
        raise InputError(
            f"engine.model: the weights of {engine.model} take {need / 1e9:.1f} GB a process, {where} {have / 1e9:.1f} "
            "GB; use a smaller model, a larger engine.tensor_parallel or engine.dtype=bfloat16"
        )
