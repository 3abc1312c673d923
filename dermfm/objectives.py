"""The objectives of a training step, in one table: what each computes, how many items it has, what it needs.

Every objective is the sum of its loss over the valid items of a micro-batch; `dermfm.step` divides it by the number of
such items on all ranks and multiplies it with its weight in the configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dermfm import losses
from dermfm.concepts import CONCEPT_GROUPS
from dermfm.config import check_choice, check_range, key
from dermfm.model.dermfm import ModelConfig
from dermfm.samples import Batch, hash63

NO_NOTE = hash63("")


@dataclass(kw_only=True)
class ObjectiveConfig:
    """Weights of the objectives; 0 switches one off. Without those that read notes, no note is drawn or encoded."""

    contrastive: float = key(1.0, "image-note contrast over the whole batch")
    contrastive_form: str = key(
        "clip",
        "clip, siglip, supervised, nt_xent, infonce, supervised_nt_xent, supervised_infonce; a+b: the sum of two",
    )
    fixed_temperature: dict[str, float] = key({}, "form → temperature; forms not named here learn one")
    mask_same: bool = key(True, "pairs of the same group or of identical text are no negatives of each other")
    align_cosine: float = key(0.0, "1 - cosine of an image and its note")
    align_l1: float = key(0.0, "mean absolute difference of the embeddings of an image and its note")
    matching: float = key(0.5, "does this note belong to this image: own note against a hard negative")
    hard_negatives: float = key(
        1.0,
        "share of matching's negatives that are mined; the rest is drawn evenly: a new fusion learns from it sooner",
    )
    caption: float = key(0.0, "writing the note from the image, token by token; needs model.decoder")
    classify_image: float = key(1.0, "class from the image")
    classify_text: float = key(0.2, "class from the note")
    classify_fused: float = key(0.2, "class from image and note together")
    classify_subclass: float = key(0.0, "one of 15 subclasses from the image; needs subclass in model.heads")
    classify_malignancy: float = key(
        0.0, "benign, pre-cancerous or malignant from the image; needs malignancy in model.heads"
    )
    concepts: float = key(0.0, "words of the note from the image, 63 concept words; needs concepts in model.heads")
    concept_groups: list[str] = key([], "groups of concept words that count; empty: all seven")
    label_smoothing: float = key(0.0, "label smoothing of the classification losses")

    def __post_init__(self) -> None:
        for name in OBJECTIVES:
            check_range(f"objectives.{name}", getattr(self, name), 0)
        for form in self.forms:
            check_choice("objectives.contrastive_form", form, losses.CONTRASTIVE)
        for form, temperature in self.fixed_temperature.items():
            check_choice("objectives.fixed_temperature", form, self.forms)
            check_range(f"objectives.fixed_temperature.{form}", temperature, 0.01, 100)
        for group in self.concept_groups:
            check_choice("objectives.concept_groups", group, CONCEPT_GROUPS)
        check_range("objectives.hard_negatives", self.hard_negatives, 0, 1)
        check_range("objectives.label_smoothing", self.label_smoothing, 0, 0.9)
        if not self.active:
            raise ValueError("objectives: all weights are 0; give at least one of them a positive weight")

    @property
    def active(self) -> list[str]:
        """Names of the objectives with a weight, in the order of the table."""
        return [name for name in OBJECTIVES if getattr(self, name)]

    @property
    def forms(self) -> list[str]:
        """The contrastive forms whose sum is taken."""
        return [form.strip() for form in self.contrastive_form.split("+")]

    def uses(self, need: str) -> bool:
        """Whether any objective needs this: a part of the model, "notes", or "batch"."""
        return any(need in OBJECTIVES[name].needs for name in self.active)

    @property
    def uses_text(self) -> bool:
        """Whether any objective reads notes."""
        return self.uses("notes")

    @property
    def compares(self) -> bool:
        """Whether any objective sets samples of the whole batch against each other."""
        return self.uses("batch")


@dataclass
class Pass:
    """One micro-batch on its way through the model. What several objectives need is computed once, when first asked
    for; that is the same on every rank, so that the ranks' collectives stay in step.

    `start` is its first row in this rank's batch. `negatives` are tokens [b, T], lengths [b] and found [b] of the mined
    notes, where matching has any.
    """

    engine: Any
    batch: Batch
    objectives: ObjectiveConfig
    start: int = 0
    negatives: tuple[Tensor, Tensor, Tensor] | None = None

    @cached_property
    def image(self) -> dict[str, Tensor]:
        """Outputs of the phase `image`."""
        if self.objectives.uses_text:
            _ = self.text  # first, for its backward pass to come last: the images' activations are gone by then
        return self.engine("image", pixels=self.batch.pixels)

    @cached_property
    def text(self) -> dict[str, Tensor]:
        """Outputs of the phase `text`."""
        return self.engine("text", tokens=self.batch.tokens, lengths=self.batch.lengths)

    @cached_property
    def fused(self) -> dict[str, Tensor]:
        """Outputs of the phase `fuse` for the images' own notes."""
        tokens, lengths = self.text["tokens"], self.batch.lengths
        return self.engine("fuse", image_tokens=self.image["tokens"], text_tokens=tokens, lengths=lengths)

    @cached_property
    def with_note(self) -> Tensor:
        """Weight [b] of the samples that have a note."""
        return noted(self.batch)

    def class_loss(self, logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
        """Smoothed cross-entropy over known labels."""
        return losses.classification(logits, labels, weight, self.objectives.label_smoothing)


def noted(batch: Batch) -> Tensor:
    """Weight [b] of the samples that have a note."""
    return batch.weight * (batch.text != NO_NOTE)


@dataclass(frozen=True)
class Objective:
    """One line of the table.

    `loss(pass)` is the sum over a micro-batch; None for what is computed on the features of the whole batch (see
    `dermfm.step`). `count(batch, found)` is the number of valid items of this rank's batch; `found` [b] says which
    images have a mined negative. `needs`: "notes"; "batch" (other samples of the step); parts of the model by name.
    """

    loss: Callable[[Pass], Tensor] | None
    count: Callable[[Batch, Tensor], Tensor]
    needs: tuple[str, ...] = ()


def _matching(p: Pass) -> Tensor:
    assert p.negatives is not None
    tokens, lengths, found = p.negatives
    other = p.engine("text", tokens=tokens, lengths=lengths)["tokens"]
    wrong = p.engine("fuse", image_tokens=p.image["tokens"], text_tokens=other, lengths=lengths)
    return losses.matching(p.fused["match"], wrong["match"], p.with_note, found)


def _caption(p: Pass) -> Tensor:
    return p.engine(
        "caption",
        image_tokens=p.image["tokens"],
        tokens=p.batch.tokens,
        lengths=p.batch.lengths,
        weight=p.with_note,
    )["loss"]


def _concepts(p: Pass) -> Tensor:
    logits, present = p.image["concepts_logits"], p.batch.concepts
    if p.objectives.concept_groups:
        kept = torch.tensor(
            [g in p.objectives.concept_groups for g, words in CONCEPT_GROUPS.items() for _ in words],
            device=logits.device,
        )
        logits, present = logits[:, kept], present[:, kept]
    return losses.concepts(logits, present, p.with_note)


def _pairs(batch: Batch, found: Tensor) -> Tensor:
    return noted(batch).sum()


def _labelled(labels: str, with_note: bool = False) -> Callable[[Batch, Tensor], Tensor]:
    """Counter of the samples (with a note) whose label of this kind is known."""

    def count(batch: Batch, found: Tensor) -> Tensor:
        return ((noted(batch) if with_note else batch.weight) * (getattr(batch, labels) >= 0)).sum()

    return count


OBJECTIVES: dict[str, Objective] = {
    "contrastive": Objective(None, _pairs, ("notes", "batch")),
    "align_cosine": Objective(
        lambda p: losses.align_cosine(p.image["embedding"], p.text["embedding"], p.with_note), _pairs, ("notes",)
    ),
    "align_l1": Objective(
        lambda p: losses.align_l1(p.image["embedding"], p.text["embedding"], p.with_note), _pairs, ("notes",)
    ),
    "classify_image": Objective(
        lambda p: p.class_loss(p.image["logits"], p.batch.labels, p.batch.weight), _labelled("labels")
    ),
    "classify_subclass": Objective(
        lambda p: p.class_loss(p.image["subclass_logits"], p.batch.subclasses, p.batch.weight),
        _labelled("subclasses"),
        ("subclass",),
    ),
    "classify_malignancy": Objective(
        lambda p: p.class_loss(p.image["malignancy_logits"], p.batch.malignancies, p.batch.weight),
        _labelled("malignancies"),
        ("malignancy",),
    ),
    "concepts": Objective(_concepts, _pairs, ("notes", "concepts")),
    "classify_text": Objective(
        lambda p: p.class_loss(p.text["logits"], p.batch.labels, p.with_note), _labelled("labels", True), ("notes",)
    ),
    "classify_fused": Objective(
        lambda p: p.class_loss(p.fused["logits"], p.batch.labels, p.with_note),
        _labelled("labels", True),
        ("notes", "fusion"),
    ),
    "matching": Objective(
        _matching, lambda batch, found: noted(batch).sum() + found.sum(), ("notes", "batch", "fusion")
    ),
    "caption": Objective(
        _caption, lambda batch, found: ((batch.lengths - 1) * noted(batch)).sum(), ("notes", "decoder")
    ),
}


def check_objectives(objectives: ObjectiveConfig, model: ModelConfig, contrastive_batch: int) -> None:
    """ValueError where an active objective needs a part that this model lacks, or a larger batch."""
    lacks = {
        "fusion": (model.fusion.kind == "none", "model.fusion.kind is none; take cross"),
        "decoder": (model.decoder.depth == 0, "model.decoder.depth is 0; give it 1 or more"),
    }
    for head in ("subclass", "malignancy", "concepts"):
        lacks[head] = (head not in model.heads, f"model.heads lacks it; add {head} there")
    for name in objectives.active:
        for need in OBJECTIVES[name].needs:
            missing, remedy = lacks.get(need, (False, ""))
            if missing:
                weight = getattr(objectives, name)
                raise ValueError(f"objectives.{name}: {weight:g} needs the {need} part, but {remedy}, or set it to 0")
        if "batch" in OBJECTIVES[name].needs and contrastive_batch < 2:
            raise ValueError(
                f"contrastive_batch: {contrastive_batch} is too small for objectives.{name}, which sets a pair "
                "against others; it must be at least 2"
            )
    if objectives.contrastive and "siglip" in objectives.forms and model.logit_bias is None:
        raise ValueError("objectives.contrastive_form: siglip learns a bias; give model.logit_bias its start, e.g. -10")
