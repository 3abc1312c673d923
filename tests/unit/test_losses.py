"""Losses against torch's own cross-entropies and loops written from the formulas; negatives that only ids decide."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dermfm import losses
from dermfm.losses import Pairs, describe_pairs

SIZE, WIDTH = 8, 5


def features(seed: int = 0, size: int = SIZE) -> tuple[Tensor, Tensor, Tensor]:
    """Image and note embeddings of length 1, and a log scale."""
    generator = torch.Generator().manual_seed(seed)
    image, text = (F.normalize(torch.randn(size, WIDTH, generator=generator), dim=1) for _ in range(2))
    return image, text, torch.tensor([math.log(1 / 0.2)])


def plain_pairs(size: int = SIZE) -> Pairs:
    """Every pair of its own group, text and class."""
    ids = torch.arange(size)
    return describe_pairs(ids, ids, torch.full((size,), -1), torch.ones(size), 0, size)


# groups 1 and 4 agree, notes 2 and 6 agree, sample 3 is not valid; classes 0 0 1 1 2 2 −1 −1
GROUP = torch.tensor([0, 1, 2, 3, 1, 5, 6, 7])
TEXT = torch.tensor([10, 11, 12, 13, 14, 15, 12, 17])
LABEL = torch.tensor([0, 0, 1, 1, 2, 2, -1, -1])
VALID = torch.tensor([1.0, 1, 1, 0, 1, 1, 1, 1])


def uneven_pairs(start: int = 0, size: int = SIZE) -> Pairs:
    return describe_pairs(GROUP, TEXT, LABEL, VALID, start, size)


def alike(i: int, j: int) -> bool:
    return bool(GROUP[i] == GROUP[j] or TEXT[i] == TEXT[j])


def same_class(i: int, j: int) -> bool:
    return bool(LABEL[i] == LABEL[j] and LABEL[i] >= 0)


def test_pairs_are_what_the_ids_say():
    pairs = uneven_pairs()
    for i in range(SIZE):
        for j in range(SIZE):
            assert pairs.own[i, j] == (i == j)
            assert pairs.blocked[i, j] == (i != j and (alike(i, j) or VALID[j] == 0))
            assert pairs.same_class[i, j] == (same_class(i, j) and VALID[j] > 0)
    assert torch.equal(pairs.valid, VALID)


def test_the_rows_of_one_rank_are_a_slice_of_everyone_s():
    whole, part = uneven_pairs(), uneven_pairs(start=4, size=2)
    assert torch.equal(part.own, whole.own[4:6])
    assert torch.equal(part.blocked, whole.blocked[4:6])
    assert torch.equal(part.same_class, whole.same_class[4:6])
    assert torch.equal(part.valid, whole.valid[4:6])


def test_clip_without_masks_is_the_mean_of_two_cross_entropies():
    image, text, scale = features()
    logits = scale.exp() * image @ text.T
    target = torch.arange(SIZE)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    found = losses.clip(image, text, image, text, scale, plain_pairs()) / SIZE
    torch.testing.assert_close(found, expected)


def test_clip_leaves_groups_equal_notes_and_invalid_samples_out_of_the_negatives():
    image, text, scale = features(1)
    expected = torch.zeros(())
    for i in (i for i in range(SIZE) if VALID[i]):
        kept = [i] + [j for j in range(SIZE) if j != i and not alike(i, j) and VALID[j]]
        for rows, columns in ((image, text), (text, image)):
            logits = scale.exp() * columns[kept] @ rows[i]
            expected += F.cross_entropy(logits[None], torch.tensor([0])) / 2
    torch.testing.assert_close(losses.clip(image, text, image, text, scale, uneven_pairs()), expected)


def test_supervised_averages_over_all_notes_of_the_class():
    image, text, scale = features(2)
    expected = torch.zeros(())
    for i in (i for i in range(SIZE) if VALID[i]):
        positive = [j for j in range(SIZE) if j == i or (same_class(i, j) and VALID[j])]
        kept = positive + [j for j in range(SIZE) if j not in positive and not alike(i, j) and VALID[j]]
        for rows, columns in ((image, text), (text, image)):
            log_p = F.log_softmax(scale.exp() * columns[kept] @ rows[i], 0)
            expected -= log_p[: len(positive)].mean() / 2
    torch.testing.assert_close(losses.supervised(image, text, image, text, scale, uneven_pairs()), expected)


@pytest.mark.parametrize("seed", range(3))
def test_clip_and_siglip_are_open_clip_s(seed):
    open_clip = pytest.importorskip("open_clip.loss")
    image, text, scale = (t.double().requires_grad_() for t in features(seed))
    bias = torch.tensor([-1.5], dtype=torch.float64).requires_grad_()
    pairs, leaves = plain_pairs(), (image, text, scale)
    own = losses.clip(image, text, image, text, scale, pairs) / SIZE
    other = open_clip.ClipLoss()(image, text, scale.exp())
    torch.testing.assert_close(own, other, rtol=1e-6, atol=0)
    for found, expected in zip(torch.autograd.grad(own, leaves), torch.autograd.grad(other, leaves), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    own = losses.CONTRASTIVE["siglip"](image, text, image, text, scale, pairs, bias) / SIZE
    other = open_clip.SigLipLoss()(image, text, scale.exp(), bias)
    torch.testing.assert_close(own, other.squeeze(), rtol=1e-6, atol=0)
    leaves = (*leaves, bias)
    for found, expected in zip(torch.autograd.grad(own, leaves), torch.autograd.grad(other, leaves), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_nt_xent_of_equal_embeddings_is_the_log_of_all_others():
    """All 2B cosines are 1: every row chooses evenly among 2B − 1 columns."""
    same = torch.ones(SIZE, WIDTH)
    found = losses.CONTRASTIVE["nt_xent"](same, 3 * same, same, 3 * same, torch.zeros(1), plain_pairs())
    assert found.item() == pytest.approx(SIZE * math.log(2 * SIZE - 1), rel=1e-6)


def test_supervised_infonce_without_another_class_is_zero():
    image, text, scale = features()
    ids, valid = torch.arange(SIZE), torch.ones(SIZE)
    pairs = describe_pairs(ids, ids, torch.zeros(SIZE, dtype=torch.int64), valid, 0, SIZE)
    found = losses.CONTRASTIVE["supervised_infonce"](image, text, image, text, scale, pairs)
    assert found.item() == pytest.approx(0, abs=1e-5)


def test_masking_of_the_same_group_and_text_can_be_switched_off():
    pairs = describe_pairs(GROUP, TEXT, LABEL, VALID, 0, SIZE, mask_same=False)
    assert torch.equal(pairs.blocked, (VALID[None] == 0).expand(SIZE, -1) & ~pairs.own)


def test_concept_loss_is_the_mean_over_words_of_binary_cross_entropy():
    logits = torch.randn(SIZE, 5, generator=torch.Generator().manual_seed(0))
    present = torch.rand(SIZE, 5, generator=torch.Generator().manual_seed(1)) < 0.4
    expected = sum(
        -(math.log(p) if there else math.log(1 - p)) / 5
        for i in range(SIZE)
        if VALID[i]
        for p, there in zip(torch.sigmoid(logits[i]).tolist(), present[i].tolist(), strict=True)
    )
    assert losses.concepts(logits, present, VALID).item() == pytest.approx(expected, rel=1e-5)


def test_alignment_is_cosine_distance_and_mean_absolute_difference():
    image, text = torch.tensor([[3.0, 4.0], [1, 0]]), torch.tensor([[4.0, 3.0], [0, 1]])
    weight = torch.tensor([1.0, 0.5])
    assert losses.align_cosine(image, text, weight).item() == pytest.approx((1 - 24 / 25) + 0.5, rel=1e-5)
    assert losses.align_l1(image, text, weight).item() == pytest.approx(1 + 0.5)


def test_supervised_is_clip_where_no_label_is_known():
    image, text, scale = features(3)
    found = [form(image, text, image, text, scale, plain_pairs()) for form in (losses.clip, losses.supervised)]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("form", losses.CONTRASTIVE)
def test_the_rows_of_several_ranks_sum_to_the_whole(form):
    image, text, scale = features(4)
    loss = losses.CONTRASTIVE[form]
    whole = loss(image, text, image, text, scale, uneven_pairs())
    parts = [loss(image[k : k + 2], text[k : k + 2], image, text, scale, uneven_pairs(k, 2)) for k in range(0, SIZE, 2)]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("form", losses.CONTRASTIVE)
def test_gradients_are_finite_where_a_row_has_no_negative_at_all(form):
    image, text, scale = (t.requires_grad_() for t in features(5))
    same = torch.zeros(SIZE, dtype=torch.int64)
    pairs = describe_pairs(same, torch.arange(SIZE), LABEL, VALID, 0, SIZE)
    losses.CONTRASTIVE[form](image, text, image, text, scale, pairs).backward()
    assert all(torch.isfinite(t.grad).all() for t in (image, text, scale))
    clip = losses.clip(image, text, image, text, scale, pairs)
    assert clip.item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("form", losses.CONTRASTIVE)
def test_invalid_samples_get_no_gradient(form):
    image, text, scale = (t.requires_grad_() for t in features(6))
    losses.CONTRASTIVE[form](image, text, image, text, scale, uneven_pairs()).backward()
    assert image.grad[3].abs().max() == text.grad[3].abs().max() == 0
    assert image.grad[2].abs().max() > 0


def test_the_scale_is_bounded_at_a_hundred():
    image, text, _ = features(7)
    pairs = plain_pairs()
    at_bound, above = (
        losses.clip(image, text, image, text, torch.tensor([s]), pairs) for s in (losses.MAX_LOGIT_SCALE, 9.0)
    )
    torch.testing.assert_close(above, at_bound)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_classification_sums_cross_entropy_over_known_labels_times_weight(smoothing):
    logits = torch.randn(SIZE, 3, generator=torch.Generator().manual_seed(0))
    known = LABEL >= 0
    each = F.cross_entropy(logits[known], LABEL[known], reduction="none", label_smoothing=smoothing)
    found = losses.classification(logits, LABEL, VALID, smoothing)
    torch.testing.assert_close(found, (each * VALID[known]).sum())


def test_classification_of_uniform_logits_is_the_log_of_the_number_of_classes():
    found = losses.classification(torch.zeros(2, 8), torch.tensor([3, 5]), torch.ones(2))
    assert found.item() == pytest.approx(2 * math.log(8))


def test_matching_is_binary_cross_entropy_over_valid_own_notes_and_found_negatives():
    generator = torch.Generator().manual_seed(0)
    own, other = (torch.randn(SIZE, generator=generator) for _ in range(2))
    found = torch.tensor([1.0, 1, 0, 0, 1, 1, 1, 0])
    expected = F.binary_cross_entropy_with_logits(own, torch.ones(SIZE), weight=VALID, reduction="sum")
    expected += F.binary_cross_entropy_with_logits(other, torch.zeros(SIZE), weight=found, reduction="sum")
    torch.testing.assert_close(losses.matching(own, other, VALID, found), expected)


def test_matching_stays_finite_for_huge_logits():
    huge = torch.tensor([1e4, -1e4])
    assert losses.matching(huge, huge, torch.ones(2), torch.ones(2)).item() == pytest.approx(2e4)


def mine(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    pairs: Pairs,
    indices: Tensor,
    everyone: Tensor | None = None,
    hard: float = 1.0,
):
    return losses.mine_negatives(image, text, scale, pairs, indices, indices if everyone is None else everyone, hard)


def test_negatives_are_only_ever_drawn_from_allowed_notes():
    image, text, scale = features(8)
    pairs = uneven_pairs()
    for first in range(0, 40 * SIZE, SIZE):
        chosen, found = mine(image, text, scale, pairs, first + torch.arange(SIZE))
        assert torch.equal(found, VALID)
        for i in (i for i in range(SIZE) if VALID[i]):
            j = int(chosen[i])
            assert j != i
            assert not alike(i, j)
            assert VALID[j]


def test_a_row_without_any_other_group_has_no_negative():
    image, text, scale = features(9)
    same = torch.zeros(SIZE, dtype=torch.int64)
    pairs = describe_pairs(same, torch.arange(SIZE), LABEL, VALID, 0, SIZE)
    chosen, found = mine(image, text, scale, pairs, torch.arange(SIZE))
    assert found.sum() == 0
    assert chosen.tolist() == [0] * SIZE


def test_the_negative_of_a_stream_index_does_not_depend_on_how_the_batch_lies_on_ranks():
    """Four ranks take every fourth sample: in rank order the columns are a permutation of the stream's order."""
    image, text, scale = features(10)
    indices = 1000 + torch.arange(SIZE)
    chosen, _ = mine(image, text, scale, uneven_pairs(), indices)
    by_index = dict(zip(indices.tolist(), indices[chosen].tolist(), strict=True))
    for world in (2, 4):
        order = torch.cat([torch.arange(rank, SIZE, world) for rank in range(world)])
        size = SIZE // world
        for rank in range(world):
            own = slice(rank * size, (rank + 1) * size)
            pairs = describe_pairs(GROUP[order], TEXT[order], LABEL[order], VALID[order], rank * size, size)
            found, _ = mine(image[order][own], text[order], scale, pairs, indices[order][own], indices[order])
            for index, column in zip(indices[order][own].tolist(), found.tolist(), strict=True):
                if VALID[index - 1000]:
                    assert int(indices[order][column]) == by_index[index]


@pytest.mark.parametrize(("hard", "share"), [(1.0, 1.0), (0.5, 0.5 + 0.5 / 7), (0.0, 1 / 7)])
def test_the_share_that_is_not_mined_is_drawn_evenly_from_all_allowed_notes(hard, share):
    """Similarities so steep that a mined negative is always the next column, and an even draw seldom is."""
    image = torch.eye(SIZE)
    text, nearest = image.roll(1, 0), torch.arange(SIZE).add(1) % SIZE
    draws, hits, counts = 600, 0, torch.zeros(SIZE, SIZE)
    for draw in range(draws):
        chosen, found = mine(
            image, text, torch.tensor([4.0]), plain_pairs(SIZE), draw * SIZE + torch.arange(SIZE), hard=hard
        )
        assert found.all()
        hits += int((chosen == nearest).sum())
        counts[torch.arange(SIZE), chosen] += 1
    assert hits / (draws * SIZE) == pytest.approx(share, abs=0.03)
    assert not counts.diagonal().any()
    assert (counts.sum(1) == draws).all()


def test_negatives_are_drawn_in_proportion_to_the_softmax_of_similarity():
    size, draws = 5, 4000
    image, text, scale = features(11, size)
    allowed_pairs = plain_pairs(size)
    logits = (scale.exp() * image[:1] @ text.T).squeeze(0)
    logits[0] = float("-inf")
    expected = logits.softmax(0)
    row = Pairs(
        allowed_pairs.own[:1],
        allowed_pairs.blocked[:1],
        allowed_pairs.same_class[:1],
        allowed_pairs.other_class[:1],
        torch.ones(1),
    )
    counts = torch.zeros(size)
    for draw in range(draws):
        everyone = draw * size + torch.arange(size)
        chosen, _ = mine(image[:1], text, scale, row, everyone[:1], everyone)
        counts[chosen] += 1
    deviation = (expected * (1 - expected) / draws).sqrt()
    assert ((counts / draws - expected).abs() <= 4 * deviation + 1e-9).all()
