"""A rank of the step tests: trains the same contrastive batches under several (ZeRO stage, micro-batch) settings.

Arguments: one JSON object {model, cases: [{stage, micro, objectives, num_steps}], references: [{objectives,
num_steps}], out}. The first rank writes to `out` a JSON list with the losses and the gradient norm of every step of
every case; on one rank, also those of the references. A case of stage null takes one step in float64 without DeepSpeed;
its row tells loss by loss and parameter by parameter how far it is from the reference.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from cluster.process import close_group, from_environment, start_group
from dermfm import losses, zero
from dermfm.concepts import CONCEPTS
from dermfm.config import from_dict
from dermfm.gradients import Gradients
from dermfm.model.dermfm import DermFM, ModelConfig
from dermfm.objectives import ObjectiveConfig
from dermfm.optimizer import OptimizerConfig, parameter_groups
from dermfm.samples import Batch, hash63, tokenize
from dermfm.step import optimizer_step

GLOBAL_BATCH = 16
CLIPPING = 0.5
OPTIMIZER = OptimizerConfig(lr=3e-3, image_lr=1e-3, text_lr=1e-3)
WORDS = ("macule", "papule", "nodule", "plaque", "red", "brown", "blue", "sharp", "arm", "leg", "face", "benign")


def full_batch(tokenizer: Any, step: int) -> Batch:
    """A batch whose content is uneven over any split: bad samples, unknown labels, no notes, equal texts and groups."""
    generator = torch.Generator().manual_seed(100 + step)
    n = GLOBAL_BATCH
    picks = torch.randint(len(WORDS), (n, 9), generator=generator).tolist()
    texts = [" ".join(WORDS[w] for w in row[: 1 + (i * 5) % 9]) for i, row in enumerate(picks)]
    texts[0] = texts[4] = ""  # records without a note, both on the first of 2 or 4 ranks
    texts[7] = texts[10]
    tokens, lengths = tokenize(tokenizer, texts, 16)
    labels = torch.randint(8, (n,), generator=generator)
    labels[[2, 6, 8]] = -1
    weight = torch.ones(n)
    weight[[3, 12]] = 0
    indices = step * n + torch.arange(n)
    group, text = torch.arange(n) + 1000, torch.tensor([hash63(t) for t in texts])
    group[5] = group[14]
    bad = weight == 0
    group[bad], text[bad], labels[bad] = -1 - indices[bad], -1 - indices[bad], -1
    pixels = torch.randint(0, 256, (n, 3, 64, 64), generator=generator, dtype=torch.uint8)
    ids = [f"r{i}" for i in range(n)]
    finer = [torch.randint(-1, count, (n,), generator=generator) for count in (15, 3)]
    words = torch.rand(n, len(CONCEPTS), generator=generator) < 0.2
    return Batch(pixels, tokens, lengths, labels, weight, group, text, indices, ids, *finer, words)


def own_part(batch: Batch, rank: int, world: int) -> Batch:
    """Rows rank, rank + world, … as the loader gives them; notes no wider than this rank's longest."""
    rows = slice(rank, None, world)
    part = Batch(**{name: value[rows] for name, value in vars(batch).items()})
    part.tokens = part.tokens[:, : int(part.lengths.max())]
    return part


def run_case(job: dict[str, Any], case: dict[str, Any], rank: int, world: int) -> list[dict[str, float]]:
    """Losses and gradient norm of every step through DeepSpeed."""
    config = from_dict(ModelConfig, job["model"], "test")
    objectives = ObjectiveConfig(**case["objectives"])
    own = GLOBAL_BATCH // world
    micro = min(case["micro"], own)
    torch.manual_seed(0)
    model = DermFM(config).train()
    settings = zero.deepspeed_json(
        zero.ZeroConfig(stage=case["stage"], gradient_clipping=CLIPPING),
        micro_batch=micro,
        num_micro=own // micro,
        world=world,
        optimizer={"lr": OPTIMIZER.lr, "betas": OPTIMIZER.betas, "eps": OPTIMIZER.eps},
        device="cpu",
        num_learning=sum(p.numel() for p in model.parameters() if p.requires_grad),
        num_parameters=sum(p.numel() for p in model.parameters()),
    )
    engine = zero.initialize(model, parameter_groups(model, OPTIMIZER), settings, "cpu")
    rows, gradients = [], Gradients(engine)
    for step in range(case["num_steps"]):
        batch = own_part(full_batch(engine.module.tokenizer, step), rank, world)
        values = optimizer_step(engine, batch, micro, objectives)
        rows.append({**values, "grad_norm": gradients.step().norm})
    engine.destroy()
    return rows


class PlainEngine:
    """Gradients summed by autograd, their mean over ranks taken once: what an engine has to do, without DeepSpeed."""

    def __init__(self, model: DermFM) -> None:
        self.model = model

    def __call__(self, phase: str, **inputs: Tensor) -> dict[str, Tensor]:
        return self.model(phase, **inputs)

    def backward(self, loss: Tensor, scale_wrt_gas: bool) -> None:
        loss.backward()

    def gradients(self) -> dict[str, Tensor]:
        """Mean over ranks by parameter; zero where no rank has any. Collective."""
        found = {}
        for name, parameter in self.model.named_parameters():
            found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
            dist.all_reduce(found[name])
        return {name: gradient / dist.get_world_size() for name, gradient in found.items()}


def compare_in_double(job: dict[str, Any], case: dict[str, Any], rank: int, world: int) -> list[dict[str, float]]:
    """One step in float64: relative differences of losses and of every parameter's gradient from the full batch's."""
    objectives = ObjectiveConfig(**case["objectives"])
    torch.manual_seed(0)
    model = DermFM(from_dict(ModelConfig, job["model"], "test")).double().train()
    engine, whole = PlainEngine(model), full_batch(model.tokenizer, 0)
    values = optimizer_step(engine, own_part(whole, rank, world), case["micro"], objectives)
    gradients = engine.gradients()
    model.zero_grad()
    parts = reference_losses(model, whole, objectives)
    sum(getattr(objectives, name) * value for name, value in parts.items()).backward()
    row = {f"loss/{name}": abs(values[f"loss/{name}"] / value.item() - 1) for name, value in parts.items()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            # Keys' biases shift all scores of a query alike: their gradient is zero but for rounding.
            row[name] = float((gradients[name] - expected).norm() / expected.norm().clamp(min=1e-8))
    return [row]


def run_reference(job: dict[str, Any], case: dict[str, Any]) -> list[dict[str, float]]:
    """The same by plain autograd on the whole batch: no gather, no cache, no engine; torch's own AdamW and clipping."""
    objectives = ObjectiveConfig(**case["objectives"])
    torch.manual_seed(0)
    model = DermFM(from_dict(ModelConfig, job["model"], "test")).train()
    groups = parameter_groups(model, OPTIMIZER)
    optimizer = torch.optim.AdamW(groups, betas=tuple(OPTIMIZER.betas), eps=OPTIMIZER.eps)
    rows = []
    for step in range(case["num_steps"]):
        parts = reference_losses(model, full_batch(model.tokenizer, step), objectives)
        total = sum(getattr(objectives, name) * value for name, value in parts.items())
        optimizer.zero_grad()
        total.backward()
        parameters = [p for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, CLIPPING)
        optimizer.step()
        named = {f"loss/{name}": value.item() for name, value in parts.items()}
        rows.append({"loss": total.item(), "grad_norm": norm.item(), **named})
    return rows


def reference_losses(model: DermFM, batch: Batch, objectives: ObjectiveConfig) -> dict[str, Tensor]:
    """Means over the valid items, row by row and with torch's own cross-entropies."""
    image, image_tokens = model.encode_image(batch.pixels)
    text, text_tokens = model.encode_text(batch.tokens, batch.lengths)
    good = [i for i in range(len(batch)) if batch.weight[i] > 0]
    noted = [i for i in good if batch.text[i] != hash63("")]
    named = [i for i in good if batch.labels[i] >= 0]
    named_noted = [i for i in noted if batch.labels[i] >= 0]
    scale = model.logit_scale.exp()
    out = {}
    if objectives.contrastive and objectives.contrastive_form == "nt_xent":
        z = torch.cat([image, text])
        rows = [
            _nt_xent_row(scale * z @ z[m], m, batch, noted) for m in range(2 * len(batch)) if m % len(batch) in noted
        ]
        out["contrastive"] = torch.stack(rows).mean()
    elif objectives.contrastive:
        row_loss = _supervised_row if objectives.contrastive_form == "supervised" else _clip_row
        both = [row_loss(scale * rows[i] @ columns.T, i, batch, noted) for i in noted
                for rows, columns in ((image, text), (text, image))]  # fmt: skip
        out["contrastive"] = torch.stack(both).sum() / 2 / len(noted)
    if objectives.classify_image:
        out["classify_image"] = _class_loss(model.classify_image(batch.pixels), batch, named, objectives)
    if objectives.classify_text:
        logits = model.classify_text(batch.tokens, batch.lengths)
        out["classify_text"] = _class_loss(logits, batch, named_noted, objectives)
    if objectives.classify_fused:
        logits = model.classify_fused(image_tokens, text_tokens, batch.lengths)
        out["classify_fused"] = _class_loss(logits, batch, named_noted, objectives)
    if objectives.matching:
        valid = torch.zeros(len(batch)).index_fill(0, torch.tensor(noted), 1)
        pairs = losses.describe_pairs(batch.group, batch.text, batch.labels, valid, 0, len(batch))
        chosen, found = losses.mine_negatives(
            image.detach(), text.detach(), model.logit_scale.detach(), pairs, batch.indices, batch.indices
        )
        lengths = batch.lengths[chosen]
        own = model.match(image_tokens, text_tokens, batch.lengths)[noted]
        wrong = model.match(image_tokens, model.encode_text(batch.tokens[chosen], lengths)[1], lengths)[found > 0]
        logits = torch.cat([own, wrong])
        targets = torch.cat([torch.ones_like(own), torch.zeros_like(wrong)])
        out["matching"] = F.binary_cross_entropy_with_logits(logits, targets)
    return out | more_losses(model, batch, objectives, good, noted)


def more_losses(
    model: DermFM, batch: Batch, objectives: ObjectiveConfig, good: list[int], noted: list[int]
) -> dict[str, Tensor]:
    """Captioning, finer labels, concepts and alignment, each from its own forward pass."""
    pooled = model.image(batch.pixels)[1]
    image, image_tokens = model.encode_image(batch.pixels)
    text, _ = model.encode_text(batch.tokens, batch.lengths)
    out = {}
    for name, labels in (("subclass", batch.subclasses), ("malignancy", batch.malignancies)):
        if getattr(objectives, f"classify_{name}"):
            rows = [i for i in good if labels[i] >= 0]
            smoothing = objectives.label_smoothing
            logits = model.heads[name](pooled[rows])
            out[f"classify_{name}"] = F.cross_entropy(logits, labels[rows], label_smoothing=smoothing)
    if objectives.concepts:
        logits, present = model.heads["concepts"](image[noted]), batch.concepts[noted].to(image.dtype)
        out["concepts"] = F.binary_cross_entropy_with_logits(logits, present)
    if objectives.align_cosine:
        out["align_cosine"] = torch.stack([1 - image[i] @ text[i] for i in noted]).mean()
    if objectives.align_l1:
        out["align_l1"] = torch.stack([(image[i] - text[i]).abs().mean() for i in noted]).mean()
    if objectives.caption:
        each = []
        for i in noted:
            note = batch.tokens[i : i + 1, : batch.lengths[i]]
            hidden = model.decoder.states(model.decoder.image_in(image_tokens[i : i + 1]), note[:, :-1])[0]
            each.append(F.cross_entropy(hidden @ model.decoder.words.T, note[0, 1:], reduction="none"))
        out["caption"] = torch.cat(each).mean()
    return out


def _class_loss(logits: Tensor, batch: Batch, rows: list[int], objectives: ObjectiveConfig) -> Tensor:
    return F.cross_entropy(logits[rows], batch.labels[rows], label_smoothing=objectives.label_smoothing)


def _nt_xent_row(row: Tensor, m: int, batch: Batch, noted: list[int]) -> Tensor:
    """Cross-entropy of a row of [image; text] over its partner and its true negatives of both kinds."""
    n = len(batch)
    others = [c for c in range(2 * n) if c % n in noted and c % n != m % n and not _alike(batch, m % n, c % n)]
    return F.cross_entropy(row[[(m + n) % (2 * n), *others]][None], torch.tensor([0]))


def _clip_row(logits: Tensor, row: int, batch: Batch, noted: list[int]) -> Tensor:
    """Cross-entropy of one row over its own partner and its true negatives."""
    kept = [row] + [j for j in noted if j != row and not _alike(batch, row, j)]
    return F.cross_entropy(logits[kept][None], torch.tensor([0]))


def _supervised_row(logits: Tensor, row: int, batch: Batch, noted: list[int]) -> Tensor:
    """Mean over the notes of the row's class of −log softmax, over them and the true negatives."""
    positive = [j for j in noted if j == row or batch.labels[j] == batch.labels[row] >= 0]
    kept = positive + [j for j in noted if j not in positive and not _alike(batch, row, j)]
    return -F.log_softmax(logits[kept], 0)[: len(positive)].mean()


def _alike(batch: Batch, row: int, other: int) -> bool:
    return bool(batch.group[other] == batch.group[row] or batch.text[other] == batch.text[row])


def main() -> None:
    """Run all cases in one process group."""
    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    process = from_environment("cpu")
    start_group(process)
    try:
        results = []
        for case in job["cases"]:
            run = compare_in_double if case["stage"] is None else run_case
            results.append(run(job, case, process.rank, process.world))
        if process.world == 1:
            results += [run_reference(job, case) for case in job["references"]]
        if process.is_first:
            Path(job["out"]).write_text(json.dumps(results))
    finally:
        close_group()


if __name__ == "__main__":
    main()
