"""Which objectives a model can serve, what is said where it cannot, and what concept words a note says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dermfm.concepts import CONCEPT_GROUPS, CONCEPTS, find_concepts
from dermfm.config import InputError, load
from dermfm.model.dermfm import DermFM, ModelConfig
from dermfm.model.fusion import FusionConfig
from dermfm.model.image import ImageConfig
from dermfm.model.text import TextConfig
from dermfm.objectives import OBJECTIVES, ObjectiveConfig
from dermfm.plan import TrainConfig


def said(text: str) -> set[str]:
    return {CONCEPTS[place] for place in np.flatnonzero(find_concepts(text))}


def test_there_are_63_concepts_in_seven_groups():
    assert len(CONCEPT_GROUPS) == 7
    assert len(CONCEPTS) == len(set(CONCEPTS)) == 63


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A red, well-defined NODULE.", {"red", "well-defined", "nodule"}),
        ("blue-gray globules and dots", {"blue", "grey", "globule", "dot"}),
        ("This is non-malignant, not a non-melanoma.", {"non-malignant"}),
        ("an asymmetric lesion", {"asymmetric"}),
        ("solar lentigo", {"solar lentigo", "lentigo"}),
        ("reddish, regularly pigmented, undistinct", set()),
        ("", set()),
    ],
)
def test_concepts_are_whole_words(text, words):
    assert said(text) == words


def test_every_concept_is_found_in_its_own_sentence():
    for word in CONCEPTS:
        assert word in said(f"it is {word}, they said")


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        (["objectives.caption=2"], "objectives.caption: 2 needs the decoder part, but model.decoder.depth is 0"),
        (["model.fusion.kind=none"], "objectives.classify_fused: 0.2 needs the fusion part, but model.fusion.kind"),
        (
            ["objectives.classify_subclass=1"],
            "objectives.classify_subclass: 1 needs the subclass part",
        ),
        (["objectives.concepts=1", "model.heads=[malignancy]"], "add concepts there"),
        (["objectives.classify_malignancy=1"], "add malignancy there"),
        (["contrastive_batch=1"], "contrastive_batch: 1 is too small for objectives.contrastive"),
        (["objectives.contrastive_form=siglip"], "give model.logit_bias its start, e.g. -10"),
        (
            ["objectives.contrastive_form=clip+infonc"],
            "objectives.contrastive_form: 'infonc' is not valid",
        ),
        (["objectives.fixed_temperature.nt_xent=1"], "objectives.fixed_temperature: 'nt_xent' is not valid; did|valid"),
        (["objectives.fixed_temperature.clip=0"], "objectives.fixed_temperature.clip: 0 is not valid"),
        (
            ["objectives.concept_groups=[color]"],
            "objectives.concept_groups: 'color' is not valid; did",
        ),
        (["model.heads=[subclas]"], "model.heads: 'subclas' is not valid; did you mean 'subclass'"),
        (["model.fusion.kind=croos"], "fusion.kind: 'croos' is not valid; did you mean 'cross'"),
        (["model.decoder.width=10"], "decoder.width: 10 is not divisible by decoder.heads = 4"),
    ],
)
def test_what_cannot_work_is_one_line_before_anything_starts(settings, part):
    with pytest.raises(InputError, match=part) as raised:
        load(TrainConfig, None, ["run=a", "shards=b", *settings])
    assert "\n" not in str(raised.value)


def test_a_batch_of_one_is_enough_where_nothing_is_set_against_others():
    off = [f"objectives.{name}=0" for name in OBJECTIVES if name != "classify_image"]
    config = load(TrainConfig, None, ["run=a", "shards=b", "contrastive_batch=1", *off])
    assert not config.objectives.uses_text
    assert not config.objectives.compares


def test_every_objective_of_the_table_has_a_weight_in_the_configuration():
    assert set(OBJECTIVES) <= set(vars(ObjectiveConfig()))
    assert ObjectiveConfig(contrastive_form="nt_xent + infonce").forms == ["nt_xent", "infonce"]


@pytest.fixture(scope="module", params=["cross", "early", "late"])
def fused_model(encoder, request) -> DermFM:
    torch.manual_seed(0)
    config = ModelConfig(
        image=ImageConfig(name="test_efficientnet", size=64),
        text=TextConfig(name=encoder, max_tokens=16),
        fusion=FusionConfig(kind=request.param, depth=2, width=16, heads=2),
        embed_dim=12,
    )
    return DermFM(config).eval().double()


def tokens_of(model: DermFM, *lengths: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(len(lengths), 4, model.image.width, generator=generator, dtype=torch.float64)
    text = torch.randn(len(lengths), max(lengths), model.text.width, generator=generator, dtype=torch.float64)
    return image, text, torch.tensor(lengths)


def test_no_kind_of_fusion_sees_padding(fused_model):
    image, text, lengths = tokens_of(fused_model, 5, 3)
    whole = fused_model("fuse", image_tokens=image, text_tokens=text, lengths=lengths)
    text[1, 3:] = 7.0
    changed = fused_model("fuse", image_tokens=image, text_tokens=text, lengths=lengths)
    alone = fused_model("fuse", image_tokens=image[1:], text_tokens=text[1:, :3], lengths=lengths[1:])
    for name in ("match", "logits"):
        torch.testing.assert_close(changed[name], whole[name])
        torch.testing.assert_close(alone[name][0], whole[name][1])


def test_every_kind_of_fusion_reads_both_image_and_note(fused_model):
    image, text, lengths = tokens_of(fused_model, 4, 4)
    match = fused_model.match(image, text, lengths)
    assert (fused_model.match(image.flip(0), text, lengths) - match).abs().min() > 1e-6
    assert (fused_model.match(image, text.flip(0), lengths) - match).abs().min() > 1e-6


def test_maps_are_weights_over_image_tokens_where_there_is_attention(fused_model):
    image, text, lengths = tokens_of(fused_model, 5, 3)
    kind = fused_model.config.fusion.kind
    if kind == "late":
        with pytest.raises(ValueError, match="'late' has no attention weights; use 'cross' or 'early'"):
            fused_model.fuse(image, text, lengths, return_weights=True)
        return
    fused, weights = fused_model.fuse(image, text, lengths, return_weights=True)
    assert weights.shape == (2, 2, 5, 4)
    shares = weights.sum(-1)
    assert (shares[0] <= 1 + 1e-5).all()
    assert kind == "early" or torch.allclose(shares[0], torch.ones_like(shares[0]), atol=1e-5)
    torch.testing.assert_close(fused, fused_model.fuse(image, text, lengths)[0], rtol=1e-5, atol=1e-5)


def test_heads_are_there_only_where_asked_for(encoder):
    shapes = {}
    for heads in ([], ["subclass", "malignancy", "concepts"]):
        config = ModelConfig(
            image=ImageConfig(name="test_efficientnet", size=32),
            text=TextConfig(name=encoder),
            embed_dim=12,
            heads=heads,
        )
        out = DermFM(config).eval()("image", pixels=torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
        shapes[len(heads)] = {name: tuple(value.shape) for name, value in out.items() if name.endswith("_logits")}
    assert shapes == {0: {}, 3: {"subclass_logits": (2, 15), "malignancy_logits": (2, 3), "concepts_logits": (2, 63)}}
