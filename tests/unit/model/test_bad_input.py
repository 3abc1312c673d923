"""What a run of `train` would refuse at its start, told before any rank starts and by `train --dry-run` alike."""

from __future__ import annotations

import pytest
import torch

from dermfm import scale_table
from dermfm.config import InputError
from dermfm.model.bodies import build_body, check_weights
from dermfm.model.dermfm import ModelConfig
from dermfm.model.fusion import FusionConfig
from dermfm.model.image import ImageConfig
from dermfm.plan import Plan, TrainConfig, check_here

TOWER, SIZE = "test_efficientnet", 32


def config(image: ImageConfig, kernel: str = "auto", **more) -> TrainConfig:
    model = ModelConfig(image=image, fusion=FusionConfig(width=16, heads=2, depth=1, kernel=kernel), embed_dim=8)
    return TrainConfig(run="none", shards="none", model=model, device="cpu", **more)


@pytest.fixture
def weights(tmp_path):
    """Two files: a tower's own weights, and the same without its stem and with another shape."""
    whole, broken = tmp_path / "whole.pt", tmp_path / "broken.pt"
    state = build_body(TOWER, SIZE, None).state_dict()
    torch.save(state, whole)
    first, second, *_ = [n for n in state if n.endswith("weight")]
    torch.save({n: t[:1] if n == second else t for n, t in state.items() if n != first}, broken)
    return str(whole), str(broken)


def test_weights_that_do_not_fit_are_told_with_tensors_and_shapes_and_without_building_the_tower(weights):
    whole, broken = weights
    check_weights(TOWER, SIZE, whole)
    check_here(config(ImageConfig(name=TOWER, size=SIZE, weights=whole)))
    with pytest.raises(
        InputError, match=r"^image.weights: .*broken.pt does not fit this tower: 1 tensors missing"
    ) as e:
        check_here(config(ImageConfig(name=TOWER, size=SIZE, weights=broken)))
    assert str(e.value).startswith("image.weights: ")
    assert "1 tensors of other shape" in str(e.value)
    assert " ≠ " in str(e.value)


@pytest.mark.parametrize("part", ["image", "text", "fusion", "decoder"])
def test_a_kernel_that_this_device_cannot_run_is_told_with_its_key_and_what_can(part):
    planned = config(ImageConfig(name=TOWER, size=SIZE))
    check_here(planned)
    getattr(planned.model, part).kernel = "flash"
    with pytest.raises(InputError, match=rf"^model.{part}.kernel: 'flash' needs a CUDA device.*use 'auto' or 'sdpa'"):
        check_here(planned)


@pytest.mark.parametrize(
    ("image", "told"),
    [
        (
            ImageConfig(name=TOWER, size=SIZE, train_blocks=99),
            r"image.train_blocks: 99 is not valid; .* has \d",
        ),
        (ImageConfig(name=TOWER, size=SIZE, stride=9), r"image.stride: 9 is not valid; the stages of .* have 2, 4"),
        (ImageConfig(name="test_vit", size=SIZE, stride=8), "image.stride: 'test_vit' has no stages to stop at"),
        (ImageConfig(name=TOWER, size=SIZE, pool="cls"), "image.pool: 'test_efficientnet' has no class token"),
    ],
)
def test_what_no_tower_can_be_built_of_ends_a_dry_run(image, told, encoder, monkeypatch):
    monkeypatch.setattr(scale_table, "steps_of", lambda planned: Plan(4, 1, 1, 4, 1))  # there are no shards
    planned = config(image, contrastive_batch=4, micro_batch=4)
    planned.model.text.name = encoder
    with pytest.raises(InputError, match=told):
        scale_table.show_run(planned, 1)
