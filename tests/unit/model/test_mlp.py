"""The perceptron keeps its hidden layer once, not twice, and computes what it did before."""

from __future__ import annotations

import copy

import pytest
import timm.layers
import torch
from torch import Tensor, nn

from dermfm.model.lean import mlp, use_lean_mlps

WIDTH, RATIO, ROWS = 16, 4.0, 10


def lean_and_plain(kind: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    if kind == "ours":
        lean: nn.Module = mlp(WIDTH, RATIO)
        hidden = int(WIDTH * RATIO)
        ordinary = nn.Sequential(nn.Linear(WIDTH, hidden), nn.GELU(), nn.Linear(hidden, WIDTH))
        ordinary.load_state_dict(lean.state_dict())
        return lean, ordinary
    plain: nn.Module = timm.layers.Mlp(WIDTH, int(WIDTH * RATIO))
    lean = copy.deepcopy(plain)
    use_lean_mlps(lean)
    return lean, plain


def kept_bytes(module: nn.Module, x: Tensor) -> int:
    """What autograd keeps of a pass, parameters and the input left out."""
    known = {t.untyped_storage().data_ptr() for t in [x, *module.parameters()]}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = module(x)
    del out
    return sum(kept.values())


@pytest.mark.parametrize("kind", ["ours", "timm"])
def test_outputs_and_gradients_are_those_of_the_plain_perceptron_bit_by_bit(kind):
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    lean, plain = lean_and_plain(kind)
    found, expected = lean(x), plain(x)
    assert torch.equal(found, expected)
    own = torch.autograd.grad(found.square().sum(), [x, *lean.parameters()])
    other = torch.autograd.grad(expected.square().sum(), [x, *plain.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))


@pytest.mark.parametrize("kind", ["ours", "timm"])
def test_half_as_much_is_kept(kind):
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    lean, plain = lean_and_plain(kind)
    hidden = ROWS * int(WIDTH * RATIO) * 4
    assert kept_bytes(plain, x) == 2 * hidden
    assert kept_bytes(lean, x) == hidden


def test_the_second_matrix_product_is_not_run_again():
    from torch.utils.flop_counter import FlopCounterMode

    lean, plain = lean_and_plain("ours")
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    work = []
    for module in (lean, plain):
        with FlopCounterMode(display=False) as counter:
            module(x).sum().backward()
        work.append(counter.get_total_flops())
    assert work[0] == work[1]


def test_a_perceptron_with_dropout_stays_as_it_is():
    module = timm.layers.Mlp(WIDTH, drop=0.1)
    use_lean_mlps(module)
    assert not any("forward" in vars(part) for part in module.modules())
