"""The kernels agree with each other and with a loop written from the definition; fusion is blind to padding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dermfm.model.attention import (
    _say_once,
    attention,
    attention_packed,
    attention_with_weights,
    choose_kernel,
    pack,
    unpack,
)
from dermfm.model.dermfm import masked_mean
from dermfm.model.fusion import Fusion, FusionConfig

KERNELS = ("sdpa", "reference")
HEADS, WIDTH = 2, 8
# (query rows, key rows, valid queries, valid keys) of a batch of three; None: no padding
SHAPES = {
    "all valid": (5, 5, None, None),
    "other number of keys": (3, 7, None, None),
    "padded keys": (5, 7, None, [7, 1, 4]),
    "padded both": (6, 7, [6, 2, 3], [7, 3, 5]),
    "more queries than keys": (7, 4, [7, 5, 2], [4, 2, 3]),
    "empty rows": (5, 6, [5, 0, 2], [6, 3, 0]),
}


def make(shape: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor | None]]:
    """q, k, v and the lengths of one entry of SHAPES."""
    rows, columns, lengths_q, lengths_k = SHAPES[shape]
    generator = torch.Generator().manual_seed(len(shape))
    q, k, v = (
        torch.randn(3, n, HEADS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
        for n in (rows, columns, columns)
    )
    lengths = {
        name: None if values is None else torch.tensor(values)
        for name, values in (("lengths_q", lengths_q), ("lengths_k", lengths_k))
    }
    return q, k, v, lengths


def by_loop(q: Tensor, k: Tensor, v: Tensor, lengths: dict[str, Tensor | None], causal: bool) -> Tensor:
    """Definition: every valid query of a row averages the row's values, weighed by softmax(q k / √D)."""
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        num_q = q.shape[1] if lengths["lengths_q"] is None else int(lengths["lengths_q"][b])
        num_k = k.shape[1] if lengths["lengths_k"] is None else int(lengths["lengths_k"][b])
        for h in range(q.shape[2]):
            for i in range(num_q):
                # bottom-right: the last valid query sees the last valid key
                last = num_k - num_q + i if causal else num_k - 1
                if last < 0:
                    continue
                scores = torch.stack([q[b, i, h] @ k[b, j, h] / math.sqrt(q.shape[-1]) for j in range(last + 1)])
                weights = (scores - scores.max()).exp()
                out[b, i, h] = (weights / weights.sum()) @ v[b, : last + 1, h]
    return out


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_each_kernel_computes_the_definition(kernel, shape, causal):
    q, k, v, lengths = make(shape)
    found = attention(q, k, v, **lengths, causal=causal, kernel=kernel)
    torch.testing.assert_close(found, by_loop(q, k, v, lengths, causal), rtol=0, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernels_agree_in_bf16(shape, causal):
    q, k, v, lengths = make(shape, torch.bfloat16)
    sdpa, reference = (attention(q, k, v, **lengths, causal=causal, kernel=kernel) for kernel in KERNELS)
    assert sdpa.dtype == reference.dtype == torch.bfloat16
    torch.testing.assert_close(sdpa.float(), reference.float(), rtol=0, atol=1e-2)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_sdpa_in_float64_are_those_of_the_definition(shape, causal):
    q, k, v, lengths = make(shape, torch.float64)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    direction = torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.autograd.grad((attention(q, k, v, **lengths, causal=causal, kernel="sdpa") * direction).sum(), leaves)
    expected = torch.autograd.grad((by_loop(q, k, v, lengths, causal) * direction).sum(), leaves)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_the_reference_are_finite_and_those_of_the_definition(shape, causal):
    q, k, v, lengths = make(shape)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    found = torch.autograd.grad(attention(q, k, v, **lengths, causal=causal, kernel="reference").square().sum(), leaves)
    expected = torch.autograd.grad(by_loop(q, k, v, lengths, causal).square().sum(), leaves)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_sdpa_passes_gradcheck_with_padding():
    q, k, v, lengths = make("padded both", torch.float64)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, **lengths, causal=True, kernel="sdpa")

    assert torch.autograd.gradcheck(run, [t[:, :4, :1, :3].clone().requires_grad_() for t in (q, k, v)])


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_lies_in_the_padding_changes_nothing(kernel):
    q, k, v, lengths = make("padded both")
    other_k, other_v = k.clone(), v.clone()
    for b, length in enumerate(lengths["lengths_k"].tolist()):
        other_k[b, length:], other_v[b, length:] = 1e4, -1e4
    before, after = (attention(q, *kv, **lengths, kernel=kernel) for kv in ((k, v), (other_k, other_v)))
    assert torch.equal(before, after)
    assert all((before[b, n:] == 0).all() for b, n in enumerate(lengths["lengths_q"].tolist()))


def test_weights_of_the_reference_are_distributions_over_the_valid_keys():
    q, k, v, lengths = make("empty rows", torch.bfloat16)
    output, weights = attention_with_weights(q, k, v, **lengths)
    assert weights.dtype == torch.float32
    assert weights.shape == (3, HEADS, 5, 6)
    torch.testing.assert_close(weights[:2].sum(-1), torch.ones(2, HEADS, 5))
    assert weights[1, :, :, 3:].max() == 0
    assert weights[2].max() == 0  # no valid key
    again = torch.einsum("bhqk,bkhd->bqhd", weights, v.float())
    torch.testing.assert_close(again[0], output[0].float(), rtol=0, atol=1e-2)


def test_one_position_more_does_not_change_the_earlier_ones_under_a_causal_mask():
    q, k, v, _ = make("all valid")
    whole = attention(q, k, v, causal=True, kernel="sdpa")
    shorter = attention(q[:, :4], k[:, :4], v[:, :4], causal=True, kernel="sdpa")
    torch.testing.assert_close(whole[:, :4], shorter)


def test_auto_is_sdpa_on_a_cpu():
    assert choose_kernel("auto", "cpu", torch.bfloat16) == "sdpa"
    assert choose_kernel("reference", "cpu", torch.float32) == "reference"


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_packed_rows_give_what_padded_rows_give_with_gradients(kernel, shape, causal):
    q, k, v, lengths = make(shape)
    direction = torch.randn(q.shape, generator=torch.Generator().manual_seed(2))
    results = []
    for packed in (False, True):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        if packed:
            (flat_q, rows_q), (flat_k, rows_k) = (
                pack(leaves[0], lengths["lengths_q"]),
                pack(leaves[1], lengths["lengths_k"]),
            )
            flat_v = pack(leaves[2], lengths["lengths_k"])[0]
            assert len(flat_q) == (
                q.shape[0] * q.shape[1] if lengths["lengths_q"] is None else lengths["lengths_q"].sum()
            )
            output = unpack(
                attention_packed(flat_q, flat_k, flat_v, rows_q, rows_k, causal=causal, kernel=kernel), rows_q
            )
        else:
            output = attention(*leaves, **lengths, causal=causal, kernel=kernel)
        results.append((output, *torch.autograd.grad((output * direction).sum(), leaves)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_the_chosen_kernel_is_told_once_a_device_and_type(caplog):
    _say_once.cache_clear()
    with caplog.at_level("INFO", logger="dermfm.model.attention"):
        for _ in range(3):
            choose_kernel("auto", "cpu", torch.float32)
        choose_kernel("auto", "cpu", torch.bfloat16)
    told = [record.getMessage() for record in caplog.records]
    assert told == [f"attention kernel: sdpa (asked for: auto; cpu, torch.{t})" for t in ("float32", "bfloat16")]


def test_an_unknown_kernel_is_an_error_that_lists_the_valid_ones():
    with pytest.raises(ValueError, match="'flsh' is not valid; one of auto, flash, sdpa, reference"):
        choose_kernel("flsh", "cpu", torch.float32)


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.bfloat16), ("cuda", torch.float32)])
def test_flash_where_it_cannot_run_is_an_error_that_says_what_it_needs(device, dtype):
    with pytest.raises(ValueError, match=r"'flash' needs a CUDA device, fp16 or bf16 .* use 'auto' or 'sdpa'"):
        choose_kernel("flash", device, dtype)


def test_fused_notes_do_not_depend_on_padding_or_on_the_rest_of_the_batch():
    torch.manual_seed(0)
    fusion = Fusion(FusionConfig(depth=2, width=16, heads=2), image_width=12, text_width=8).eval()
    image, text, lengths = torch.randn(3, 5, 12), torch.randn(3, 6, 8), torch.tensor([6, 2, 4])
    fused, maps = fusion(image, text, lengths, return_weights=True)
    for b, length in enumerate(lengths.tolist()):
        alone, own = fusion(image[b : b + 1], text[b : b + 1, :length], lengths[b : b + 1], return_weights=True)
        torch.testing.assert_close(fused[b, :length], alone[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(maps[b, :, :length], own[0], rtol=1e-4, atol=1e-5)
    assert maps.shape == (3, 2, 6, 5)
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(2, 6))
    without, nothing = fusion(image, text, lengths)
    assert nothing is None
    torch.testing.assert_close(without[0], fused[0], rtol=1e-4, atol=1e-5)


def test_masked_mean_is_the_mean_of_the_valid_tokens():
    tokens = torch.randn(3, 4, 2)
    found = masked_mean(tokens, torch.tensor([4, 1, 0]))
    torch.testing.assert_close(found[0], tokens[0].mean(0))
    torch.testing.assert_close(found[1], tokens[1, 0])
    assert found[2].tolist() == [0, 0]
