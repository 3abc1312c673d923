"""Written reports: what the decoder says about an image, against the record's note and against the record's facts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dermfm.evaluate.classify import Value
from dermfm.evaluate.embed import embed_images
from dermfm.evaluate.embedding import Embedded, Site
from dermfm.evaluate.records import TextSet
from dermfm.evaluate.results import Row, make_row
from dermfm.evaluate.shift import Scope
from dermfm.evaluate.statistics import Draws, interval, mean_draws
from dermfm.model.dermfm import tidy_spaces
from dermfm.notes.checks import find_faults, states
from dermfm.notes.facts import VISIBLE_FIELDS, Facts, visible_facts

CLAIMS = ("contradiction:", "unsupported:")  # faults that are statements without support in the record
BLEU_ORDER = 4


@dataclasses.dataclass(frozen=True)
class Reports:
    """A written text for each of the records `rows` [n], the record's facts, those stated, and unsupported claims."""

    rows: np.ndarray
    texts: list[str]
    facts: list[Facts]
    stated: list[list[str]]
    unsupported: list[list[str]]

    def table(self, record_ids: np.ndarray) -> list[Row]:
        """Rows of reports.parquet."""
        columns = zip(self.rows, self.texts, self.facts, self.stated, self.unsupported, strict=True)
        return [
            {
                "record_id": record_ids[row],
                "text": text,
                "facts": [f"{name}: {value}" for name, value in facts.items()],
                "stated": stated,
                "unsupported": unsupported,
            }
            for row, text, facts, stated, unsupported in columns
        ]


def write_reports(model: Any, embedded: Embedded, splits: list[str], site: Site) -> Reports:
    """One greedy report for every scored record, and how it stands to the record's facts."""
    rows, texts = [], []
    for split in splits:
        tokens = _written(model, split, site)
        rows.append(np.flatnonzero(embedded.records.splits == split))
        texts += [
            tidy_spaces(t) for t in model.tokenizer.batch_decode(model.decoder.cut(tokens), skip_special_tokens=True)
        ]
    where = np.concatenate(rows)
    facts = [visible_facts(embedded.records.fields[row], VISIBLE_FIELDS) for row in where]
    found = [supported(text, own) for text, own in zip(texts, facts, strict=True)]
    return Reports(where, texts, facts, [stated for stated, _ in found], [wrong for _, wrong in found])


def supported(text: str, facts: Facts) -> tuple[list[str], list[str]]:
    """(names of the facts that the text states, claims that the record contradicts or does not give)."""
    clean = " ".join(text.lower().split())
    stated = [name for name in facts if states(clean, name, facts)]
    return stated, [fault for fault in find_faults(text, facts) if fault.startswith(CLAIMS)]


def report_rows(
    reports: Reports, texts: list[TextSet], scopes: list[Scope], draws: Draws, **fields: Any
) -> Iterator[Row]:
    """Rows of the task `report`: facts against the record; BLEU and ROUGE-L against each strategy's notes."""
    recall, precision = fact_shares(reports)
    shares = (("facts_recall", recall), ("facts_precision", precision))
    for scope in scopes:
        for metric, values in shares:
            yield from _mean_row(metric, values, reports.rows, scope, draws, fields)
    place = {int(row): i for i, row in enumerate(reports.rows)}
    for one in texts:
        pairs = [(place[int(row)], k) for k, row in enumerate(one.rows) if int(row) in place]
        if not pairs:
            continue
        ours, theirs = [reports.texts[i] for i, _ in pairs], [one.texts[k] for _, k in pairs]
        rows = reports.rows[[i for i, _ in pairs]]
        own = fields | {"track": one.track, "eval_strategy": one.strategy}
        overlap, counts = rouge_l(ours, theirs), bleu_counts(ours, theirs)
        for scope in scopes:
            yield from _mean_row("rouge_l", overlap, rows, scope, draws, own)
            inside = scope.mask[rows]
            if inside.any():
                drawn = np.array([bleu(c) for c in draws.sums(counts[inside], rows[inside])])
                value = Value(bleu(counts[inside].sum(axis=0)), *interval(drawn), None, int(inside.sum()))
                yield make_row("report", scope.kind, scope.name, "bleu", value, **own)


def fact_shares(reports: Reports) -> tuple[np.ndarray, np.ndarray]:
    """(share of the record's facts that are stated [n], share of the statements that the record supports [n]); NaN for
    a record without facts, or a report that states nothing."""
    stated = np.array([len(s) for s in reports.stated], dtype=float)
    given, wrong = (np.array([len(x) for x in v], dtype=float) for v in (reports.facts, reports.unsupported))
    nan = np.full(len(stated), np.nan)
    recall = np.divide(stated, given, out=nan.copy(), where=given > 0)
    return recall, np.divide(stated, stated + wrong, out=nan, where=stated + wrong > 0)


def rouge_l(ours: list[str], theirs: list[str]) -> np.ndarray:
    """ROUGE-L F measure [n] of each text against its reference (Lin, 2004), by rouge-score."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return np.array([scorer.score(ref, own)["rougeL"].fmeasure for own, ref in zip(ours, theirs, strict=True)])


def bleu_counts(ours: list[str], theirs: list[str]) -> np.ndarray:
    """[n, 2 + 2 · 4]: lengths of text and reference, n-grams that agree and all, by sacrebleu; sums are a corpus'."""
    scorer = _scorer()
    found = [scorer.sentence_score(own, [ref]) for own, ref in zip(ours, theirs, strict=True)]
    return np.array([[f.sys_len, f.ref_len, *f.counts, *f.totals] for f in found], dtype=float).reshape(len(ours), -1)


def bleu(counts: np.ndarray) -> float:
    """Corpus BLEU, 0 to 1, of summed counts [2 + 2 · 4] (Papineni et al., 2002; exponential smoothing)."""
    whole = [round(c) for c in counts]
    right, total = whole[2 : 2 + BLEU_ORDER], whole[2 + BLEU_ORDER :]
    return _scorer().compute_bleu(right, total, whole[0], whole[1], smooth_method="exp").score / 100


@functools.cache
def _scorer() -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU(effective_order=True, max_ngram_order=BLEU_ORDER)


def _mean_row(
    metric: str, values: np.ndarray, rows: np.ndarray, scope: Scope, draws: Draws, fields: dict[str, Any]
) -> Iterator[Row]:
    """The mean over a scope's records with a defined value; None where there are none."""
    inside = scope.mask[rows]
    if inside.any():
        kept = values[inside]
        defined = kept[np.isfinite(kept)]
        value = float(defined.mean()) if len(defined) else None
        found = Value(value, *interval(mean_draws(kept, rows[inside], draws)), None, len(defined))
        yield make_row("report", scope.kind, scope.name, metric, found, **fields)


def _written(model: Any, split: str, site: Site) -> Tensor:
    """Token ids [n, T] of the greedy reports of one split's readable images, filled up with the end token."""
    decoder = model.decoder

    def forward(pixels: Tensor) -> dict[str, Tensor]:
        tokens = decoder.generate(model.image(pixels)[0])
        full = tokens.new_full((len(tokens), decoder.max_tokens - 1), decoder.end)
        full[:, : tokens.shape[1]] = tokens
        return {"tokens": full}

    parts = site.parts(f"reports-{split}", site.manifest.fingerprint, split, model.image_size)
    what = f"writing {split} reports"
    found = embed_images(forward, site.manifest, split, model.image_size, parts, site.compute, site.ranks, what)
    return torch.from_numpy(found["tokens"]).long()
