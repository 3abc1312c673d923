"""The summary of a model: parts that add up, and work that a closed form gives."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dermfm.model.dermfm import DermFM, ModelConfig
from dermfm.model.fusion import FusionConfig
from dermfm.model.summary import REST
from dermfm.plan import TrainConfig
from dermfm.scale import parts_of


@pytest.fixture(scope="module")
def parts(model: DermFM) -> dict:
    return {part.name: part for part in model.summary()}


def test_the_parts_add_up_to_the_model(model, parts):
    total = parts.pop("total")
    assert list(parts) == ["image tower", "text tower", "fusion", REST]
    assert total.parameters == sum(p.numel() for p in model.parameters())
    assert total.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad) < total.parameters
    for field in ("parameters", "trainable", "flops", "activation_bytes"):
        assert getattr(total, field) == sum(getattr(p, field) for p in parts.values())
    parts["total"] = total


def test_the_work_of_the_heads_is_that_of_their_matrices(model, parts):
    """Two for each multiply-add: both projections and both class heads."""
    widths = model.image.width + model.text.width
    assert parts[REST].flops == 2 * widths * (model.config.embed_dim + model.config.num_classes)


def test_the_work_of_the_text_tower_is_that_of_a_transformer(model, parts):
    """Per layer 4 D² + 2 D M a token in its matrices and 2 T D in attention, two for each multiply-add."""
    width, hidden, longest, layers = model.text.width, 32, model.config.text.max_tokens, 2
    assert parts["text tower"].flops == 2 * layers * longest * (4 * width**2 + 2 * width * hidden + 2 * longest * width)


def test_the_work_of_the_image_tower_is_what_torch_counts(model, parts):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.image(torch.zeros(1, 3, model.image_size, model.image_size, dtype=torch.uint8))
    assert parts["image tower"].flops == counter.get_total_flops() > 0


def test_a_frozen_tower_keeps_no_activations_and_works_once(parts):
    assert parts["text tower"].trainable == 0
    assert parts["text tower"].activation_bytes == 0
    assert parts["text tower"].training_flops == parts["text tower"].flops
    assert parts["image tower"].training_flops == 3 * parts["image tower"].flops
    assert parts["image tower"].activation_bytes > 0


def test_a_model_without_fusion_has_no_such_part(model_config):
    config = ModelConfig(image=model_config.image, text=model_config.text, fusion=FusionConfig(kind="none"))
    assert [part.name for part in DermFM(config).eval().summary()] == ["image tower", "text tower", REST, "total"]


def test_a_model_without_data_has_the_same_parts(model, parts):
    """What `train --dry-run` prints, without weights."""
    found = {part.name: part for part in parts_of(TrainConfig(run="run", shards="shards", model=model.config))}
    assert list(found) == list(parts)
    for name, part in parts.items():
        assert (found[name].parameters, found[name].trainable) == (part.parameters, part.trainable)
        assert found[name].flops == part.flops
