"""Towers by name compute what their own libraries do; weights of other authors' names and sizes fit, or say why."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel, RobertaConfig, RobertaModel

from dermfm.config import InputError
from dermfm.model.bodies import (
    FAMILIES,
    TorchvisionBody,
    block_of_parameter,
    check_name,
    token_shape,
    torchvision_names,
)
from dermfm.model.image import ImageConfig, ImageTower
from dermfm.model.pooling import AttentionPool
from dermfm.model.text import TextConfig, TextTower
from dermfm.model.weights import fit_by_name, full_shapes, load_weights

VIT = "test_vit"
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


def pixels_of(count: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


# One of each way to read tokens, and torchvision's own pooling before its classifier.
@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("densenet121", lambda net, f: net.classifier(f.mean((2, 3)))),
        ("resnet18", lambda net, f: net.fc(f.mean((2, 3)))),
        ("mobilenet_v3_small", lambda net, f: net.classifier(f.mean((2, 3)))),
        ("regnet_y_400mf", lambda net, f: net.fc(f.mean((2, 3)))),
        ("swin_t", lambda net, f: net.head(f.mean((2, 3)))),
        ("vit_b_32", lambda net, f: net.heads(f[:, 0])),
    ],
)
@torch.no_grad()
def test_tokens_of_a_torchvision_tower_lead_to_torchvision_s_own_logits(name, head):
    torch.manual_seed(0)
    options = {"image_size": 64} if name.startswith("vit") else {}
    whole = torchvision.models.get_model(name, weights=None, **options).eval()
    with torch.device("cpu" if name.startswith("regnet") else "meta"):  # RegNet's constructor computes
        body = TorchvisionBody(name, 64, False).eval()
    body.net.load_state_dict(whole.state_dict(), strict=False, assign=True)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(head(whole, body.forward_features(x)), whole(x), rtol=1e-4, atol=1e-4)


def test_a_torchvision_tower_is_an_image_tower_and_freezes_from_the_stem():
    tower = ImageTower(ImageConfig(name="torchvision:densenet121", size=64, train_blocks=2)).eval()
    tokens, pooled = tower(pixels_of(1, 64))
    assert tower.grid == (2, 2)
    assert tokens.shape == (1, 4, 1024)
    torch.testing.assert_close(tokens.mean(1), pooled)
    learning = {n.split(".")[3] for n, p in tower.named_parameters() if p.requires_grad}
    assert learning == {"denseblock4", "norm5"}
    blocks = block_of_parameter(tower.body)
    assert list(blocks.values()) == sorted(blocks.values())


def test_torchvision_s_published_names_load_and_its_classifier_is_left_over(tmp_path):
    source = torchvision.models.resnet18(weights=None)
    torch.save(source.state_dict(), tmp_path / "resnet18.pth")
    tower = ImageTower(ImageConfig(name="torchvision:resnet18", size=32, weights=str(tmp_path / "resnet18.pth")))
    assert all(torch.equal(t, source.state_dict()[n]) for n, t in tower.body.net.state_dict().items())


@pytest.mark.parametrize("name", ["torchvision:densnet121", "torchvision:alexnet"])
def test_a_tower_that_torchvision_cannot_give_names_the_nearest(name):
    with pytest.raises(InputError, match=r"image\.name: torchvision has no tower '.*'; (did you mean|valid)"):
        check_name(name)
    assert all(any(known.startswith(f) for f in FAMILIES) for known in torchvision_names())


@pytest.mark.parametrize(
    "name", ["densenet121", "convnext_atto", "swin_tiny_patch4_window7_224", "beit_base_patch16_224"]
)
def test_timm_s_families_give_a_square_grid_of_tokens(name, monkeypatch):
    """Shapes alone, without memory: the towers themselves are too large for a unit test."""

    shape = token_shape(name, 224)
    side = shape[2] if len(shape) == 4 else round((shape[1] - 1) ** 0.5)
    assert side * side == (shape[2] * shape[3] if len(shape) == 4 else shape[1] - 1)


def cae_names(state: dict[str, Tensor], layer_scale: float) -> dict[str, Tensor]:
    """A timm ViT's weights under the names of CAE and PanDerm; the key's bias, which they do not have, is zero."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith("attn.qkv.bias"):
            q, k, v = tensor.chunk(3)
            assert k.abs().max() == 0
            out |= {f"encoder.{name.removesuffix('qkv.bias')}{part}_bias": t for part, t in (("q", q), ("v", v))}
        else:
            out[f"encoder.{name}"] = tensor
    for block in {n.rsplit(".attn.", 1)[0] for n in state if ".attn.qkv.weight" in n}:
        width = state[f"{block}.norm1.weight"].shape[0]
        out |= {f"encoder.{block}.gamma_{i}": torch.full((width,), layer_scale) for i in (1, 2)}
    return out | {"encoder.head.weight": torch.zeros(8, 64), "decoder.mask": torch.zeros(1)}


@torch.no_grad()
def test_weights_under_panderm_s_names_give_the_features_that_their_formula_gives(tmp_path):
    """Layer scale multiplies what each branch adds; our plain ViT takes it into the branch's last projection."""
    torch.manual_seed(0)
    plain = timm.create_model(VIT, num_classes=0, img_size=64).eval()
    for name, parameter in plain.named_parameters():
        parameter.normal_(std=0.3)
        if name.endswith("attn.qkv.bias"):
            parameter.copy_(torch.cat([p * (i != 1) for i, p in enumerate(parameter.chunk(3))]))
    torch.save({"model": cae_names(plain.state_dict(), 0.25)}, tmp_path / "panderm.pth")
    tower = ImageTower(ImageConfig(name=VIT, size=64, weights=str(tmp_path / "panderm.pth"))).eval()
    for block in plain.blocks:
        block.ls1, block.ls2 = (Scale(0.25) for _ in range(2))
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(tower.body.forward_features(x), plain.forward_features(x), rtol=1e-4, atol=1e-5)


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


@pytest.mark.parametrize("wrapper", ["visual.trunk.", "module.visual.", "backbone."])
def test_a_wrapper_s_names_are_unwrapped(wrapper):
    body = timm.create_model(VIT, num_classes=0)
    given = {wrapper + n: t for n, t in body.state_dict().items()} | {"text.w": torch.zeros(2)}
    fitted = fit_by_name(full_shapes(body), given)
    assert all(torch.equal(fitted[n], t) for n, t in body.state_dict().items())


@torch.no_grad()
def test_position_embeddings_are_interpolated_to_the_image_size(tmp_path):
    small = timm.create_model(VIT, num_classes=0, img_size=64)  # 4 × 4 patches and a class token
    rows = torch.arange(4.0)[:, None].expand(4, 4)  # rises from row to row and nowhere else
    small.pos_embed.copy_(torch.cat([torch.full((1, 1), 9.0), rows.reshape(16, 1)])[None].expand_as(small.pos_embed))
    torch.save(small.state_dict(), tmp_path / "w.pth")
    tower = ImageTower(ImageConfig(name=VIT, size=128, weights=str(tmp_path / "w.pth")))
    found = tower.body.pos_embed[0, :, 0]
    assert found[0] == 9
    grid = found[1:].reshape(8, 8)
    torch.testing.assert_close(grid, grid[:, :1].expand(8, 8), rtol=0, atol=1e-4)
    torch.testing.assert_close(grid[2:6, 0], (torch.arange(2, 6) + 0.5) / 2 - 0.5, rtol=0, atol=0.05)


def test_weights_that_do_not_fit_name_keys_and_shapes_of_both_sides(tmp_path):
    state = timm.create_model(VIT, num_classes=0).state_dict()
    state["blocks.0.norm1.weight"] = torch.zeros(3)
    state["blocks.0.normal2.weight"] = state.pop("blocks.0.norm2.weight")
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(InputError) as error:
        ImageTower(ImageConfig(name=VIT, size=160, weights=str(tmp_path / "w.pth")))
    message = str(error.value)
    assert "1 tensors missing (blocks.0.norm2.weight)" in message
    assert "1 tensors of other shape (blocks.0.norm1.weight (3,) ≠ (64,))" in message
    assert "1 tensors in the file only (blocks.0.normal2.weight)" in message
    assert "\n" not in message


def test_each_pooling_is_what_it_says():
    pixels = pixels_of(2, 64)
    pooled = {}
    for pool in ("auto", "cls", "mean", "attention"):
        torch.manual_seed(0)
        tower = ImageTower(ImageConfig(name=VIT, size=64, pool=pool)).eval()
        tokens, pooled[pool] = tower(pixels)
    assert torch.equal(pooled["auto"], pooled["cls"])
    torch.testing.assert_close(pooled["mean"], tokens.mean(1))
    assert tower.attention_pool is not None
    torch.testing.assert_close(pooled["attention"], tower.attention_pool(tokens))
    with pytest.raises(InputError, match=r"image\.pool: 'test_efficientnet' has no class token; one of auto"):
        ImageTower(ImageConfig(name="test_efficientnet", size=32, pool="cls"))


def test_attention_pooling_sees_valid_tokens_only_and_learns():
    torch.manual_seed(0)
    pool = AttentionPool(128, "auto")
    tokens, lengths = torch.randn(2, 6, 128), torch.tensor([6, 2])
    found = pool(tokens, lengths)
    torch.testing.assert_close(found[1:], pool(tokens[1:, :2]), rtol=1e-4, atol=1e-5)
    found.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for n, p in pool.named_parameters() if n != "key.bias")


def test_the_kernel_of_a_transformer_is_asked_for_and_all_agree():
    towers = {}
    for kernel in ("auto", "sdpa", "reference"):
        torch.manual_seed(0)
        towers[kernel] = ImageTower(ImageConfig(name=VIT, size=64, kernel=kernel)).eval()
    fused = {k: {m.fused_attn for m in t.modules() if hasattr(m, "fused_attn")} for k, t in towers.items()}
    assert fused == {"auto": {True}, "sdpa": {True}, "reference": {False}}
    outputs = [t(pixels_of(1, 64))[0] for t in towers.values()]
    torch.testing.assert_close(outputs[0], outputs[2], rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="'flash' needs a CUDA device"):
        ImageTower(ImageConfig(name=VIT, size=64, kernel="flash"))(pixels_of(1, 64))


ENCODERS = {
    "bert": BertModel(BertConfig(vocab_size=50, max_position_embeddings=40, **TINY)),
    "roberta": RobertaModel(RobertaConfig(vocab_size=50, max_position_embeddings=40, **TINY)),
    "distilbert": DistilBertModel(DistilBertConfig(vocab_size=50, dim=32, n_layers=2, n_heads=2, hidden_dim=48)),
}


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize(("kind", "first"), [("bert", 0), ("roberta", 2), ("distilbert", None)])
def test_packed_notes_give_the_states_and_gradients_of_padded_ones(tmp_path, kind, first, kernel):
    """DistilBERT's positions cannot be given from outside: it stays padded, and the answer is the same."""
    ENCODERS[kind].eval().save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(3)
    tokens, lengths = torch.randint(5, 50, (3, 8), generator=generator), torch.tensor([8, 2, 5])
    valid = torch.arange(8) < lengths[:, None]
    tokens = torch.where(valid, tokens, ENCODERS[kind].config.pad_token_id)
    results = []
    for packed in (True, False):
        tower = TextTower(TextConfig(name=str(tmp_path), train_blocks=-1, packed=packed, kernel=kernel)).train()
        assert tower.first_position == (first if packed else None)
        states, pooled = tower(tokens, lengths)
        (pooled.square().sum() + states[valid].sum()).backward()
        gradients = {n: p.grad for n, p in tower.named_parameters() if p.grad is not None}
        results.append((states[valid], pooled, gradients))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_packed_notes_do_the_work_of_their_own_tokens_only(tmp_path):
    from torch.utils.flop_counter import FlopCounterMode

    ENCODERS["bert"].save_pretrained(tmp_path)
    work = {}
    for packed in (True, False):
        tower = TextTower(TextConfig(name=str(tmp_path), packed=packed)).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            tower(torch.full((4, 16), 7), torch.tensor([16, 4, 8, 4]))
        work[packed] = counter.get_total_flops()
    assert work[True] < 0.6 * work[False]  # half of the tokens are padding


def test_load_weights_reads_a_torch_file_of_the_old_format(tmp_path):
    module = nn.Linear(2, 3)
    torch.save(module.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    other = nn.Linear(2, 3)
    load_weights(other, str(tmp_path / "old.pth"), "image.weights")
    assert torch.equal(other.weight, module.weight)
