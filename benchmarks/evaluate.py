"""Class-level retrieval: ours against the reference study's algorithm, and the full size with its memory.

The reference is the published code of "Evaluating Strategies for Synthesizing Clinical Notes for Medical Multimodal
AI": the whole similarity matrix, a full argsort of every row, a Python loop over the ranked items. Both run on one
thread over the same random embeddings with the labels of the reference's 62,693 images; the values must agree.
`python benchmarks/evaluate.py [--quick]`.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks` is no installed package

import numpy as np

from benchmarks.shared.figures import figure, show
from dermfm.evaluate.ranking import CHUNK, Pool, rank_classes

KS = (5, 10, 20, 50, 100)
WIDTH = 128
COUNTS = (6129, 823, 28030, 851, 3485, 12236, 7832, 3307)  # images of the eight classes in the label tables of all sets
FULL = sum(COUNTS)  # 62,693


def reference_metrics(vectors: np.ndarray, labels: np.ndarray, queries: int) -> tuple[np.ndarray, np.ndarray]:
    """(AP [Q], P@K [Q, K]) as the reference computes them: nothing is left out of the pool, ties in array order."""
    similarity = vectors @ vectors.T
    order = np.argsort(-similarity, axis=1)
    ap, precision = np.zeros(queries), np.zeros((queries, len(KS)))
    for q in range(queries):
        relevant = labels[order[q]] == labels[q]
        hits, total = 0, 0.0
        for place, hit in enumerate(relevant):
            if hit:
                hits += 1
                total += hits / (place + 1)
        ap[q] = total / max(hits, 1)
        precision[q] = [relevant[:k].mean() for k in KS]
    return ap, precision


def our_metrics(vectors: np.ndarray, labels: np.ndarray, queries: int) -> tuple[np.ndarray, np.ndarray]:
    """The same numbers, streaming."""
    groups = np.arange(len(labels))
    found = rank_classes(vectors, labels, groups, Pool(vectors, labels, groups), KS, np.arange(queries), own_group=True)
    return found.ap, found.precision


def example(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors [count, 128] that know a little about their labels [count], which are drawn from the real ones."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(COUNTS)), COUNTS))[:count]
    vectors = rng.normal(size=(count, WIDTH)) + 0.8 * rng.normal(size=(len(COUNTS), WIDTH))[labels]
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), labels


def timed(call: object, *args: object) -> tuple[float, tuple[np.ndarray, np.ndarray]]:
    """(seconds, result) of one call."""
    began = time.perf_counter()
    result = call(*args)  # type: ignore[operator]
    return time.perf_counter() - began, result


def compare(count: int, rounds: int) -> dict[str, object]:
    """Both algorithms over a pool of `count`, alternating; the best time of each; values checked."""
    vectors, labels = example(count)
    ours, theirs = [], []
    for _ in range(rounds):
        seconds, (ap, precision) = timed(our_metrics, vectors, labels, count)
        ours.append(seconds)
        seconds, (their_ap, their_precision) = timed(reference_metrics, vectors, labels, count)
        theirs.append(seconds)
    # Products of other shapes round otherwise in the last bit, which swaps single neighbours of nearly equal score.
    np.testing.assert_allclose(ap, their_ap, atol=1e-5)
    np.testing.assert_allclose(ap.mean(), their_ap.mean(), atol=1e-6)
    np.testing.assert_allclose(precision.mean(axis=0), their_precision.mean(axis=0), atol=1e-6)
    return figure(f"class-level retrieval, {count} x {count}", count / min(ours), count / min(theirs), "queries/s", 8.0)


def full_size(queries: int) -> list[dict[str, object]]:
    """Seconds for all 62,693 queries (extrapolated from `queries` of them) and the peak memory of this process."""
    vectors, labels = example(FULL)
    seconds, _ = timed(our_metrics, vectors, labels, queries)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"{FULL} x {FULL}: {seconds / queries * FULL:.0f} s on one thread ({queries} queries timed), peak {peak:.2f} GB"
    )
    return [figure(f"peak memory at {FULL} x {FULL}", peak, 49.0, "GB", round(2 / 49, 3), "lower")]  # at most 2 GB


def main() -> None:
    """Print a table and one JSON object a figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smaller pool and one round")
    quick = parser.parse_args().quick
    figures = full_size(CHUNK * (1 if quick else 8))
    figures.append(compare(2000 if quick else 12_000, 1 if quick else 2))
    show(figures)


if __name__ == "__main__":
    main()
