"""What training needs, by arithmetic: memory of model states by ZeRO stage, buffers, checkpoints, communication.

Model states follow Rajbhandari et al. 2020 (arXiv 1910.02054, section 3.1), with Ψ trainable parameters, N ranks and p
bytes an element (fp32: 4, bf16 and fp16: 2):

    stage 0   p Ψ + p Ψ + K Ψ           parameters, gradients, AdamW
    stage 1   p Ψ + p Ψ + 12 Ψ / N
    stage 2   p Ψ + p Ψ / N + 12 Ψ / N
    stage 3   p Ψ / N + p Ψ / N + 12 Ψ / N

The 12 bytes are AdamW's two moments and a float32 copy of the parameters. DeepSpeed keeps that copy at stages 1 to 3 in
fp32 as well, where it equals the parameters. At stage 0, K is 12 in bf16 and fp16, and 8 in fp32 (no copy). Frozen
parameters cost p bytes each, at stage 3 p / N, and nothing else. At stage 3 DeepSpeed also keeps tensors below 100,000
elements whole, which matters for small models only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
TOGETHER = 4  # micro-batches that grad cache passes forward at a time for their features, of which nothing is kept
MOMENTS, MASTER = 8, 4  # bytes a parameter of AdamW's two float32 moments, and of the float32 copy
FORMULA = {
    0: "{p}Ψ + {p}Ψ + {k}Ψ",
    1: "{p}Ψ + {p}Ψ + 12Ψ/N",
    2: "{p}Ψ + {p}Ψ/N + 12Ψ/N",
    3: "{p}Ψ/N + {p}Ψ/N + 12Ψ/N",
}


@dataclass(frozen=True)
class Sharding:
    """What of ZeRO the arithmetic depends on."""

    stage: int
    precision: str
    world: int
    offload_optimizer: bool = False
    offload_parameters: bool = False

    @property
    def element(self) -> int:
        """Bytes of one parameter and one gradient element."""
        return ELEMENT_BYTES[self.precision]

    def share(self, from_stage: int) -> float:
        """The part of something that a rank holds which is sharded from this stage on."""
        return 1 / self.world if self.stage >= from_stage else 1.0

    @property
    def formula(self) -> str:
        """The formula of the model states, with the bytes of this precision."""
        return FORMULA[self.stage].format(p=self.element, k=self.optimizer_element)

    @property
    def optimizer_element(self) -> int:
        """Bytes of optimizer state a trainable parameter, before sharding."""
        return MOMENTS if self.stage == 0 and self.precision == "fp32" else MOMENTS + MASTER


@dataclass(frozen=True)
class States:
    """Bytes of a rank's model states while gradients are held, on its device and in its host's memory."""

    parameters: float
    frozen: float
    gradients: float
    optimizer: float
    host: float

    @property
    def device(self) -> float:
        """What lies on the device."""
        return self.parameters + self.frozen + self.gradients + self.optimizer


def states(trainable: int, frozen: int, how: Sharding) -> States:
    """A rank's model states for `trainable` and `frozen` elements: the formula of this module.

    With the optimizer offloaded its states and float32 gradients (16 Ψ / N) lie in host memory. Stages 1 and 2 also
    accumulate the gradients of all micro-batches there, unsharded (p Ψ).
    """
    p = how.element
    parameters, stopped = trainable * p * how.share(3), frozen * p * how.share(3)
    gradients = trainable * p * how.share(2)
    optimizer = trainable * how.optimizer_element * how.share(1)
    host = 0.0
    if how.offload_optimizer:
        host += optimizer + trainable * 4 * how.share(1) + (gradients if how.stage == 3 else trainable * p)
        optimizer = 0.0
        gradients = gradients if how.stage == 1 else 0.0
    if how.offload_parameters:
        host += parameters + stopped
        parameters = stopped = 0.0
    return States(parameters, stopped, gradients, optimizer, host)


def bucket_elements(trainable: int) -> int:
    """Elements a communication bucket by model size: a tenth of what learns, within 5 to 200 million, at most all."""
    elements = max(min(max(trainable // 10, 5_000_000), 200_000_000, trainable), 1000)
    return elements + elements % 2  # DeepSpeed takes even ones only


def live_elements(total: int) -> int:
    """Parameter elements that stage 3 keeps gathered at once: a quarter of the model, at least 100 million."""
    return max(total // 4, 100_000_000)


def buffers(trainable: int, total: int, bucket: int, how: Sharding, overlap: bool) -> float:
    """Bytes of a rank's communication buffers while it goes backward; at stage 3 with the parameters gathered then."""
    if how.world == 1 and how.stage == 0:
        return 0.0
    reduce = min(bucket, trainable) * how.element * (2 if overlap else 1)
    gathered = min(live_elements(total), total) * how.element if how.stage == 3 else 0
    return float(reduce + gathered)


def update(trainable: int, how: Sharding) -> float:
    """Bytes that the optimizer step needs for its moment: float32 gradients and one temporary of AdamW, of a share."""
    copy = 0 if how.precision == "fp32" else 4
    return 0.0 if how.offload_optimizer else trainable * (copy + 4) * how.share(1)


@dataclass(frozen=True)
class CheckpointSize:
    """Bytes of one checkpoint: all ranks' files together, and what the largest writer among the ranks writes."""

    total: float
    largest_rank: float


def checkpoint_size(trainable: int, frozen: int, how: Sharding) -> CheckpointSize:
    """A checkpoint holds the model in its precision once (frozen parameters too), and the optimizer's states."""
    model = (trainable + frozen) * how.element
    optimizer = trainable * how.optimizer_element
    if how.stage == 0:
        return CheckpointSize(model + optimizer, model + optimizer)
    if how.stage == 3:  # trainable parameters are in the float32 copies only
        return CheckpointSize(optimizer + frozen * how.element, (optimizer + frozen * how.element) / how.world)
    return CheckpointSize(model + optimizer, model + optimizer / how.world)


def communication(
    trainable: int, total: int, how: Sharding, num_micro: int, batch: int, embed_dim: int, row_bytes: int
) -> dict[str, float]:
    """Bytes that a rank sends in one optimizer step, by what for, in ring algorithms ((N − 1) / N of the data each).

    Gradients are reduced once a step below stage 2, and after every micro-batch from there on; DeepSpeed scatters them
    at stage 3 only and sums whole buckets on all ranks below (in float32 on CPUs `dermfm.shares` scatters at stage 1,
    too). Stage 3 gathers the parameters for every pass: forward and backward, and where micro-batches are passed twice
    (grad cache) once more for every `TOGETHER` of them.
    `row_bytes`: of one sample, beside its features: hashes, labels, note tokens where others read them.
    """
    ring = (how.world - 1) / how.world
    gradients = trainable * how.element * (num_micro if how.stage >= 2 else 1)
    if how.stage < 3:
        gradients *= 2  # an all-reduce is a reduce-scatter and an all-gather
    passes = 2 * num_micro + (math.ceil(num_micro / TOGETHER) if num_micro > 1 else 0)
    gathers = {0: 0, 1: 1, 2: 1}.get(how.stage, passes)
    parameters = (total if how.stage == 3 else trainable) * how.element * gathers
    features = 2 * batch * embed_dim * 4 * 3  # two kinds, gathered forward, all-reduced backward
    return {
        "gradients": gradients * ring,
        "parameters": parameters * ring,
        "features": features * ring,
        "notes": batch * row_bytes * ring,
    }
