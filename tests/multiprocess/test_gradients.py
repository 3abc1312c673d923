"""Gradient norms by part and steps that are not taken, under DeepSpeed at every ZeRO stage, against plain autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from dermfm import zero
from dermfm.gradients import Gradients

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("alone")]


STAGES = [(0, False), (1, False), (1, True), (2, False), (2, True), (3, False), (3, True)]


@pytest.fixture(scope="module", params=STAGES, ids=lambda p: f"stage-{p[0]}{'-offloaded' if p[1] else ''}")
def engine(request: pytest.FixtureRequest) -> Any:
    """DeepSpeed over two linear layers in two parameter groups, at each ZeRO stage, also with offloaded states."""
    stage, offloaded = request.param
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    groups = [
        {"params": list(part.parameters()), "lr": 0.1, "name": name}
        for name, part in (("image", model[0]), ("heads_no_decay", model[1]))
    ]
    settings = zero.deepspeed_json(
        zero.ZeroConfig(stage=stage, offload_optimizer=offloaded),
        micro_batch=2,
        num_micro=1,
        world=1,
        optimizer={"lr": 0.1},
        device="cpu",
        num_learning=25,
        num_parameters=25,
    )
    made = zero.initialize(model, groups, settings, "cpu")
    made.gradients = Gradients(made)
    return made


def back(engine: Any, scale: float = 1.0) -> list[float]:
    """Backward of a batch; the norms of both layers' gradients, computed by plain autograd."""
    torch.manual_seed(1)
    x = torch.randn(2, 4)
    weights = whole(engine)
    leaves = {n: w.clone().requires_grad_() for n, w in weights.items()}
    y = (x @ leaves["0.weight"].T + leaves["0.bias"]) @ leaves["1.weight"].T + leaves["1.bias"]
    (y.square().sum() * scale).backward()
    engine.backward(engine(x).square().sum() * scale, scale_wrt_gas=False)
    return [math.hypot(*(float(leaves[f"{i}.{p}"].grad.norm()) for p in ("weight", "bias"))) for i in range(2)]


def whole(engine: Any) -> dict[str, torch.Tensor]:
    """The weights; a world of one holds them all, ZeRO-3 in flat pieces."""
    return {
        n: (p.ds_tensor.view(p.ds_shape) if hasattr(p, "ds_tensor") else p).detach().clone()
        for n, p in engine.module.named_parameters()
    }


def test_norms_come_by_part_and_in_all_before_clipping(engine):
    first, second = back(engine)
    update = engine.gradients.step()
    assert update.applied
    assert update.parts == pytest.approx({"image": first, "heads": second}, rel=1e-5)
    assert update.norm == pytest.approx(math.hypot(first, second), rel=1e-5)
    assert update.named().keys() == {"grad_norm", "grad_norm/image", "grad_norm/heads"}


@pytest.mark.parametrize("how", ["discarded", "not finite"])
def test_a_step_that_is_not_taken_leaves_weights_and_no_gradient(engine, how):
    back(engine)
    engine.gradients.step()
    before = whole(engine)
    back(engine, scale=math.nan if how == "not finite" else 1.0)
    update = engine.gradients.step(discard=how == "discarded")
    assert not update.applied
    assert {n: torch.equal(before[n], w) for n, w in whole(engine).items()} == dict.fromkeys(before, True)
    norms = back(engine)  # had the gradients stayed, these would add to them
    update = engine.gradients.step()
    assert update.applied
    assert list(update.parts.values()) == pytest.approx(norms, rel=1e-5)
    assert not torch.equal(before["0.weight"], whole(engine)["0.weight"])
