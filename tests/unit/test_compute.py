"""Activation checkpointing and torch.compile change neither results nor the names in a model's state."""

from __future__ import annotations

import copy
import shutil

import pytest
import timm
import torch
from torch import nn

from dermfm.compute import blocks, check_parts, compile_parts, recompute_activations
from dermfm.model.fusion import Fusion, FusionConfig
from dermfm.simulate import SavedTensors


class Parts(nn.Module):
    """An image tower and a fusion as the model has them."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Module()
        self.image.body = timm.create_model("test_vit", num_classes=0)
        self.fusion = Fusion(FusionConfig(depth=2, width=16, heads=2), 64, 24)

    def forward(self, pixels: torch.Tensor, text: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Fused tokens."""
        return self.fusion(self.image.body.forward_features(pixels), text, lengths)[0]


@pytest.fixture
def parts() -> Parts:
    torch.manual_seed(0)
    return Parts()


def inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(2, 3, 160, 160, generator=generator),
        torch.randn(2, 5, 24, generator=generator),
        torch.tensor([5, 3]),
    )


def gradients(model: nn.Module) -> tuple[float, dict[str, torch.Tensor], int]:
    """Loss, gradients by name, bytes saved for backward."""
    saved = SavedTensors(model)
    with saved.hooks():
        loss = model(*inputs()).square().mean()
        loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, saved.most


def test_recomputed_blocks_give_the_same_gradients_from_fewer_saved_bytes(parts):
    other = copy.deepcopy(parts)
    assert recompute_activations(other, ["all"]) == len(list(blocks(parts.image))) + 2
    assert list(other.state_dict()) == list(parts.state_dict())
    (loss, grads, saved), (again, others, fewer) = gradients(parts), gradients(other)
    assert again == pytest.approx(loss, rel=1e-6)
    assert list(others) == list(grads)
    assert all(torch.allclose(grads[name], others[name], rtol=1e-5, atol=1e-7) for name in grads)
    assert fewer < 0.6 * saved


def test_only_the_named_parts_recompute(parts):
    assert recompute_activations(parts, ["fusion"]) == 2
    assert recompute_activations(parts, []) == 0
    assert recompute_activations(parts, ["decoder"]) == 0  # this model has none


@pytest.mark.parametrize(
    ("name", "count"),
    [("vit_tiny_patch16_224", 12), ("tf_efficientnet_lite0", 7), ("convnext_atto", 4), ("densenet121", 7)],
)
def test_every_kind_of_tower_has_blocks(name, count):
    with torch.device("meta"):
        assert len(list(blocks(timm.create_model(name, num_classes=0)))) == count


def test_an_unknown_part_is_named():
    with pytest.raises(ValueError, match="activation_checkpointing: 'vision' is not valid"):
        check_parts("activation_checkpointing", ["vision"])


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPU")
@pytest.mark.soak
def test_a_compiled_model_computes_the_same(parts):
    parts.text = nn.Module()
    other = copy.deepcopy(parts)
    compile_parts(other)
    assert list(other.state_dict()) == list(parts.state_dict())
    (loss, grads, _), (again, others, _) = gradients(parts), gradients(other)
    assert again == pytest.approx(loss, rel=1e-5)
    assert all(torch.allclose(grads[name], others[name], rtol=1e-3, atol=1e-6) for name in grads)
