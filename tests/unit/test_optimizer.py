"""Parameter groups by part, layer and decay, and the schedule as a function of samples seen."""

from __future__ import annotations

import math

import pytest
import timm
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
        "heads": ({"image_projection.weight"}, 1e-3, 0.1),
        "heads_no_decay": ({"logit_scale"}, 1e-3, 0.0),
        "text": ({"text.weight"}, 3e-5, 0.1),
        "text_no_decay": ({"text.bias"}, 3e-5, 0.0),
    }


def test_frozen_parameters_are_in_no_group():
    model = Tiny()
    model.text.requires_grad_(False)
    found = names_in(model, OptimizerConfig())
    assert set(found) == {"image", "image_no_decay", "heads", "heads_no_decay"}
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
    assert rate_factor(config, done * 5000, 5000) == pytest.approx(expected, abs=1e-12)


def test_without_warm_up_the_first_step_has_the_full_rate():
    assert rate_factor(OptimizerConfig(warmup=0), 0, 100) == 1.0


def test_a_warm_up_over_everything_rises_to_the_end():
    config = OptimizerConfig(warmup=1, schedule="linear")
    assert [rate_factor(config, seen, 100) for seen in (0, 25, 75)] == [0.0, 0.25, 0.75]


def test_a_warm_up_in_samples_does_not_change_with_the_length_of_the_run():
    config = OptimizerConfig(warmup_samples=200)
    assert [rate_factor(config, 100, total) for total in (1000, 50_000)] == [0.5, 0.5]
    assert rate_factor(config, 200, 1000) == 1.0
    assert rate_factor(config, 600, 1000) == pytest.approx(0.5)


def test_a_schedule_can_end_above_zero():
    for schedule in ("cosine", "linear"):
        config = OptimizerConfig(schedule=schedule, warmup=0, final=0.1)
        assert [rate_factor(config, seen, 100) for seen in (0, 50, 100)] == pytest.approx([1.0, 0.55, 0.1])


class Layered(nn.Module):
    """Towers of three and two blocks between a stem and a norm, a fusion, a decoder and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = tower(3), tower(2)
        self.fusion, self.decoder, self.match_head = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1)


def tower(depth: int) -> nn.Module:
    found = nn.Module()
    found.stem = nn.Linear(2, 2, bias=False)
    found.blocks = nn.ModuleList(nn.Sequential(nn.Linear(2, 2, bias=False)) for _ in range(depth))
    found.norm = nn.LayerNorm(2)
    return found


def test_rates_of_a_tower_fall_with_each_layer_from_its_output_to_its_stem():
    config = OptimizerConfig(lr=1.0, image_lr=0.8, text_lr=0.4, fusion_lr=0.2, layer_decay=0.5)
    rates = {name: peak for names, peak, _ in names_in(Layered(), config).values() for name in names}
    image = [rates[f"image.{n}"] for n in ("norm.weight", "blocks.2.0.weight", "blocks.1.0.weight", "stem.weight")]
    assert image == [0.8, 0.8, 0.4, 0.1]
    assert [rates[f"text.{n}"] for n in ("blocks.1.0.weight", "blocks.0.0.weight", "stem.weight")] == [0.4, 0.2, 0.1]
    assert (rates["fusion.weight"], rates["decoder.weight"], rates["match_head.weight"]) == (0.2, 1.0, 1.0)
    assert sum(len(names) for names, _, _ in names_in(Layered(), config).values()) == len(rates)


def test_tokens_and_positions_of_a_vit_do_not_decay():
    model = nn.Module()
    model.image = nn.Module()
    model.image.body = timm.create_model("test_vit", num_classes=0)
    decays = {name: decay for names, _, decay in names_in(model, OptimizerConfig()).values() for name in names}
    assert decays["image.body.cls_token"] == decays["image.body.pos_embed"] == 0
    assert decays["image.body.blocks.0.attn.qkv.weight"] > 0
    assert decays["image.body.blocks.0.attn.qkv.bias"] == decays["image.body.norm.weight"] == 0


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"layer_decay": 0}, "optimizer.layer_decay: 0 is not valid"),
        ({"warmup_samples": -1}, "optimizer.warmup_samples: -1 is not valid"),
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
