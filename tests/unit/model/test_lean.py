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


def outputs_and_gradients(module: nn.Module, x: Tensor, autocast: bool) -> list[Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = module(x).float()
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])]


@pytest.mark.parametrize(("kind", "autocast"), [("vit", False), ("bert", False), ("bert", True)])
def test_outputs_and_gradients_are_those_of_plain_blocks_bit_by_bit(autocast, kind):
    x = torch.randn(2, ROWS, WIDTH, requires_grad=True)
    found, expected = (outputs_and_gradients(module, x, autocast) for module in lean_and_plain(kind))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("frozen", [False, True])
def test_under_autocast_a_norm_s_gradients_are_as_near_to_full_precision_as_those_of_plain_blocks(frozen):
    """The output is the same bit by bit."""
    x = torch.randn(2, ROWS, WIDTH, requires_grad=True)
    lean, plain = lean_and_plain()
    for module in (lean, plain):
        for name, parameter in module.named_parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    if frozen:  # the first block's weights; gradients still pass through it to x
        lean[0].requires_grad_(False), plain[0].requires_grad_(False)

    def pull(module: nn.Module, autocast: bool) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = module(x).float()
        learned = [p for p in module.parameters() if p.requires_grad]
        return [out.detach(), *torch.autograd.grad((out * out.detach().cos()).sum(), [x, *learned])]

    found, ordinary, exact = pull(lean, True), pull(plain, True), pull(plain, False)
    assert torch.equal(found[0], ordinary[0])
    assert len(found) == len(exact) == 2 + 12 * (1 if frozen else 2)
    off, usual = (
        [float((a - b).norm() / b.norm()) for a, b in zip(tensors[1:], exact[1:], strict=True) if b.norm() > 1e-3]
        for tensors in (found, ordinary)
    )
    assert sum(off) < 1.2 * sum(usual)
    assert max(off) < 1.5 * max(usual)


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


def test_under_autocast_a_norm_keeps_half_of_what_enters_it():
    lean, plain = lean_and_plain()
    x = torch.randn(2, ROWS, WIDTH, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        without, with_all = kept_bytes(lean, x), kept_bytes(plain, x)
    narrow = 2 * 2 * x.numel() * 2  # both norms of both blocks, of two bytes an element
    casts = 2 * (3 + 4) * WIDTH * WIDTH * 2  # the weights of qkv and fc1, which plain layers keep in their type
    means = 2 * 2 * 2 * ROWS * x.element_size()
    # Plain: what enters, in four bytes, and what comes out, in two. Lean: the latter alone.
    assert with_all - without == 2 * narrow + casts + means


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
