"""One rank: build both towers, whole or in shards at ZeRO stage 3, and say what it holds, used, and computes."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

import torch

from cluster.process import close_group, from_environment, start_group
from dermfm import zero
from dermfm.model.image import ImageConfig, ImageTower
from dermfm.model.text import TextConfig, TextTower


class AnonymousMemory(threading.Thread):
    """The peak of this process's own memory; pages of a mapped file are not its own."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_bytes = self.peak = self._now()
        self._going = True

    def run(self) -> None:
        while self._going:
            self.peak = max(self.peak, self._now())
            time.sleep(0.002)

    def stop(self) -> int:
        self._going = False
        self.join()
        return self.peak - self.start_bytes

    def _now(self) -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("RssAnon:")[1].split()[0])


def main(out: Path, mode: str, image_weights: str, text_folder: str) -> None:
    process = from_environment("cpu")
    torch.set_num_threads(1)
    start_group(process)
    settings = zero.deepspeed_json(
        zero.ZeroConfig(stage=3 if mode == "shards" else 0), micro_batch=1, num_micro=1, world=process.world,
        optimizer={"lr": 1e-3}, device="cpu", num_learning=0, num_parameters=0,
    )  # fmt: skip
    with zero.towers_in_shards(settings, "cpu"):  # what libraries keep once is not the towers'
        warm = ImageTower(ImageConfig(name="test_vit", size=64)), TextTower(TextConfig(name=text_folder))
    memory = AnonymousMemory()
    memory.start()
    with zero.towers_in_shards(settings, "cpu"):
        image = ImageTower(ImageConfig(name="vit_small_patch16_224", size=64, weights=image_weights))
        text = TextTower(TextConfig(name=text_folder, train_blocks=-1))
    used = memory.stop()
    del warm
    both = torch.nn.ModuleDict({"image": image, "text": text})
    parameters = list(both.parameters())
    held = sum(getattr(p, "ds_tensor", p).numel() for p in parameters)
    whole = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
    groups = [{"params": parameters, "lr": 1e-3, "weight_decay": 0.0}]
    engine = zero.initialize(Both(both), groups, settings, "cpu")
    pooled = engine(torch.full((1, 3, 64, 64), 99, dtype=torch.uint8), torch.arange(8)[None] + 4, torch.tensor([8]))
    engine.backward(sum(p.flatten()[:3].sum() for p in pooled), scale_wrt_gas=False)
    engine.step()
    again = engine(torch.full((1, 3, 64, 64), 99, dtype=torch.uint8), torch.arange(8)[None] + 4, torch.tensor([8]))
    values = [t.double().flatten()[:3].norm().item() for t in (*pooled, *again)]
    content = {"used": used, "held": held, "whole": whole, "values": values, "rank": process.rank}
    (out / f"{mode}-{process.rank}.json").write_text(json.dumps(content))
    close_group()


class Both(torch.nn.Module):
    """Both towers behind one forward, which the engine's hooks see."""

    def __init__(self, towers: torch.nn.ModuleDict) -> None:
        super().__init__()
        self.towers = towers

    def forward(self, pixels: torch.Tensor, tokens: torch.Tensor, lengths: torch.Tensor) -> tuple:
        return self.towers["image"](pixels)[1], self.towers["text"](tokens, lengths)[1]


if __name__ == "__main__":
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:  # freed tensors go back at once, so that memory shows what is alive
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    main(Path(sys.argv[1]), *sys.argv[2:])
