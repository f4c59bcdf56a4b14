"""Intervals and tests: closed forms, scipy as the reference, and coverage by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from holdfast.errors import UserError
from holdfast.evaluate.intervals import t_value
from holdfast.evaluate.paired import coin_tail, score_statistic
from holdfast.evaluate.statistics import (
    drop_bounds,
    holm,
    mcnemar,
    mean_interval,
    minimum_detectable_drop,
    paired_bootstrap,
    paired_interval,
    power,
    ratio_interval,
    seed_range,
    wilson,
)


def outcomes(lost: int, won: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    before, after = np.zeros(n), np.zeros(n)
    before[:lost] = 1.0
    after[lost : lost + won] = 1.0
    both = (n - lost - won) // 2
    before[lost + won : lost + won + both] = after[lost + won : lost + won + both] = 1.0
    return before, after


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (5, 1), (30, 12), (3, 9), (200, 150)])
def test_mcnemar_is_the_binomial_test(lost: int, won: int) -> None:
    found = mcnemar(*outcomes(lost, won, 600))
    assert (found.lost, found.won) == (lost, won)
    if lost + won:
        assert found.p_value == pytest.approx(stats.binomtest(lost, lost + won).pvalue, rel=1e-9)
        assert found.p_drop == pytest.approx(stats.binomtest(lost, lost + won, alternative="greater").pvalue, rel=1e-9)
    else:
        assert found.p_value == found.p_drop == 1.0
    assert coin_tail(3, 2) == 0.0


@pytest.mark.parametrize("freedom", [1, 2, 7, 30, 500])
def test_t_quantile_is_scipys(freedom: int) -> None:
    assert t_value(0.95, freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-5)


def test_wilson_closed_form() -> None:
    value, low, high = wilson(8, 10)
    reference = stats.binomtest(8, 10).proportion_ci(method="wilson")
    assert (value, low, high) == pytest.approx((0.8, reference.low, reference.high))
    assert wilson(0, 50).low == 0.0
    assert np.isnan(mean_interval([]).value)


def test_score_statistic_solves_the_constrained_likelihood() -> None:
    # Under H0 the chances are (q + δ) to lose, q to win; q maximises the multinomial likelihood.
    lost, won, n, delta = 14, 6, 100, 0.02
    grid = np.linspace(1e-6, 0.45, 400_001)
    loglik = lost * np.log(grid + delta) + won * np.log(grid) + (n - lost - won) * np.log1p(-2 * grid - delta)
    q = grid[np.nanargmax(loglik)]
    expected = (lost - won - n * delta) / np.sqrt(n * (2 * q + delta * (1 - delta)))
    assert float(score_statistic(lost, won, n, delta)) == pytest.approx(expected, abs=1e-4)


def test_bounds_invert_the_test_and_are_symmetric() -> None:
    low, high = drop_bounds(30, 12, 500, 0.05)
    z = stats.norm.ppf(0.95)
    assert float(score_statistic(30, 12, 500, low)) == pytest.approx(z, abs=1e-6)
    assert float(score_statistic(30, 12, 500, high)) == pytest.approx(-z, abs=1e-6)
    mirrored = drop_bounds(12, 30, 500, 0.05)
    assert (float(mirrored[0]), float(mirrored[1])) == pytest.approx((-float(high), -float(low)))
    assert float(drop_bounds(0, 0, 1000, 0.05)[1]) < 0.003


def test_bootstrap_of_known_spread() -> None:
    before, after = outcomes(40, 20, 1000)
    value, low, high = paired_bootstrap(before, after, seed=1)
    spread = np.sqrt(0.06 - 0.02**2) / np.sqrt(1000)
    assert value == pytest.approx(0.02)
    assert (low, high) == pytest.approx((0.02 - 1.96 * spread, 0.02 + 1.96 * spread), abs=0.001)
    assert paired_bootstrap(before, after, seed=1) == (value, low, high)
    with_missing = paired_bootstrap([*before, np.nan], [*after, 1.0], seed=1)
    assert with_missing.value == pytest.approx(value)
    weighted = paired_bootstrap([3.0, 1.0], [1.0, 1.0], weights=[1.0, 3.0])
    assert weighted.value == pytest.approx(0.5)


def test_wrong_shapes_are_user_errors() -> None:
    with pytest.raises(UserError):
        paired_bootstrap([1.0], [1.0, 0.0])
    with pytest.raises(UserError):
        mcnemar([[1.0]], [[1.0]])
    with pytest.raises(UserError):
        seed_range([])


@pytest.mark.parametrize("n", [200, 1000])
def test_coverage_of_one_checkpoints_interval(n: int) -> None:
    generator = np.random.default_rng(n)
    chances = generator.uniform(0.1, 0.9, 20_000)
    known = {k: wilson(k, n) for k in range(n + 1)}
    inside = [known[k].low <= p <= known[k].high for p, k in zip(chances, generator.binomial(n, chances))]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize(("n", "discordance", "drop"), [(300, 0.1, 0.0), (500, 0.05, 0.02), (1000, 0.1, 0.03)])
def test_coverage_of_the_paired_intervals(n: int, discordance: float, drop: float) -> None:
    generator = np.random.default_rng(7)
    chances = [(discordance + drop) / 2, (discordance - drop) / 2, 1 - discordance]
    drawn = generator.multinomial(n, chances, 4000)
    low, high = drop_bounds(drawn[:, 0], drawn[:, 1], n, 0.025)
    assert np.mean((low <= drop) & (drop <= high)) == pytest.approx(0.95, abs=0.015)
    inside = []
    for lost, won, _ in drawn[:600]:
        estimate = paired_bootstrap(*outcomes(int(lost), int(won), n), resamples=500, seed=int(lost))
        inside.append(estimate.low <= drop <= estimate.high)
    assert np.mean(inside) == pytest.approx(0.95, abs=0.03)


def test_coverage_of_a_perplexitys_interval() -> None:
    generator = np.random.default_rng(0)
    inside = []
    for _ in range(2000):
        weight = generator.integers(50, 400, 40).astype(float)
        nats = weight * generator.normal(3.0, 0.4, 40)
        _, low, high = ratio_interval(nats, weight)
        inside.append(low <= 3.0 <= high)
    assert np.mean(inside) == pytest.approx(0.95, abs=0.015)


def test_paired_interval_of_graded_scores_is_the_t_interval() -> None:
    generator = np.random.default_rng(3)
    before, after = generator.normal(1, 1, 50), generator.normal(0.5, 1, 50)
    reference = stats.ttest_rel(before, after).confidence_interval()
    found = paired_interval(before, after)
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high), rel=1e-4)


def test_power_and_smallest_drop_agree() -> None:
    smallest = minimum_detectable_drop(1000, 0.05, budget=0.01)
    assert power(1000, smallest, 0.05, budget=0.01) == pytest.approx(0.8, abs=1e-6)
    assert minimum_detectable_drop(4000, 0.05) < minimum_detectable_drop(1000, 0.05)
    assert power(500, 0.0, 0.05) == pytest.approx(0.05, abs=1e-9)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm({"a": 0.5, "b": 0.9}) == pytest.approx({"a": 1.0, "b": 1.0})


def test_seed_range() -> None:
    found = seed_range([50.0, 52.0, 54.0])
    assert (found.mean, found.least, found.greatest, found.deviation, found.seeds) == (52.0, 50.0, 54.0, 2.0, 3)
