"""Group resampling against what it stands for: repeated records, whole groups, strata of fixed size."""

from __future__ import annotations

import numpy as np
import pytest

from dermfm.evaluate import statistics as st


@pytest.fixture
def draws() -> st.Draws:
    groups = np.array([f"g{i // 2}" for i in range(60)])
    datasets = np.array(["A"] * 30 + ["B", "C"] * 15)  # the groups of B and C lie in both
    return st.draw_groups(groups, datasets, 200, 3)


def test_every_draw_has_as_many_groups_of_each_stratum_as_there_are(draws: st.Draws) -> None:
    in_a = np.unique(draws.group_of[:30])
    assert draws.weights.shape == (200, 30)
    assert (draws.weights[:, in_a].sum(axis=1) == 15).all()
    assert (draws.weights.sum(axis=1) == 30).all()


def test_records_of_one_group_are_drawn_together_in_all_data_sets(draws: st.Draws) -> None:
    assert (draws.group_of[0::2] == draws.group_of[1::2]).all()


def test_the_same_seed_gives_the_same_draws_and_another_gives_others() -> None:
    groups, datasets = np.arange(20), np.zeros(20)
    first, again, other = (st.draw_groups(groups, datasets, 30, seed).weights for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()


def test_means_medians_and_class_means_are_those_of_the_drawn_records(draws: st.Draws) -> None:
    rng = np.random.default_rng(0)
    values, labels = np.round(rng.normal(size=60), 1), rng.integers(0, 3, 60)
    values[5] = np.nan
    rows = np.arange(60)
    means, medians = st.mean_draws(values, rows, draws), st.median_draws(values, rows, draws)
    macros = st.class_mean_draws(values, labels, rows, draws)
    for k, weights in enumerate(draws.weights[:50]):
        drawn = np.repeat(rows, weights[draws.group_of].astype(int))
        assert means[k] == pytest.approx(np.nanmean(values[drawn]))
        assert medians[k] == pytest.approx(np.nanmedian(values[drawn]))
        assert macros[k] == pytest.approx(
            np.mean([np.nanmean(values[drawn][labels[drawn] == c]) for c in set(labels[drawn])])
        )


def test_the_interval_of_a_mean_has_the_width_that_theory_gives() -> None:
    rng = np.random.default_rng(1)
    values, rows = rng.normal(size=800), np.arange(800)
    draws = st.draw_groups(rows, rows * 0, 2000, 0)
    low, high = st.interval(st.mean_draws(values, rows, draws))
    assert low is not None
    assert high is not None
    assert high - low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(800), rel=0.08)


def test_groups_widen_the_interval_where_their_records_are_alike() -> None:
    values, rows = np.repeat(np.random.default_rng(2).normal(size=100), 4), np.arange(400)
    alone = st.interval(st.mean_draws(values, rows, st.draw_groups(rows, rows * 0, 500, 0)))
    grouped = st.interval(st.mean_draws(values, rows, st.draw_groups(rows // 4, rows * 0, 500, 0)))
    assert (grouped[1] - grouped[0]) > 1.6 * (alone[1] - alone[0])  # type: ignore[operator]


def test_an_interval_of_mostly_undefined_draws_is_empty() -> None:
    assert st.interval(np.array([np.nan] * 6 + [1.0] * 4)) == (None, None)
    assert st.interval(np.array([])) == (None, None)
