"""Local loss over features gathered with gradient: loss and gradients of the full batch, on any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

SCRIPT = Path(__file__).with_name("gather_rank.py")
SIZE, WIDTH = 8, 6

pytestmark = pytest.mark.timeout(120)


def make_inputs() -> dict[str, Tensor]:
    """A batch in which group 1 and note 3 come twice, sample 5 is bad and sample 2 has no label; in float64."""
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(SIZE, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    return {
        "image": image, "text": text,
        "scale": torch.tensor([1.3], dtype=torch.float64), "bias": torch.tensor([-0.7], dtype=torch.float64),
        "group": torch.tensor([0, 1, 2, 3, 4, 5, 1, 7]), "words": torch.tensor([0, 1, 2, 3, 3, 5, 6, 7]),
        "label": torch.tensor([0, 1, -1, 0, 1, 0, 2, 2]), "valid": torch.tensor([1.0, 1, 1, 1, 1, 0, 1, 1]),
    }  # fmt: skip


class Known:
    """What is known of the samples, read one pair at a time."""

    def __init__(self, inputs: dict[str, Tensor]) -> None:
        self.group, self.words, self.label, self.valid = (
            inputs[k].tolist() for k in ("group", "words", "label", "valid")
        )
        self.good = [i for i in range(SIZE) if self.valid[i]]

    def same(self, i: int, j: int) -> bool:
        return self.label[i] == self.label[j] >= 0

    def differ(self, i: int, j: int) -> bool:
        return self.label[i] >= 0 and self.label[j] >= 0 and self.label[i] != self.label[j]

    def alike(self, i: int, j: int) -> bool:
        return self.group[i] == self.group[j] or self.words[i] == self.words[j]


def clip_row(row: Tensor, i: int, known: Known, bias: Tensor) -> Tensor:
    kept = [i] + [j for j in known.good if j != i and not known.alike(i, j)]
    return -row[kept].log_softmax(0)[0]


def supervised_row(row: Tensor, i: int, known: Known, bias: Tensor) -> Tensor:
    positive = [j for j in known.good if j == i or known.same(i, j)]
    kept = positive + [j for j in known.good if j not in positive and not known.alike(i, j)]
    return -row[kept].log_softmax(0)[: len(positive)].mean()


def siglip_row(row: Tensor, i: int, known: Known, bias: Tensor) -> Tensor:
    total = -torch.sigmoid(row[i] + bias).log()
    for j in (j for j in known.good if j != i and not known.alike(i, j)):
        total = total - torch.sigmoid(-(row[j] + bias)).log()
    return total.squeeze()


def nt_xent_row(row: Tensor, m: int, known: Known) -> Tensor:
    """`row` [2B]: cosines over temperature of z_m with all columns, images first."""
    i, partner = m % SIZE, (m + SIZE) % (2 * SIZE)
    kept = [n for n in range(2 * SIZE) if n % SIZE in known.good and n not in (m, partner)]
    kept = [n for n in kept if not known.alike(i, n % SIZE)]
    return -row[[partner, *kept]].log_softmax(0)[0]


def supervised_infonce_row(row: Tensor, m: int, known: Known) -> Tensor:
    i, partner = m % SIZE, (m + SIZE) % (2 * SIZE)
    others = [n for n in range(2 * SIZE) if n % SIZE in known.good and n != m]
    positive = [n for n in others if n == partner or known.same(i, n % SIZE)]
    kept = positive + [n for n in others if n not in positive and not known.alike(i, n % SIZE)]
    return -(row[positive].exp().sum() / row[kept].exp().sum()).log()


def supervised_nt_xent_row(row: Tensor, m: int, known: Known) -> Tensor:
    i, partner = m % SIZE, (m + SIZE) % (2 * SIZE)
    negative = [n for n in range(2 * SIZE) if n % SIZE in known.good and known.differ(i, n % SIZE)]
    negative = [n for n in negative if not known.alike(i, n % SIZE)]
    total = -torch.sigmoid(row[partner]).log() / 2
    return total - (torch.sigmoid(-row[negative]).log().mean() if negative else 0)


PAIR_ROWS = {"clip": clip_row, "supervised": supervised_row, "siglip": siglip_row}
JOINT_ROWS = {
    "nt_xent": nt_xent_row,
    "infonce": nt_xent_row,
    "supervised_infonce": supervised_infonce_row,
    "supervised_nt_xent": supervised_nt_xent_row,
}


def in_one_process(inputs: dict[str, Tensor], form: str) -> dict[str, Tensor]:
    """The loss from its formula, row by row on the full batch, and its gradients by autograd."""
    leaves = {k: inputs[k].clone().requires_grad_() for k in ("image", "text", "scale", "bias")}
    image, text = (F.normalize(leaves[k], dim=1) for k in ("image", "text"))
    known, scale = Known(inputs), leaves["scale"].exp()
    if form == "siglip":
        rows = [siglip_row(scale * text @ image[i], i, known, leaves["bias"]) for i in known.good]
    elif form in PAIR_ROWS:
        both = [(scale * text @ image[i], scale * image @ text[i]) for i in range(SIZE)]
        rows = [PAIR_ROWS[form](row, i, known, leaves["bias"]) / 2 for i in known.good for row in both[i]]
    else:
        z = torch.cat([image, text])
        valid = [m for m in range(2 * SIZE) if m % SIZE in known.good]
        rows = [JOINT_ROWS[form](scale * z @ z[m], m, known) / 2 for m in valid]
    loss = torch.stack(rows).sum() / len(known.good)
    loss.backward()
    gradients = {k: torch.zeros_like(x) if x.grad is None else x.grad for k, x in leaves.items()}
    return {"loss": loss.detach(), **gradients}


@pytest.mark.parametrize("world", [1, 2, 4])
def test_loss_and_gradients_are_those_of_the_full_batch(launch, tmp_path, world):
    inputs = make_inputs()
    torch.save(inputs, tmp_path / "inputs.pt")
    done = launch(SCRIPT, world, [json.dumps({"out": str(tmp_path)})])
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(world)]
    for rank in ranks:
        torch.testing.assert_close(rank.pop("gathered"), F.normalize(inputs["image"], dim=1))
    for case in ranks[0]:
        expected = in_one_process(inputs, case.partition("-")[0])
        for name in ("loss", "scale", "bias"):
            for found in (r[case] for r in ranks):
                torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-10, msg=f"{case} {name}")
        for name in ("image", "text"):
            together = torch.cat([r[case][name] for r in ranks])
            torch.testing.assert_close(together, expected[name], rtol=1e-6, atol=1e-10, msg=f"{case} {name}")
        assert expected["image"].norm() > 1e-3
