"""Image-note pairs of the training stream in TensorBoard, with where the fusion looks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dermfm.metrics import MetricsLog
from dermfm.samples import Batch

NUM_PAIRS = 4


class Pictures:
    """Every `every` steps (0: never) the first pairs of the batch: image, attention of its note over it, note."""

    def __init__(self, log: MetricsLog, every: int, uses_fusion: bool) -> None:
        self._log, self._every, self._uses_fusion = log, every, uses_fusion

    @torch.no_grad()
    def show(self, step: int, module: Any, batch: Batch) -> None:
        """Every rank runs the passes (ZeRO-3 gathers in them), the first one writes."""
        if not self._every or step % self._every or not self._uses_fusion:
            return
        count = min(NUM_PAIRS, len(batch))
        lengths = batch.lengths[:count]
        module.eval()
        _, image_tokens = module.encode_image(batch.pixels[:count])
        _, text_tokens = module.encode_text(batch.tokens[:count, : int(lengths.max())], lengths)
        _, weights = module.fuse(image_tokens, text_tokens, lengths, return_weights=True)
        module.train()
        grids = [w[:, :n].float().mean((0, 1)).cpu().numpy() for w, n in zip(weights, lengths.tolist(), strict=True)]
        for k, grid in enumerate(grids):
            note = module.tokenizer.decode(batch.tokens[k, : int(lengths[k])].tolist(), skip_special_tokens=True)
            pair = side_by_side(batch.pixels[k].cpu().numpy(), grid.reshape(module.image.grid))
            self._log.picture(step, f"pairs/{k}", pair, f"{batch.record_ids[k]}: {note}")


def side_by_side(pixels: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """uint8 [H, 2 W, 3]: pixels [3, H, W], and beside them with weights [rows, columns] as a colour map over them."""
    from PIL import Image

    from dermfm.report.attention import blend  # matplotlib is slow to import

    picture = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    return np.concatenate([np.asarray(picture), np.asarray(blend(picture, grid))], axis=1)
