"""A CNN that stops at an earlier stage: finer tokens, and only strides that it has."""

from __future__ import annotations

import pytest
import timm
import torch

from dermfm.config import InputError
from dermfm.model.image import ImageConfig, ImageTower


@pytest.mark.parametrize(("stride", "side", "stages"), [(8, 8, 3), (16, 4, 5)])
def test_a_smaller_stride_gives_the_tokens_of_an_earlier_stage_and_leaves_the_deeper_ones_out(stride, side, stages):
    tower = ImageTower(ImageConfig(name="tf_efficientnet_lite0", size=64, stride=stride)).eval()
    whole = timm.create_model("tf_efficientnet_lite0").eval()
    unknown = whole.load_state_dict(tower.body.state_dict(), strict=False).unexpected_keys
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    expected = whole.blocks[:stages](whole.bn1(whole.conv_stem((pixels - tower.mean) / tower.std)))
    tokens, pooled = tower(pixels)
    assert not unknown
    assert len(tower.body.blocks) == stages
    assert tower.grid == (side, side)
    assert tower.width == expected.shape[1]
    torch.testing.assert_close(tokens, expected.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pooled, tokens.mean(1))


@pytest.mark.parametrize(
    ("name", "stride", "part"),
    [
        ("tf_efficientnet_lite0", 9, "2, 4, 8, 16, 32"),
        ("test_vit", 8, "no stages"),
        ("torchvision:resnet18", 8, "no stages"),
    ],
)
def test_a_stride_that_the_tower_does_not_have_is_an_error_that_lists_those_it_has(name, stride, part):
    with pytest.raises(InputError, match=f"image.stride: .*{part}"):
        ImageTower(ImageConfig(name=name, size=160, stride=stride))
