"""Floating-point operations of a sample's forward and backward pass, and what a device could do at most.

Model FLOPs in the sense of PaLM (Chowdhery et al. 2022, appendix B): what the objectives need once; the second forward
pass of grad cache and of activation checkpointing is not counted, so recomputation lowers the utilization.
"""

from __future__ import annotations

import typing
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dermfm.model.dermfm import DermFM, ModelConfig
from dermfm.objectives import ObjectiveConfig
from dermfm.simulate import Tracker, build

# Dense peak TFLOP/s by a part of the device's name: (bf16 or fp16, fp32 with TF32 where the device has it). Vendors'
# data sheets, without sparsity. The first match counts.
PEAK_TFLOPS = {
    "B200": (2250.0, 1125.0),
    "H200": (989.0, 494.0),
    "H100 PCIe": (756.0, 378.0),
    "H100": (989.0, 494.0),
    "GH200": (989.0, 494.0),
    "A100": (312.0, 156.0),
    "A40": (149.7, 74.8),
    "A10G": (70.0, 35.0),
    "A10": (125.0, 62.5),
    "L40S": (362.0, 183.0),
    "L40": (181.0, 90.5),
    "L4": (121.0, 60.0),
    "V100": (125.0, 15.7),
    "T4": (65.0, 8.1),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71.0, 35.6),
    "MI300X": (1307.0, 653.0),
    "MI250": (191.5, 47.9),
}


def peak_tflops(device: str, precision: str, given: float = 0.0) -> float:
    """Peak TFLOP/s of one process's device: as given, else by the table; 0 where neither says it (a CPU)."""
    if given or not device.startswith("cuda"):
        return given
    name = torch.cuda.get_device_name(device)
    found = next((peaks for part, peaks in PEAK_TFLOPS.items() if part in name), (0.0, 0.0))
    return found[1] if precision == "fp32" else found[0]


def count(config: ModelConfig, objectives: ObjectiveConfig) -> tuple[float, float]:
    """FLOPs of one sample: (of its image, of its note at `max_tokens` with the fusion), forward and backward.

    Counted on a model without data (`simulate.build`), so that none has to be whole. What is frozen has no backward
    pass. Attention runs as plain products, which the counter knows on every device.
    """
    model = build(config, "fp32")
    mode = typing.cast(Any, next(model.parameters())).fake_mode
    with mode, Tracker(1), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        return _count(model.eval(), objectives, config.image.size, config.text.max_tokens)


def _count(model: DermFM, objectives: ObjectiveConfig, size: int, width: int) -> tuple[float, float]:
    pixels = torch.zeros((1, 3, size, size), dtype=torch.uint8)
    tokens, lengths = torch.ones((1, width), dtype=torch.int64), torch.full((1,), width)
    image, with_image = _counted(model, {"image": {"pixels": pixels}})
    if not objectives.uses_text:
        return image, 0.0
    passes = 2 if objectives.matching else 1  # the hard negative is read as well
    read, out = _counted(model, {"text": {"tokens": tokens, "lengths": lengths}})
    note = passes * read
    image_tokens = with_image["tokens"].detach().requires_grad_()
    if objectives.uses("fusion"):
        text_tokens = out["tokens"].detach().requires_grad_()
        inputs = {"image_tokens": image_tokens, "text_tokens": text_tokens, "lengths": lengths}
        note += passes * _counted(model, {"fuse": inputs})[0]
    if objectives.caption:
        inputs = {"image_tokens": image_tokens, "tokens": tokens, "lengths": lengths, "weight": torch.ones(1)}
        note += _counted(model, {"caption": inputs})[0]
    return image, note


def _counted(model: Any, call: dict[str, dict[str, torch.Tensor]]) -> tuple[float, dict[str, torch.Tensor]]:
    ((phase, inputs),) = call.items()
    counter = FlopCounterMode(display=False)
    with counter:
        out = model(phase, **inputs)
        total = torch.stack([v.float().sum() for v in out.values()]).sum()
        if total.requires_grad:
            total.backward()
    return float(counter.get_total_flops()), out
