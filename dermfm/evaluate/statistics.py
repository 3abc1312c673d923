"""Resampling of groups (lesions, patients) and what it gives: intervals of means, of confusion measures, of medians.

A draw is a weight for every group, so that one matrix product turns group sums into all resamples at once, and two runs
with the same seed over the same test set are resampled alike (paired).
"""

from __future__ import annotations

import dataclasses

import numpy as np

BLOCK = 64  # resamples handled together where an array over records would be too large otherwise


@dataclasses.dataclass(frozen=True)
class Draws:
    """`weights` float32 [resamples, groups]: how often each group was drawn; `group_of` [N]: the group of a record."""

    weights: np.ndarray
    group_of: np.ndarray

    def sums(self, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Resampled sums [resamples, ...] of `values` [n, ...] that belong to the records `rows` [n]."""
        flat = np.asarray(values, dtype=float).reshape(len(rows), int(np.prod(np.shape(values)[1:])))
        out = np.zeros((len(self.weights), flat.shape[1]))
        if len(rows):
            order = np.argsort(self.group_of[rows], kind="stable")
            groups, starts = np.unique(self.group_of[rows][order], return_index=True)
            per_group = np.add.reduceat(flat[order], starts, axis=0)
            for start in range(0, len(out), BLOCK):
                out[start : start + BLOCK] = self.weights[start : start + BLOCK][:, groups].astype(float) @ per_group
        return out.reshape(len(out), *np.shape(values)[1:])


def draw_groups(groups: np.ndarray, datasets: np.ndarray, resamples: int, seed: int) -> Draws:
    """Resample groups with replacement within strata; groups [N] and datasets [N] of the records.

    A stratum is the set of data sets that a group has records in, so that a lesion photographed for two data sets is
    drawn once for both.
    """
    names, group_of = np.unique(np.asarray(groups).astype(str), return_inverse=True)
    group_of = group_of.ravel()
    _, dataset_of = np.unique(np.asarray(datasets).astype(str), return_inverse=True)
    touched = np.zeros((len(names), int(dataset_of.max(initial=-1)) + 1), bool)
    touched[group_of, dataset_of.ravel()] = True
    strata = np.unique(touched, axis=0, return_inverse=True)[1].ravel()
    weights = np.zeros((resamples, len(names)), np.float32)
    for stratum in range(int(strata.max(initial=-1)) + 1):
        members = np.flatnonzero(strata == stratum)
        rng = np.random.default_rng([seed, stratum])
        for k in range(resamples):
            picked = rng.integers(0, len(members), len(members))
            weights[k, members] = np.bincount(picked, minlength=len(members))
    return Draws(weights, group_of)


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float | None, float | None]:
    """Percentile interval of resampled values [resamples]; (None, None) where fewer than half are defined."""
    values = np.asarray(values, dtype=float)
    finite = values[np.isfinite(values)]
    if len(finite) == 0 or len(finite) * 2 < len(values):
        return None, None
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def draw_seeds(num_seeds: int, resamples: int, seed: int) -> np.ndarray:
    """int64 [resamples, num_seeds]: the second level of a bootstrap, seeds drawn with replacement in every resample."""
    return np.random.default_rng([seed, num_seeds]).integers(0, num_seeds, (resamples, num_seeds))


def two_sided_p(values: np.ndarray) -> float:
    """Bootstrap p value of "no difference" from resampled differences [resamples] (Davison & Hinkley 1997, ch. 4).

    Twice the smaller tail on either side of 0, the observed sample counted once, so that it is never 0; NaN without
    a defined value.
    """
    finite = np.asarray(values, dtype=float)
    finite = finite[np.isfinite(finite)]
    if not len(finite):
        return float("nan")
    tail = min((finite <= 0).sum(), (finite >= 0).sum())
    return float(min(1.0, 2 * (tail + 1) / (len(finite) + 1)))


def holm(p_values: np.ndarray) -> np.ndarray:
    """Adjusted p values [m] of a family (Holm 1979): step down, never falling, at most 1; NaN stays and counts in m."""
    p_values = np.asarray(p_values, dtype=float)
    order = np.argsort(p_values, kind="stable")  # NaN comes last
    steps = p_values[order] * (len(p_values) - np.arange(len(p_values)))
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def mean_draws(values: np.ndarray, rows: np.ndarray, draws: Draws) -> np.ndarray:
    """Resampled means [resamples] of values [n] (NaN left out) of the records `rows`."""
    keep = np.isfinite(values)
    sums = draws.sums(np.stack([values[keep], np.ones(keep.sum())], axis=1), rows[keep])
    return _ratio(sums[:, 0], sums[:, 1])


def class_mean_draws(values: np.ndarray, labels: np.ndarray, rows: np.ndarray, draws: Draws) -> np.ndarray:
    """Resampled means over classes of the class means of values [n] with labels [n]; classes drawn zero times go."""
    keep = np.isfinite(values)
    onehot = (labels[keep][:, None] == np.unique(labels[keep])[None, :]).astype(float)
    sums = draws.sums(np.stack([values[keep][:, None] * onehot, onehot], axis=1), rows[keep])
    means = _ratio(sums[:, 0], sums[:, 1])
    counted = np.isfinite(means)
    return _ratio(np.where(counted, means, 0.0).sum(axis=1), counted.sum(axis=1).astype(float))


def class_mean(values: np.ndarray, labels: np.ndarray) -> float:
    """Mean over classes of the class means of values [n] (NaN left out); NaN where nothing is defined."""
    keep = np.isfinite(values)
    means = [values[keep & (labels == c)].mean() for c in np.unique(labels[keep])]
    return float(np.mean(means)) if means else float("nan")


def median_draws(values: np.ndarray, rows: np.ndarray, draws: Draws) -> np.ndarray:
    """Resampled medians [resamples] of values [n] (NaN left out): the middle of the two middle ones where even."""
    keep = np.isfinite(values)
    order = np.argsort(values[keep], kind="stable")
    ranked, groups = values[keep][order], draws.group_of[rows[keep]][order]
    out = np.full(len(draws.weights), np.nan)
    for start in range(0, len(out), BLOCK) if len(ranked) else ():
        total = np.cumsum(draws.weights[start : start + BLOCK][:, groups].astype(float), axis=1)
        half = total[:, -1:] / 2
        low = np.minimum((total < half).sum(axis=1), len(ranked) - 1)
        high = np.minimum((total <= half).sum(axis=1), len(ranked) - 1)
        out[start : start + BLOCK] = np.where(half[:, 0] > 0, (ranked[low] + ranked[high]) / 2, np.nan)
    return out


def auroc_draws(scores: np.ndarray, labels: np.ndarray, rows: np.ndarray, draws: Draws) -> np.ndarray:
    """Resampled one-versus-rest AUROC [resamples], mean over the classes with both sides drawn; scores [n, C]."""
    total, defined = np.zeros(len(draws.weights)), np.zeros(len(draws.weights))
    for c in np.unique(labels):
        hit = labels == c
        area = _area_draws(scores[hit, c], scores[~hit, c], rows[hit], rows[~hit], draws)
        good = np.isfinite(area)
        total += np.where(good, area, 0.0)
        defined += good
    return _ratio(total, defined)


def _area_draws(
    positive: np.ndarray, negative: np.ndarray, positive_rows: np.ndarray, negative_rows: np.ndarray, draws: Draws
) -> np.ndarray:
    """Resampled areas [resamples]: the weight of (positive, lower negative) pairs, ties half; NaN for one side only."""
    order = np.argsort(negative, kind="stable")
    ranked = negative[order]
    lower, upper = np.searchsorted(ranked, positive, "left"), np.searchsorted(ranked, positive, "right")
    groups_p, groups_n = draws.group_of[positive_rows], draws.group_of[negative_rows][order]
    out = np.full(len(draws.weights), np.nan)
    below = np.zeros((BLOCK, len(ranked) + 1))
    for start in range(0, len(out), BLOCK):
        weights = draws.weights[start : start + BLOCK]
        drawn, count = weights[:, groups_p].astype(float), len(weights)
        np.cumsum(weights[:, groups_n], axis=1, out=below[:count, 1:])
        pairs = np.einsum("ij,ij->i", drawn, below[:count, lower])
        if (upper > lower).any():
            pairs = (pairs + np.einsum("ij,ij->i", drawn, below[:count, upper])) / 2
        out[start : start + BLOCK] = _ratio(pairs, drawn.sum(axis=1) * below[:count, -1])
    return out


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    return np.divide(top, bottom, out=np.full(np.shape(top), np.nan), where=bottom > 0)
