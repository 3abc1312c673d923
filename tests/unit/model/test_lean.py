"""Norms and activations are not kept beside what they were computed from, and everything comes out as before."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

from dermfm.model.lean import use_lean_blocks

WIDTH, ROWS, HIDDEN = 16, 10, 64


def lean_and_plain(kind: str = "vit") -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_attention_heads": 2}
    bert = BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="sdpa")
    layers = [BertLayer(bert) if kind == "bert" else Block(WIDTH, 2, qkv_bias=True) for _ in range(2)]
    plain = nn.Sequential(*layers)
    lean = copy.deepcopy(plain)
    use_lean_blocks(lean)
    return lean, plain


def kept_bytes(module: nn.Module, x: Tensor) -> int:
    known = {t.untyped_storage().data_ptr() for t in module.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}  # with the tensor, so that no memory is taken twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(x)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("kind", ["vit", "bert"])
@pytest.mark.parametrize("autocast", [False, True])
def test_outputs_and_gradients_are_those_of_plain_blocks_bit_by_bit(autocast, kind):
    x = torch.randn(2, ROWS, WIDTH, requires_grad=True)
    found = []
    for module in lean_and_plain(kind):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = module(x).float()
        found.append([out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_copy_computes_with_its_own_parameters():
    lean = copy.deepcopy(lean_and_plain()[0])
    x = torch.randn(2, ROWS, WIDTH, requires_grad=True)
    lean(x).sum().backward()
    assert all(p.grad is not None for p in lean.parameters())


def test_both_norms_of_a_block_are_not_kept():
    lean, plain = lean_and_plain()
    x = torch.randn(2, ROWS, WIDTH, requires_grad=True)
    norms = 2 * 2 * x.numel() * x.element_size()  # of two blocks
    statistics = 2 * 2 * 2 * 2 * ROWS * x.element_size()  # mean and deviation of each row
    assert kept_bytes(plain, x) - kept_bytes(lean, x) == norms + statistics


def test_the_activation_of_a_bert_is_not_kept():
    lean, plain = lean_and_plain("bert")
    x = torch.randn(2, ROWS, WIDTH, requires_grad=True)
    assert kept_bytes(plain, x) - kept_bytes(lean, x) == 2 * 2 * ROWS * HIDDEN * x.element_size()


def test_no_matrix_product_is_run_again():
    x = torch.randn(2, ROWS, WIDTH, requires_grad=True)
    work = []
    for module in lean_and_plain():
        with FlopCounterMode(display=False) as counter:
            module(x).sum().backward()
        work.append(counter.get_total_flops())
    assert work[0] == work[1]


def test_a_frozen_block_and_one_in_inference_are_normed_too():
    lean, plain = lean_and_plain()
    x = torch.randn(2, ROWS, WIDTH)
    with torch.no_grad():
        assert torch.equal(lean(x), plain(x))
    assert torch.equal(lean.requires_grad_(False)(x), plain(x))
