"""The configuration of the job `evaluate`."""

from __future__ import annotations

from dataclasses import dataclass

from dermfm.config import check_choice, check_range, key
from dermfm.evaluate.fairness import SUBGROUPS
from dermfm.evaluate.shift import ProtocolConfig
from dermfm.evaluate.views import VIEWS
from dermfm.storage import CacheConfig

TASKS = (
    "classify-image",
    "classify-text",
    "classify-fused",
    "zero-shot",
    "retrieval-i2t",
    "retrieval-t2i",
    "retrieval-i2i",
    "retrieval-t2t",
    "report",
    "few-shot",
    "probe",
)


@dataclass(kw_only=True)
class EvaluateConfig:
    """Scoring of one checkpoint on the shards that it was trained from, or on others."""

    run: str | None = key(None, "run directory; its newest checkpoint is scored")
    checkpoint: str | None = key(None, "a checkpoint folder ckpt/step-NNNNNNNN instead of a run's newest one")
    model: str | None = key(
        None, "a model from outside instead: open_clip:<name>, hf:<name> or a folder; needs shards and out"
    )
    prompts: dict[str, list[str]] = key(
        {}, "of a model from outside, class set → templates with {}; empty: what its authors use, prompts.yaml"
    )
    shards: str | None = key(None, "folder of shards, or their address; null: that of the run's config.yaml")
    cache: CacheConfig = key(CacheConfig, "how shards at an address are read")
    out: str | None = key(None, "output folder; null: <run>/eval/<step>")
    splits: list[str] = key(["test"], "splits whose records are scored")
    protocol: ProtocolConfig = key(ProtocolConfig, "roles of the data sets and rules of scoring")
    tasks: list[str] = key(
        [task for task in TASKS if task != "few-shot"],
        f"what is scored, among {', '.join(TASKS)}; what a model has no head for is left out and told",
    )
    eval_strategies: list[str] = key([], "note strategies used as text; empty: all that the scored records hold")
    probe: bool = key(True, "score a linear probe on the untrained image tower's features beside the model")
    probe_on: str = key("untrained", "features of the probe: untrained (tower before the run) or model (as trained)")
    shots: list[int] = key([1, 5, 10, 20], "training images a class of the task few-shot, on the model's own features")
    few_shot_draws: int = key(5, "draws of these images, whose mean is reported")
    rerank: int = key(0, "first items of image-note retrieval that the matching head puts in order; 0: none")
    subgroups: list[str] = key(list(SUBGROUPS), f"fields of fairness rows, among {', '.join(SUBGROUPS)}")
    subgroup_min: int = key(20, "scored records that a subgroup needs")
    text_information: bool = key(
        True, "how much the notes tell about the label, by a bag of words (needs a train split)"
    )
    views: int = key(
        1, "mirrored and turned views of an image whose embeddings and probabilities are averaged: 1, 2, 4 or 8"
    )
    batch_size: int = key(32, "images or texts in one forward pass")
    num_workers: int = key(0, "loader processes a rank (0: one background thread)")
    precision: str = key("fp32", "forward passes in fp32 or bf16")
    ranks: int = key(0, "processes to start here where no launcher did; 0: one a CUDA device, or one")
    device: str = key("auto", "auto, cpu or cuda")
    resamples: int = key(1000, "bootstrap resamples of groups")
    seed: int = key(0, "seed of the bootstrap")

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, ("fp32", "bf16"))
        check_choice("device", self.device, ("auto", "cpu", "cuda"))
        check_choice("views", str(self.views), map(str, VIEWS))
        check_range("batch_size", self.batch_size, 1)
        check_range("num_workers", self.num_workers, 0)
        check_range("ranks", self.ranks, 0, 4096)
        check_range("resamples", self.resamples, 20)
        check_choice("probe_on", self.probe_on, ("untrained", "model"))
        check_range("few_shot_draws", self.few_shot_draws, 1, 1000)
        check_range("rerank", self.rerank, 0, 1000)
        check_range("subgroup_min", self.subgroup_min, 1)
        for shots in self.shots:
            check_range("shots", shots, 1)
        for field in self.subgroups:
            check_choice("subgroups", field, SUBGROUPS)
        for task in self.tasks:
            check_choice("tasks", task, TASKS)
        if not self.splits or not self.tasks:
            raise ValueError("splits and tasks: at least one of each is needed")
        if sum(map(bool, (self.run, self.checkpoint, self.model))) > 1:
            raise ValueError("run, checkpoint, model: give one of them; a checkpoint folder lies in its run already")
        if self.model and not (self.shards and self.out):
            raise ValueError("model: a model from outside has no run; give shards=<folder> and out=<folder> too")
        if self.prompts and not self.model:
            raise ValueError("prompts: for a model from outside only (model=…)")
