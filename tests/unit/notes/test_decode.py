"""Decoding against transformers' own `generate`, on a tiny random model."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from dermfm.notes.engines.decode import (
    EMPTY,
    Sampling,
    can_share_prefixes,
    common_beginning,
    compute_prefix,
    decode,
)
from dermfm.notes.engines.grouped import NAME, use_grouped_attention

STOP = [2]
SHAPE = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 2, "eos_token_id": 2, "bos_token_id": 1}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, initializer_range=0.4)).eval()


def prompts(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (count,), generator=generator).tolist()
    return [torch.randint(3, 97, (n,), generator=generator).tolist() for n in lengths]


def alone(model, tokens, steps):
    """What the library generates greedily for one unpadded prompt."""
    ids = torch.tensor([tokens])
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=steps, do_sample=False)[0, len(tokens) :].tolist()


def greedy(rows):
    return Sampling(0.0, 5, [0] * rows)


def test_a_padded_batch_gives_the_tokens_of_each_prompt_alone(model):
    rows = prompts(9)
    found = decode(model, rows, [EMPTY] * 9, greedy(9), STOP, 12)
    assert found == [alone(model, row, 12) for row in rows]


def test_shared_prefixes_of_different_lengths_change_nothing(model):
    rows, beginnings = prompts(8), [[5, 6, 7, 8, 9, 10, 11], [20, 21, 22]]
    computed = [compute_prefix(model, b) for b in beginnings]
    found = decode(model, rows, [computed[k % 2] for k in range(8)], greedy(8), STOP, 12)
    assert found == [alone(model, beginnings[k % 2] + row, 12) for k, row in enumerate(rows)]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_rows_that_ask_a_shared_beginning_together_get_the_same_tokens(kv_heads):
    torch.manual_seed(1)
    config = {**SHAPE, "num_key_value_heads": kv_heads, "initializer_range": 0.4}
    plain, ours = (LlamaForCausalLM(LlamaConfig(**config)).eval() for _ in range(2))
    ours.load_state_dict(plain.state_dict())
    use_grouped_attention(ours)
    assert ours.config._attn_implementation == NAME
    rows, beginnings = prompts(9), [[5, 6, 7, 8, 9, 10, 11], [20, 21, 22], []]
    computed = [compute_prefix(ours, b[3:], compute_prefix(ours, b[:3])) for b in beginnings]
    chosen = [0, 0, 0, 1, 1, 2, 2, 1, 0]  # neighbours with the same, none at all, and one that comes again
    expected = [alone(plain, beginnings[c] + row, 16) for c, row in zip(chosen, rows, strict=True)]
    stop = [2, expected[0][3], expected[4][5]]  # so that rows leave
    found = decode(ours, rows, [computed[c] for c in chosen], greedy(9), stop, 16)
    for got, full in zip(found, expected, strict=True):
        end = next((k + 1 for k, token in enumerate(full) if token in stop), len(full))
        assert got == full[:end]
    assert len({len(got) for got in found}) > 1
    assert [alone(ours, row, 6) for row in rows] == [alone(plain, row, 6) for row in rows]


def test_a_beginning_that_goes_on_leaves_the_shorter_one_as_it_was(model):
    short = compute_prefix(model, [5, 6, 7])
    long = compute_prefix(model, [8, 9], short)
    assert (short.length, long.length) == (3, 5)
    assert decode(model, [[4]], [short], greedy(1), STOP, 6) == [alone(model, [5, 6, 7, 4], 6)]
    assert decode(model, [[4]], [long], greedy(1), STOP, 6) == [alone(model, [5, 6, 7, 8, 9, 4], 6)]


@pytest.mark.parametrize(
    ("rows", "alike"),
    [([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 4, 6]], 3), ([[1, 2], [1, 2, 3]], 1), ([[7], [7]], 0), ([[1, 2], [3]], 0)],
)
def test_what_rows_begin_with_alike_leaves_each_of_them_a_token(rows, alike):
    assert common_beginning(rows) == alike


def test_rows_that_end_leave_the_batch_and_the_others_go_on_unchanged(model):
    rows = prompts(12, seed=3)
    plain = [alone(model, row, 20) for row in rows]
    stop = [2, plain[0][1], plain[1][3], plain[2][0], plain[3][2], plain[4][1]]
    found = decode(model, rows, [EMPTY] * 12, greedy(12), stop, 20)
    for got, full in zip(found, plain, strict=True):
        end = next((k + 1 for k, token in enumerate(full) if token in stop), len(full))
        assert got == full[:end]
    assert len({len(got) for got in found}) > 2


def test_a_rows_sample_depends_on_its_seed_and_not_on_its_neighbours(model):
    rows = prompts(6)
    sampling = Sampling(1.0, 20, list(range(6)))
    together = decode(model, rows, [EMPTY] * 6, sampling, STOP, 10)
    for k in range(6):
        assert decode(model, [rows[k]], [EMPTY], Sampling(1.0, 20, [k]), STOP, 10) == [together[k]]
    other = decode(model, rows, [EMPTY] * 6, Sampling(1.0, 20, list(range(6, 12))), STOP, 10)
    assert other != together


def test_sampled_first_tokens_follow_the_softmax_of_the_largest_logits(model):
    count, row = 3000, [7, 8, 9]
    found = decode(model, [row] * count, [EMPTY] * count, Sampling(0.8, 5, list(range(count))), STOP, 1)
    with torch.inference_mode():
        best = torch.topk(model(torch.tensor([row])).logits[0, -1], 5)
    expected = dict(zip(best.indices.tolist(), torch.softmax(best.values / 0.8, -1).tolist(), strict=True))
    drawn = [tokens[0] for tokens in found]
    assert set(drawn) <= set(expected)
    for token, share in expected.items():
        assert drawn.count(token) / count == pytest.approx(share, abs=0.03)


def test_a_model_with_sliding_windows_keeps_its_own_cache():
    torch.manual_seed(0)
    sliding = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=4, initializer_range=0.4)).eval()
    assert not can_share_prefixes(sliding)
    rows = prompts(5)
    found = decode(sliding, rows, [EMPTY] * 5, greedy(5), STOP, 8)
    assert found == [alone(sliding, row, 8) for row in rows]
