"""The image embeddings in the plane, by t-SNE of scikit-learn: coloured by class and by data set."""

from __future__ import annotations

import dataclasses

import numpy as np

from dermfm.records.vocabulary import CLASS_CODES
from dermfm.report.run import Evaluation

MAX_POINTS = 1000
MIN_POINTS = 10  # fewer say nothing, and t-SNE has no neighbourhood to keep
MAX_PERPLEXITY = 30.0


@dataclasses.dataclass(frozen=True)
class EmbeddingMap:
    """`points` [n, 2]; the place of each point's class and data set in the names of both (−1: unknown class)."""

    points: np.ndarray
    classes: np.ndarray
    class_names: list[str]
    datasets: np.ndarray
    dataset_names: list[str]
    total: int
    perplexity: float


def embedding_map(evaluation: Evaluation, seed: int, limit: int = MAX_POINTS) -> EmbeddingMap | None:
    """The map of at most `limit` images drawn at random; None for fewer than MIN_POINTS or without any spread."""
    total = len(evaluation.image)
    rows = np.sort(np.random.default_rng(seed).permutation(total)[:limit])
    vectors = np.asarray(evaluation.image[rows], dtype=np.float32)
    if len(rows) < MIN_POINTS or not (np.ptp(vectors, axis=0) > 0).any():
        return None
    perplexity = min(MAX_PERPLEXITY, (len(rows) - 1) / 3)
    labels, names = evaluation.records.labels[rows], evaluation.records.datasets[rows].astype(str)
    present = [c for c in range(len(CLASS_CODES)) if (labels == c).any()]
    dataset_names, datasets = np.unique(names, return_inverse=True)
    return EmbeddingMap(
        points=project(vectors, perplexity, seed),
        classes=np.array([present.index(c) if c in present else -1 for c in labels]),
        class_names=[CLASS_CODES[c] for c in present],
        datasets=datasets.ravel(),
        dataset_names=dataset_names.tolist(),
        total=total,
        perplexity=perplexity,
    )


def project(vectors: np.ndarray, perplexity: float, seed: int) -> np.ndarray:
    """Vectors [n, d] as points [n, 2] by t-SNE (van der Maaten & Hinton, JMLR 2008); one thread, always the same."""
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1):
        found = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(vectors)
    return np.round(found, 2)
