"""What is traced without data is what autograd holds with data, and a simulated world costs what its size says."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist

from dermfm import compute, simulate
from dermfm.config import InputError
from dermfm.model import lean
from dermfm.model.dermfm import DermFM, ModelConfig
from dermfm.model.fusion import FusionConfig
from dermfm.model.image import ImageConfig
from dermfm.model.text import TextConfig
from dermfm.objectives import ObjectiveConfig

BATCH, TOKENS = 4, 12
OBJECTIVES = ObjectiveConfig()


def model_config(encoder: Path, image: str, size: int, **text: Any) -> ModelConfig:
    return ModelConfig(
        image=ImageConfig(name=image, size=size),
        text=TextConfig(name=str(encoder), max_tokens=TOKENS, **text),
        fusion=FusionConfig(depth=2, width=32, heads=2),
        embed_dim=16,
    )


class HeldAtBackward(simulate.Unsharded):
    """Walks the graph of the loss, as autograd built it, and adds up what its nodes hold."""

    held = 0

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool = False) -> None:
        """Look, then go backward."""
        own = {t.untyped_storage().data_ptr() for t in [*self.module.parameters(), *self.module.buffers()]}
        sizes: dict[int, int] = {}
        seen, open_nodes = set(), [loss.grad_fn]
        while open_nodes:
            node = open_nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            open_nodes += [after for after, _ in node.next_functions]
            for tensor in saved_by(node):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in own:
                    sizes[storage.data_ptr()] = storage.nbytes()
        self.held = max(self.held, sum(sizes.values()))
        loss.backward()


def saved_by(node: Any) -> list[torch.Tensor]:
    """The tensors that a node of the graph saved: C++ nodes show them as `_saved_*`, Python's as `saved_tensors`."""
    values = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
    values += [getattr(node, "saved_tensors", ())]
    flat = [v for value in values for v in (value if isinstance(value, list | tuple) else [value])]
    return [v for v in flat if isinstance(v, torch.Tensor)]


CONFIGS: dict[str, tuple[str, int, dict[str, Any], str]] = {
    "vit and a learning encoder in fp32": ("test_vit", 64, {"train_blocks": -1}, "fp32"),
    "cnn and a frozen encoder in fp32": ("test_efficientnet", 64, {"train_blocks": 0}, "fp32"),
    "vit and one learning layer in bf16": ("test_vit", 96, {"train_blocks": 1}, "bf16"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_bytes_without_data_are_those_that_autograd_holds_with_data(name, text_tower, monkeypatch):
    image, size, text, precision = CONFIGS[name]
    config = model_config(text_tower, image, size, **text)
    # Whoever looks at what a recomputed perceptron holds has it computed: so none is recomputed here.
    with simulate.fake_group(1), lean.kept(True):
        traced = simulate.trace_step(simulate.build(config, precision), OBJECTIVES, BATCH, BATCH, TOKENS, size)
        monkeypatch.setattr(simulate, "Unsharded", HeldAtBackward)
        model = DermFM(config).train().to(simulate.DTYPES[precision])
        engine = HeldAtBackward(model)
        simulate.optimizer_step(engine, simulate.blank_batch(BATCH, TOKENS, size), BATCH, OBJECTIVES)
    assert traced.saved == pytest.approx(engine.held, rel=0.05)
    assert engine.held > 100_000
    assert traced.peak >= traced.saved


def test_perceptrons_that_compute_their_activation_again_hold_its_bytes_less(text_tower):
    config = model_config(text_tower, "test_vit", 64, train_blocks=0)
    saved = {}
    for keeps in (True, False):
        with simulate.fake_group(1), lean.kept(keeps):
            model = simulate.build(config, "fp32")
            saved[keeps] = simulate.trace_step(model, OBJECTIVES, BATCH, BATCH, TOKENS, 64).saved
    hidden = sum(m.fc1.out_features for m in model.modules() if isinstance(m, timm.layers.Mlp))
    positions = model.image.grid[0] * model.image.grid[1] + 1  # of the tower: a class token with them
    assert saved[True] - saved[False] >= 4 * BATCH * positions * hidden


def test_activations_grow_with_the_micro_batch_and_not_with_the_number_of_micro_batches(text_tower):
    config = model_config(text_tower, "test_vit", 64)
    with simulate.fake_group(1):
        model = simulate.build(config, "fp32")
        one, two, large = (
            simulate.trace_step(model, OBJECTIVES, count, micro, TOKENS, 64).saved
            for count, micro in ((4, 4), (8, 4), (8, 8))
        )
    assert two == pytest.approx(one, rel=0.05)
    assert large == pytest.approx(2 * one, rel=0.05)


def test_activation_checkpointing_is_seen_by_the_trace(text_tower):
    config = model_config(text_tower, "test_vit", 64, train_blocks=-1)
    prepare = functools.partial(compute.recompute_activations, parts=["all"])
    with simulate.fake_group(1):
        plain, less = (
            simulate.trace_step(simulate.build(config, "fp32", p), OBJECTIVES, 4, 4, TOKENS, 64)
            for p in (None, prepare)
        )
    assert less.saved < 0.5 * plain.saved
    assert less.peak < plain.peak


def test_one_rank_of_1024_runs_a_whole_step_and_gathers_the_features_of_all(text_tower):
    config = model_config(text_tower, "test_vit", 64)
    with simulate.fake_group(1024, rank=1000):
        found = simulate.trace_step(simulate.build(config, "bf16"), OBJECTIVES, 4, 2, TOKENS, 64)
    assert not dist.is_initialized()
    features = 2 * 1024 * 4 * 16 * 4  # both kinds, all rows, float32: the gradients of the gathered ones
    assert found.sent["allreduce"] == pytest.approx(features, rel=0.01)


def test_the_contrast_of_a_rank_grows_with_rows_times_columns():
    def cost(world: int, rows: int) -> float:
        with simulate.fake_group(world):
            return simulate.trace_contrast(OBJECTIVES, rows, 8)

    same_batch = [cost(world, 8192 // world) for world in (64, 128, 256)]  # B²/N
    assert same_batch[0] == pytest.approx(2 * same_batch[1], rel=0.1)
    assert same_batch[1] == pytest.approx(2 * same_batch[2], rel=0.1)
    assert same_batch[0] > 128 * 8192 * 4
    large, twice = cost(16, 512), cost(16, 1024)  # beyond what is traced
    assert 3.5 * large < twice < 4.05 * large


def test_without_contrast_there_is_no_memory_for_it():
    only = dataclasses.replace(OBJECTIVES, contrastive=0.0, matching=0.0)
    assert simulate.trace_contrast(only, 64, 8) == 0


def test_an_encoder_that_is_not_here_is_stood_in_for_where_it_is_known(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    name = next(iter(simulate.BERT_BASE))
    config = ModelConfig(text=TextConfig(name=name, max_tokens=TOKENS))
    with simulate.shape_only(config) as shape:
        assert Path(shape.text.name, "tokenizer.json").is_file() or shape.text.name == name
    with (
        pytest.raises(InputError, match=r"text.name: encoder 'nobody/knows' is not on this machine"),
        simulate.shape_only(dataclasses.replace(config, text=TextConfig(name="nobody/knows"))),
    ):
        pass
