"""The protocol part of metrics.json: what a reader must know to read the rows."""

from __future__ import annotations

import importlib.metadata
import sys
from dataclasses import asdict
from typing import Any

import numpy as np

from dermfm.evaluate.embedding import Embedded
from dermfm.evaluate.records import CLASS_SETS, RecordSet
from dermfm.evaluate.scoring import PRECISION_AT, RECALL_AT
from dermfm.evaluate.settings import EvaluateConfig
from dermfm.evaluate.shift import QUIRKS, ProtocolConfig, Scope, absent_classes, empty_partitions
from dermfm.evaluate.zeroshot import Prompts


def describe(
    config: EvaluateConfig,
    protocol: ProtocolConfig,
    embedded: Embedded,
    scopes: list[Scope],
    splits: list[str],
    trained: list[str],
    more: dict[str, Any],
) -> dict[str, Any]:
    """The protocol part of metrics.json: everything that a reader must know to read the rows.

    `splits`: those of the records that have embeddings, the scored ones first; `more` is added as it is.
    """
    records = embedded.records.select(np.flatnonzero(embedded.scored))
    main = [s for s in scopes if s.kind != "subgroup"]
    return (
        asdict(protocol)
        | {name: protocol.has(name) for name in QUIRKS}
        | {
            "splits": splits,
            "scored_splits": config.splits,
            "num_embedded": len(embedded.records),
            "num_records": len(records),
            "num_groups": len(set(records.groups)),
            "datasets": {d: int((records.datasets == d).sum()) for d in sorted(set(records.datasets))},
            "modality": {
                d: sorted(set(records.modality[records.datasets == d])) for d in sorted(set(records.datasets))
            },
            "trained_on": trained,
            "classes": CLASS_SETS["classes"],
            "num_unlabelled": {d: n for d in sorted(set(records.datasets)) if (n := _unlabelled(records, d))},
            "subgroups": {s.name: int(s.mask.sum()) for s in scopes if s.kind == "subgroup"},
            "absent_classes": absent_classes(embedded.records, main),
            "empty_partitions": empty_partitions(main),
            "unreadable_images": embedded.unreadable,
            "notes": [{"strategy": t.strategy, "track": t.track, "num_notes": len(t.rows)} for t in embedded.texts],
            "zero_shot_templates": templates_of(embedded.prompts),
            "retrieval": retrieval_rules(protocol) | {"rerank": config.rerank},
            "chance": "classification: always the scope's most frequent class; retrieval: a random order of the pool",
            "intervals": {"level": 0.95, "method": "percentile bootstrap of groups within data sets"}
            | {"resamples": config.resamples, "seed": config.seed},
            "views": config.views,
            "precision": config.precision,
            "batch_size": config.batch_size,
            "versions": _versions(),
        }
        | more
    )


def retrieval_rules(protocol: ProtocolConfig) -> dict[str, Any]:
    """The rules of retrieval in words."""
    splits = "all splits" if protocol.has("all_splits_in_pool") else "the scored splits"
    once = "; identical embeddings once" if protocol.has("merge_identical") else ""
    kept = protocol.has("self_in_pool")
    own = "in the pool, the query itself too" if kept else "out of the pool"
    instance = (
        "the record's own note or image is the target, others of its group are out; image to image and note to note: "
        "the others of the group are the targets; rows of eval_strategy `same-class`: against items of the own class"
    )
    return {
        "pool": f"one note a record; {splits} of all data sets together{once}",
        "class_level": f"same class is relevant; the query's own group is {own}",
        "instance_level": None if kept else instance,
        "ties": "expectation over random order within ties; median rank uses mid-ranks",
        "precision_at": list(PRECISION_AT),
        "recall_at": list(RECALL_AT),
    }


def templates_of(prompts: Prompts) -> dict[str, list[str]]:
    """Class set → its templates, the bare word first."""
    return {name: _templates(prompts, name) for name in CLASS_SETS}


def _templates(prompts: Prompts, class_set: str) -> list[str]:
    word = CLASS_SETS[class_set][0]
    own = zip(prompts.texts, prompts.class_sets, prompts.classes, strict=True)
    return [text.replace(word, "{}") for text, name, c in own if name == class_set and c == 0]


def _unlabelled(records: RecordSet, dataset: str) -> int:
    return int(((records.datasets == dataset) & (records.labels < 0)).sum())


def _versions() -> dict[str, str]:
    import sklearn
    import torch

    python = ".".join(map(str, sys.version_info[:3]))
    return {
        "dermfm": importlib.metadata.version("dermfm"),
        "python": python,
        "torch": torch.__version__,
        "numpy": np.__version__,
    } | {"scikit-learn": sklearn.__version__}
