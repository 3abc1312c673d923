"""`init_from`: which weights of another run a model takes, and what becomes of the rest."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from dermfm import initial
from dermfm.config import InputError
from dermfm.plan import TrainConfig


def model(num_classes: int = 8, image_size: int = 64) -> nn.Module:
    """Towers and heads named as the model's are."""
    found = nn.Module()
    found.image = nn.Module()
    found.image.body = timm.create_model("test_vit", num_classes=0, img_size=image_size)
    found.text = nn.Linear(4, 4)
    found.image_head = nn.Linear(4, num_classes)
    return found


def test_everything_of_the_same_model_is_taken():
    source = model().state_dict()
    found = initial.fit(model(), source)
    assert (list(found.fresh), found.unused) == ([], [])
    assert all(torch.equal(found.taken[name], tensor) for name, tensor in source.items())


def test_a_head_for_other_labels_starts_anew_and_is_named_with_both_shapes():
    found = initial.fit(model(num_classes=3), model(num_classes=8).state_dict())
    assert found.fresh == {"image_head.weight": "[8, 4], here [3, 4]", "image_head.bias": "[8], here [3]"}


def test_parts_that_the_source_lacks_start_anew_and_parts_that_the_model_lacks_are_told():
    source = model().state_dict()
    del source["text.weight"]
    source["decoder.weight"] = torch.zeros(2)
    found = initial.fit(model(), source)
    assert found.fresh == {"text.weight": "is not there"}
    assert found.unused == ["decoder.weight"]


def test_positions_of_a_vit_are_resampled_to_another_image_size():
    small, large = model(image_size=64), model(image_size=96)
    found = initial.fit(large, small.state_dict())
    assert not found.fresh
    positions = found.taken["image.body.pos_embed"]
    assert positions.shape == large.image.body.pos_embed.shape
    assert torch.equal(positions[:, :1], small.image.body.pos_embed[:, :1])  # the class token has no place


def test_an_exported_folder_is_read_by_its_safetensors(tmp_path):
    source = model().state_dict()
    save_file(source, tmp_path / "model.safetensors")
    initial.check(str(tmp_path))
    assert all(torch.equal(tensor, source[name]) for name, tensor in initial.read(str(tmp_path)).items())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("runs/firsd", "init_from: there is no folder .*/runs/firsd; did you mean 'first'?"),
        (
            "runs/first",
            "init_from: .*/runs/first holds neither model.safetensors nor a complete checkpoint under ckpt/",
        ),
    ],
)
def test_a_source_that_is_none_is_refused_before_anything_is_read(tmp_path, name, message):
    (tmp_path / "runs" / "first").mkdir(parents=True)
    with pytest.raises(InputError, match=message):
        initial.check(str(tmp_path / name))


def test_a_broken_export_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(InputError, match=r"init_from: .*model.safetensors is not a readable weights file"):
        initial.read(str(tmp_path))


def test_initial_weights_and_resumption_do_not_go_together():
    with pytest.raises(ValueError, match="init_from: starts a new run, resume= continues an old one"):
        TrainConfig(run="r", shards="s", init_from="a", resume="b")
