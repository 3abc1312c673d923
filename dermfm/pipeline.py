"""The whole chain as one configuration: each job's own dataclass under its name, paths tied together in the YAML."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dermfm.config import REQUIRED, key, read_yaml, to_dict
from dermfm.evaluate.job import EvaluateConfig
from dermfm.notes.plan import NotesConfig
from dermfm.pack_plan import ShardsConfig
from dermfm.plan import TrainConfig
from dermfm.records.build import RecordsConfig, build_records
from dermfm.report.page import ReportConfig
from dermfm.run import check_free

JOBS = ("records", "notes", "shards", "train", "evaluate", "report")
DATA_JOBS = ("records", "notes", "shards")
CHAIN = "pipeline.yaml"


@dataclass(kw_only=True)
class PipelineConfig:
    """A chain of jobs."""

    out: str = key("runs/demo", "folder of everything that the chain makes")
    data: str | None = key(REQUIRED, "folder of real images with metadata.csv; null where the config reads none")
    records: RecordsConfig = key(RecordsConfig, "the job records")
    notes: NotesConfig = key(NotesConfig, "the job notes")
    shards: ShardsConfig = key(ShardsConfig, "the job shards")
    train: TrainConfig = key(TrainConfig, "the job train")
    evaluate: EvaluateConfig = key(EvaluateConfig, "the job evaluate")
    report: ReportConfig = key(ReportConfig, "the job report")


def set_aside(config: PipelineConfig) -> Path | None:
    """Move a chain made of other records, notes or shards out of the way; where it went, or None.

    Whoever runs the demo on other data gets a fresh folder, and nothing of the old one is lost. Raises InputError where
    the new records cannot be read (then nothing moves) or where the old chain is still running.
    """
    out = Path(config.out)
    new = to_dict(config)
    if not (out / CHAIN).is_file() or all(read_yaml(out / CHAIN).get(job) == new[job] for job in DATA_JOBS):
        return None
    build_records(config.records, dry_run=True)
    check_free(out)
    taken = next(n for n in range(1, 10_000) if not out.with_name(f"{out.name}-{n}").exists())
    return out.rename(out.with_name(f"{out.name}-{taken}"))
