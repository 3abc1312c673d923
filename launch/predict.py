"""dermfm predict: what a trained model says about an image or a folder of images.

  dermfm predict model=exported images=folder out=predictions
  dermfm predict model=runs/demo images=lesion.jpg out=predictions

Writes predictions.csv and index.html: calibrated class probabilities, nearest training notes, a report where the model
has a decoder, and maps of where the words look. Files that cannot be read are named and skipped. An interrupted call
continues. Not a medical device. --dry-run says what would be done.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from cluster.process import default_threads, from_environment
from dermfm.predict.job import PredictConfig, check, find_images, predict

if TYPE_CHECKING:
    from launch.cli import Call

NUM_NAMED = 5


def schema(call: Call) -> type[PredictConfig]:
    """The job's configuration."""
    return PredictConfig


def run(config: PredictConfig, call: Call) -> int:
    """Answer every image, 0 when done."""
    root, names = find_images(config)
    check(config)
    if call.dry_run:
        print(f"{len(names)} images of {root} with the model {config.model} → {config.out}")
        return 0
    import torch

    torch.set_num_threads(default_threads(0, 1))
    done = predict(config, from_environment(config.device).device)
    for answer in done.bad[:NUM_NAMED]:
        print(f"not read: {answer.image} ({answer.error})", file=sys.stderr)
    named = f", {len(done.bad)} not read (see its column `error`)" if done.bad else ""
    print(f"{done.folder / 'predictions.csv'}: {done.num_images} images{named}; {done.folder / 'index.html'}")
    return 0
