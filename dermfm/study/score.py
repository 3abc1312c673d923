"""From a cell's model to its JSON: rows of metrics in the project's scopes, predicted classes, versions."""

from __future__ import annotations

import importlib.metadata
import sys
from typing import Any

import numpy as np

from dermfm.evaluate.results import Row
from dermfm.evaluate.scoring import Scored, classification_rows
from dermfm.evaluate.shift import make_scopes
from dermfm.evaluate.statistics import draw_groups
from dermfm.evaluate.zeroshot import PROMPT_SETS, make_prompts, zero_shot_scores
from dermfm.records.vocabulary import MALIGNANCIES, MALIGNANCY_OF
from dermfm.study import cells as stored
from dermfm.study.config import IMAGE_ONLY, Cell, StudyConfig
from dermfm.study.prepare import Shared
from dermfm.study.tier1 import Data, Trained, image_outputs, make_text_vectors

SHOWN_IN_CELL = {"classes": None, "malignancy": ("balanced_accuracy", "f1_macro", "auroc")}


class Scorer:
    """Scores predictions over the scored records, in the project's scopes, with the same resamples for all cells."""

    def __init__(self, config: StudyConfig, shared: Shared) -> None:
        self.records, self.protocol = shared.records["test"], shared.protocol
        self._scopes = make_scopes(self.records, shared.protocol)
        self._draws = draw_groups(self.records.groups, self.records.datasets, config.cell_resamples, config.seed)

    def content(self, cell: Cell, trained: Trained, data: Data) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What a cell's JSON says of the result, and the probabilities by split."""
        valid, _ = image_outputs(trained.model, data, "valid")
        test, embeddings = image_outputs(trained.model, data, "test")
        fields = {"train_strategy": None if cell.strategy == IMAGE_ONLY else cell.strategy, "seed": cell.seed}
        rows = self.heads("classify-image", test, fields)
        if cell.strategy != IMAGE_ONLY:  # without notes nothing has trained the text side
            rows += self.zero_shot(trained, data, embeddings, fields)
        content = {
            "search": {"tries": trained.tries, "chosen": trained.chosen},
            "losses": {name: round(value, 4) for name, value in trained.losses.items()},
            "results": stored.compact_rows(rows),
            "predicted": {"test": stored.digits(test), "valid": stored.digits(valid)},
        }
        return content, {"test": test, "valid": valid}

    def heads(self, task: str, probabilities: np.ndarray, fields: dict[str, Any]) -> list[Row]:
        """Rows of a head's probabilities: the classes with every metric, malignancy with few."""
        sums = np.array([[MALIGNANCY_OF[c] == m for m in MALIGNANCIES] for c in range(probabilities.shape[1])], float)
        every = np.arange(len(self.records))
        rows = []
        for class_set, scores in (("classes", probabilities), ("malignancy", probabilities @ sums)):
            kept = SHOWN_IN_CELL[class_set]
            found = self._rows(Scored(task, class_set, every, scores), fields)
            rows += [row for row in found if kept is None or row["metric"] in kept]
        return rows

    def zero_shot(self, trained: Trained, data: Data, embeddings: np.ndarray, fields: dict[str, Any]) -> list[Row]:
        """Rows of zero-shot classification of the eight classes."""
        prompts = make_prompts()
        vectors = make_text_vectors(trained.model, data, prompts.texts)
        rows = []
        for prompt_set in PROMPT_SETS:
            scores = zero_shot_scores(embeddings, prompts, vectors, "classes", prompt_set)
            scored = Scored(
                "zero-shot", "classes", np.arange(len(scores)), scores, False, {"eval_strategy": prompt_set}
            )
            found = self._rows(scored, fields)
            rows += [row for row in found if row["metric"] in ("f1_macro", "f1_weighted", "balanced_accuracy")]
        return rows

    def endpoint(self, content: dict[str, Any]) -> float:
        """Mean over the external data sets of a cell's macro F1 of image classification."""
        values = [
            row["value"]
            for row in content["results"]
            if row["task"] == "classify-image" and row["metric"] == "f1_macro" and row["class_set"] == "classes"
            and row["scope_kind"] == "dataset" and row["scope"] in self.protocol.external
        ]  # fmt: skip
        return float(np.mean(values))

    def _rows(self, scored: Scored, fields: dict[str, Any]) -> list[Row]:
        return list(
            classification_rows(scored, self.records.truth[scored.class_set], self._scopes, self._draws, **fields)
        )


def versions() -> dict[str, str]:
    """Versions of what computes."""
    names = ("dermfm", "torch", "timm", "transformers", "numpy", "scikit-learn")
    return {"python": ".".join(map(str, sys.version_info[:3]))} | {n: importlib.metadata.version(n) for n in names}
