"""How the gradients of stage 1 are divided among ranks, against the flat tensor that the shares are parts of."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dermfm import shares

SIZES = (3, 10, 1, 6)
GAP_AFTER, GAP = 1, 2  # elements that align what follows, as `parameter_alignment` of DeepSpeed's does
TOTAL = 24


@pytest.fixture
def group() -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Parameters that are views of a flat tensor, that tensor, and the flat tensor of their gradients, zeros between.

    The last one has no gradient.
    """
    flat, gradients, parameters, here = torch.zeros(TOTAL), torch.zeros(TOTAL), [], 0
    for i, size in enumerate(SIZES):
        parameter = flat[here : here + size].detach().requires_grad_()
        if i < len(SIZES) - 1:
            parameter.grad = torch.randn(size)
            gradients[here : here + size] = parameter.grad
        parameters.append(parameter)
        here += size + (GAP if i == GAP_AFTER else 0)
    return parameters, flat, gradients


@pytest.mark.parametrize("world", [1, 2, 3, 4, 24])
def test_the_pieces_of_all_shares_are_the_flat_gradients_with_zeros_in_the_gaps(group, world):
    parameters, flat, gradients = group
    size = TOTAL // world
    for rank in range(world):
        pieces = shares.pieces_within(parameters[::-1], flat, rank * size, (rank + 1) * size)
        packed = torch.cat([piece.gradient() for piece in pieces])
        assert torch.equal(packed, gradients[rank * size : (rank + 1) * size])


def test_a_share_lies_group_after_group_and_takes_the_gradients_away(group, alone):
    parameters, flat, gradients = group
    weight = torch.zeros(2, 2).requires_grad_()
    weight.grad = torch.ones(1).expand(2, 2)  # one number in memory
    optimizer = SimpleNamespace(
        bit16_groups=[parameters, [weight]],
        bit16_groups_flat=[flat, weight.detach().view(-1)],
        partition_size=[TOTAL, 4],
    )
    found = shares.Shares(optimizer)
    assert found.sizes == [TOTAL, 4]
    assert torch.equal(found.take_sums(), torch.cat([gradients, torch.ones(4)]))
    assert all(p.grad is None for p in [*parameters, weight])


def test_squares_are_summed_as_precisely_as_in_float64():
    values = torch.randn(3 * shares.CHUNK + 7, generator=torch.Generator().manual_seed(0)) * 1e-3
    assert float(shares.square(values)) == pytest.approx(float(values.double().square().sum()), rel=1e-6)
