"""dermfm export: a checkpoint as a folder that needs neither the run nor the shards.

  dermfm export run=runs/demo out=exported
  dermfm export checkpoint=runs/demo/ckpt/step-00000400 max_notes=0

Writes safetensors, configuration, tokenizer, a temperature fitted on the valid split, notes to retrieve and a model
card (README.md). Load it with `dermfm.load("exported")`. --dry-run says what would be written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.process import default_threads, from_environment
from dermfm.export.job import ExportConfig, export, make_plan

if TYPE_CHECKING:
    from launch.cli import Call


def schema(call: Call) -> type[ExportConfig]:
    """The job's configuration."""
    return ExportConfig


def run(config: ExportConfig, call: Call) -> int:
    """Write the folder, 0 when done."""
    plan = make_plan(config)
    if call.dry_run:
        print("\n".join(plan.lines()))
        return 0
    import torch

    torch.set_num_threads(default_threads(0, 1))
    out = export(config, from_environment(config.device).device)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {size / 1e6:.0f} MB; load it with dermfm.load({str(out)!r})")
    return 0
