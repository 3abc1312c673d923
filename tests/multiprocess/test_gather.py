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
    """A batch in which group 1 and note 3 come twice, sample 5 is bad and sample 2 has no label."""
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(SIZE, WIDTH, generator=generator) for _ in range(2))
    return {
        "image": image, "text": text, "scale": torch.tensor([1.3]),
        "group": torch.tensor([0, 1, 2, 3, 4, 5, 1, 7]), "words": torch.tensor([0, 1, 2, 3, 3, 5, 6, 7]),
        "label": torch.tensor([0, 1, -1, 0, 1, 0, 2, 2]), "valid": torch.tensor([1.0, 1, 1, 1, 1, 0, 1, 1]),
    }  # fmt: skip


def in_one_process(inputs: dict[str, Tensor], form: str) -> dict[str, Tensor]:
    """The loss from its formula on the full batch, and its gradients by autograd."""
    image, text, scale = (inputs[k].clone().requires_grad_() for k in ("image", "text", "scale"))
    logits = scale.exp() * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    group, words, label, valid = (inputs[k].tolist() for k in ("group", "words", "label", "valid"))
    total = torch.zeros(())
    for i in (i for i in range(SIZE) if valid[i]):
        same = [j for j in range(SIZE) if j != i and valid[j] and label[j] == label[i] >= 0 and form == "supervised"]
        kept = [i, *same] + [
            j for j in range(SIZE)
            if j != i and j not in same and valid[j] and group[j] != group[i] and words[j] != words[i]
        ]  # fmt: skip
        for row in (logits[i], logits[:, i]):
            total = total - row[kept].log_softmax(0)[: 1 + len(same)].mean() / 2
    loss = total / sum(valid)
    loss.backward()
    return {"loss": loss.detach(), "image": image.grad, "text": text.grad, "scale": scale.grad}


@pytest.mark.parametrize("world", [2, 4])
def test_loss_and_gradients_are_those_of_the_full_batch(launch, tmp_path, world):
    inputs = make_inputs()
    torch.save(inputs, tmp_path / "inputs.pt")
    done = launch(SCRIPT, world, [json.dumps({"out": str(tmp_path)})])
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(world)]
    for form in ranks[0]:
        expected = in_one_process(inputs, form)
        for found in (r[form] for r in ranks):
            torch.testing.assert_close(found["loss"], expected["loss"])
            torch.testing.assert_close(found["scale"], expected["scale"], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found["gathered"], F.normalize(inputs["image"], dim=1))
        for name in ("image", "text"):
            together = torch.cat([r[form][name] for r in ranks])
            torch.testing.assert_close(together, expected[name], rtol=1e-5, atol=1e-6)
        assert expected["image"].norm() > 1e-3
