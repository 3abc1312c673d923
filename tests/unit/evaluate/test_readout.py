"""Read-outs are the model's own weights, hits are what a ruler gives, and attributes are read as they are written."""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from dermfm.evaluate import readout
from dermfm.evaluate.atlas import Case, attribute_f1, attributes_of, examples, matching_accuracy
from dermfm.evaluate.readout import Example, cell_shares, choose_read_out, score_read_outs
from dermfm.model.decoder import Decoder, DecoderConfig
from dermfm.model.fusion import EarlyFusion, Fusion, FusionConfig, masked_mean
from dermfm.model.maps import (
    ReadOut,
    default_read_out,
    fusion_maps,
    parts_with_maps,
    read_outs,
    token_maps,
    word_maps,
)

DEPTH, HEADS, TOKENS, CELLS, WIDTH = 2, 2, 5, 9, 8


class Towers(nn.Module):
    """A fusion between towers that give fixed tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = FusionConfig(depth=DEPTH, heads=HEADS, width=WIDTH)
        self.config = SimpleNamespace(fusion=config, decoder=DecoderConfig(depth=0))
        self.fusion, self.match_head = Fusion(config, WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        self.seen, self.read = torch.randn(2, CELLS, WIDTH), torch.randn(2, TOKENS, WIDTH)

    def encode_image(self, pixels):
        return None, self.seen

    def encode_text(self, tokens, lengths):
        return None, self.read


def test_plain_read_outs_are_the_weights_that_the_fusion_returns():
    model, lengths = Towers(), torch.tensor([5, 3])
    maps = fusion_maps(model, torch.zeros(2), torch.zeros(2), lengths)
    names = read_outs(model)
    assert maps.shape == (len(names), 2, TOKENS, CELLS)
    weights = model.fusion(model.seen, model.read, lengths, True)[1]
    heads = [maps[i] for i, r in enumerate(names) if r.head >= 0 and not r.gradient]
    means = [maps[i] for i, r in enumerate(names) if r.head < 0 <= r.block and not r.gradient]
    torch.testing.assert_close(torch.stack(heads).mean(0), weights.mean(1))
    torch.testing.assert_close(torch.stack(means).mean(0), weights.mean(1))
    torch.testing.assert_close(maps[names.index(ReadOut("fusion", -1, -1, False))], DEPTH * weights.mean(1))


def test_gradient_read_outs_are_weights_times_what_a_change_of_the_weight_does_to_the_match():
    """The last block's weight of one head, token and cell is moved a little, and the match logit read off."""
    model, lengths = Towers().double(), torch.tensor([5, 3])
    model.seen, model.read = model.seen.double(), model.read.double()
    maps = fusion_maps(model, torch.zeros(2), torch.zeros(2), lengths)
    row = read_outs(model).index(ReadOut("fusion", DEPTH - 1, 1, True))
    cross = model.fusion.blocks[DEPTH - 1].cross_attention
    plain, moved = cross.forward, {}

    def match(step: float) -> float:
        def forward(x, context, lengths_q, lengths_k, weights=False):
            q, (k, v) = cross._heads(cross.query(x)), cross.memory(context)
            scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
            p = scores.softmax(-1)
            moved["weight"] = p[0, 1, 2, 4].item()
            p = p.clone()
            p[0, 1, 2, 4] += step
            out = torch.einsum("bhqk,bkhd->bqhd", p, v)
            return cross.out(out.flatten(2)), p if weights else None

        cross.forward = forward
        try:
            fused = model.fusion(model.seen, model.read, lengths)[0]
        finally:
            cross.forward = plain
        return float(model.match_head(masked_mean(fused, lengths))[0].detach())

    slope = (match(1e-4) - match(-1e-4)) / 2e-4
    assert float(maps[row, 0, 2, 4]) == pytest.approx(max(slope * moved["weight"], 0), abs=1e-6)


class Writer(Towers):
    """The same with a decoder over the same image tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.config.decoder = DecoderConfig(depth=DEPTH, heads=HEADS, width=WIDTH)
        self.decoder = Decoder(self.config.decoder, WIDTH, 11, TOKENS, 2, 3)


def test_a_decoder_s_read_outs_follow_the_fusion_s_and_belong_to_the_token_that_is_predicted():
    model, lengths = Writer(), torch.tensor([5, 3])
    tokens = torch.tensor([[2, 5, 6, 7, 3], [2, 8, 3, 0, 0]])
    maps, names = token_maps(model, torch.zeros(2), tokens, lengths), read_outs(model)
    assert maps.shape == (len(names), 2, TOKENS, CELLS)
    assert [r.part for r in names] == ["fusion"] * (len(names) // 2) + ["decoder"] * (len(names) // 2)
    plain = maps[names.index(ReadOut("decoder", 0, 1, False))]
    assert not plain[:, 0].any()
    torch.testing.assert_close(plain[0, 1:].sum(-1), torch.ones(4))  # weights of each position that predicts
    torch.testing.assert_close(plain[1, 1:3].sum(-1), torch.ones(2))


def test_a_pass_with_maps_costs_what_captioning_does():
    model, lengths = Writer().double(), torch.tensor([5, 3])
    tokens = torch.tensor([[2, 5, 6, 7, 3], [2, 8, 3, 0, 0]])
    image = model.seen.double()
    loss, weights = model.decoder.with_maps(image, tokens, lengths)
    torch.testing.assert_close(loss, model.decoder(image, tokens, lengths, torch.ones(2))[0], rtol=1e-6, atol=0)
    assert [w.shape for w in weights] == [(2, HEADS, TOKENS - 1, CELLS)] * DEPTH


def test_a_decoder_s_gradient_read_out_rises_where_a_cell_makes_the_word_likelier():
    """The last block's weight of a cell is moved a little in one head: only its own position's word changes."""
    model, lengths = Writer(), torch.tensor([5, 5])
    tokens = torch.tensor([[2, 5, 6, 7, 3], [2, 8, 9, 4, 3]])
    image = model.seen.clone().requires_grad_()
    loss, weights = model.decoder.with_maps(image, tokens, lengths)
    (slope,) = torch.autograd.grad(-loss, weights[-1])
    maps = token_maps(model, torch.zeros(2), tokens, lengths)
    row = read_outs(model).index(ReadOut("decoder", DEPTH - 1, 1, True))
    torch.testing.assert_close(maps[row, :, 1:], (weights[-1] * slope).clamp(min=0)[:, 1].detach())
    assert (maps[row, :, 1:] > 0).any(-1).all()


class Words:
    """A tokenizer of notes of numbers: a start, one token a number, an end."""

    pad_token_id = 0

    def __call__(self, texts, return_offsets_mapping=False, max_length=TOKENS, **_):
        single = [texts] if isinstance(texts, str) else texts
        ids = [[2, *[int(word) for word in text.split()][: max_length - 2], 3] for text in single]
        if not return_offsets_mapping:
            return {"input_ids": ids}
        places = [(m.start(), m.end()) for m in re.finditer(r"\S+", single[0])][: max_length - 2]
        return {"input_ids": ids[0], "offset_mapping": [(0, 0), *places, (0, 0)]}


@pytest.mark.parametrize(
    ("kind", "depth", "expected"),
    [
        ("cross", DEPTH, ReadOut("decoder", -1, -1, False)),
        ("cross", 0, ReadOut("fusion", -1, -1, True)),
        ("early", 0, ReadOut("fusion", -1, -1, False)),
    ],
)
def test_a_word_s_map_is_a_grid_of_one_of_the_model_s_read_outs(kind, depth, expected):
    model = Writer()
    model.config.fusion = FusionConfig(kind=kind, depth=DEPTH, heads=HEADS, width=WIDTH)
    model.config.decoder = DecoderConfig(depth=depth, heads=HEADS, width=WIDTH)
    if kind == "early":
        model.fusion = EarlyFusion(model.config.fusion, WIDTH, WIDTH)
    model.config.text, model.tokenizer = SimpleNamespace(max_tokens=TOKENS), Words()
    model.image, model.seen, model.read = SimpleNamespace(grid=(3, 3)), model.seen[:1], model.read[:1]
    text = "5 6 7 8"  # of five tokens with both ends: the last number is cut off
    found = word_maps(model, np.zeros((3, 4, 4), np.uint8), text, [(2, 3), (0, 3), (6, 7)])
    assert default_read_out(model) == expected
    maps = token_maps(model, torch.zeros(1), torch.tensor([[2, 5, 6, 7, 3]]), torch.tensor([5]))
    row = maps[read_outs(model).index(expected), 0].numpy()
    of_two = row[1] if expected.part == "decoder" else row[1:3].mean(0)
    np.testing.assert_allclose(found[0], (row[2] / row[2].sum()).reshape(3, 3), rtol=1e-5)
    np.testing.assert_allclose(found[1], (of_two / of_two.sum()).reshape(3, 3), rtol=1e-5)
    assert found[2] is None


def test_a_model_without_attention_has_nothing_to_read():
    config = SimpleNamespace(fusion=SimpleNamespace(kind="late"), decoder=DecoderConfig(depth=0))
    with pytest.raises(ValueError, match="late"):
        token_maps(SimpleNamespace(config=config), torch.zeros(1), torch.zeros(1), torch.ones(1))
    assert parts_with_maps(SimpleNamespace(config=config)) == []


@pytest.mark.parametrize(("side", "cells"), [(12, 4), (10, 4), (7, 3), (3, 5)])
def test_shares_of_cells_are_those_of_a_picture_enlarged_until_cells_cut_no_pixel(side, cells):
    region = np.random.default_rng(side).random((side, side)) < 0.4
    whole = np.kron(region, np.ones((cells, cells)))  # side · cells pixels: `side` of them a cell
    expected = whole.reshape(cells, side, cells, side).mean((1, 3))
    np.testing.assert_allclose(cell_shares(region, (cells, cells)), expected, atol=1e-12)


FUSED, WRITTEN = ReadOut("fusion", 0, 0, False), ReadOut("decoder", 0, 0, False)


def left_and_right() -> Example:
    region = np.zeros((8, 8), bool)
    region[:, :4] = True
    words = {"red": (0, 3), "blue": (4, 8)}
    return Example(np.zeros((3, 8, 8), np.uint8), "red blue", words, {"red": region, "blue": ~region})


@pytest.mark.parametrize(("swap", "expected"), [(False, 1.0), (True, 0.0)])
def test_a_map_on_its_own_region_is_a_hit_and_on_the_other_s_is_none(swap, expected):
    left, right = np.array([1, 0, 1, 0]) + 0.1, np.array([0, 1, 0, 1]) + 0.1
    maps = np.stack([right, left] if swap else [left, right])[None]
    hits = readout._hits([FUSED], maps, [(0, 3), (4, 8)], left_and_right(), (2, 2))
    assert hits.shape == (1, 2)
    assert hits.mean() == expected


def test_a_written_word_is_judged_where_it_is_chosen_and_a_read_one_on_all_of_its_tokens():
    """'dark brown' of two tokens: the first looks at its half, the second, which follows from it, at the other."""
    region = np.zeros((8, 8), bool)
    region[:, :4] = True
    words = {"dark brown": (0, 10), "blue": (11, 15)}
    example = Example(np.zeros((3, 8, 8), np.uint8), "", words, {"dark brown": region, "blue": ~region})
    left, right, even = np.eye(2)[0].repeat(2), np.eye(2)[1].repeat(2), np.ones(4)
    maps = np.stack([left, 4 * right, even])[None, :, [0, 2, 1, 3]].repeat(2, 0)
    hits = readout._hits([FUSED, WRITTEN], maps, [(0, 4), (5, 10), (11, 15)], example, (2, 2))
    assert hits.tolist() == [[False, False], [True, True]]
    assert FUSED.tokens_of((5, 15), [(0, 4), (5, 10), (11, 15)]) == [1, 2]
    assert WRITTEN.tokens_of((20, 25), [(0, 4), (5, 10), (11, 15)]) == []


def test_a_map_that_does_not_depend_on_its_word_is_no_hit():
    maps = np.random.default_rng(0).random((1, 1, 4)).repeat(2, 1)
    assert not readout._hits([FUSED], maps, [(0, 3), (4, 8)], left_and_right(), (2, 2)).any()


def test_the_read_out_is_chosen_on_one_set_and_scored_on_another(monkeypatch):
    model = Towers()
    rows = len(read_outs(model))
    valid, test = np.zeros((rows, 4), bool), np.zeros((rows, 4), bool)
    valid[5], test[5, :3], test[6] = True, True, True
    monkeypatch.setattr(readout, "pair_hits", lambda model, which: [which])
    chosen, rate = choose_read_out(model, valid)
    assert (chosen, rate) == (read_outs(model)[5], 1.0)
    own, other = score_read_outs(model, test, [chosen, read_outs(model)[7]])
    assert own == {"pairs": 0.75, "images": 1.0, "num_images": 1}
    assert other == {"pairs": 0.0, "images": 0.0, "num_images": 1}


def test_attributes_are_read_as_they_are_written():
    found = attributes_of("Asymmetric, mixed border; light brown, blue-gray; dots, pigment network.")
    assert found == {
        "asymmetry": {"asymmetric"},
        "border": {"mixed"},
        "colours": {"light brown", "blue-gray"},
        "structures": {"dots", "pigment network"},
    }
    assert attributes_of("symmetric, sharp border; red; globules.")["asymmetry"] == {"symmetric"}
    assert not any(attributes_of("A reddish patient, structured.").values())


def test_f1_is_scikit_learn_s_over_the_indicators_of_all_attributes():
    from sklearn.metrics import f1_score
    from sklearn.preprocessing import MultiLabelBinarizer

    said = ["symmetric, sharp border; red; dots", "asymmetric, mixed border; red, black; globules", ""]
    true = ["asymmetric, sharp border; red; dots, globules", "asymmetric, mixed border; black; dots", "symmetric, red"]
    sides = [[attributes_of(text) for text in texts] for texts in (said, true)]
    found = attribute_f1(*sides)
    for kind in ("colours", "structures", "asymmetry", "border"):
        rows = [[sorted(one[kind]) for one in side] for side in sides]
        coder = MultiLabelBinarizer().fit(rows[0] + rows[1])
        expected = f1_score(coder.transform(rows[1]), coder.transform(rows[0]), average="micro", zero_division=0)
        assert found[kind] == pytest.approx(expected), kind
    rows = [[sorted(word for words in one.values() for word in words) for one in side] for side in sides]
    coder = MultiLabelBinarizer().fit(rows[0] + rows[1])
    assert found["all"] == pytest.approx(f1_score(coder.transform(rows[1]), coder.transform(rows[0]), average="micro"))


class Numbers:
    """A tokenizer of notes that are numbers."""

    pad_token_id = 0

    def __call__(self, texts, **_):
        return {"input_ids": [[int(text)] for text in texts]}


class Matcher(nn.Module):
    """Says of a note how red it is, and of an image how red it is; they match as far as both agree."""

    def __init__(self, knows: bool) -> None:
        super().__init__()
        self.knows, self.scale = knows, nn.Parameter(torch.ones(1))
        self.config = SimpleNamespace(text=SimpleNamespace(max_tokens=8))
        self.tokenizer = Numbers()

    def encode_text(self, tokens, lengths):
        red = tokens[:, :1].float()
        return torch.cat([red, torch.ones_like(red)], 1), red[:, None]

    def encode_image(self, pixels):
        red = pixels[:, 0, 0, :1].float()
        return torch.cat([2 * red, -(red**2)], 1), red[:, None]

    def match(self, image, text, lengths):
        return -(image - text).abs()[:, 0, 0] if self.knows else (text - image)[:, 0, 0]


@pytest.mark.parametrize(("knows", "expected"), [(True, 1.0), (False, 0.5)])
def test_matching_accuracy_is_one_for_a_head_that_knows_and_a_half_for_one_that_sees_the_note_alone(knows, expected):
    cases = [Case(np.full((3, 2, 2), red, np.uint8), str(red), {}, {}) for red in range(1, 101)]
    found = matching_accuracy(Matcher(knows), cases)
    assert found.keys() == {"random", "hard"}
    assert found["random"] == pytest.approx(expected, abs=0.15)


def test_only_lesions_with_two_coloured_regions_can_be_asked():
    region = np.ones((4, 4), bool)
    two = Case(np.zeros((3, 4, 4), np.uint8), "symmetric; red, black; dots.", {}, {"red": region, "black": region})
    one = dataclasses.replace(two, regions={"red": region})
    (example,) = examples([one, two])
    assert {word: example.text[a:b] for word, (a, b) in example.words.items()} == {"red": "red", "black": "black"}
