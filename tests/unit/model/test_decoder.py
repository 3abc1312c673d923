"""The note decoder: its loss is that of plain logits, its cache changes nothing, and what it draws is what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from dermfm.config import InputError
from dermfm.losses import token_cross_entropy
from dermfm.model.decoder import Decoder, DecoderConfig, choose_tokens
from dermfm.model.dermfm import DermFM, ModelConfig, text_ends, tidy_spaces
from dermfm.model.image import ImageConfig
from dermfm.model.text import TextConfig

VOCABULARY, MAX_TOKENS, START, END = 40, 24, 2, 3
IMAGE_WIDTH = 12


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    torch.manual_seed(0)
    config = DecoderConfig(depth=2, width=16, heads=2)
    made = Decoder(config, IMAGE_WIDTH, VOCABULARY, MAX_TOKENS, START, END).double()
    made.places.data *= 40  # far from its start, so that it does not write one word for ever
    return made


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(3, 5, IMAGE_WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def notes() -> tuple[torch.Tensor, torch.Tensor]:
    """Three notes of 9, 4 and 2 tokens with both ends, padded with zeros."""
    generator = torch.Generator().manual_seed(2)
    lengths = torch.tensor([9, 4, 2])
    tokens = torch.randint(4, VOCABULARY, (3, 11), generator=generator)
    tokens[:, 0] = START
    tokens[torch.arange(3), lengths - 1] = END
    return tokens.masked_fill(torch.arange(11)[None] >= lengths[:, None], 0), lengths


@pytest.mark.parametrize("chunk", [1, 7 * VOCABULARY, 2**23])
def test_the_fused_loss_and_its_gradients_are_those_of_plain_cross_entropy(chunk):
    generator = torch.Generator().manual_seed(0)
    hidden, words = (torch.randn(n, 9, generator=generator, dtype=torch.float64).requires_grad_() for n in (17, 40))
    targets = torch.randint(VOCABULARY, (17,), generator=generator)
    found = token_cross_entropy(hidden, words, targets, chunk)
    gradients = torch.autograd.grad(found * 0.7, (hidden, words))
    expected = F.cross_entropy(hidden @ words.T, targets, reduction="sum")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for own, other in zip(gradients, torch.autograd.grad(expected * 0.7, (hidden, words)), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-12)


def test_the_fused_loss_of_half_precision_is_summed_in_float32():
    generator = torch.Generator().manual_seed(0)
    hidden, words = (torch.randn(n, 16, generator=generator).bfloat16().requires_grad_() for n in (64, 40))
    targets = torch.randint(VOCABULARY, (64,), generator=generator)
    found = token_cross_entropy(hidden, words, targets)
    found.backward()
    expected = F.cross_entropy(hidden.detach().float() @ words.detach().float().T, targets, reduction="sum")
    assert found.dtype == torch.float32
    assert hidden.grad.dtype == words.grad.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)


def test_a_second_backward_of_the_fused_loss_is_an_error_and_not_a_wrong_gradient():
    hidden, words = torch.randn(5, 4).requires_grad_(), torch.randn(VOCABULARY, 4)
    loss = token_cross_entropy(hidden, words, torch.arange(5))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_a_batch_without_any_note_costs_nothing():
    words = torch.randn(VOCABULARY, 4).requires_grad_()
    loss = token_cross_entropy(torch.zeros(0, 4).requires_grad_(), words, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert words.grad.abs().max() == 0


PEAK = """
import resource, torch
from dermfm.losses import token_cross_entropy
torch.set_num_threads(1)
words = torch.zeros(20000, 8, requires_grad=True)
def run(n):
    hidden = torch.zeros(n, 8, requires_grad=True)
    token_cross_entropy(hidden, words, torch.zeros(n, dtype=torch.int64)).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(run(200), run(2400))
"""


def test_peak_memory_does_not_grow_with_tokens_times_vocabulary(root: Path):
    """2,400 × 20,000 logits would be 192 MB; those of 200 tokens are 16 MB."""
    done = subprocess.run([sys.executable, "-c", PEAK], cwd=root, capture_output=True, text=True, check=True)
    few, many = map(float, done.stdout.split())
    assert many - few < 60


def test_the_captioning_loss_is_the_sum_over_the_tokens_of_valid_notes(decoder, images):
    tokens, lengths = notes()
    weight = torch.tensor([1.0, 0.0, 1.0])
    found, count = decoder(images, tokens, lengths, weight)
    expected = torch.zeros((), dtype=torch.float64)
    for i in (0, 2):  # alone and unpadded, one note at a time
        note = tokens[i : i + 1, : lengths[i]]
        hidden = decoder.states(decoder.image_in(images[i : i + 1]), note[:, :-1])[0]
        expected += F.cross_entropy(hidden @ decoder.words.T, note[0, 1:], reduction="sum")
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    assert count.item() == (9 - 1) + (2 - 1)


def test_packed_notes_give_every_parameter_and_the_image_the_gradient_of_padded_ones(decoder, images):
    tokens, lengths = notes()
    weight = torch.tensor([1.0, 1.0, 0.0])
    image = images.clone().requires_grad_()
    inputs = [image, *decoder.parameters()]
    packed = torch.autograd.grad(decoder(image, tokens, lengths, weight)[0], inputs)
    hidden = decoder.states(decoder.image_in(image), tokens[:, :-1], lengths - 1)
    kept = (torch.arange(10)[None] < lengths[:, None] - 1) & (weight[:, None] > 0)
    plain = F.cross_entropy((hidden @ decoder.words.T)[kept], tokens[:, 1:][kept], reduction="sum")
    for own, other in zip(packed, torch.autograd.grad(plain, inputs), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-10)


def test_a_batch_without_a_counted_note_gives_every_parameter_a_gradient_of_zero(decoder, images):
    decoder.zero_grad(set_to_none=True)
    tokens = torch.randint(3, 20, (3, 6), generator=torch.Generator().manual_seed(0))
    total, number = decoder(images[:3], tokens, torch.tensor([6, 4, 0]), torch.zeros(3))
    total.backward()
    assert int(number) == 0
    assert all(p.grad is not None and not p.grad.any() for p in decoder.parameters())
    decoder.zero_grad(set_to_none=True)


def test_padding_of_notes_costs_the_decoder_nothing(decoder, images):
    """A wider batch of the same notes has as many multiplications; padded ones would have more."""
    tokens, lengths = notes()

    def work(tokens: torch.Tensor) -> int:
        with FlopCounterMode(display=False) as counter:
            decoder(images, tokens, lengths, torch.ones(3))
        return counter.get_total_flops()

    assert work(F.pad(tokens, (0, 10))) == work(tokens)


def test_words_of_float32_get_their_gradient_whole_from_states_of_half_precision():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 16, generator=generator).bfloat16().requires_grad_()
    words = torch.randn(40, 16, generator=generator).requires_grad_()
    targets = torch.randint(VOCABULARY, (64,), generator=generator)
    token_cross_entropy(hidden, words, targets).backward()
    plain = words.detach().clone().requires_grad_()
    F.cross_entropy(hidden.detach().float() @ plain.T, targets, reduction="sum").backward()
    assert words.grad.dtype == torch.float32
    torch.testing.assert_close(words.grad, plain.grad, rtol=2e-2, atol=2e-2 * float(plain.grad.abs().max()))


def test_no_position_sees_what_comes_after_it_and_all_see_the_image(decoder, images):
    tokens, _ = notes()
    image = decoder.image_in(images)
    whole = decoder.states(image, tokens)
    changed = tokens.clone()
    changed[:, 5] = 17
    after = decoder.states(image, changed)
    torch.testing.assert_close(after[:, :5], whole[:, :5])
    assert (after[:, 5:] - whole[:, 5:]).abs().amax(2).min() > 1e-6
    assert (decoder.states(image.flip(0), tokens)[0] - whole[0]).abs().amax(1).min() > 1e-6


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9, "temperature": 1.3, "seed": 4}])
def test_decoding_with_a_cache_writes_the_same_as_without(decoder, images, settings):
    cached = decoder.generate(images, stop=False, **settings)
    assert torch.equal(cached, decoder.generate(images, stop=False, cache=False, **settings))
    assert cached.shape == (3, MAX_TOKENS - 1)
    assert len(set(cached.flatten().tolist())) > (3 if settings else 1)


def test_the_states_of_the_cache_are_those_of_the_whole_prefix(decoder, images):
    tokens, _ = notes()
    image = decoder.image_in(images)
    memories = decoder.start_memory(image, 11)
    pieces = [decoder.continue_states(tokens[:, k : k + 1], memories) for k in range(11)]
    torch.testing.assert_close(torch.cat(pieces, 1), decoder.states(image, tokens), rtol=1e-9, atol=1e-12)


def test_a_draw_depends_on_the_seed_and_its_row_only(decoder, images):
    settings = {"top_p": 0.95, "temperature": 2.0, "max_tokens": 8, "stop": False}
    first = decoder.generate(images, seed=1, **settings)
    assert torch.equal(first, decoder.generate(images, seed=1, **settings))
    assert torch.equal(first[:2], decoder.generate(images[:2], seed=1, **settings))
    assert not torch.equal(first, decoder.generate(images, seed=2, **settings))


def test_draws_follow_the_nucleus():
    """Probabilities .5 .25 .15 .1: a nucleus of 0.7 holds the first two, drawn two to one."""
    logits = torch.tensor([[0.15, 0.5, 0.1, 0.25]]).log().expand(3000, -1)
    draws = [np.random.default_rng(k) for k in range(3000)]
    shares = choose_tokens(logits, 0.7, 1.0, draws).bincount(minlength=4) / 3000
    torch.testing.assert_close(shares, torch.tensor([0.0, 2 / 3, 0.0, 1 / 3]), rtol=0, atol=0.04)
    assert choose_tokens(logits[:1], 1e-6, 1.0, draws[:1]).tolist() == [1]
    hot = choose_tokens(logits, 1.0, 100.0, draws).bincount(minlength=4) / 3000
    torch.testing.assert_close(hot, torch.full((4,), 0.25), rtol=0, atol=0.04)


def test_nothing_is_written_after_the_end(decoder, images):
    forced = Decoder(
        DecoderConfig(depth=1, width=16, heads=2), IMAGE_WIDTH, VOCABULARY, MAX_TOKENS, START, END
    ).double()
    with torch.no_grad():
        forced.words.zero_()
        forced.words[END] = 1.0
        forced.norm.weight.zero_()
        forced.norm.bias.fill_(1.0)
    written = forced.generate(images)
    assert written.tolist() == [[END]] * 3
    assert forced.cut(written) == [[], [], []]
    assert decoder.cut(torch.tensor([[7, 8, END, END], [9, 9, 9, 9]])) == [[7, 8], [9, 9, 9, 9]]


@pytest.mark.parametrize(
    ("settings", "part"),
    [({"max_tokens": 24}, "max_tokens: 24"), ({"top_p": 1.5}, "top_p: 1.5"), ({"temperature": 0}, "temperature: 0")],
)
def test_settings_out_of_range_are_named(decoder, images, settings, part):
    with pytest.raises(ValueError, match=part):
        decoder.generate(images, **settings)


def build(encoder: str, **decoder: int) -> DermFM:
    torch.manual_seed(0)
    config = ModelConfig(
        image=ImageConfig(name="test_efficientnet", size=32),
        text=TextConfig(name=encoder, max_tokens=16),
        decoder=DecoderConfig(width=32, heads=2, **decoder),
        embed_dim=12,
    )
    return DermFM(config)


def test_a_trained_decoder_reports_what_the_images_show(encoder):
    """Two kinds of images with two notes: after some steps it writes the right note for each."""
    model = build(encoder, depth=1).train()  # batch norm by its stored statistics, as when it writes
    texts = ["red macule arm .", "a blue nodule , sharp border ."]
    pixels = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    encoded = [model.tokenizer(t)["input_ids"] for t in texts]
    tokens = torch.tensor([ids + [0] * (12 - len(ids)) for ids in encoded])
    lengths = torch.tensor([len(ids) for ids in encoded])
    optimizer = torch.optim.Adam([*model.decoder.parameters(), *model.image.parameters()], 1e-2)
    for _ in range(60):
        out = model("caption", image_tokens=model("image", pixels=pixels)["tokens"], tokens=tokens,
                    lengths=lengths, weight=torch.ones(2))  # fmt: skip
        (out["loss"] / out["num_tokens"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    reports = model.eval().write_report(pixels)
    known = [model.tokenizer.decode(ids[1:-1], skip_special_tokens=True) for ids in encoded]
    assert reports == [tidy_spaces(text) for text in known]
    assert reports[0] == "red macule arm."
    assert model.write_report(pixels.flip(0), max_tokens=3) == ["a blue nodule", "red macule arm"]


def test_a_model_without_a_decoder_says_so(encoder):
    with pytest.raises(InputError, match=r"model\.decoder\.depth: 0, this model writes no reports"):
        build(encoder, depth=0).write_report(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_a_tokenizer_without_ends_cannot_have_a_decoder():
    with pytest.raises(InputError, match="the tokenizer of 'gpt' marks no start and end"):
        text_ends(lambda text: {"input_ids": []}, "gpt")


def test_decoded_pieces_become_readable():
    assert (
        tidy_spaces("a blue - gray , pre - cancerous lesion ( nevus ) .")
        == "a blue-gray, pre-cancerous lesion (nevus)."
    )
