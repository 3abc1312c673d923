"""What a training run needs on any nodes × GPUs: memory per GPU, time, disk, communication. No GPU is needed.

`dermfm plan config.yaml nodes=4 gpus=8 gpu_memory_gb=80` takes the keys of `train` and those of the machine.
"""

from __future__ import annotations

from dermfm.plan import check_sources
from dermfm.scale import ScaleConfig
from dermfm.scale_table import show


def schema(_: object) -> type:
    """The config dataclass of this job."""
    return ScaleConfig


def run(config: ScaleConfig, _: object) -> int:
    """Print the tables and the verdict."""
    check_sources(config.model)
    show(config)
    return 0
