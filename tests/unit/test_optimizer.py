"""Parameter groups by part and decay, and the schedule as a function of the share of samples seen."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dermfm.optimizer import OptimizerConfig, parameter_groups, rate_factor


class Tiny(nn.Module):
    """Parts named as the model's are."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
        self.text = nn.Linear(2, 3)
        self.image_projection = nn.Linear(3, 4, bias=False)  # not the tower, though the name begins alike
        self.logit_scale = nn.Parameter(torch.zeros(1))


def names_in(model: nn.Module, config: OptimizerConfig) -> dict[str, tuple[set[str], float, float]]:
    """group name → (names of its parameters, peak rate, decay)."""
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        group["name"]: ({by_id[id(p)] for p in group["params"]}, group["peak"], group["weight_decay"])
        for group in parameter_groups(model, config)
    }


def test_towers_and_rest_have_rates_of_their_own_and_vectors_do_not_decay():
    config = OptimizerConfig(lr=1e-3, image_lr=2e-4, text_lr=3e-5, weight_decay=0.1)
    assert names_in(Tiny(), config) == {
        "image": ({"image.0.weight"}, 2e-4, 0.1),
        "image_no_decay": ({"image.0.bias", "image.1.weight", "image.1.bias"}, 2e-4, 0.0),
        "rest": ({"image_projection.weight"}, 1e-3, 0.1),
        "rest_no_decay": ({"logit_scale"}, 1e-3, 0.0),
        "text": ({"text.weight"}, 3e-5, 0.1),
        "text_no_decay": ({"text.bias"}, 3e-5, 0.0),
    }


def test_frozen_parameters_are_in_no_group():
    model = Tiny()
    model.text.requires_grad_(False)
    found = names_in(model, OptimizerConfig())
    assert set(found) == {"image", "image_no_decay", "rest", "rest_no_decay"}
    assert sum(len(names) for names, _, _ in found.values()) == 6


def test_a_parameter_that_zero_3_has_sharded_is_judged_by_its_true_shape():
    model = Tiny()
    model.text.weight.ds_shape = model.text.weight.shape  # as DeepSpeed marks it
    model.text.weight.data = torch.empty(0)
    assert names_in(model, OptimizerConfig())["text"][0] == {"text.weight"}


@pytest.mark.parametrize(
    ("schedule", "done", "expected"),
    [
        ("cosine", 0.0, 0.0),
        ("cosine", 0.05, 0.5),
        ("cosine", 0.1, 1.0),
        ("cosine", 0.55, 0.5),
        ("cosine", 0.325, (1 + math.cos(math.pi / 4)) / 2),
        ("cosine", 1.0, 0.0),
        ("linear", 0.1, 1.0),
        ("linear", 0.55, 0.5),
        ("linear", 1.0, 0.0),
        ("constant", 0.05, 0.5),
        ("constant", 0.9, 1.0),
    ],
)
def test_the_rate_rises_linearly_and_then_follows_its_schedule(schedule, done, expected):
    config = OptimizerConfig(schedule=schedule, warmup=0.1)
    assert rate_factor(config, done) == pytest.approx(expected, abs=1e-12)


def test_without_warm_up_the_first_step_has_the_full_rate():
    assert rate_factor(OptimizerConfig(warmup=0), 0.0) == 1.0


def test_a_warm_up_over_everything_rises_to_the_end():
    config = OptimizerConfig(warmup=1, schedule="linear")
    assert [rate_factor(config, d) for d in (0.0, 0.25, 0.75)] == [0.0, 0.25, 0.75]


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"lr": -1}, "optimizer.lr: -1 is not valid; it must be at least 0"),
        ({"warmup": 2}, "optimizer.warmup: 2 is not valid; it must be between 0 and 1"),
        ({"schedule": "cosin"}, "optimizer.schedule: 'cosin' is not valid; did you mean 'cosine'"),
        ({"betas": [0.9]}, r"optimizer.betas: \[0.9\] is not valid; give two numbers in \[0, 1\)"),
        ({"betas": [0.9, 1.0]}, "optimizer.betas"),
    ],
)
def test_values_that_cannot_work_are_named(values, part):
    with pytest.raises(ValueError, match=part):
        OptimizerConfig(**values)
