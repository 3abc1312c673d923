"""At ZeRO stage 3 a tower's pretrained weights arrive without any rank ever holding all of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import timm
import torch

RANK = Path(__file__).with_name("shards_rank.py")
WORLD = 2


@pytest.mark.timeout(300)
def test_no_rank_holds_a_whole_tower_and_what_they_compute_is_the_same(
    launch: Callable[..., CompletedProcess[str]], text_tower: Path, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    source = timm.create_model("vit_small_patch16_224", num_classes=0, img_size=64)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))  # no two tensors are alike
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    found = {}
    for mode in ("whole", "shards"):
        done = launch(RANK, WORLD, [str(tmp_path), mode, str(tmp_path / "vit.pth"), str(text_tower)])
        assert done.returncode == 0, done.stderr[-3000:]
        found[mode] = [json.loads((tmp_path / f"{mode}-{rank}.json").read_text()) for rank in range(WORLD)]
    size = 4 * found["whole"][0]["whole"]
    for whole, shard in zip(found["whole"], found["shards"], strict=True):
        assert shard["whole"] == whole["whole"] == whole["held"]
        assert shard["held"] == pytest.approx(whole["whole"] / WORLD, rel=0.01)
        # what a rank has of its own while it builds: its half and the tensors on their way, never the whole
        assert whole["used"] > 0.95 * size
        assert shard["used"] < 0.8 * size
        # the first pass, and the second after one step
        assert shard["values"][:2] == pytest.approx(whole["values"][:2], rel=1e-4, abs=1e-4)
        assert shard["values"][2:] == pytest.approx(whole["values"][2:], rel=1e-3, abs=1e-3)
        assert abs(shard["values"][2] - shard["values"][0]) > 1e-2
